"""How fast batches come, and what they cost the host.

python benchmarks/data.py > data.json

`gather` is the limit: one thread copies windows of the memory-mapped file in an
order drawn beforehand. Against it, in one interleaved run:

- `access`: `dataset[step]` of `jaxlab.data.train_batches`, in the caller;
- `prefetch_N`: the same through `jaxlab.data.prefetch` with N threads;
- `grain`: the peer, grain's own `shuffle().repeat().batch()` with 2 threads, and the
  same copy;
- `grain_rows`: the usual form of that, one element a sequence, batched by stacking.

`beside_a_step` is how it feels in training: a device takes `step_seconds` a step
while 2 threads read ahead. `cpu_share` is CPU time over wall time (1 is one core),
`wait` the seconds a step waits for its batch.
"""

import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path

import grain
import numpy as np

from jaxlab.cli import parse_options, run_main
from jaxlab.data import Batch, prefetch, train_batches

SHAPES = {"16x256": (16, 256), "64x2048": (64, 2048), "512x1024": (512, 1024)}
TOKENS = 2**26


@dataclass(frozen=True)
class Options:
    """Batches per second of the data pipeline and of its peers, as JSON."""

    rounds: int = 7
    """interleaved rounds; medians and extremes are reported"""
    seconds: float = 0.5
    """length of one measurement"""
    step_seconds: float = 0.02
    """time of the device's step that batches are read beside"""


Source = contextlib.AbstractContextManager[Iterator[Batch]]


@contextlib.contextmanager
def threads(dataset: grain.MapDataset, number: int) -> Iterator[Iterator[Batch]]:
    """A dataset through grain's reader."""
    options = grain.ReadOptions(num_threads=number, prefetch_buffer_size=2 * number)
    batches = iter(dataset.to_iter_dataset(options))
    yield batches
    batches.close()


def sources(
    tokens: np.ndarray, batch: int, length: int
) -> dict[str, Callable[[], Source]]:
    """What is compared; each opens an endless stream of batches."""
    number = (len(tokens) - 1) // length
    inputs = tokens[: number * length].reshape(number, length)
    targets = tokens[1 : number * length + 1].reshape(number, length)
    order = np.random.default_rng(0).permutation(number)
    mask = np.ones((1, batch, length), np.float32)

    def copy(indices: np.ndarray) -> Batch:
        ahead, after = (table[indices].astype(np.int32) for table in (inputs, targets))
        return Batch(ahead[None], after[None], mask, None)

    def gather(step: int) -> Batch:
        return copy(order.take(range(step * batch, (step + 1) * batch), mode="wrap"))

    ours = train_batches(tokens, length=length, batch=batch, seed=0)
    indices = grain.MapDataset.range(number).seed(0).shuffle().repeat()
    theirs = indices.batch(batch, batch_fn=np.asarray).map(copy)
    rows = indices.map(
        lambda i: (inputs[i].astype(np.int32), targets[i].astype(np.int32))
    ).batch(batch)
    return {
        "gather": lambda: contextlib.nullcontext(map(gather, count())),
        "access": lambda: contextlib.nullcontext(map(ours.__getitem__, count())),
        "prefetch_1": lambda: prefetch(ours, threads=1),
        "prefetch_2": lambda: prefetch(ours, threads=2),
        "grain": lambda: threads(theirs, 2),
        "grain_rows": lambda: threads(rows, 2),
    }


def rate(source: Callable[[], Source], seconds: float) -> tuple[float, float]:
    """Batches a second, and CPU seconds a batch, of all threads."""
    with source() as batches:
        next(batches)
        number, wall, cpu = 0, time.perf_counter(), time.process_time()
        while (taken := time.perf_counter() - wall) < seconds:
            next(batches)
            number += 1
        return number / taken, (time.process_time() - cpu) / number


def beside_a_step(
    source: Callable[[], Source], step: float, seconds: float
) -> tuple[float, float]:
    """CPU share of the reading beside a device, and seconds waited a step."""
    steps = max(1, round(seconds / step))
    with source() as batches:
        next(batches)
        waited, wall, cpu = 0.0, time.perf_counter(), time.process_time()
        for _ in range(steps):
            time.sleep(step)
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
        taken = time.perf_counter() - wall
        return (time.process_time() - cpu) / taken, waited / steps


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes, to four digits."""
    found = {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def compare(tokens: np.ndarray, batch: int, length: int, options: Options) -> dict:
    """All sources at one shape, round by round so that noise hits them alike."""
    opened = sources(tokens, batch, length)
    rates = {name: [] for name in opened}
    costs = {name: [] for name in opened}
    shares, waits = [], []
    for _ in range(options.rounds):
        for name, source in opened.items():
            batches, cost = rate(source, options.seconds)
            rates[name].append(batches)
            costs[name].append(cost)
        share, wait = beside_a_step(
            opened["prefetch_2"], options.step_seconds, options.seconds
        )
        shares.append(share)
        waits.append(wait)
    limit = statistics.median(rates["gather"])
    return {
        "batch": batch,
        "length": length,
        "sources": {
            name: {
                "batches_per_second": spread(rates[name]),
                "tokens_per_second": spread([r * batch * length for r in rates[name]]),
                "cpu_seconds_per_batch": spread(costs[name]),
                "of_limit": round(statistics.median(rates[name]) / limit, 3),
            }
            for name in opened
        },
        "beside_a_step": {
            "step_seconds": options.step_seconds,
            "cpu_share": spread(shares),
            "wait": spread(waits),
        },
    }


def cpu_model() -> str:
    """Name of the processor, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main(arguments: list[str]) -> None:
    """Writes a token file, measures, and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/data.py")
    load = os.getloadavg()[0]  # of others, so before this adds to it
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.bin")
        ids = np.random.default_rng(0).integers(0, 2**16, TOKENS, dtype=np.uint16)
        ids.tofile(path)
        tokens = np.asarray(np.memmap(path, np.uint16, "r"))
        shapes = {
            name: compare(tokens, batch, length, options)
            for name, (batch, length) in SHAPES.items()
        }
    packages = {name: version(name) for name in ("numpy", "grain")}
    result = {
        "benchmark": "data",
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load": load},
        "versions": {"python": platform.python_version()} | packages,
        "tokens": TOKENS,
        "rounds": options.rounds,
        "shapes": shapes,
    }
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    run_main(main)
