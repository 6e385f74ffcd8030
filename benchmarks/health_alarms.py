"""How often jaxlab.health raises an alarm where nothing is wrong.

    python benchmarks/health_alarms.py --out alarms.jsonl --hours 1 --arms clean nasty
    python benchmarks/health_alarms.py --out alarms.jsonl --summary

Linux, as root. The job of benchmarks/health_campaign.py runs, with a supervisor, and no
fault is injected:

- `clean`: steps, and a checkpoint every 200.
- `nasty`: besides, at random times for 2 to 15 s, a program on every processor that
  does nothing but burn it (a fifth of the time); a checkpoint every 20 steps, an
  evaluation every 50, a batch of another length that is compiled anew every 500, and
  every 100 a collection of a million objects of garbage.

The arms run one after the other, or in processes of their own at one time. A line of
the output is a part of ten minutes, from the first step of a job to the end; parts add
up, so a run that is cut short is worth what it has. Seconds in which the job started
do not count. An alarm is every diagnosis that the supervisor writes down; an action is
what it did about it (a restart, say).
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.hosts import full_mesh
from common.namespaces import stop_on_signals
from common.supervised import Work, running
from health_campaign import ACTIONS, HEALTHY_MBIT, RANKS, read, stepping

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import ConfigError

ARMS = {
    "clean": Work(),
    "nasty": Work(checkpoint=20, evaluation=50, recompile=500, garbage=100),
}
BURN = (2.0, 15.0)
"""seconds of a burst, least and most"""
SHARE = 0.2
"""of the time, in which processors are burnt"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Counts false alarms."""

    out: str = "alarms.jsonl"
    """a line for each part"""
    hours: float = 1.0
    """of each arm"""
    arms: tuple[str, ...] = tuple(ARMS)
    part: float = 600.0
    """seconds of a part"""
    summary: bool = False
    """only read the output, and print the table"""


@contextlib.contextmanager
def bursts(chance: random.Random) -> Iterator[list[float]]:
    """Burns all processors now and then, from a process of its own; when it did."""
    burn = "while True: pass"
    told: list[float] = []
    script = f"""
import random, subprocess, sys, time
chance = random.Random({chance.random()})
while True:
    time.sleep(chance.expovariate({SHARE / (sum(BURN) / 2) / (1 - SHARE)}))
    burning = [
        subprocess.Popen([sys.executable, "-c", {burn!r}])
        for _ in range({os.cpu_count()})
    ]
    try:
        time.sleep(chance.uniform{BURN})
    finally:
        for process in burning:
            process.kill()
            process.wait()
    print(time.time(), flush=True)
"""
    # SIGTERM has to run the `finally` above.
    head = "import signal; signal.signal(signal.SIGTERM, signal.default_int_handler)"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", head + script], stdout=log, stderr=log
        )
        try:
            yield told
        finally:
            process.terminate()
            process.wait()
            log.seek(0)
            # Beside a traceback of its interruption.
            lines = log.read().splitlines()
            told += [float(x) for x in lines if x.replace(".", "", 1).isdigit()]


def part(arm: str, seconds: float, seed: int) -> dict[str, Any]:
    """Watches a job for a while."""
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(full_mesh(RANKS + 1, HEALTHY_MBIT))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        job = stack.enter_context(running(hosts, folder, ARMS[arm], RANKS))
        job.wait(lambda: stepping(job), 180, "steps")
        began, first = time.time(), job.status()["step"]
        chance = random.Random(f"{arm} {seed}")
        burning = bursts(chance) if arm == "nasty" else contextlib.nullcontext([])
        burnt: list[float] = []
        loads, stopped = [], False
        try:
            with burning as burnt:
                while time.time() < began + seconds:
                    time.sleep(5)
                    loads.append(os.getloadavg()[0])
        except KeyboardInterrupt:
            stopped = True
        events = [e for e in job.events(began) if e["event"] != "delay"]
        ended, last = time.time(), job.status()["step"]
        # A restart's seconds are none of a job that steps.
        again = sum(
            e["detection"] + e["isolation"] + e["reinit"]
            for e in events
            if e["event"] == "recovered"
        )
    return {
        "arm": arm,
        "seed": seed,
        "seconds": ended - began - again,
        "steps": last - first,
        "bursts": len(burnt),
        "load": sum(loads) / max(len(loads), 1),
        "learned": sum(e["event"] == "learned" for e in events),
        "alarms": [
            [e["time"] - began, e["event"], e["text"]]
            for e in events
            if e["event"] == "diagnosis"
        ],
        "actions": [
            [e["time"] - began, e["event"], e["text"]]
            for e in events
            if e["event"] in ACTIONS
        ],
        "stopped": stopped,
        "other": [
            [e["time"] - began, e["event"], e["text"]]
            for e in events
            if e["event"] in ("unanswered", "refused", "blind", "failed")
        ],
    }


# ------------------------------------------------------------------------- tables


def rate(count: int, hours: float) -> tuple[float, float, float]:
    """Events per hour, and its exact 95 % interval (Garwood 1936)."""
    from scipy.stats import chi2

    low = chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    high = chi2.ppf(0.975 if count else 0.95, 2 * count + 2) / 2
    return count / hours, low / hours, high / hours


def bouts(rows: Sequence[list[Any]], apart: float = 60.0) -> int:
    """Alarms that are not of one and the same occasion."""
    times = sorted(row[0] for row in rows)
    return sum(not i or t - times[i - 1] > apart for i, t in enumerate(times))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Alarms and actions per hour, as Markdown."""
    lines = [
        "| arm | hours | steps | bursts | diagnoses | occasions | per hour (95 %) "
        "| acted on | per hour (95 %) | load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        some = [row for row in rows if row["arm"] == arm]
        if not some:
            continue
        hours = math.fsum(row["seconds"] for row in some) / 3600
        told = sum(len(row["alarms"]) for row in some)
        counts = (
            sum(bouts(row["alarms"]) for row in some),
            sum(len(row["actions"]) for row in some),
        )
        rates = [
            f"{r:.2g} ({a:.2g}-{b:.2g})" for r, a, b in (rate(c, hours) for c in counts)
        ]
        load = math.fsum(row["load"] * row["seconds"] for row in some) / hours / 3600
        lines.append(
            f"| {arm} | {hours:.2f} | {sum(r['steps'] for r in some)} "
            f"| {sum(r['bursts'] for r in some)} | {told} | {counts[0]} | {rates[0]} "
            f"| {counts[1]} | {rates[1]} | {load:.1f} |"
        )
    return "\n".join(
        [*lines, "", f"{os.cpu_count()} processors; {platform.platform()}."]
    )


def main(arguments: list[str]) -> None:
    """Watches and prints the table."""
    options = parse_options(Options, arguments, "benchmarks/health_alarms.py")
    unknown = set(options.arms) - set(ARMS)
    if unknown:
        raise ConfigError(f"no arm {', '.join(unknown)}: there are {', '.join(ARMS)}")
    path = Path(options.out)
    stop_on_signals()
    for arm in () if options.summary else options.arms:
        while True:
            rows = [row for row in read(path) if row["arm"] == arm]
            left = 3600 * options.hours - sum(row["seconds"] for row in rows)
            if left < 30:
                break
            row = part(arm, min(options.part, left), len(rows))
            with open(path, "a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(
                f"{arm}: {row['seconds']:.0f} s, {row['alarms']}, {row['actions']}",
                file=sys.stderr,
                flush=True,
            )
            if row["stopped"]:
                raise KeyboardInterrupt
    print(table(read(path)))


if __name__ == "__main__":
    run_main(main)
