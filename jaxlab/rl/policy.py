"""What the asynchronous parts want of a policy and of a learner: pure functions.

`RLRun.policy` is a dataclass whose `build(observation_space)` returns a `Policy`;
`jaxlab.rl.learner.build(run, policy)` returns a `Learner`. Rollout workers and the
learner are other processes and build their own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxlab.rl.envs.api import Action


class Acted(NamedTuple):
    """Actions for a batch of observations, as tokens."""

    tokens: Any
    """int32 [row, token]; -1 after the end of an action"""
    logp: Any
    """float32 [row, token], nats: of the tokens, at the temperature they were drawn"""
    entropy: Any
    """float32 [row, token], nats: of the distribution each was drawn from"""


class Scored(NamedTuple):
    """Given actions under a policy, teacher-forced."""

    logp: Any
    """float32 [row, token], nats; where `mask` is False anything finite"""
    entropy: Any
    """float32 [row, token], nats"""


class Policy(NamedTuple):
    """A policy over action tokens; arrays as in `trajectory`."""

    init: Callable[[Any], Any]
    """`init(key) -> params`"""
    act: Callable[..., Acted]
    """`act(params, images[row, h, w, 3], instruction[row, word], keys[row],
    temperature)`: one key a row, so that an answer does not depend on who shares the
    batch; `temperature` is a scalar, 0: the likeliest token. Jittable."""
    score: Callable[..., Scored]
    """`score(params, images, instruction, tokens[row, token], mask[row, token])`, at
    temperature 1. Jittable and differentiable."""
    action: Callable[[np.ndarray], Action]
    """`action(tokens[token])`: what an environment understands, on the host; never
    raises on tokens that `act` may return"""
    tokens: Callable[[Action], np.ndarray]
    """`tokens(action) -> int32 [token]`: the inverse, for demonstrations, to the grid
    that the policy points with"""


class Learner(NamedTuple):
    """The update, without processes, files or clocks."""

    init: Callable[[Any], Any]
    """`init(params) -> state`, whose `params` are the weights to publish"""
    update: Callable[[Any, Any], tuple[Any, dict[str, Any]]]
    """`update(state, batch: trajectory.Batch) -> state, metrics` (name to scalar, each
    logged as `rl/<name>`); jitted, the state donated. Demonstrations' `logp` is NaN."""
