"""The mesh handled by hand: explicit collectives in one flat `shard_map`.

The partitioner places collectives where no program transformation can see them. By
hand the model is sequence-parallel along `tensor` (arXiv 2205.05198): a device holds
its part of the heads, the MLP, the vocabulary and, between the sub-layers, of the time,
so that `jaxlab.overlap` can hide the collectives behind the products beside them.

All axes are handled by hand, and not `tensor` alone: beside automatic axes XLA copies
the whole batch to every device for each all-gather and reduce-scatter, and on CPU it
aborts on those of half precision (jax 0.10.2 to 0.12.0.1). Weights that are cut along
`fsdp` are made whole where they are used, and their gradients cut again.

Dims: b rows, t time, d width, v vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxlab.mesh import RULES, partition_spec

TENSOR, FSDP = "tensor", "fsdp"

# ------------------------------------------------------- inside the shard_map


def gather_rows(x_btd: Float[Array, "b _ d"], by_hand: bool) -> Float[Array, "b _ d"]:
    """Makes the time whole that is cut along `tensor`; not by hand: it is whole."""
    return lax.all_gather(x_btd, TENSOR, axis=1, tiled=True) if by_hand else x_btd


def scatter_rows(x_btd: Float[Array, "b _ d"], by_hand: bool) -> Float[Array, "b _ d"]:
    """Sums along `tensor` and cuts the time; not by hand: the sum is done."""
    if not by_hand:
        return x_btd
    return lax.psum_scatter(x_btd, TENSOR, scatter_dimension=1, tiled=True)


def held_shape(shape: tuple[int, ...], names: tuple[str | None, ...]) -> tuple:
    """What a device holds of a weight: dimensions named "embed" are cut by `fsdp`.

    Those cut along `tensor` are in `shape` as they are held.
    """
    size = lax.axis_size(FSDP)
    return tuple(
        n // size if RULES.get(name or "") == FSDP else n
        for n, name in zip(shape, names, strict=True)
    )


def gather_weight(weight: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Makes the dimension whole that is cut along `fsdp`."""
    for dim, name in enumerate(names):
        if RULES.get(name or "") == FSDP and lax.axis_size(FSDP) > 1:
            weight = lax.all_gather(weight, FSDP, axis=dim, tiled=True)
    return weight


def local_index(
    index: Int[Array, "*n"], size: int
) -> tuple[Int[Array, "*n"], Bool[Array, "*n"]]:
    """Where entries of a dimension lie that is cut along `tensor`.

    Args:
        index: number in the whole dimension.
        size: of this device's part.

    Returns:
        the number in this part, in its bounds whatever the index is, and whether the
        entry is here.
    """
    place = index - lax.axis_index(TENSOR) * size
    return jnp.clip(place, 0, size - 1), (place >= 0) & (place < size)


def look_up(
    table_vd: Float[Array, "v d"], tokens_bt: Int[Array, "b t"], by_hand: bool
) -> Float[Array, "b _ d"]:
    """Rows of a table; by hand of one that is cut in v, and then cut in time."""
    if not by_hand:
        return jnp.take(table_vd, tokens_bt, axis=0)
    place_bt, here_bt = local_index(tokens_bt, table_vd.shape[0])
    rows_btd = jnp.take(table_vd, place_bt, axis=0)
    return scatter_rows(jnp.where(here_bt[..., None], rows_btd, 0), True)


def log_partition(logits_btv: Float[Array, "b t v"]) -> Float[Array, "b t"]:
    """The log of the sum of exp over a vocabulary that is cut along `tensor`."""
    # The maximum only keeps exp in range: the result does not depend on it.
    top_bt = lax.pmax(jnp.max(lax.stop_gradient(logits_btv), axis=-1), TENSOR)
    share_bt = jnp.sum(jnp.exp(logits_btv - top_bt[..., None]), axis=-1)
    return jnp.log(lax.psum(share_bt, TENSOR)) + top_bt


def pick(
    logits_btv: Float[Array, "b t v"], targets_bt: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """The targets' logits out of a vocabulary that is cut along `tensor`."""
    place_bt, here_bt = local_index(targets_bt, logits_btv.shape[-1])
    found_btv = jnp.take_along_axis(logits_btv, place_bt[..., None], axis=-1)
    return lax.psum(jnp.where(here_bt, found_btv[..., 0], 0), TENSOR)


def own(params: Any, row_axes: tuple[str, ...]) -> Any:
    """Copies of the weights that are each device's own, as are their gradients.

    Then micro-batches are added up on each device, and only their sum over devices.
    """
    return jax.tree.map(lambda x: lax.pcast(x, row_axes, to="varying"), params)


def add_up(total: Any, row_axes: tuple[str, ...]) -> Any:
    """Sums of `step.mean_gradient` over all rows, of those over each device's.

    Args:
        total: gradient, of which autodiff has summed `fsdp` and `tensor`, and scalars.
        row_axes: mesh axes, beside `fsdp`, that cut the rows.
    """
    gradient, scalars = total
    return lax.psum(gradient, row_axes), lax.psum(scalars, (*row_axes, FSDP))


# ------------------------------------------------------------- the shard_map


def param_specs(names: Any) -> Any:
    """Where weights are cut: a PartitionSpec each.

    Args:
        names: logical dimension names of each weight (`models.gpt.param_names`).
    """
    return jax.tree.map(partition_spec, names, is_leaf=lambda n: isinstance(n, tuple))


def row_axes(replicas_apart: bool) -> tuple[str, ...]:
    """Mesh axes, beside `fsdp`, whose devices have rows of one model."""
    return ("data",) if replicas_apart else ("replica", "data")


def spread(
    function: Callable[[Any, Any], Any],
    params: Any,
    results: Any,
    mesh: Mesh,
    replicas_apart: bool = False,
) -> Callable[[Any, Any], Any]:
    """Makes a function of what a device holds one of the whole weights and batch.

    Args:
        function: (params, batch) to results; handles all axes of the mesh by hand.
        params: PartitionSpecs of the weights (`param_specs`).
        results: those of what it returns, or a prefix tree of them.
        mesh: with the axes of `jaxlab.mesh`.
        replicas_apart: params and results lead with the axis `replica`.

    Returns:
        (params, batch) to results, with a batch of arrays [microbatch, row, time].
    """

    def lead(specs):
        if not replicas_apart:
            return specs
        return jax.tree.map(
            lambda s: PartitionSpec("replica", *s),
            specs,
            is_leaf=lambda s: isinstance(s, PartitionSpec),
        )

    def one(params, batch):
        if not replicas_apart:
            return function(params, batch)
        results = function(jax.tree.map(lambda x: x[0], params), batch)
        return jax.tree.map(lambda x: x[None], results)

    return jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(lead(params), partition_spec((None, "batch"))),
        out_specs=lead(results),
    )
