"""The update: imitation of demonstrations, then DART's objective; pure functions.

An update takes up a batch of whole groups. What compares steps of a group (advantage,
entropy mask) and what stays as it is (the log-probabilities of the old and of the
reference policy, recomputed here, whoever acted) is settled first; then come the
optimizer's steps, `objective.passes` of them.

Everything is an ordinary function of arrays: on a mesh, batches whose steps are cut
along it give the same numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import step
from jaxlab.rl.config import Cloning, Curation, Objective, RLRun
from jaxlab.rl.curation import entropy_mask
from jaxlab.rl.loss import dart_loss, stepwise_advantage
from jaxlab.rl.policy import Learner, Policy, Scored
from jaxlab.rl.trajectory import Batch, Trajectory, collate
from jaxlab.state import TrainState, new_state

Score = Callable[..., Scored]
"""`Policy.score`."""


class State(NamedTuple):
    """What an update reads and writes."""

    train: TrainState
    reference: Any
    """weights of the frozen reference, those at the start; None: there is no KL"""

    @property
    def params(self) -> Any:
        """The weights to act with."""
        return self.train.params


class Fixed(NamedTuple):
    """What is settled about a batch before its weights change."""

    logp_old: jax.Array | None
    """float32 [step, token]; None: that of the weights where the gradient is taken"""
    logp_ref: jax.Array | None
    """float32 [step, token]"""
    advantage: jax.Array
    """float32 [step]"""
    keep: jax.Array
    """bool [step]: those to train on"""


def build(run: RLRun, policy: Policy) -> Learner:
    """The learner of a run."""
    tx = run.optimizer.build(run.steps * run.objective.passes)
    update = partial(
        dart_update,
        score=policy.score,
        tx=tx,
        objective=run.objective,
        curation=run.curation,
    )

    def init(params: Any) -> State:
        params = jax.tree.map(jnp.copy, params)  # the state is donated
        reference = jax.tree.map(jnp.copy, params) if run.objective.beta else None
        return State(new_state(params, tx, ema=False), reference)

    return Learner(init, jax.jit(update, donate_argnums=0))


def settle(
    params: Any,
    reference: Any,
    batch: Batch,
    *,
    score: Score,
    curation: Curation,
    again: bool = True,
) -> Fixed:
    """What stays as it is while a batch is trained on.

    Args:
        params: the weights that take up the batch.
        reference: those of the reference, or None.
        batch: whole groups.
        score: the policy's.
        curation: its `entropy_quantile`.
        again: the weights will change before the batch is done with; otherwise the old
            policy's log-probabilities are those that the gradient computes anyway.
    """
    real = jnp.asarray(batch.mask).any(1)

    def logp(weights: Any) -> jax.Array:
        return _score(score, weights, batch).logp

    return Fixed(
        logp(params) if again else None,
        None if reference is None else logp(reference),
        stepwise_advantage(batch.reward, batch.group, mask=real),
        entropy_mask(batch.entropy, batch.group, curation.entropy_quantile, mask=real),
    )


def dart_gradient(
    params: Any,
    fixed: Fixed,
    batch: Batch,
    *,
    score: Score,
    objective: Objective,
    curation: Curation,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient of `dart_loss` at the weights, and its figures.

    Steps that nobody recorded a log-probability of (NaN: demonstrations) have weight 1.
    """

    def loss(weights: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        now = _score(score, weights, batch)
        logp = now.logp
        old = jax.lax.stop_gradient(logp) if fixed.logp_old is None else fixed.logp_old
        unknown = jnp.isnan(batch.logp)
        if curation.importance_cap is None:
            unknown = jnp.ones_like(unknown)
        value, figures = dart_loss(
            logp,
            old,
            jnp.where(unknown, old, batch.logp),
            fixed.logp_ref,
            fixed.advantage,
            batch.mask,
            fixed.keep,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            beta=objective.beta,
            cap=curation.importance_cap or 1.0,
            ratio=objective.ratio,
        )
        trained = batch.mask & fixed.keep[:, None]
        count = jnp.maximum(trained.sum(), 1)
        entropy = jnp.sum(jnp.where(trained, now.entropy, 0)) / count
        return value, figures | {"entropy": jax.lax.stop_gradient(entropy)}

    return jax.grad(loss, has_aux=True)(params)


def dart_update(
    state: State,
    batch: Batch,
    *,
    score: Score,
    tx: optax.GradientTransformation,
    objective: Objective,
    curation: Curation,
) -> tuple[State, dict[str, jax.Array]]:
    """One update: `objective.passes` optimizer steps on one batch.

    A pass whose loss or gradient is not finite changes nothing and is counted.

    Args:
        state: before.
        batch: whole groups, padded.
        score: the policy's.
        tx: the optimizer.
        objective: the loss.
        curation: `entropy_quantile` and `importance_cap`.

    Returns:
        the state after, and scalars, of the last pass: those of `dart_loss`,
        `entropy` (nats, mean over the trained tokens), `demonstrated` (share of the
        steps), `success` (mean reward of the steps), and those of `jaxlab.step.update`.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    passes = objective.passes
    fixed = settle(
        state.params,
        state.reference,
        batch,
        score=score,
        curation=curation,
        again=passes > 1,
    )

    def one(train: TrainState, _: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        gradient, figures = dart_gradient(
            train.params,
            fixed,
            batch,
            score=score,
            objective=objective,
            curation=curation,
        )
        train, more = step.update(
            train, gradient, figures["loss"], tx=tx, on_nonfinite="skip"
        )
        return train, figures | more

    if passes == 1:
        train, figures = one(state.train, None)
    else:
        train, several = jax.lax.scan(one, state.train, None, passes)
        figures = jax.tree.map(lambda x: x[-1], several)
    real = batch.mask.any(1)
    steps = jnp.maximum(real.sum(), 1)
    figures["demonstrated"] = jnp.sum(jnp.isnan(batch.logp).any(1) & real) / steps
    figures["success"] = jnp.sum(jnp.where(real, batch.reward, 0)) / steps
    return State(train, state.reference), figures


def clone_update(
    train: TrainState,
    batch: Batch,
    *,
    score: Score,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step of behaviour cloning.

    The loss is the negative log-likelihood of the demonstrated actions, nats a step:
    the sum over an action's tokens, the mean over the steps.

    Returns:
        the state after, and scalars: `loss`, `entropy` (nats, mean over the tokens),
        and those of `jaxlab.step.update`.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    steps = jnp.maximum(batch.mask.any(1).sum(), 1)

    def loss(weights: Any) -> tuple[jax.Array, jax.Array]:
        now = _score(score, weights, batch)
        nll = -jnp.sum(jnp.where(batch.mask, now.logp, 0)) / steps
        entropy = jnp.where(batch.mask, now.entropy, 0).sum() / batch.mask.sum()
        return nll, jax.lax.stop_gradient(entropy)

    (nll, entropy), gradient = jax.value_and_grad(loss, has_aux=True)(train.params)
    train, figures = step.update(train, gradient, nll, tx=tx, on_nonfinite="skip")
    return train, figures | {"entropy": entropy}


def clone(
    config: Cloning,
    policy: Policy,
    params: Any,
    demonstrations: Sequence[Trajectory],
    seed: int,
) -> Iterator[tuple[Any, dict[str, jax.Array]]]:
    """Behaviour cloning: after each update the weights, and the figures of it.

    Which steps an update takes depends on the seed and its number alone.

    Args:
        config: how long, and with which optimizer.
        policy: what imitates.
        params: the weights at the start.
        demonstrations: what is imitated; the successful ones.
        seed: of the order.

    Raises:
        ValueError: no demonstration succeeded.
    """
    good = [one for one in demonstrations if one.reward > 0]
    if not good:
        raise ValueError(f"none of {len(demonstrations)} demonstrations succeeded")
    steps = collate([[one] for one in good], 0)
    tx = config.optimizer.build(config.updates)
    update = jax.jit(partial(clone_update, score=policy.score, tx=tx), donate_argnums=0)
    train = new_state(jax.tree.map(jnp.copy, params), tx, ema=False)
    for number in range(config.updates):
        rng = np.random.default_rng((seed, number))
        rows = rng.integers(len(steps.tokens), size=config.batch)
        train, figures = update(train, jax.tree.map(lambda x, r=rows: x[r], steps))
        yield train.params, figures


def _score(score: Score, params: Any, batch: Batch) -> Scored:
    return score(params, batch.images, batch.instruction, batch.tokens, batch.mask)
