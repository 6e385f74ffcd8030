"""The arguments of the outer step, and what can be wrong with them."""

import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxlab.optim import wire
from jaxlab.optim.pairing import check_table, pairing_table
from jaxlab.optim.stability import contraction, gamma_max


class Outer(NamedTuple):
    """The arguments of `noloco` that the outer step needs."""

    axis_size: int
    outer_lr: optax.ScalarOrSchedule = 0.7
    momentum: optax.ScalarOrSchedule = 0.5
    gamma: optax.ScalarOrSchedule | None = None
    nesterov: bool = False
    axis_name: str = "replica"
    pairing: Any = "round_robin"
    group_size: int = 2
    seed: int = 0
    exchange: str = "fused"
    wire_dtype: Any = None
    error_feedback: bool = False
    mask: Any = None
    check: bool = True


def one_group(outer: Outer) -> bool:
    """Whether all replicas are one group, averaged by an all-reduce."""
    return isinstance(outer.pairing, str) and outer.pairing == "all"


def gamma_of(outer: Outer) -> optax.ScalarOrSchedule:
    """The gossip's strength; `outer_lr` unless given."""
    return outer.outer_lr if outer.gamma is None else outer.gamma


def table_of(outer: Outer) -> np.ndarray:
    """The pairing's table, int32[rows, stages, replicas]."""
    return pairing_table(outer.pairing, outer.axis_size, outer.seed, outer.group_size)


def row_of(outer: Outer, row: Any) -> np.ndarray:
    """A table of the one row that the host has chosen."""
    row = np.asarray(row)
    return check_table(row[None, None] if row.ndim == 1 else row[None], outer.axis_size)


def check_settings(outer: Outer, inner_steps: int | None) -> None:
    """Raises ValueError for what can be known to be wrong before tracing."""
    if inner_steps is not None and inner_steps < 1:
        raise ValueError(f"inner_steps is {inner_steps}; it must be at least 1")
    if outer.axis_size < 1:
        raise ValueError(f"axis_size is {outer.axis_size}; it must be at least 1")
    if outer.exchange not in ("fused", "pair"):
        raise ValueError(f"exchange is {outer.exchange!r}; choose fused or pair")
    narrow = wire.wire_type(outer.wire_dtype) is not None
    if outer.error_feedback and not narrow:
        raise ValueError("error_feedback has nothing to feed back without a wire_dtype")
    if one_group(outer) and (narrow or outer.exchange == "pair"):
        raise ValueError(
            "wire_dtype and exchange='pair' are for gossip: pairing 'all' is one "
            "all-reduce of slow_dtype"
        )
    stages = 1 if one_group(outer) else table_of(outer).shape[1]
    if outer.error_feedback and stages > 1:
        raise ValueError("error_feedback needs group_size 2")
    if not outer.check or outer.axis_size == 1:
        return
    group = outer.axis_size if one_group(outer) else 2**stages
    rounds = [0, *(2**k for k in range(17))]  # a schedule is sampled
    scheduled = callable(outer.momentum) or callable(gamma_of(outer))
    for outer_round in rounds if scheduled else rounds[:1]:
        alpha, gamma = (
            np.asarray(x(outer_round) if callable(x) else x).item()
            for x in (outer.momentum, gamma_of(outer))
        )
        _check_stability(alpha, gamma, outer.axis_size, group, outer.nesterov)


def _check_stability(
    alpha: float, gamma: float, axis_size: int, group: int, nesterov: bool
) -> None:
    if not 0 <= alpha < 1:
        raise ValueError(f"momentum is {alpha}; it must be at least 0 and below 1")
    kind = "Nesterov momentum" if nesterov else "momentum"
    bound = gamma_max(alpha, axis_size, group, nesterov=nesterov)
    if not 0 <= gamma < bound:
        raise ValueError(
            f"gamma {gamma:.4g} is unstable: with {kind} {alpha:.4g}, {axis_size} "
            f"replicas and groups of {group} it must be below {bound:.4f} "
            "(jaxlab.optim.gamma_max)"
        )
    factor = contraction(alpha, gamma, axis_size, group, nesterov=nesterov)
    if factor > 0.95 and group < axis_size:
        warnings.warn(
            f"gamma {gamma:.4g} with momentum {alpha:.4g} hardly holds {axis_size} "
            f"replicas together: a round leaves {factor:.3f} of their variance",
            stacklevel=4,
        )


def check_axis(outer: Outer, state: Any) -> None:
    """Raises ValueError where the trace shows what would hang or be wrong."""
    if state.count.shape:
        raise ValueError(
            f"state.count has shape {state.count.shape} instead of (): all replicas "
            "share count and key (see replica_specs and replica_axes)"
        )
    if outer.axis_size == 1:
        return
    try:
        size = jax.lax.axis_size(outer.axis_name)
    except NameError:
        raise ValueError(
            f"there is no axis {outer.axis_name!r} here: call update inside "
            f"jax.shard_map or jax.vmap(axis_name={outer.axis_name!r})"
        ) from None
    if size != outer.axis_size:
        raise ValueError(
            f"axis_size is {outer.axis_size}, and axis {outer.axis_name!r} has {size}"
        )
    for name in ("count", "key"):
        x = getattr(state, name)
        if outer.axis_name in jax.typeof(x).manual_axis_type.varying:
            raise ValueError(
                f"state.{name} varies over {outer.axis_name!r}, so replicas could "
                "disagree on when to exchange and wait for ever: give it the spec "
                "P() (see replica_specs)"
            )
