"""What a matmul loses by being cut into blocks, on the chip that is here.

python benchmarks/overlap_chunks.py > chunks.json     # seconds on a GPU or TPU

One accelerator suffices: a ring of N devices multiplies each device's share of an MLP
(`rows` x `width` by `width` x `hidden` / N, and back) in blocks, with barriers in
between as `jaxlab.overlap` puts them, and this measures how much longer that takes than
one product, by the number of blocks. The predictor is then given what was measured (the
rate of the whole product, the cost of one more block) in place of its data sheet, and
both choices stand side by side for each of the MLP's collective matmuls. Nothing here
communicates. On a CPU sizes are small and the figures say nothing of chips.
"""

import dataclasses
import json
import statistics
import time
from typing import Any

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """Efficiency of matmuls by the number of blocks, as JSON."""

    rows: int = 0
    """of the input, over all devices; 0: 8192, or 1024 on a CPU"""
    width: int = 0
    """of the input; 0: 4096, or 512 on a CPU"""
    hidden: int = 0
    """of the hidden layer, over all devices; 0: 14336, or 1536 on a CPU"""
    size: int = 8
    """devices of the ring that is planned"""
    repeats: int = 8
    """calls in a timing"""
    rounds: int = 9
    """timings of each form, in turns"""


def resolve(options: Options, cpu: bool) -> Options:
    """Sizes filled in.

    Raises:
        UserError: they do not divide.
    """
    usual = dict(rows=1024, width=512, hidden=1536) if cpu else {}
    usual = dict(rows=8192, width=4096, hidden=14336) | usual
    given = {name: getattr(options, name) or n for name, n in usual.items()}
    options = dataclasses.replace(options, **given)
    if options.rows % (4 * options.size) or options.hidden % options.size:
        raise UserError(
            f"--rows {options.rows} must divide by 4 x --size {options.size}, and "
            f"--hidden {options.hidden} by {options.size}"
        )
    return options


def in_blocks(x: Any, w: Any, blocks: int) -> Any:
    """Computes x @ w, a block of rows after the other."""
    import jax.numpy as jnp
    from jax import lax

    rows = x.shape[0] // blocks
    y = lax.empty((x.shape[0], w.shape[1]), x.dtype)
    for b in range(blocks):
        part = jnp.matmul(lax.slice_in_dim(x, b * rows, (b + 1) * rows), w)
        y = lax.dynamic_update_slice_in_dim(y, part, b * rows, 0)
        y, w = lax.optimization_barrier((y, w))  # or XLA makes one product of all
    return y


def measure(k: int, n: int, options: Options) -> dict[int, list[float]]:
    """Seconds of a product [rows, k] x [k, n] by the number of blocks, each round's."""
    import functools

    import jax
    import jax.numpy as jnp

    from jaxlab.overlap import compiler_options

    device = jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    x = jnp.ones((options.rows, k), dtype)
    w = jnp.ones((k, n), dtype) / k
    kept = compiler_options("cuda" if device.platform == "gpu" else device.platform)
    counts = (1, options.size, 2 * options.size, 4 * options.size)
    forms = {
        blocks: jax.jit(
            functools.partial(in_blocks, blocks=blocks), compiler_options=kept or None
        )
        for blocks in counts
    }
    for form in forms.values():
        jax.block_until_ready(form(x, w))
    seconds: dict[int, list[float]] = {blocks: [] for blocks in counts}
    for _ in range(options.rounds):
        for blocks, form in forms.items():
            start = time.perf_counter()
            for _ in range(options.repeats):
                y = form(x, w)
            jax.block_until_ready(y)
            seconds[blocks].append((time.perf_counter() - start) / options.repeats)
    return seconds


def run(options: Options) -> dict[str, Any]:
    """All measurements and both choices, as printed."""
    import jax

    from jaxlab.overlap import hardware as hw

    device = jax.devices()[0]
    options = resolve(options, device.platform == "cpu")
    sheet = hw.find(device.device_kind) or hw.measure([device])
    local = options.hidden // options.size
    shapes = {"up": (options.width, local), "down": (local, options.width)}
    rows, peaks, launches = [], [], []
    for name, (k, n) in shapes.items():
        seconds = measure(k, n, options)
        whole = statistics.median(seconds[1])
        peaks.append(2 * options.rows * k * n / whole)
        for blocks, found in seconds.items():
            median = statistics.median(found)
            # Of a ring without a wire: two launches for each product beyond the first.
            rounded = [-(-s // sheet.tile) * sheet.tile for s in (k, n)]
            one = 2 * -(-options.rows // blocks // sheet.tile) * sheet.tile
            each = one * rounded[0] * rounded[1] / sheet.peak
            expected = blocks * each + 2 * (blocks - 1) * sheet.launch
            rows.append(
                {
                    "product": name,
                    "blocks": blocks,
                    "rows_of_a_block": options.rows // blocks,
                    "seconds": [median, min(found), max(found)],
                    "efficiency": whole / median,
                    "predicted_seconds": expected,
                }
            )
            if blocks > 1:
                launches.append(max(0.0, median - whole) / (blocks - 1) / 2)
    found = dataclasses.replace(
        sheet,
        name=f"{sheet.name}, products as measured",
        peak=statistics.median(peaks),
        launch=statistics.median(launches),
    )
    choices = []
    for name, (k, n) in shapes.items():
        kind: hw.Kind = "gather" if name == "up" else "scatter"
        for backward in (False, True):
            shape: Any = dict(rows=options.rows, k=k, n=n, size=options.size)
            shape |= dict(itemsize=2, backward=backward)
            a, b = (hw.choose(kind, hardware=h, **shape) for h in (sheet, found))
            choices.append(
                {
                    "product": name,
                    "backward": backward,
                    "predicted": a._asdict(),
                    "with_what_was_measured": b._asdict(),
                    "agree": a[:2] == b[:2],
                }
            )
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "options": dataclasses.asdict(options),
        "products": rows,
        "predictor": dataclasses.asdict(sheet),
        "measured": dataclasses.asdict(found),
        "choices": choices,
    }


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/overlap_chunks.py")
    print(json.dumps(run(options), indent=1))


if __name__ == "__main__":
    run_main(main)
