"""The pure functions at the centre: one training step, one evaluation step."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxlab import manual
from jaxlab.data import Batch
from jaxlab.state import TrainState

Apply = Callable[..., Any]
"""`model.apply`: ({"params": ...}, tokens_bt) to logits, float32[b, t, v]."""

Gradient = Callable[[Any, Batch], tuple[Any, Array]]
"""`mean_gradient` with its options: (params, batch) to gradient and loss."""


def cross_entropy(
    logits_btv: Float[Array, "b t v"],
    targets_bt: Int[Array, "b t"],
    by_hand: bool = False,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Negative log-likelihood (nats) and log-partition of each token.

    By hand the logits are this device's part of the vocabulary (`jaxlab.manual`).
    """
    if by_hand:
        log_z_bt = manual.log_partition(logits_btv)
        return log_z_bt - manual.pick(logits_btv, targets_bt), log_z_bt
    log_z_bt = jax.nn.logsumexp(logits_btv, axis=-1)
    if _vocabulary_cut_in_shard_map():
        hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1])[None, None]
        picked_bt = jnp.sum(jnp.where(hit_btv, logits_btv, 0), axis=-1)
    else:
        picked_btv = jnp.take_along_axis(logits_btv, targets_bt[..., None], axis=-1)
        picked_bt = picked_btv[..., 0]
    return log_z_bt - picked_bt, log_z_bt


def _vocabulary_cut_in_shard_map() -> bool:
    """Where XLA's partitioner aborts on the gather (jax 0.10.2 to 0.12.0.1).

    It happens when another mesh axis is handled by hand and `tensor` is not. The sum
    that takes its place costs more: 0.14 s, not 0.08 s, for 134 MB of logits on CPU.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = "tensor" in mesh.axis_names and "tensor" not in mesh.manual_axes
    return bool(mesh.manual_axes) and automatic and mesh.shape["tensor"] > 1


def summed_loss(
    params: Any,
    batch_bt: Batch,
    *,
    apply: Apply,
    z_loss: float,
    by_hand: bool = False,
) -> tuple[Array, tuple[Array, Array]]:
    """Sum over a micro-batch's targets of mask * (nll + z_loss * log_z^2).

    The z-loss is PaLM's (arXiv 2204.02311, section 5).

    Returns:
        the sum, and (sum of mask * nll, sum of mask); float32[] each.
    """
    inputs_bt, targets_bt, mask_bt, segments_bt = jax.tree.map(jnp.asarray, batch_bt)
    logits_btv = apply({"params": params}, inputs_bt, segments_bt=segments_bt)
    nll_bt, log_z_bt = cross_entropy(logits_btv, targets_bt, by_hand)
    nll = jnp.sum(mask_bt * nll_bt)
    total = nll + z_loss * jnp.sum(mask_bt * log_z_bt**2) if z_loss else nll
    return total, (nll, jnp.sum(mask_bt))


def mean_gradient(
    params: Any,
    batch: Batch,
    *,
    apply: Apply,
    z_loss: float = 0.0,
    row_axes: tuple[str, ...] | None = None,
) -> tuple[Any, Array]:
    """Gradient of the mean loss over all targets of all micro-batches.

    The sums of the micro-batches are added before the one division, so the result
    does not depend on how the batch was cut.

    Args:
        params: weights.
        batch: arrays [microbatch, row, time].
        apply: the model.
        z_loss: weight of the squared log-partition.
        row_axes: with them `apply` handles the mesh by hand, params and batch are what
            this device holds, and the sums are over these axes (`jaxlab.manual`).

    Returns:
        gradient like `params`, and the mean nll (nats per token).
    """
    by_hand = row_axes is not None
    loss = partial(summed_loss, apply=apply, z_loss=z_loss, by_hand=by_hand)
    one = jax.grad(loss, has_aux=True)
    if row_axes is not None:
        params = manual.own(params, row_axes)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, one(params, micro)), None

    total = one(params, jax.tree.map(lambda x: x[0], batch))
    if batch.inputs_abt.shape[0] > 1:
        total, _ = jax.lax.scan(add, total, jax.tree.map(lambda x: x[1:], batch))
    if row_axes is not None:
        total = manual.add_up(total, row_axes)
    gradient, (nll, count) = total
    count = jnp.maximum(count, 1.0)
    return jax.tree.map(lambda g: g / count, gradient), nll / count


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    gradient: Gradient,
    **options: Any,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step, of the whole model or of one of its replicas.

    Args:
        state: before the step.
        batch: arrays [microbatch, row, time].
        gradient: `mean_gradient` with its options.
        options: see `update`, which has the rest.
    """
    return update(state, *gradient(state.params, batch), **options)


def update(
    state: TrainState,
    gradient: Any,
    loss: Array,
    *,
    tx: optax.GradientTransformation,
    ema: float | None = None,
    on_nonfinite: Literal["stop", "skip"] = "stop",
    exchange: Callable[[Any, Any], tuple[Any, Any]] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """The part of a step that comes after the gradient.

    A step whose loss or gradient is not finite changes no weights. With "skip" it
    is counted and passed over; with "stop" no later step changes anything either,
    so the caller, who learns of it a step late, still holds the last good state.

    Args:
        state: before the step.
        gradient: of the mean loss, like the weights.
        loss: mean nll, nats per token.
        tx: the optimizer.
        ema: decay of the moving average of the weights.
        on_nonfinite: see above.
        exchange: what replicas do after the step, `optim.outer_step` with its
            arguments: (params, opt_state) to the same. The state is then that of
            `optim.noloco`.

    Returns:
        the state after the step, and scalars: `loss` (nats per token),
        `grad_norm`, `param_norm`, `finite` (bool), `skipped` (steps so far); with
        an exchange also its `replica_std`.
    """
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema
    if ema is not None:
        average = optax.incremental_update(params, state.ema, 1 - ema)
    new = TrainState(state.step + 1, params, opt_state, average, state.skipped)

    passed = state._replace(skipped=state.skipped + 1)
    good = finite
    if on_nonfinite == "skip":
        passed = passed._replace(step=new.step)
    else:
        good &= state.skipped == 0
    new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, passed)
    if exchange is not None:
        # Rounds go on for all, whatever one replica's gradient was, so what they
        # count by must not depend on it.
        before: Any = opt_state
        shared = new.opt_state._replace(count=before.count, key=before.key)
        params, opt_state = exchange(new.params, shared)
        new = new._replace(params=params, opt_state=opt_state)
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "param_norm": optax.tree.norm(new.params),
        "finite": finite,
        "skipped": new.skipped,
    }
    if exchange is not None:
        metrics["replica_std"] = new.opt_state.replica_std
    return new, metrics


def eval_step(params: Any, batch: Batch, *, apply: Apply) -> tuple[Array, Array]:
    """Sum of the nll (nats) over a batch's targets, and their number.

    Takes the first micro-batch; evaluation batches have one.
    """
    rows = jax.tree.map(lambda x: x[0], batch)
    _, sums = summed_loss(params, rows, apply=apply, z_loss=0.0)
    return sums


def mean_loss(sums: list[tuple[Array, Array]]) -> tuple[float, int]:
    """Mean nll (nats per token) and count of `eval_step`'s sums, in float64."""
    nll, count = np.asarray(jax.device_get(sums), np.float64).sum(axis=0).tolist()
    return nll / count, int(count)
