"""What the recorder of jaxlab.health costs a step, by interleaved pairs.

    python benchmarks/health_overhead.py > overhead.json     # 3 minutes
    python benchmarks/health_overhead.py --quick

One process on CPU devices trains an MLP, data-parallel. Each pair is a block of steps
without a recorder and one with it, the first of the two by turns, with the same
compiled programs and the same numbers; the loop reads a metric one step behind, as a
trainer does. Arms:

- `instrument`: a step in two parts, plain or with `jaxlab.health.record.instrument`.
- `watch`: the same step as one program, plain or with `watch`.
- `split`: the two parts over the one program, both plain: what the split itself costs.

`overhead` is a share of the plain step: the median over pairs, and its 95 % interval
(bootstrap over pairs). `cpu` is the same of the processor time of all threads, which
other processes of the machine disturb less. `resolved`: the interval of `overhead` is
narrower than the goal, so that the benchmark can tell. `calls` are seconds of the
recorder's own calls: one `step`, `enter` and `exit` each are what a step costs, and
`read_board` is what its reader spends.
"""

import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import ConfigError, UserError

GOAL = 0.005
AXIS = "data"
QUICK = dict(pairs=10, steps=10, width=256)


@dataclasses.dataclass(frozen=True)
class Options:
    """Overhead of the recorder, as JSON."""

    pairs: int = 30
    """pairs of blocks of each arm; at least 10"""
    steps: int = 40
    """steps of a block"""
    devices: int = 2
    """CPU devices of the process"""
    width: int = 1024
    """of the two matrices [width, width]"""
    batch: int = 256
    """rows on each device"""
    period: float = 0.1
    """seconds between heartbeats"""
    quick: bool = False
    """small steps and few pairs: that it runs, not what it costs"""


def programs(options: Options) -> tuple[Any, Any, Any, Callable[[], Any], Any]:
    """The two parts of a step, the whole, a maker of its state, and a batch."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    jax.config.update("jax_num_cpu_devices", options.devices)
    mesh = jax.make_mesh((options.devices,), (AXIS,), axis_types=(AxisType.Auto,))
    each, one = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    keys = jax.random.split(jax.random.key(0), 3)
    width, rows = options.width, options.batch * options.devices

    def shard(body, given, result):
        return jax.shard_map(body, mesh=mesh, in_specs=given, out_specs=result)

    def gradients(w, x):
        def loss(w):
            return jnp.mean(jnp.square(jnp.tanh(x @ w["a"]) @ w["b"]))

        return jax.value_and_grad(loss)(jax.lax.pcast(w, (AXIS,), to="varying"))

    def update(w, grads):
        mean = jax.lax.pmean(grads, AXIS)
        norm = sum(jnp.sum(g * g) for g in jax.tree.leaves(mean))
        return jax.tree.map(lambda a, g: a - 0.01 * g, w, mean), norm

    def local_part(w, x):
        loss, grads = gradients(w, x)
        return jax.tree.map(lambda g: g[None], grads), loss[None]

    def sync_part(w, grads):
        return update(w, jax.tree.map(lambda g: g[0], grads))

    local = jax.jit(shard(local_part, (P(), P(AXIS)), P(AXIS)))
    sync = jax.jit(shard(sync_part, (P(), P(AXIS)), P()), donate_argnums=(0, 1))
    whole = jax.jit(
        shard(lambda w, x: update(w, gradients(w, x)[1]), (P(), P(AXIS)), P()),
        donate_argnums=0,
    )

    def fresh():
        def made(key):
            w = jax.random.normal(key, (width, width)) / width**0.5
            return jax.device_put(w, one)

        return {"a": made(keys[0]), "b": made(keys[1])}

    batch = jax.device_put(jax.random.normal(keys[2], (rows, width)), each)
    return local, sync, whole, fresh, batch


def block(step: Callable, state: Any, batch: Any, steps: int) -> tuple[Any, ...]:
    """Seconds and processor seconds of some steps, and the last metric."""
    before, metric = None, None
    for _ in range(2):  # a tag `STARTING`, and what a change of arms leaves
        state, before = step(state, batch)
    before.block_until_ready()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        state, metric = step(state, batch)
        before.block_until_ready()
        before = metric
    metric.block_until_ready()
    return time.perf_counter() - wall, time.process_time() - cpu, float(metric)


def interval(ratios: list[float]) -> dict[str, Any]:
    """Median of what is above 1, and its bootstrap interval."""
    excess = np.array(ratios) - 1
    drawn = np.random.default_rng(0).choice(excess, (10_000, len(excess)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return {
        "median": round(float(np.median(excess)), 5),
        "interval": [round(float(low), 5), round(float(high), 5)],
    }


def calls(path: Path, count: int = 200, loops: int = 20) -> dict[str, float]:
    """Seconds of a call each, in the fastest of some loops."""
    from jaxlab.health.record import Recorder, read_board

    found = {}
    with Recorder(path, 0) as recorder:
        for name, call in {
            "step": lambda: recorder.step(0),
            "enter and exit": lambda: (recorder.enter(), recorder.exit()),
            "read_board": lambda: read_board(path),
        }.items():
            least = min(timeit.repeat(call, number=count, repeat=loops))
            found[name] = round(least / count, 8)
    return found


def measure(options: Options) -> dict[str, Any]:
    """All arms, interleaved."""
    from jaxlab.health.record import Recorder, instrument, read_board, watch

    local, sync, whole, fresh, batch = programs(options)

    def split(state, batch):
        partial, _ = local(state, batch)
        return sync(state, partial)

    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        path = Path(folder) / "board"

        def recorded(wrap):
            def run():
                with Recorder(path, 0, period=options.period) as recorder:
                    found = block(wrap(recorder), fresh(), batch, options.steps)
                if read_board(path).count != options.steps + 2:
                    raise UserError(f"{read_board(path).count} samples on the board")
                return found

            return run

        def plain(step):
            return lambda: block(step, fresh(), batch, options.steps)

        arms = {
            "instrument": (
                plain(split),
                recorded(lambda recorder: instrument(local, sync, recorder)),
            ),
            "watch": (
                plain(whole),
                recorded(lambda recorder: watch(whole, recorder)),
            ),
            "split": (plain(whole), plain(split)),
        }
        for off, on in arms.values():  # compiles
            off(), on()
        trials: dict[str, list] = {name: [] for name in arms}
        for pair in range(options.pairs):
            for name, both in arms.items():
                ran = {i: both[i]() for i in ((0, 1) if pair % 2 else (1, 0))}
                trials[name].append((ran[0], ran[1]))
        own = calls(path)
    report = {}
    for name, pairs in trials.items():
        if name != "split" and any(off[2] != on[2] for off, on in pairs):
            raise UserError(f"{name} changes the numbers")
        overhead = interval([on[0] / off[0] for off, on in pairs])
        low, high = overhead["interval"]
        report[name] = {
            "pairs": len(pairs),
            "step": round(
                statistics.median(off[0] for off, _ in pairs) / options.steps, 6
            ),
            "overhead": overhead,
            "cpu": interval([on[1] / off[1] for off, on in pairs]),
            "resolved": high - low < GOAL,
            "meets": high < GOAL,
        }
    return {"goal": GOAL, "arms": report, "calls": own}


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    options = parse_options(Options, arguments, "benchmarks/health_overhead.py")
    options = dataclasses.replace(options, **(QUICK if options.quick else {}))
    for name in ("steps", "devices", "width", "batch", "period"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"{name} is {getattr(options, name)}, not above 0")
    if options.pairs < 10:
        raise ConfigError(f"{options.pairs} pairs: an interval needs at least 10")
    import jax

    report = {
        "benchmark": "health_overhead",
        "options": dataclasses.asdict(options),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        **measure(options),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
