"""MiniWoB++ in Chromium: experts' ceilings, and steps/s beside Farama's Selenium.

python benchmarks/rl_miniwob.py > rl_miniwob.json
python benchmarks/rl_miniwob.py --rate ""     # ceilings alone
python benchmarks/rl_miniwob.py --episodes 0  # speed alone

`ceilings`: what the scripted experts and random actions reach on seeds from 1000000 on,
in our environment, with Wilson's 95 % intervals. An expert below 1 shows problems that
have no solution, or that it does not see.

`rate`: the same random clicks in the same tasks, in interleaved rounds: our environment
with 1, 4 and 8 tabs of one browser, on as many threads, and Farama's environment as it
comes (`gymnasium.make("miniwob/...")`, picture included) with 1 and 4 browsers, on as
many threads. Resets and pictures are in the time. `memory`: of all processes of our
browsers together (PSS), bytes.
"""

import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from rl_pix import cpu_model

from jaxlab.cli import parse_options, run_main
from jaxlab.rl import evaluate
from jaxlab.rl.envs.adapters import selenium_paths
from jaxlab.rl.envs.api import Action, Kind
from jaxlab.rl.envs.browsers import BROWSERS
from jaxlab.rl.envs.cdp import Browser
from jaxlab.rl.envs.miniwob import MiniWoBEnv
from jaxlab.rl.envs.miniwob_tasks import TASKS

STEPPED = ("click-button", "click-checkboxes", "enter-text", "login-user")


@dataclass(frozen=True)
class Options:
    """Ceilings and speed of MiniWoB++, as JSON."""

    episodes: int = 100
    """of each task and actor; 0: no ceilings"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """whose ceilings are measured"""
    workers: int = 4
    """tabs that measure ceilings"""
    rate: str = "ours:1 ours:4 ours:8 farama:1 farama:4"
    """what is timed, and with how many environments"""
    rounds: int = 3
    """interleaved; medians and extremes are reported"""
    seconds: float = 10.0
    """of one measurement"""


def ceilings(options: Options) -> dict[str, Any]:
    """Success of experts and of random actions."""
    seeds = range(evaluate.HELD_OUT, evaluate.HELD_OUT + options.episodes)

    def told(episode: evaluate.Episode) -> None:
        if episode.seed == seeds[-1]:
            print(f"{episode.actor} {episode.task}", file=sys.stderr)

    episodes = evaluate.evaluate(
        lambda task: MiniWoBEnv(task, timeout=30.0),
        None,
        options.tasks,
        seeds,
        ("oracle", "random"),
        workers=options.workers,
        told=told,
    )
    result = evaluate.summary(episodes)
    print(evaluate.table(result), file=sys.stderr)
    return result


class Ours:
    """Our environment, clicking anywhere."""

    def __init__(self, task: str) -> None:
        self.env, self.seed = MiniWoBEnv(task, timeout=60.0), 0
        self.env.reset(seed=0)

    def step(self, xy: tuple[float, float]) -> None:
        """One click; a reset where that ended the episode."""
        _, _, ended, cut, _ = self.env.step(Action(Kind.CLICK, xy).to_dict())
        if ended or cut:
            self.seed += 1
            self.env.reset(seed=self.seed)

    def close(self) -> None:
        """Ends it."""
        self.env.close()


class Farama:
    """Farama's environment as it comes, clicking anywhere."""

    def __init__(self, task: str) -> None:
        import gymnasium
        import miniwob
        from miniwob.action import ActionTypes

        gymnasium.register_envs(miniwob)
        with selenium_paths():
            self.env = gymnasium.make(f"miniwob/{task}-v1", disable_env_checker=True)
        types = list(self.env.unwrapped.action_space_config.action_types)
        self.click, self.seed = types.index(ActionTypes.CLICK_COORDS), 0
        self.steps = 0
        self.env.reset(seed=0)

    def step(self, xy: tuple[float, float]) -> None:
        """One click; a reset where that ended the episode, or where ours would."""
        at = np.array([xy[0] * 160, xy[1] * 210], np.float32)
        _, _, ended, _, _ = self.env.step({"action_type": self.click, "coords": at})
        self.steps += 1
        if ended or self.steps >= TASKS[self.env.unwrapped.subdomain]:
            self.seed, self.steps = self.seed + 1, 0
            self.env.reset(seed=self.seed)

    def close(self) -> None:
        """Ends it."""
        self.env.close()


def rate(make: Callable[[str], Any], number: int, seconds: float) -> dict[str, float]:
    """Steps a second of so many environments together; how long they took to start."""
    begun = time.perf_counter()
    envs = [make(STEPPED[n % len(STEPPED)]) for n in range(number)]
    start = time.perf_counter() - begun
    counts, until = [0] * number, time.perf_counter() + seconds

    def work(index: int) -> None:
        rng = Random(index)
        while time.perf_counter() < until:
            envs[index].step((rng.random(), rng.random()))
            counts[index] += 1

    threads = [threading.Thread(target=work, args=(n,)) for n in range(number)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    memory = BROWSERS.memory()
    for env in envs:
        env.close()
    return {"steps_s": sum(counts) / took, "start_s": start, "memory": memory}


def rates(options: Options) -> dict[str, Any]:
    """All of them, in interleaved rounds."""
    makers = {"ours": Ours, "farama": Farama}
    found: dict[str, list[dict[str, float]]] = {
        name: [] for name in options.rate.split()
    }
    for _ in range(options.rounds):
        for name, values in found.items():
            kind, _, number = name.partition(":")
            values.append(rate(makers[kind], int(number), options.seconds))
            print(name, values[-1], file=sys.stderr)
    result: dict[str, Any] = {}
    for name, values in found.items():
        result[name] = {
            key: {
                "median": float(f"{statistics.median(v[key] for v in values):.4g}"),
                "min": float(f"{min(v[key] for v in values):.4g}"),
                "max": float(f"{max(v[key] for v in values):.4g}"),
            }
            for key in values[0]
        }
    best = {
        kind: max(
            (r["steps_s"]["median"] for n, r in result.items() if n.startswith(kind)),
            default=0.0,
        )
        for kind in makers
    }
    if best["ours"] and best["farama"]:
        result["ours_over_farama"] = round(best["ours"] / best["farama"], 2)
    return result


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/rl_miniwob.py")
    load = os.getloadavg()[0]  # of others, so before this adds to it
    browser = Browser()
    result: dict[str, Any] = {
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "load": load},
        "browser": browser.version,
    }
    browser.close()
    if options.rate:
        result["rate"] = rates(options)
    if options.episodes:
        result["ceilings"] = ceilings(options)
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    run_main(main)
