"""Time of one outer exchange over shaped links: gossip in pairs and an all-reduce.

    python benchmarks/noloco_links.py > links.json      # 5 to 6 minutes, as root
    python benchmarks/noloco_links.py --quick

Linux only. Every process of a `jax.distributed` job on CPU (gloo) has a network
namespace of its own, and what each may send is limited (common/namespaces.py).

A trial: all processes start an exchange at the same moment of the machine's clock,
and each says when it had its result. In each round the arms take turns on the same
numbers, and gossip has the partners of that round, by a program of its own
(`outer_step(row=...)`), compiled and run once before. Before anything is timed,
results must equal a simulation by vmap in one process. [median, min, max] over rounds:

- `slowest`, `middle`: seconds of the slowest and of the median process.
- `limit`: seconds that the computed bytes take at the link's rate.
- `bytes_computed`, `bytes_interface`: sent by a process, by `exchange_bytes` and as
  its interface counts them, with the headers and acknowledgements of TCP.
- `cpu`: processor seconds of one process; on 2 processors, 8 processes need at least
  4 times as long. Rate 0, no limit, shows what is left of a time without the link.
  Shaping takes time of the processors, too, not counted in `cpu`: at 1000 Mbit/s,
  2 of them do not keep 8 links busy, and such a row is about them.

Gossip takes twice its `limit`, and that is XLA on gloo: each of two that swap posts
its send before its receive, and a receive is announced on the same stream, so behind
the data. The later one sends all, then the other does. A permute around a ring, or a
psum over the pair, fills both directions.

`slow_link` has one process whose link has, both ways, a tenth of the rate: who waits?
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from common.namespaces import (
    INTERFACE,
    START_SECONDS,
    Job,
    address,
    network,
    shape,
    stop_on_signals,
    summary,
    tool,
)

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import UserError

ARMS: dict[str, dict[str, str]] = {
    "gossip": {},
    "gossip_bfloat16": {"wire_dtype": "bfloat16"},
    "gossip_int8": {"wire_dtype": "int8"},
    "all_reduce": {"pairing": "all"},
}
LEAVES, COLUMNS, SEED = 4, 1024, 0
QUICK = dict(processes=(4,), rates=(0, 200), sizes=(4,), rounds=2, slow_size=4)


@dataclasses.dataclass(frozen=True)
class Options:
    """Time of one outer exchange over shaped links, as JSON."""

    processes: tuple[int, ...] = (4, 8)
    """numbers of processes, one replica each"""
    rates: tuple[int, ...] = (0, 50, 200, 1000)
    """Mbit/s that a link carries; 0: no limit"""
    sizes: tuple[int, ...] = (1, 8, 32)
    """MiB of float32 parameters"""
    rounds: int = 4
    """interleaved rounds; medians and extremes are reported"""
    longest: float = 1.5
    """seconds; a size that takes longer than this at a rate is left out there"""
    delay: float = 5.0
    """milliseconds that netem adds to a link, where the kernel has it; 0: none"""
    slow_rate: int = 400
    """Mbit/s of the other links where one link has a tenth; 0: not measured"""
    slow_size: int = 8
    """MiB of parameters there"""
    quick: bool = False
    """4 processes, one size, one rate, two rounds"""


# ---------------------------------------------------------------- the exchange


def shapes(mebibytes: int) -> dict[str, tuple[int, int]]:
    """Parameters of this size: equal matrices."""
    rows = mebibytes * 2**20 // (4 * LEAVES * COLUMNS)
    return {f"w{i}": (rows, COLUMNS) for i in range(LEAVES)}


def start_of(index: int, mebibytes: int) -> tuple[dict, dict]:
    """Slow and fast weights of a replica before the exchange."""
    rng = np.random.default_rng([SEED, index])
    sizes = shapes(mebibytes).items()
    slow = {name: rng.standard_normal(shape, np.float32) for name, shape in sizes}
    fast = {k: x + np.float32(0.01) * np.roll(x, 1) for k, x in slow.items()}
    return slow, fast


def sample(tree: dict) -> list[float]:
    """A few numbers of each leaf of one replica."""
    return [float(v) for k in sorted(tree) for v in np.ravel(tree[k])[:: 2**15 + 1]]


def exchange_of(arm: str, processes: int, row: tuple[int, ...], state: Any) -> Any:
    """The outer step of replicas along a leading axis, and the axes of its state."""
    from jaxlab.optim import outer_step, replica_axes

    step = functools.partial(
        outer_step, row=row, axis_size=processes, seed=SEED, **ARMS[arm]
    )
    return step, (0, replica_axes(state))


def simulated(arm: str, rows: list[tuple[int, ...]], mebibytes: int) -> np.ndarray:
    """`sample` of all replicas after an exchange with each row, by vmap."""
    import jax
    import optax

    from jaxlab.optim import noloco, replicate

    processes = len(rows[0])
    starts = [start_of(i, mebibytes) for i in range(processes)]
    slow, fast = jax.tree.map(lambda *x: np.stack(x), *starts)
    tx = noloco(optax.identity(), axis_size=processes, inner_steps=None)
    state = replicate(tx.init({k: x[0] for k, x in slow.items()}), processes)
    state = state._replace(slow=slow)
    found = []
    for row in rows:
        step, axes = exchange_of(arm, processes, row, state)
        many = jax.vmap(step, in_axes=axes, out_axes=axes, axis_name="replica")
        new = jax.device_get(jax.jit(many)(fast, state)[0])
        each = [{k: x[i] for k, x in new.items()} for i in range(processes)]
        found.append([sample(x) for x in each])
    return np.asarray(found)


# ------------------------------------------------------------------ a process


def work(index: int, processes: int) -> None:
    """One process of the job: answers each line of stdin with a line of JSON."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    # Gloo listens where the host's name leads, and an address leads to itself. The
    # name is this process's own: it was started in a namespace of names (--uts).
    socket.sethostname(address(index))
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"{address(0)}:7700",
        processes,
        index,
        initialization_timeout=START_SECONDS,
        cluster_detection_method="deactivate",
        local_device_ids=[0],
    )
    import optax
    from jax.sharding import AxisType, NamedSharding

    from jaxlab.optim import noloco, replica_specs

    mesh = jax.make_mesh((processes,), ("replica",), axis_types=(AxisType.Auto,))

    def place(x, spec):
        """A global array of which this process has the part that it holds."""
        local = np.asarray(x)[None] if len(spec) else np.asarray(x)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_process_local_data(sharding, local)

    @functools.cache
    def inputs(mebibytes):
        slow, fast = start_of(index, mebibytes)
        tx = noloco(optax.identity(), axis_size=processes, inner_steps=None)
        state = jax.device_get(tx.init(slow))
        return jax.tree.map(place, (fast, state), replica_specs((fast, state)))

    @functools.cache
    def program(arm, mebibytes, row):
        step, axes = exchange_of(arm, processes, row, inputs(mebibytes)[1])
        specs = tuple(map(replica_specs, inputs(mebibytes)))
        local = jax.vmap(step, in_axes=axes, out_axes=axes)
        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))

    def run(arm, mebibytes, row, at):
        call, given = program(arm, mebibytes, tuple(row)), inputs(mebibytes)
        time.sleep(max(0.0, at - time.monotonic()))
        cpu = time.process_time()
        new = jax.block_until_ready(call(*given))
        seconds = time.monotonic() - at
        local = {k: x.addressable_data(0) for k, x in new[0].items()}
        return {
            "seconds": seconds,
            "cpu": time.process_time() - cpu,
            "sample": None if at else sample(local),
        }

    print(json.dumps({"jax": jax.__version__}), file=replies)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=replies)
    os._exit(0)  # the others may be gone, and a farewell would wait for them


# ------------------------------------------------------------- the measurement


def delay(switch: str, ports: int, milliseconds: float) -> bool:
    """Delays what each process gets; False where the kernel has no netem."""
    netem = ("root", "netem", "delay", f"{milliseconds}ms", "limit", "100000")
    for i in range(ports):
        try:
            tool("tc", "-n", switch, "qdisc", "add", "dev", f"port{i}", *netem)
        except UserError:
            return False
    return True


def order(arm: str, size: int, row: tuple[int, ...]) -> dict[str, Any]:
    """What to tell all processes for one exchange."""
    return {"arm": arm, "mebibytes": size, "row": row_for(arm, row)}


def row_for(arm: str, row: tuple[int, ...]) -> tuple[int, ...]:
    """An all-reduce has one program, whatever the partners of a round are."""
    return tuple(range(len(row))) if arm == "all_reduce" else row


def warm_up(job: Job, sizes: set[int], rows: list[tuple[int, ...]]) -> dict[str, float]:
    """Compiles and runs every program once; how far results are from a simulation."""
    apart = {}
    for arm, size in itertools.product(ARMS, sorted(sizes)):
        mine = sorted({row_for(arm, row) for row in rows})
        ran = [job.ask(**order(arm, size, row), at=0) for row in mine]
        if size == min(sizes):
            got = np.asarray([[x["sample"] for x in answers] for answers in ran])
            apart[arm] = float(np.abs(got - simulated(arm, mine, size)).max())
            if not apart[arm] < 1e-5:
                raise UserError(f"{arm} is {apart[arm]:.3g} from its simulation")
    return apart


def bytes_of(arm: str, processes: int, mebibytes: int) -> int:
    """Bytes that a process must send."""
    import jax

    from jaxlab.optim import exchange_bytes

    sizes = shapes(mebibytes).items()
    params = {k: jax.ShapeDtypeStruct(x, np.float32) for k, x in sizes}
    return exchange_bytes(params, axis_size=processes, **ARMS[arm])


def time_arms(job: Job, rate: int, size: int, rows: list) -> Iterator[dict[str, Any]]:
    """All arms in turns, each with the partners of the round."""
    trials: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for row, arm in itertools.product(rows, ARMS):
        trials[arm].append(job.trial(**order(arm, size, row)))
    for arm, of in trials.items():
        computed = bytes_of(arm, len(job.processes), size)
        yield {
            "processes": len(job.processes),
            "rate": rate,
            "size": size,
            "arm": arm,
            "slowest": summary([max(t["seconds"]) for t in of]),
            "middle": summary([statistics.median(t["seconds"]) for t in of]),
            "limit": round(computed * 8e-6 / rate, 5) if rate else None,
            "cpu": summary([statistics.median(t["cpu"]) for t in of]),
            "bytes_computed": computed,
            "bytes_interface": summary([statistics.median(t["bytes"]) for t in of]),
        }


def time_slow_link(job: Job, size: int, rows: list) -> Iterator[dict[str, Any]]:
    """Who waits where the last process has a slow link."""
    slow = len(job.processes) - 1
    trials: dict[str, list] = {"gossip": [], "all_reduce": []}
    for row, arm in itertools.product(rows, trials):
        trials[arm].append((row, job.trial(**order(arm, size, row))["seconds"]))
    for arm, of in trials.items():
        seconds: dict[str, list[float]] = {"slow": [], "partner": [], "others": []}
        for row, took in of:
            for i, s in enumerate(took):
                seconds[{slow: "slow", row[slow]: "partner"}.get(i, "others")].append(s)
        found = {who: summary(s) for who, s in seconds.items() if s}
        yield {"processes": slow + 1, "size": size, "arm": arm, **found}


def measure_job(processes: int, options: Options) -> dict[str, Any]:
    """Everything with so many processes."""
    from jaxlab.optim import partners

    rounds = range(options.rounds)
    pairs = [partners("round_robin", processes, SEED, i) for i in rounds]
    rows = [tuple(row.tolist()) for row in pairs]
    report: dict[str, Any] = {"links": [], "slow_link": []}
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        switch, names = stack.enter_context(network(processes))
        job = Job(names, __file__, log)
        stack.callback(job.close)
        report |= job.answers(START_SECONDS)[0]
        delayed = bool(options.delay) and delay(switch, processes, options.delay)
        report["delay"] = options.delay if delayed else None
        used = {*options.sizes} | ({options.slow_size} if options.slow_rate else set())
        report["apart_from_simulation"] = warm_up(job, used, rows)
        print(f"{processes} processes: compiled", file=sys.stderr)
        for rate, size in itertools.product(options.rates, options.sizes):
            if size * 2**20 * 8e-6 > options.longest * (rate or 1e9):
                continue
            for name in names:
                shape(name, INTERFACE, rate)
            report["links"] += time_arms(job, rate, size, rows)
            print(json.dumps(report["links"][-len(ARMS) :]), file=sys.stderr)
        if options.slow_rate:
            for name in names:
                shape(name, INTERFACE, options.slow_rate)
            for end in ((names[-1], INTERFACE), (switch, f"port{processes - 1}")):
                shape(*end, options.slow_rate / 10)
            report["slow_link"] += time_slow_link(job, options.slow_size, rows)
    return report


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments[:1] == ["--process"]:
        work(*map(int, arguments[1:]))
        return
    options = parse_options(Options, arguments, "benchmarks/noloco_links.py")
    options = dataclasses.replace(options, **(QUICK if options.quick else {}))
    stop_on_signals()
    report = {
        "benchmark": "noloco_links",
        "options": dataclasses.asdict(options),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "jobs": {n: measure_job(n, options) for n in options.processes},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
