"""A policy that reads and points, on three tasks of the embedded interface (DART).

    python scripts/train.py configs/gui_pix.py

It first imitates the expert's episodes, then acts itself. `benchmarks/rl_learning.py`
has the figures of this config, and its controls.
"""

from jaxlab.optimizers import AdamW
from jaxlab.rl.config import Cloning, Curation, Envs, GuiPolicy, Objective, RLRun


def config() -> RLRun:
    """The run."""
    return RLRun(
        out="runs/gui_pix",
        steps=60,
        groups=16,
        policy=GuiPolicy(),
        envs=Envs(tasks=("click", "check", "enter"), max_steps=12),
        cloning=Cloning(updates=2000, batch=32, episodes=6000),
        curation=Curation(max_rejected=32),
        objective=Objective(beta=0.01, passes=2),
        optimizer=AdamW(lr=3e-4, weight_decay=0.0, schedule="constant", warmup=5),
    )
