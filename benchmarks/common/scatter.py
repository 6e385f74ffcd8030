"""Forms of a matmul and reduce-scatter between two processes: see overlap_links.py.

Each process has columns of x and rows of w. Of its product it sends the half that is
the other's, in pieces, and adds what arrives to its own half.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback

from common.engine import Engine
from jaxlab.overlap import matmul_reduce_scatter

AXIS, PROCESSES, SEED = "t", 2, 0


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the processes compute, and over what link."""

    rows: int
    columns: int
    depth: int
    compute: float
    rate: int

    def message(self) -> int:
        """Bytes that a process must send."""
        return self.rows // PROCESSES * self.columns * 4

    def limit(self) -> float:
        """Seconds that they take at the link's rate."""
        return self.message() * 8e-6 / self.rate


def operands(setting: Setting, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A process's part of x and w: integers, so that sums are exact."""
    rng = np.random.default_rng([SEED, index])
    shapes = ((setting.rows, setting.depth), (setting.depth, setting.columns))
    x, w = (rng.integers(-3, 4, s).astype(np.float32) for s in shapes)
    return x, w


def expected(setting: Setting, index: int) -> np.ndarray:
    """The rows of the sum that a process is to have, by numpy."""
    half = setting.rows // PROCESSES
    mine = slice(index * half, (index + 1) * half)
    both = (operands(setting, i) for i in range(PROCESSES))
    return np.sum([x[mine].astype(np.float64) @ w for x, w in both], axis=0)


class Product:
    """`jnp.matmul`, after a sleep of its share of the seconds, if there are any.

    `events` is what callbacks did, in order, as words.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.slept = setting, 0.0
        self.events: list[str] = []
        self.matmul = jnp.matmul  # `ring` replaces it where others look for it

    def __call__(self, x: Any, w: Any, **how: Any) -> Any:
        """The product of rows of x; called as `jnp.matmul` is."""
        seconds = self.setting.compute * x.shape[0] / self.setting.rows

        def sleep(corner):
            self.events.append("product")
            time.sleep(seconds)
            self.slept += seconds
            return np.zeros_like(corner)

        if seconds:  # x waits for the sleep, and the sleep for x
            like = jax.ShapeDtypeStruct((), x.dtype)
            x = x + jax.pure_callback(sleep, like, x[0, 0])
        return self.matmul(x, w, **how)


def products(product: Product, x, w, device, pieces: int, zero: Callable) -> Iterator:
    """Of a device's rows, piece by piece; where one starts, `zero()` is added."""
    rows = x.shape[0] // PROCESSES // pieces
    for i in range(pieces):
        start = (device * pieces + i) * rows + zero()
        yield product(lax.dynamic_slice_in_dim(x, start, rows), w)


def late_zero(arrays: list) -> Any:
    """0, known only once the arrays are there, and to no compiler.

    On CPU an optimization barrier says nothing about when a callback runs. A value
    that goes into where a slice starts does.
    """
    return (jnp.stack([a[-1, -1] for a in arrays]).max() > 1e30).astype(jnp.int32)


def all_products(product: Product, x, w, me, pieces: int) -> tuple[list, list]:
    """Pieces to send and to keep, none of which is there before the last product."""
    made = []
    for device in (1 - me, me):
        made += products(product, x, w, device, pieces, lambda: 0)
    whole, zero = jnp.concatenate(made), late_zero(made)
    rows = x.shape[0] // PROCESSES // pieces
    starts = [i * rows + zero for i in range(PROCESSES * pieces)]
    cut = [lax.dynamic_slice_in_dim(whole, start, rows) for start in starts]
    return cut[:pieces], cut[pieces:]


def something(x, columns: int, pieces: int) -> list:
    """Pieces to send that took no time to make, all different."""
    shape = (x.shape[0] // PROCESSES, columns)
    return jnp.split(lax.broadcasted_iota(x.dtype, shape, 0) + x[0, 0], pieces)


def gloo_forms(product: Product, pieces: int) -> dict[str, Callable]:
    """Of one program for both processes, to go under shard_map."""

    def send(parts):
        return [lax.ppermute(p, AXIS, [(0, 1), (1, 0)]) for p in parts]

    def plain(x, w):
        return lax.psum_scatter(product(x, w), AXIS, scatter_dimension=0, tiled=True)

    def ring(x, w):
        with mock.patch.object(jnp, "matmul", product):
            return matmul_reduce_scatter(x, w, AXIS, chunks=pieces)

    def ring_serial(x, w):
        theirs, mine = all_products(product, x, w, lax.axis_index(AXIS), pieces)
        return jnp.concatenate(send(theirs)) + jnp.concatenate(mine)

    def ring_wire(x, w):
        return jnp.concatenate(send(something(x, w.shape[1], pieces)))

    forms = (plain, ring, ring_serial, ring_wire)
    return {form.__name__: form for form in forms}


def engine_forms(
    product: Product, pieces: int, me: int, engine: Engine
) -> dict[str, Callable]:
    """Of a program that a process has for itself, with the engine's callbacks."""

    def start(block):
        def callback(block):
            product.events.append("start")
            return np.int32(engine.start(np.asarray(block)))

        return io_callback(callback, jax.ShapeDtypeStruct((), np.int32), block)

    def wait(ticket, like, after):
        def callback(ticket, after):
            product.events.append("wait")
            return engine.wait(int(ticket))

        like = jax.ShapeDtypeStruct(like.shape, like.dtype)
        return io_callback(callback, like, ticket, after)

    def begun(tickets):
        """0 once the last transfer has begun: what needs it comes after that."""
        return jnp.minimum(tickets[-1], 0) if tickets else 0

    def send(parts):
        """Starts all, in the same order as the other process; then waits."""
        tickets = []
        for part in parts:
            tickets.append(start(part + begun(tickets)))
        after = begun(tickets)
        return [wait(t, p, after) for t, p in zip(tickets, parts, strict=True)]

    def engine_overlapped(x, w):
        tickets = []
        zero = functools.partial(begun, tickets)
        for part in products(product, x, w, 1 - me, pieces, zero):
            tickets.append(start(part))
        mine = list(products(product, x, w, me, pieces, zero))
        after = late_zero(mine)
        arrived = [wait(t, p, after) for t, p in zip(tickets, mine, strict=True)]
        return jnp.concatenate(arrived) + jnp.concatenate(mine)

    def engine_serial(x, w):
        theirs, mine = all_products(product, x, w, me, pieces)
        return jnp.concatenate(send(theirs)) + jnp.concatenate(mine)

    def engine_wire(x, w):
        return jnp.concatenate(send(something(x, w.shape[1], pieces)))

    def products_alone(x, w):
        return all_products(product, x, w, me, pieces)

    return {
        "engine": engine_overlapped,
        "engine_serial": engine_serial,
        "engine_wire": engine_wire,
        "products": products_alone,
    }
