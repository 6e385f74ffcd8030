"""Averages within a group of replicas, as changes to each one's own numbers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.optim.pairing import row_index
from jaxlab.optim.wire import decode, encode


def average_groups(
    payload: tuple[Any, ...],
    residual: Any,
    table_rsn: np.ndarray,
    choice: tuple[jax.Array, Any] | int,
    axis_name: str,
    wire: str | None,
    alive: jax.Array | None,
    weight: jax.Array | None,
) -> tuple[Any, Any, jax.Array]:
    """Mean over the replica's group minus its own payload, by permutes alone.

    Each stage adds `share (q(partner's) - q(own))`: what one gains the other loses.

    Args:
        payload: trees of this replica's numbers.
        residual: like `payload`: what the wire rounded off so far; () for none.
        table_rsn: int[rows, stages, replicas], see `pairing`.
        choice: (key, round) draws the row; a number is the row.
        axis_name: of the replicas.
        wire: see `wire.encode`.
        alive: bool[replicas] or None.
        weight: float[replicas] or None.

    Returns:
        the change, like `payload`; the new residual; and float32[], half the sum of
        squares of (partner's - own), of the sum of the trees: NaN without a partner.
    """
    rows, stages, replicas = table_rsn.shape
    if isinstance(choice, tuple):
        index = row_index(*choice, rows)
        partner_sn = jnp.asarray(table_rsn)[index]
    else:
        index, partner_sn = choice, jnp.asarray(table_rsn[choice])
    if alive is not None and weight is not None and stages > 1:
        raise ValueError("alive and weight together need group_size 2")
    me = jax.lax.axis_index(axis_name) if replicas > 1 else 0

    own, shape = jax.tree.flatten(payload)
    changes = [jnp.zeros_like(x) for x in own]
    kept = jax.tree.leaves(residual)
    spread = jnp.float32(jnp.nan)
    weight_n = weight
    for stage in range(stages):
        paired_n, share_n, weight_n = _shares(partner_sn[stage], alive, weight_n)
        paired, share = paired_n[me], share_n[me]
        held = [x + c for x, c in zip(own, changes, strict=True)]
        meant = [x + e for x, e in zip(held, kept, strict=True)] if kept else held
        messages = [encode(x, wire) for x in meant]
        received = _permute(messages, index, table_rsn[:, stage], axis_name)
        sent = [decode(m, wire, x.dtype) for m, x in zip(messages, own, strict=True)]
        got = [decode(m, wire, x.dtype) for m, x in zip(received, own, strict=True)]
        apart = [a - b for a, b in zip(got, sent, strict=True)]
        if kept:
            kept = [
                jnp.where(paired, x - s, e)
                for x, s, e in zip(meant, sent, kept, strict=True)
            ]
        changes = [
            c + share.astype(c.dtype) * d for c, d in zip(changes, apart, strict=True)
        ]
        if stage == 0:
            trees = jax.tree.unflatten(shape, apart)
            spread = _sum_of_squares(jax.tree.map(lambda *d: sum(d), *trees)) / 2
            spread = jnp.where(paired, spread, jnp.nan)
    if kept:
        residual = jax.tree.unflatten(jax.tree.structure(residual), kept)
    return jax.tree.unflatten(shape, changes), residual, spread


def _shares(
    partner_n: jax.Array, alive: jax.Array | None, weight_n: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Who has a partner, the partner's share of the average, and the pair's weight."""
    paired_n = partner_n != jnp.arange(len(partner_n))
    if alive is not None:
        paired_n &= alive & alive[partner_n]
    if weight_n is None:
        return paired_n, 0.5 * paired_n, None
    theirs_n = weight_n[partner_n]
    both_n = weight_n + theirs_n
    share_n = theirs_n / jnp.where(both_n > 0, both_n, 1)
    both_n = jnp.where(paired_n, both_n, weight_n)
    return paired_n, jnp.where(paired_n, share_n, 0), both_n


def _permute(messages: Any, index: Any, table_rn: np.ndarray, axis_name: str) -> Any:
    """Swaps messages along row `index`; one branch of the program for each row."""
    if table_rn.shape[1] == 1:
        return messages

    def swap(partner, messages):
        # A replica that is left out would receive zeros, so byes send to themselves.
        pairs = [(i, int(j)) for i, j in enumerate(partner)]
        return jax.lax.ppermute(messages, axis_name, pairs)

    return jax.lax.switch(index, [partial(swap, row) for row in table_rn], messages)


def average_all(
    payload: Any,
    axis_name: str,
    axis_size: int,
    alive: jax.Array | None,
    weight: jax.Array | None,
) -> tuple[Any, jax.Array]:
    """Mean over all replicas, by one all-reduce; who is not alive keeps its own.

    Returns:
        the mean, and float32[]: the sum of squares of (mean - own), corrected for
        the number of replicas.
    """
    if axis_size == 1:
        return payload, jnp.float32(0)
    if alive is None and weight is None:
        mean = jax.lax.pmean(payload, axis_name)
    else:
        weight_n = jnp.ones(axis_size) if weight is None else weight
        weight_n = weight_n if alive is None else jnp.where(alive, weight_n, 0)
        mine = weight_n[jax.lax.axis_index(axis_name)]
        share = mine / jnp.maximum(jnp.sum(weight_n), 1e-30)
        mean = jax.lax.psum(
            jax.tree.map(lambda x: x * share.astype(x.dtype), payload), axis_name
        )
        mean = jax.tree.map(lambda a, x: jnp.where(mine > 0, a, x), mean, payload)
    spread = _sum_of_squares(jax.tree.map(jnp.subtract, mean, payload))
    return mean, spread * axis_size / (axis_size - 1)


def _sum_of_squares(tree: Any) -> jax.Array:
    return sum(
        (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)),
        jnp.float32(0),
    )
