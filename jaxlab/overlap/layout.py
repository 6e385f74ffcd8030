"""Which digits of an array's dimensions lie where, after reshapes and transposes.

A ring needs its operand as [..., k] with the gathered or scattered dimension by itself.
What stands between a collective and its product, however, splits, merges and permutes
dimensions. So each dimension is followed as factors of the dimensions it came from: a
reshape of [6, 4] to [3, 8] makes the second dimension (6's minor 2, 4).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax


class Factor(NamedTuple):
    """Digits of a dimension: index // stride % size."""

    dim: int
    stride: int
    size: int


Layout = tuple[tuple[Factor, ...], ...]
"""Factors of each dimension, major first; dimensions of size 1 have none."""


def origin(shape: Sequence[int]) -> Layout:
    """Every dimension by itself."""
    return tuple((Factor(i, 1, n),) if n != 1 else () for i, n in enumerate(shape))


def extent(factors: Iterable[Factor]) -> int:
    """Size of a dimension made of these factors."""
    return math.prod(f.size for f in factors)


def reshape(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout after a reshape; None if it cuts factors unevenly."""
    left = [f for factors in layout for f in factors]
    found = []
    for size in shape:
        dim: list[Factor] = []
        while extent(dim) < size:
            factor, want = left.pop(0), size // extent(dim)
            if factor.size > want:
                if size % extent(dim) or factor.size % want:
                    return None
                minor = factor.size // want
                left.insert(0, Factor(factor.dim, factor.stride, minor))
                factor = Factor(factor.dim, factor.stride * minor, want)
            dim.append(factor)
        if extent(dim) != size:
            return None
        found.append(tuple(dim))
    return tuple(found)


def through(eqn: Any, layout: Layout) -> Layout | None:
    """The layout behind an equation that only moves or casts; None: another kind."""
    name, params = eqn.primitive.name, eqn.params
    shape = eqn.outvars[0].aval.shape
    if name in ("convert_element_type", "copy", "copy_p", "name", "pvary"):
        return layout
    if name == "transpose":
        return tuple(layout[i] for i in params["permutation"])
    if name == "reshape" and params.get("dimensions") is None:
        return reshape(layout, shape)
    if name in ("squeeze", "expand_dims"):
        return reshape(layout, shape)
    if name == "broadcast_in_dim":  # as jnp.expand_dims makes it
        if math.prod(shape) == extent(f for factors in layout for f in factors):
            return reshape(layout, shape)
    return None


def leading(layout: Layout, dim: int) -> Factor:
    """The major factor of a dimension of the origin."""
    return max((f for fs in layout for f in fs if f.dim == dim), key=lambda f: f.stride)


def arrange(
    x: jax.Array, order: Sequence[Factor], cut: Factor | None = None, size: int = 1
) -> jax.Array:
    """The array of the origin with one dimension a factor, in this order.

    Args:
        x: of the origin's shape, but for `cut`, of which it has 1/size.
        order: all factors of the origin.
        cut: a factor that x has a part of.
        size: how many parts there are.
    """
    places = sorted(range(len(order)), key=lambda i: (order[i].dim, -order[i].stride))
    sizes = part_sizes([order[i] for i in places], cut, size)
    back = [places.index(i) for i in range(len(order))]
    return x.reshape(sizes).transpose(back)


def restore(
    x: jax.Array,
    order: Sequence[Factor],
    layout: Layout,
    cut: Factor | None = None,
    size: int = 1,
) -> jax.Array:
    """What `arrange` did, undone, into the dimensions of a layout."""
    flat = [f for factors in layout for f in factors]
    x = x.reshape(part_sizes(order, cut, size))
    x = x.transpose([order.index(f) for f in flat])
    return x.reshape([math.prod(part_sizes(fs, cut, size)) for fs in layout])


def part_sizes(factors: Iterable[Factor], cut: Factor | None, size: int) -> list[int]:
    """Sizes of the factors where a device has 1/size of one of them."""
    return [f.size // size if f == cut else f.size for f in factors]
