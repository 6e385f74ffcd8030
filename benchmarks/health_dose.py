"""How slow a rank or a link has to be until jaxlab.health sees it.

    python benchmarks/health_dose.py --out dose.jsonl      # 30 minutes, as root
    python benchmarks/health_dose.py --out dose.jsonl --summary

Linux, as root. The job and the hosts are those of benchmarks/health_campaign.py. Doses:

- `throttle`: a rank's process gets 0, 5, 10, 20 or 50 % less of a processor than it
  used in the seconds before (a cgroup's quota).
- `slow_link`: a link that the ring uses carries a 1st, 2nd, 5th, 10th, 20th or 50th of
  what it did, in that direction.

Each dose lasts until the supervisor acts, and `patience` at most. `seen`: a diagnosis
came; `right`: and the last one before the action has the kind and exactly the culprit.
`step`: the duration of a step under the dose over that before, medians. A line of the
output is one dose on one victim; those that are there already are not repeated.
"""

import contextlib
import dataclasses
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.faults import draw, injected
from common.hosts import full_mesh
from common.namespaces import stop_on_signals
from common.supervised import TOLD, Job, Work, running
from health_campaign import (
    HEALTHY_MBIT,
    KINDS,
    RANKS,
    learned,
    read,
    right,
    scene,
    stepping,
    verdict,
)

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import UserError

DOSES = {
    "throttle": (0.0, 0.05, 0.1, 0.2, 0.5),
    "slow_link": (1.0, 2.0, 5.0, 10.0, 20.0, 50.0),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Slows ranks and links by and by."""

    out: str = "dose.jsonl"
    """a line for each dose"""
    seeds: int = 3
    """victims of each dose"""
    first: int = 0
    """the first seed"""
    patience: float = 40.0
    """seconds of a dose, at most"""
    summary: bool = False
    """only read the output, and print the table"""


def used(pid: int, seconds: float = 2.0) -> float:
    """Processors that a process keeps busy."""

    def ticks() -> int:
        row = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(row[11]) + int(row[12])

    before, began = ticks(), time.monotonic()
    time.sleep(seconds)
    spent = (ticks() - before) / os.sysconf("SC_CLK_TCK")
    return spent / (time.monotonic() - began)


def pace(job: Job, begin: float, end: float) -> float:
    """Seconds of a step, median; NaN: too few."""
    times = [at for _, at in job.progress() if begin <= at < end]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return statistics.median(gaps) / TOLD if gaps else float("nan")


def dosed(job: Job, fault: str, dose: float, seed: int, patience: float) -> dict:
    """One dose.

    Raises:
        UserError: the job does not come to run.
    """
    chance = random.Random(f"{fault} {dose} {seed}")
    job.wait(lambda: stepping(job) and learned(job), 120, "profile of healthy steps")
    time.sleep(chance.uniform(4, 8))
    stage = scene(job)
    victim = draw(fault, stage, chance)
    quota = 1.0
    if fault == "throttle":
        quota = used(stage.pids[victim.ranks[0]]) * (1 - dose)
    began = time.time()
    with injected(fault, stage, victim, HEALTHY_MBIT / max(dose, 1), quota):
        while time.time() < began + patience:
            seen = [event["event"] for event in job.events(began)]
            if {"restart", "reorder", "resigned", "give_up"} & set(seen):
                break
            time.sleep(0.1)
    ended = time.time()
    row = {"fault": fault, "dose": dose, "seed": seed, "victim": victim._asdict()}
    row |= {"expected": KINDS[fault], "load": os.getloadavg()[0]}
    row |= {"before": pace(job, began - 10, began), "under": pace(job, began, ended)}
    row |= verdict(job.events(began), began)
    with contextlib.suppress(UserError):
        job.wait(lambda: stepping(job), 60, "steps")
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What was seen of each dose, as Markdown."""
    lines = [
        "| fault | dose | step | seen | kind and culprit right | first alarm, s |",
        "|---|---|---|---|---|---|",
    ]
    for fault, doses in DOSES.items():
        for dose in doses:
            some = [r for r in rows if (r["fault"], r["dose"]) == (fault, dose)]
            if not some:
                continue
            seen = [r for r in some if r["first"]]
            slower = [r["under"] / r["before"] for r in some]
            times = ", ".join(f"{r['first']['seconds']:.1f}" for r in seen)
            name = f"-{dose:.0%}" if fault == "throttle" else f"1/{dose:g}"
            lines.append(
                f"| {fault} | {name} | {statistics.median(slower):.2f} x "
                f"| {len(seen)}/{len(some)} | {sum(map(right, some))}/{len(some)} "
                f"| {times or '-'} |"
            )
    text = f"{os.cpu_count()} processors; {platform.platform()}."
    return "\n".join([*lines, "", text])


def main(arguments: list[str]) -> None:
    """Measures and prints the table."""
    options = parse_options(Options, arguments, "benchmarks/health_dose.py")
    stop_on_signals()
    path = Path(options.out)
    done = {(r["fault"], r["dose"], r["seed"]) for r in read(path)}
    todo = [
        (fault, dose, seed)
        for seed in range(options.first, options.first + options.seeds)
        for fault, doses in DOSES.items()
        for dose in doses
        if (fault, dose, seed) not in done
    ]
    if todo and not options.summary:
        with contextlib.ExitStack() as stack:
            hosts = stack.enter_context(full_mesh(RANKS + 1, HEALTHY_MBIT))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            job = stack.enter_context(running(hosts, folder, Work(), RANKS))
            for fault, dose, seed in todo:
                row = dosed(job, fault, dose, seed, options.patience)
                with open(path, "a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
                said = row["verdict"] and row["verdict"]["text"]
                print(fault, dose, seed, said, file=sys.stderr, flush=True)
                if row["first"] and not row["recovered"]:
                    job.stop()  # what it suspects would linger
                    job.start()
    print(table(read(path)))


if __name__ == "__main__":
    run_main(main)
