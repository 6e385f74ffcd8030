"""Draws the loss curve of a run and puts its last sample into the README.

    make train && python docs/figures/loss_curve.py runs/gpt_tiny

Writes docs/figures/loss_curve.svg, and the block between the `sample` marks of
README.md, from the run's metrics.jsonl and TensorBoard events alone.
"""

import json
import re
import sys
from pathlib import Path

import matplotlib
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "jaxlab"  # the same run gives the same file
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[2]


def main(folder: str) -> None:
    """Draws and writes."""
    rows = [
        json.loads(x) for x in Path(folder, "metrics.jsonl").read_text().splitlines()
    ]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for tag, style in (
        ("train/loss", {"lw": 1}),
        ("eval/loss", {"marker": "o", "ms": 4}),
    ):
        points = [(row["step"], row[tag]) for row in rows if tag in row]
        axes.plot(*zip(*points, strict=True), label=tag, **style)
    axes.set(xlabel="step", ylabel="nats per byte", title=Path(folder).name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs/figures/loss_curve.svg", metadata={"Date": None})

    events = EventAccumulator(folder, size_guidance={"tensors": 0})
    events.Reload()
    last = events.Tensors("sample")[-1].tensor_proto.string_val[0].decode()
    readme = ROOT / "README.md"
    block = f"<!-- sample -->\n{last}\n<!-- /sample -->"
    text = re.sub(
        r"<!-- sample -->.*?<!-- /sample -->",
        lambda _: block,
        readme.read_text(),
        flags=re.DOTALL,
    )
    readme.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/gpt_tiny")
