"""Collective matmuls: a product and its all-gather or reduce-scatter, in N steps.

Each step multiplies one block while the next one travels along a ring of devices, so
the collective hides behind the product (Wang et al., ASPLOS 2023; T3, arXiv
2401.16677, does it in hardware). All functions run inside `jax.shard_map`.

A lane is a ring: rows are cut into `chunks` lanes, twice as many if `bidirectional`,
every other one turning the other way round, so that both directions of a link carry
something. With direction +1 a block travels from device i to i - 1, so at step s
device i multiplies the block of device i + s. The reduce-scatter is its mirror: at step
s device i adds to the sum that is on its way to device i - s - 1.

A barrier closes each step. Without it XLA on GPU merges the products of all steps,
which share the weights, into one after the last permute, and XLA on TPU fuses a
product with the addition of what has just arrived: nothing overlaps in either case.

The derivatives are rings again, with one whole product for the weights: plain
differentiation would cut that one into N accumulations.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

UNROLLED = 16
"""Rings of more devices are a loop in the program."""

Epilogue = Callable[[jax.Array], jax.Array]


class OverlapSkipped(UserWarning):
    """A collective matmul was computed plainly; the message says why."""


class _Ring(NamedTuple):
    """The static arguments of a collective matmul."""

    axis_name: str
    size: int
    dim: int
    lanes: int
    both_ways: bool
    precision: Any
    accumulate: Any

    def direction(self, lane: int) -> int:
        return -1 if self.both_ways and lane % 2 else 1

    def receive(self, x: jax.Array, shift: int) -> jax.Array:
        """What device i + shift has, on device i."""
        pairs = [((i + shift) % self.size, i) for i in range(self.size)]
        return lax.ppermute(x, self.axis_name, pairs)

    def peer(self, shift: Any) -> jax.Array:
        return (lax.axis_index(self.axis_name) + shift) % self.size

    def dot(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.matmul(
            x, w, precision=self.precision, preferred_element_type=self.accumulate
        )

    def dot_rows(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """x^T y over all rows: the derivative of the weights, in one product."""
        rows = tuple(range(x.ndim - 1))
        return lax.dot_general(
            x,
            y,
            ((rows, rows), ((), ())),
            precision=self.precision,
            preferred_element_type=self.accumulate,
        )

    def block(self, whole: jax.Array, device: Any, lane: int) -> jax.Array:
        """Rows of a lane of a device's block, in an array of all blocks."""
        rows = whole.shape[self.dim] // self.size // self.lanes
        start = (device * self.lanes + lane) * rows
        return lax.dynamic_slice_in_dim(whole, start, rows, self.dim)

    def put(self, whole: jax.Array, part: jax.Array, device: Any, lane: int):
        start = (device * self.lanes + lane) * part.shape[self.dim]
        part = part.astype(whole.dtype)
        return lax.dynamic_update_slice_in_dim(whole, part, start, self.dim)

    def empty(self, like: jax.Array, *, width: int, rows: int, dtype: Any):
        """Zeros like a block but for rows and width; varying where it does."""
        shape = list(like.shape)
        shape[self.dim], shape[-1] = rows, width
        vary = jax.typeof(like).manual_axis_type.varying
        zeros = jnp.zeros(shape, dtype)
        inside = self.axis_name in jax.sharding.get_abstract_mesh().manual_axes
        return lax.pcast(zeros, tuple(vary), to="varying") if vary and inside else zeros


def _steps(first: int, last: int, step: Callable[[Any, Any], Any], state: Any) -> Any:
    """Steps first .. last - 1 of a ring, written out where they are few."""
    if last - first < UNROLLED:
        for s in range(first, last):
            state = step(s, state)
        return state
    return lax.fori_loop(first, last, step, state)


# ------------------------------------------------------------ gather and multiply


def _gather_multiply(ring: _Ring, x, w, visit, results):
    """Passes the blocks of x round; `visit(results, product, block, device, lane)`."""

    def multiply(s, lanes, w, results):
        for lane, block in enumerate(lanes):
            device = ring.peer(ring.direction(lane) * s)
            results = visit(results, ring.dot(block, w), block, device, lane)
        return results

    def step(s, state):
        lanes, w, results = state
        coming = [ring.receive(b, ring.direction(i)) for i, b in enumerate(lanes)]
        results = multiply(s, lanes, w, results)
        return lax.optimization_barrier((coming, w, results))

    lanes = jnp.split(x, ring.lanes, axis=ring.dim)
    lanes, w, results = _steps(0, ring.size - 1, step, (lanes, w, results))
    return multiply(ring.size - 1, lanes, w, results)


def _multiply_scatter(ring: _Ring, whole, w, plus=None, beside=None):
    """This device's rows of the sum over devices of whole @ w + plus.

    `beside` = (block, buffer): an array to gather on the way; its buffer is returned.
    """
    each = range(ring.lanes)

    def products(s, w):
        parts = []
        for lane in each:
            device = ring.peer(-ring.direction(lane) * (s + 1))
            part = ring.dot(ring.block(whole, device, lane), w)
            if plus is not None:
                part += ring.block(plus, device, lane).astype(part.dtype)
            parts.append(part)
        return parts

    def put(s, lanes, buffer):
        for lane, block in enumerate(lanes):
            device = ring.peer(ring.direction(lane) * s)
            buffer = ring.put(buffer, block, device, lane)
        return buffer

    def step(s, state):
        sums, w, lanes, buffer = state
        arrived = [ring.receive(sums[i], -ring.direction(i)) for i in each]
        lanes = [ring.receive(b, ring.direction(i)) for i, b in enumerate(lanes)]
        parts = products(s, w)
        arrived, parts, lanes, w = lax.optimization_barrier((arrived, parts, lanes, w))
        sums = [a + p for a, p in zip(arrived, parts, strict=True)]
        return sums, w, lanes, put(s, lanes, buffer)

    lanes, buffer = [], None
    if beside is not None:
        lanes = jnp.split(beside[0], ring.lanes, axis=ring.dim)
        buffer = put(0, lanes, beside[1])
    state = (products(0, w), w, lanes, buffer)
    sums, _, _, buffer = _steps(1, ring.size, step, state)
    return jnp.concatenate(sums, axis=ring.dim), buffer


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _all_gather_matmul(ring: _Ring, epilogue, keep: bool, x, w, constants):
    """The product and, if it is to be kept, the gathered x, else None."""
    results = _gather_ring(ring, epilogue, keep, False, x, w, constants)
    return results["y"], results.get("x")


def _gather_ring(ring: _Ring, epilogue, keep: bool, save: bool, x, w, constants):
    """The product `y`; `x` gathered, to `keep`; `before` the epilogue, to `save`."""
    make = functools.partial(ring.empty, x, rows=x.shape[ring.dim] * ring.size)
    product = jax.eval_shape(ring.dot, x, w)
    # Only what is wanted: the barriers keep alive whatever they are given.
    results = {"x": make(width=x.shape[-1], dtype=x.dtype)} if keep else {}
    if epilogue is None:
        results["y"] = make(width=w.shape[-1], dtype=product.dtype)
    else:
        after = jax.eval_shape(epilogue, product, *constants)
        results["y"] = make(width=w.shape[-1], dtype=after.dtype)
        if save:
            results["before"] = make(width=w.shape[-1], dtype=product.dtype)

    def visit(results, product, block, device, lane):
        found = {"x": block, "before": product, "y": product}
        if epilogue is not None:
            found["y"] = epilogue(product, *constants)
        return {k: ring.put(v, found[k], device, lane) for k, v in results.items()}

    return _gather_multiply(ring, x, w, visit, results)


def _all_gather_matmul_forward(ring: _Ring, epilogue, keep: bool, x, w, constants):
    results = _gather_ring(ring, epilogue, keep, True, x, w, constants)
    saved = (x, w, constants, results.get("before"))
    return (results["y"], results.get("x")), saved


def _all_gather_matmul_backward(ring: _Ring, epilogue, keep: bool, saved, cotangents):
    """A reduce-scatter ring for dx; x goes round again beside it, for dw."""
    x, w, constants, before = saved
    dy, dgathered = cotangents
    dconstants = constants
    if epilogue is not None:
        _, pull = jax.vjp(epilogue, before, *constants)
        dy, *dconstants = pull(dy)
    buffer = ring.empty(
        x, rows=x.shape[ring.dim] * ring.size, width=x.shape[-1], dtype=x.dtype
    )
    dgathered = dgathered if keep else None
    dx, gathered = _multiply_scatter(ring, dy, w.T, dgathered, (x, buffer))
    dw = ring.dot_rows(gathered, dy)
    return dx.astype(x.dtype), dw.astype(w.dtype), tuple(dconstants)


_all_gather_matmul.defvjp(_all_gather_matmul_forward, _all_gather_matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_reduce_scatter(ring: _Ring, x, w):
    return _multiply_scatter(ring, x, w)[0]


def _matmul_reduce_scatter_forward(ring: _Ring, x, w):
    return _multiply_scatter(ring, x, w)[0], (x, w)


def _matmul_reduce_scatter_backward(ring: _Ring, saved, dy):
    """A gather ring over dy, whose gathered form gives dw in one product."""
    x, w = saved
    found = _gather_ring(ring, None, True, False, dy, w.T, ())
    dx, dw = found["y"], ring.dot_rows(x, found["x"])
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul_reduce_scatter.defvjp(
    _matmul_reduce_scatter_forward, _matmul_reduce_scatter_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul_all_reduce(ring: _Ring, x, w):
    mine, _ = _multiply_scatter(ring, x, w)
    return lax.all_gather(
        mine, ring.axis_name, axis=ring.dim, tiled=True, to="invarying"
    )


def _matmul_all_reduce_forward(ring: _Ring, x, w):
    return _matmul_all_reduce(ring, x, w), (x, w)


def _matmul_all_reduce_backward(ring: _Ring, saved, dy):
    """No communication: every device has all of dy."""
    x, w = saved
    dx, dw = ring.dot(dy, w.T), ring.dot_rows(x, dy)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_matmul_all_reduce.defvjp(_matmul_all_reduce_forward, _matmul_all_reduce_backward)


# -------------------------------------------------------------- what users call


def all_gather_matmul(
    x: jax.Array,
    w: jax.Array,
    axis_name: str,
    *,
    dim: int = 0,
    chunks: int = 1,
    bidirectional: bool = False,
    epilogue: Epilogue | None = None,
    precision: Any = None,
    preferred_element_type: Any = None,
    return_gathered: bool = False,
) -> Any:
    """`epilogue(all_gather(x, axis_name, axis=dim, tiled=True) @ w)`, overlapped.

    Args:
        x: [..., k], cut along `dim`.
        w: [k, n], this device's columns of the weights.
        axis_name: mesh axis of the ring.
        dim: dimension to gather; not the last.
        chunks: lanes; more hide more of the first and last step, in smaller products.
        bidirectional: twice as many lanes, every other one the other way round.
        epilogue: elementwise, applied to each block as it is made, e.g. `jax.nn.gelu`;
            it may close over arrays that broadcast against a block.
        precision: of the products, as of `jnp.matmul`.
        preferred_element_type: of products and result.
        return_gathered: also the gathered x, which the ring has at hand.

    Returns:
        [..., n], varying over the axis; with `return_gathered` (that, gathered x).

    Raises:
        ValueError: shapes that do not fit, or `dim` is the last dimension.
    """
    ring = _ring(
        x, w, axis_name, dim, chunks, bidirectional, precision, preferred_element_type
    )
    reason = _indivisible("rows of x", x.shape[ring.dim], ring.lanes, "lanes")
    if ring.size == 1 or reason:
        _report("all_gather_matmul", reason)
        gathered = lax.all_gather(x, axis_name, axis=ring.dim, tiled=True)
        y = ring.dot(gathered, w)
        y = y if epilogue is None else epilogue(y)
    else:
        constants: tuple[Any, ...] = ()
        if epilogue is not None:
            block = jax.eval_shape(ring.dot, x, w)
            epilogue, hoisted = jax.closure_convert(epilogue, block)
            constants = tuple(hoisted)
        both: Any = _all_gather_matmul(ring, epilogue, return_gathered, x, w, constants)
        y, gathered = both
    return (y, gathered) if return_gathered else y


def matmul_reduce_scatter(
    x: jax.Array,
    w: jax.Array,
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
        x: [..., k], this device's columns.
        w: [k, n], this device's rows of the weights.
        axis_name: mesh axis of the ring.
        dim: dimension to scatter; not the last.
        chunks: lanes, see `all_gather_matmul`.
        bidirectional: see `all_gather_matmul`.
        epilogue: elementwise, applied to the device's rows of the sum.
        precision: of the products.
        preferred_element_type: of products, sums and result; float32 for bfloat16
            inputs sums in float32, and sends twice the bytes.

    Returns:
        [..., n] with `dim` divided by the axis, varying over it.

    Raises:
        ValueError: see `all_gather_matmul`.
    """
    ring = _ring(
        x, w, axis_name, dim, chunks, bidirectional, precision, preferred_element_type
    )
    rows = x.shape[ring.dim]
    if rows % ring.size:
        raise ValueError(
            f"{rows} rows of x (dimension {ring.dim}) do not divide among "
            f"{ring.size} devices of {axis_name!r}"
        )
    reason = _indivisible("rows of a block", rows // ring.size, ring.lanes, "lanes")
    if ring.size == 1 or reason:
        _report("matmul_reduce_scatter", reason)
        y = ring.dot(x, w)
        y = lax.psum_scatter(y, axis_name, scatter_dimension=ring.dim, tiled=True)
    else:
        y: Any = _matmul_reduce_scatter(ring, x, w)
    return y if epilogue is None else epilogue(y)


def matmul_all_reduce(
    x: jax.Array,
    w: jax.Array,
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
        x: [..., k], this device's columns.
        w: [k, n], this device's rows of the weights.
        axis_name: mesh axis of the ring.
        dim: dimension that the ring's blocks are cut along; not the last.
        chunks: lanes, see `all_gather_matmul`.
        bidirectional: see `all_gather_matmul`.
        epilogue: elementwise, applied to the sum.
        precision: of the products.
        preferred_element_type: of products, sums and result.

    Returns:
        [..., n], the same on all devices.

    Raises:
        ValueError: see `all_gather_matmul`.
    """
    ring = _ring(
        x, w, axis_name, dim, chunks, bidirectional, precision, preferred_element_type
    )
    blocks = ring.size * ring.lanes
    reason = _indivisible("rows of x", x.shape[ring.dim], blocks, "devices x lanes")
    if ring.size == 1 or reason:
        _report("matmul_all_reduce", reason)
        y = lax.psum(ring.dot(x, w), axis_name)
    else:
        y: Any = _matmul_all_reduce(ring, x, w)
    return y if epilogue is None else epilogue(y)


def _ring(x, w, axis_name, dim, chunks, bidirectional, precision, accumulate) -> _Ring:
    """The ring that the arguments describe, once they have been checked."""
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"there is no axis {axis_name!r} here: collective matmuls run inside "
            "jax.shard_map"
        ) from None
    if w.ndim != 2 or x.ndim < 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x {x.shape} and w {w.shape} are no [..., k] and [k, n]")
    if not -x.ndim <= dim < x.ndim or dim % x.ndim == x.ndim - 1:
        raise ValueError(
            f"dim is {dim}; x has dimensions 0 to {x.ndim - 1}, and the last one is "
            "summed over"
        )
    if chunks < 1:
        raise ValueError(f"chunks is {chunks}; it must be at least 1")
    lanes = chunks * (2 if bidirectional else 1)
    return _Ring(
        axis_name, size, dim % x.ndim, lanes, bidirectional, precision, accumulate
    )


def _indivisible(what: str, number: int, by: int, of: str) -> str:
    return f"{number} {what} do not divide into {by} {of}" if number % by else ""


def _report(name: str, reason: str) -> None:
    if reason:
        warnings.warn(f"{name} not overlapped: {reason}", OverlapSkipped, stacklevel=3)
