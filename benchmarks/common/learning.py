"""What studies of learning share: environments, demonstrations and evaluation."""

import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import gymnasium
import jax
import numpy as np

from benchmarks.common.lockstep import TRAINING_SEEDS
from jaxlab.rl.cluster import make_env
from jaxlab.rl.config import RLRun
from jaxlab.rl.play import Job, demonstrations, play, wilson
from jaxlab.rl.policy import Policy
from jaxlab.rl.trajectory import Trajectory


def make(run: RLRun, number: int) -> list[gymnasium.Env]:
    """The run's environments."""
    return [make_env(run.envs) for _ in range(number)]


def show(policy: Policy, run: RLRun) -> list[Trajectory]:
    """The expert's episodes of a run."""
    tasks, number, limit = run.envs.tasks, run.cloning.episodes, run.envs.max_steps
    envs = make(run, run.envs.slots)
    shown = list(
        demonstrations(policy, envs, tasks, number, run.seed, limit, TRAINING_SEEDS)
    )
    for env in envs:
        env.close()
    return shown


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    names = {name: version(name) for name in ("jax", "flax", "numpy")}
    return {"python": platform.python_version()} | names


def evaluate(
    policy: Policy,
    act: Any,
    params: Any,
    envs: Sequence[gymnasium.Env],
    tasks: Iterable[str],
    episodes: int,
    *,
    temperature: float = 0.0,
    shuffled: bool = False,
) -> dict[str, Any]:
    """Success on held-out seeds, by task, with Wilson's interval of 95 %."""
    jobs = [
        Job(index, task, TRAINING_SEEDS + index)
        for task in tasks
        for index in range(episodes)
    ]
    found: dict[str, list[float]] = {}
    for one in play(
        policy,
        params,
        envs,
        jobs,
        jax.random.key(1),
        temperature=temperature,
        options={"shuffled": shuffled},
        act=act,
    ):
        assert one.seed >= TRAINING_SEEDS
        found.setdefault(one.task, []).append(one.reward)
    result = {}
    for task in sorted(found):
        low, high = wilson(int(sum(found[task])), len(found[task]))
        result[task] = {
            "success": round(float(np.mean(found[task])), 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    return result


def log(line: str) -> None:
    """To the one who waits."""
    print(line, file=sys.stderr, flush=True)
