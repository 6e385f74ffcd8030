"""A supervised job on hosts that are network namespaces (`common.hosts`).

    python supervised.py supervise SPEC.json           # in the head, by `Job`
    python supervised.py work FOLDER SPEC.json         # a rank, by an agent

A rank trains a small network, data-parallel: what the ranks exchange in a step is one
matrix of gradients. It keeps its state in the job's folder, so that a restart goes on
where the last checkpoint was. SIGUSR1 gets its host code stuck.
"""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.hosts import HEAD, Hosts
from common.namespaces import address
from jaxlab.errors import UserError

ROOT = Path(__file__).parents[2]
TOLD = 10
"""steps between lines of `progress`: a step, and when it was done"""
PORT = 7077
"""of the supervisor, in the head"""
STEERING = dict(
    # As many faults in an hour as no real job has; a mended host is a spare at once.
    evictions_per_hour=10**6,
    restarts_per_hour=10**6,
    readmit_after=1.0,
    crashes=10**6,
    without_progress=10**6,
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a rank does."""

    width: int = 360
    """of the matrix of float32 that is trained, and exchanged in each step"""
    rows: int = 160
    """of the batch of a rank"""
    rest: float = 0.06
    """seconds of each step in which the processor is free, as where a device works"""
    checkpoint: int = 200
    """steps between checkpoints"""
    evaluation: int = 0
    """steps between evaluations; 0: none"""
    recompile: int = 0
    """steps between two lengths of the batch, each of which is compiled anew; 0: one"""
    garbage: int = 0
    """steps between collections of much garbage; 0: as Python likes"""


# -------------------------------------------------------------------------- a rank


def work(folder: Path, todo: Work) -> None:
    """Trains for ever."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxlab.config import Distributed, MeshShape
    from jaxlab.health.worker import monitor
    from jaxlab.mesh import placed, start_processes

    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))
    with monitor() as health:
        start_processes(placed(Distributed()), MeshShape())
        rank, n = jax.process_index(), jax.process_count()
        mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,))
        spread = NamedSharding(mesh, P("data"))

        def loss(w, x):
            return jnp.mean(jnp.square(jnp.tanh(x @ w) @ w.T - x))

        def train(w, x):
            value, grad = jax.value_and_grad(loss)(jax.lax.pcast(w, "data", to=VARY), x)
            grad, value = jax.lax.pmean((grad, value), "data")
            return w - 0.1 * grad, value

        def sharded(body, out):
            given = (P(), P("data"))
            mapped = jax.shard_map(body, mesh=mesh, in_specs=given, out_specs=out)
            return jax.jit(mapped)

        step_fn = health.wrap(sharded(train, (P(), P())))
        test = sharded(lambda w, x: jax.lax.pmean(loss(w, x), "data"), P())
        draw = np.random.default_rng(rank)

        def batch(rows):
            shape = (rows * n, todo.width)
            mine = draw.standard_normal((rows, todo.width), np.float32)
            return jax.make_array_from_callback(shape, spread, lambda _: mine)

        saved = folder / "state.npz"
        w, first = np.eye(todo.width, dtype=np.float32) / 2, 1
        if saved.exists():
            with np.load(saved) as state:
                w, first = state["w"], int(state["step"]) + 1
        w, last, x = jnp.asarray(w), None, batch(todo.rows)
        told = open(folder / "progress", "a") if rank == 0 else None  # noqa: SIM115
        for step in range(first, 10**9):
            health.step(step)
            if todo.recompile and step % todo.recompile == 0:
                x = batch(todo.rows + step // todo.recompile % 1000)
            time.sleep(todo.rest)
            w, metric = step_fn(w, x)
            if last is not None:
                last.block_until_ready()
            last = metric
            if told and step % TOLD == 0:
                print(step, time.time(), file=told, flush=True)
            if step % todo.checkpoint == 0:
                with health.pause("checkpoint"):
                    _save(saved, rank, w=w, step=step)
            if todo.evaluation and step % todo.evaluation == 0:
                with health.pause("evaluation"):
                    for _ in range(10):
                        test(w, x).block_until_ready()
            if todo.garbage and step % todo.garbage == 0:
                rings: list[list] = [[] for _ in range(200_000)]
                for ring in rings:
                    ring.append(ring)
                del rings
                gc.collect()


VARY = "varying"


def _save(path: Path, rank: int, **arrays: Any) -> None:
    import numpy as np

    if rank == 0:
        fresh = path.with_suffix(".new.npz")
        np.savez(fresh, **{k: np.asarray(v) for k, v in arrays.items()})
        os.replace(fresh, path)


# ---------------------------------------------------------------------- supervisor


def supervise(spec: dict[str, Any]) -> int:
    """Supervises until it is told to stop; runs in the head."""
    from jaxlab.health import channel
    from jaxlab.health.journal import Journal
    from jaxlab.health.roster import Roster
    from jaxlab.health.steer import SteerConfig
    from jaxlab.health.supervise import Supervisor

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(spec["folder"])
    keys = channel.new_keys(f"tcp://{HEAD}:{PORT}")
    channel.write_keys(folder / "agent.key", keys._replace(master_secret=""))
    agents: list[subprocess.Popen] = []

    def start(name: str) -> None:
        words = ["agent", "--keys", str(folder / "agent.key"), "--host", name]
        words += ["--address", spec["hosts"][name], "--folder", str(folder)]
        script = str(ROOT / "scripts/supervise.py")
        inside = ["ip", "netns", "exec", name, sys.executable, script, *words]
        quiet: Any = dict(stdin=subprocess.DEVNULL, start_new_session=True)
        agents.append(subprocess.Popen(inside, **quiet))

    with contextlib.ExitStack() as stack:
        say = lambda text: print(text, flush=True)  # noqa: E731
        journal = Journal(folder, None, say)
        stack.enter_context(contextlib.closing(journal))
        master = stack.enter_context(channel.listen(keys))
        stack.callback(_reap, agents)
        roster = Roster(master, journal, start_agent=start)
        sizes = tuple(range(1, spec["ranks"] + 1))
        steering = SteerConfig(sizes=sizes, **STEERING)
        supervisor = Supervisor(
            spec["command"], roster, folder, journal, steering=steering
        )
        return supervisor.run({name: 1 for name in spec["hosts"]})
    return 1


def _reap(agents: list[subprocess.Popen]) -> None:
    end = time.monotonic() + 5
    for agent in agents:
        try:
            agent.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


# ------------------------------------------------------------- from the outside


def environment(folder: Path) -> dict[str, str]:
    """Of all processes of a job; a restart finds its programs compiled."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    path = f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


class Job:
    """A supervised job, as who watches it from outside sees it."""

    def __init__(self, hosts: Hosts, folder: Path, todo: Work, ranks: int) -> None:
        """Describes it; `start` starts it. Hosts beyond `ranks` are spares."""
        self.hosts, self.folder, self._log = hosts, folder, folder / "log"
        here = {name: address(i) for i, name in enumerate(hosts.names)}
        spec: dict[str, Any] = dict(hosts=here, folder=str(folder), ranks=ranks)
        spec["todo"] = dataclasses.asdict(todo)
        path = folder / "spec.json"
        me = [sys.executable, str(Path(__file__).resolve())]
        self.command = [*me, "work", str(folder), str(path)]
        spec["command"] = self.command
        path.write_text(json.dumps(spec))
        inside = ["ip", "netns", "exec", hosts.head, *me, "supervise", str(path)]
        if shutil.which("setpriv"):
            inside = ["setpriv", "--pdeathsig", "TERM", *inside]
        self._command, self.process = inside, None

    def start(self) -> None:
        """Starts the supervisor, and with it the job."""
        (self.folder / "job.json").unlink(missing_ok=True)
        (self.folder / "status.json").unlink(missing_ok=True)
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                self._command,
                env=environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends the job and all that belongs to it."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def events(self, since: float = 0.0) -> list[dict[str, Any]]:
        """Of the journal, from a moment on (seconds since 1970)."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / "events.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            return [row for row in rows if row["time"] >= since]
        return []

    def status(self) -> dict[str, Any]:
        """The newest; empty before there is one."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.folder / "status.json").read_text())
        return {}

    def progress(self) -> list[tuple[int, float]]:
        """Steps, and when they were done; a restart does some again."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / "progress").read_text().splitlines()
            rows = [line.split() for line in lines]
            return [(int(r[0]), float(r[1])) for r in rows if len(r) == 2]
        return []

    def wait(self, done: Callable[[], Any], seconds: float, what: str) -> Any:
        """What `done` says once it is true.

        Raises:
            UserError: it is not so in time, or the supervisor has ended.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := done():
                return found
            if self.process is None or self.process.poll() is not None:
                raise UserError(f"the supervisor has ended, see {self._log}: no {what}")
            time.sleep(0.05)
        raise UserError(f"no {what} within {seconds:g} s")


@contextlib.contextmanager
def running(hosts: Hosts, folder: Path, todo: Work, ranks: int) -> Iterator[Job]:
    """A job that is started and, at the end, stopped."""
    job = Job(hosts, folder, todo, ranks)
    job.start()
    try:
        yield job
    finally:
        job.stop()


def main(arguments: list[str]) -> int:
    """Runs as a supervisor, or as a rank."""
    spec = json.loads(Path(arguments[-1]).read_text())
    if arguments[0] == "supervise":
        return supervise(spec)
    work(Path(arguments[1]), Work(**spec["todo"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
