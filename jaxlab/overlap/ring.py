"""The rings of the collective matmuls, and their derivatives.

A gather has a lane for each direction: with direction +1 a block travels from device i
to i - 1, so at step s device i multiplies the block of device i + s. If
`bidirectional`, rows are cut into two lanes, which turn opposite ways round, so that
both directions of a link carry something. The reduce-scatter is its mirror: at step s
device i adds to the sum that is on its way to device i - s - 1. It has `chunks` lanes
for each direction. If that is even, they are two groups half a step apart: while the
sums of one group travel, the products of the other add what has arrived, and no
addition is a pass of its own. Otherwise product and addition are kept apart, since a
product that adds what arrives has to wait for it, and nothing overlaps.

A barrier closes each step. Without it XLA on GPU merges the products of all steps,
which share the weights, into one after the last permute.

The derivatives are rings again, see `_Weights` for those of the weights.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

UNROLLED = 16
"""Rings of more devices are a loop in the program."""

SUMS = 32 * 2**20
"""Derivatives of weights of fewer bytes in float32 are summed block by block: XLA on
TPU makes those additions part of the products."""


class Ring(NamedTuple):
    """The static arguments of a collective matmul."""

    axis_name: str
    size: int
    dim: int
    lanes: int
    both_ways: bool
    precision: Any
    accumulate: Any

    @property
    def ways(self) -> int:
        """Directions that blocks travel in."""
        return 2 if self.both_ways else 1

    @property
    def phases(self) -> int:
        """2 where the lanes of a scatter are two groups, half a step apart."""
        return 1 if self.lanes // self.ways % 2 else 2

    def direction(self, lane: int) -> int:
        """1 or -1: which way round a lane turns."""
        return -1 if self.both_ways and lane % 2 else 1

    def receive(self, x: jax.Array, shift: int) -> jax.Array:
        """What device i + shift has, on device i."""
        pairs = [((i + shift) % self.size, i) for i in range(self.size)]
        return lax.ppermute(x, self.axis_name, pairs)

    def pass_on(self, blocks: list[jax.Array], sign: int) -> list[jax.Array]:
        """What arrives where every device sends a block for each of some lanes."""
        turns = (sign * self.direction(i) for i in range(len(blocks)))
        return [self.receive(b, turn) for b, turn in zip(blocks, turns, strict=True)]

    def peer(self, shift: Any) -> jax.Array:
        """Number of the device that many places on."""
        return (lax.axis_index(self.axis_name) + shift) % self.size

    def dot(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """[..., k] times [k, n]."""
        return jnp.matmul(
            x, w, precision=self.precision, preferred_element_type=self.accumulate
        )

    def blocks(self, x: jax.Array, ws: Iterable[jax.Array]) -> tuple[Any, ...]:
        """Shapes of the products of one lane's block of x, this device's."""

        def product(x, w):
            rows = x.shape[self.dim] // self.ways
            return self.dot(lax.slice_in_dim(x, 0, rows, axis=self.dim), w)

        return tuple(jax.eval_shape(product, x, w) for w in ws)

    def dot_rows(self, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
        """x^T y over all rows: the derivative of the weights."""
        rows = tuple(range(x.ndim - 1))
        return lax.dot_general(
            x,
            y,
            ((rows, rows), ((), ())),
            precision=self.precision,
            preferred_element_type=dtype or self.accumulate,
        )

    def block(self, whole: jax.Array, device: Any, lane: Any, lanes: int) -> jax.Array:
        """Rows of one of the lanes of a device's block, in an array of all blocks."""
        rows = whole.shape[self.dim] // self.size // lanes
        start = (device * lanes + lane) * rows
        return lax.dynamic_slice_in_dim(whole, start, rows, self.dim)

    def put(self, whole: jax.Array, part: jax.Array, device: Any, lane: Any):
        """The array of all blocks with this part in its place."""
        rows = part.shape[self.dim]
        start = device * (whole.shape[self.dim] // self.size) + lane * rows
        part = part.astype(whole.dtype)
        return lax.dynamic_update_slice_in_dim(whole, part, start, self.dim)

    def empty(self, like: jax.Array, times: int, width: int, dtype: Any) -> jax.Array:
        """Room for so many blocks, to be written over; varying where a block does."""
        shape = list(like.shape)
        shape[self.dim], shape[-1] = times * like.shape[self.dim], width
        vary = jax.typeof(like).manual_axis_type.varying
        room = lax.empty(tuple(shape), dtype)
        inside = self.axis_name in jax.sharding.get_abstract_mesh().manual_axes
        return lax.pcast(room, tuple(vary), to="varying") if vary and inside else room


def _steps(size: int, step: Callable[..., Any], state: Any) -> Any:
    """All steps of a ring; those between the first and the last may be a loop."""
    state = step(0, state)
    if size <= UNROLLED:
        for s in range(1, size - 1):
            state = step(s, state)
    else:
        state = lax.fori_loop(1, size - 1, step, state)
    return step(size - 1, state, last=True)


def _gather_multiply(ring: Ring, x, ws, visit, results):
    """Passes the blocks of x round; `visit(results, products, block, device, lane)`."""

    def step(s, state, last=False):
        lanes, ws, results = state
        coming = [] if last else ring.pass_on(lanes, 1)
        for lane, block in enumerate(lanes):
            products = tuple(ring.dot(block, w) for w in ws)
            device = ring.peer(ring.direction(lane) * s)
            results = visit(results, products, block, device, lane)
        if last:
            return results
        return lax.optimization_barrier((coming, ws, results))

    lanes = jnp.split(x, ring.ways, axis=ring.dim)
    return _steps(ring.size, step, (lanes, ws, results))


def _multiply_scatter(ring: Ring, wholes, ws, plus=None, beside=(None, None, None)):
    """This device's rows of the sum over devices of the wholes @ ws + plus.

    `beside` is (x, visit, results): blocks of x pass on the way, each is shown to
    `visit(results, block, device, lane)`, and the last results are returned as well.
    """
    x, visit, results = beside
    apart = ring.phases == 2

    def products(s, phase, ws):
        each = ring.lanes // ring.phases
        parts = []
        for i in range(each):
            place = ring.peer(-ring.direction(i) * (s + 1)), phase * each + i
            part = total(
                ring.dot(ring.block(whole, *place, ring.lanes), w)
                for whole, w in zip(wholes, ws, strict=True)
            )
            if plus is not None:
                part += ring.block(plus, *place, ring.lanes).astype(part.dtype)
            parts.append(part)
        return parts

    def add(parts, arrived):
        # XLA on TPU makes the addition part of the product in this order alone.
        return [p + a for p, a in zip(parts, arrived, strict=True)]

    def keep(sums, done=None, phase=0):
        # In place, unlike jnp.concatenate, and where a barrier holds it.
        if ring.lanes == 1:
            return sums[0]
        if done is None:
            done = ring.empty(sums[0], ring.lanes, sums[0].shape[-1], sums[0].dtype)
        for lane, rows in enumerate(sums, phase * len(sums)):
            done = ring.put(done, rows, 0, lane)
        return done

    def step(s, state, last=False):
        sums, arrived, ws, lanes, results = state
        coming = [] if last else ring.pass_on(lanes, 1)
        done = None
        for phase in range(ring.phases):
            sent = ring.pass_on([] if last and phase else sums, -1)
            sums = products(s, phase, ws)
            if apart and arrived:
                sums = add(sums, arrived)
            if phase == 0:
                for lane, block in enumerate(lanes):
                    device = ring.peer(ring.direction(lane) * s)
                    results = visit(results, block, device, lane)
            if last and apart:  # these sums stay here
                done = keep(sums, done, phase)
                arrived, done, ws = lax.optimization_barrier((sent, done, ws))
                continue
            arrived, sums, ws = lax.optimization_barrier((sent, sums, ws))
            if not apart:
                sums, arrived = add(sums, arrived) if arrived else sums, []
        if last:
            return done if apart else keep(sums), results
        # A barrier of its own: XLA on GPU hides more of what passes beside.
        coming, ws, results = lax.optimization_barrier((coming, ws, results))
        return sums, arrived, ws, coming, results

    lanes = [] if x is None else jnp.split(x, ring.ways, axis=ring.dim)
    return _steps(ring.size, step, ([], [], ws, lanes, results))


def tracked(axis_name: str) -> bool:
    """Whether shard_map tracks what varies over the axis (`check_vma`)."""
    varying = jax.typeof(lax.axis_index(axis_name)).manual_axis_type.varying
    return axis_name in varying


def varying(arrays: Iterable[jax.Array], axis_name: str) -> tuple[jax.Array, ...]:
    """Arrays as each device's own, so that their derivatives are summed over all."""

    def own(x):
        known = axis_name in jax.typeof(x).manual_axis_type.varying
        return x if known else lax.pcast(x, axis_name, to="varying")

    return tuple(map(own, arrays) if tracked(axis_name) else arrays)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def gather_ring(ring: Ring, epilogue, keep: bool, save: bool, x, ws, constants):
    """The products and, if it is to be kept, the gathered x, else None.

    `save`: the derivative finds the gathered x, instead of gathering it again.
    """
    del save
    results = _gather(ring, epilogue, keep, False, x, ws, constants)
    return results["y"], results.get("x")


def _gather(ring: Ring, epilogue, keep: bool, before: bool, x, ws, constants):
    """The products `y`; `x` gathered, to `keep`; if wanted, `before` the epilogue."""

    def make(like):
        return ring.empty(x, ring.size, like.shape[-1], like.dtype)

    products = ring.blocks(x, ws)
    # Only what is wanted: the barriers keep alive whatever they are given.
    results: dict[str, Any] = {"x": make(x)} if keep else {}
    if epilogue is None:
        results["y"] = tuple(map(make, products))
    else:
        after = jax.eval_shape(epilogue, *products, *constants)
        results["y"] = jax.tree.map(make, after)
        if before:
            results["before"] = tuple(map(make, products))

    def visit(results, products, block, device, lane):
        found = {"x": block, "before": products, "y": products}
        if epilogue is not None:
            found["y"] = epilogue(*products, *constants)
        found = {name: found[name] for name in results}
        return jax.tree.map(lambda v, b: ring.put(v, b, device, lane), results, found)

    return _gather_multiply(ring, x, ws, visit, results)


def _by_block(ring: Ring, epilogue, products: int):
    """An epilogue of all rows: it may have been traced for those of a block."""
    dim, count = ring.dim, ring.size * ring.ways

    def whole(*arrays):
        def cut(a):
            rows = a.shape[dim] // count
            return a.reshape((*a.shape[:dim], count, rows, *a.shape[dim + 1 :]))

        blocks = map(cut, arrays[:products])
        places = [dim] * products + [None] * (len(arrays) - products)
        each = jax.vmap(epilogue, tuple(places), dim)
        found = each(*blocks, *arrays[products:])
        return jax.tree.map(lambda y: lax.collapse(y, dim, dim + 2), found)

    return whole


class _Weights(NamedTuple):
    """Derivatives of weights of which one factor comes in blocks, round the ring.

    They are sums over the blocks where those are small enough for a chip's fast memory,
    and else one product of the gathered blocks.
    """

    ring: Ring
    whole: tuple[jax.Array, ...]
    """the other factors, all rows of them"""
    block: jax.Array
    """this device's"""
    left: bool
    """the blocks are the left factor"""

    @property
    def _summed(self) -> bool:
        size = sum(a.shape[-1] for a in self.whole) * self.block.shape[-1] * 4
        return size < SUMS

    def start(self):
        """Results of no block."""
        if self._summed:
            return None
        ring, block = self.ring, self.block
        return ring.empty(block, ring.size, block.shape[-1], block.dtype)

    def visit(self, found, block, device, lane):
        """Results of one block more."""
        if not self._summed:
            return self.ring.put(found, block, device, lane)
        ring, dtype = self.ring, jnp.promote_types(block.dtype, jnp.float32)
        rows = [ring.block(a, device, lane, ring.ways) for a in self.whole]
        pairs = [(block, r) if self.left else (r, block) for r in rows]
        parts = [ring.dot_rows(x, y, dtype) for x, y in pairs]
        return parts if found is None else list(map(jnp.add, parts, found))

    def finish(self, found):
        """The derivatives, of the results of all blocks."""
        if self._summed:
            return found
        pairs = [(found, a) if self.left else (a, found) for a in self.whole]
        return [self.ring.dot_rows(x, y) for x, y in pairs]


def _gather_ring_forward(
    ring: Ring, epilogue, keep: bool, save: bool, x, ws, constants
):
    results = _gather(ring, epilogue, keep or save, True, x, ws, constants)
    gathered = results.get("x")
    saved = (x, gathered if save else None, ws, constants, results.get("before"))
    return (results["y"], gathered if keep else None), saved


def _gather_ring_backward(ring: Ring, epilogue, keep: bool, save: bool, saved, found):
    """A reduce-scatter ring for dx; unless saved, x goes round again beside it."""
    x, gathered, ws, constants, before = saved
    dys, dgathered = found
    dconstants = constants
    if epilogue is not None:
        _, pull = jax.vjp(_by_block(ring, epilogue, len(ws)), *before, *constants)
        slopes = pull(dys)
        dys, dconstants = slopes[: len(ws)], slopes[len(ws) :]
    plus = dgathered if keep else None
    if save:
        dx, _ = _multiply_scatter(ring, dys, _transposed(ws), plus)
        dws = [ring.dot_rows(gathered, dy) for dy in dys]
    else:
        weights = _Weights(ring, dys, x, True)
        beside = (x, weights.visit, weights.start())
        dx, sums = _multiply_scatter(ring, dys, _transposed(ws), plus, beside)
        dws = weights.finish(sums)
    return dx.astype(x.dtype), _like(dws, ws), tuple(dconstants)


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
    weights = _Weights(ring, xs, dy, False)

    def visit(results, products, block, device, lane):
        dxs, found = results
        dxs = [ring.put(d, p, device, lane) for d, p in zip(dxs, products, strict=True)]
        return dxs, weights.visit(found, block, device, lane)

    dxs = [ring.empty(dy, ring.size, x.shape[-1], x.dtype) for x in xs]
    start = (dxs, weights.start())
    dxs, found = _gather_multiply(ring, dy, _transposed(ws), visit, start)
    return tuple(dxs), _like(weights.finish(found), ws)


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
