"""A policy that acts on MiniWoB++ pages in Chromium: sixteen tasks at once (DART).

    python scripts/train.py configs/gui_miniwob.py      # extra gui, and a Chromium
    python scripts/eval.py runs/gui_miniwob --seeds 1000000:1000200

It first imitates scripted experts, whose 9600 episodes are played in the browser at
the start and take 7 GiB of memory, then acts itself. Places are 10 pixels apart, which
a few of the smallest links and boxes slip through (49 of 3200 episodes of the expert);
at 5 pixels (`cell=5, pool=4`) an update costs twice as much.
"""

from jaxlab.optimizers import AdamW
from jaxlab.rl.config import Cloning, Curation, Envs, GuiPolicy, Objective, RLRun

TASKS = (
    "click-button",
    "click-checkboxes",
    "click-collapsible-nodelay",
    "click-color",
    "click-dialog",
    "click-dialog-2",
    "click-link",
    "click-option",
    "click-tab",
    "click-test",
    "click-test-2",
    "click-widget",
    "enter-text",
    "focus-text",
    "focus-text-2",
    "identify-shape",
)


def config() -> RLRun:
    """The run."""
    return RLRun(
        out="runs/gui_miniwob",
        steps=60,
        groups=8,
        policy=GuiPolicy(cell=10, stride=5, patch=20),
        envs=Envs(id="jaxlab/MiniWoB-v0", tasks=TASKS, hosts=1, slots=4, max_steps=10),
        cloning=Cloning(updates=4000, batch=32, episodes=9600),
        curation=Curation(max_rejected=32),
        objective=Objective(beta=0.01, passes=2),
        optimizer=AdamW(lr=1e-4, weight_decay=0.0, schedule="constant", warmup=5),
    )
