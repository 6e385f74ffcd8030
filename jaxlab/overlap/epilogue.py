"""Elementwise functions behind a gather's products, as epilogues of its ring.

The silu of a gated MLP, an activation, a bias or a cast can be applied to each block as
it is made, where it would else be a pass over all blocks at the end. Taken is what
leaves no more bytes to be written than the products have.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from jaxlab.overlap import _compat

ELEMENTWISE = frozenset(
    "abs add add_any and ceil clamp convert_element_type copy cos div eq erf erf_inv "
    "erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt "
    "max min mul ne neg not or pow reduce_precision rem round rsqrt select_n sign sin "
    "sqrt square sub tan tanh xor".split()
)
CALLS = ("jit", "pjit", "closed_call")


class Row(NamedTuple):
    """A variable that is the same in all rows of a product, as a bias is."""

    variable: Any
    product: int
    """of the group"""
    small: Any
    """the variable before it is broadcast"""
    dims: tuple[int, ...]
    """its dimensions in the product"""


class Epilogue(NamedTuple):
    """What a ring makes in place of its products."""

    steps: tuple[tuple[int, int], ...] = ()
    """equations in their order, and a product (of the group) shaped like each"""
    results: tuple[tuple[Any, int], ...] = ()
    """variables that others want, and a product shaped like each"""
    scalars: tuple[Any, ...] = ()
    rows: tuple[Row, ...] = ()

    @property
    def needs(self) -> list[Any]:
        """Variables to be made before."""
        return [*self.scalars, *(row.small for row in self.rows)]


def find(graph: Any, i: int, products: Any) -> Epilogue:
    """What can be done to the blocks of the products of gather i.

    Args:
        graph: `sites.Graph`.
        i: number of the gather's equation.
        products: `sites.Operand`s, of equal rows.
    """
    eqns, before = graph.eqns, {i, *(p.index for p in products)}
    outs = [eqns[p.index].outvars[0] for p in products]
    layouts = [
        (p.side, p.free, v.aval.shape) for p, v in zip(products, outs, strict=True)
    ]
    like = dict(zip(outs, range(len(products)), strict=True))
    # Products that meet in a function share its fate.
    parts = {n: {n} for n in range(len(products))}
    taken: dict[int, int] = {}
    scalars: dict[int, list[Any]] = {}
    rows: dict[int, list[Row]] = {}
    for j in range(min(p.index for p in products) + 1, len(eqns)):
        eqn, inside, small, beside = eqns[j], [], [], []
        for a in eqn.invars:
            if not isinstance(a, Literal):
                at = inside if a in like else small if not a.aval.shape else beside
                at.append(a)
        if not inside or not _elementwise(eqn):
            continue
        of = like[inside[0]]
        wide = [r for a in beside if (r := _row(graph, a, of, layouts[of]))]
        if len(wide) < len(beside) or any(
            layouts[like[a]] != layouts[of] for a in inside
        ):
            continue
        if any(v.aval.shape != layouts[of][-1] for v in eqn.outvars):
            continue
        if graph.reaches([*small, *(row.small for row in wide)], before):
            continue
        part = set().union(*(parts[like[a]] for a in inside))
        parts |= dict.fromkeys(part, part)
        like |= dict.fromkeys(eqn.outvars, of)
        taken[j], scalars[j], rows[j] = of, small, wide
    # Whole parts, if they pay: those that do not are what the products make.
    results: list[tuple[Any, int]] = []
    kept: list[int] = []
    for part in {min(part): part for part in parts.values()}.values():
        chosen = [j for j, of in taken.items() if of in part]
        found = [v for v in like if like[v] in part and _wanted(graph, v, chosen)]
        mine = [outs[n] for n in sorted(part)]
        floats = all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in found)
        if not found or not floats or _bytes(found) > _bytes(mine):
            found, chosen = mine, []
        results += [(v, like[v]) for v in found]
        kept += chosen
    kept.sort()
    return Epilogue(
        tuple((j, taken[j]) for j in kept),
        tuple(results),
        tuple(dict.fromkeys(a for j in kept for a in scalars[j])),
        tuple(dict.fromkeys(row for j in kept for row in rows[j])),
    )


def _wanted(graph: Any, v: Any, eqns: list[int]) -> bool:
    return v in graph.results or any(j not in eqns for j in graph.taken_by[v])


def _bytes(variables: Any) -> int:
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in variables)


def _elementwise(eqn: Any) -> bool:
    if eqn.primitive.name in CALLS:
        body, consts = _body(eqn)
        return not consts and all(map(_elementwise, body.eqns))
    return eqn.primitive.name in ELEMENTWISE


def _body(eqn: Any) -> Any:
    held = [v for v in eqn.params.values() if isinstance(v, _compat.JAXPRS)]
    return _compat.opened(held[0])


def _row(graph: Any, a: Any, product: int, layout: Any) -> Row | None:
    """An operand that is broadcast along all rows of a product."""
    side, free, shape = layout
    small, dims = a, tuple(range(a.aval.ndim))
    j = graph.made_by.get(a)
    if j is not None and graph.eqns[j].primitive.name == "broadcast_in_dim":
        eqn = graph.eqns[j]
        if len(eqn.invars) == 1 and not isinstance(eqn.invars[0], Literal):
            small, dims = eqn.invars[0], eqn.params["broadcast_dimensions"]
    sizes = dict(zip(dims, small.aval.shape, strict=True))
    same = all(sizes.get(d, 1) == 1 for d in _rows(side, free, shape))
    return Row(a, product, small, dims) if same and a.aval.ndim == len(shape) else None


def _rows(side: int, free: Any, shape: Any) -> range:
    """Dimensions of a product that are rows: first if its left operand has them."""
    rank = len(shape)
    return range(len(free)) if side == 0 else range(rank - len(free), rank)


def epilogue_of(jaxpr: Any, group: Any, read: Any) -> Any:
    """The epilogue for `all_gather_matmul`; None: the products themselves are wanted.

    Args:
        jaxpr: of the equations.
        group: `sites.Gather`, whose products are [..., columns] in the ring.
        read: value of a variable.
    """
    found: Epilogue = group.epilogue
    if not found.steps:
        return None
    outs = [jaxpr.eqns[p.index].outvars[0] for p in group.products]
    values = {a: read(a) for a in found.scalars}
    columns = {}
    for a, of, small, dims in found.rows:
        product, whole = group.products[of], outs[of].aval.shape
        rows = _rows(product.side, product.free, whole)
        shape = [1 if d in rows else n for d, n in enumerate(whole)]
        columns[a] = lax.broadcast_in_dim(read(small), shape, dims).reshape(-1)

    def epilogue(*blocks: jax.Array) -> tuple[jax.Array, ...]:
        env = dict(zip(outs, blocks, strict=True)) | values
        for j, of in found.steps:
            eqn, shape = jaxpr.eqns[j], blocks[of].shape
            for a in eqn.invars:
                if not isinstance(a, Literal) and a in columns:
                    last = (len(shape) - 1,)
                    env[a] = lax.broadcast_in_dim(columns[a], shape, last)
            env.update(zip(eqn.outvars, _apply(eqn, env), strict=True))
        return tuple(env[v] for v, _ in found.results)

    return epilogue


def _apply(eqn: Any, env: dict[Any, Any]) -> list[Any]:
    """What an elementwise equation makes of arrays of another shape."""
    given = [a.val if isinstance(a, Literal) else env[a] for a in eqn.invars]
    if eqn.primitive.name not in CALLS:
        return _compat.bind(eqn, given, eqn.params)
    body, _ = _body(eqn)
    inner = dict(zip(body.invars, given, strict=True))
    for each in body.eqns:
        inner.update(zip(each.outvars, _apply(each, inner), strict=True))
    return [a.val if isinstance(a, Literal) else inner[a] for a in body.outvars]
