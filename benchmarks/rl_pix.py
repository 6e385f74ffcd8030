"""How fast the embedded interface is: steps a second of one process.

python benchmarks/rl_pix.py > rl_pix.json

Each source runs in each round, so that other load hits all alike. An action that
changes nothing, in the task `form` without end, tells what a step costs by itself:

- `cartpole`: the yardstick, gymnasium's own CartPole-v1 as `gymnasium.make` gives it;
- `made`: the same of jaxlab/Pix-v0, with gymnasium's wrappers;
- `env`: without them; `advance`: without gymnasium, and without a picture;
- `draw`: pictures alone.

`episodes` are whole ones, resets and the expert's thinking in their time, by task;
`start` is beginnings alone. `vector` steps environments in batches, ours beside
gymnasium's SyncVectorEnv of the same; a step is one environment's.
"""

import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random

import gymnasium
import numpy as np
from gymnasium.vector import SyncVectorEnv

import jaxlab.rl.envs  # noqa: F401  (registers)
from jaxlab.cli import parse_options, run_main
from jaxlab.rl.envs.api import Action, Kind
from jaxlab.rl.envs.pix import PixEnv, PixVectorEnv, advance, next_action, start, view
from jaxlab.rl.envs.pix_draw import draw
from jaxlab.rl.envs.pix_screen import SIZE
from jaxlab.rl.envs.pix_tasks import TASKS

ENDLESS = 10**9
NOWHERE = Action(Kind.CLICK, (0.99, 0.99))
BATCH = 64

Burst = Callable[[], int]
"""Works for a moment; how many steps that were."""


@dataclass(frozen=True)
class Options:
    """Steps per second of the embedded interface, as JSON."""

    rounds: int = 7
    """interleaved rounds; medians and extremes are reported"""
    seconds: float = 0.2
    """length of one measurement"""


def stepping(env: gymnasium.Env, action: object) -> Burst:
    """The same action again and again, with resets as they come."""
    env.reset(seed=0)

    def burst() -> int:
        for _ in range(200):
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return 200

    return burst


def advancing() -> Burst:
    """Steps of the interface alone."""
    episode = start("form", 0, limit=ENDLESS)

    def burst() -> int:
        for _ in range(200):
            advance(episode, NOWHERE)
        return 200

    return burst


def drawing() -> Burst:
    """Pictures alone."""
    screen = start("form", 0).screen
    image = np.empty((SIZE, SIZE, 3), np.uint8)

    def burst() -> int:
        for _ in range(200):
            draw(screen, image)
        return 200

    return burst


def starting(task: str) -> Burst:
    """Beginnings of episodes; 'steps' are episodes."""
    seeds = iter(range(ENDLESS))

    def burst() -> int:
        for _ in range(50):
            start(task, next(seeds))
        return 50

    return burst


def episodes(task: str) -> Burst:
    """The expert's episodes, with a picture for each step."""
    seeds, rng = iter(range(ENDLESS)), Random(0)

    def burst() -> int:
        steps = 0
        for _ in range(10):
            episode = start(task, next(seeds))
            while not episode.outcome:
                view(episode)
                action = next_action(episode, rng)
                assert action is not None
                advance(episode, action)
                steps += 1
            assert episode.outcome == "solved"
        return steps

    return burst


def batches(env: gymnasium.vector.VectorEnv) -> Burst:
    """Batches of an action that changes nothing; episodes end at their limit."""
    env.reset(seed=0)
    own = NOWHERE.to_dict()
    actions = {name: np.stack([own[name]] * BATCH) for name in own}

    def burst() -> int:
        env.step(actions)
        return BATCH

    return burst


def rate(burst: Burst, seconds: float) -> float:
    """Steps a second."""
    burst()
    steps, begun = 0, time.perf_counter()
    while (taken := time.perf_counter() - begun) < seconds:
        steps += burst()
    return steps / taken


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes, to four digits."""
    found = {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def cpu_model() -> str:
    """Name of the processor, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/rl_pix.py")
    load = os.getloadavg()[0]  # of others, so before this adds to it
    nowhere = NOWHERE.to_dict()
    made = gymnasium.make("jaxlab/Pix-v0", task="form", max_steps=ENDLESS)
    pixels = [lambda: PixEnv("form")] * BATCH
    sources = {
        "cartpole": stepping(gymnasium.make("CartPole-v1"), 1),
        "made": stepping(made, nowhere),
        "env": stepping(PixEnv("form", max_steps=ENDLESS), nowhere),
        "advance": advancing(),
        "draw": drawing(),
        "vector": batches(PixVectorEnv(BATCH, "form")),
        "vector_gymnasium": batches(SyncVectorEnv(pixels)),
    }
    sources |= {f"start/{task}": starting(task) for task in TASKS}
    sources |= {f"episodes/{task}": episodes(task) for task in TASKS}
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(options.rounds):
        for name, burst in sources.items():
            rates[name].append(rate(burst, options.seconds))
    found = {name: spread(values) for name, values in rates.items()}

    def tasks(source: str) -> dict:
        return {task: found[f"{source}/{task}"] for task in TASKS}

    yardstick = found["cartpole"]["median"]
    result = {
        "benchmark": "rl_pix",
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load": load},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "gymnasium")},
        "rounds": options.rounds,
        "batch": BATCH,
        "steps_per_second": {n: r for n, r in found.items() if "/" not in n},
        "made_of_cartpole": round(found["made"]["median"] / yardstick, 3),
        "starts_per_second": tasks("start"),
        "steps_per_second_of_episodes": tasks("episodes"),
        "slowest_task": min(r["median"] for r in tasks("episodes").values()),
    }
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    run_main(main)
