"""What ails a distributed program, read off its collectives (C4, arXiv 2406.04594).

In data-parallel training all ranks do the same work and meet at collectives, so the
collectives are probes: who enters, who leaves, who waits. This module has the types,
the alignment of the ranks' samples and the diagnosis of a program that stands still;
`sequential` finds a program that has become slow and `matrix` the link that made it so.

Everything is a pure function of explicit arrays; nothing reads a clock. Only durations
are compared across ranks, never times, so the ranks' clocks need not agree.

Evidence is weighed in the order crash, frozen, hang, slow: a dead rank explains what
the others wait for, and a rank that waits for others is not to blame.

Confidence is 1 - limit / (2 value) throughout: 0.5 where the evidence has just reached
its limit, towards 1 as it exceeds it.

Dimensions in names: t step, n rank.
"""

import enum
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Kind(enum.StrEnum):
    """What ails it."""

    HEALTHY = "healthy"
    CRASH = "crash"
    """a process is gone"""
    FROZEN = "frozen"
    """a process exists and does not run: stopped, swapped out"""
    NONCOMM_HANG = "noncomm_hang"
    """a rank does not arrive at the collective where the others wait"""
    COMM_HANG = "comm_hang"
    """all ranks are in the collective and it does not end"""
    NONCOMM_SLOW = "noncomm_slow"
    """a rank's own work takes longer than it used to, and the others wait for it"""
    COMM_SLOW = "comm_slow"
    """the communication itself takes longer than it used to"""
    UNKNOWN = "unknown"
    """not enough is known to say anything"""


class Phase(enum.IntEnum):
    """What a rank says it is doing; a pause that is declared is no stall."""

    STARTING = 0
    """import, compilation"""
    STEP = 1
    CHECKPOINT = 2
    EVALUATION = 3
    OTHER = 4
    """any other declared pause, such as garbage collection"""
    DONE = 5


class Diagnosis(NamedTuple):
    """What was found, and why."""

    kind: Kind
    ranks: tuple[int, ...] = ()
    """to blame, ascending; empty where no rank is, as when all are slow"""
    links: tuple[tuple[int, int], ...] = ()
    """(source, destination), ascending"""
    scope: str = "none"
    """"rank": `ranks` themselves; "row", "column": what `ranks` send, receive;
    "point": `links`; "all": everything alike; "none": nothing, or not yet localised"""
    evidence: str = ""
    """one line for people, with the numbers"""
    confidence: float = 0.0
    """0 to 1; of HEALTHY, how far all evidence is from its limit"""

    def __str__(self) -> str:
        where = []
        if self.ranks:
            where.append(f"{self.scope} of " * (self.scope in ("row", "column")))
            where[-1] += f"rank{'s' * (len(self.ranks) > 1)} {few(self.ranks)}"
        if self.links:
            links = [f"{source}->{destination}" for source, destination in self.links]
            where.append(f"link{'s' * (len(links) > 1)} {few(links)}")
        if self.scope == "all" and not where:
            where.append("everywhere")
        head = " ".join([self.kind.value.upper(), ", ".join(where)]).strip()
        return f"{head} ({self.confidence:.0%}): {self.evidence}"


def few(items: Sequence[object], most: int = 8) -> str:
    """A list for one line: "1, 2, 3", cut after `most`."""
    shown = ", ".join(str(item) for item in items[:most])
    return shown + f" and {len(items) - most} more" * (len(items) > most)


class RankSample(NamedTuple):
    """One step of one rank, in seconds of that rank's own monotonic clock.

    A sample whose phase is not STEP is of a step that is not to be judged, such as
    one that was compiled.
    """

    step: int
    t_start: float
    """the step's local work begins: where the collective before ended, or a declared
    pause after it"""
    t_enter: float
    """the collective is entered"""
    t_exit: float
    """the collective is left"""
    phase: int = Phase.STEP
    paused: float = 0.0
    """seconds inside the collective in which the process did not run at all"""


class Board(NamedTuple):
    """The ranks' boards at one moment; arrays [n], times on the caller's clock."""

    alive: np.ndarray
    """bool: the process exists"""
    stopped: np.ndarray
    """bool: the kernel says that it is stopped"""
    heartbeat: np.ndarray
    """float: time of the last heartbeat; NaN: none yet"""
    progress: np.ndarray
    """float: when enter_seq, exit_seq or phase last changed"""
    enter_seq: np.ndarray
    """int: collectives entered"""
    exit_seq: np.ndarray
    """int: collectives left"""
    phase: np.ndarray
    """int: a `Phase`"""
    step: np.ndarray
    """int: for the reader only"""


class Window(NamedTuple):
    """Steps that all ranks have done; seconds. A column of NaN is an absent rank."""

    local: np.ndarray
    """float[T, n]: from the beginning of the local work to the collective; what begins
    before the collective before has ended, counts from there. With it, pauses of the
    process inside the collective: the others wait for those too"""
    wait: np.ndarray
    """float[T, n]: in the collective, less pauses"""
    pure_comm: np.ndarray
    """float[T]: the least time in the collective, which is communication alone: the
    last rank to arrive waits for nobody. Pauses are in it, as what they do to the
    collective is not told apart"""
    step: np.ndarray
    """float[T]: duration of the step, the median over ranks"""
    number: np.ndarray | None = None
    """int[T]: step numbers, ascending. With them, steps seen before are skipped"""


@dataclass(frozen=True)
class DetectConfig:
    """Limits of the detectors. None was fitted to an injected fault."""

    stall_min: float = 1.5
    """seconds without progress before a step can be a stall"""
    stall_factor: float = 12.0
    """times the median step without progress before it is a stall"""
    stall_alone: float = 4.0
    """times as long while no rank waits for another: all pause alike, as on a host that
    is overloaded"""
    stall_first: float = 60.0
    """seconds before it is a stall while the median step is not known"""
    silent_after: float = 1.0
    """seconds without a heartbeat: frozen, if stopped or without progress too"""
    heartbeat_after: float = 10.0
    """seconds without a heartbeat: frozen, whatever else"""
    starting_limit: float = 1800.0
    """seconds that import and compilation may take"""
    checkpoint_limit: float = 600.0
    """seconds that a checkpoint may take"""
    evaluation_limit: float = 1800.0
    """seconds that an evaluation may take without a collective"""
    other_limit: float = 300.0
    """seconds that any other declared pause may take"""
    false_alarms_per_hour: float = 0.05
    """of `detect_slow`, on average at most, over all ranks together"""
    min_slowdown: float = 0.1
    """parts of the median step; less is not worth an alarm"""
    deviations: float = 4.0
    """robust standard deviations of a block that are still usual"""
    block: float = 0.5
    """seconds whose steps are averaged to one observation of the sequential test; one
    step where it is longer"""
    chance: float = 0.05
    """probability that a healthy block is unusual after a usual one, at least; more
    where more is observed"""
    persistence: float = 0.2
    """the same after an unusual one"""
    persistence_all: float = 0.7
    """the same where all ranks are slow alike: load is shared and lasts"""
    warmup: int = 20
    """blocks before the baseline can be compared with"""
    history: int = 128
    """blocks that the baseline remembers"""
    history_stride: int = 8
    """once `history` is full, one of so many blocks is remembered: the baseline spans
    minutes, and a fault cannot enter it before it is found"""
    link_ratio: float = 3.0
    """times the usual delay before a link can be slow"""
    link_spread: float = 0.35
    """standard deviation of the logarithm of healthy delays, to begin with"""
    link_false_alarms: float = 1e-3
    """probability of naming any link in a healthy matrix, were its delays log-normal
    with that spread"""

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that cannot work."""
        for name, value in vars(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        for name in ("chance", "persistence", "persistence_all", "link_false_alarms"):
            if getattr(self, name) > 0.9:
                raise ValueError(f"{name} is {getattr(self, name)}; at most 0.9")
        if self.link_ratio <= 1:
            raise ValueError(f"link_ratio is {self.link_ratio}; it must exceed 1")
        if self.history < self.warmup:
            raise ValueError(
                f"history {self.history} is less than warmup {self.warmup}"
            )


class Baseline(NamedTuple):
    """How the program runs when nothing ails it (see `sequential.update_baseline`).

    `_replace(step=...)` is enough for `detect_stall`.
    """

    cfg: DetectConfig
    step: float = math.nan
    """seconds, median; NaN: not known"""
    center: np.ndarray | None = None
    """float[3n+3]: median of each statistic over blocks; None: still learning"""
    scale: np.ndarray | None = None
    """float[3n+3]: their robust standard deviation"""
    history: np.ndarray | None = None
    """float[blocks, 3n+3]"""
    pending: np.ndarray | None = None
    """float[steps, 3n+3]: steps of the block that is not full"""
    last: int = -1
    """number of the last step seen"""
    seen: int = 0
    """blocks, also those not remembered"""


def align(
    samples_by_rank: Mapping[int, Sequence[RankSample]]
    | Sequence[Sequence[RankSample]],
) -> Window:
    """Matches the ranks' samples by step number, never by time.

    Kept are the steps that every rank with any sample has finished: what some rank
    has not reported yet comes with a later window. Samples of declared pauses and
    garbled ones (negative or non-finite durations) are left out; of samples of the
    same step the last counts.

    Args:
        samples_by_rank: each rank's samples in the order in which they were recorded.
            A rank without samples has a column of NaN.

    Returns:
        `Window` with T steps (perhaps 0), with `number`; n is one more than the
        highest rank.

    Raises:
        ValueError: no ranks.
    """
    if isinstance(samples_by_rank, Mapping):
        logs = [(int(rank), log) for rank, log in samples_by_rank.items()]
    else:
        logs = list(enumerate(samples_by_rank))
    if not logs:
        raise ValueError("samples of no rank: give at least one")
    n = 1 + max(rank for rank, _ in logs)
    rows = np.array(
        list(itertools.chain.from_iterable(log for _, log in logs)), np.float64
    ).reshape(-1, 6)
    rank = np.repeat([r for r, _ in logs], [len(log) for _, log in logs])

    number, start, enter, leave, phase, paused = rows.T
    # Work dispatched before the collective before has ended waits for it: for others.
    before = np.full(len(rows), -np.inf)
    before[1:] = np.where(rank[1:] == rank[:-1], leave[:-1], -np.inf)
    begin = np.fmax(start, before)
    arrive = np.maximum(enter, begin)
    held = np.minimum(paused, leave - arrive)
    local, wait = arrive - begin + held, leave - arrive - held
    good = np.isfinite(rows).all(1) & (phase == Phase.STEP)
    good &= (enter >= start) & (leave >= arrive) & (paused >= 0)
    kept = np.flatnonzero(good)
    # Sorted by rank and number, the last recorded first: that is the one kept.
    kept = kept[np.lexsort((-kept, number[kept], rank[kept]))]
    fresh = np.ones(len(kept), bool)
    fresh[1:] = np.diff(number[kept]).astype(bool) | np.diff(rank[kept]).astype(bool)
    kept = kept[fresh]
    numbers, row, ranks_with = np.unique(
        number[kept], return_inverse=True, return_counts=True
    )
    common = ranks_with == len(np.unique(rank[kept]))
    place = np.cumsum(common) - 1
    inside = common[row]
    kept, row = kept[inside], place[row[inside]]

    def table(values: np.ndarray) -> np.ndarray:
        out = np.full((int(common.sum()), n), np.nan)
        out[row, rank[kept]] = values[kept]
        return out

    wait_tn, local_tn = table(wait), table(local)
    return Window(
        local=local_tn,
        wait=wait_tn,
        pure_comm=np.fmin.reduce(table(leave - arrive), axis=1, initial=np.nan),
        step=median(local_tn + wait_tn, axis=1),
        number=numbers[common].astype(np.int64),
    )


def median(x: np.ndarray, axis: int) -> np.ndarray:
    """The median of what is not NaN; NaN where nothing is. float64.

    As `np.nanmedian`, without its warnings and several times as fast.
    """
    ordered = np.sort(np.moveaxis(np.asarray(x, np.float64), axis, 0), axis=0)
    if not len(ordered):
        return np.full(ordered.shape[1:], np.nan)
    count = np.isfinite(ordered).sum(0)[None]
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, len(ordered) - 1)
    both = [np.take_along_axis(ordered, index, 0)[0] for index in (low, high)]
    return np.where(count[0] > 0, (both[0] + both[1]) / 2, np.nan)


def stall_limit(baseline: Baseline, cfg: DetectConfig) -> float:
    """Seconds without progress after which a step is a stall."""
    if not math.isfinite(baseline.step):
        return cfg.stall_first
    return max(cfg.stall_min, cfg.stall_factor * baseline.step)


def detect_stall(
    board: Board,
    now: float,
    baseline: Baseline,
    cfg: DetectConfig = DetectConfig(),  # noqa: B008  (frozen)
) -> Diagnosis:
    """Diagnoses a program that stands still: crash, frozen, or a hang of either kind.

    Ranks leave a collective at different times, so their sequence numbers may differ
    by one in a hang of the communication; what counts is whether a rank is inside a
    collective (entered more than it left). A rank outside while others wait inside
    hangs on its own; with all inside it is the communication.

    Of two faults at once both ranks are named; `kind` is that of the surest, and the
    evidence says which is which. Survivors of a crash are not blamed for standing
    still. Stateless: whoever acts on it asks for the same answer a few times.

    Args:
        board: of all ranks.
        now: on the board's clock, seconds.
        baseline: for the median step only.
        cfg: limits.

    Returns:
        A `Diagnosis` with scope "rank", "all" (every rank hangs on its own) or "none".
        COMM_HANG names nobody: only a probe of the links can.

    Raises:
        ValueError: the board's arrays differ in shape.
    """
    shapes = {np.shape(field) for field in board}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(f"the board's arrays have shapes {shapes}; all must be [n]")
    done = board.phase == Phase.DONE
    dead = ~board.alive & ~done
    running = board.alive & ~done
    limit = stall_limit(baseline, cfg)
    limits = np.array(
        [
            cfg.starting_limit,
            limit,
            cfg.checkpoint_limit,
            cfg.evaluation_limit,
            cfg.other_limit,
            np.inf,
        ]
    )[board.phase]
    age = now - board.progress
    silence = now - board.heartbeat  # NaN compares as False
    overdue = running & (age > limits)
    silent_limit = np.where(
        board.phase == Phase.STARTING, cfg.starting_limit, cfg.heartbeat_after
    )
    silent_limit[board.stopped | overdue] = cfg.silent_after
    frozen = running & (silence > silent_limit)
    awake = running & ~frozen
    inside = awake & (board.enter_seq > board.exit_seq)
    idle = awake & ~inside
    pausing = idle & ~overdue & (board.phase != Phase.STEP)
    hung = idle & overdue
    if not inside.any() and (age < cfg.stall_alone * limits)[idle].all():
        hung[:] = False
    if not inside.any() and pausing.any():
        hung[:] = False  # may well wait for those who pause, at a barrier of the host
    if inside.any() and (overdue | ~inside)[awake].all() and not idle.any():
        furthest = board.enter_seq[inside].max()
        hung |= done & (board.exit_seq < furthest)  # gone while the others wait

    found = []
    if dead.any():
        found.append((Kind.CRASH, dead, "is dead", 1.0))
        hung[:] = False  # they fail or wait because of it
    if frozen.any():
        words = f"is frozen, no heartbeat for {_span(silence[frozen])}"
        if board.stopped[frozen].all():
            words += ", stopped by a signal"
        margin = (silent_limit[frozen] / silence[frozen]).max()
        found.append((Kind.FROZEN, frozen, words, 1 - 0.5 * margin))
    if hung.any():
        waiting = int((inside & overdue).sum())
        words = (
            f"has stood outside the collective for {_span(age[hung])} (limit "
            f"{_span(limits[hung & running], limit)}), {waiting} wait inside"
        )
        margin = np.where(running, limits, limit)[hung] / np.maximum(age[hung], 1e-9)
        found.append((Kind.NONCOMM_HANG, hung, words, 1 - 0.5 * min(margin.max(), 1)))
    if found:
        return _name(found, len(done), running)
    if inside.any() and not idle.any() and overdue[inside].all():
        return _comm_hang(board, inside, age, limits)
    words = f"longest without progress {_span(age[running])}, limit {limit:.3g} s"
    held = np.flatnonzero(idle & ~overdue)
    if (inside & overdue).any() and len(held):
        phase = Phase(int(board.phase[held[0]])).name
        words += f"; waiting for rank {few(held.tolist())} in phase {phase}"
    nearest = (age / limits)[running].max(initial=0)
    return Diagnosis(
        Kind.HEALTHY, evidence=words, confidence=float(np.clip(1 - nearest, 0, 1))
    )


def _span(seconds: np.ndarray, default: float = 0.0) -> str:
    """The longest of these times, for people."""
    longest = float(np.max(seconds)) if len(seconds) else default
    return f"{longest:.3g} s"


def _name(
    found: list[tuple[Kind, np.ndarray, str, float]], n: int, running: np.ndarray
) -> Diagnosis:
    """One diagnosis of all that was found, the surest first."""
    kind, _, _, confidence = found[0]
    ranks = np.flatnonzero(np.any([mask for _, mask, _, _ in found], axis=0))
    everyone = kind == Kind.NONCOMM_HANG and n > 1 and len(ranks) == running.sum()
    words = [
        f"rank {few(np.flatnonzero(mask).tolist())} {words}"
        for _, mask, words, _ in found
    ]
    return Diagnosis(
        kind=kind,
        ranks=tuple(ranks.tolist()),
        scope="all" if everyone else "rank",
        evidence="; ".join(words),
        confidence=float(confidence),
    )


def _comm_hang(
    board: Board, inside: np.ndarray, age: np.ndarray, limits: np.ndarray
) -> Diagnosis:
    """All are inside: the communication hangs, or with one rank its device."""
    last = float(age[inside].min())
    seconds = f"the last to enter {last:.3g} s ago (limit {limits[inside].max():.3g} s)"
    confidence = float(1 - 0.5 * (limits[inside] / age[inside]).max())
    if len(inside) == 1:
        return Diagnosis(
            Kind.NONCOMM_HANG,
            ranks=(0,),
            scope="rank",
            evidence=f"rank 0 is alone and its program does not end, {seconds}",
            confidence=confidence,
        )
    words = f"all {int(inside.sum())} ranks are in the collective, {seconds}"
    behind = inside & (board.enter_seq < board.enter_seq[inside].max())
    if behind.any():  # a hint where to probe, not a culprit
        words += (
            f"; rank {few(np.flatnonzero(behind).tolist())} still in the one before"
        )
    return Diagnosis(Kind.COMM_HANG, evidence=words, confidence=confidence)
