"""The statistics of a study: paired tests, looks, corrections, sample sizes.

Everything is over differences paired by seed, `differences[n]`, float64: one number a
seed, a weighted sum over the arms (`contrast`). The rule of a whole study is `decide`:
at look k of K each comparison is tested at the level alpha_k, corrected by Holm over
the comparisons of that look, and the alpha_k add up to alpha. By Bonferroni's
inequality the chance of any false claim is at most alpha, whatever the dependence
between looks and between comparisons.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Floats = Sequence[float] | np.ndarray


def p_value(differences: Floats, test: str = "t") -> float:
    """Two-sided p of "the differences are centred at zero".

    Args:
        differences: [n], one a seed.
        test: "t", Student's paired test (exact for normal differences), or
            "sign-flip", the permutation test over all 2^n signs (exact for symmetric
            ones; Fisher 1935).

    Returns:
        1.0 where nothing can be said: fewer than two pairs, or all zero. Equal
        differences have no variance to test with, so they get the sign-flip p.

    Raises:
        ValueError: an unknown test, more than 20 pairs to flip, or a difference that
            is not finite.
    """
    d = _finite(differences)
    if test not in ("t", "sign-flip"):
        raise ValueError(f"no paired test is called {test!r}; t or sign-flip")
    if len(d) < 2 or not d.any():
        return 1.0
    if test == "sign-flip":
        return _sign_flip(d)
    if np.ptp(d) == 0:
        return 2.0 ** (1 - len(d))
    from scipy.special import stdtr

    return float(2 * stdtr(len(d) - 1, -abs(_t(d))))


def smallest_p(n: int, test: str = "t") -> float:
    """The smallest p that `n` pairs can reach: 2^(1-n) by sign-flip, 0 by t."""
    return 1.0 if n < 2 else 2.0 ** (1 - n) if test == "sign-flip" else 0.0


def interval(differences: Floats, level: float) -> tuple[float, float]:
    """Student's interval of the mean difference.

    Args:
        differences: [n].
        level: coverage, 0.95 for instance.

    Returns:
        its ends; infinite ones for fewer than two pairs.
    """
    from scipy.special import stdtrit

    d = _finite(differences)
    if len(d) < 2:
        return -math.inf, math.inf
    half = stdtrit(len(d) - 1, (1 + level) / 2) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean() - half), float(d.mean() + half)


def bootstrap_interval(
    differences: Floats, level: float, resamples: int = 9999, seed: int = 0
) -> tuple[float, float]:
    """Bias-corrected, accelerated bootstrap interval of the mean (Efron 1987).

    It assumes no distribution, and covers less than `level` for few pairs; Student's
    interval is the one that goes with the test.

    Args:
        differences: [n].
        level: nominal coverage.
        resamples: number of resamples.
        seed: of the resampling, so that the ends are the same each time.

    Returns:
        its ends; infinite ones for fewer than two pairs.
    """
    from scipy.special import ndtr, ndtri

    d = _finite(differences)
    n = len(d)
    if n < 2:
        return -math.inf, math.inf
    if np.ptp(d) == 0:
        return float(d[0]), float(d[0])
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
    means = d[draws].mean(axis=1)
    below = ((means < d.mean()).mean() + (means <= d.mean()).mean()) / 2
    bias = ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    left_out = (d.sum() - d) / (n - 1)
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    z = bias + ndtri([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(means, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def equivalence_p(differences: Floats, margin: float) -> float:
    """The p of "the mean difference is as large as `margin`, either way".

    Two one-sided t tests (Schuirmann 1987): small where the mean lies surely within
    plus or minus `margin`.

    Returns:
        1.0 for fewer than two pairs or a margin that is not positive.
    """
    from scipy.special import stdtr

    d = _finite(differences)
    if len(d) < 2 or margin <= 0:
        return 1.0
    if np.ptp(d) == 0:
        return 2.0 ** -len(d) if abs(d[0]) < margin else 1.0
    scale = d.std(ddof=1) / math.sqrt(len(d))
    return float(stdtr(len(d) - 1, (abs(d.mean()) - margin) / scale))


def holm(ps: Floats) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    order = np.argsort(ps, kind="stable")
    adjusted, worst = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * float(ps[i])))
        adjusted[i] = worst
    return adjusted


def look_levels(looks: Sequence[int], alpha: float) -> list[float]:
    """Level of each look; they add up to alpha.

    The increments of the O'Brien-Fleming spending function (Lan and DeMets 1983),
    alpha*(t) = 4 - 4 Phi(z(1 - alpha/4) / sqrt(t)): little early, most at the end.
    Taken as levels they hold for any dependence; two equal looks cost 4 % of the last.

    Args:
        looks: numbers of seeds at which the study is looked at, increasing.
        alpha: level of the whole.
    """
    from scipy.special import ndtr, ndtri

    shares = np.asarray(looks, float) / looks[-1]
    spent = 4 * ndtr(ndtri(alpha / 4) / np.sqrt(shares))
    return [float(level) for level in np.diff(spent, prepend=0.0)]


def power(n: int, effect: float, sd: float, alpha: float) -> float:
    """Chance that a two-sided paired t test of n pairs finds a difference.

    Args:
        n: pairs.
        effect: true mean difference.
        sd: true standard deviation of the differences.
        alpha: level of the test.
    """
    from scipy.special import nctdtr, stdtrit

    if n < 2:
        return 0.0
    if sd == 0:
        return float(effect != 0)
    critical = stdtrit(n - 1, 1 - alpha / 2)
    shift = abs(effect) / sd * math.sqrt(n)
    if shift - critical > 8:  # beyond the reach of the noncentral distribution's sum
        return 1.0
    low, high = nctdtr(n - 1, shift, -critical), nctdtr(n - 1, shift, critical)
    return float(1 - high + (0 if math.isnan(low) else low))


def sample_size(
    effect: float, sd: float, alpha: float, target: float, most: int = 1000
) -> int | None:
    """Fewest pairs with at least the power `target`; None if `most` do not do."""
    return next(
        (n for n in range(3, most + 1) if power(n, effect, sd, alpha) >= target), None
    )


def sd_bound(differences: Floats, confidence: float = 0.8) -> float:
    """Upper confidence bound of the standard deviation, from a small pilot.

    A pilot's own deviation is too small about half of the time, and a study planned
    with it too weak (Browne 1995).
    """
    from scipy.special import chdtri

    d = _finite(differences)
    if len(d) < 2:
        return math.inf
    freedom = len(d) - 1
    return float(d.std(ddof=1) * math.sqrt(freedom / chdtri(freedom, confidence)))


def contrast(values: Mapping[str, Floats], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted sum over arms for each seed, float64[n].

    Args:
        values: of each arm, [n], one a seed in the same order.
        weights: of each arm that takes part; {"a": 1, "b": -1} is a minus b.
    """
    arms = [w * np.asarray(values[arm], float) for arm, w in weights.items()]
    return np.sum(arms, axis=0)


def trend_weights(factor: Mapping[str, float]) -> dict[str, float]:
    """Weights whose contrast of log(metric) is the slope on log(factor).

    Least squares over the arms of one seed: the exponent of a power law.

    Args:
        factor: value of each arm, positive and not all equal.
    """
    x = np.log(list(factor.values()))
    centred = x - x.mean()
    weights = centred / (centred**2).sum()
    return dict(zip(factor, map(float, weights), strict=True))


@dataclass(frozen=True)
class Verdict:
    """What a study says about one comparison."""

    found: str
    """"higher", "lower", "equivalent" (within the margin), "undecided", or "unstable":
    an arm diverged, so the pairs that are left say nothing of its mean"""
    look: int
    """look at which it was settled, from 0"""
    n: int
    """pairs used"""
    mean: float
    """mean difference"""
    low: float
    """lower end of the interval that goes with the test"""
    high: float
    """upper end of it"""
    p: float
    """p of the paired test"""
    p_adjusted: float
    """p corrected for comparisons and looks; at most alpha: a difference"""
    p_equivalence: float
    """corrected p of the equivalence test, at the last look only, else 1"""


def decide(
    differences: Mapping[str, Floats],
    looks: Sequence[int],
    alpha: float,
    margin: float = 0.0,
    test: str = "t",
    done: Sequence[int] | None = None,
    unstable: Collection[str] = (),
) -> dict[str, Verdict]:
    """The verdicts of a study from all that it has seen so far.

    Args:
        differences: of each comparison, in the order of the plan's seeds; a pair that
            a failed run has spoilt is NaN and left out.
        looks: planned numbers of seeds, increasing.
        alpha: level of all claims of difference together, and again of all claims of
            equivalence together.
        margin: smallest effect that matters; 0: equivalence is not tested.
        test: see `p_value`.
        done: the looks taken; None: those whose seeds are there.
        unstable: comparisons with an arm that diverged; nothing is claimed of them.

    Returns:
        a verdict for each comparison. A difference is claimed at the first look where
        the corrected p allows it, and stays claimed; when all are, later looks are not
        taken.
    """
    have = max((len(d) for d in differences.values()), default=0)
    if done is None:
        done = [k for k, n in enumerate(looks) if n <= have]
    levels = look_levels(looks, alpha)
    verdicts: dict[str, Verdict] = {}
    for k in done:
        if settled(verdicts.values()):
            break
        pairs = {name: _here(d, looks[k]) for name, d in differences.items()}
        ps = {
            name: 1.0 if name in unstable else p_value(d, test)
            for name, d in pairs.items()
        }
        corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
        last = k == len(looks) - 1
        within = {
            name: equivalence_p(d, margin) if last and name not in unstable else 1.0
            for name, d in pairs.items()
        }
        within = dict(zip(within, holm(list(within.values())), strict=True))
        for name, d in pairs.items():
            if name in verdicts and verdicts[name].found in ("higher", "lower"):
                continue
            adjusted = min(1.0, corrected[name] * alpha / levels[k])
            before = verdicts[name].p_adjusted if name in verdicts else 1.0
            mean = float(d.mean()) if len(d) else math.nan
            low, high = interval(d, 1 - levels[k] / len(pairs))
            found = "unstable" if name in unstable else "undecided"
            if corrected[name] <= levels[k]:
                found = "higher" if mean > 0 else "lower"
            elif within[name] <= alpha:
                found = "equivalent"
            verdicts[name] = Verdict(
                found,
                k,
                len(d),
                mean,
                low,
                high,
                ps[name],
                min(before, adjusted),
                within[name],
            )
    return verdicts


def settled(verdicts: Iterable[Verdict]) -> bool:
    """Whether there are verdicts and more seeds can change none of them."""
    final = ("higher", "lower", "unstable")
    found = [verdict.found in final for verdict in verdicts]
    return bool(found) and all(found)


def _here(differences: Floats, n: int) -> np.ndarray:
    d = np.asarray(differences, float)[:n]
    return d[~np.isnan(d)]


def _finite(differences: Floats) -> np.ndarray:
    d = np.asarray(differences, np.float64)
    if not np.isfinite(d).all():
        raise ValueError(f"a difference is not finite: {d.tolist()}")
    return d


def _t(d: np.ndarray) -> float:
    return float(d.mean() / (d.std(ddof=1) / math.sqrt(len(d))))


def _sign_flip(d: np.ndarray) -> float:
    if len(d) > 20:
        raise ValueError(f"{len(d)} pairs have too many signs to try; use the t test")
    sums = np.zeros(1)
    for value in np.abs(d):
        sums = np.concatenate([sums + value, sums - value])
    reached = abs(d.sum()) * (1 - 1e-12)
    return float((np.abs(sums) >= reached).mean())
