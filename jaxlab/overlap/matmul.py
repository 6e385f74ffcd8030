"""Collective matmuls: a product and its all-gather or reduce-scatter, in N steps.

Each step multiplies one block while the next one travels along a ring of devices, so
the collective hides behind the product (Wang et al., ASPLOS 2023; T3, arXiv
2401.16677, does it in hardware). All functions run inside `jax.shard_map`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from jaxlab.overlap.ring import (
    Ring,
    gather_ring,
    reduce_ring,
    scatter_ring,
    total,
    varying,
)

Epilogue = Callable[..., Any]
Arrays = jax.Array | Sequence[jax.Array]


class OverlapSkipped(UserWarning):
    """A collective matmul was computed plainly; the message says why."""


def all_gather_matmul(
    x: jax.Array,
    w: Arrays,
    axis_name: str,
    *,
    dim: int = 0,
    chunks: int = 1,
    bidirectional: bool = False,
    epilogue: Epilogue | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    return_gathered: bool = False,
    save_gathered: bool = False,
) -> Any:
    """`epilogue(all_gather(x, axis_name, axis=dim, tiled=True) @ w)`, overlapped.

    Args:
        x: [..., k], cut along `dim`.
        w: [k, n], this device's columns of the weights; or several such, as of query,
            key and value, which share one gather.
        axis_name: mesh axis of the ring.
        dim: dimension to gather; not the last.
        chunks: lanes of the derivative's ring in each direction, see
            `matmul_reduce_scatter`; the forward one has a single lane.
        bidirectional: half of each block goes the other way round.
        epilogue: elementwise, applied to each block as it is made, e.g. `jax.nn.gelu`;
            it takes a product for each w, and may close over arrays that broadcast
            against a block.
        precision: of the products, as of `jnp.matmul`.
        preferred_element_type: of products and result.
        return_gathered: also the gathered x, which the ring has at hand.
        save_gathered: keep the gathered x for the derivative, as autodiff of the plain
            form does: N times the memory of x. Otherwise x alone is kept, and goes
            round again beside the derivative's ring. Worth it where that ring waits
            for the wire, and in `jax.checkpoint` where the products are needed again.

    Returns:
        [..., n], varying over the axis, for several w a tuple; what the epilogue
        returns if there is one; with `return_gathered` (that, gathered x).

    Raises:
        ValueError: shapes that do not fit, or `dim` is the last dimension.
    """
    ws = _several(w)
    ring = _ring(
        (x,) * len(ws),
        ws,
        axis_name,
        dim,
        chunks,
        bidirectional,
        precision,
        preferred_element_type,
    )
    reason = _indivisible("rows of x", x.shape[ring.dim], ring.lanes, "lanes")
    if ring.size == 1 or reason:
        _report("all_gather_matmul", reason)
        gathered = lax.all_gather(x, axis_name, axis=ring.dim, tiled=True)
        y = tuple(ring.dot(gathered, w) for w in ws)
        y = y if epilogue is None else epilogue(*y)
    else:
        constants: tuple[Any, ...] = ()
        if epilogue is not None:
            blocks = ring.blocks(x, ws)
            epilogue, hoisted = jax.closure_convert(epilogue, *blocks)
            constants = varying(hoisted, axis_name)
        (x,), ws = varying((x,), axis_name), varying(ws, axis_name)
        both: Any = gather_ring(
            ring, epilogue, return_gathered, save_gathered, x, ws, constants
        )
        y, gathered = both
    if epilogue is None and not isinstance(w, Sequence):
        (y,) = y
    return (y, gathered) if return_gathered else y


def matmul_reduce_scatter(
    x: Arrays,
    w: Arrays,
    axis_name: str,
    *,
    dim: int = 0,
    chunks: int = 1,
    bidirectional: bool = False,
    epilogue: Epilogue | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`epilogue(psum_scatter(x @ w, axis_name, scatter_dimension=dim, tiled=True))`.

    Overlapped: while one block's sum travels, the next block is multiplied.

    Args:
        x: [..., k], this device's columns; or several, whose products are added.
        w: [k, n], this device's rows of the weights; as many as of x.
        axis_name: mesh axis of the ring.
        dim: dimension to scatter; not the last.
        chunks: lanes in each direction. If even, half of them are half a step behind,
            so that products add what arrives and no addition is a pass of its own: on
            TPU take 2. If odd, products are larger.
        bidirectional: as many lanes again, the other way round.
        epilogue: elementwise, applied to the device's rows of the sum.
        precision: of the products.
        preferred_element_type: of products, sums and result; float32 for bfloat16
            inputs sums in float32, and sends twice the bytes.

    Returns:
        [..., n] with `dim` divided by the axis, varying over it.

    Raises:
        ValueError: see `all_gather_matmul`.
    """
    xs, ws = _several(x), _several(w)
    ring = _ring(
        xs, ws, axis_name, dim, chunks, bidirectional, precision, preferred_element_type
    )
    rows = xs[0].shape[ring.dim]
    if rows % ring.size:
        raise ValueError(
            f"{rows} rows of x (dimension {ring.dim}) do not divide among "
            f"{ring.size} devices of {axis_name!r}"
        )
    reason = _indivisible("rows of a block", rows // ring.size, ring.lanes, "lanes")
    if ring.size == 1 or reason:
        _report("matmul_reduce_scatter", reason)
        y = total(map(ring.dot, xs, ws))
        y = lax.psum_scatter(y, axis_name, scatter_dimension=ring.dim, tiled=True)
    else:
        y: Any = scatter_ring(ring, varying(xs, axis_name), varying(ws, axis_name))
    return y if epilogue is None else epilogue(y)


def matmul_all_reduce(
    x: Arrays,
    w: Arrays,
    axis_name: str,
    *,
    dim: int = 0,
    chunks: int = 1,
    bidirectional: bool = False,
    epilogue: Epilogue | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`epilogue(psum(x @ w, axis_name))`, half of it overlapped.

    The sum is a reduce-scatter beside the product, then an all-gather for which no
    work is left here. Where what follows works row by row, `matmul_reduce_scatter` and
    later `all_gather_matmul` hide both halves.

    Args:
        x: [..., k], this device's columns; or several, whose products are added.
        w: [k, n], this device's rows of the weights; as many as of x.
        axis_name: mesh axis of the ring.
        dim: dimension that the ring's blocks are cut along; not the last.
        chunks: lanes in each direction, see `matmul_reduce_scatter`.
        bidirectional: see `matmul_reduce_scatter`.
        epilogue: elementwise, applied to the sum.
        precision: of the products.
        preferred_element_type: of products, sums and result.

    Returns:
        [..., n], the same on all devices.

    Raises:
        ValueError: see `all_gather_matmul`.
    """
    xs, ws = _several(x), _several(w)
    ring = _ring(
        xs, ws, axis_name, dim, chunks, bidirectional, precision, preferred_element_type
    )
    blocks = ring.size * ring.lanes
    reason = _indivisible("rows of x", xs[0].shape[ring.dim], blocks, "devices x lanes")
    if ring.size == 1 or reason:
        _report("matmul_all_reduce", reason)
        y = lax.psum(total(map(ring.dot, xs, ws)), axis_name)
    else:
        y: Any = reduce_ring(ring, varying(xs, axis_name), varying(ws, axis_name))
    return y if epilogue is None else epilogue(y)


def _several(arrays: Arrays) -> tuple[jax.Array, ...]:
    return tuple(arrays) if isinstance(arrays, Sequence) else (arrays,)


def _ring(xs, ws, axis_name, dim, chunks, both_ways, precision, accumulate) -> Ring:
    """The ring that the arguments describe, once they have been checked."""
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"there is no axis {axis_name!r} here: collective matmuls run inside "
            "jax.shard_map"
        ) from None
    if not xs or len(xs) != len(ws):
        raise ValueError(
            f"{len(xs)} x and {len(ws)} w: give as many of one as the other"
        )
    for x, w in zip(xs, ws, strict=True):
        if w.ndim != 2 or x.ndim < 2 or x.shape[-1] != w.shape[0]:
            raise ValueError(f"x {x.shape} and w {w.shape} are no [..., k] and [k, n]")
    rank = xs[0].ndim
    if not -rank <= dim < rank or dim % rank == rank - 1:
        raise ValueError(
            f"dim is {dim}; x has dimensions 0 to {rank - 1}, and the last one is "
            "summed over"
        )
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}; it must be at least 1")
    lanes = chunks * (2 if both_ways else 1)
    return Ring(axis_name, size, dim % rank, lanes, both_ways, precision, accumulate)


def _indivisible(what: str, number: int, by: int, of: str) -> str:
    return f"{number} {what} do not divide into {by} {of}" if number % by else ""


def _report(name: str, reason: str) -> None:
    if reason:
        warnings.warn(f"{name} not overlapped: {reason}", OverlapSkipped, stacklevel=3)
