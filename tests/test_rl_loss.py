"""DART's objective against float64 loops written from its equations."""

import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxlab.rl import (
    dart_loss,
    entropy_mask,
    stepwise_advantage,
    truncated_importance_weights,
)

STEPS, TOKENS = 12, 5
"""One shape, so that each property compiles once."""

jitted_advantage = jax.jit(stepwise_advantage)
jitted_loss = jax.jit(dart_loss, static_argnames="ratio")


# ---- the advantage


def reference_advantage(reward, group, mask, eps=1e-6):
    advantage = np.zeros(len(reward))
    for task in set(group[mask]):
        members = [i for i in range(len(reward)) if mask[i] and group[i] == task]
        values = [float(reward[i]) for i in members]
        mean = math.fsum(values) / len(values)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        for i, value in zip(members, values, strict=True):
            if min(values) < max(values):
                advantage[i] = (value - mean) / (std + eps)
    return advantage


@st.composite
def grouped_rewards(draw):
    """Rewards on a grid (0, 1/8, ... 1) or all equal, groups of any integers."""
    grid = st.integers(0, draw(st.sampled_from([0, 1, 8]))).map(lambda k: k / 8)
    reward = draw(st.lists(grid, min_size=STEPS, max_size=STEPS))
    tasks = st.sampled_from([-3, 0, 4, 2_000_000_000])
    group = draw(st.lists(tasks, min_size=STEPS, max_size=STEPS))
    mask = draw(st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))
    return np.array(reward, np.float32), np.array(group, np.int32), np.array(mask)


@settings(max_examples=50, deadline=None)
@given(grouped_rewards(), st.randoms(use_true_random=False))
def test_advantage(case, random):
    reward, group, mask = case
    advantage = np.asarray(jitted_advantage(reward, group, mask=mask))
    expected = reference_advantage(reward, group, mask)
    np.testing.assert_allclose(advantage, expected, rtol=2e-5, atol=1e-5)
    assert not advantage[~mask].any()
    for task in set(group[mask]):
        members = mask & (group == task)
        assert abs(advantage[members].sum()) < 1e-5 * STEPS
        if np.ptp(reward[members]):
            assert advantage[members].std() == pytest.approx(1, abs=1e-4)
        else:
            assert not advantage[members].any()
    order = np.array(random.sample(range(STEPS), STEPS))
    moved = jitted_advantage(reward[order], group[order], mask=mask[order])
    np.testing.assert_allclose(moved, advantage[order], atol=1e-5)
    # Padding may hold anything, and be of any group.
    garbage = np.where(mask, reward, np.float32("nan"))
    other = np.where(mask, group, 17).astype(np.int32)
    np.testing.assert_array_equal(
        jitted_advantage(garbage, other, mask=mask), advantage
    )


def test_long_trajectories_weigh_more():
    # One success of 1 step, one failure of 3: mean 1/4, variance 3/16.
    advantage = stepwise_advantage(np.array([1, 0, 0, 0]), np.zeros(4, int))
    root = math.sqrt(3)
    np.testing.assert_allclose(advantage, [root, *[-1 / root] * 3], rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6, -0.7])
def test_equal_rewards_and_groups_of_one_have_exactly_no_advantage(value):
    for size in (1, 3, 7):
        reward = np.full(size, value, np.float32)
        assert not stepwise_advantage(reward, np.zeros(size, int)).any()
    assert not stepwise_advantage(np.array([value, 5.0]), np.array([0, 1])).any()


def test_advantage_of_nothing_of_other_types_and_without_a_gradient():
    assert stepwise_advantage(np.zeros(0), np.zeros(0, int)).shape == (0,)
    group = np.array([1, 1, 2, 2])
    reward = jnp.array([0, 1, 1, 1])
    for dtype in (jnp.bfloat16, jnp.float32, jnp.int32):
        eager = stepwise_advantage(reward.astype(dtype), group)
        assert eager.dtype == jnp.float32
        np.testing.assert_allclose(eager, [-1, 1, 0, 0], atol=1e-5)
    np.testing.assert_array_equal(jax.jit(stepwise_advantage)(reward, group), eager)
    slope = jax.grad(lambda r: stepwise_advantage(r, group)[0])(reward * 1.0)
    assert not slope.any()


# ---- the importance weights


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=1),
    st.sampled_from([0.5, 1.0, 2.0, math.inf]),
)
def test_importance_weights(pairs, cap):
    old, rollout = np.array(pairs, np.float32).T
    weight = truncated_importance_weights(old, rollout, cap)
    exact = min(math.exp(float(old[0]) - float(rollout[0])), cap)
    np.testing.assert_allclose(weight, [exact], rtol=3e-6)
    assert weight[0] <= cap
    np.testing.assert_array_equal(
        truncated_importance_weights(old, old, cap), [min(1.0, cap)]
    )


def test_importance_weights_of_infinities_types_and_shapes():
    inf = math.inf
    old = np.array([-inf, -inf, -1.0, 0.0], np.float32)
    rollout = np.array([-inf, -1.0, -inf, -500.0], np.float32)
    weight = truncated_importance_weights(old, rollout)
    assert weight.tolist() == [1, 0, 1, 1]
    assert np.isnan(truncated_importance_weights(np.array([inf - inf]), old[2:3])).all()
    half = truncated_importance_weights(
        jnp.full((2, 3, 1), -2, jnp.bfloat16), jnp.full((2, 3, 1), -1, jnp.bfloat16)
    )
    assert half.dtype == jnp.float32 and half.shape == (2, 3, 1)
    np.testing.assert_allclose(half, math.exp(-1), rtol=1e-6)
    np.testing.assert_array_equal(
        jax.jit(truncated_importance_weights)(old, rollout), weight
    )
    both = jax.grad(
        lambda a, b: truncated_importance_weights(a, b, 9.0).sum(), argnums=(0, 1)
    )(jnp.array([-1.0]), jnp.array([-2.0]))
    assert not any(slope.any() for slope in both)


# ---- the loss


def reference_loss(
    logp,
    logp_old,
    logp_rollout,
    logp_ref,
    advantage,
    token_mask,
    step_mask,
    *,
    clip_low=0.2,
    clip_high=0.28,
    beta=0.1,
    cap=1.0,
    ratio="token",
    frozen=None,
):
    """-J by loops in float64. `frozen`: logp where GSPO's token form is constant."""
    total, steps = 0.0, 0
    for s in range(len(logp)):
        tokens = [t for t in range(len(logp[s])) if token_mask[s][t]]
        if not tokens or not step_mask[s]:
            continue
        steps += 1
        held = logp if frozen is None else frozen
        mean = sum(float(held[s][t]) - float(logp_old[s][t]) for t in tokens)
        mean /= len(tokens)
        for t in tokens:
            new, old = float(logp[s][t]), float(logp_old[s][t])
            if ratio == "token":
                rho = math.exp(new - old)
            else:
                rho = math.exp(mean + new - float(held[s][t]))
            w = min(math.exp(old - float(logp_rollout[s][t])), cap)
            clipped = min(max(rho, 1 - clip_low), 1 + clip_high)
            gain = w * min(rho * float(advantage[s]), clipped * float(advantage[s]))
            kl = 0.0
            if logp_ref is not None:
                d = float(logp_ref[s][t]) - new
                kl = math.exp(d) - d - 1
            total += (gain - beta * kl) / len(tokens)
    return -total / max(steps, 1)


def batch(seed, spread=0.4, dtype=np.float32, steps=STEPS, tokens=TOKENS):
    """A ragged batch; its padding holds -inf, as from a masked softmax."""
    rng = np.random.default_rng(seed)
    token_mask = np.arange(tokens) < rng.integers(0, tokens + 1, steps)[:, None]
    base = -rng.exponential(1.5, (steps, tokens))
    logps = [
        np.where(token_mask, base + spread * rng.normal(size=base.shape), -np.inf)
        for _ in range(4)
    ]
    advantage = rng.normal(size=steps).astype(dtype)
    step_mask = rng.random(steps) < 0.8
    return (*(x.astype(dtype) for x in logps), advantage, token_mask, step_mask)


RATIOS = pytest.mark.parametrize("ratio", ["token", "sequence"])


@RATIOS
@pytest.mark.parametrize("cap", [1.0, 2.0, math.inf])
def test_loss_is_the_equation(ratio, cap):
    for seed in range(6):
        case = batch(seed)
        loss, metrics = jitted_loss(*case, cap=cap, ratio=ratio)
        expected = reference_loss(*case, cap=cap, ratio=ratio)
        assert float(loss) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        no_kl = reference_loss(*case, cap=cap, ratio=ratio, beta=0.0)
        assert float(metrics["policy_loss"]) == pytest.approx(no_kl, rel=1e-5, abs=1e-6)
        kl = float(metrics["kl"])
        assert kl == pytest.approx((expected - no_kl) / 0.1, rel=1e-4, abs=1e-6)
        assert kl >= 0


@RATIOS
def test_loss_in_double_precision_and_its_options(ratio):
    options = {"clip_low": 0.1, "clip_high": 0.5, "beta": 0.03, "cap": 1.7}
    with jax.enable_x64(True):
        for seed in range(3):
            case = batch(seed, dtype=np.float64)
            loss, metrics = dart_loss(*case, ratio=ratio, **options)
            assert loss.dtype == jnp.float64
            expected = reference_loss(*case, ratio=ratio, **options)
            assert float(loss) == pytest.approx(expected, rel=1e-12)
            no_reference = (*case[:3], None, *case[4:])
            loss, metrics = dart_loss(*no_reference, ratio=ratio, **options)
            expected = reference_loss(*no_reference, ratio=ratio, **options)
            assert float(loss) == pytest.approx(expected, rel=1e-12)
            assert float(metrics["kl"]) == 0


@RATIOS
def test_gradient_is_that_of_finite_differences(ratio):
    """Central differences of the loops: they know nothing of JAX's gradient."""
    with jax.enable_x64(True):
        case = batch(3, dtype=np.float64, steps=6, tokens=3)
        logp, rest, token_mask = case[0], case[1:], case[5]
        gradient = jax.grad(lambda x: dart_loss(x, *rest, ratio=ratio)[0])(logp)
        for s, t in np.ndindex(logp.shape):
            if not token_mask[s, t]:
                assert gradient[s, t] == 0
                continue
            h = 1e-6
            sides = []
            for sign in (1, -1):
                moved = logp.copy()
                moved[s, t] += sign * h
                sides.append(reference_loss(moved, *rest, ratio=ratio, frozen=logp))
            slope = (sides[0] - sides[1]) / (2 * h)
            assert float(gradient[s, t]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
        assert np.abs(gradient).max() > 1e-3


def test_gradient_of_the_token_ratio_by_check_grads():
    with jax.enable_x64(True):
        logp, *rest = batch(4, dtype=np.float64, steps=6, tokens=3)
        token_mask = rest[4]
        finite = np.where(token_mask, logp, 0.0)  # differences of -inf are not numbers
        check_grads(
            lambda x: dart_loss(x, *rest)[0], (finite,), order=1, modes=("rev", "fwd")
        )


@RATIOS
def test_only_the_policy_has_a_gradient(ratio):
    case = batch(0)
    gradients = jax.grad(
        lambda *logps: dart_loss(*logps, *case[5:], ratio=ratio)[0],
        argnums=(0, 1, 2, 3, 4),
    )(*case[:5])
    assert np.abs(gradients[0]).max() > 0
    assert not any(np.asarray(g).any() for g in gradients[1:])
    figures = jax.grad(lambda x: sum(dart_loss(x, *case[1:], ratio=ratio)[1].values()))(
        case[0]
    )
    assert not figures.any()


@partial(jax.jit, static_argnames="ratio")
def gradient_at_once(logp, advantage, token_mask, step_mask, ratio):
    """Of the policy, where it also acted, and is old and reference."""

    def value(x):
        policies = (x, x, x, x)
        masks = (advantage, token_mask, step_mask)
        return dart_loss(*policies, *masks, cap=jnp.inf, ratio=ratio)[0]

    return jax.grad(value)(logp)


@RATIOS
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_equal_policies_give_the_plain_policy_gradient(ratio, seed):
    logp, _, _, _, advantage, token_mask, step_mask = batch(seed)
    gradient = gradient_at_once(logp, advantage, token_mask, step_mask, ratio)
    kept = token_mask.any(1) & step_mask
    tokens = np.maximum(token_mask.sum(1, keepdims=True), 1)
    plain = -advantage[:, None] * (token_mask & kept[:, None]) / tokens
    plain /= max(kept.sum(), 1)
    np.testing.assert_allclose(gradient, plain, rtol=1e-5, atol=1e-7)


def loss_and_gradient(case, **options):
    (loss, metrics), gradient = jax.value_and_grad(
        lambda x: jitted_loss(x, *case[1:], **options), has_aux=True
    )(case[0])
    return loss, metrics, np.asarray(gradient)


@RATIOS
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), garbage=st.sampled_from([-np.inf, np.nan, 3.0]))
def test_what_is_masked_changes_nothing(ratio, seed, garbage):
    """More padded tokens and more masked steps, whatever they hold."""
    case = batch(seed)
    token_mask, step_mask = case[5:]
    loss, metrics, gradient = loss_and_gradient(case, ratio=ratio)
    shape = (STEPS + 4, TOKENS + 2)
    wide_mask = np.zeros(shape, bool)
    wide_mask[:STEPS, :TOKENS] = token_mask
    wide_mask[STEPS:-1] = True  # all but the last have tokens, and are masked steps
    keep = wide_mask.copy()
    keep[STEPS:] = False
    keep[:STEPS][~step_mask] = False

    def widen(values):
        wide = np.full(shape, garbage, np.float32)
        wide[:STEPS, :TOKENS] = values
        return np.where(keep, wide, garbage).astype(np.float32)

    more = np.full(4, garbage, np.float32)
    wide = (
        *map(widen, case[:4]),
        np.where(
            np.append(step_mask, [False] * 4), np.append(case[4], more), garbage
        ).astype(np.float32),
        wide_mask,
        np.append(step_mask, [False] * 4),
    )
    wide_loss, wide_metrics, wide_gradient = loss_and_gradient(wide, ratio=ratio)
    assert float(wide_loss) == pytest.approx(float(loss), rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(
        wide_gradient[:STEPS, :TOKENS], gradient, rtol=1e-5, atol=1e-8
    )
    assert not wide_gradient[~keep].any()
    for name in set(metrics) - {"kept"}:
        np.testing.assert_allclose(
            wide_metrics[name], metrics[name], rtol=1e-4, atol=1e-6, err_msg=name
        )


@RATIOS
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_steps_and_tokens_does_not_matter(ratio, seed):
    case = batch(seed)
    loss, _, gradient = loss_and_gradient(case, ratio=ratio)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(STEPS), rng.permutation(TOKENS)
    moved = [x[rows][:, columns] if x.ndim == 2 else x[rows] for x in case]
    moved_loss, _, moved_gradient = loss_and_gradient(moved, ratio=ratio)
    assert float(moved_loss) == pytest.approx(float(loss), rel=1e-5, abs=1e-7)
    np.testing.assert_allclose(
        moved_gradient, gradient[rows][:, columns], rtol=1e-5, atol=1e-8
    )


def test_clipping_takes_the_gradient_on_the_side_that_it_should():
    """rho of 0.5, 1 and 2 for a good and a bad action, one token each."""
    rho = np.tile([0.5, 1.0, 2.0], 2).astype(np.float32)
    advantage = np.repeat([1.0, -1.0], 3).astype(np.float32)
    case = (
        np.log(rho)[:, None],
        *[np.zeros((6, 1), np.float32)] * 2,
        None,
        advantage,
        np.ones((6, 1), bool),
    )
    (_, metrics), gradient = jax.value_and_grad(
        lambda x: dart_loss(x, *case[1:]), has_aux=True
    )(case[0])
    expected = -advantage * rho / 6 * [1, 1, 0, 0, 1, 1]
    np.testing.assert_allclose(gradient[:, 0], expected, rtol=1e-5)
    assert float(metrics["clipped_low"]) == pytest.approx(1 / 6)
    assert float(metrics["clipped_high"]) == pytest.approx(1 / 6)
    assert float(metrics["ratio_max"]) == pytest.approx(2)
    assert float(metrics["ratio"]) == pytest.approx(3.5 / 3)


def test_rounding_is_not_counted_as_truncated():
    logp = np.full((2, 2), -1.0, np.float32)
    whole = np.ones((2, 2), bool)
    _, metrics = dart_loss(logp, logp, logp - 1e-6, None, np.ones(2), whole)
    assert metrics["truncated"] == 0


def test_metrics_are_what_they_are_called():
    gap = np.log([[0.5, 3.0], [1.0, 7.0]]).astype(np.float32)  # pi_old / pi_rollout
    zero = np.zeros((2, 2), np.float32)
    token_mask = np.array([[True, True], [True, False]])
    _, metrics = dart_loss(
        zero, zero, -gap, zero, np.array([1.0, -3.0], np.float32), token_mask
    )
    expected = {
        "weight": (0.75 + 1) / 2,
        "truncated": 0.25,
        "mismatch": (math.log(2) + math.log(3)) / 4,
        "advantage": 2,
        "policy_loss": -(0.75 - 3) / 2,
        "kl": 0,
        "ratio": 1,
        "steps": 2,
        "tokens": 3,
        "kept": 1,
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    _, metrics = dart_loss(
        *[zero] * 4,
        np.ones(2, np.float32),
        token_mask,
        np.array([False, True]),
    )
    assert [float(metrics[k]) for k in ("steps", "tokens", "kept")] == [1, 1, 0.5]


@RATIOS
def test_nothing_to_train_is_no_loss_and_no_gradient(ratio):
    *policies, token_mask, step_mask = batch(0)
    nothing = (
        (*policies, np.zeros_like(token_mask), step_mask),
        (*policies, token_mask, np.zeros_like(step_mask)),
        batch(0, steps=0),
    )
    for case in nothing:
        loss, metrics, gradient = loss_and_gradient(case, ratio=ratio)
        assert loss == 0 and not gradient.any()
        assert not any(float(value) for value in metrics.values())


@RATIOS
def test_impossible_tokens_and_huge_ratios_stay_finite(ratio):
    """A policy that gives a chosen token no probability, or e^500 times more."""
    inf = np.inf
    logp = np.array([[-inf, -1.0], [0.0, -600.0], [-inf, -1.0]], np.float32)
    old = np.array([[-1.0, -1.0], [-500.0, -1.0], [-inf, -1.0]], np.float32)
    ref = np.array([[-1.0, -inf], [-1.0, -1.0], [-inf, -1.0]], np.float32)
    for sign in (1, -1):
        advantage = np.full(3, sign, np.float32)
        case = (logp, old, old, ref, advantage, np.ones((3, 2), bool), None)
        loss, metrics, gradient = loss_and_gradient(case, ratio=ratio)
        assert np.isfinite(loss) and np.isfinite(gradient).all()
        assert all(np.isfinite(value) for value in metrics.values())


def test_a_policy_that_diverged_is_not_hidden():
    case = list(batch(0))
    place = tuple(np.argwhere(case[5] & case[6][:, None])[0])
    case[0][place] = np.nan
    assert np.isnan(dart_loss(*case)[0])


@RATIOS
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_jit_is_eager_in_both_precisions(ratio, dtype):
    *policies, token_mask, step_mask = batch(1)
    case = (*(jnp.asarray(x, dtype) for x in policies), token_mask, step_mask)
    compiled = jitted_loss(*case, ratio=ratio)
    eager = dart_loss(*case, ratio=ratio)
    for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        assert a.dtype == b.dtype == jnp.float32 and a.shape == b.shape == ()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    rounded = [np.asarray(x, np.float64) for x in case[:5]]
    expected = reference_loss(*rounded, token_mask, step_mask, ratio=ratio)
    assert float(eager[0]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    gradient = jax.grad(lambda x: dart_loss(x, *case[1:], ratio=ratio)[0])(case[0])
    assert gradient.dtype == dtype and np.isfinite(np.asarray(gradient, float)).all()


def test_micro_batches_add_up_by_their_steps():
    case = batch(5)
    whole, metrics = dart_loss(*case)
    parts = [dart_loss(*(x[rows] for x in case)) for rows in (slice(5), slice(5, None))]
    steps = [float(figures["steps"]) for _, figures in parts]
    added = sum(float(loss) * n for (loss, _), n in zip(parts, steps, strict=True))
    assert sum(steps) == float(metrics["steps"]) and min(steps) > 0
    assert added / sum(steps) == pytest.approx(float(whole), rel=1e-5)


def test_what_is_wrong_is_said():
    """Without the type checks that tests put around every function."""
    case = batch(0)
    loss = inspect.unwrap(dart_loss)
    with pytest.raises(ValueError, match="no ratio 'word': choose token or sequence"):
        loss(*case, ratio="word")
    with pytest.raises(ValueError, match=r"logp_old has shape \(12, 4\) instead of"):
        loss(case[0], case[1][:, :4], *case[2:])
    with pytest.raises(ValueError, match=r"advantage has shape \(12, 5\) instead of"):
        loss(*case[:4], case[0], *case[5:])
    with pytest.raises(ValueError, match=r"step_mask has shape \(1,\) instead of"):
        loss(*case[:6], np.ones(1, bool))
    with pytest.raises(ValueError, match=r"group has shape \(3,\) instead of"):
        inspect.unwrap(stepwise_advantage)(case[4], np.zeros(3, int))


@RATIOS
def test_steps_on_many_devices_give_the_same(ratio):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    case = batch(2, steps=16)
    group = np.arange(16, dtype=np.int32) % 3

    @jax.jit
    def update(case, group):
        advantage = stepwise_advantage(case[4], group)
        keep = entropy_mask(case[4], group)
        policies, tokens = case[1:4], case[5]
        return jax.value_and_grad(
            lambda x: dart_loss(x, *policies, advantage, tokens, keep, ratio=ratio)[0]
        )(case[0])

    loss, gradient = update(case, group)
    spread = jax.device_put((case, group), NamedSharding(mesh, P("data")))
    spread_loss, spread_gradient = update(*spread)
    assert spread_gradient.sharding.is_equivalent_to(spread[1].sharding, 2)
    assert float(spread_loss) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(spread_gradient, gradient, rtol=1e-5, atol=1e-8)


def test_the_pieces_fit_and_learn():
    """A bandit of 4 arms: rewards to advantages to a loss whose descent finds arm 2.

    The rollout policy differs from the trainer's, as quantised weights would.
    """
    rng = np.random.default_rng(0)
    logits = jnp.zeros((3, 4))  # three tasks, each one step of one token
    best = np.array([2, 0, 3])
    task = np.repeat(np.arange(3), 16)

    @jax.jit
    def update(logits, arm, logp_rollout, entropy):
        def chosen(logits):
            logp_sa = jax.nn.log_softmax(logits)[task]
            return jnp.take_along_axis(logp_sa, arm[:, None], axis=1)

        advantage = stepwise_advantage((arm == best[task]) * 1.0, task)
        keep = entropy_mask(entropy, task, 0.2)
        masks = (jnp.ones((len(task), 1), bool), keep)

        def value(logits):
            logp = chosen(logits)
            reference = jnp.full_like(logp, -math.log(4))
            return dart_loss(
                logp, logp, logp_rollout, reference, advantage, *masks, beta=0.01
            )

        (_, metrics), gradient = jax.value_and_grad(value, has_aux=True)(logits)
        return logits - 2.0 * gradient, metrics

    for _ in range(60):
        noisy = np.asarray(logits) + 0.1 * rng.normal(size=(3, 4))
        logp = noisy - np.log(np.exp(noisy).sum(1, keepdims=True))
        arm = np.array([rng.choice(4, p=np.exp(logp[t])) for t in task])
        recorded = logp[task, arm][:, None].astype(np.float32)
        entropy = -(np.exp(logp) * logp).sum(1)[task].astype(np.float32)
        logits, metrics = update(logits, arm, recorded, entropy)
        assert float(metrics["kept"]) == 1  # one entropy a task: all tied
    success = jax.nn.softmax(logits)[np.arange(3), best]
    assert success.min() > 0.9
    assert 0 < float(metrics["weight"]) <= 1 and float(metrics["mismatch"]) > 0
