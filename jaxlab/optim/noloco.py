"""NoLoCo: replicas that train apart and gossip in pairs, with no all-reduce.

Each of N replicas takes H steps of an inner optimizer on its own data. Then, with
slow weights phi, fast weights theta, Delta = theta - phi and g the replica's group,

    m   <- alpha m + beta mean_g(Delta) - gamma (phi - mean_g(phi))
    phi <- phi + m                        (nesterov: phi + alpha m + beta mean_g(...))
    theta <- phi

(Kolehmainen et al., arXiv 2506.10911, equations 1 to 3, with the sign of their
appendix and code: the printed "- beta" would ascend.) The mean of the replicas obeys
DiLoCo's recursion (arXiv 2311.08105) whatever the groups are; gamma keeps them
together. With one group of all it is DiLoCo.

One tensor on the wire is enough: with s = beta Delta + gamma phi, and q what the wire
makes of a number, a pair computes

    m_i <- alpha m_i + beta Delta_i + (q(s_j) - q(s_i)) / 2

What one replica gains the other loses, so the mean over replicas is exact for any q.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.optim import gossip, wire
from jaxlab.optim.pairing import key_data
from jaxlab.optim.settings import (
    Outer,
    check_axis,
    check_settings,
    gamma_of,
    one_group,
    row_of,
    table_of,
)


class NoLoCoState(NamedTuple):
    """State of `noloco`. `count` and `key` are shared by all replicas."""

    count: jax.Array
    """int32[]: inner steps taken"""
    key: jax.Array
    """uint32[2]: draws the pairing's rows"""
    inner: Any
    """state of the inner optimizer; neither exchanged nor reset"""
    slow: Any
    """phi, like the parameters, `slow_dtype`; the authority after an exchange"""
    momentum: Any
    """m, like `slow`"""
    residual: Any
    """what the wire has not carried yet, like the payload; () without feedback"""
    replica_std: jax.Array
    """float32[]: root mean square over parameters of the replicas' standard
    deviation, estimated from the last exchange alone; NaN before it and after a bye"""


def noloco(
    inner: optax.GradientTransformation,
    *,
    inner_steps: int | None = 50,
    outer_lr: optax.ScalarOrSchedule = 0.7,
    momentum: optax.ScalarOrSchedule = 0.5,
    gamma: optax.ScalarOrSchedule | None = None,
    nesterov: bool = False,
    axis_name: str = "replica",
    axis_size: int,
    pairing: str | np.ndarray = "round_robin",
    group_size: int = 2,
    seed: int = 0,
    exchange: str = "fused",
    wire_dtype: Any = None,
    error_feedback: bool = False,
    slow_dtype: Any = jnp.float32,
    mask: Any = None,
    check: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an inner optimizer into NoLoCo (see the module for the mathematics).

    `update(grads, state, params, *, alive=None, weight=None)` runs per replica, under
    `jax.shard_map` or `jax.vmap` with the axis `axis_name`. Every `inner_steps` calls
    it exchanges; all other calls communicate nothing. Gradients, parameters and the
    state are the replica's own, but for `count` and `key`: see `replica_specs`.

    - `alive`, bool[axis_size], the same on all replicas: one that is not alive takes
      a bye, and so does its partner, so the mean over the others stays exact.
    - `weight`, float[axis_size], the same on all replicas: averages are weighted,
      and the weighted mean is preserved instead of the plain one.

    The parameters that `optax.apply_updates` returns after an exchange may differ
    from `state.slow` in the last bit (it adds a difference). That does not build up,
    and `outer_step` avoids it.

    Args:
        inner: the optimizer between exchanges, e.g. `optax.adamw(3e-4)`; gets all
            other keyword arguments of `update`.
        inner_steps: H; None: never exchanges by itself, call `outer_step`.
        outer_lr: beta, a number or a schedule of the outer round.
        momentum: alpha, likewise.
        gamma: strength of the gossip, likewise; None: `outer_lr` (as the authors'
            code has it).
        nesterov: Nesterov's form of the momentum; the paper's is heavy-ball.
        axis_name: mesh or vmap axis of the replicas.
        axis_size: number of replicas.
        pairing: "round_robin", "random", a table (see `pairing.pairing_table`), or
            "all": one group of all, by one all-reduce (DiLoCo).
        group_size: replicas that average in a round, a power of 2; each doubling
            sends the payload once more.
        seed: of the pairing. The same on all replicas.
        exchange: "fused" sends one tensor per parameter, "pair" sends Delta and phi
            as the paper does: twice the bytes for the same mathematics, rounded
            separately on a narrow wire.
        wire_dtype: None (`slow_dtype`), "bfloat16", or "int8" with a float32 scale
            for each row of the last dimension.
        error_feedback: adds to the next payload what the wire rounded off the last.
        slow_dtype: of phi and m.
        mask: tree of bools like the parameters, or a function of them to one; leaves
            that are False are left to the inner optimizer.
        check: refuse an unstable gamma and warn of a slow one.

    Returns:
        an optax transformation with `NoLoCoState`.

    Raises:
        ValueError: when made, for hyper-parameters or a pairing that cannot work; when
            traced, for a missing or wrong axis, or a `count` that differs between
            replicas (which would deadlock).
    """
    outer = Outer(
        axis_size,
        outer_lr,
        momentum,
        gamma,
        nesterov,
        axis_name,
        pairing,
        group_size,
        seed,
        exchange,
        wire_dtype,
        error_feedback,
        mask,
        check,
    )
    check_settings(outer, inner_steps)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> NoLoCoState:
        # Copies: a buffer that is the weights' too could not be donated with them.
        slow = jax.tree.map(
            lambda p: jnp.array(p, slow_dtype), _exchanged(params, mask)
        )

        def zeros():
            return jax.tree.map(jnp.zeros_like, slow)

        tensors = 1 if exchange == "fused" else 2
        return NoLoCoState(
            count=jnp.zeros((), jnp.int32),
            key=key_data(seed),
            inner=inner.init(params),
            slow=slow,
            momentum=zeros(),
            residual=tuple(zeros() for _ in range(tensors)) if error_feedback else (),
            replica_std=jnp.full((), jnp.nan, jnp.float32),
        )

    def update(updates, state, params=None, *, alive=None, weight=None, **extra):
        if params is None:
            raise ValueError("noloco needs the parameters: tx.update(grads, s, params)")
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        state = state._replace(
            count=optax.safe_increment(state.count), inner=inner_state
        )
        if inner_steps is None:
            return updates, state

        every = inner_steps

        def exchange_now(parts):
            theta = optax.apply_updates(params, updates)
            new, parts = _exchange(
                outer, theta, parts, state, every, None, alive, weight
            )
            return jax.tree.map(jnp.subtract, new, params), parts

        return _when_due(outer, state, every, exchange_now, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def diloco(
    inner: optax.GradientTransformation,
    *,
    axis_size: int,
    inner_steps: int | None = 100,
    outer_lr: optax.ScalarOrSchedule = 0.7,
    momentum: optax.ScalarOrSchedule = 0.3,
    gamma: optax.ScalarOrSchedule = 0.0,
    **others: Any,
) -> optax.GradientTransformationExtraArgs:
    """DiLoCo (arXiv 2311.08105): `noloco` with one group of all, by an all-reduce.

    The defaults are those of the NoLoCo paper's comparison. The original has
    `momentum=0.9, nesterov=True`.

    Args:
        inner: the optimizer between exchanges.
        axis_size: number of replicas.
        inner_steps: H.
        outer_lr: beta.
        momentum: alpha.
        gamma: pull towards the mean; replicas that start equal stay equal without.
        **others: as of `noloco`.
    """
    return noloco(
        inner,
        axis_size=axis_size,
        inner_steps=inner_steps,
        outer_lr=outer_lr,
        momentum=momentum,
        gamma=gamma,
        pairing="all",
        **others,
    )


def outer_step(
    theta: Any,
    state: NoLoCoState,
    *,
    inner_steps: int = 50,
    row: Sequence[int] | np.ndarray | None = None,
    alive: jax.Array | None = None,
    weight: jax.Array | None = None,
    **outer: Any,
) -> tuple[Any, NoLoCoState]:
    """The exchange by itself, with an exact hand-over: theta becomes phi, bit for bit.

    For a step that applies the inner updates first:

        tx = noloco(inner, axis_size=n, inner_steps=None)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        params, state = outer_step(params, state, axis_size=n, inner_steps=50)

    Does nothing unless `state.count` is a positive multiple of `inner_steps`. With a
    `row` the host decides instead: this call exchanges now, between these partners,
    and its program has one permute per parameter however many replicas there are.

        if step % 50 == 0:
            row = partners("round_robin", n, seed, step // 50 - 1)
            params, state = exchange(tuple(row.tolist()))(params, state)

    Args:
        theta: the replica's parameters after its inner step.
        state: the replica's, of `noloco` with the same arguments.
        inner_steps: H.
        row: int[axis_size] or int[stages, axis_size], static: `partners(...)`.
        alive: see `noloco`.
        weight: see `noloco`.
        **outer: of `noloco`: axis_size, outer_lr, momentum, gamma, nesterov,
            axis_name, pairing, group_size, seed, exchange, wire_dtype,
            error_feedback, mask, check.

    Returns:
        parameters and state, after the exchange if it was due.

    Raises:
        ValueError: see `noloco`.
    """
    outer.pop("slow_dtype", None)  # the state knows
    settings = Outer(**outer)
    check_settings(settings, inner_steps)

    def exchange_now(parts):
        return _exchange(settings, theta, parts, state, inner_steps, row, alive, weight)

    if row is not None:
        theta, parts = exchange_now(_parts(settings, state))
        return theta, state._replace(**parts)
    return _when_due(settings, state, inner_steps, exchange_now, theta)


def exchange_bytes(
    params: Any, *, axis_size: int, slow_dtype: Any = jnp.float32, **outer: Any
) -> int:
    """Bytes that a replica sends in one exchange: what `noloco` puts on the wire.

    With "all" the least that an all-reduce can do: 2 (N - 1) / N of the payload.

    Args:
        params: one replica's parameters, or their shapes.
        axis_size: number of replicas.
        slow_dtype: as of `noloco`.
        **outer: other arguments of `noloco`.
    """
    outer.pop("inner_steps", None)
    settings = Outer(axis_size, **outer)
    narrow = wire.wire_type(settings.wire_dtype)
    payload = sum(
        wire.message_bytes(x.shape, narrow, slow_dtype)
        for x in jax.tree.leaves(_exchanged(params, settings.mask))
    )
    if one_group(settings):
        return 2 * (axis_size - 1) * payload // axis_size
    tensors = 1 if settings.exchange == "fused" else 2
    return tensors * payload * table_of(settings).shape[1]


# ----------------------------------------------------------------- the exchange


def _when_due(
    outer: Outer,
    state: NoLoCoState,
    inner_steps: int,
    exchange_now: Callable[[Any], tuple[Any, Any]],
    otherwise: Any,
) -> tuple[Any, NoLoCoState]:
    """`exchange_now` if the count says so; else nothing, and `otherwise`."""
    parts = _parts(outer, state)
    result, parts = jax.lax.cond(
        (state.count % inner_steps == 0) & (state.count > 0),
        lambda parts: _varying(outer, exchange_now(parts)),
        lambda parts: (_varying(outer, otherwise), parts),
        parts,
    )
    return result, state._replace(**parts)


def _parts(outer: Outer, state: NoLoCoState) -> dict[str, Any]:
    """What an exchange changes; nothing else passes through the conditional."""
    check_axis(outer, state)
    names = ("slow", "momentum", "residual", "replica_std")
    return {name: _varying(outer, getattr(state, name)) for name in names}


def _exchange(
    outer: Outer,
    theta: Any,
    parts: dict[str, Any],
    state: NoLoCoState,
    inner_steps: int,
    row: Any,
    alive: jax.Array | None,
    weight: jax.Array | None,
) -> tuple[Any, dict[str, Any]]:
    """One outer step, by the formulas of the module: new theta and parts."""
    slow, residual = parts["slow"], parts["residual"]
    outer_round = state.count // inner_steps - 1
    rates = (outer.outer_lr, outer.momentum, gamma_of(outer))
    beta, alpha, gamma = (x(outer_round) if callable(x) else x for x in rates)

    fast = _exchanged(theta, outer.mask)
    delta = jax.tree.map(lambda p, s: p.astype(s.dtype) - s, fast, slow)
    fused = jax.tree.map(lambda d, s: beta * d + gamma * s, delta, slow)
    if one_group(outer):
        mean, spread = gossip.average_all(
            fused, outer.axis_name, outer.axis_size, alive, weight
        )
        drive = jax.tree.map(lambda x, s: x - gamma * s, mean, slow)
        spread = spread / jnp.maximum(beta, 1e-12) ** 2
    else:
        pair = outer.exchange == "pair"
        change, residual, spread = gossip.average_groups(
            (delta, slow) if pair else (fused,),
            residual,
            table_of(outer) if row is None else row_of(outer, row),
            0 if row is not None else (state.key, outer_round),
            outer.axis_name,
            wire.wire_type(outer.wire_dtype),
            alive,
            weight,
        )
        if pair:
            drive = jax.tree.map(
                lambda d, c, e: beta * (d + c) + gamma * e, delta, *change
            )
        else:
            drive = jax.tree.map(lambda d, c: beta * d + c, delta, *change)
            spread = spread / jnp.maximum(beta, 1e-12) ** 2

    momentum = jax.tree.map(
        lambda m, u: (alpha * m + u).astype(m.dtype), parts["momentum"], drive
    )
    step = momentum
    if outer.nesterov:
        step = jax.tree.map(lambda m, u: alpha * m + u, momentum, drive)
    slow = jax.tree.map(lambda s, d: (s + d).astype(s.dtype), slow, step)
    theta = jax.tree.map(
        lambda p, s: p if isinstance(s, optax.MaskedNode) else s.astype(p.dtype),
        theta,
        slow,
    )
    numbers = sum(x.size for x in jax.tree.leaves(slow))
    replica_std = jnp.sqrt(spread / max(numbers, 1)).astype(jnp.float32)
    return theta, {
        "slow": slow,
        "momentum": momentum,
        "residual": residual,
        "replica_std": replica_std,
    }


def _exchanged(tree: Any, mask: Any) -> Any:
    """The tree with optax's empty node in place of the leaves left out."""
    if mask is None:
        return tree
    mask = mask(tree) if callable(mask) else mask
    return jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), mask, tree)


def _varying(outer: Outer, tree: Any) -> Any:
    """Marks arrays as the replica's own, where shard_map keeps track of that.

    Both branches of a conditional must agree on it, and a constant does not vary.
    """
    axis = outer.axis_name
    if axis not in jax.sharding.get_abstract_mesh().manual_axes:
        return tree

    def mark(x):
        if axis in jax.typeof(x).manual_axis_type.varying:
            return x
        return jax.lax.pcast(x, axis, to="varying")

    return jax.tree.map(mark, tree)
