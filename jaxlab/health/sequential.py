"""Finds the rank, or the communication, that has become slow: a sequential test.

Three statistics of each rank and step, in seconds:

    busy      its local time: neither waiting for others nor a collective that ends
              late for it counts
    relative  busy, less the median of the other ranks: what all share cancels
    late      median wait of the others, less its own: how long they waited for it

and of each step the median busy time and the pure communication. Steps are averaged
over blocks of half a second. The baseline has median and robust standard deviation
of each statistic over clean blocks, so each rank is compared with itself, and hosts
may differ. A block is unusual for a rank if all three exceed the baseline by a margin:
it does more than it did, more than the others, and they wait for it. It is unusual for
the program if the common busy time does, and for the communication if that does
beyond what the busy time has grown by (a loaded host is slow at both). Nothing is
unusual while steps are as short as ever: where they are dispatched ahead, ranks drift
apart in phase, and all wait for the last one at no cost.

A step that is longer than a block counts as several, one for each half second (or
usual step, where that is longer) of it that a hypothesis explains, up to `_MOST`: so
what makes steps many times as long is found in a few of them, and not in one.

Unusual blocks come in runs even in health: bursts of load. So the null hypothesis is a
Markov chain of usual and unusual blocks with probabilities of at most p (after a usual
block) and q (after an unusual one), which are learned while it runs and shared between
ranks. Under it 0.2 + 0.8 [unusual] / p is an e-value: its expectation, given the past,
is at most 1. The Shiryaev-Roberts sum of their products over all times of
change is an e-detector (Shin, Ramdas, Rinaldo, arXiv 2203.03532): the mean time to an
alarm in health is at least its limit, whatever the noise's distribution, in blocks. For
n ranks and two more hypotheses the limit is n + 2 times as large, the mean of
e-detectors being one. So the rate of false alarms is at most the configured one as
long as p and q are what they are said to be; what was never seen before, say a first
burst of ten seconds on one host, is an alarm, and rightly so.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxlab.health.detect import (
    Baseline,
    DetectConfig,
    Diagnosis,
    Kind,
    Window,
    few,
    median,
)

_PRIOR = 8.0  # weight of what is configured, in observations, beside what is learned
_STAKE = 0.8  # of the evidence, put on "unusual" at fair odds; the rest is kept
_MOST = 5  # blocks that a step can count as: one alone, however long, is no alarm
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
_ERROR = 1.17  # of an estimate of sigma by them from one observation, in sigma


def median_of_others(x_tn: np.ndarray) -> np.ndarray:
    """For each rank the median of all other ranks, the lower one of an even number.

    The lower, so that of three ranks with two slow ones each of both stands out.

    Args:
        x_tn: float[T, n]; NaN is absent.

    Returns:
        float64[T, n]; NaN where there is no other.
    """
    x_tn = np.asarray(x_tn, np.float64)
    if x_tn.shape[1] < 2:
        return np.full(x_tn.shape, np.nan)
    ordered = np.sort(x_tn, axis=1)  # NaN last
    count = np.isfinite(ordered).sum(1, keepdims=True)
    k = np.maximum(count - 2, 0) // 2  # among the count - 1 others
    low, high = (np.take_along_axis(ordered, k + i, 1) for i in (0, 1))
    others = np.where(x_tn <= low, high, low)
    return np.where(np.isfinite(x_tn) & (count > 1), others, np.nan)


def statistics(window: Window) -> np.ndarray:
    """float64[T, 3n+3]: busy, relative, late of each rank; common, pure_comm, step."""
    busy_tn = np.asarray(window.local, np.float64)
    relative_tn = busy_tn - median_of_others(busy_tn)
    # The upper median: as one that is slow too is busier, it waits less.
    late_tn = -median_of_others(-window.wait) - window.wait
    whole = [median(busy_tn, axis=1), window.pure_comm, window.step]
    return np.concatenate([busy_tn, relative_tn, late_tn, np.stack(whole, 1)], axis=1)


def _blocks(
    pending: np.ndarray | None, last: int, window: Window, cfg: DetectConfig
) -> tuple[np.ndarray, np.ndarray, int]:
    """Adds new steps to those pending and averages those that fill blocks.

    Returns:
        float64[blocks, 3n+3], the steps still pending and the last step's number.

    Raises:
        ValueError: the number of ranks has changed.
    """
    rows = statistics(window)
    if window.number is not None:
        rows = rows[window.number > last]
        last = int(max(last, window.number.max(initial=last)))
    if pending is not None:
        if pending.shape[1] != rows.shape[1]:
            raise ValueError(
                f"the window has {rows.shape[1] // 3 - 1} ranks, the state "
                f"{pending.shape[1] // 3 - 1}: start with a new baseline and state"
            )
        rows = np.concatenate([pending, rows])
    starts, elapsed = [0], 0.0
    for t, seconds in enumerate(rows[:, -1]):
        elapsed += 0.0 if math.isnan(seconds) else seconds
        if elapsed >= cfg.block * (1 - 1e-9):
            starts.append(t + 1)
            elapsed = 0.0
    *starts, end = starts
    full = rows[:end]
    if not starts:
        return full, rows, last
    present = np.isfinite(full)
    count = np.add.reduceat(present, starts, axis=0, dtype=np.float64)
    total = np.add.reduceat(np.where(present, full, 0.0), starts, axis=0)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return mean, rows[end:], last


def init_baseline(cfg: DetectConfig = DetectConfig()) -> Baseline:  # noqa: B008
    """A baseline that knows nothing yet."""
    return Baseline(cfg)


def update_baseline(
    baseline: Baseline, window: Window, diagnosis: Diagnosis | None = None
) -> Baseline:
    """Learns from a window, unless something ails the program.

    Call `update_slow` with the same window first and pass its diagnosis: nothing is
    learned from a window that is not healthy, or healthy with a confidence below one
    half. After a lasting change that is wanted (another batch size, a rank excluded)
    start a new one.

    Args:
        baseline: of `init_baseline`, or from the call before.
        window: steps since then; those seen before are skipped by `window.number`.
        diagnosis: of this window; None: healthy.

    Returns:
        The new baseline; its `center` is None before `cfg.warmup` blocks.

    Raises:
        ValueError: the number of ranks has changed.
    """
    cfg = baseline.cfg
    blocks, pending, last = _blocks(baseline.pending, baseline.last, window, cfg)
    learning = baseline.center is None
    ails = diagnosis is not None and (
        diagnosis.kind not in (Kind.HEALTHY, Kind.UNKNOWN)
        or (diagnosis.kind == Kind.HEALTHY and diagnosis.confidence < 0.5)
    )
    if ails:
        return baseline._replace(pending=pending[:0], last=last)
    seen = baseline.seen + np.arange(len(blocks))
    stride = np.where(seen < cfg.history, 1, cfg.history_stride)
    blocks = blocks[seen % stride == 0]
    history = baseline.history
    if len(blocks):
        history = blocks if history is None else np.concatenate([history, blocks])
        history = history[-cfg.history :]
    baseline = baseline._replace(
        history=history, pending=pending, last=last, seen=baseline.seen + len(seen)
    )
    if history is None:  # less than a block: a first idea of the step
        return baseline._replace(step=float(median(pending[:, -1], axis=0)))
    if not len(blocks):
        return baseline
    if learning and len(history) < cfg.warmup:
        return baseline._replace(step=float(median(history[:, -1], axis=0)))
    center = median(history, axis=0)
    scale = _SIGMA * median(np.abs(history - center), axis=0)
    return baseline._replace(center=center, scale=scale, step=float(center[-1]))


class SlowState(NamedTuple):
    """State of the sequential test. Hypotheses [n+2]: each rank, all, communication."""

    log_evidence: np.ndarray
    """float[n+2]: logarithm of the Shiryaev-Roberts sum"""
    active: np.ndarray
    """bool[n+2]: an alarm, until the evidence has fallen to half the limit"""
    unusual: np.ndarray
    """bool[n+2]: the last block"""
    chain: np.ndarray
    """float[4, n+2]: blocks after a usual one, of them unusual; the same after an
    unusual one"""
    tentative: np.ndarray
    """float[4, n+2]: what is added to `chain` once it is calm: no alarm's is"""
    excess: np.ndarray
    """float[n+2]: seconds per step above the baseline, mean since the run began"""
    run: np.ndarray
    """float[n+2]: blocks since the evidence left calm"""
    pending: np.ndarray
    """float[steps, 3n+3]: steps of the block that is not full"""
    last: int = -1
    """number of the last step seen"""


def init_slow(n: int, cfg: DetectConfig = DetectConfig()) -> SlowState:  # noqa: B008
    """The state before the first step of n ranks."""
    del cfg  # all that it sets is used at updates
    zeros, no = np.zeros(n + 2), np.zeros(n + 2, bool)
    return SlowState(
        log_evidence=np.full(n + 2, -np.inf),
        active=no,
        unusual=no,
        chain=np.zeros((4, n + 2)),
        tentative=np.zeros((4, n + 2)),
        excess=zeros,
        run=zeros,
        pending=np.zeros((0, 3 * n + 3)),
    )


def alarm_limit(n: int, cfg: DetectConfig) -> float:
    """Logarithm of the evidence at which one of n + 2 hypotheses is an alarm."""
    blocks_per_hour = 3600 / cfg.block
    mean_blocks = max(blocks_per_hour / cfg.false_alarms_per_hour, 1.0)
    return math.log((n + 2) * mean_blocks)


def excesses(
    block: np.ndarray, baseline: Baseline, cfg: DetectConfig
) -> tuple[np.ndarray, np.ndarray]:
    """What a block has beyond the baseline, and how much is unusual.

    Args:
        block: float[3n+3], as a row of `statistics`.
        baseline: ready.
        cfg: `min_slowdown` and `deviations`.

    Returns:
        Excess and margin, float64[n+2] both, in seconds per step. NaN: not known.
    """
    center, scale = baseline.center, baseline.scale
    assert center is not None and scale is not None
    n = len(center) // 3 - 1
    delta = block - center
    busy, relative, late = delta[:n], delta[n : 2 * n], delta[2 * n : 3 * n]
    excess, margin = np.full(n + 2, np.nan), np.empty(n + 2)
    excess[:n] = np.fmin(np.minimum(busy, relative), late)
    excess[n] = delta[-3]
    if n > 1:
        # On a loaded host the communication is slow too, as much as the work: which
        # tells nothing where it is but what a host does before it dispatches a step.
        tells = center[-3] > cfg.min_slowdown * baseline.step
        growth = block[-3] / center[-3] if tells else 1.0
        excess[n + 1] = block[-2] - center[-2] * np.fmax(growth, 1.0)
    if delta[-1] <= cfg.min_slowdown * baseline.step:
        excess = np.minimum(excess, 0.0)
    margin[:n] = np.fmax(scale[n : 2 * n], scale[2 * n : 3 * n])
    margin[n:] = scale[-3:-1]
    assert baseline.history is not None
    # Center and scale are estimates, with a standard error (of normal noise).
    young = 1 + _ERROR / math.sqrt(len(baseline.history))
    margin = np.fmax(young * cfg.deviations * margin, cfg.min_slowdown * baseline.step)
    return excess, margin


def _probabilities(chain: np.ndarray, cfg: DetectConfig) -> np.ndarray:
    """float[2, n+2]: of an unusual block in health, after a usual and an unusual one.

    What is configured is the least. Ranks share what they learn: a host that has had
    no burst yet is like those that had.
    """
    trials, hits = chain[::2], chain[1::2]
    least = np.full(trials.shape, cfg.chance)
    least[1] = cfg.persistence
    least[1, -2] = cfg.persistence_all
    pooled = least.copy()
    shared = _PRIOR * least[:, :1] + hits[:, :-2].sum(1, keepdims=True)
    pooled[:, :-2] = shared / (_PRIOR + trials[:, :-2].sum(1, keepdims=True))
    pooled = np.fmax(pooled, least)
    own = (_PRIOR * pooled + hits) / (_PRIOR + trials)
    return np.clip(own, least, 0.9)


def _advance(
    state: SlowState, block: np.ndarray, baseline: Baseline, cfg: DetectConfig
) -> SlowState:
    """One average of `_blocks`, which counts as one block or more."""
    excess, margin = excesses(block, baseline, cfg)
    unusual = excess > margin
    unusual[-1] &= ~unusual[-2]  # all are slow: the communication's part is not known
    parts = np.where(unusual, excess, 0.0) / max(cfg.block, baseline.step)
    times = np.clip(np.rint(parts), 1, _MOST).astype(int)
    for i in range(times.max()):
        state = _observe(state, excess, unusual, i < times, cfg)
    return state


def _observe(
    state: SlowState,
    excess: np.ndarray,
    unusual: np.ndarray,
    counts: np.ndarray,
    cfg: DetectConfig,
) -> SlowState:
    """One block more for each of the hypotheses for which it `counts`."""
    n = len(state.run) - 2
    p = np.where(state.unusual, *_probabilities(state.chain, cfg)[::-1])
    ratio = 1 - _STAKE + _STAKE * unusual / p
    limit = alarm_limit(n, cfg)
    log_evidence = np.logaddexp(state.log_evidence, 0.0) + np.log(ratio)
    log_evidence = np.minimum(log_evidence, limit)  # so that recovery shows soon
    log_evidence = np.where(counts, log_evidence, state.log_evidence)
    half = log_evidence > limit / 2
    alarm = log_evidence >= limit
    alarm[-1] &= not half[:-1].any()  # may be slow because of a rank: wait and see
    active = alarm | (state.active & half)

    seen = np.stack([~state.unusual, ~state.unusual & unusual])
    seen = np.concatenate([seen, [state.unusual, state.unusual & unusual]])
    tentative = np.where(active, 0.0, state.tentative + seen)
    calm = (log_evidence < 0) & ~active
    run = np.where(calm, 0.0, state.run + 1)
    weight = 1 / np.fmax(run, 1)
    mean = state.excess + weight * (np.fmax(excess, 0.0) - state.excess)
    changes = dict(
        log_evidence=log_evidence,
        active=active,
        unusual=unusual,
        chain=state.chain + np.where(calm, tentative, 0.0),
        tentative=np.where(calm, 0.0, tentative),
        excess=np.where(calm, 0.0, mean),
        run=run,
    )
    return state._replace(
        **{
            name: np.where(counts, value, getattr(state, name))
            for name, value in changes.items()
        }
    )


def update_slow(
    state: SlowState,
    window: Window,
    baseline: Baseline,
    cfg: DetectConfig = DetectConfig(),  # noqa: B008
) -> tuple[SlowState, Diagnosis]:
    """Takes the steps of a window into the test and says where it stands.

    Args:
        state: of `init_slow`, or from the call before.
        window: steps since then; those seen before are skipped by `window.number`.
        baseline: the same `cfg.block` as here.
        cfg: limits.

    Returns:
        The new state, and a `Diagnosis`: NONCOMM_SLOW with scope "rank", or "all" and
        no ranks where the same has become slow everywhere; COMM_SLOW with scope
        "none", for `classify_matrix` to localise; HEALTHY; UNKNOWN before the
        baseline is ready. While the evidence for a rank is half way, an alarm of the
        communication waits: a slow rank can slow its communication too.

    Raises:
        ValueError: window, state and baseline differ in the number of ranks.
    """
    n = len(state.run) - 2
    blocks, pending, last = _blocks(state.pending, state.last, window, cfg)
    state = state._replace(pending=pending, last=last)
    if baseline.center is None:
        count = 0 if baseline.history is None else len(baseline.history)
        words = f"the baseline has {count} of {cfg.warmup} blocks"
        return state, Diagnosis(Kind.UNKNOWN, evidence=words)
    if len(baseline.center) != 3 * n + 3:
        raise ValueError(
            f"the baseline has {len(baseline.center) // 3 - 1} ranks, the state {n}: "
            "start with a new baseline and state"
        )
    for block in blocks:
        state = _advance(state, block, baseline, cfg)
    return state, _judge(state, baseline, cfg)


def detect_slow(
    window: Window,
    baseline: Baseline,
    cfg: DetectConfig = DetectConfig(),  # noqa: B008
) -> Diagnosis:
    """Diagnoses one window on its own; see `update_slow` for a stream of them.

    An alarm takes 9 unusual blocks of half a second in a row (14 for 4096 ranks) with
    the default limits, or two or three steps that are many times as long as they were;
    a shorter window that looks bad is HEALTHY of low confidence.
    """
    return update_slow(init_slow(window.local.shape[1], cfg), window, baseline, cfg)[1]


def _judge(state: SlowState, baseline: Baseline, cfg: DetectConfig) -> Diagnosis:
    """The diagnosis of a state: ranks before all before the communication."""
    n = len(state.run) - 2
    limit = alarm_limit(n, cfg)
    assert baseline.center is not None
    margin = excesses(baseline.center, baseline, cfg)[1]
    step = baseline.step
    ranks = np.flatnonzero(state.active[:n])
    if len(ranks):
        # Half the evidence is still far beyond chance, beside a rank that has it all.
        ranks = np.flatnonzero(state.log_evidence[:n] > limit / 2)
        kind, scope, which, subject = Kind.NONCOMM_SLOW, "rank", ranks, "own work"
    elif state.active[n]:
        kind, scope, which, subject = Kind.NONCOMM_SLOW, "all", [n], "all ranks' work"
    elif state.active[n + 1]:
        kind, scope, which, subject = Kind.COMM_SLOW, "none", [n + 1], "communication"
    else:
        top = int(np.argmax(state.log_evidence))
        name = f"rank {top}" if top < n else ("all ranks", "communication")[top - n]
        nearest = max(float(state.log_evidence[top]), 0.0)
        return Diagnosis(
            Kind.HEALTHY,
            evidence=f"step {step:.3g} s; most evidence: {name}, {nearest:.1f} of "
            f"{limit:.1f}",
            confidence=float(np.clip(1 - nearest / limit, 0, 1)),
        )
    excess = state.excess[which]
    worst = float(excess.max())
    words = (
        f"{subject} takes {few([f'{1e3 * x:.3g}' for x in excess])} ms longer than "
        f"usual ({worst / step:.0%} of a step of {1e3 * step:.3g} ms) for "
        f"{int(state.run[which].max())} blocks of {cfg.block:g} s; log evidence "
        f"{state.log_evidence[which].max():.1f}, limit {limit:.1f}"
    )
    if scope == "rank" and state.log_evidence[-1] >= limit:
        words += "; the communication has become slow too, perhaps because of it"
    sure = 1 - 0.5 * margin[which] / np.fmax(excess, margin[which])
    return Diagnosis(
        kind,
        ranks=tuple(int(rank) for rank in which) if scope == "rank" else (),
        scope=scope,
        evidence=words,
        confidence=float(sure.min()),
    )


def slow_from_start(baseline: Baseline) -> Diagnosis:
    """Names ranks that the others have always waited for, if it is worth a report.

    `detect_slow` compares each rank with itself, so it is blind to these; they may be
    slower hosts on purpose, and nothing is done about them unasked.

    Args:
        baseline: ready, or UNKNOWN is returned.
    """
    if baseline.center is None:
        return Diagnosis(Kind.UNKNOWN, evidence="the baseline is not ready")
    cfg, center, scale = baseline.cfg, baseline.center, baseline.scale
    assert scale is not None
    n = len(center) // 3 - 1
    usual = np.fmin(center[n : 2 * n], center[2 * n : 3 * n])
    margin = cfg.min_slowdown * baseline.step
    ranks = np.flatnonzero(usual > margin)
    if not len(ranks):
        return Diagnosis(Kind.HEALTHY, evidence="no rank is later than others")
    worst = float(usual[ranks].max())
    return Diagnosis(
        Kind.NONCOMM_SLOW,
        ranks=tuple(ranks.tolist()),
        scope="rank",
        evidence=f"the others have waited for it from the start, {1e3 * worst:.3g} ms "
        f"of each step of {1e3 * baseline.step:.3g} ms",
        confidence=float(1 - 0.5 * margin / usual[ranks].min()),
    )
