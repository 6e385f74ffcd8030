"""What overlapping the tensor axis would save in a step: predicted, nothing is run.

python benchmarks/overlap_predict.py > predict.json      # a second

A step of configs/gpt_1b.py's model, and of one layer of a 70 B model (the public shape
of Llama 3 70B), forward and backward, cut over 8 devices with sequence-parallel blocks.
The model of the hardware is `jaxlab.overlap.hardware`: data-sheet rates, so all times
are too short; what counts is the ratio. See docs/overlap.md.

A block gathers rows for q, k and v, scatters the output of attention, gathers for gate
and up, and scatters down; `predict_backward` says what becomes of each. The products of
attention and the logits are the same in both forms; norms, the optimizer and whatever
the fsdp axis moves are left out.
"""

import dataclasses
import json
from typing import Any, NamedTuple

from configs import gpt_1b
from jaxlab.cli import parse_options, run_main
from jaxlab.overlap import hardware as hw

ITEMSIZE = 2
# The additions and copies of a ring run at the memory's rate in the model. libtpu's own
# estimates of their cycles, in what benchmarks/overlap_schedule.py compiles for v5e,
# amount to 300 GB/s; so this is the other end of what to expect.
SLOW_COPIES = dataclasses.replace(hw.V5E, name="TPU v5e, slow copies", copy_rate=3e11)
CHIPS = (hw.V5E, SLOW_COPIES, hw.H100)


@dataclasses.dataclass(frozen=True)
class Options:
    """Predicted seconds of a step, plain and overlapped, as JSON."""

    tensor: int = 8
    """devices in the ring"""
    tokens: int = 8192
    """tokens that a ring works on at once"""
    length: int = 2048
    """tokens of a sequence"""
    remat: bool = True
    """blocks are computed again in the backward pass, as in configs/gpt_1b.py"""


class Shape(NamedTuple):
    """What of a model the prediction needs."""

    name: str
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    """0: without the logits"""


def shapes() -> list[Shape]:
    """The two models."""
    run = gpt_1b.config()
    model = run.model
    vocabulary = int(run.data.tokenizer.split(":")[1])
    return [
        Shape(
            "gpt_1b",
            model.layers,
            model.width,
            model.mlp or 4 * model.width,
            model.heads,
            model.kv_heads or model.heads,
            model.width // model.heads,
            vocabulary,
        ),
        Shape("llama_70b_layer", 1, 8192, 28672, 64, 8, 128, 0),
    ]


def sublayers(shape: Shape, tensor: int) -> list[tuple[str, hw.Kind, int, int]]:
    """(name, kind, k, n) of a block's four collective matmuls, on a device."""
    heads = shape.heads * shape.head_dim // tensor
    # Fewer key heads than devices: each device has a copy of one.
    keys = max(1, shape.kv_heads // tensor) * shape.head_dim
    mlp = shape.mlp // tensor
    return [
        ("qkv", "gather", shape.width, heads + 2 * keys),
        ("out", "scatter", heads, shape.width),
        ("gate_up", "gather", shape.width, 2 * mlp),
        ("down", "scatter", mlp, shape.width),
    ]


def attention_seconds(shape: Shape, options: Options, chip: hw.Hardware) -> float:
    """Products of causal attention on a device, forward, at the peak rate."""
    heads = shape.heads // options.tensor
    flops = 2 * options.tokens * options.length * heads * shape.head_dim  # half of 4
    return flops / chip.peak


def predict_case(shape: Shape, chip: hw.Hardware, options: Options) -> dict[str, Any]:
    """Seconds of a step in both forms, and the form of each collective matmul."""
    plain = overlapped = 0.0
    forms = {}
    for name, kind, k, n in sublayers(shape, options.tensor):
        call: dict[str, Any] = dict(rows=options.tokens, k=k, n=n, size=options.tensor)
        call |= dict(itemsize=ITEMSIZE, hardware=chip)
        choice = hw.choose(kind, backward=True, **call)
        # What a block gives is not needed again, so its last product is not either.
        again = options.remat and name != "down"
        modes: tuple[tuple[hw.Mode, int], ...] = (("plain", 1), choice[:2])
        sums = [
            (2 if again else 1) * hw.predict(kind, mode=mode, chunks=chunks, **call)
            + hw.predict_backward(kind, mode=mode, chunks=chunks, **call)
            for mode, chunks in modes
        ]
        forms[name] = {
            "mode": choice.mode,
            "chunks": choice.chunks,
            "plain_seconds": sums[0],
            "overlapped_seconds": sums[1],
        }
        plain += shape.layers * sums[0]
        overlapped += shape.layers * sums[1]
    forwards = 2 if options.remat else 1
    # Backward, attention has twice the products, and the logits three times in all.
    same = shape.layers * (forwards + 2) * attention_seconds(shape, options, chip)
    head = 6 * options.tokens * shape.width * shape.vocabulary / options.tensor
    same += head / chip.peak
    weights = sum(k * n for _, _, k, n in sublayers(shape, options.tensor))
    floor = 6 * options.tokens * shape.layers * weights + head
    return {
        "model": shape.name,
        "hardware": chip.name,
        "plain_seconds": plain + same,
        "overlapped_seconds": overlapped + same,
        "speedup": (plain + same) / (overlapped + same),
        "floor_seconds": floor / chip.peak,
        "sublayers": forms,
    }


def predict_all(options: Options) -> dict[str, Any]:
    """All cases, as printed."""
    cases = [predict_case(s, c, options) for s in shapes() for c in CHIPS]
    return {
        "what": "prediction",
        "margin": hw.MARGIN,
        "options": dataclasses.asdict(options),
        "chips": [dataclasses.asdict(c) for c in CHIPS],
        "cases": cases,
    }


def main(arguments: list[str]) -> None:
    """Predicts all cases and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/overlap_predict.py")
    print(json.dumps(predict_all(options), indent=1))


if __name__ == "__main__":
    run_main(main)
