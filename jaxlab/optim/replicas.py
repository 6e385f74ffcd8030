"""Trees of many replicas: a leading axis on all but what the replicas share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlab.optim.noloco import NoLoCoState


def map_replicas(
    own: Callable[[Any], Any], shared: Callable[[Any], Any], tree: Any
) -> Any:
    """Maps the replicas' own leaves by one function, what they share by another.

    Shared are count and key of a NoLoCoState, which may lie anywhere in the tree.
    """

    def part(x):
        if not isinstance(x, NoLoCoState):
            return own(x)
        count, key = shared(x.count), shared(x.key)
        rest = jax.tree.map(own, x._replace(count=None, key=None))
        return rest._replace(count=count, key=key)

    return jax.tree.map(part, tree, is_leaf=lambda x: isinstance(x, NoLoCoState))


def replica_specs(state: Any, axis_name: str = "replica") -> Any:
    """shard_map specs: P() for count and key of a NoLoCoState, else P(axis_name).

    Args:
        state: a NoLoCoState, or any tree that may hold some.
        axis_name: of the replicas.
    """
    return map_replicas(
        lambda _: PartitionSpec(axis_name), lambda _: PartitionSpec(), state
    )


def replica_axes(state: Any) -> Any:
    """Axes for vmap: None for count and key of a NoLoCoState, else 0."""
    return map_replicas(lambda _: 0, lambda _: None, state)


def replicate(state: Any, axis_size: int) -> Any:
    """Copies of one replica's tree along a new leading axis."""
    return map_replicas(
        lambda x: jnp.broadcast_to(x, (axis_size, *jnp.shape(x))), lambda x: x, state
    )


def resize(state: Any, axis_size: int) -> Any:
    """The state on another number of replicas.

    Fewer: the first ones go on as they are. More: the new ones are whole copies
    (fast and slow weights, momentum, inner state) of the first, second, and so on.

    Args:
        state: parameters, NoLoCoState or both, with leading axes [replicas, ...].
        axis_size: replicas wanted. Make `noloco` anew with this number.
    """
    return map_replicas(
        lambda x: jnp.take(x, jnp.arange(axis_size) % x.shape[0], axis=0),
        lambda x: x,
        state,
    )


def mean_params(params: Any) -> Any:
    """Mean over the replicas, the model to evaluate and export."""
    return jax.tree.map(
        lambda x: jnp.mean(x.astype(jnp.float32), axis=0).astype(x.dtype), params
    )
