"""Where a jaxpr gathers before a product, or sums one over devices.

A site is a collective and the products beside it, also with reshapes, transposes, casts
and, before a sum, a bias in between. `find` groups them into what one ring can do.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.extend.core import Literal

from jaxlab.overlap import epilogue
from jaxlab.overlap import layout as lay
from jaxlab.overlap.epilogue import Epilogue
from jaxlab.overlap.layout import Factor, Layout

GATHERS = ("all_gather", "all_gather_invariant")
SUMS = ("reduce_scatter", "psum", "psum_invariant")


class Operand(NamedTuple):
    """A product's operand as a ring takes it: rows and contracted dimensions."""

    index: int
    """of the product's equation"""
    side: int
    """which of its two operands has the rows that travel"""
    rows: tuple[Factor, ...]
    inner: tuple[Factor, ...]
    free: tuple[tuple[Factor, ...], ...] = ()
    """the rows as the product has them, by dimension"""


class Gather(NamedTuple):
    """An all-gather and the products that take what it gathers."""

    index: int
    cut: Factor
    products: tuple[Operand, ...]
    keep: bool
    """somebody else wants the gathered array too"""
    epilogue: Epilogue
    """functions of its products that are done block by block"""


class Term(NamedTuple):
    """A product that is summed, and how its dimensions lie in the sum."""

    index: int
    owner: int
    """which operand has the rows"""
    layout: Layout


class Bias(NamedTuple):
    """What is added to a product before the sum, smaller than it."""

    small: Any
    """the variable before it is broadcast"""
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    """to this shape, its dimensions to these"""
    layout: Layout
    """of the shape, in the sum"""


class Sum(NamedTuple):
    """A sum over devices of products, and of biases beside them."""

    index: int
    cut: Factor
    products: tuple[Term, ...]
    biases: tuple["Bias", ...]


class Skipped(NamedTuple):
    """A collective that stays as it is."""

    index: int
    reason: str
    beside_product: bool
    """whether there is a product that it could have hidden behind"""


class Graph:
    """A jaxpr's equations, who makes what and who takes it."""

    def __init__(self, jaxpr: Any):
        self.eqns = jaxpr.eqns
        self.made_by = {v: i for i, e in enumerate(self.eqns) for v in e.outvars}
        self.taken_by: dict[Any, list[int]] = defaultdict(list)
        for i, eqn in enumerate(self.eqns):
            for v in dict.fromkeys(_variables(eqn.invars)):
                self.taken_by[v].append(i)
        self.results = set(_variables(jaxpr.outvars))

    def reaches(self, start: list[Any], targets: set[int]) -> bool:
        """Whether these variables are made from the results of those equations."""
        todo, seen = list(start), set()
        while todo:
            i = self.made_by.get(todo.pop())
            if i is None or i in seen or i < min(targets):
                continue
            if i in targets:
                return True
            seen.add(i)
            todo += _variables(self.eqns[i].invars)
        return False


def _variables(atoms: Any) -> list[Any]:
    return [a for a in atoms if not isinstance(a, Literal)]


def axis_of(eqn: Any) -> str | None:
    """The one mesh axis of a collective; None: several, groups, or no name."""
    names = eqn.params.get("axis_name", eqn.params.get("axes"))
    names = names if isinstance(names, tuple) else (names,)
    if len(names) != 1 or not isinstance(names[0], str):
        return None
    return None if eqn.params.get("axis_index_groups") is not None else names[0]


def find(
    jaxpr: Any, sizes: dict[str, int], take: Callable[[Gather | Sum], bool]
) -> list[Skipped]:
    """Offers the groups that a ring can do; returns what it cannot.

    Args:
        jaxpr: open, of the inside of a shard_map.
        sizes: of the mesh axes whose collectives are wanted.
        take: told of each group in turn; True if it will be rewritten, so that its
            products can be in no other.
    """
    graph = Graph(jaxpr)
    skipped = []
    taken: set[int] = set()
    for i, eqn in enumerate(graph.eqns):
        name = eqn.primitive.name
        if name not in GATHERS + SUMS:
            continue
        axis = axis_of(eqn)
        if axis is None:
            skipped.append(Skipped(i, "several axes or groups at once", False))
            continue
        size = sizes.get(axis, 1)
        if size == 1:
            continue
        look = _gather if name in GATHERS else _sum
        found = look(graph, i, size, taken)
        if isinstance(found, Skipped):
            skipped.append(found)
        elif take(found):
            taken |= {p.index for p in found.products}
    return skipped


# ----------------------------------------------------------------------- gathers


def _gather(graph: Graph, i: int, size: int, taken: set[int]) -> Gather | Skipped:
    eqn = graph.eqns[i]
    dim, out = eqn.params["all_gather_dimension"], eqn.outvars[0]
    products: list[Operand] = []
    keep, reasons, cast = False, [], False
    todo = [(out, lay.origin(out.aval.shape))]
    while todo:
        var, layout = todo.pop()
        keep |= var in graph.results
        for j in graph.taken_by[var]:
            user = graph.eqns[j]
            if user.primitive.name == "dot_general":
                found = _operand(graph, i, j, var, layout, dim)
                if isinstance(found, Operand) and j not in taken:
                    products.append(found)
                    cast |= var.aval.dtype != out.aval.dtype
                else:
                    keep = True
                    reasons.append(found if isinstance(found, str) else "taken")
                continue
            after = lay.through(user, layout)
            if after is None:
                keep = True
            else:
                todo.append((user.outvars[0], after))
    if not products:
        reason = reasons[0] if reasons else "no product takes what it gathers"
        return Skipped(i, reason, bool(reasons))
    if cast and keep:
        return Skipped(i, "it is used in two dtypes", True)
    products.sort(key=lambda p: p.index)
    first, chosen = products[0], []
    for p in products:
        others = [a for s, a in enumerate(graph.eqns[p.index].invars) if s != p.side]
        apart = graph.reaches(_variables(others), {i, *(c.index for c in chosen)})
        if apart or not _alike(graph, first, p):
            keep = True
        else:
            chosen.append(p)
    if not chosen or (cast and keep):
        return Skipped(i, "its products depend on one another", True)
    layout = tuple((f,) for f in (*first.rows, *first.inner))
    cut = lay.leading(layout, dim)
    if cut.size % size:
        return Skipped(i, f"its {cut.size} blocks do not divide among {size}", True)
    if eqn.primitive.name == "all_gather_invariant":
        # What a ring makes varies, as its type and its derivative have it.
        axis = axis_of(eqn)
        taken_as = [graph.eqns[p.index].invars[p.side].aval for p in chosen]
        if keep or any(axis not in a.manual_axis_type.varying for a in taken_as):
            return Skipped(i, "it is used as the same on all devices", True)
    return Gather(i, cut, tuple(chosen), keep, epilogue.find(graph, i, chosen))


def _operand(graph, i, j, var, layout, dim) -> Operand | str:
    """One operand of a product, seen from the gathered array; or why not."""
    eqn = graph.eqns[j]
    if eqn.invars[0] is eqn.invars[1]:
        return "both operands of the product are what it gathers"
    side = 0 if eqn.invars[0] is var else 1
    contract, batch = eqn.params["dimension_numbers"]
    if batch[0]:
        return "the product is batched: split it, or gather another operand"
    inner = tuple(f for d in contract[side] for f in layout[d])
    if any(f.dim == dim for f in inner):
        return "the product sums over what is gathered, so it needs all of it"
    free = [layout[d] for d in range(len(layout)) if d not in contract[side]]
    rows = tuple(f for fs in free for f in fs)
    if not any(f.dim == dim for f in rows) or not inner:
        return "nothing is left to cut, or nothing to sum over"
    return Operand(j, side, rows, inner, tuple(free))


def _alike(graph: Graph, a: Operand, b: Operand) -> bool:
    one, two = graph.eqns[a.index], graph.eqns[b.index]
    same = [one.params[k] == two.params[k] for k in SETTINGS]
    dtypes = one.invars[a.side].aval.dtype == two.invars[b.side].aval.dtype
    return (a.rows, a.inner) == (b.rows, b.inner) and dtypes and all(same)


SETTINGS = ("precision", "preferred_element_type")


# -------------------------------------------------------------------------- sums


def _sum(graph: Graph, i: int, size: int, taken: set[int]) -> Sum | Skipped:
    eqn = graph.eqns[i]
    if len(eqn.invars) != 1 or isinstance(eqn.invars[0], Literal):
        return Skipped(i, "it sums several arrays at once", False)
    scatters = eqn.primitive.name == "reduce_scatter"
    products: list[tuple[int, Layout]] = []
    biases: list[Bias] = []
    reasons: list[str] = []
    todo: list[tuple[Any, tuple[Any, ...]]] = [(eqn.invars[0], ())]
    while todo:
        var, after = todo.pop()
        j = graph.made_by.get(var)
        made = graph.eqns[j] if j is not None else None
        name = made.primitive.name if made is not None else ""
        alone = len(graph.taken_by[var]) == 1 and var not in graph.results
        if made is not None and name in ("add", "add_any"):
            shape = var.aval.shape
            same = all(a.aval.ndim == len(shape) for a in made.invars)
            if alone and same and not any(isinstance(a, Literal) for a in made.invars):
                layout = _after(after, shape)
                for a in made.invars:
                    if a.aval.shape == shape:
                        todo.append((a, after))
                    else:
                        dims = tuple(range(len(shape)))
                        biases.append(Bias(a, shape, dims, layout or ()))
                continue
        layout = _after(after, var.aval.shape)
        if name == "dot_general":
            assert j is not None and made is not None
            if not alone:
                reasons.append("the product before the sum is used elsewhere too")
            elif j in taken:
                reasons.append("its product hides an all-gather already")
            elif made.params["dimension_numbers"][1][0]:
                reasons.append("the product is batched: split it")
            elif layout is None:
                reasons.append("a reshape cuts the product's dimensions unevenly")
            else:
                products.append((j, layout))
            continue
        if made is not None and lay.through(made, lay.origin(_shape(made))) is not None:
            if alone and not isinstance(made.invars[0], Literal):
                todo.append((made.invars[0], (made, *after)))
                continue
        if name == "broadcast_in_dim" and made is not None:
            dims = made.params["broadcast_dimensions"]
            shape = var.aval.shape
            biases.append(Bias(made.invars[0], shape, dims, layout or ()))
        else:
            biases.append(Bias(var, (), (), ()))
        if made is not None:
            reasons += _beside(graph, made)
    if not products:
        reason = reasons[0] if reasons else "no product makes what it sums"
        return Skipped(i, reason, bool(reasons))
    if reasons:
        return Skipped(i, reasons[0], True)
    if scatters:
        dim = eqn.params["scatter_dimension"]
        cuts = [layout[dim][0] for _, layout in products if layout[dim]]
        if len(cuts) < len(products) or any(c.size % size for c in cuts):
            return Skipped(i, f"a product's rows do not divide among {size}", True)
        cut = cuts[0]
    else:
        flat = [f for fs in products[0][1] for f in fs if f.size % size == 0]
        if not flat:
            return Skipped(i, f"no dimension divides among {size}", True)
        cut = flat[0]
    terms = tuple(_term(graph, j, layout, cut) for j, layout in products)
    kinds = {_signature(graph, t) for t in terms}
    if len(kinds) > 1 or any(
        lay.part_sizes([f for fs in t.layout for f in fs], None, 1)
        != lay.part_sizes([f for fs in terms[0].layout for f in fs], None, 1)
        for t in terms
    ):
        return Skipped(i, "products of different layouts are added", True)
    for bias in biases:
        if not _constant(bias, eqn, scatters):
            return Skipped(i, "something other than a bias is added before it", True)
    return Sum(i, cut, terms, tuple(biases))


def _shape(eqn: Any) -> tuple[int, ...]:
    return getattr(eqn.invars[0].aval, "shape", ()) if eqn.invars else ()


def _beside(graph: Graph, made: Any) -> list[str]:
    """A reason, if there is a product right behind what is summed."""
    for v in _variables(made.invars):
        j = graph.made_by.get(v)
        if j is not None and graph.eqns[j].primitive.name == "dot_general":
            return [f"{made.primitive.name} stands between the product and the sum"]
    return []


def _term(graph: Graph, j: int, layout: Layout, cut: Factor) -> Term:
    left = graph.eqns[j].invars[0].aval
    contract = graph.eqns[j].params["dimension_numbers"][0]
    rows = left.ndim - len(contract[0])
    return Term(j, 0 if cut.dim < rows else 1, layout)


def _signature(graph: Graph, term: Term) -> Any:
    eqn = graph.eqns[term.index]
    rows = eqn.invars[0].aval.ndim - len(eqn.params["dimension_numbers"][0][0])
    owners = [
        (f.size, (f.dim < rows) == (term.owner == 0)) for fs in term.layout for f in fs
    ]
    dtypes = [a.aval.dtype for a in eqn.invars]
    return (str(owners), str(dtypes), *(str(eqn.params[k]) for k in SETTINGS))


def _constant(bias: Bias, eqn: Any, scatters: bool) -> bool:
    """Whether a bias is one number along all that is scattered."""
    if not bias.layout or isinstance(bias.small, Literal):
        return False
    if not scatters:
        return True
    factors = bias.layout[eqn.params["scatter_dimension"]]
    if not factors:
        return False
    dim, small = factors[0].dim, bias.small.aval.shape
    return dim not in bias.dims or small[bias.dims.index(dim)] == 1


def _after(steps: tuple[Any, ...], shape: tuple[int, ...]) -> Layout | None:
    """The layout behind these equations; None if one cuts it unevenly."""
    layout: Layout | None = lay.origin(shape)
    for step in steps:
        layout = None if layout is None else lay.through(step, layout)
    return layout
