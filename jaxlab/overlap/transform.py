"""Collective matmuls for unmodified functions: `overlap` applies them, `explain` says.

A function is traced to its jaxpr, the sites in it are found (`jaxlab.overlap.sites`),
and it is evaluated again with rings in their place; bodies of jit, scan, remat, cond,
while, shard_map and custom_vjp are rewritten in the same way. What the partitioner
inserts later, for arrays that are cut outside of any shard_map, stands in no jaxpr and
cannot be seen.
"""

import collections
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxlab.overlap import _compat, sites
from jaxlab.overlap.hardware import Hardware, choose, find, measure
from jaxlab.overlap.matmul import OverlapSkipped
from jaxlab.overlap.rewrite import gather_site, sum_site

BODIES = ("jit", "pjit", "closed_call", "scan", "while", "cond", "remat2", "checkpoint")
"""Equations whose jaxprs can be put back rewritten."""


@dataclass(frozen=True)
class Policy:
    """Which form each site takes."""

    mode: Literal["auto", "ring", "bidirectional", "plain"] = "auto"
    """auto: the one that is predicted to be fastest, plain where none gains"""
    chunks: int = 1
    """lanes of a ring; auto chooses by itself"""
    min_bytes: int = 0
    """smaller collectives stay plain"""
    axes: tuple[str, ...] | None = None
    """mesh axes to overlap; None: all"""
    hardware: Hardware | None = None
    """what auto predicts for; None: the devices here, by name or by a measurement"""


class Site(NamedTuple):
    """A collective and what became of it."""

    what: str
    """all-gather, reduce-scatter or all-reduce, with shapes"""
    where: str
    """file, line and function"""
    form: str
    """ring, bidirectional, plain (chosen), skipped, or alone (no product beside it)"""
    chunks: int
    reason: str
    """why it is not overlapped; empty where it is"""
    seconds: float | None
    """predicted; None where nothing was predicted"""
    plain_seconds: float | None

    def __str__(self) -> str:
        text = f"{self.form:13} {self.what}  {self.where}"
        if self.seconds is not None and self.plain_seconds is not None:
            times = self.seconds * 1e3, self.plain_seconds * 1e3
            text += "  predicted {:.3f} ms, plain {:.3f} ms".format(*times)
        return text + (f"\n{'':20}{self.reason}" if self.reason else "")


class Explanation(NamedTuple):
    """All sites of a function; printable."""

    sites: tuple[Site, ...]

    @property
    def rewritten(self) -> tuple[Site, ...]:
        """Those that became rings."""
        return tuple(s for s in self.sites if s.form in ("ring", "bidirectional"))

    @property
    def skipped(self) -> tuple[Site, ...]:
        """Those with a product beside them that could not."""
        return tuple(s for s in self.sites if s.form == "skipped")

    def __str__(self) -> str:
        head = f"{len(self.rewritten)} of {len(self.sites)} collectives are overlapped"
        if not self.sites:
            head = (
                "there is no explicit collective here; those that the partitioner "
                "inserts cannot be seen: write the tensor axis under jax.shard_map"
            )
        times = collections.Counter(map(str, self.sites))
        lines = [f"{n:3} x {text}" for text, n in times.items()]
        return "\n".join([head, *lines])


class _Context(NamedTuple):
    policy: Policy
    note: Callable[[Site], None]
    manual: bool = False


def overlap(
    fn: Callable[..., Any],
    *,
    policy: Policy | None = None,
    on_skip: Literal["warn", "error", "ignore"] = "warn",
) -> Callable[..., Any]:
    """The same function with its collectives hidden behind its matmuls.

    It finds all-gather before a product, and a product before a reduce-scatter or a
    psum, with reshapes, transposes, casts and biases in between, and several products
    of one gather. Works inside `jax.shard_map` and around it, under `jax.grad` and
    around it; not in forward mode. Sums are added in another order than XLA's. Call it
    under `jax.jit`: it traces `fn` at every call.

    Args:
        fn: of arrays and anything else, by position and name.
        policy: form of each site; None: `Policy()`.
        on_skip: what to do about a collective beside a product that it cannot overlap:
            an `OverlapSkipped` warning, a ValueError, or nothing.

    Raises:
        ValueError: with on_skip="error", naming the line and the reason.
    """

    def note(site: Site) -> None:
        if site.form != "skipped" or on_skip == "ignore":
            return
        text = f"not overlapped: {site.what} at {site.where}: {site.reason}"
        if on_skip == "error":
            raise ValueError(text)
        warnings.warn(text, OverlapSkipped, stacklevel=2)

    context = _Context(policy or Policy(), note)

    @functools.wraps(fn)
    def overlapped(*args: Any, **kwargs: Any) -> Any:
        inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
        found = _rewritten(fn, context._replace(manual=inside))
        return found(*args, **kwargs)

    return overlapped


def explain(
    fn: Callable[..., Any],
    *args: Any,
    policy: Policy | None = None,
    log: Callable[[str], Any] = print,
    **kwargs: Any,
) -> Explanation:
    """Prints and returns what `overlap(fn, policy=policy)` does on these arguments.

    Args:
        fn: not wrapped yet.
        args: arrays, or `jax.ShapeDtypeStruct`s in their place; nothing is computed.
        policy: as of `overlap`.
        log: takes the text.
        kwargs: more of them.
    """
    found: list[Site] = []
    inside = bool(jax.sharding.get_abstract_mesh().manual_axes)
    context = _Context(policy or Policy(), found.append, inside)
    jax.eval_shape(_rewritten(fn, context), *args, **kwargs)
    explanation = Explanation(tuple(found))
    log(str(explanation))
    return explanation


def _rewritten(fn: Callable[..., Any], context: _Context) -> Callable[..., Any]:
    """The function traced and evaluated anew; all but arrays is static."""

    def is_array(x):
        return isinstance(x, jax.Array | np.ndarray | np.generic)

    def call(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = [x for x in leaves if is_array(x)]
        rest: list[Any] = []

        def flat(*arrays):
            given = iter(arrays)
            whole = [next(given) if is_array(x) else x for x in leaves]
            args, kwargs = jax.tree.unflatten(tree, whole)
            out, out_tree = jax.tree.flatten(fn(*args, **kwargs))
            rest[:] = [out_tree, [None if is_array(x) else (x,) for x in out]]
            return [x for x in out if is_array(x)]

        jaxpr, consts = _compat.opened(jax.make_jaxpr(flat)(*arrays))
        made = iter(_evaluate(jaxpr, consts, arrays, context))
        out_tree, static = rest
        return jax.tree.unflatten(
            out_tree, [next(made) if s is None else s[0] for s in static]
        )

    return call


def _evaluate(jaxpr: Any, consts: list[Any], args: Any, context: _Context) -> list[Any]:
    """Results of a jaxpr, with rings for its sites."""
    plans: dict[int, tuple[sites.Gather | sites.Sum, dict[str, Any]]] = {}
    members: dict[int, int] = {}
    if context.manual and _communicates(jaxpr):
        # Flat, so that a collective and its product stand in one jaxpr.
        whole = jax.make_jaxpr(functools.partial(_inlined, jaxpr))(consts, *args)
        args = [*consts, *args]
        jaxpr, consts = _compat.opened(whole)
        sizes = _sizes(jaxpr, context.policy)
        groups, skipped = sites.find(jaxpr, sizes)
        for left in skipped:
            form = "skipped" if left.beside_product else "alone"
            site = _site(jaxpr.eqns[left.index], form=form, reason=left.reason)
            context.note(site)
        for group in groups:
            options = _options(jaxpr, group, sizes, context)
            if options is not None:
                plans[group.index] = group, options
                members[group.index] = group.index
                members |= {p.index: group.index for p in group.products}
    env: dict[Any, Any] = {}
    made_by = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.outvars}
    done: set[int] = set()

    def read(atom: Any) -> Any:
        if isinstance(atom, sites.Literal):
            return atom.val
        if atom not in env:
            run(made_by[atom])
        return env[atom]

    def run(i: int) -> None:
        i = members.get(i, i)
        if i in done:
            return
        done.add(i)
        eqn = jaxpr.eqns[i]
        if i in plans:
            group, options = plans[i]
            emit = gather_site if isinstance(group, sites.Gather) else sum_site
            with _compat.at(eqn):
                env.update(emit(jaxpr, group, read, options))
        else:
            given = [read(a) for a in eqn.invars]
            with _compat.at(eqn):
                found = _bind(eqn, given, context)
            env.update(zip(eqn.outvars, found, strict=True))

    env.update(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for i in _live(jaxpr, plans, members, made_by):
        run(i)
    return [read(v) for v in jaxpr.outvars]


def _live(jaxpr, plans, members, made_by) -> list[int]:
    """Equations that results or effects need, once rings stand for their members."""
    todo = [v for v in jaxpr.outvars if not isinstance(v, sites.Literal)]
    seen: set[int] = set()
    for i, eqn in enumerate(jaxpr.eqns):
        if eqn.effects and i not in members:
            seen.add(i)
            todo += [a for a in eqn.invars if not isinstance(a, sites.Literal)]
    while todo:
        i = made_by.get(todo.pop())
        i = members.get(i, i)
        if i is None or i in seen:
            continue
        seen.add(i)
        if i in plans:
            needs = _needs(jaxpr, plans[i][0])
        else:
            needs = jaxpr.eqns[i].invars
        todo += [a for a in needs if not isinstance(a, sites.Literal)]
    return sorted(seen)


def _needs(jaxpr: Any, group: sites.Gather | sites.Sum) -> list[Any]:
    eqns = jaxpr.eqns
    if isinstance(group, sites.Gather):
        others = [eqns[p.index].invars[1 - p.side] for p in group.products]
        return [eqns[group.index].invars[0], *others]
    return [
        *(a for p in group.products for a in eqns[p.index].invars),
        *(bias.small for bias in group.biases),
    ]


def _bodies(eqn: Any) -> dict[str, Any]:
    """Parameters of an equation that are jaxprs, or tuples of them."""

    def holds(value):
        several = value if isinstance(value, tuple) else (value,)
        return bool(several) and all(isinstance(v, _compat.JAXPRS) for v in several)

    return {name: value for name, value in eqn.params.items() if holds(value)}


def _inner(eqn: Any) -> list[Any]:
    values = _bodies(eqn).values()
    each = [
        v for value in values for v in (value if isinstance(value, tuple) else [value])
    ]
    return [_compat.opened(v)[0] for v in each]


def _communicates(jaxpr: Any) -> bool:
    return any(
        e.primitive.name in (*sites.GATHERS, *sites.SUMS)
        or any(map(_communicates, _inner(e)))
        for e in jaxpr.eqns
    )


def _multiplies(jaxpr: Any) -> bool:
    return any(
        e.primitive.name == "dot_general" or any(map(_multiplies, _inner(e)))
        for e in jaxpr.eqns
    )


def _inlined(jaxpr: Any, consts: list[Any], *args: Any) -> list[Any]:
    """Evaluates with the bodies of jit in place of their calls."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom):
        return atom.val if isinstance(atom, sites.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        given = [read(a) for a in eqn.invars]
        called = eqn.primitive.name in ("jit", "pjit", "closed_call")
        inner = _inner(eqn)
        with _compat.at(eqn):
            if called and any(_communicates(j) or _multiplies(j) for j in inner):
                body, more = _compat.opened(*_bodies(eqn).values())
                found = _inlined(body, more, *given)
            else:
                found = _compat.bind(eqn, given, eqn.params)
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _bind(eqn: Any, args: list[Any], context: _Context) -> list[Any]:
    """Evaluates an equation, its bodies rewritten."""
    name = eqn.primitive.name
    if not any(map(_communicates, _inner(eqn))):
        return _compat.bind(eqn, args, eqn.params)
    if name == "shard_map":
        body, consts = _compat.opened(eqn.params["jaxpr"])
        inside = context._replace(manual=True)
        mapped = jax.shard_map(
            lambda *args: tuple(_evaluate(body, consts, args, inside)),
            mesh=eqn.params["mesh"],
            in_specs=eqn.params["in_specs"],
            out_specs=eqn.params["out_specs"],
            axis_names=set(eqn.params["newly_manual_axes"]),
            check_vma=eqn.params["check_vma"],
        )
        return list(mapped(*args))
    if name == "custom_vjp_call":
        return _compat.bind_changed(eqn, args, lambda f: _rewritten(f, context))
    if name not in BODIES:
        reason = f"it is inside {name}, which is left alone"
        context.note(_site(eqn, form="skipped", reason=reason))
        return _compat.bind(eqn, args, eqn.params)

    def rewritten(body):
        if isinstance(body, tuple):
            return tuple(map(rewritten, body))
        jaxpr, consts = _compat.opened(body)
        types = [v.aval for v in jaxpr.invars]
        call = lambda *args: _evaluate(jaxpr, consts, args, context)  # noqa: E731
        return _compat.trace(call, types, body)

    bodies = {k: rewritten(v) for k, v in _bodies(eqn).items()}
    return _compat.bind(eqn, args, eqn.params | bodies)


# ------------------------------------------------------------------ choosing forms


def _sizes(jaxpr: Any, policy: Policy) -> dict[str, int]:
    names = set(jax.sharding.get_abstract_mesh().manual_axes)
    wanted = names if policy.axes is None else names & set(policy.axes)
    return {name: lax.axis_size(name) for name in wanted}


def _site(eqn: Any, **rest: Any) -> Site:
    kinds = dict(reduce_scatter="reduce-scatter", all_gather="all-gather")
    name = eqn.primitive.name.removesuffix("_invariant")
    what = kinds.get(name, name.replace("psum", "all-reduce"))
    ends = (*eqn.invars[:1], *eqn.outvars[:1])
    shapes = [a.aval.str_short(short_dtypes=True).split("{")[0] for a in ends]
    filled: dict[str, Any] = dict(chunks=1, reason="", seconds=None, plain_seconds=None)
    place = _compat.where(eqn)
    return Site(f"{what} {' to '.join(shapes)}", place, **(filled | rest))


def _options(jaxpr, group, sizes, context) -> dict[str, Any] | None:
    """Form of a group's ring, as arguments of the collective matmul; None: plain."""
    eqns, policy = jaxpr.eqns, context.policy
    eqn = eqns[group.index]
    gathers = isinstance(group, sites.Gather)
    axis = sites.axis_of(eqn)
    assert axis is not None
    size = sizes[axis]
    first = eqns[group.products[0].index]
    contract = first.params["dimension_numbers"][0]
    k = int(np.prod([first.invars[0].aval.shape[d] for d in contract[0]]))
    side = group.products[0].side if gathers else group.products[0].owner
    elements = int(np.prod(first.invars[side].aval.shape))
    rows = elements // k
    outs = [int(np.prod(eqns[p.index].outvars[0].aval.shape)) for p in group.products]
    n = max(1, (sum(outs) if gathers else outs[0]) // rows)
    k = k if gathers else k * len(outs)
    moved = (eqn.outvars if gathers else eqn.invars)[0].aval
    if moved.size * moved.dtype.itemsize < policy.min_bytes:
        context.note(_site(eqn, form="plain", reason="under min_bytes"))
        return None
    kinds = {"reduce_scatter": "scatter"}
    kind: Any = "gather" if gathers else kinds.get(eqn.primitive.name, "reduce")
    mode, chunks, seconds, plain = policy.mode, policy.chunks, None, None
    if mode == "auto":
        choice = choose(
            kind,
            rows=rows,
            k=k,
            n=n,
            size=size,
            itemsize=moved.dtype.itemsize,
            hardware=policy.hardware or _here(),
            backward=kind != "reduce",
        )
        mode, chunks, seconds, plain = choice
    predicted = dict(seconds=seconds, plain_seconds=plain)
    if mode == "plain":
        reason = "" if seconds is None else "plain is predicted to be as fast"
        context.note(_site(eqn, form="plain", reason=reason, **predicted))
        return None
    lanes = chunks * (2 if mode == "bidirectional" else 1)
    if group.cut.size // size % lanes:
        if policy.mode == "auto":
            chunks, mode, lanes = 1, "ring", 1
        else:
            reason = f"{group.cut.size // size} rows do not divide into {lanes} lanes"
            context.note(_site(eqn, form="skipped", reason=reason))
            return None
    context.note(_site(eqn, form=mode, chunks=chunks, **predicted))
    settings = {name: first.params[name] for name in sites.SETTINGS}
    both_ways = mode == "bidirectional"
    return settings | dict(axis_name=axis, chunks=chunks, bidirectional=both_ways)


@functools.cache
def _here() -> Hardware:
    """The devices of this process."""
    device = jax.devices()[0]
    found = find(device.device_kind)
    if found is None:
        with jax.ensure_compile_time_eval():
            found = measure()
    return found
