"""Who exchanges with whom: tables of partners, and the row of each round.

A table is int[rows, stages, replicas]. Each row of each stage names every replica's
partner and is its own inverse; a replica that is its own partner has a bye. A round
uses one row. Groups of two take one stage, groups of 2^k take k: after stage s each
replica has averaged with 2^s others.

Rows are drawn without replacement, in an order that is shuffled anew whenever the
table is used up. Walking the table in its own order resonates with the momentum and
diverges (tests/test_pairing.py shows it at 16 replicas).
"""

from typing import Any

import jax
import numpy as np

MAX_ROWS = 32
"""Rows in a program at most: more mix hardly better, and compile ever slower."""


def round_robin(axis_size: int, rows: np.ndarray | None = None) -> np.ndarray:
    """Rows in which every two replicas meet exactly once, by the circle method.

    Args:
        axis_size: number of replicas.
        rows: which rows to make; None: all.

    Returns:
        int32[rows, axis_size]: axis_size - 1 rows, or with an odd number
        axis_size rows, each with one bye.
    """
    seats = axis_size + axis_size % 2
    circle = max(seats - 1, 1)  # all but the last seat, which stays in the middle
    row_r1 = (np.arange(circle) if rows is None else np.asarray(rows))[:, None]
    own_n = np.arange(axis_size)
    table = (2 * row_r1 - own_n) % circle
    table = np.where(table == own_n, seats - 1, table)  # meets the one in the middle
    table = np.where(own_n == seats - 1, row_r1, table)
    table = np.where(table >= axis_size, own_n, table)  # the empty seat: a bye
    return table.astype(np.int32)


def random_groups(
    axis_size: int, group_size: int, rows: int, rng: np.random.Generator
) -> np.ndarray:
    """Uniformly random partitions into groups; those left over have a bye.

    Returns:
        int32[rows, log2(group_size), axis_size].
    """
    stages = group_size.bit_length() - 1
    own = np.arange(axis_size, dtype=np.int32)
    table = np.tile(own, (rows, stages, 1))
    for partner_sn in table:
        members = rng.permutation(axis_size)[: axis_size // group_size * group_size]
        groups = members.reshape(-1, group_size)
        for stage, partner in enumerate(partner_sn):
            partner[groups] = groups[:, np.arange(group_size) ^ (1 << stage)]
    return table


def pairing_table(
    pairing: str | np.ndarray, axis_size: int, seed: int = 0, group_size: int = 2
) -> np.ndarray:
    """The table of a pairing; a pure function of its arguments.

    Args:
        pairing: "round_robin" (`MAX_ROWS` of its rows, drawn by `seed`, if it has
            more; random partitions for groups of more than two), "random"
            partitions, or a table of yours: int[rows, replicas] or
            int[rows, stages, replicas].
        axis_size: number of replicas.
        seed: of what is drawn.
        group_size: 2, 4, 8, ...

    Returns:
        int32[rows, log2(group_size), axis_size].

    Raises:
        ValueError: no such pairing or group size, or a row that does not pair.
    """
    rng = np.random.default_rng(seed)
    if not isinstance(pairing, str):
        table = np.asarray(pairing)
        table = table[:, None] if table.ndim == 2 else table
    elif group_size < 2 or group_size & (group_size - 1):
        raise ValueError(f"group_size is {group_size}; it must be a power of 2")
    elif pairing == "round_robin" and group_size == 2:
        rows = rng.permutation(max(axis_size - 1 + axis_size % 2, 1))[:MAX_ROWS]
        table = round_robin(axis_size, np.sort(rows))[:, None]
    elif pairing in ("round_robin", "random"):
        table = random_groups(axis_size, group_size, MAX_ROWS, rng)
    else:
        raise ValueError(
            f"no pairing {pairing!r}: choose round_robin, random, all, or give a table"
        )
    return check_table(table, axis_size)


def check_table(table: Any, axis_size: int) -> np.ndarray:
    """The table as int32[rows, stages, axis_size], checked.

    Raises:
        ValueError: its shape is another, or a row is not its own inverse.
    """
    table = np.asarray(table)
    if table.ndim != 3 or not len(table) or table.shape[2] != axis_size:
        raise ValueError(
            f"the pairing table has shape {table.shape} instead of "
            f"[rows, stages, {axis_size}]"
        )
    own = np.arange(axis_size)
    for (row, stage), partner in (
        (place, table[place]) for place in np.ndindex(table.shape[:2])
    ):
        inside = ((partner >= 0) & (partner < axis_size)).all()
        if not inside or (partner[partner] != own).any():
            raise ValueError(
                f"row {row} of the pairing table (stage {stage}) does not pair: "
                f"{partner.tolist()} is not its own inverse"
            )
    return table.astype(np.int32)


def key_data(seed: int) -> jax.Array:
    """uint32[2]: what a state keeps of the seed; the same under every `jax.config`."""
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def row_index(key: jax.Array, outer_round: Any, rows: int) -> jax.Array:
    """int32[]: the row of a round. Traced or not; `key` is of `key_data`."""
    epoch, position = outer_round // rows, outer_round % rows
    epoch_key = jax.random.fold_in(
        jax.random.wrap_key_data(key, impl="threefry2x32"), epoch
    )
    return jax.random.permutation(epoch_key, rows)[position]


def partners(
    pairing: str | np.ndarray,
    axis_size: int,
    seed: int,
    outer_round: int,
    *,
    group_size: int = 2,
) -> np.ndarray:
    """Partner of each replica in a round, computed on the host.

    The same on every host and in the compiled program, with nothing negotiated.

    Args:
        pairing: as in `pairing_table`; not "all", which pairs nobody.
        axis_size: number of replicas.
        seed: of `noloco`.
        outer_round: from 0.
        group_size: as in `noloco`.

    Returns:
        int32[axis_size]; i itself where i has a bye. For larger groups
        int32[log2(group_size), axis_size], one row a stage.
    """
    table = pairing_table(pairing, axis_size, seed, group_size)
    row = table[int(row_index(key_data(seed), outer_round, len(table)))]
    return row[0] if len(row) == 1 else row
