"""Curation: how many rollouts, how long, which success, which steps."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import rl
from jaxlab.rl import (
    Experience,
    PoolState,
    Source,
    entropy_mask,
    expire,
    is_informative,
    length_cap,
    needs_experience,
    pool_add,
    pool_sample,
    provenance,
    rollout_number,
    success_rate,
)

rates = st.floats(0, 1)


def test_exports_resolve():
    assert all(getattr(rl, name) is not None for name in rl.__all__)
    assert sorted(rl.__all__) == sorted(rl._MODULES)
    assert not hasattr(rl, "no_such_name")


@pytest.mark.parametrize(
    ("rate", "number"),
    [
        (None, 8),
        (0, 8),
        (0.6, 8),
        (0.61, 7),
        (0.7, 5),
        (0.75, 5),
        (0.8, 4),
        (0.9, 3),
        (1, 2),
        (np.float32(1), 2),
    ],
)
def test_rollout_number_of_the_table(rate, number):
    assert rollout_number(rate) == number


@given(rates, rates, st.integers(1, 12), st.integers(0, 12), rates)
def test_rollout_number_is_bounded_and_never_rises(a, b, n_min, more, threshold):
    number = partial(
        rollout_number, n_max=n_min + more, n_min=n_min, threshold=threshold
    )
    low, high = sorted((a, b))
    assert n_min <= number(high) <= number(low) <= n_min + more
    assert number(threshold) == n_min + more
    assert rollout_number(a, 4, 4) == 4


@given(st.floats(0.600001, 1), st.integers(1, 3), st.integers(3, 16))
def test_rollout_number_follows_the_formula(rate, n_min, n_max):
    assert rollout_number(rate, n_max, n_min) == min(
        max(math.floor(9 / rate - 7), n_min), n_max
    )


@pytest.mark.parametrize(
    "arguments", [(-0.1,), (1.1,), (math.nan,), (0.5, 2, 3), (0.5, 8, 0)]
)
def test_rollout_number_says_what_is_wrong(arguments):
    with pytest.raises(ValueError, match="success_rate is|n_min"):
        rollout_number(*arguments)


@pytest.mark.parametrize(
    ("longest", "cap"),
    [(None, 30), (0, 2), (1, 4), (4, 7), (8, 12), (10, 15), (40, 30)],
)
def test_length_cap_of_the_table(longest, cap):
    assert length_cap(longest) == cap


@given(
    st.integers(0, 100),
    st.integers(0, 100),
    st.integers(1, 20),
    st.integers(0, 40),
    st.floats(0, 1, exclude_max=True),
)
def test_length_cap_is_bounded_leaves_slack_and_probes(a, b, l_min, more, draw):
    l_max = l_min + more
    cap = partial(length_cap, l_max=l_max, l_min=l_min, draw=draw)
    low, high = sorted((a, b))
    assert l_min <= cap(low) <= cap(high) <= l_max
    assert cap(high) > high or cap(high) == l_max  # so that it can grow again
    if draw < 0.05:
        assert cap(low) == l_max
    assert cap(low, probe_share=1) == l_max
    assert cap(low, probe_share=0) == length_cap(low, l_max, l_min)


def test_the_share_of_probes_is_as_asked():
    draws = np.random.default_rng(0).random(4000)
    share = np.mean([length_cap(4, draw=draw) == 30 for draw in draws])
    assert abs(share - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)


@pytest.mark.parametrize(
    "options",
    [{"l_max": 3, "l_min": 4}, {"l_min": 0}, {"draw": -1}, {"probe_share": 2}],
)
def test_length_cap_says_what_is_wrong(options):
    with pytest.raises(ValueError, match="must be in|steps need"):
        length_cap(4, **options)
    with pytest.raises(ValueError, match="longest_success is -1"):
        length_cap(-1)


def test_success_rate_counts_what_says_something():
    assert success_rate([]) is None
    assert success_rate([None, None]) is None
    assert success_rate([1, 0, None, 1]) == pytest.approx(2 / 3)
    # A failure that the cap caused does not count; a reward within the cap does.
    assert success_rate([1, 0, 0, 0.5], [False, True, False, True]) == 0.5
    assert success_rate([0] * 10 + [1] * 16) == 1
    assert success_rate([1] * 10 + [0, None, 0], window=2) == 0
    assert success_rate(np.array([0.0, 1.0])) == 0.5
    with pytest.raises(ValueError, match="window"):
        success_rate([1], window=0)
    with pytest.raises(ValueError):
        success_rate([1, 0], [True])


def test_a_lost_success_brings_the_rollouts_back():
    rewards = [0.0] * 8
    numbers = []
    for reward in [1.0] * 16 + [0.0] * 12:
        rewards.append(reward)
        numbers.append(rollout_number(success_rate(rewards)))
    assert numbers[0] == 8 and numbers[15] == 2 and numbers[-1] == 8
    assert numbers[:16] == sorted(numbers[:16], reverse=True)
    assert numbers[15:] == sorted(numbers[15:])


def test_groups_that_teach_and_groups_that_need_help():
    assert needs_experience([0, 0, 0]) and needs_experience(np.zeros(2))
    assert not needs_experience([0, 0.5]) and not needs_experience([])
    assert is_informative([0, 0, 1]) and is_informative(np.array([0.5, 1.0]))
    for rewards in ([], [1], [0, 0], [1, 1], [0.3, 0.3]):
        assert not is_informative(rewards)
    assert not is_informative([1, 1, 0], mean_max=0.6)


def experience(name, task="t", source=Source.SELF, version=0):
    return Experience(task, name, source, version)


def filled(*items):
    pool = PoolState()
    for item in items:
        pool = pool_add(pool, item)
    return pool


def test_the_pool_adds_once_and_leaves_the_old_state_alone():
    empty = PoolState()
    one = pool_add(empty, experience("a"))
    assert empty == PoolState() and len(one.items) == 1
    assert pool_add(one, experience("a", version=9)) is one
    with pytest.raises(ValueError, match="per_task"):
        pool_add(one, experience("b"), per_task=0)


def test_a_full_task_loses_its_own_oldest_first_and_demonstrations_last():
    pool = PoolState()
    for item in (
        experience("other", task="u"),
        experience("human", source=Source.HUMAN),
        experience("v3", version=3),
        experience("oracle", source=Source.ORACLE),
        experience("v1", version=1),
        experience("v2", version=2),
    ):
        pool = pool_add(pool, item, per_task=3)
    names = [item.trajectory for item in pool.items]
    assert names == ["other", "human", "v3", "oracle"]
    pool = pool_add(pool, experience("v4", version=4), per_task=2)
    assert [x.trajectory for x in pool.items] == ["other", "human", "oracle"]


def test_sampling_counts_and_reaches_every_success_of_the_task_alike():
    pool = filled(*map(experience, "abc"), experience("x", task="u"))
    chosen = []
    for draw in (np.arange(300) + 0.5) / 300:
        after, item = pool_sample(pool, "t", 0, draw)
        assert item is not None and item.injected == 0 and item.task == "t"
        chosen.append(item.trajectory)
        assert sum(x.injected for x in after.items) == 1
        assert sum(x.injected for x in pool.items) == 0
    assert {name: chosen.count(name) for name in "abc"} == dict.fromkeys("abc", 100)
    assert pool_sample(pool, "unknown", 0, 0.5) == (pool, None)
    for draw in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="draw"):
            pool_sample(pool, "t", 0, draw)


def test_age_bounds_what_the_policy_did_and_use_bounds_everything():
    pool = filled(
        experience("old", version=1),
        experience("new", version=8),
        experience("shown", source=Source.HUMAN, version=0),
    )
    assert [item.age(10) for item in pool.items] == [9, 2, 10]

    def names(**limits):
        draws = (0.0, 0.4, 0.99)
        items = [pool_sample(pool, "t", 10, draw, **limits)[1] for draw in draws]
        return {item.trajectory for item in items if item}

    assert names() == {"old", "new", "shown"}
    assert names(max_age=9) == {"old", "new", "shown"}
    assert names(max_age=8) == {"new", "shown"}
    assert names(max_age=0) == {"shown"}
    assert [x.trajectory for x in expire(pool, 10, 8).items] == ["new", "shown"]
    for left in (5, 4, 3, 2, 1, 0):
        pool, item = pool_sample(pool, "t", 10, 0.7, max_injections=2)
        assert item is not None and item.injected < 2
        assert sum(2 - x.injected for x in pool.items) == left
    assert pool_sample(pool, "t", 10, 0.7, max_injections=2) == (pool, None)


def test_provenance_is_counted():
    pool = filled(experience("a"), experience("b", source=Source.ORACLE))
    assert provenance(pool) == {Source.ORACLE: 1, Source.SELF: 1, Source.HUMAN: 0}
    assert provenance(PoolState()) == dict.fromkeys(Source, 0)


def reference_mask(entropy, group, quantile, mask):
    """float64 loops: the lowest floor(quantile n) go, except ties with what stays."""
    kept = np.zeros(len(entropy), bool)
    for task in set(group[mask]):
        members = [i for i in range(len(entropy)) if mask[i] and group[i] == task]
        values = sorted(float(entropy[i]) for i in members)
        threshold = values[min(int(quantile * len(values)), len(values) - 1)]
        for i in members:
            kept[i] = float(entropy[i]) >= threshold
    return kept


STEPS = 24
"""One shape, so that each property compiles once."""


@st.composite
def masked_groups(draw):
    """Entropies with ties, groups of any integers, padding, a quantile."""
    levels = st.floats(0, 3, width=32)
    few = draw(st.lists(levels, min_size=1, max_size=4))
    entropy = draw(
        st.lists(st.sampled_from(few) | levels, min_size=STEPS, max_size=STEPS)
    )
    tasks = st.sampled_from([-7, 0, 3, 1_000_000])
    group = draw(st.lists(tasks, min_size=STEPS, max_size=STEPS))
    mask = draw(st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))
    quantile = draw(st.sampled_from([0, 0.1, 0.2, 0.25, 0.5, 0.75, 0.9, 1]))
    return (
        np.array(entropy, np.float32),
        np.array(group, np.int32),
        np.array(mask),
        quantile,
    )


jitted_mask = jax.jit(entropy_mask)


@settings(max_examples=50, deadline=None)
@given(masked_groups(), st.randoms(use_true_random=False))
def test_entropy_mask(case, random):
    entropy, group, mask, quantile = case
    kept = np.asarray(jitted_mask(entropy, group, jnp.float32(quantile), mask=mask))
    np.testing.assert_array_equal(kept, reference_mask(entropy, group, quantile, mask))
    assert not kept[~mask].any()
    for task in set(group[mask]):
        members = mask & (group == task)
        assert kept[members].sum() >= max((1 - quantile) * members.sum(), 1)
        lowest_kept = entropy[members & kept].min()
        assert kept[members & (entropy == lowest_kept)].all()  # ties stay
    order = np.array(random.sample(range(STEPS), STEPS))
    moved = jitted_mask(
        entropy[order], group[order], jnp.float32(quantile), mask=mask[order]
    )
    np.testing.assert_array_equal(moved, kept[order])
    # Padding may hold anything, and be of any group.
    garbage = np.where(mask, entropy, np.float32("nan"))
    other = np.where(mask, group, 5).astype(np.int32)
    again = jitted_mask(garbage, other, jnp.float32(quantile), mask=mask)
    np.testing.assert_array_equal(again, kept)


def test_entropy_mask_keeps_the_stated_share_and_ties():
    entropy = np.random.default_rng(0).permutation(np.arange(10.0))
    group = np.zeros(10, int)
    np.testing.assert_array_equal(entropy_mask(entropy, group, 0.2), entropy >= 2)
    np.testing.assert_array_equal(entropy_mask(entropy), entropy >= 2)
    assert entropy_mask(entropy, group, 0).all()
    assert entropy_mask(entropy, quantile=1).sum() == 1
    assert entropy_mask(np.ones(7), np.zeros(7, int), 0.5).all()
    tied = np.array([0.0, 1, 1, 1, 2])
    assert entropy_mask(tied, quantile=0.5).tolist() == [False, True, True, True, True]
    ascending = np.arange(40, dtype=np.float32)
    group = np.zeros(40, np.int32)
    for n in range(1, 41):  # no group loses more than its share, however small
        kept = jitted_mask(ascending, group, jnp.float32(0.2), mask=ascending < n)
        assert kept.sum() == n - n // 5
    assert entropy_mask(np.array([1.0, math.nan, 2.0]), quantile=0.9)[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32])
def test_entropy_mask_takes_any_real_type(dtype):
    entropy = jnp.array([0, 1, 2, 3, 4, 4], dtype)
    group = jnp.array([1, 1, 1, 1, 1, 2])
    eager = entropy_mask(entropy, group, 0.2)
    assert eager.dtype == bool
    assert eager.tolist() == [False, True, True, True, True, True]
    static = jax.jit(partial(entropy_mask, quantile=0.2))(entropy, group)
    np.testing.assert_array_equal(static, eager)


def test_entropy_mask_of_nothing_and_of_wrong_arguments():
    nothing = np.zeros(0, np.float32)
    assert entropy_mask(nothing, np.zeros(0, int)).shape == (0,)
    none = entropy_mask(np.ones(3), np.zeros(3, int), mask=np.zeros(3, bool))
    assert not none.any()
    for quantile in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="quantile is"):
            entropy_mask(np.ones(3), np.zeros(3, int), quantile)


def test_modules_check_shapes_without_the_test_hook():
    """`group_index` has plain types, so its own check is what answers here."""
    from jaxlab.rl.curation import group_index

    for arguments in ({"group": np.zeros(2, int)}, {"mask": np.ones((3, 1), bool)}):
        with pytest.raises(ValueError, match="instead of"):
            group_index(3, **arguments)
    index, sizes = group_index(4, np.array([9, -2, 9, 9]), np.array([1, 1, 1, 0], bool))
    pairs = itertools.combinations(range(3), 2)
    assert [bool(index[i] == index[j]) for i, j in pairs] == [False, True, False]
    assert index[3] == 4 and sorted(sizes.tolist()) == [0, 0, 1, 1, 2]
