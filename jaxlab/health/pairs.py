"""Who exchanges with whom, given how long messages take: tables for `jaxlab.optim`."""

import math
from functools import partial
from typing import Any

import numpy as np

from jaxlab.health.rings import Cost, bisect, link_delays, no_way, slack

EXACT_PAIRS = 12
"""Most nodes whose best matching is found, not searched for."""


def plan_pairs(delay: Any, rows: int | None = None, *, seed: int = 0) -> np.ndarray:
    """A table of pairings that meet over fast links, for `noloco(pairing=...)`.

    Row after row is the matching whose slowest pair is fastest, and then whose sum is
    least, among the pairs that no earlier row has. So slow pairs come last or never.
    Replicas agree only if the pairs connect them all: rows are added until they do
    (half of all rows always suffice).

    Args:
        delay: float[n, n], as in `plan`. A pair is as slow as the slower of its
            directions: an exchange waits for both.
        rows: at least; None: n // 2.
        seed: of the search; up to `EXACT_PAIRS` nodes nothing is searched for.

    Returns:
        int32[rows, n]: each replica's partner; itself where an odd one has a bye, which
        comes to a replica at most once.

    Raises:
        ValueError: delay cannot be used, there are not so many rows of different
            pairs, or a row would need an unreachable pair.
    """
    edge = link_delays(delay, both_ways=True)
    n = len(edge)
    most = max(n - 1 + n % 2, 1)
    wanted = max(n // 2, 1) if rows is None else rows
    if not 1 <= wanted <= most:
        raise ValueError(f"rows is {wanted}; {n} nodes have 1 to {most} rows of pairs")
    if n == 1:
        return np.zeros((1, 1), np.int32)
    # The node that is not there: whom it meets has a bye.
    left = np.pad(edge, (0, n % 2))
    rng, own, table = np.random.default_rng(seed), np.arange(n), []
    group = own.copy()  # smallest replica that one is connected with
    while len(table) < wanted or group.any():
        pairs = _best_pairs(left, rng)
        if not np.isfinite(left[pairs[:, 0], pairs[:, 1]]).all():
            what = f"no row {len(table)} of pairs that have not met"
            cut = not np.isfinite(edge).all()
            raise ValueError(no_way(edge, what) if cut else f"{what} is left")
        partner = np.empty(len(left), int)
        partner[pairs], partner[pairs[:, ::-1]] = pairs[:, ::-1], pairs
        left[partner, np.arange(len(left))] = np.inf
        row = np.where(partner[:n] < n, partner[:n], own)
        table.append(row)
        for pair in enumerate(row):
            low, high = sorted(group[list(pair)])
            group[group == high] = low
    return np.array(table, np.int32)


def _best_pairs(edge: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The best matching, int[n / 2, 2], of an even number of nodes."""
    n = len(edge)
    if n <= EXACT_PAIRS:
        limit, pairs = _match(edge, max)
        if math.isfinite(limit):
            _, pairs = _match(np.where(edge <= limit, edge, np.inf), float.__add__)
        return pairs

    def cost(order: np.ndarray) -> Cost:
        used = edge[order[::2], order[1::2]]
        return Cost(float(used.max()), math.fsum(used))

    apart = edge + np.diag(np.full(n, np.inf))
    search = partial(_search_pairs, rng=rng, kicks=max(10, 2000 // n))
    start = np.array(_nearest_pairs(apart)).ravel()
    low = float(apart.min(1).max())
    return bisect(start, (edge,), (edge,), low, 0.0, cost, search).reshape(-1, 2)


def _match(edge: np.ndarray, join: Any) -> tuple[float, np.ndarray]:
    """By dynamic programming over subsets: the lowest node left, with every other."""
    best: dict[int, tuple[float, tuple[tuple[int, int], ...]]] = {0: (0.0, ())}
    for mask in range(3, 1 << len(edge)):
        if mask.bit_count() % 2:
            continue
        first = (mask & -mask).bit_length() - 1
        rest = mask & (mask - 1)
        options = []
        for other in range(first + 1, len(edge)):
            if rest >> other & 1:
                value, pairs = best[rest & ~(1 << other)]
                value = join(value, float(edge[first, other]))
                options.append((value, (*pairs, (first, other))))
        best[mask] = min(options, key=lambda option: option[0])
    value, pairs = best[(1 << len(edge)) - 1]
    return value, np.array(pairs)


def _nearest_pairs(edge: np.ndarray) -> list[tuple[int, int]]:
    """Always the fastest pair of those left."""
    free, pairs = np.ones(len(edge), bool), []
    for place in np.argsort(edge, axis=None, kind="stable"):
        i, j = divmod(int(place), len(edge))
        if i != j and free[i] and free[j]:
            free[[i, j]] = False
            pairs.append((i, j))
    return pairs


def _search_pairs(
    order: np.ndarray,
    edges: tuple[np.ndarray, ...],
    *,
    rng: np.random.Generator,
    kicks: int,
) -> np.ndarray:
    """Exchanges between pairs while they lower the sum, kicked out of its optima."""
    (edge,) = edges
    best = _improve_pairs(order, edge)
    value = edge[best[::2], best[1::2]].sum()
    for _ in range(kicks):
        kicked = best.copy()
        chosen = rng.choice(best.size, 4, replace=False)
        kicked[chosen] = kicked[np.roll(chosen, 1)]
        found = _improve_pairs(kicked, edge)
        reached = edge[found[::2], found[1::2]].sum()
        if reached < value - 1e-9:
            best, value = found, reached
    return best


def _improve_pairs(order: np.ndarray, edge: np.ndarray) -> np.ndarray:
    order, least_gain = order.copy(), slack(edge)
    while True:
        a, b = order[::2], order[1::2]
        used = edge[a, b]
        old = used[:, None] + used
        straight = edge[np.ix_(a, a)] + edge[np.ix_(b, b)] - old  # (a, a'), (b, b')
        crossed = edge[np.ix_(a, b)] + edge[np.ix_(b, a)] - old  # (a, b'), (b, a')
        np.fill_diagonal(straight, 0.0)
        gain = np.minimum(straight, crossed)
        i, j = (int(k) for k in np.unravel_index(int(gain.argmin()), gain.shape))
        if gain[i, j] > -least_gain:
            return order
        swap = 2 * j if straight[i, j] < crossed[i, j] else 2 * j + 1
        order[[2 * i + 1, swap]] = order[[swap, 2 * i + 1]]
