"""Environments, weights and updates that only take time, for measuring who waits.

The times are those of the paper's regime: steps of an application (lognormal), episodes
of very different length (Pareto), inference and updates that occupy their worker. They
are slept, so that what is measured is waiting, not this machine's arithmetic.
"""

import hashlib
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import gymnasium
import jax
import numpy as np
from gymnasium import spaces
from jax.experimental import io_callback

from jaxlab.rl import cluster, tiny
from jaxlab.rl.envs.api import observation_space
from jaxlab.rl.envs.miniwob import MiniWoBEnv
from jaxlab.rl.service import WorkerSpec, worker_main
from jaxlab.rl.weights import load_weights

gymnasium.register(id="Latent-v0", entry_point="common.latent:LatentEnv")
gymnasium.register(id="LatentWeb-v0", entry_point="common.latent:latent_web")
SCALE = "JAXLAB_LATENT_SCALE"


class LatentEnv(gymnasium.Env):
    """Sleeps; an episode is 3 to 30 steps long and succeeds at random.

    The environment variable JAXLAB_LATENT_SCALE is a factor on all its times.
    """

    median, spread = 0.12, 0.8
    """seconds of a step, and the standard deviation of their logarithm"""

    def __init__(self) -> None:
        self.scale = float(os.environ.get(SCALE, "1"))
        self.observation_space = observation_space(16, 16, 8, 4, 16)
        self.action_space = spaces.Discrete(1)
        self._rng = Random()
        self._left = 0

    def _see(self) -> dict[str, Any]:
        image = np.zeros((16, 16, 3), np.uint8)
        return {"image": image, "instruction": np.zeros(4, np.int32), "text": "wait"}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Takes 0.5 to 1.5 s, times the scale."""
        time.sleep(self.scale * self._rng.uniform(0.5, 1.5))
        self._left = min(int(3 * self._rng.paretovariate(1.1)), 30)
        return self._see(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict]:
        """Takes 50 ms to 3 s, times the scale."""
        seconds = self._rng.lognormvariate(math.log(self.median), self.spread)
        time.sleep(self.scale * min(max(seconds, 0.05), 3.0))
        self._left -= 1
        ended = self._left <= 0
        return self._see(), float(ended and self._rng.random() < 0.5), ended, False, {}


def latent_web() -> gymnasium.Env:
    """MiniWoB++ in Chromium, whose steps take 50 to 500 ms more, times the scale.

    Its screens lack their last two rows, so that the tiny policy can see them.
    """
    scale = float(os.environ.get(SCALE, "1"))
    rng, rows = Random(), 208

    class Slow(gymnasium.Wrapper):
        def step(self, action: Any) -> Any:
            seconds = rng.lognormvariate(math.log(LatentEnv.median), LatentEnv.spread)
            time.sleep(scale * min(max(seconds, 0.05), 0.5))
            return self.env.step(action)

    def cut(observation: dict[str, Any]) -> dict[str, Any]:
        return observation | {"image": observation["image"][:rows]}

    env = Slow(MiniWoBEnv())
    whole: Any = env.observation_space
    image = spaces.Box(0, 255, (rows, *whole["image"].shape[1:]), np.uint8)
    space = spaces.Dict({**whole, "image": image})
    return gymnasium.wrappers.TransformObservation(env, cut, space)


@dataclass(frozen=True)
class LatentPolicy:
    """A tiny policy whose batches and updates take so many seconds."""

    act: float = 0.03
    score: float = 8.0

    def build(self, space: Any) -> Any:
        """The policy, whose arithmetic is followed by a sleep."""
        made = tiny.build(4, space)

        def after(seconds: float, value: Any) -> Any:
            def sleep(x: Any) -> Any:
                time.sleep(seconds)
                return x

            like = jax.ShapeDtypeStruct(value.shape, value.dtype)
            return value + 0 * io_callback(sleep, like, jax.lax.stop_gradient(value))

        def act(*arguments: Any) -> Any:
            acted = made.act(*arguments)
            return acted._replace(logp=after(self.act, acted.logp))

        def score(*arguments: Any) -> Any:
            scored = made.score(*arguments)
            return scored._replace(entropy=after(self.score, scored.entropy))

        return made._replace(act=act, score=score)


def slow_worker(spec: WorkerSpec) -> None:
    """A rollout worker that takes 0.6 s to load weights, as a large one would."""

    def load(path: Any, sha256: str, template: Any) -> Any:
        time.sleep(0.6)
        return load_weights(path, sha256, template)

    worker_main(spec, load)


def audited_host(spec: cluster.HostSpec) -> None:
    """A host that also writes down, for good, which rollouts it has finished."""
    write = cluster.write_bytes

    def audited(path: Any, data: bytes, sync: bool = True) -> None:
        write(path, data, sync)
        line = f"{Path(path).stem} {hashlib.sha256(data).hexdigest()}\n"
        with open(Path(spec.spool).parent / "finished", "a") as file:
            file.write(line)  # one write to a file opened for appending is whole

    cluster.write_bytes = audited
    cluster.host_main(spec)
