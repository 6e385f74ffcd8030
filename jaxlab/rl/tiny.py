"""A policy of a few hundred weights: a pointer that compares colours with words.

Two tokens: what to do (click or done), and for a click the cell of an 8 by 8 grid. A
cell's score is a bilinear form of the cell's mean colour and contrast with the mean
embedding of the instruction's words. It learns to press the red box, and costs nothing
beside what the tests and the benchmarks look at: the machinery around it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.errors import ConfigError
from jaxlab.rl.envs.api import Action, Kind
from jaxlab.rl.policy import Acted, Policy, Scored

GRID = 8


def build(width: int, space: Any) -> Policy:
    """The policy for an observation space of `envs.api`.

    Raises:
        ConfigError: 8 does not divide the screen's sides.
    """
    high, broad, _ = space["image"].shape
    if high % GRID or broad % GRID:
        raise ConfigError(
            f"a TinyPolicy sees {GRID} x {GRID} patches, which do not fit into a "
            f"screen of {broad} x {high}: set policy=GuiPolicy(...)"
        )
    words = int(space["instruction"].high.max()) + 1

    def init(key: jax.Array) -> dict[str, jax.Array]:
        a, b = jax.random.split(key)
        return {
            "words": 0.5 * jax.random.normal(a, (words, width)),
            "cells": 0.5 * jax.random.normal(b, (7, width)),
            "kind": jnp.array([2.0, 0.0]),
        }

    def logits(params: Any, images: Any, instruction: Any) -> tuple[Any, Any]:
        rows, height, wide, _ = images.shape
        tall, broad = height // GRID, wide // GRID
        patches = images.reshape(rows, GRID, tall, GRID, broad, 3) / 255.0
        mean = patches.mean((2, 4))
        spread = patches.std((2, 4))
        cells = jnp.concatenate([mean, spread, jnp.ones_like(mean[..., :1])], -1)
        known = (instruction > 0)[..., None]
        query = (params["words"][instruction] * known).sum(1)
        scores = jnp.einsum("byxf,fw,bw->byx", cells, params["cells"], query)
        kinds = jnp.broadcast_to(params["kind"], (rows, 2))
        return kinds, scores.reshape(rows, GRID * GRID)

    def act(
        params: Any, images: Any, instruction: Any, keys: Any, temperature: ArrayLike
    ) -> Acted:
        sharpness = 1 / jnp.maximum(temperature, 1e-6)
        kinds, cells = (sharpness * x for x in logits(params, images, instruction))
        both = jax.vmap(jax.random.split)(keys)
        kind = jax.vmap(jax.random.categorical)(both[:, 0], kinds)
        cell = jax.vmap(jax.random.categorical)(both[:, 1], cells)
        tokens = jnp.stack([kind, jnp.where(kind == 0, cell, -1)], 1)
        return Acted(tokens.astype(jnp.int32), *_scores(kinds, cells, tokens))

    def score(
        params: Any, images: Any, instruction: Any, tokens: Any, mask: Any
    ) -> Scored:
        kinds, cells = logits(params, images, instruction)
        return Scored(*_scores(kinds, cells, jnp.where(mask, tokens, 0)))

    def action(tokens: np.ndarray) -> Action:
        if tokens[0]:
            return Action(Kind.DONE)
        y, x = divmod(int(tokens[1]), GRID)
        return Action(Kind.CLICK, ((x + 0.5) / GRID, (y + 0.5) / GRID))

    def tokens(action: Action) -> np.ndarray:
        if action.kind != Kind.CLICK:
            return np.array([1, -1], np.int32)
        x, y = (min(int(v * GRID), GRID - 1) for v in action.xy)
        return np.array([0, y * GRID + x], np.int32)

    return Policy(init, act, score, action, tokens)


def _scores(kinds: Any, cells: Any, tokens: Any) -> tuple[Any, Any]:
    """Log-probability and entropy of each token: [row, 2]."""
    logp, entropy = [], []
    for place, logits in enumerate((kinds, cells)):
        logs = jax.nn.log_softmax(logits)
        chosen = jnp.maximum(tokens[:, place], 0)
        logp.append(jnp.take_along_axis(logs, chosen[:, None], 1)[:, 0])
        entropy.append(-(jnp.exp(logs) * logs).sum(1))
    return jnp.stack(logp, 1), jnp.stack(entropy, 1)
