"""Searches behind `plan`: the best order of a ring, and the worst link by bisection.

`worst` and `total` are float[n, n]: the cost of a link where the slowest one counts,
and where the sum does. They are the same for a plain ring, and differ where a node
stands for many (a slice of a mesh). Diagonals are 0; inf is out of reach.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

EXACT_RING = 12
"""Longest ring whose best order is found, not searched for."""


class Cost(NamedTuple):
    """Of a plan, seconds. Compares as it should: the worst link first."""

    worst: float
    total: float


Costs = Callable[[np.ndarray], Cost]


# ----------------------------------------------------------------------- the matrix


def link_delays(delay: Any, both_ways: bool) -> np.ndarray:
    """Seconds of each link, float[n, n], diagonal 0, inf where out of reach."""
    edge = np.array(delay, float)
    if edge.ndim != 2 or edge.shape[0] != edge.shape[1] or not len(edge):
        raise ValueError(f"delay has shape {edge.shape}; it must be [n, n]")
    np.fill_diagonal(edge, 0.0)
    if (edge < 0).any():
        i, j = np.argwhere(edge < 0)[0]
        raise ValueError(f"delay[{i}, {j}] is {edge[i, j]} s; it cannot be negative")
    other = np.isnan(edge)
    edge[other] = edge.T[other]
    if both_ways:
        edge = np.maximum(edge, edge.T)
    apart = ~np.eye(len(edge), dtype=bool)
    measured = edge[apart & np.isfinite(edge)]
    if len(edge) > 1 and not measured.size:
        raise ValueError(f"delay has no finite entry between {len(edge)} nodes")
    return np.where(np.isnan(edge), measured.max(initial=0.0), edge)


def check_reach(edge: np.ndarray, both_ways: bool) -> None:
    """Raises ValueError naming a node with too few links for any ring."""
    n = len(edge)
    reach = np.isfinite(edge) & ~np.eye(n, dtype=bool)
    wanted = 2 if both_ways and n > 2 else min(1, n - 1)
    for i in range(n):
        for links, what in ((reach[i], "reaches"), (reach[:, i], "is reached by")):
            if links.sum() < wanted:
                others = np.flatnonzero(links).tolist()
                raise ValueError(
                    f"node {i} {what} only {others or 'none'} of {n} nodes; a ring "
                    f"needs {wanted}: leave it out"
                )


def no_way(edge: np.ndarray, what: str) -> str:
    """What to say where every plan needs a link that is out of reach."""
    cut = [f"{i}->{j}" for i, j in np.argwhere(np.isinf(edge))]
    more = ", ..." if len(cut) > 6 else ""
    return f"{what} was found without the unreachable {', '.join(cut[:6])}{more}"


def least(plans: Iterable[np.ndarray], cost: Costs, noise: float) -> np.ndarray:
    """The smallest sum among plans whose worst link is the best one but for noise."""
    costs = [(cost(plan), plan) for plan in plans]
    limit = (1 + noise) * min(c.worst for c, _ in costs)
    inside = [(c.total, c.worst, i) for i, (c, _) in enumerate(costs)]
    return costs[min(t for t in inside if t[1] <= limit)[2]][1]


def better(found: Cost, given: Cost, noise: float) -> bool:
    """Whether a plan gains more than noise, in the worst link or else in the sum."""
    return found.worst < (1 - noise) * given.worst or (
        found.worst <= given.worst and found.total < (1 - noise) * given.total
    )


# ------------------------------------------------------------------------ the order


def ring_total(order: np.ndarray, worst: np.ndarray, total: np.ndarray) -> Cost:
    """Of the ring through these nodes."""
    if len(order) < 2:
        return Cost(0.0, 0.0)
    after = np.roll(order, -1)
    return Cost(float(worst[order, after].max()), math.fsum(total[order, after]))


def best_ring(
    worst: np.ndarray, total: np.ndarray, noise: float, seed: int
) -> np.ndarray:
    """The best order, from node 0.

    Exact up to `EXACT_RING` nodes: dynamic programming over subsets (Held and Karp,
    1962), first for the bottleneck and then for the sum without slower links.
    """
    n = len(worst)
    given = np.arange(n)
    if n <= 3 and (worst == worst.T).all():
        return given
    if n <= EXACT_RING:
        limit, order = _subsets(worst, np.maximum)
        if math.isfinite(limit):
            _, order = _subsets(
                np.where(worst <= limit * (1 + noise), total, np.inf), np.add
            )
        return order
    rng = np.random.default_rng(seed)
    symmetric = (worst == worst.T).all()
    nearest = np.partition(worst + np.diag(np.full(n, np.inf)), 1, axis=1)
    low = max(spanning(worst), nearest[:, 1 if symmetric else 0].max())
    # One way, turning a part of the ring costs, and 2-opt is stuck sooner.
    kicks = max(10, min(60 if symmetric else 200, 2000 // n))
    search = partial(_search_ring, rng=rng, kicks=kicks)
    cost = partial(ring_total, worst=worst, total=total)
    starts = [given, _greedy(total, 0)]
    starts += [_greedy(total, int(rng.integers(n))) for _ in range(min(2, 400 // n))]
    runs = [bisect(s, (total,), (worst,), low, noise, cost, search) for s in starts]
    order = least(runs, cost, noise)
    return np.roll(order, -int(np.argmin(order)))


def _subsets(edge: np.ndarray, join: Callable) -> tuple[float, np.ndarray]:
    """The best ring by dynamic programming; `join` adds a link to a path's cost."""
    n = len(edge) - 1  # node 0 begins and ends the ring; the others are bits
    between = edge[1:, 1:]
    cost = np.full((1 << n, n), np.inf)
    cost[1 << np.arange(n), np.arange(n)] = edge[0, 1:]
    absent = [[k for k in range(n) if not mask >> k & 1] for mask in range(1 << n)]
    for mask in range(1, (1 << n) - 1):
        longer = join(cost[mask][:, None], between).min(0)
        for k in absent[mask]:
            cost[mask | 1 << k, k] = longer[k]
    mask = (1 << n) - 1
    ends = join(cost[mask], edge[1:, 0])
    last = int(ends.argmin())
    best, order = float(ends[last]), [last]
    if not math.isfinite(best):
        return best, np.arange(n + 1)
    while mask := mask & ~(1 << last):
        last = int(join(cost[mask], between[:, last]).argmin())
        order.append(last)
    return best, np.array([0, *(k + 1 for k in reversed(order))])


def spanning(edge: np.ndarray) -> float:
    """The slowest link that joining all nodes needs (Prim): no ring does better."""
    near = np.minimum(edge, edge.T)
    reach, inside, slowest = near[0].copy(), np.zeros(len(edge), bool), 0.0
    inside[0] = True
    for _ in range(len(edge) - 1):
        k = int(np.where(inside, np.inf, reach).argmin())
        slowest = max(slowest, float(reach[k]))
        inside[k], reach = True, np.minimum(reach, near[k])
    return slowest


def _greedy(edge: np.ndarray, first: int) -> np.ndarray:
    """Always on to the nearest node that is left."""
    order, left = [first], np.ones(len(edge), bool)
    for _ in range(len(edge) - 1):
        left[order[-1]] = False
        choice = np.where(left, edge[order[-1]], np.inf)
        free = np.flatnonzero(left)
        order.append(int(free[choice[free].argmin()]))
    return np.array(order)


def bisect(
    order: np.ndarray,
    totals: tuple[np.ndarray, ...],
    worsts: tuple[np.ndarray, ...],
    low: float,
    noise: float,
    cost: Costs,
    search: Callable[[np.ndarray, tuple[np.ndarray, ...]], np.ndarray],
) -> np.ndarray:
    """Lowers the worst link as far as `search` can, and then the sum.

    `search` minimises a sum only, so links slower than the limit are made to cost
    more than any ring without them; those out of reach cost more still.
    """
    levels = np.unique(np.concatenate([w[np.isfinite(w)] for w in worsts]))

    def attempt(limit: float) -> np.ndarray:
        limit = min(limit, float(levels[-1]))
        cells = order.size * len(totals)
        scale = max(
            float(np.where(w <= limit, t, 0.0).max())
            for t, w in zip(totals, worsts, strict=True)
        )
        charged = tuple(
            np.where(
                w <= limit,
                np.where(np.isfinite(t), t, 0.0) / (scale or 1.0),
                np.where(np.isfinite(w), 2.0 * cells, 4.0 * cells * cells),
            )
            for t, w in zip(totals, worsts, strict=True)
        )
        return search(order, charged)

    bottom = int(np.searchsorted(levels, low))
    middle = bottom  # the bound itself is often reached
    while levels[bottom:].size and cost(order).worst > levels[bottom]:
        found = attempt(float(levels[middle]))
        order = min(order, found, key=cost)
        if cost(found).worst > levels[middle]:
            bottom = middle + 1
        top = int(np.searchsorted(levels, cost(order).worst))
        middle = min((bottom + top) // 2, len(levels) - 1)
        if bottom >= top:
            break
    return least([order, attempt(cost(order).worst * (1 + noise))], cost, noise)


def _search_ring(
    order: np.ndarray,
    edges: tuple[np.ndarray, ...],
    *,
    rng: np.random.Generator,
    kicks: int,
) -> np.ndarray:
    """A ring of small sum: local search, kicked out of its optima."""
    (edge,) = edges
    best = _improve_ring(order, edge)
    value = edge[best, np.roll(best, -1)].sum()
    for _ in range(kicks):
        a, b, c = np.sort(rng.choice(np.arange(1, len(best)), 3, replace=False))
        kicked = np.concatenate([best[:a], best[b:c], best[a:b], best[c:]])
        found = _improve_ring(kicked, edge)
        reached = edge[found, np.roll(found, -1)].sum()
        if reached < value - 1e-9:
            best, value = found, reached
    return best


def slack(edge: np.ndarray) -> float:
    """What rounding can make of a change that is none; smaller gains are none."""
    return 1e-9 + 1e-14 * len(edge) * float(edge.max())


def _improve_ring(order: np.ndarray, edge: np.ndarray) -> np.ndarray:
    """2-opt, and Or-opt where that is stuck, until neither helps."""
    least_gain = slack(edge)
    while True:
        between = edge[np.ix_(order, order)]
        moved = _two_opt(order, between, least_gain)
        if moved is None:
            moved = _or_opt(order, between, least_gain)
        if moved is None:
            return order
        order = moved


def _two_opt(
    order: np.ndarray, between: np.ndarray, least_gain: float
) -> np.ndarray | None:
    """The best reversal of a part of the ring, if any helps."""
    n = len(order)
    forth, back = np.diag(between, 1), np.diag(between, -1)
    turned = np.concatenate([[0.0], np.cumsum(back - forth)])  # cost of reversing
    after = np.append(forth, between[-1, 0])  # of the link that leaves each place
    ahead = np.roll(between, (-1, -1), (0, 1))
    gain = between + ahead - after[:, None] - after
    gain[:-1] += turned - turned[1:, None]
    gain[np.tri(n, dtype=bool)] = 0.0
    i, j = np.unravel_index(int(gain.argmin()), gain.shape)
    if gain[i, j] > -least_gain:
        return None
    moved = order.copy()
    moved[i + 1 : j + 1] = moved[i + 1 : j + 1][::-1]
    return moved


def _or_opt(
    order: np.ndarray, between: np.ndarray, least_gain: float
) -> np.ndarray | None:
    """The best move of up to three neighbours elsewhere, turned or not, if any."""
    n = len(order)
    place = np.arange(n)
    after = between[place, (place + 1) % n]
    before = between[(place + 1) % n, place]
    best = (-least_gain, 0, 0, 0, False)
    for length in range(1, min(3, n - 3) + 1):
        last, left = (place + length - 1) % n, (place - 1) % n
        right = (last + 1) % n
        freed = between[left, right] - after[left] - after[last]
        inside = sum(
            (before - after)[(place + k) % n] for k in range(length - 1)
        ) + np.zeros(n)
        offset = (place - place[:, None]) % n  # of the gap, from the part's first node
        allowed = (offset >= length) & (offset <= n - 2)
        nexts = (place + 1) % n
        for turned in (False, True):
            first, final = (last, place) if turned else (place, last)
            gain = between[:, first].T + between[final][:, nexts] - after
            gain = gain + (freed + turned * inside)[:, None]
            gain = np.where(allowed, gain, 0.0)
            i, gap = np.unravel_index(int(gain.argmin()), gain.shape)
            if gain[i, gap] < best[0]:
                best = (gain[i, gap], length, int(i), int(gap), turned)
    _, length, i, gap, turned = best
    if not length:
        return None
    rolled = np.roll(order, -i)
    part, rest = rolled[:length], rolled[length:]
    cut = (gap - i) % n - length + 1
    return np.concatenate([rest[:cut], part[::-1] if turned else part, rest[cut:]])
