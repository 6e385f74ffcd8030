"""The rings of the collective matmuls, and their derivatives.

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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

UNROLLED = 16
"""Rings of more devices are a loop in the program."""


class Ring(NamedTuple):
    """The static arguments of a collective matmul."""

    axis_name: str
    size: int
    dim: int
    lanes: int
    both_ways: bool
    precision: Any
    accumulate: Any

    def direction(self, lane: int) -> int:
        """1 or -1: which way round a lane turns."""
        return -1 if self.both_ways and lane % 2 else 1

    def receive(self, x: jax.Array, shift: int) -> jax.Array:
        """What device i + shift has, on device i."""
        pairs = [((i + shift) % self.size, i) for i in range(self.size)]
        return lax.ppermute(x, self.axis_name, pairs)

    def peer(self, shift: Any) -> jax.Array:
        """Number of the device that many places on."""
        return (lax.axis_index(self.axis_name) + shift) % self.size

    def dot(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[..., k] times [k, n]."""
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
        """The array of all blocks with this part in its place."""
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


def _gather_multiply(ring: Ring, x, ws, visit, results):
    """Passes the blocks of x round; `visit(results, products, block, device, lane)`."""

    def multiply(s, lanes, ws, results):
        for lane, block in enumerate(lanes):
            device = ring.peer(ring.direction(lane) * s)
            products = tuple(ring.dot(block, w) for w in ws)
            results = visit(results, products, block, device, lane)
        return results

    def step(s, state):
        lanes, ws, results = state
        coming = [ring.receive(b, ring.direction(i)) for i, b in enumerate(lanes)]
        results = multiply(s, lanes, ws, results)
        return lax.optimization_barrier((coming, ws, results))

    lanes = jnp.split(x, ring.lanes, axis=ring.dim)
    lanes, ws, results = _steps(0, ring.size - 1, step, (lanes, ws, results))
    return multiply(ring.size - 1, lanes, ws, results)


def _multiply_scatter(ring: Ring, wholes, ws, plus=None, beside=None):
    """This device's rows of the sum over devices of the wholes @ ws + plus.

    `beside` = (block, buffer): an array to gather on the way; its buffer is returned.
    """
    each = range(ring.lanes)

    def products(s, ws):
        parts = []
        for lane in each:
            device = ring.peer(-ring.direction(lane) * (s + 1))
            part = total(
                ring.dot(ring.block(whole, device, lane), w)
                for whole, w in zip(wholes, ws, strict=True)
            )
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
        sums, ws, lanes, buffer = state
        arrived = [ring.receive(sums[i], -ring.direction(i)) for i in each]
        lanes = [ring.receive(b, ring.direction(i)) for i, b in enumerate(lanes)]
        parts = products(s, ws)
        arrived, parts, lanes, ws = lax.optimization_barrier(
            (arrived, parts, lanes, ws)
        )
        sums = [a + p for a, p in zip(arrived, parts, strict=True)]
        return sums, ws, lanes, put(s, lanes, buffer)

    lanes, buffer = [], None
    if beside is not None:
        lanes = jnp.split(beside[0], ring.lanes, axis=ring.dim)
        buffer = put(0, lanes, beside[1])
    state = (products(0, ws), ws, lanes, buffer)
    sums, _, _, buffer = _steps(1, ring.size, step, state)
    return jnp.concatenate(sums, axis=ring.dim), buffer


def tracked(axis_name: str) -> bool:
    """Whether shard_map tracks what varies over the axis (`check_vma`)."""
    varying = jax.typeof(lax.axis_index(axis_name)).manual_axis_type.varying
    return axis_name in varying


def whole_cotangent(dy: jax.Array, axis_name: str) -> jax.Array:
    """The cotangent of a sum over the axis: without check_vma JAX passes one share."""
    return dy if tracked(axis_name) else lax.psum(dy, axis_name)


def total(arrays: Iterable[jax.Array]) -> jax.Array:
    """The sum of arrays of one shape."""
    return functools.reduce(jnp.add, arrays)


def _transposed(ws):
    return tuple(w.T for w in ws)


def _like(arrays, models):
    return tuple(a.astype(m.dtype) for a, m in zip(arrays, models, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def gather_ring(ring: Ring, epilogue, keep: bool, x, ws, constants):
    """The products and, if it is to be kept, the gathered x, else None."""
    results = _gather(ring, epilogue, keep, False, x, ws, constants)
    return results["y"], results.get("x")


def _gather(ring: Ring, epilogue, keep: bool, save: bool, x, ws, constants):
    """The products `y`; `x` gathered, to `keep`; `before` the epilogue, to `save`."""
    rows = x.shape[ring.dim] * ring.size

    def make(like):
        return ring.empty(x, rows=rows, width=like.shape[-1], dtype=like.dtype)

    products = tuple(jax.eval_shape(ring.dot, x, w) for w in ws)
    # Only what is wanted: the barriers keep alive whatever they are given.
    results: dict[str, Any] = {"x": make(x)} if keep else {}
    if epilogue is None:
        results["y"] = tuple(map(make, products))
    else:
        after = jax.eval_shape(epilogue, *products, *constants)
        results["y"] = jax.tree.map(make, after)
        if save:
            results["before"] = tuple(map(make, products))

    def visit(results, products, block, device, lane):
        found = {"x": block, "before": products, "y": products}
        if epilogue is not None:
            found["y"] = epilogue(*products, *constants)
        found = {name: found[name] for name in results}
        return jax.tree.map(lambda v, b: ring.put(v, b, device, lane), results, found)

    return _gather_multiply(ring, x, ws, visit, results)


def _gather_ring_forward(ring: Ring, epilogue, keep: bool, x, ws, constants):
    results = _gather(ring, epilogue, keep, True, x, ws, constants)
    saved = (x, ws, constants, results.get("before"))
    return (results["y"], results.get("x")), saved


def _gather_ring_backward(ring: Ring, epilogue, keep: bool, saved, cotangents):
    """A reduce-scatter ring for dx; x goes round again beside it, for dw."""
    x, ws, constants, before = saved
    dys, dgathered = cotangents
    dconstants = constants
    if epilogue is not None:
        _, pull = jax.vjp(epilogue, *before, *constants)
        found = pull(dys)
        dys, dconstants = found[: len(ws)], found[len(ws) :]
    buffer = ring.empty(
        x, rows=x.shape[ring.dim] * ring.size, width=x.shape[-1], dtype=x.dtype
    )
    dgathered = dgathered if keep else None
    beside = (x, buffer)
    dx, gathered = _multiply_scatter(ring, dys, _transposed(ws), dgathered, beside)
    dws = _like([ring.dot_rows(gathered, dy) for dy in dys], ws)
    return dx.astype(x.dtype), dws, tuple(dconstants)


gather_ring.defvjp(_gather_ring_forward, _gather_ring_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scatter_ring(ring: Ring, xs, ws):
    """This device's rows of the sum over devices and pairs of x @ w."""
    return _multiply_scatter(ring, xs, ws)[0]


def _scatter_ring_forward(ring: Ring, xs, ws):
    return _multiply_scatter(ring, xs, ws)[0], (xs, ws)


def _scatter_ring_backward(ring: Ring, saved, dy):
    """A gather ring over dy, whose gathered form gives dw in one product."""
    xs, ws = saved
    found = _gather(ring, None, True, False, dy, _transposed(ws), ())
    dws = [ring.dot_rows(x, found["x"]) for x in xs]
    return _like(found["y"], xs), _like(dws, ws)


scatter_ring.defvjp(_scatter_ring_forward, _scatter_ring_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def reduce_ring(ring: Ring, xs, ws):
    """The sum over devices and pairs of x @ w, gathered again."""
    mine, _ = _multiply_scatter(ring, xs, ws)
    return lax.all_gather(
        mine, ring.axis_name, axis=ring.dim, tiled=True, to="invarying"
    )


def _reduce_ring_forward(ring: Ring, xs, ws):
    return reduce_ring(ring, xs, ws), (xs, ws)


def _reduce_ring_backward(ring: Ring, saved, dy):
    """No communication: every device has all of dy."""
    xs, ws = saved
    dy = whole_cotangent(dy, ring.axis_name)
    dxs = [ring.dot(dy, w.T) for w in ws]
    return _like(dxs, xs), _like([ring.dot_rows(x, dy) for x in xs], ws)


reduce_ring.defvjp(_reduce_ring_forward, _reduce_ring_backward)
