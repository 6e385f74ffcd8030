"""Where the seconds go between a fault and the next step, by real faults.

    python benchmarks/health_restart.py > restart.json       # 3 minutes
    python benchmarks/health_restart.py --quick
    python benchmarks/health_restart.py --snapshot-seconds 2 # with hot snapshots
    python benchmarks/health_restart.py --snapshot-seconds 2 --disks

`scripts/supervise.py --local N` runs the trainer on a small model. Once the job steps,
a rank that is drawn by lot gets SIGKILL, and the supervisor starts the job again. Each
worker writes down when its parts began and ended, by the functions of the trainer that
are named in `SPANS`; nothing of the trainer is changed. All times are of one clock,
that of the machine, in seconds.

- `total`: from the signal to the first step that all ranks have done again.
- `detect`, `restart`, `spawn`: to the diagnosis, to the start of the new generation in
  the supervisor's events, and to the birth of rank 0's process.
- the rows of `rank 0`: each span without those inside it, and `other`. Compilation is
  split as JAX reports it: `trace`, `lower`, `compile` (with `cache`, the reading of the
  persistent cache, inside it).
- `lost_work`: from the step that was restored, when it was first done, to the signal.

A first job, without faults, fills the compilation cache and the token files; the
faulted ones start from those. `cache` has hits and misses of each rank of the new
generation. `load` is the machine's load average (1 min) at the beginning and the end.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlab import allocator
from jaxlab.cli import parse_options, run_main
from jaxlab.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TRACE = "JAXLAB_RESTART_TRACE"
PATIENCE = 120.0
"""seconds for what takes a few"""
SPANS = (
    ("distributed", "jaxlab.train", "start_processes"),
    ("tokens", "jaxlab.program", "open_tokens"),
    ("build", "jaxlab.program", "build"),
    ("open checkpoints", "jaxlab.checkpoint", "open_checkpoints"),
    ("restore", "jaxlab.program", "restore"),
    ("first state", "jaxlab.program", "first_state"),
    ("writer", "jaxlab.metrics", "open_writer"),
    ("run files", "jaxlab.record", "write_run"),
    ("first lines", "jaxlab.record", "start_up"),
    ("pipelines", "jaxlab.train", "_pipelines"),
    ("stop agreed", "jaxlab.train", "stop_agreed"),
    ("wait for step", "jaxlab.replicas", "to_host"),
)
"""name, module, function"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Seconds from a fault to the next step, as JSON."""

    processes: int = 2
    """processes of the job"""
    faults: int = 5
    """ranks that are killed, one after the other"""
    every: int = 50
    """steps between checkpoints"""
    snapshot_seconds: float = 0.0
    """seconds between hot snapshots; 0: none"""
    disks: bool = False
    """each rank has half of the state, and its snapshots on a disk of its own, which is
    lost with it"""
    shrink: bool = False
    """no spares: a rank that dies twice is done without"""
    layers: int = 2
    """of the model"""
    width: int = 64
    """of the model"""
    seed: int = 0
    """of the victims and the times"""
    quick: bool = False
    """one fault: that it runs, not what it costs"""


# ------------------------------------------------------------------- the worker


class Spans:
    """When parts of this process began and ended; written after the first step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.events = folder, [], []
        self.started = self.done = 0

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its times written down."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.time()
            try:
                return call(*args, **kwargs)
            finally:
                self.rows.append([name, begin, time.time()])

        return timed

    def heard(self, event: str, duration_secs: float, **_: Any) -> None:
        """A duration that JAX tells, at its end."""
        names = {
            "jaxpr_trace_duration": "trace",
            "jaxpr_to_mlir_module_duration": "lower",
            "backend_compile_duration": "compile",
            "cache_retrieval_time_sec": "cache",
        }
        name = names.get(event.rpartition("/")[2])
        if name:
            now = time.time()
            self.rows.append([name, now - duration_secs, now])

    def counted(self, event: str, **_: Any) -> None:
        """A hit or a miss of the compilation cache."""
        if event.startswith("/jax/compilation_cache/cache_"):
            self.events.append(event.rpartition("/")[2])

    def stepped(self) -> None:
        """A step is done."""
        self.done += 1
        name = f"{os.environ.get('JAX_PROCESS_ID', '0')}-{os.getpid()}"
        with open(self.folder / f"{name}.steps", "a") as file:
            file.write(f"{self.started + self.done} {time.time()}\n")
        if self.done == 1:
            told = {
                "rank": int(os.environ.get("JAX_PROCESS_ID", 0)),
                "born": born(),
                "restored": self.started,
                "first_step": time.time(),
                "spans": self.rows,
                "events": self.events,
            }
            path = self.folder / f"{name}.json"
            path.with_suffix(".part").write_text(json.dumps(told))
            path.with_suffix(".part").rename(path)


def born() -> float:
    """When this process was started, in seconds since 1970; to 10 ms."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")


def worker(arguments: list[str]) -> None:
    """What scripts/train.py does, with its parts timed."""
    spans = Spans(Path(os.environ[TRACE]))
    begin = time.time()
    spans.rows.append(["interpreter", born(), begin])
    from jaxlab import config

    run = config.parse(arguments, "scripts/train.py")
    spans.rows.append(["config", begin, time.time()])
    begin = time.time()
    from jaxlab.train import train

    spans.rows.append(["import", begin, time.time()])
    import importlib

    import jax

    from jaxlab import program, replicas

    jax.monitoring.register_event_duration_secs_listener(spans.heard)
    jax.monitoring.register_event_listener(spans.counted)
    for name, module, function in SPANS:
        owner = importlib.import_module(module)
        setattr(owner, function, spans.timed(name, getattr(owner, function)))
    restore, build, to_host = program.restore, program.build, replicas.to_host

    def restored(*args, **kwargs):
        found = restore(*args, **kwargs)
        spans.started = found[1] if found else 0
        return found

    def built(*args, **kwargs):
        made = build(*args, **kwargs)
        return made._replace(step=spans.timed("dispatch", made.step))

    def fetched(scalars):
        values = to_host(scalars)
        if "finite" in scalars:
            spans.stepped()
        return values

    program.restore, program.build, replicas.to_host = restored, built, fetched
    train(run)


# ---------------------------------------------------------------------- the job


def config_file(folder: Path, options: Options) -> Path:
    """A run that goes on until it is stopped."""
    from jaxlab import config

    disk = str(folder / "disk$JAX_PROCESS_ID") if options.disks else ""
    run = config.Run(
        out=str(folder / "run"),
        steps=10**6,
        batch=8 * options.processes,
        length=64,
        log_every=10,
        model=config.GPT(layers=options.layers, width=options.width, heads=2),
        data=config.Data(corpus="stdlib", cache=str(folder / "cache")),
        evaluate=config.Evaluate(every=10**6),
        mesh=config.MeshShape(fsdp=options.processes if options.disks else 1),
        checkpoint=config.Checkpoint(
            every=options.every,
            snapshot_seconds=options.snapshot_seconds,
            snapshot_folder=disk,
        ),
        sample=config.Sample(tokens=0),
    )
    path = folder / "run.json"
    config.save(run, path)
    return path


@contextlib.contextmanager
def supervised(folder: Path, options: Options, run: Path) -> Iterator[Any]:
    """The supervisor of a job; ended with it."""
    least = 1 if options.shrink else options.processes
    sizes = map(str, range(least, options.processes + 1))
    places = options.processes + (0 if options.shrink else options.faults)
    command = [sys.executable, str(ROOT / "scripts/supervise.py")]
    command += ["--local", str(places), "--health", str(folder / "health")]
    command += ["--sizes", *sizes, "--"]
    command += [sys.executable, str(Path(__file__).resolve()), "worker", str(run)]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAXLAB_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        TRACE: str(folder / "trace"),
    }
    environment.pop(allocator.SWITCH, None)
    with open(folder / "supervise.log", "ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def until(done: Callable[[], Any], what: str, log: Path) -> Any:
    """Waits for a true value and returns it."""
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        with contextlib.suppress(FileNotFoundError, KeyError, ValueError):
            found = done()
            if found:
                return found
        time.sleep(0.05)
    raise UserError(f"no {what} in {PATIENCE:g} s: see {log}")


def stepping(folder: Path, generation: int, steps: int) -> list[int] | None:
    """Process ids by rank, once all ranks of a generation have done some steps."""
    status = json.loads((folder / "health/status.json").read_text())
    pids = [row["pid"] for row in status["ranks"]]
    if status["generation"] != generation or None in pids:
        return None
    done = [len(step_times(folder, rank, pid)) for rank, pid in enumerate(pids)]
    return pids if min(done) >= steps else None


def step_times(folder: Path, rank: int, pid: int) -> dict[int, float]:
    """When each step of a process was done."""
    text = (folder / f"trace/{rank}-{pid}.steps").read_text()
    rows = [line.split() for line in text.splitlines(keepends=True) if "\n" in line]
    return {int(step): float(at) for step, at in rows}


def exclusive(rows: list[Any], begin: float, end: float) -> dict[str, float]:
    """Seconds of each name, of nested spans the innermost's only, and `other`."""
    marks = sorted({begin, end, *(t for _, a, b in rows for t in (a, b))})
    found: dict[str, float] = {}
    for a, b in zip(marks, marks[1:], strict=False):
        if a < begin or b > end:
            continue
        inside = [row for row in rows if row[1] <= a and row[2] >= b]
        # The innermost began last; of those that began together, it ends first.
        name = max(inside, key=lambda r: (r[1], -r[2]))[0] if inside else "other"
        found[name] = found.get(name, 0.0) + b - a
    return found


def fault(
    folder: Path, generation: int, draw: random.Random, options: Options
) -> dict[str, Any]:
    """Kills a rank of a generation; what happened until all step again."""
    log = folder / "supervise.log"
    least = options.every + draw.randrange(options.every)
    pids = until(lambda: stepping(folder, generation, least), "steps", log)
    time.sleep(draw.random())
    victim = draw.randrange(len(pids))
    killed = time.time()
    os.kill(pids[victim], signal.SIGKILL)
    if options.disks:
        shutil.rmtree(folder / f"disk{victim}")
    done = step_times(folder, 0, pids[0])
    fresh = until(lambda: stepping(folder, generation + 1, 1), "recovery", log)
    ranks = [
        json.loads((folder / f"trace/{rank}-{pid}.json").read_text())
        for rank, pid in enumerate(fresh)
    ]
    text = (folder / "health/events.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    at = {
        row["event"]: row["time"]
        for row in reversed(rows)
        if row["event"] in ("diagnosis", "restart", "start") and row["time"] > killed
    }
    first, restored = ranks[0], ranks[0]["restored"]
    end = max(row["first_step"] for row in ranks)
    parts = exclusive(first["spans"], first["born"], end)
    caches = [
        [row["events"].count(f"cache_{what}") for what in ("hits", "misses")]
        for row in ranks
    ]
    return {
        "victim": victim,
        "processes": len(fresh),
        "total": end - killed,
        "detect": at["diagnosis"] - killed,
        "restart": at["start"] - at["diagnosis"],
        "spawn": first["born"] - at["start"],
        "rank 0": parts,
        "lost_work": killed - done.get(restored, min(done.values())),
        "lost_steps": max(done) - restored,
        "cache": caches,
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def measure(options: Options) -> dict[str, Any]:
    """All faults on one job."""
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "trace").mkdir()
        run = config_file(folder, options)
        with supervised(folder, options, run):
            log = folder / "supervise.log"
            try:
                until(lambda: stepping(folder, 0, 5), "first steps", log)
                faults = [
                    fault(folder, i, draw, options) for i in range(options.faults)
                ]
            except UserError:
                sys.stderr.write(log.read_text()[-3000:])
                raise
    names = ("total", "detect", "restart", "spawn", "lost_work", "lost_steps")
    report: dict[str, Any] = {n: summary([f[n] for f in faults]) for n in names}
    parts = sorted({part for f in faults for part in f["rank 0"]})
    report["rank 0"] = {
        part: summary([f["rank 0"].get(part, 0.0) for f in faults]) for part in parts
    }
    kept = ("victim", "processes", "total", "lost_work", "lost_steps", "cache")
    report["faults"] = [{k: round_(f[k]) for k in kept} for f in faults]
    return report


def round_(value: Any) -> Any:
    """Milliseconds are enough."""
    return round(value, 3) if isinstance(value, float) else value


def main(arguments: list[str]) -> None:
    """Measures and prints JSON; as `worker`, trains."""
    if arguments[:1] == ["worker"]:
        worker(arguments[1:])
        return
    options = parse_options(Options, arguments, "benchmarks/health_restart.py")
    if options.quick:
        options = dataclasses.replace(options, faults=1)
    before = os.getloadavg()[0]
    report = measure(options)
    import jax

    head = {
        "benchmark": "health_restart",
        "options": dataclasses.asdict(options),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load": [round(before, 2), round(os.getloadavg()[0], 2)],
    }
    print(json.dumps(head | report, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        allocator.tune()
    run_main(main)
