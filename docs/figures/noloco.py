"""Draws how gossip learns: loss curves, and replica deviation beside learning rate.

    python benchmarks/noloco_convergence.py --curves > convergence.json
    python docs/figures/noloco.py convergence.json

Writes docs/figures/noloco.svg, means over the seeds.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "jaxlab"  # the same numbers give the same file
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[2]
SHOWN = (
    "dp",
    "diloco H25 nesterov",
    "noloco H25 nesterov",
    "noloco H25",
    "noloco H25 gamma 0",
    "local",
)


def main(path: str) -> None:
    """Draws and writes."""
    runs = json.loads(Path(path).read_text())["runs"]
    arms = [a for a in SHOWN if any(r["arm"] == a for r in runs)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for arm in arms:
        of_arm = [r for r in runs if r["arm"] == arm]
        curve = np.mean([r["curve"] for r in of_arm], axis=0)
        left.plot(*curve.T, label=arm)
        std = np.mean([r["std"] for r in of_arm], axis=0)
        if arm != "dp":
            right.semilogy(25 * np.arange(1, len(std) + 1), std.clip(1e-5), label=arm)
    left.set(
        xlabel="step",
        ylabel="nats per byte",
        title="held out, mean of the replicas",
        ylim=(None, 2.6),
    )
    right.set(
        xlabel="step", title="standard deviation between replicas", ylim=(5e-4, 0.2)
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.savefig(ROOT / "docs/figures/noloco.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
