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

from jaxlab import config  # noqa: E402

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
    report = json.loads(Path(path).read_text())
    runs, options = report["runs"], report["options"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for number, arm in enumerate(SHOWN):
        of_arm = [r for r in runs if r["arm"] == arm]
        color = f"C{number}"
        curve = np.mean([r["curve"] for r in of_arm], axis=0)
        left.plot(*curve.T, label=arm, color=color)
        std = np.mean([r["std"] for r in of_arm], axis=0)
        if std.min() > 1e-6:  # others are equal after each exchange
            right.semilogy(25 * np.arange(1, len(std) + 1), std, color=color)
    steps = np.arange(1, options["steps"])
    rate = config.AdamW(lr=options["lr"], warmup=100).learning_rate(options["steps"])
    right.semilogy(steps, rate(steps), color="gray", ls=":", label="learning rate")
    left.set(
        xlabel="step",
        ylabel="nats per byte",
        title="held out, mean of the replicas",
        ylim=(None, 2.6),
    )
    right.set(
        xlabel="step", title="standard deviation between replicas", ylim=(3e-4, 0.2)
    )
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(ROOT / "docs/figures/noloco.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
