"""Does a collective hide behind products on a real wire? Two processes on CPU.

    python benchmarks/overlap_links.py > links.json      # 2 minutes, as root
    python benchmarks/overlap_links.py --quick

Linux only. Two processes, each in a network namespace of its own with a shaped link
(common/namespaces.py), compute one matmul and reduce-scatter. Each sends half of its
product and adds what arrives to the other half. Forms (common/scatter.py), some with
several `chunks`, pieces of a half:

- `plain`: `psum_scatter` of the whole product. One XLA program, on gloo, as are
- `ring`: `jaxlab.overlap.matmul_reduce_scatter`, and
- `ring_serial`: the same permutes, the first one after the last product.
- `engine`: one jitted function whose callbacks start a transfer and wait for it,
  while threads send and receive over TCP: what a DMA engine does. It is a part of
  this benchmark only, and shows that the order of things is worth something where
  something carries it out. Nothing in jaxlab sends so.
- `engine_serial`: the same callbacks and bytes, the first start after the last product.
- `products`, `ring_wire`, `engine_wire`: the parts alone.

In the setting `sleep` a product is a small one after a sleep of its share of
`compute` seconds, which needs no processor: about the order of things, not about how
fast products are. In `real` a product is one of numbers. All results must be those of
numpy, to the bit, and all forms must send the same bytes to 5 %.

All forms take turns in each round, both processes start at the same moment, and a time
is that of the slower one. [median, min, max] over rounds:

- `to_plain`: seconds over those of `plain`, round by round.
- `ratio`: over the serial form with the same transport and pieces, round by round.
- `model`: what `ratio` would be if products and wire waited for each other's first
  and last piece and for nothing else, from medians of the parts alone.
- `of_model`: seconds over the model's; `meets`: ratio <= model + 0.06.
- `ratio_of_least`: the least of all rounds over the control's least. Gloo lets both
  directions of a swap share the wire's time or not, as it happens: rounds of `ring`
  and `ring_serial` differ by a whole transfer, which is not about overlap.
- `leak`: of a serial form, the parts' seconds less its own: what it did at one time.
- `order`: what callbacks did, by process and round, each order once.
- `bytes`: sent by the busier interface, with headers and acknowledgements.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
from common.engine import Engine, join
from common.namespaces import (
    INTERFACE,
    QUEUE,
    START_SECONDS,
    Job,
    address,
    burst,
    network,
    shape,
    stop_on_signals,
    summary,
)
from common.scatter import (
    AXIS,
    PROCESSES,
    Product,
    Setting,
    engine_forms,
    expected,
    gloo_forms,
    operands,
)

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import ConfigError, UserError

PORT = 7700
PARTS = ("products", "ring_wire", "engine_wire")
FORMS = (*PARTS, "ring_serial", "ring", "engine_serial", "engine")
MARGIN = 0.06  # of a ratio over the model's
APART = 1.05  # most over least bytes
Trials = dict[tuple[str, int], list[dict[str, list]]]
QUICK = dict(compute=0.05, rate=80, rounds=3, real_rate=0)


@dataclasses.dataclass(frozen=True)
class Options:
    """Time of a matmul and reduce-scatter over a shaped link, as JSON."""

    rows: int = 256
    """rows of the product; each process sends half of them"""
    columns: int = 1024
    """columns of the product, float32"""
    chunks: tuple[int, ...] = (1, 4)
    """numbers of pieces that a half is sent in"""
    compute: float = 0.2
    """seconds that the products of a process sleep in all"""
    rate: int = 20
    """Mbit/s that a link carries"""
    rounds: int = 9
    """interleaved rounds; medians and extremes are reported"""
    real_depth: int = 8192
    """summed dimension of real products"""
    real_rate: int = 100
    """Mbit/s beside them; 0: not measured"""
    quick: bool = False
    """shorter sleeps, faster link, three rounds, no real products"""


def settings(options: Options) -> dict[str, Setting]:
    """Those to measure.

    Raises:
        ConfigError: pieces that do not divide a half, or would say nothing of a link.
    """
    size = (options.rows, options.columns)
    found = {"sleep": Setting(*size, 8, options.compute, options.rate)}
    if options.real_rate:
        found["real"] = Setting(*size, options.real_depth, 0.0, options.real_rate)
    for name in ("rows", "columns", "compute", "rate", "rounds", "real_depth"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"{name} is {getattr(options, name)}, not above 0")
    for pieces in options.chunks:
        if pieces < 1 or options.rows % (PROCESSES * pieces):
            raise ConfigError(f"half of {options.rows} rows in {pieces} chunks")
    most = max(options.chunks, default=1)
    for setting in found.values():
        # A burst goes at any speed. A queue that overflows costs a time-out of TCP.
        message, free = setting.message(), burst(setting.rate)
        if message < 8 * free * most:
            raise ConfigError(
                f"{message} bytes in {most} chunks: each must be 8 times as long as "
                f"the burst of the link, {free} bytes"
            )
        if QUEUE < 4 * message:
            raise ConfigError(f"{message} bytes, and a queue of {QUEUE} bytes")
    return found


def model(compute: float, wire: float, pieces: int) -> float:
    """Seconds where each piece is sent as soon as it and the wire are ready."""
    sent = 0.0
    for i in range(1, pieces + 1):
        made = compute / PROCESSES * i / pieces
        sent = max(sent, made) + wire / pieces
    return max(sent, compute)


# ------------------------------------------------------------------ a process


def work(index: int) -> None:
    """One process of the job: answers each line of stdin with a line of JSON."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    # Gloo listens where the host's name leads; see noloco_links.py.
    socket.sethostname(address(index))
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"{address(0)}:{PORT}",
        PROCESSES,
        index,
        initialization_timeout=START_SECONDS,
        cluster_detection_method="deactivate",
        local_device_ids=[0],
    )
    mesh = jax.make_mesh((PROCESSES,), (AXIS,), axis_types=(AxisType.Auto,))
    specs = (P(None, AXIS), P(AXIS))
    engine = Engine(join(index))
    right = functools.cache(functools.partial(expected, index=index))

    def place(x, spec):
        """A global array of which this process has its own part."""
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_process_local_data(sharding, x)

    @functools.cache
    def program(form, setting, pieces):
        product, given = Product(setting), operands(setting, index)
        own = engine_forms(product, pieces, index, engine)
        if form in own:
            here = jax.device_put(given, jax.local_devices()[0])
            return product, jax.jit(own[form]), here
        body = gloo_forms(product, pieces)[form]
        call = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(AXIS))
        return product, jax.jit(call), tuple(map(place, given, specs))

    def run(form, setting, pieces, at):
        setting = Setting(**setting)
        product, call, given = program(form, setting, pieces)
        product.slept, error = 0.0, 0.0
        product.events.clear()
        time.sleep(max(0.0, at - time.monotonic()))
        result = jax.block_until_ready(call(*given))
        seconds = time.monotonic() - at
        if form not in PARTS:
            found = np.asarray(result.addressable_data(0))
            error = float(np.abs(found - right(setting)).max())
        done = {"slept": product.slept, "order": " ".join(product.events)}
        return {"seconds": seconds, "error": error, **done}

    print(json.dumps({"jax": jax.__version__}), file=replies)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=replies)
    os._exit(0)  # the other may be gone, and a farewell would wait for it


# ------------------------------------------------------------- the measurement


def time_arms(job: Job, setting: Setting, options: Options) -> Trials:
    """Trials of each form and number of pieces: in turns, each time another first."""
    arms = [("plain", 1), *((f, n) for n in options.chunks for f in FORMS)]
    given = dataclasses.asdict(setting)
    for form, pieces in arms * 2:  # compiles, and runs once without that
        job.ask(form=form, pieces=pieces, setting=given, at=0)
    trials: Trials = {arm: [] for arm in arms}
    for r in range(options.rounds):
        first = r * len(arms) // options.rounds
        for form, pieces in arms[first:] + arms[:first]:
            ran = job.trial(form=form, pieces=pieces, setting=given)
            trials[form, pieces].append(ran)
    return trials


def row_of(form: str, pieces: int, trials: Trials) -> dict[str, Any]:
    """What the trials of one form say."""

    def seconds(form, pieces):
        return [max(t["seconds"]) for t in trials[form, pieces]]

    def median(form):
        return statistics.median(seconds(form, pieces))

    def over(other):
        both = zip(seconds(form, pieces), other, strict=True)
        return summary([a / b for a, b in both])

    of = trials[form, pieces]
    row: dict[str, Any] = {
        "form": form,
        "chunks": pieces,
        "seconds": summary(seconds(form, pieces)),
        "bytes": [round(x) for x in summary([max(t["bytes"]) for t in of])],
        "slept": round(max(s for t in of for s in t["slept"]), 9),
        "order": sorted({o for t in of for o in t["order"]}),
        "error": max(e for t in of for e in t["error"]),
    }
    if form in PARTS or form == "plain":
        return row
    row["to_plain"] = over(seconds("plain", 1))
    transport = form.removesuffix("_serial")
    parts = (median("products"), median(f"{transport}_wire"))
    if form != transport:
        return row | {"leak": round(sum(parts) - median(form), 5)}
    best = model(*parts, pieces)
    controls = seconds(f"{form}_serial", pieces)
    row["ratio"] = over(controls)
    row["ratio_of_least"] = round(row["seconds"][1] / min(controls), 5)
    row["model"] = round(best / sum(parts), 5)
    row["of_model"] = round(median(form) / best, 5)
    return row | {"meets": row["ratio"][0] <= row["model"] + MARGIN}


def check(rows: list[dict[str, Any]], setting: Setting) -> None:
    """All forms did the same work.

    Raises:
        UserError: a wrong result, less or more work, or other bytes.
    """
    for row in rows:
        what = f"{row['form']} in {row['chunks']} chunks"
        compute = 0.0 if row["form"].endswith("_wire") else setting.compute
        if row["error"]:
            raise UserError(f"{what} is {row['error']} from numpy")
        if abs(row["slept"] - compute) > 1e-6:
            raise UserError(f"{what} slept {row['slept']} of {compute} s")
    sent = [row["bytes"][0] for row in rows if row["form"] != "products"]
    if max(sent) > APART * min(sent) or min(sent) < setting.message():
        raise UserError(f"{setting.message()} bytes, and forms sent {sent}")


def measure(options: Options) -> dict[str, Any]:
    """All settings, by one job."""
    every, found = settings(options), {}
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        _, names = stack.enter_context(network(PROCESSES))
        job = Job(names, __file__, log)
        stack.callback(job.close)
        started = job.answers(START_SECONDS)[0]
        for what, setting in every.items():
            print(f"{what}: both processes run", file=sys.stderr, flush=True)
            for name in names:
                shape(name, INTERFACE, setting.rate)
            trials = time_arms(job, setting, options)
            rows = [row_of(*arm, trials) for arm in trials]
            for row in rows:
                print(json.dumps({"setting": what} | row), file=sys.stderr)
            check(rows, setting)
            found[what] = dataclasses.asdict(setting) | {
                "message": setting.message(),
                "limit": round(setting.limit(), 5),
                "burst": burst(setting.rate),
                "queue": QUEUE,
                "arms": rows,
            }
    return started | {"settings": found}


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments[:1] == ["--process"]:
        work(int(arguments[1]))
        return
    options = parse_options(Options, arguments, "benchmarks/overlap_links.py")
    options = dataclasses.replace(options, **(QUICK if options.quick else {}))
    stop_on_signals()
    report = {
        "benchmark": "overlap_links",
        "options": dataclasses.asdict(options),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **measure(options),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
