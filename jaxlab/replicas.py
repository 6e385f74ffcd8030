"""Training replicas that drift apart: the step on the mesh axis `replica`.

State and metrics have a leading axis [replica, ...], but for the count and key that
all replicas share. In the step nothing but the exchange crosses replicas: each reads
its own rows, and what it reports is gathered on the host.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab import optim

AXIS = "replica"


def lead(shardings: Any, mesh: Mesh, replicas: int) -> Any:
    """Shardings of one replica's state made those of all: cut along the axis.

    A number of replicas that the mesh does not divide, as a checkpoint may have, lies
    whole on every device.
    """
    axis = AXIS if replicas % mesh.shape[AXIS] == 0 else None
    return optim.map_replicas(
        lambda s: NamedSharding(mesh, PartitionSpec(axis, *s.spec)),
        lambda s: s,
        shardings,
    )


def spread_step(step: Callable[..., Any], state: Any, mesh: Mesh) -> Callable[..., Any]:
    """Makes one replica's step that of all: (state, batch) to state and metrics.

    Args:
        step: `train_step` of one replica, with an `exchange`.
        state: shapes of the state of all replicas.
        mesh: with one place for each replica; its other axes stay automatic.

    Returns:
        the step on [replica, ...], each with its part of the rows of the batch.
    """
    return _spread(step, state, mesh, PartitionSpec(None, AXIS))


def spread_update(
    update: Callable[..., Any], state: Any, mesh: Mesh
) -> Callable[..., Any]:
    """Makes one replica's `step.update` that of all.

    For gradients made apart: (state, gradient, loss) to state and metrics.

    Args:
        update: of one replica, with an `exchange`.
        state: see `spread_step`.
        mesh: see `spread_step`.
    """

    def one(state, own):
        return update(state, *jax.tree.map(lambda x: x[0], own))

    spread = _spread(one, state, mesh, PartitionSpec(AXIS))
    return lambda state, gradient, loss: spread(state, (gradient, loss))


def _spread(step, state, mesh, spec):
    """(state, other) -> (state, metrics), where `other` is cut as `spec` says."""
    specs = optim.replica_specs(state, AXIS)

    def one(state, other):
        state = optim.map_replicas(lambda x: x[0], lambda x: x, state)
        state, metrics = step(state, other)
        state = optim.map_replicas(lambda x: x[None], lambda x: x, state)
        return state, jax.tree.map(lambda x: x[None], metrics)

    return jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(specs, spec),
        out_specs=(specs, PartitionSpec(AXIS)),
        axis_names={AXIS},
    )


def spread_evaluation(evaluate: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Evaluates every replica on the whole batch: (params, batch) to sums [replica]."""

    def one(params, batch):
        sums = evaluate(jax.tree.map(lambda x: x[0], params), batch)
        return jax.tree.map(lambda x: x[None], sums)

    return jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(PartitionSpec(AXIS), PartitionSpec()),
        out_specs=PartitionSpec(AXIS),
        axis_names={AXIS},
    )


def to_host(metrics: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Metrics as NumPy arrays: of all replicas, or of those that this process holds.

    Asking the other processes would make all replicas wait for the slowest.
    """

    def fetch(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        parts = {s.index[0].start: np.asarray(s.data) for s in x.addressable_shards}
        return np.concatenate([parts[start] for start in sorted(parts)])

    return {name: fetch(x) for name, x in metrics.items()}


def exchange_metrics(
    outer: dict[str, Any], state: Any, step: int, values: dict[str, np.ndarray]
) -> dict[str, float]:
    """What the exchange at the end of a step did; {} if there was none.

    Args:
        outer: arguments of `optim.outer_step`.
        state: shapes of the state of all replicas.
        step: steps done.
        values: metrics of the step, on the host.
    """
    outer_round, left = divmod(step, outer["inner_steps"])
    if left:
        return {}
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.params
    )
    std = values["replica_std"]
    variance = (
        np.mean(np.square(std[np.isfinite(std)])) if np.isfinite(std).any() else 0
    )
    scalars = {
        "noloco/replica_std": float(np.sqrt(variance)),
        "noloco/bytes": float(outer_round * optim.exchange_bytes(params, **outer)),
        "noloco/loss_min": float(np.min(values["loss"])),
        "noloco/loss_max": float(np.max(values["loss"])),
    }
    if outer["pairing"] == "all":
        return scalars
    row = optim.partners(
        outer["pairing"],
        outer["axis_size"],
        outer["seed"],
        outer_round - 1,
        group_size=outer["group_size"],
    )
    first = np.atleast_2d(row)[0]
    return scalars | {f"noloco/partner_of_{i}": float(j) for i, j in enumerate(first)}


def evaluation_metrics(sums: list[tuple[Any, Any]]) -> dict[str, float]:
    """Losses of single replicas: `eval_step`'s sums [replica] of each batch."""
    local = [to_host(dict(nll=nll, count=count)) for nll, count in sums]
    nll = np.sum([x["nll"] for x in local], axis=0, dtype=np.float64)
    losses = nll / np.sum([x["count"] for x in local], axis=0, dtype=np.float64)
    return {
        "noloco/eval_loss_mean": float(losses.mean()),
        "noloco/eval_loss_min": float(losses.min()),
        "noloco/eval_loss_max": float(losses.max()),
    }
