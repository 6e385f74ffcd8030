"""Where each device goes, given how long messages take between every two of them.

A collective over n devices runs around a ring, and its slowest link sets its speed
(C4, arXiv 2406.04594, plans traffic for that reason). Plans here minimise the worst
link that is used first, and then the sum of all; where nothing is gained the given
order stays.

`delay` is float[n, n] in seconds, rows the source and columns the destination, as
`ppermute_probe` measures it. The diagonal is ignored. inf: unreachable, never used.
NaN: not measured; it counts like the other direction or, where neither was measured,
like the slowest link that was, so that a plan never prefers the unknown. `both_ways`
(the default) gives a link the slower of its two directions: XLA may run its rings
either way.

A node that is slow in all its links cannot be avoided, only left out: compare
`ring_cost` before and after. What orders a ring is a host's network as XLA's Gloo
collectives use it, which follow the mesh; NCCL and TPUs find rings of their own.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from jaxlab.health.rings import (
    Cost,
    best_ring,
    better,
    bisect,
    check_reach,
    least,
    link_delays,
    no_way,
    ring_total,
    slack,
    spanning,
)

EXACT_GRID = 9
"""Most devices of a mesh of several axes for which every arrangement is tried."""


# ---------------------------------------------------------------------------- rings


def ring_cost(delay: Any, order: Any, *, both_ways: bool = True) -> Cost:
    """The slowest link of a ring, and the sum over its links.

    Args:
        delay: float[n, n], see the module.
        order: int[n]; each sends to the next, the last to the first.
        both_ways: a link is as slow as the slower of its directions.

    Raises:
        ValueError: delay cannot be used, or order is no permutation of its nodes.
    """
    edge = link_delays(delay, both_ways)
    nodes = np.asarray(order, int)
    if sorted(nodes.tolist()) != list(range(len(edge))):
        raise ValueError(
            f"order {tuple(order)} does not name each of {len(edge)} nodes once"
        )
    return ring_total(nodes, edge, edge)


def plan_order(
    delay: Any, *, both_ways: bool = True, noise: float = 0.0, seed: int = 0
) -> tuple[int, ...]:
    """The order of a ring: first the worst link is minimal, then the sum.

    Exact up to `rings.EXACT_RING` nodes. Beyond, the limit on the worst link is found
    by bisection, each step a search by 2-opt and Or-opt with restarts.

    Args:
        delay: float[n, n], see the module.
        both_ways: a link is as slow as the slower of its directions; False if traffic
            surely goes from each node to the next.
        noise: part by which measurements differ for no reason. Worst links that close
            to the best possible one count as equal to it, so that the sum decides, and
            the given order stays unless more is gained. 0: exactly as said above.
        seed: of the restarts. The same arguments always give the same order.

    Returns:
        The nodes in order, from node 0. Node i of the given order is never moved for
        nothing: the result is 0, 1, 2, ... unless another order costs less.

    Raises:
        ValueError: delay cannot be used, or no ring was found that avoids what cannot
            be reached.
    """
    edge = link_delays(delay, both_ways)
    check_reach(edge, both_ways)
    given = np.arange(len(edge))
    found = best_ring(edge, edge, noise, seed)
    before, after = ring_total(given, edge, edge), ring_total(found, edge, edge)
    if not math.isfinite(after.worst):
        raise ValueError(no_way(edge, f"no ring over {len(edge)} nodes"))
    return tuple((found if better(after, before, noise) else given).tolist())


# --------------------------------------------------------------------------- meshes


def grid_cost(
    delay: Any,
    grid: Any,
    *,
    weights: Any = None,
    both_ways: bool = True,
) -> Cost:
    """The slowest link of all rings of a mesh, and the sum over their links.

    Args:
        delay: float[n, n], see the module.
        grid: int, each of n nodes once, in the mesh's shape. Every line along every
            axis is a ring; axes of size 1 have none.
        weights: float[axes], of the links along each, by the traffic on them; None:
            all 1.
        both_ways: a link is as slow as the slower of its directions.

    Raises:
        ValueError: delay, grid or weights cannot be used.
    """
    edge, grid = link_delays(delay, both_ways), np.asarray(grid, int)
    if sorted(grid.ravel().tolist()) != list(range(len(edge))):
        raise ValueError(f"the grid does not name each of {len(edge)} nodes once")
    return _grid_cost(grid.ravel(), *_axes(edge, grid.shape, weights))


def plan_grid(
    delay: Any,
    shape: Sequence[int],
    *,
    weights: Any = None,
    both_ways: bool = True,
    noise: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Which node goes where in a mesh: first the worst link, then the sum.

    Exact on one axis of up to `rings.EXACT_RING` nodes, and up to `EXACT_GRID` nodes on
    several. Beyond, whole slices are put in order along each axis, which leaves the
    other axes as they are, and then single nodes are swapped.

    Args:
        delay: float[n, n], see the module.
        shape: sizes of the axes. The given order fills it like `reshape`: what is
            neighbour in `delay` is neighbour along the last axis.
        weights: float[axes], of the links along each, by the traffic on them; None:
            all 1.
        both_ways: a link is as slow as the slower of its directions.
        noise: as in `plan_order`.
        seed: of the search.

    Returns:
        int[shape]; `arange(n).reshape(shape)` unless another costs less.

    Raises:
        ValueError: as `plan_order`; or shape or weights do not fit.
    """
    edge = link_delays(delay, both_ways)
    return _plan_grid(edge, tuple(shape), weights, noise, seed)


def plan_mesh(
    devices: Sequence[Any],
    delay: Any,
    shape: Sequence[int],
    names: Sequence[str],
    *,
    hosts: Any = None,
    weights: Any = None,
    both_ways: bool = True,
    noise: float = 0.1,
    seed: int = 0,
) -> jax.sharding.Mesh:
    """A mesh whose rings avoid slow links; see `plan_grid`.

    Put the axis with the most traffic last: there the given order has neighbours next
    to each other, and `weights` may say by how much it counts more. Where the last axes
    hold just the devices of one host, hosts are placed whole.

    Args:
        devices: in the order that stands where nothing is gained.
        delay: float[n, n] in seconds between devices, or between hosts (within one it
            counts as 0).
        shape: sizes of the mesh's axes.
        names: of the axes.
        hosts: int[n], row of `delay` of each device; None: its own if there is one for
            each device, else its process', rows being sorted by `process_index`.
        weights: as in `plan_grid`.
        both_ways: as in `plan_grid`.
        noise: as in `plan_grid`.
        seed: as in `plan_grid`.

    Returns:
        A mesh of these devices with automatic axes. Every process must make the same
        one: give all of them the same `delay`.

    Raises:
        ValueError: as `plan_grid`; or delay fits neither devices nor processes.
    """
    edge, n = link_delays(delay, both_ways), len(devices)
    if hosts is None and len(edge) == n:
        hosts = range(n)
    elif hosts is None:
        processes = [device.process_index for device in devices]
        rows = {p: row for row, p in enumerate(sorted(set(processes)))}
        if len(rows) != len(edge):
            raise ValueError(
                f"delay is for {len(edge)} nodes; there are {n} devices in "
                f"{len(rows)} processes"
            )
        hosts = [rows[p] for p in processes]
    elif len(hosts) != n or not all(0 <= h < len(edge) for h in hosts):
        raise ValueError(f"hosts must name a row of delay for each of {n} devices")
    row = np.asarray(hosts, int)
    grid = _plan_rows(edge, row, tuple(shape), weights, noise, seed)
    placed = np.empty(n, object)
    placed[:] = [devices[i] for i in grid.ravel()]
    return jax.sharding.Mesh(
        placed.reshape(grid.shape),
        tuple(names),
        axis_types=(AxisType.Auto,) * grid.ndim,
    )


def _plan_rows(
    edge: np.ndarray,
    row: np.ndarray,
    shape: tuple[int, ...],
    weights: Any,
    noise: float,
    seed: int,
) -> np.ndarray:
    """The grid of devices, of which each is on a row of `edge`."""
    n = len(row)
    for axis in range(1, len(shape)):
        block = math.prod(shape[axis:])
        if block < 2 or n % block:
            continue
        hosts = row.reshape(-1, block)
        whole = (hosts == hosts[:, :1]).all() and len(set(hosts[:, 0])) == len(hosts)
        if whole and math.prod(shape[:axis]) == len(hosts):
            used = hosts[:, 0]
            ahead = None if weights is None else weights[:axis]
            between = edge[np.ix_(used, used)]
            placed = _plan_grid(between, shape[:axis], ahead, noise, seed)
            return np.arange(n).reshape(-1, block)[placed.ravel()].reshape(shape)
    return _plan_grid(edge[np.ix_(row, row)], shape, weights, noise, seed)


def _axes(
    edge: np.ndarray, shape: tuple[int, ...], weights: Any
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Of each axis that has rings: its weighted links, and each cell's next cell."""
    n = len(edge)
    if math.prod(shape) != n or min(shape, default=1) < 1:
        raise ValueError(f"a mesh of shape {shape} does not hold {n} nodes")
    factors = [1.0] * len(shape) if weights is None else list(weights)
    if len(factors) != len(shape) or not all(0 < w < math.inf for w in factors):
        raise ValueError(f"weights {factors} are not a positive one for each axis")
    cells = np.arange(n).reshape(shape)
    used = [axis for axis, size in enumerate(shape) if size > 1]
    links = tuple(factors[axis] * edge for axis in used)
    return links, tuple(np.roll(cells, -1, axis).ravel() for axis in used)


def _grid_cost(
    grid: np.ndarray, links: tuple[np.ndarray, ...], nexts: tuple[np.ndarray, ...]
) -> Cost:
    used = [e[grid, grid[after]] for e, after in zip(links, nexts, strict=True)]
    if not used:
        return Cost(0.0, 0.0)
    flat = np.concatenate(used)
    return Cost(float(flat.max()), math.fsum(flat))


def _plan_grid(
    edge: np.ndarray,
    shape: tuple[int, ...],
    weights: Any,
    noise: float,
    seed: int,
) -> np.ndarray:
    links, nexts = _axes(edge, shape, weights)
    cost = partial(_grid_cost, links=links, nexts=nexts)
    given = np.arange(len(edge))
    if len(links) == 1:
        found = best_ring(links[0], links[0], noise, seed)
    elif len(edge) <= EXACT_GRID:
        found = _best_grid(len(edge), links, nexts, noise)
    else:
        found = _search_grid(given, shape, links, nexts, noise, seed)
    before, after = cost(given), cost(found)
    if not math.isfinite(after.worst):
        raise ValueError(no_way(edge, f"no mesh of shape {shape}"))
    return (found if better(after, before, noise) else given).reshape(shape)


def _best_grid(
    n: int,
    links: tuple[np.ndarray, ...],
    nexts: tuple[np.ndarray, ...],
    noise: float,
) -> np.ndarray:
    """Tries all arrangements; a torus looks the same from everywhere, so 0 stays."""
    if not links:
        return np.arange(n)
    grids = np.array([(0, *rest) for rest in itertools.permutations(range(1, n))])
    used = [e[grids, grids[:, after]] for e, after in zip(links, nexts, strict=True)]
    flat = np.concatenate(used, axis=1)
    worst, total = flat.max(1), flat.sum(1)
    inside = worst <= (1 + noise) * worst.min()
    return grids[inside][np.lexsort((worst[inside], total[inside]))[0]]


def _search_grid(
    grid: np.ndarray,
    shape: tuple[int, ...],
    links: tuple[np.ndarray, ...],
    nexts: tuple[np.ndarray, ...],
    noise: float,
    seed: int,
) -> np.ndarray:
    """Slices along each axis, then single nodes, until neither helps."""
    n, rng = grid.size, np.random.default_rng(seed)
    cost = partial(_grid_cost, links=links, nexts=nexts)
    search = partial(_search_swaps, nexts=nexts, rng=rng, kicks=max(3, 400 // n))
    lightest = np.minimum.reduce(links)
    low = spanning(lightest)
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    while True:
        before = cost(grid)
        for axis, edge in zip(axes, links, strict=True):
            moved = _sort_slices(grid, shape, axis, edge, noise, seed)
            grid = least([grid, moved], cost, noise)
        moved = bisect(grid, links, links, low, noise, cost, search)
        grid = least([grid, moved], cost, noise)
        if not better(cost(grid), before, noise):
            return grid


def _sort_slices(
    grid: np.ndarray,
    shape: tuple[int, ...],
    axis: int,
    edge: np.ndarray,
    noise: float,
    seed: int,
) -> np.ndarray:
    """Puts the slices across an axis in the best order; the other axes stay."""
    size = shape[axis]
    lines = np.moveaxis(grid.reshape(shape), axis, 0).reshape(size, -1)
    between = edge[lines[:, None], lines]
    order = best_ring(between.max(-1), between.sum(-1), noise, seed)
    rest = shape[:axis] + shape[axis + 1 :]
    return np.moveaxis(lines[order].reshape(size, *rest), 0, axis).ravel()


def _search_swaps(
    grid: np.ndarray,
    links: tuple[np.ndarray, ...],
    *,
    nexts: tuple[np.ndarray, ...],
    rng: np.random.Generator,
    kicks: int,
) -> np.ndarray:
    """Swaps of two nodes while they lower the sum, kicked out of its optima."""
    best = _improve_grid(grid, links, nexts)
    value = _grid_cost(best, links, nexts).total
    for _ in range(kicks):
        kicked = best.copy()
        chosen = rng.choice(best.size, 4, replace=False)
        kicked[chosen] = kicked[np.roll(chosen, 1)]
        found = _improve_grid(kicked, links, nexts)
        reached = _grid_cost(found, links, nexts).total
        if reached < value - 1e-9:
            best, value = found, reached
    return best


def _improve_grid(
    grid: np.ndarray, links: tuple[np.ndarray, ...], nexts: tuple[np.ndarray, ...]
) -> np.ndarray:
    grid, cells = grid.copy(), np.arange(grid.size)
    befores = [np.argsort(after) for after in nexts]
    least_gain = max(map(slack, links))
    while True:
        # Cost of node d in cell a while all others stay, [a, d]; then of swaps.
        alone = np.zeros((grid.size, grid.size))
        for edge, after, before in zip(links, nexts, befores, strict=True):
            alone += edge[grid[before]] + edge[:, grid[after]].T
        placed = alone[:, grid]
        gain = placed + placed.T - np.diag(placed)[:, None] - np.diag(placed)
        for edge, after in zip(links, nexts, strict=True):
            # A link between the two was counted twice before and not at all after.
            both = edge[grid, grid[after]] + edge[grid[after], grid]
            gain[cells, after] += both
            gain[after, cells] += both
        a, b = np.unravel_index(int(gain.argmin()), gain.shape)
        if gain[a, b] > -least_gain:
            return grid
        grid[[a, b]] = grid[[b, a]]
