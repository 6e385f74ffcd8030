"""The state of training, its abstract form and where it lies on a mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.mesh import partition_spec


class TrainState(NamedTuple):
    """Everything that a step reads and writes."""

    step: jax.Array
    """int32[]: optimizer steps taken"""
    params: Any
    """weights, float32"""
    opt_state: Any
    """state of the optax transformation"""
    ema: Any
    """moving average of the weights, or None"""
    skipped: jax.Array
    """int32[]: steps whose loss or gradient was not finite"""


def new_state(params: Any, tx: optax.GradientTransformation, ema: bool) -> TrainState:
    """State before the first step."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    # Two zeros: one buffer cannot be donated twice.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, params, tx.init(params), average, skipped)


def state_shardings(
    abstract: TrainState, names: Any, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Sharding of each array: optimizer moments lie where their weights do.

    Args:
        abstract: shapes of the state (`jax.eval_shape` of `new_state`).
        names: logical dimension names of each weight (`models.gpt.param_names`).
        tx: the optimizer whose state this is.
        mesh: the job's mesh.
    """
    whole: Any = NamedSharding(mesh, PartitionSpec())
    weights = jax.tree.map(
        lambda n: NamedSharding(mesh, partition_spec(n)),
        names,
        is_leaf=lambda n: isinstance(n, tuple),
    )
    opt_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        abstract.opt_state,
        weights,
        transform_non_params=lambda _: whole,
    )
    ema = None if abstract.ema is None else weights
    return TrainState(whole, weights, opt_state, ema, whole)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes that also say where the arrays lie; what a restore asks for."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings,
    )
