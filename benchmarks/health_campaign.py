"""Faults on purpose, and what jaxlab.health makes of them: a campaign.

    python benchmarks/health_campaign.py --out campaign.jsonl     # as root, hours
    python benchmarks/health_campaign.py --out campaign.jsonl --budget 1800
    python benchmarks/health_campaign.py --out campaign.jsonl --summary

Linux. Four ranks, each on a host of its own, and a spare host: network namespaces with
a link between each two (common/hosts.py). One supervisor watches a job whose ranks
exchange half a megabyte of gradients a step (common/supervised.py). Fault after fault
is injected into the running job, with a victim and a moment drawn from the seed; links
are drawn from those which the job's ring uses, in the direction in which it does, as
the interfaces' counters show. Nothing tells the supervisor. Classes:

- `throttle`: a rank's process gets a tenth of one processor (a cgroup's quota, or
  signals that stop it most of the time).
- `slow_link`: a link carries a twentieth, in the direction that the ring uses;
  `slow_link_both`: in both.
- `slow_out`, `slow_in`: the same of all that a host sends, or receives.
- `stop`: SIGSTOP. `stuck`: the host code of a rank sleeps, and its process lives.
- `cut`: a link goes down. `kill`, `kill_first`: SIGKILL of a rank, of rank 0.
- `clean`: nothing happens for a while.

A line of the output is an injection, written when it is over; one that is there
already is not repeated. The fault is taken back once the job steps on, or after
`patience`. What counts:

- `first`: the first diagnosis after the injection. `verdict`: the last one before the
  supervisor acts; where it does not act, the last that names somebody.
- right: `verdict` has the kind and exactly the ranks or links of the fault.
- seconds: from the injection.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common.faults import Scene, draw, injected, ring
from common.hosts import full_mesh
from common.namespaces import stop_on_signals
from common.supervised import Job, Work, running

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import ConfigError, UserError

KINDS = {
    "throttle": "noncomm_slow",
    "slow_link": "comm_slow",
    "slow_link_both": "comm_slow",
    "slow_out": "comm_slow",
    "slow_in": "comm_slow",
    "stop": "frozen",
    "stuck": "noncomm_hang",
    "cut": "comm_hang",
    "kill": "crash",
    "kill_first": "crash",
    "clean": "healthy",
}
SLOW = ("throttle", "slow_link", "slow_link_both", "slow_out", "slow_in", "clean")
RANKS, HEALTHY_MBIT = 4, 1000.0
ACTIONS = ("restart", "reorder", "resigned", "give_up")


@dataclasses.dataclass(frozen=True)
class Options:
    """Injects faults and writes what was found."""

    out: str = "campaign.jsonl"
    """a line for each injection"""
    seeds: int = 20
    """injections of each class"""
    first: int = 0
    """the first seed"""
    classes: tuple[str, ...] = tuple(KINDS)
    budget: float = math.inf
    """seconds after which no further injection begins"""
    patience: float = 90.0
    """seconds until a fault counts as missed"""
    quiet: float = 30.0
    """seconds that `clean` lasts"""
    job: str = ""
    """folder in which the job's files are kept; default: one that goes with it"""
    summary: bool = False
    """only read the output, and print the tables"""
    rows: bool = False
    """only read the output, and print what the tables need of it, a line a row"""


# ---------------------------------------------------------------------- injections


def scene(job: Job) -> Scene:
    """How it stands now; takes half a second."""
    ranks = job.status()["ranks"]
    place = tuple(
        job.hosts.names.index(row["slot"].rpartition(":")[0]) for row in ranks
    )
    pids = tuple(row["pid"] for row in ranks)
    return Scene(job.hosts, place, pids, ring(job.hosts, place))


def stepping(job: Job, least: int = 20) -> bool:
    """Whether the newest generation steps, and is as large as it is to be."""
    starts = [e["time"] for e in job.events() if e["event"] == "start"]
    status = job.status()
    if not starts or status.get("time", 0.0) < starts[-1] or len(status["ranks"]) < 1:
        return False
    pids = [row["pid"] for row in status["ranks"]]
    fresh = all(pids) and all(row["phase"] == 1 for row in status["ranks"])
    return fresh and status["state"] == "running" and status["step"] >= least


def learned(job: Job) -> bool:
    """Whether the newest generation knows how a healthy step looks."""
    last = [e["event"] for e in job.events() if e["event"] in ("start", "learned")]
    return last[-1:] == ["learned"]


def inject(job: Job, fault: str, seed: int, options: Options) -> dict[str, Any]:
    """One injection: waits for its moment, injects, watches, and takes it back.

    Raises:
        UserError: the job does not come to run in the first place.
    """
    chance = random.Random(f"{fault} {seed}")
    job.wait(lambda: stepping(job), 120, "steps")
    if fault in SLOW:
        job.wait(lambda: learned(job), 120, "profile of healthy steps")
    time.sleep(chance.uniform(4, 8) if fault in SLOW else chance.uniform(1, 4))
    job.wait(lambda: stepping(job), 120, "steps")
    stage = scene(job)
    victim = draw(fault, stage, chance)
    began = time.time()
    patience = options.quiet if fault == "clean" else options.patience
    with injected(fault, stage, victim):
        spent = time.time() - began
        over = began + patience
        while time.time() < over:
            seen = [event["event"] for event in job.events(began)]
            if "recovered" in seen or "give_up" in seen:
                break
            time.sleep(0.05)
    row = dict(fault=fault, seed=seed, time=began, injecting=spent)
    row |= dict(victim=victim._asdict(), used=stage.used, ranks=len(stage.pids))
    row |= dict(expected=KINDS[fault], load=os.getloadavg()[0])
    return row | verdict(job.events(began), began)


def verdict(events: Sequence[dict[str, Any]], began: float) -> dict[str, Any]:
    """What the supervisor's events say of an injection at `began`."""

    def found(event: dict[str, Any] | None) -> dict[str, Any] | None:
        if event is None:
            return None
        kept = {k: event[k] for k in ("kind", "ranks", "links", "text") if k in event}
        return kept | {"event": event["event"], "seconds": event["time"] - began}

    diagnoses = [e for e in events if e["event"] == "diagnosis"]
    action = next((e for e in events if e["event"] in ACTIONS), None)
    before = [e for e in diagnoses if action is None or e["time"] <= action["time"]]
    named = [e for e in before if e["ranks"] or e["links"]]
    last = before if action else named or before
    after = [e for e in events if action is None or e["time"] >= action["time"]]
    recovered = next((e for e in after if e["event"] == "recovered"), None)
    row = {
        "first": found(diagnoses[0] if diagnoses else None),
        "verdict": found(last[-1] if last else None),
        "action": found(action),
        "recovered": found(recovered),
    }
    if recovered:
        names = ("detection", "isolation", "reinit")
        row["recovered"] |= {name: recovered[name] for name in names}
    told = [[e["time"] - began, e["event"], e["text"]] for e in events if e["text"]]
    return row | {"events": told}


def campaign(options: Options, todo: Sequence[tuple[str, int]]) -> None:
    """Injects one fault after the other; starts the job anew where it must."""
    end = time.monotonic() + options.budget
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(full_mesh(RANKS + 1, HEALTHY_MBIT))
        folder = Path(options.job or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        job = stack.enter_context(running(hosts, folder, Work(), RANKS))
        out = stack.enter_context(open(options.out, "a", encoding="utf-8"))
        for fault, seed in todo:
            if time.monotonic() > end:
                break
            try:
                row = inject(job, fault, seed, options)
            except UserError as error:
                print(f"{fault} {seed}: {error}", file=sys.stderr, flush=True)
                job.stop()
                job.start()
                continue
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(line(row), file=sys.stderr, flush=True)
            whole = len(job.status().get("ranks", ())) == RANKS
            calm = fault == "clean" and row["first"] is None
            if not whole or not (row["recovered"] or calm):
                job.stop()  # what it has learned of the fault would linger
                job.start()


def line(row: dict[str, Any]) -> str:
    """An injection for people."""
    said = row["verdict"] or {"kind": "nothing", "seconds": math.nan}
    who = [*said.get("ranks", ()), *(f"{i}->{j}" for i, j in said.get("links", ()))]
    victim = row["victim"]
    whom = [*victim["ranks"], *(f"{i}->{j}" for i, j in victim["links"])]
    back = row["recovered"]["seconds"] if row["recovered"] else math.nan
    mark = "right" if right(row) else "WRONG"
    return (
        f"{mark} {row['fault']} {row['seed']} of {whom}: {said['kind']} {who} after "
        f"{said['seconds']:.1f} s, {(row['action'] or {}).get('event')}, steps after "
        f"{back:.1f} s (load {row['load']:.1f})"
    )


# ------------------------------------------------------------------------- tables


def kind(row: dict[str, Any]) -> str:
    """Of the verdict."""
    return row["verdict"]["kind"] if row["verdict"] else "healthy"


def right(row: dict[str, Any]) -> bool:
    """Whether kind and culprit are."""
    said, victim = row["verdict"], row["victim"]
    if kind(row) != row["expected"]:
        return False
    if said is None:
        return True
    links = {tuple(link) for link in said["links"]}
    return set(said["ranks"]) == set(victim["ranks"]) and links == {
        tuple(link) for link in victim["links"]
    }


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    p, d = hits / count, 1 + z * z / count
    middle = (p + z * z / (2 * count)) / d
    half = z / d * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _share(hits: int, count: int) -> str:
    low, high = wilson(hits, count)
    return f"{hits}/{count} ({low:.0%}-{high:.0%})"


def _times(values: Sequence[float]) -> str:
    if not values:
        return "-"
    half, most = np.percentile(values, [50, 90])
    return f"{half:.1f} / {most:.1f}"


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Confusion matrix, shares and times, as Markdown."""

    def of(key: str) -> Callable[[dict], float]:
        return lambda row: row[key]["seconds"]

    columns = sorted({kind(r) for r in rows} | {r["expected"] for r in rows})
    faults = [name for name in KINDS if any(r["fault"] == name for r in rows)]
    lines = [f"| fault | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in faults:
        counts = Counter(kind(r) for r in rows if r["fault"] == name)
        cells = [str(counts[c] or "") for c in columns]
        lines.append(f"| {name} ({KINDS[name]}) | {' | '.join(cells)} |")
    lines += [
        "",
        "| fault | kind right | kind and culprit right | first alarm, s p50 / p90 "
        "| culprit named, s | steps on, s | look, s | restart, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in [*faults, "all faults"]:
        some = [
            r
            for r in rows
            if r["fault"] == name or (name == "all faults" and r["fault"] != "clean")
        ]
        if not some:
            continue
        good = [r for r in some if r["first"] and r["fault"] != "clean"]
        back = [r for r in good if r["recovered"]]
        looks = [r["verdict"]["seconds"] - r["first"]["seconds"] for r in good]
        again = [r["recovered"]["seconds"] - r["action"]["seconds"] for r in back]
        kinds = sum(kind(r) == r["expected"] for r in some)
        lines.append(
            f"| {name} | {_share(kinds, len(some))} "
            f"| {_share(sum(map(right, some)), len(some))} "
            f"| {_times([*map(of('first'), good)])} "
            f"| {_times([*map(of('verdict'), good)])} "
            f"| {_times([*map(of('recovered'), back)])} "
            f"| {_times(looks)} | {_times(again)} |"
        )
    load = [r["load"] for r in rows]
    lines += [
        "",
        f"{len(rows)} injections on {os.cpu_count()} processors, load average "
        f"{_times(load)} (p50 / p90); {platform.platform()}.",
    ]
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The injections of a file; a line that was cut off is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(text))
    return rows


def compact(row: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of a row."""
    kept = {k: row[k] for k in ("fault", "seed", "expected", "victim")}
    kept["load"] = round(row["load"], 1)
    for key in ("first", "verdict", "action", "recovered"):
        event = row[key]
        names = ("event", "kind", "ranks", "links")
        kept[key] = event and {k: event[k] for k in names if k in event} | {
            "seconds": round(event["seconds"], 2)
        }
    return kept


def main(arguments: list[str]) -> None:
    """Injects and prints the tables."""
    options = parse_options(Options, arguments, "benchmarks/health_campaign.py")
    unknown = set(options.classes) - set(KINDS)
    if unknown:
        raise ConfigError(
            f"no class {', '.join(unknown)}: there are {', '.join(KINDS)}"
        )
    path = Path(options.out)
    if options.rows:
        for row in read(path):
            print(json.dumps(compact(row)))
        return
    stop_on_signals()
    done = {(row["fault"], row["seed"]) for row in read(path)}
    todo = []
    for seed in range(options.first, options.first + options.seeds):
        order = list(options.classes)
        random.Random(seed).shuffle(order)
        todo += [(fault, seed) for fault in order if (fault, seed) not in done]
    if not options.summary:
        campaign(options, todo)
    print(tables(read(path)))


if __name__ == "__main__":
    run_main(main)
