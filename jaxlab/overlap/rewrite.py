"""Rings in the place of sites: operands brought into a ring's form, results back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlab.overlap import layout as lay
from jaxlab.overlap.epilogue import epilogue_of
from jaxlab.overlap.matmul import (
    all_gather_matmul,
    matmul_all_reduce,
    matmul_reduce_scatter,
)
from jaxlab.overlap.ring import tracked


def gather_site(jaxpr, group, read, options) -> dict[Any, Any]:
    """Values of the products or of what is done to them, and what is gathered."""
    eqn, size = jaxpr.eqns[group.index], lax.axis_size(options["axis_name"])
    first = group.products[0]
    order = (*first.rows, *first.inner)
    x, dim = read(eqn.invars[0]), eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"]:
        x = jnp.expand_dims(x, dim)
    dtype = jaxpr.eqns[first.index].invars[first.side].aval.dtype
    x = lay.arrange(x.astype(dtype), order, group.cut, size)
    x = x.reshape((*lay.part_sizes(first.rows, group.cut, size), -1))
    ws = []
    for product in group.products:
        made = jaxpr.eqns[product.index]
        other = 1 - product.side
        ws.append(_weights(read(made.invars[other]), made, other))
    place = first.rows.index(group.cut)
    options = options | dict(epilogue=epilogue_of(jaxpr, group, read))
    found, whole = _gather_matmul(x, tuple(ws), place, group.keep, **options)
    values = {}
    for (variable, of), y in zip(group.epilogue.results, found, strict=True):
        product = group.products[of]
        made = jaxpr.eqns[product.index]
        contract = made.params["dimension_numbers"][0][1 - product.side]
        other = made.invars[1 - product.side].aval
        columns = [n for d, n in enumerate(other.shape) if d not in contract]
        y = y.reshape((*(lay.extent(fs) for fs in product.free), *columns))
        if product.side == 1:
            rows = len(product.free)
            y = jnp.moveaxis(y, range(rows), range(-rows, 0))
        values[variable] = y
    if whole is not None:
        out = eqn.outvars[0].aval
        layout = _split(order, len(out.shape))
        values[eqn.outvars[0]] = lay.restore(whole, order, layout)
    return values


def _split(order: Any, dims: int) -> lay.Layout:
    """The layout of the origin, its dimensions cut into these factors."""
    return tuple(
        tuple(sorted((f for f in order if f.dim == d), key=lambda f: -f.stride))
        for d in range(dims)
    )


def _weights(w: Any, made: Any, side: int) -> Any:
    """A product's operand as [contracted, rest]."""
    contract = made.params["dimension_numbers"][0][side]
    rest = [d for d in range(w.ndim) if d not in contract]
    sizes = [w.shape[d] for d in contract]
    return w.transpose((*contract, *rest)).reshape((int(np.prod(sizes)), -1))


def sum_site(jaxpr, group, read, options) -> dict[Any, Any]:
    """Value of the sum over devices."""
    eqn, size = jaxpr.eqns[group.index], lax.axis_size(options["axis_name"])
    scatters = eqn.primitive.name == "reduce_scatter"
    out = eqn.outvars[0].aval
    xs, ws, order, owned = [], [], (), ()
    for term in group.products:
        made = jaxpr.eqns[term.index]
        contract = made.params["dimension_numbers"][0]
        flat = tuple(f for fs in term.layout for f in fs)
        sides = []
        for side in (0, 1):
            x = read(made.invars[side])
            free = [d for d in range(x.ndim) if d not in contract[side]]
            offset = 0 if side == 0 else made.invars[0].aval.ndim - len(contract[0])
            dims = range(offset, offset + len(free))
            mine = tuple(f for f in flat if f.dim in dims)
            x = x.transpose((*free, *contract[side]))
            k = int(np.prod([x.shape[d] for d in range(len(free), x.ndim)]))
            places = [f._replace(dim=f.dim - offset) for f in mine]
            inner = lay.Factor(len(free), 1, k)
            x = x.reshape((*x.shape[: len(free)], k))
            x = lay.arrange(x, (*places, inner))
            sides.append((x.reshape((*(f.size for f in mine), k)), mine))
        (x, mine), (w, theirs) = sides[term.owner], sides[1 - term.owner]
        xs.append(x)
        ws.append(jnp.moveaxis(w, -1, 0).reshape((w.shape[-1], -1)))
        if not order:
            order, owned = (*mine, *theirs), mine
    term = group.products[0]
    # The sum travels in the dtype in which the program sums.
    options = options | dict(preferred_element_type=eqn.invars[0].aval.dtype)
    y = _matmul_sum(scatters, xs, ws, owned.index(group.cut), **options)
    cut = group.cut if scatters else None
    total = lay.restore(y, order, term.layout, cut, size)
    for bias in group.biases:
        small = _sum_of(read(bias.small), options["axis_name"]).astype(out.dtype)
        whole = lax.broadcast_in_dim(small, bias.shape, bias.dims)
        flat = tuple(f for fs in bias.layout for f in fs)
        whole = lay.arrange(whole, flat)
        lead = None
        if scatters:
            lead = bias.layout[eqn.params["scatter_dimension"]][0]
            part, axis = lead.size // size, flat.index(lead)
            whole = lax.slice_in_dim(whole, 0, part, axis=axis)
        total += lay.restore(whole, flat, bias.layout, lead, size)
    return {eqn.outvars[0]: total.reshape(out.shape)}


def _sum_of(x: Any, axis: str) -> Any:
    """psum, of what is the same everywhere as well."""
    if axis in jax.typeof(x).manual_axis_type.varying:
        return lax.psum(x, axis)
    return x * lax.axis_size(axis) if tracked(axis) else lax.psum(x, axis)


# ------------------------------------------------------------- the chosen form


def _gather_matmul(
    x, ws, dim, keep, *, mode, chunks, axis_name, epilogue, **settings
) -> Any:
    """Products of the gathered x, or what becomes of them; and it or None."""
    if mode != "pallas":
        ways = dict(chunks=chunks, bidirectional=mode == "bidirectional")
        found: Any = all_gather_matmul(
            x,
            ws,
            axis_name,
            dim=dim,
            epilogue=epilogue,
            return_gathered=keep,
            **ways,
            **settings,
        )
        return found if keep else (found, None)
    from jaxlab.overlap.pallas import pallas_all_gather_matmul

    flat, whole = _flat(x, dim), None
    # One kernel has one operand on either side: the weights lie beside each other.
    y: Any = pallas_all_gather_matmul(
        flat, jnp.concatenate(ws, 1), axis_name, return_gathered=keep, **settings
    )
    if keep:
        y, whole = y
        whole = _unflat(whole, x, dim)
    ends = np.cumsum([w.shape[1] for w in ws])[:-1]
    parts = [_unflat(part, x, dim) for part in jnp.split(y, ends, 1)]
    return parts if epilogue is None else epilogue(*parts), whole


def _matmul_sum(scatters, xs, ws, dim, *, mode, chunks, axis_name, **settings) -> Any:
    """This device's rows of the sum of the products, or all of it."""
    if mode != "pallas":
        ring = matmul_reduce_scatter if scatters else matmul_all_reduce
        ways = dict(chunks=chunks, bidirectional=mode == "bidirectional")
        return ring(tuple(xs), tuple(ws), axis_name, dim=dim, **ways, **settings)
    from jaxlab.overlap import pallas

    kernel = (
        pallas.pallas_matmul_reduce_scatter
        if scatters
        else pallas.pallas_matmul_all_reduce
    )
    flat = jnp.concatenate([_flat(x, dim) for x in xs], 1)
    y = kernel(flat, jnp.concatenate(ws, 0), axis_name, **settings)
    return _unflat(y, xs[0], dim)


def _flat(x: Any, dim: int) -> Any:
    """[..., k] as [rows, k], with dimension `dim` outermost among the rows."""
    return jnp.moveaxis(x, dim, 0).reshape((-1, x.shape[-1]))


def _unflat(y: Any, like: Any, dim: int) -> Any:
    """`_flat` undone, for another number of columns and of rows along `dim`."""
    rest = [n for d, n in enumerate(like.shape[:-1]) if d != dim]
    return jnp.moveaxis(y.reshape((-1, *rest, y.shape[-1])), 0, dim)
