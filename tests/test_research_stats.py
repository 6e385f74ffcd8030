"""The statistics against scipy.stats, against enumeration, and by simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.research import stats

NUMBERS = st.floats(-100, 100, allow_subnormal=False)
patient = settings(deadline=None)
PAIRS = st.lists(NUMBERS, min_size=3, max_size=9).filter(
    lambda d: np.std(d) > 1e-3 * (1 + abs(np.mean(d)))
)


@patient
@given(PAIRS)
def test_t_test_and_interval_are_scipys(d):
    reference = scipy.stats.ttest_1samp(d, 0.0)
    assert stats.p_value(d) == pytest.approx(reference.pvalue, rel=1e-9)
    interval = reference.confidence_interval(0.9)
    assert stats.interval(d, 0.9) == pytest.approx(tuple(interval), rel=1e-9)


@patient
@given(PAIRS)
def test_sign_flip_enumerates_all_signs(d):
    sums = [abs(np.dot(d, s)) for s in itertools.product((1, -1), repeat=len(d))]
    expected = np.mean(np.array(sums) >= abs(sum(d)) * (1 - 1e-12))
    assert stats.p_value(d, "sign-flip") == pytest.approx(expected)
    assert stats.p_value(d, "sign-flip") >= stats.smallest_p(len(d), "sign-flip")


@patient
@given(PAIRS, st.floats(0.01, 50))
def test_equivalence_is_two_one_sided_tests(d, margin):
    low = scipy.stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    high = scipy.stats.ttest_1samp(d, margin, alternative="less").pvalue
    assert stats.equivalence_p(d, margin) == pytest.approx(max(low, high), rel=1e-8)


def test_bootstrap_agrees_with_scipys():
    d = np.random.default_rng(3).exponential(size=12)
    reference = scipy.stats.bootstrap(
        (d,), np.mean, n_resamples=20000, confidence_level=0.9, rng=1
    ).confidence_interval
    ours = stats.bootstrap_interval(d, 0.9, resamples=20000)
    assert ours == pytest.approx(tuple(reference), rel=0.03)
    assert ours == stats.bootstrap_interval(d, 0.9, resamples=20000)


@patient
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_holm_rejects_step_by_step(ps, alpha):
    """Against the definition: the smallest at alpha/m, then at alpha/(m-1), ..."""
    rejected, left = set(), sorted(range(len(ps)), key=lambda i: ps[i])
    while left and ps[left[0]] * len(left) <= alpha:
        rejected.add(left.pop(0))
    adjusted = stats.holm(ps)
    assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected
    assert all(a >= p for a, p in zip(adjusted, ps, strict=True))


@patient
@given(st.lists(st.integers(2, 40), min_size=1, max_size=5, unique=True).map(sorted))
def test_levels_of_looks_add_up_to_alpha(looks):
    levels = stats.look_levels(looks, 0.05)
    assert sum(levels) == pytest.approx(0.05)
    assert min(levels) > 0 or looks[0] < looks[-1] / 4


def test_levels_are_obrien_fleming():
    """alpha*(1/2) of the two-sided spending function at 0.05 (Lan and DeMets 1983)."""
    first, last = stats.look_levels([5, 10], 0.05)
    z = scipy.stats.norm.ppf(1 - 0.05 / 4) / math.sqrt(0.5)
    assert first == pytest.approx(4 * scipy.stats.norm.sf(z))
    assert last == pytest.approx(0.05 - first)


@pytest.mark.parametrize(("n", "effect"), [(4, 1.5), (10, 1.0), (40, 0.3), (6, 3.0)])
def test_power_is_that_of_the_noncentral_t(n, effect):
    critical = scipy.stats.t.ppf(0.975, n - 1)
    shifted = scipy.stats.nct(n - 1, effect * math.sqrt(n))
    expected = shifted.sf(critical) + shifted.cdf(-critical)
    assert stats.power(n, effect, 1.0, 0.05) == pytest.approx(expected, abs=1e-6)


def test_sample_size_is_the_fewest():
    n = stats.sample_size(0.8, 1.0, 0.05, 0.9)
    assert n is not None
    assert stats.power(n, 0.8, 1.0, 0.05) >= 0.9 > stats.power(n - 1, 0.8, 1.0, 0.05)
    assert stats.sample_size(1e-6, 1.0, 0.05, 0.9) is None


def test_deviation_is_bounded_as_often_as_said():
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    covered = np.mean([stats.sd_bound(d, 0.8) >= 1 for d in draws])
    assert covered == pytest.approx(0.8, abs=0.03)


def test_trend_weights_give_the_slope():
    factor = {"a": 1.0, "b": 2.0, "c": 8.0}
    weights = stats.trend_weights(factor)
    y = np.array([3.0, 1.0, 0.2])
    expected = np.polyfit(np.log(list(factor.values())), y, 1)[0]
    values = {arm: [v] for arm, v in zip(factor, y, strict=True)}
    assert stats.contrast(values, weights)[0] == pytest.approx(expected)


def test_what_has_no_variance():
    assert stats.p_value([0.0, 0.0, 0.0]) == 1.0
    assert stats.p_value([0.1] * 4) == 2 / 2**4  # not 0, which t would give
    assert stats.p_value([0.1]) == 1.0
    assert stats.equivalence_p([0.0] * 6, 0.1) == 2.0**-6
    assert stats.power(5, 0.1, 0.0, 0.05) == 1.0
    with pytest.raises(ValueError, match="not finite"):
        stats.p_value([1.0, math.nan])
    with pytest.raises(ValueError, match="sign-flip"):
        stats.p_value([1.0, 2.0], "wilcoxon")


@pytest.mark.parametrize("test", ["t", "sign-flip"])
def test_false_claims_are_at_most_alpha(test):
    """Three comparisons with a shared baseline, three looks, no true difference."""
    draw, studies, false = np.random.default_rng(1), 500, 0
    for _ in range(studies):
        base, *arms = draw.normal(size=(4, 12))
        verdicts = stats.decide(
            {str(i): arm - base for i, arm in enumerate(arms)},
            [6, 9, 12],
            0.05,
            test=test,
        )
        false += any(v.found in ("higher", "lower") for v in verdicts.values())
    assert false / studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert false > 0  # it is a test, not a refusal


def test_looking_at_every_seed_without_the_rule_would_claim_too_much():
    """What the rule is for: add seeds until p < 0.05."""
    draw = np.random.default_rng(2)
    naive = np.mean(
        [
            any(stats.p_value(d[:n]) < 0.05 for n in range(4, 13))
            for d in draw.normal(size=(400, 12))
        ]
    )
    assert naive > 0.08


def test_claims_of_equivalence_are_at_most_alpha():
    draw = np.random.default_rng(4)
    found = [
        stats.decide({"c": d}, [6, 12], 0.05, margin=1.0)["c"].found
        for d in draw.normal(
            1.0, 1.0, size=(1500, 12)
        )  # exactly as large as the margin
    ]
    assert found.count("equivalent") / len(found) <= 0.05 + 3 * 0.0098


def test_a_difference_stays_claimed_and_failed_pairs_are_left_out():
    early = [-1.0, -1.1, -0.9, -1.05, -0.95, -1.02]
    later = [*early, 5.0, 6.0]
    verdict = stats.decide({"c": later}, [6, 8], 0.05)["c"]
    assert (verdict.found, verdict.look, verdict.n) == ("lower", 0, 6)
    assert verdict.p_adjusted <= 0.05 and verdict.high < 0
    spoilt = stats.decide({"c": [math.nan, *early[1:], math.nan, 0.0]}, [6], 0.05)["c"]
    assert spoilt.n == 5
    assert stats.decide({"c": early[:3]}, [6, 8], 0.05) == {}


def test_power_is_as_planned():
    """The whole rule with two looks finds a planted effect as often as planned."""
    looks = [5, 10]
    level = stats.look_levels(looks, 0.05)[-1]
    planned = stats.power(10, 1.2, 1.0, level)
    draw = np.random.default_rng(5)
    found = [
        stats.decide({"c": d}, looks, 0.05)["c"].found
        for d in draw.normal(-1.2, 1.0, size=(400, 10))
    ]
    assert found.count("lower") / 400 == pytest.approx(planned, abs=0.06)
    assert found.count("higher") == 0
