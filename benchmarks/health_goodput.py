"""A fault every three minutes: what part of its pace a job keeps, with C4 and without.

    python benchmarks/health_goodput.py --out goodput.jsonl                 # 3 hours
    python benchmarks/health_goodput.py --out goodput.jsonl --arm plain --faults 10
    python benchmarks/health_goodput.py --out goodput.jsonl --summary

Linux, as root. The job, the hosts and the faults are those of
benchmarks/health_campaign.py, two of each class in random order within an hour, each
at a random moment of its first minute, and taken back at its slot's end or, of
`supervised`, once the job has recovered. Arms:

- `quiet`: with the supervisor, without faults. Its pace is what the others are
  measured by. `diagnoses` are its false alarms.
- `supervised`: the same job with the faults.
- `plain`: the same faults in the same order without C4. A launcher such as torchrun
  or SLURM: when a process ends it kills the others, and starts the job again from its
  checkpoint. Nobody sees a job that stands, or is slow; at the end of each slot,
  though, an operator comes: the fault is mended, and a job that stands is started
  again. So no fault costs it more than three minutes. JAX's own heartbeat is at its
  default.

The arms may run at one time, each in a process with an `--out` of its own.

`goodput`: steps that were done for the first time, a second, over the same of `quiet`.
A line of the output is a slot of three minutes. Checkpoints are written every 200
steps, a few seconds.
"""

import contextlib
import dataclasses
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common.faults import Scene, draw, injected, ring
from common.hosts import Hosts, full_mesh
from common.namespaces import address, stop_on_signals
from common.supervised import Job, Work, environment, running
from health_campaign import (
    HEALTHY_MBIT,
    KINDS,
    RANKS,
    read,
    scene,
    stepping,
    verdict,
)

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import ConfigError, UserError

TODO = Work(rest=0.1)
MBIT, QUOTA = 25.0, 0.06
"""of a slow link, and of a throttled rank: a step takes about twice as long"""
ARMS = ("quiet", "supervised", "plain")
FAULTS = tuple(kind for kind in KINDS if kind != "clean")


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures goodput under faults."""

    out: str = "goodput.jsonl"
    """a line for each slot"""
    arm: str = "supervised"
    """quiet, supervised or plain"""
    faults: int = 20
    """slots"""
    slot: float = 180.0
    """seconds from one fault to the next"""
    seed: int = 0
    summary: bool = False
    """only read the output, and print the table"""


# ------------------------------------------------------------ a launcher without C4


class Plain(NamedTuple):
    """The ranks of a job that nobody supervises."""

    hosts: Hosts
    job: Job
    processes: list[subprocess.Popen]

    def start(self) -> None:
        """All ranks, anew."""
        self.stop()
        with socket.socket() as free:  # of this namespace: as good as any
            free.bind(("", 0))
            port = free.getsockname()[1]
        told = {
            "JAX_COORDINATOR_ADDRESS": f"{address(0)}:{port}",
            "JAX_NUM_PROCESSES": str(RANKS),
        }
        for rank, name in enumerate(self.hosts.names[:RANKS]):
            inside = ["ip", "netns", "exec", name, *self.job.command]
            with open(self.job.folder / f"rank{rank}.log", "ab") as log:
                process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *inside],
                    env=environment(self.job.folder)
                    | told
                    | {"JAX_PROCESS_ID": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.processes.append(process)

    def stop(self) -> None:
        """Ends them."""
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        self.processes.clear()

    def watch(self, until: float) -> int:
        """Starts the job again whenever a process ends; how often that was."""
        count = 0
        while time.time() < until:
            if any(p.poll() is not None for p in self.processes):
                self.start()
                count += 1
            time.sleep(0.1)
        return count

    def scene(self) -> Scene:
        """How it stands now."""
        place = tuple(range(RANKS))
        return Scene(
            self.hosts,
            place,
            tuple(p.pid for p in self.processes),
            ring(self.hosts, place),
        )

    def standing(self) -> bool:
        """Whether it has not stepped for a while."""
        done = self.job.progress()
        return not done or done[-1][1] < time.time() - 20


# -------------------------------------------------------------------------- slots


def slots(options: Options) -> list[tuple[str, float]]:
    """Faults, and the seconds from the slot's beginning."""
    chance = random.Random(options.seed)
    order: list[str] = []
    while len(order) < options.faults:
        more = list(FAULTS)
        chance.shuffle(more)
        order += more
    return [(fault, chance.uniform(5, 60)) for fault in order[: options.faults]]


def fresh(progress: Sequence[tuple[int, float]], begin: float, end: float) -> int:
    """Steps of a time that had not been done before."""
    before = max((step for step, at in progress if at < begin), default=0)
    return max((step for step, at in progress if at < end), default=0) - before


def watched(job: Job, fault: str, chance: random.Random, end: float) -> dict[str, Any]:
    """A fault on a job with a supervisor."""
    try:
        job.wait(lambda: stepping(job), 60, "steps")
    except UserError:
        return {"skipped": True}
    stage = scene(job)
    victim, began = draw(fault, stage, chance), time.time()
    with injected(fault, stage, victim, MBIT, QUOTA):
        while time.time() < end:
            seen = [event["event"] for event in job.events(began)]
            if "recovered" in seen or "give_up" in seen:
                break
            time.sleep(0.1)
    return {"victim": victim._asdict()} | verdict(job.events(began), began)


def quiet_slot(job: Job, begin: float, end: float) -> dict[str, Any]:
    """Nothing happens, and nothing should be found."""
    time.sleep(max(end - time.time(), 0))
    found = [event["event"] for event in job.events(begin)].count("diagnosis")
    return {"diagnoses": found}


@contextlib.contextmanager
def arm(options: Options, hosts: Hosts, folder: Path) -> Iterator[Any]:
    """The job; what is given runs one slot from `begin`."""
    todo = slots(options)
    if options.arm != "plain":
        with running(hosts, folder, TODO, RANKS) as job:
            job.wait(lambda: stepping(job), 180, "steps")

            def with_c4(index: int, begin: float) -> dict[str, Any]:
                end = begin + options.slot
                if options.arm == "quiet":
                    return quiet_slot(job, begin, end)
                fault, delay = todo[index]
                time.sleep(max(begin + delay - time.time(), 0))
                chance = random.Random(f"{options.seed} {index}")
                row = {"fault": fault} | watched(job, fault, chance, end)
                time.sleep(max(end - time.time(), 0))
                return row

            yield job, with_c4
        return
    job = Job(hosts, folder, TODO, RANKS)
    plain = Plain(hosts, job, [])
    plain.start()
    try:
        limit = time.time() + 180
        while plain.standing():
            if time.time() > limit:
                raise UserError(f"the job does not step, see {folder}/rank0.log")
            time.sleep(0.2)

        def without(index: int, begin: float) -> dict[str, Any]:
            fault, delay = todo[index]
            end = begin + options.slot
            restarts = plain.watch(begin + delay)
            stage = plain.scene()
            victim = draw(fault, stage, random.Random(f"{options.seed} {index}"))
            with injected(fault, stage, victim, MBIT, QUOTA):
                restarts += plain.watch(end)
            stood = plain.standing()
            if stood:
                plain.start()
            row = {"fault": fault, "victim": victim._asdict()}
            return row | {"restarts": restarts, "stood": stood}

        yield job, without
    finally:
        plain.stop()


def measure(options: Options) -> None:
    """All slots of an arm, a line each."""
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(full_mesh(RANKS + 1, HEALTHY_MBIT))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        out = stack.enter_context(open(options.out, "a", encoding="utf-8"))
        job, slot = stack.enter_context(arm(options, hosts, folder))
        time.sleep(20)  # the supervisor learns
        begin = time.time()
        for index in range(options.faults):
            row = slot(index, begin)
            end = time.time()
            steps = fresh(job.progress(), begin, end)
            row = {"arm": options.arm, "index": index, "seed": options.seed, **row}
            row |= {"seconds": end - begin, "steps": steps, "load": os.getloadavg()[0]}
            row.pop("events", None)
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(
                f"{options.arm} {index} {row.get('fault', '')}: {steps} steps in "
                f"{end - begin:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            begin = end


# ------------------------------------------------------------------------- tables


def pace(rows: Sequence[dict[str, Any]]) -> float:
    """Fresh steps a second."""
    return sum(r["steps"] for r in rows) / max(sum(r["seconds"] for r in rows), 1e-9)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap over slots, 95 %, of the mean."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Goodput, and what it is in the slots of each fault, as Markdown."""
    quiet = pace([row for row in rows if row["arm"] == "quiet"]) or float("nan")
    lines = [
        "| arm | slots | hours | steps/s | goodput (95 %) | load |",
        "|---|---|---|---|---|---|",
    ]
    for name in ARMS:
        some = [row for row in rows if row["arm"] == name]
        if not some:
            continue
        low, high = interval([row["steps"] / row["seconds"] / quiet for row in some])
        lines.append(
            f"| {name} | {len(some)} | {sum(r['seconds'] for r in some) / 3600:.2f} "
            f"| {pace(some):.2f} | {pace(some) / quiet:.1%} ({low:.1%}-{high:.1%}) "
            f"| {np.mean([r['load'] for r in some]):.1f} |"
        )
    lines += ["", "| fault | supervised | plain |", "|---|---|---|"]
    for fault in FAULTS:
        cells = []
        for name in ARMS[1:]:
            some = [r for r in rows if r["arm"] == name and r.get("fault") == fault]
            cells.append(f"{pace(some) / quiet:.0%} of {len(some)}" if some else "-")
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"{os.cpu_count()} processors; {platform.platform()}."]
    )


def main(arguments: list[str]) -> None:
    """Measures an arm and prints the table."""
    options = parse_options(Options, arguments, "benchmarks/health_goodput.py")
    if options.arm not in ARMS:
        raise ConfigError(f"no arm {options.arm}: there are {', '.join(ARMS)}")
    stop_on_signals()
    if not options.summary:
        measure(options)
    print(table(read(Path(options.out))))


if __name__ == "__main__":
    run_main(main)
