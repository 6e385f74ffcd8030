"""Collective matmuls for unmodified functions: `overlap` applies them, `explain` says.

A function is traced to its jaxpr, the sites in it are found (`jaxlab.overlap.sites`),
and it is evaluated again with rings in their place; bodies of jit, scan, remat, cond,
while, shard_map and custom_vjp are rewritten in the same way. What the partitioner
inserts later, for arrays that are cut outside of any shard_map, stands in no jaxpr and
cannot be seen.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxlab.overlap import _compat, sites
from jaxlab.overlap.matmul import OverlapSkipped
from jaxlab.overlap.policy import Explanation, Policy, Site, decide, site
from jaxlab.overlap.rewrite import gather_site, sum_site

BODIES = ("jit", "pjit", "closed_call", "scan", "while", "cond", "remat2", "checkpoint")
"""Equations whose jaxprs can be put back rewritten."""


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
        sizes = _sizes(context.policy)

        def plan(group: sites.Gather | sites.Sum) -> bool:
            size = sizes[sites.axis_of(jaxpr.eqns[group.index]) or ""]
            found, settings = decide(jaxpr, group, size, context.policy)
            context.note(found)
            if settings is None:
                return False
            plans[group.index] = group, settings
            for i in _members(group):
                members[i] = group.index
            return True

        for left in sites.find(jaxpr, sizes, plan):
            form = "skipped" if left.beside_product else "alone"
            context.note(site(jaxpr.eqns[left.index], form, reason=left.reason))
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


def _members(group: sites.Gather | sites.Sum) -> list[int]:
    """Equations that a group's ring stands for."""
    done = group.epilogue.steps if isinstance(group, sites.Gather) else ()
    return [group.index, *(p.index for p in group.products), *(j for j, _ in done)]


def _needs(jaxpr: Any, group: sites.Gather | sites.Sum) -> list[Any]:
    eqns = jaxpr.eqns
    if isinstance(group, sites.Gather):
        others = [eqns[p.index].invars[1 - p.side] for p in group.products]
        return [eqns[group.index].invars[0], *others, *group.epilogue.needs]
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
    """The open jaxprs inside an equation."""
    found = jax.tree.leaves(
        tuple(_bodies(eqn).values()), is_leaf=lambda v: isinstance(v, _compat.JAXPRS)
    )
    return [_compat.opened(v)[0] for v in found]


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
        context.note(site(eqn, "skipped", reason=reason))
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


def _sizes(policy: Policy) -> dict[str, int]:
    """Sizes of the mesh axes to overlap."""
    names = set(jax.sharding.get_abstract_mesh().manual_axes)
    wanted = names if policy.axes is None else names & set(policy.axes)
    return {name: lax.axis_size(name) for name in wanted}
