"""Which link, sender or receiver is slow, read off a matrix of delays (C4).

A slow cell is a link, a slow row what a rank sends, a slow column what it receives.
Delays are compared as ratios, so their unit does not matter. The fastest half of the
cells is taken for healthy, and grows by the next faster cell for as long as that is not
too far from the mean of those it has: a forward search, which a fault in up to half of
the cells does not mislead. What is too far follows from their own spread and, as a few
cells show little of that, from a usual one.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from jaxlab.health.detect import DetectConfig, Diagnosis, Kind, few

_WEIGHT = 10.0  # of the configured spread, in cells, beside the measured one
_WHOLE = 0.75  # of a row's measured cells must be slow for the row to be


class Cells(NamedTuple):
    """What is wrong in a matrix of faults."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    points: tuple[tuple[int, int], ...]
    """outside these rows and columns"""


def explain(bad: np.ndarray, measured: np.ndarray) -> Cells:
    """The fewest rows, columns and single cells that explain the bad ones, greedily.

    A row (or column) is named if it has at least two bad cells that nothing named
    before explains, and they are at least three quarters of its measured ones. The
    one with most goes first; of a row and a column with equally many, the row.

    Args:
        bad: bool[n, n].
        measured: bool[n, n], true wherever `bad` is.
    """
    bad, measured = bad.copy(), measured.copy()
    names: tuple[list[int], list[int]] = ([], [])
    counts = [(bad.sum(1 - axis), measured.sum(1 - axis)) for axis in (0, 1)]
    while True:
        best = []
        for hits, cells in counts:
            whole = (hits >= 2) & (hits >= _WHOLE * cells)
            best.append(np.where(whole, hits, 0))
        most = [int(hits.max(initial=0)) for hits in best]
        if not max(most):
            break
        axis = int(most[1] > most[0])
        # Lines of one direction share no cell: all of the best go at once.
        lines = np.flatnonzero(best[axis] == most[axis])
        names[axis].extend(lines.tolist())
        for ours, table in enumerate((bad, measured)):
            view = table if axis == 0 else table.T
            counts[1 - axis][ours][:] -= view[lines].sum(0)
            counts[axis][ours][lines] = 0
            view[lines] = False
    points = [(int(i), int(j)) for i, j in np.argwhere(bad)]
    return Cells(tuple(sorted(names[0])), tuple(sorted(names[1])), tuple(points))


def classify_matrix(
    delay: np.ndarray,
    cfg: DetectConfig = DetectConfig(),  # noqa: B008  (frozen)
    *,
    baseline: np.ndarray | float | None = None,
) -> Diagnosis:
    """Names slow or unreachable links, senders and receivers.

    A delay is slow beyond `cfg.link_ratio` times the usual one, and beyond what the
    spread of the others makes likely (`cfg.link_false_alarms`). Without a baseline,
    slow cells all over the matrix are taken for its topology (hosts and racks), not for
    faults; give a baseline to tell these apart, and to see that all are slow.

    Args:
        delay: float[n, n], seconds from source (row) to destination (column). The
            diagonal is ignored; NaN: not measured; inf: unreachable.
        cfg: limits.
        baseline: delays in health, float[n, n] (NaN: not known, the cell is ignored)
            or one for all.

    Returns:
        COMM_SLOW, or COMM_HANG if a cell is unreachable, or HEALTHY; UNKNOWN if
        nothing is measured. `ranks` are those of slow rows and columns, `links` the
        single cells besides; `scope` is "row" or "column" (whichever explains more
        cells; the evidence has both), "point" if there are links only, "all", "none".
        With n = 2 row and column cannot be told apart: "point".

    Raises:
        ValueError: the matrix is not square, or a delay is negative.
    """
    delay, measured, reference = _checked(delay, baseline)
    if not measured.any():
        return Diagnosis(Kind.UNKNOWN, evidence="no delay is measured")
    unreachable = measured & np.isinf(delay)
    finite = measured & ~unreachable
    if not finite.any():
        words = f"all {int(unreachable.sum())} measured links are unreachable"
        return Diagnosis(Kind.COMM_HANG, scope="all", evidence=words, confidence=1.0)
    ratio = delay[finite] / reference[finite]
    # A delay below the clock's resolution is as good as the shortest one seen.
    shortest = ratio.min(where=ratio > 0, initial=np.inf)
    ratio = np.log(np.maximum(ratio, shortest if math.isfinite(shortest) else 1.0))

    usual, limit, slowest = _search(ratio, cfg)
    beyond = ratio - usual
    unit = f"{1e3 * math.exp(usual):.3g} ms"
    if baseline is not None:
        unit = f"{math.exp(usual):.3g} times the baseline"
        least = math.log(cfg.link_ratio)
        if usual > least:
            return Diagnosis(
                Kind.COMM_HANG if unreachable.any() else Kind.COMM_SLOW,
                scope="all",
                evidence=f"{len(ratio)} delays are usually {unit}",
                confidence=1 - 0.5 * least / usual,
            )
    slow = np.zeros_like(measured)
    slow[finite] = ratio >= slowest
    words = f"{len(ratio)} delays, usually {unit}"
    if baseline is None and _scattered(slow, measured):
        words += (
            f", {int(slow.sum())} of them beyond {math.exp(limit):.3g} times that and "
            "all over the place: a topology rather than a fault (a baseline would tell)"
        )
        slow[:] = False
    if unreachable.any() or slow.any():
        excess = beyond[slow[finite]]
        sure = 1 - 0.5 * limit / float(np.median(excess)) if len(excess) else 1.0
        if len(excess):
            words += f"; {len(excess)} slow, up to {math.exp(excess.max()):.3g} times"
            words += f" that (limit {math.exp(limit):.3g})"
        if unreachable.any():
            sure, words = 1.0, f"{words}; {int(unreachable.sum())} unreachable"
        return _report(
            slow | unreachable, measured, bool(unreachable.any()), words, sure
        )
    top = float(beyond.max())
    words += f", at most {math.exp(top):.3g} times that"
    sure = float(np.clip(1 - 0.5 * top / limit, 0.5, 1))
    return Diagnosis(Kind.HEALTHY, evidence=words, confidence=sure)


def classify_hang(
    delay: np.ndarray,
    cfg: DetectConfig = DetectConfig(),  # noqa: B008  (frozen)
) -> Diagnosis:
    """Names what holds up a collective that does not end.

    Links that carry nothing do. One that is merely slower beside them does not, and on
    a busy host any link may be for once, so it is named only where all links carry.

    Args:
        delay: float[n, n], see `classify_matrix`.
        cfg: limits.

    Returns:
        COMM_HANG, or HEALTHY or UNKNOWN.
    """
    finite = np.isfinite(delay)
    if np.isinf(delay).any() and finite.any():
        delay = np.where(finite, np.median(delay[finite]), delay)
    found = classify_matrix(delay, cfg)
    if found.kind == Kind.COMM_SLOW:
        found = found._replace(kind=Kind.COMM_HANG)
    return found


def _checked(
    delay: np.ndarray, baseline: np.ndarray | float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Delays, which of them count, and what they are compared with; all [n, n]."""
    delay = np.asarray(delay, np.float64)
    if delay.ndim != 2 or delay.shape[0] != delay.shape[1]:
        raise ValueError(f"the delays have shape {delay.shape}; it must be [n, n]")
    reference = np.asarray(1.0 if baseline is None else baseline, np.float64)
    if reference.shape not in ((), delay.shape):
        raise ValueError(
            f"the baseline has shape {reference.shape}, the delays {delay.shape}"
        )
    reference = np.broadcast_to(reference, delay.shape)
    measured = ~np.isnan(delay) & (reference > 0) & np.isfinite(reference)
    np.fill_diagonal(measured, False)
    negative = measured & (delay < 0)
    if negative.any():
        source, destination = np.argwhere(negative)[0].tolist()
        raise ValueError(f"the delay {source}->{destination} is negative")
    return delay, measured, reference


def _search(log_ratio: np.ndarray, cfg: DetectConfig) -> tuple[float, float, float]:
    """Forward search for the cells that are too slow to belong to the others.

    Returns:
        Mean log ratio of the healthy cells; how far beyond it is too far; and the
        first cell that is, from which all are slow (inf: none).
    """
    x = np.sort(log_ratio)
    count = len(x)
    first = (count + 1) // 2
    least = math.log(cfg.link_ratio)
    middle = x[first - 1]
    core = np.maximum(x, middle - least) - middle  # links within a host are faster
    size = np.arange(first, count + 1)
    mean = np.cumsum(core)[first - 1 :] / size
    squares = np.maximum(np.cumsum(core**2)[first - 1 :] - size * mean**2, 0.0)
    variance = (_WEIGHT * cfg.link_spread**2 + squares) / (_WEIGHT + size - 1)
    surprise = -NormalDist().inv_cdf(cfg.link_false_alarms / count)
    limit = np.maximum(least, surprise * np.sqrt(variance * (1 + 1 / size)))
    far = np.flatnonzero(core[first:] > mean[:-1] + limit[:-1])
    k = int(far[0]) if len(far) else len(size) - 1
    slowest = float(x[first + k]) if len(far) else math.inf
    return float(mean[k] + middle), float(limit[k]), slowest


def _scattered(bad: np.ndarray, measured: np.ndarray) -> bool:
    """Whether more than a quarter of the cells, and n, are bad in no row or column."""
    points = len(explain(bad, measured).points)
    return points > max(len(bad), int(0.25 * measured.sum()))


def _report(
    bad: np.ndarray, measured: np.ndarray, hang: bool, words: str, confidence: float
) -> Diagnosis:
    """The diagnosis of faulty cells."""
    rows, columns, points = explain(bad, measured)
    sent, received = bad[list(rows)].sum(), bad[:, list(columns)].sum()
    scope = "point"
    if rows or columns:
        scope = "row" if sent >= received else "column"
    if rows and columns:
        words += f"; row {few(rows)} and column {few(columns)}"
    return Diagnosis(
        Kind.COMM_HANG if hang else Kind.COMM_SLOW,
        ranks=tuple(sorted({*rows, *columns})),
        links=points,
        scope=scope,
        evidence=words,
        confidence=float(confidence),
    )
