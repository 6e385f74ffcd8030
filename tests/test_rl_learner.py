"""The learner against a float64 reference of the objective, and what it leaves."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlab.optimizers import AdamW
from jaxlab.rl.config import Cloning, Curation, Objective, RLRun, TinyPolicy
from jaxlab.rl.envs.pix import PixEnv
from jaxlab.rl.learner import (
    State,
    build,
    clone,
    clone_update,
    dart_gradient,
    dart_update,
    settle,
)
from jaxlab.rl.play import Job, demonstrate
from jaxlab.rl.policy import Scored
from jaxlab.rl.trajectory import Batch
from jaxlab.state import new_state

STEPS, TOKENS, CHOICES, KINDS = 13, 3, 5, 4


def score(params, images, instruction, tokens, mask):
    """A table of logits: for each first word, place and token."""
    del images, mask
    logits = params["table"][instruction[:, 0]]
    logs = jax.nn.log_softmax(logits)
    logp = jnp.take_along_axis(logs, tokens[..., None], 2)[..., 0]
    return Scored(logp, -jnp.sum(jnp.exp(logs) * logs, 2))


def weights(seed) -> dict:
    table = np.random.default_rng(seed).normal(size=(KINDS, TOKENS, CHOICES))
    return {"table": table.astype(np.float32)}


def example(seed=0) -> Batch:
    """Ragged steps of three groups, some demonstrated, two of padding."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(1, TOKENS + 1, STEPS)
    mask = np.arange(TOKENS) < ends[:, None]
    mask[-2:] = False
    group = rng.integers(0, 3, STEPS).astype(np.int32)
    group[-2:] = -1
    logp = np.where(mask, -3 * rng.random((STEPS, TOKENS)), 0).astype(np.float32)
    logp[3] = logp[8] = np.nan
    entropy = rng.random(STEPS).astype(np.float32)
    entropy[3] = np.nan
    return Batch(
        images=np.zeros((STEPS, 2, 2, 3), np.uint8),
        instruction=rng.integers(0, KINDS, (STEPS, 1)).astype(np.int32),
        tokens=np.where(mask, rng.integers(0, CHOICES, mask.shape), 0).astype(np.int32),
        mask=mask,
        logp=logp,
        entropy=entropy,
        reward=rng.integers(0, 2, STEPS).astype(np.float32),
        group=group,
        lag=np.zeros(STEPS, np.int32),
    )


def reference(table, old, ref, batch: Batch, objective: Objective, curation: Curation):
    """-J of DART in float64, step by step and token by token."""

    def logp(weights, step, token):
        row = np.asarray(weights, np.float64)[batch.instruction[step, 0], token]
        return row[batch.tokens[step, token]] - np.log(np.exp(row).sum())

    real = [s for s in range(STEPS) if batch.mask[s].any()]
    groups = {g: [s for s in real if batch.group[s] == g] for g in range(3)}
    kept, advantage = set(), {}
    for members in groups.values():
        rewards = [float(batch.reward[s]) for s in members]
        entropies = [batch.entropy[s] for s in members]
        entropies = [np.inf if np.isnan(e) else e for e in entropies]
        drop = int(np.floor(curation.entropy_quantile * len(members)))
        threshold = sorted(entropies)[drop] if members else 0
        for s, e in zip(members, entropies, strict=True):
            spread = np.std(rewards)
            above = float(batch.reward[s]) - np.mean(rewards)
            advantage[s] = above / (spread + 1e-6) if spread else 0.0
            if e >= threshold:
                kept.add(s)
    total = 0.0
    for s in kept:
        members = [t for t in range(TOKENS) if batch.mask[s, t]]
        for t in members:
            now, then = logp(table, s, t), logp(old, s, t)
            said = float(batch.logp[s, t])
            weight = 1.0
            if not np.isnan(said) and curation.importance_cap is not None:
                weight = min(np.exp(then - said), curation.importance_cap)
            rho, a = np.exp(now - then), advantage[s]
            clipped = np.clip(rho, 1 - objective.clip_low, 1 + objective.clip_high)
            d = logp(ref, s, t) - now
            value = weight * min(rho * a, clipped * a)
            value -= objective.beta * (np.exp(d) - d - 1)
            total -= value / len(members) / len(kept)
    return total


@pytest.mark.parametrize("cap", [1.0, 2.0, None])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_is_that_of_the_objective(seed, cap):
    batch = example(seed)
    old, ref = weights(10), weights(11)
    # Near the old policy, so that some ratios are clipped and some are not.
    now = {"table": old["table"] + 0.3 * weights(12)["table"]}
    objective = Objective(beta=0.1)
    curation = Curation(entropy_quantile=0.4, importance_cap=cap)
    fixed = settle(old, ref, batch, score=score, curation=curation)
    gradient, figures = jax.jit(
        partial(dart_gradient, score=score, objective=objective, curation=curation)
    )(now, fixed, batch)

    def value(table):
        return reference(table, old["table"], ref["table"], batch, objective, curation)

    centre = now["table"].astype(np.float64)
    assert float(figures["loss"]) == pytest.approx(value(centre), rel=1e-5, abs=1e-6)
    assert 0 < float(figures["kept"]) < 1
    assert float(figures["clipped_low"]) + float(figures["clipped_high"]) > 0
    found = np.asarray(gradient["table"], np.float64)
    step = 1e-6
    for place in np.ndindex(found.shape):
        up, down = centre.copy(), centre.copy()
        up[place] += step
        down[place] -= step
        slope = (value(up) - value(down)) / (2 * step)
        assert found[place] == pytest.approx(slope, rel=1e-3, abs=1e-6)


def updated(batch, objective, curation=None, params=None, tx=None):
    params = weights(0) if params is None else params
    tx = optax.sgd(0.5) if tx is None else tx
    state = State(new_state(params, tx, ema=False), weights(1))
    update = partial(
        dart_update,
        score=score,
        tx=tx,
        objective=objective,
        curation=Curation() if curation is None else curation,
    )
    return jax.jit(update)(state, batch)


def test_one_pass_takes_the_weights_at_hand_as_the_old_policy():
    batch, objective = example(), Objective(beta=0.1)
    state, figures = updated(batch, objective)
    fixed = settle(weights(0), weights(1), batch, score=score, curation=Curation())
    gradient, _ = dart_gradient(
        weights(0),
        fixed,
        batch,
        score=score,
        objective=objective,
        curation=Curation(),
    )
    np.testing.assert_allclose(
        state.params["table"],
        weights(0)["table"] - 0.5 * gradient["table"],
        atol=1e-6,
    )
    assert int(state.train.step) == 1
    assert float(figures["ratio"]) == pytest.approx(1)
    real = batch.mask.any(1)
    shares = np.isnan(batch.logp).any(1)[real].mean(), batch.reward[real].mean()
    found = float(figures["demonstrated"]), float(figures["success"])
    assert found == pytest.approx(shares)


def test_passes_keep_the_old_policy_and_clip():
    batch = example()
    objective = Objective(beta=0.1, passes=3)
    state, figures = updated(batch, objective)
    params = weights(0)
    fixed = settle(params, weights(1), batch, score=score, curation=Curation())
    for _ in range(3):
        gradient, _ = dart_gradient(
            params,
            fixed,
            batch,
            score=score,
            objective=objective,
            curation=Curation(),
        )
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
    np.testing.assert_allclose(state.params["table"], params["table"], atol=1e-5)
    assert int(state.train.step) == 3
    assert float(figures["ratio_max"]) > 1.01


def test_steps_left_out_and_padding_change_nothing():
    batch, objective = example(), Objective()
    curation = Curation(entropy_quantile=0.4)
    fixed = settle(weights(0), weights(1), batch, score=score, curation=curation)
    out = ~np.asarray(fixed.keep)
    assert out.sum() > 3
    other = batch._replace(
        tokens=np.where(out[:, None], (batch.tokens + 1) % CHOICES, batch.tokens),
        logp=np.where(out[:, None], -9.0, batch.logp).astype(np.float32),
    )
    one, _ = updated(batch, objective, curation)
    two, _ = updated(other, objective, curation)
    np.testing.assert_array_equal(one.params["table"], two.params["table"])


def test_a_batch_that_teaches_nothing_moves_nothing():
    batch = example()._replace(reward=np.ones(STEPS, np.float32))
    state, _ = updated(batch, Objective(beta=0.0))
    np.testing.assert_array_equal(state.params["table"], weights(0)["table"])


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    broken = weights(0)
    broken["table"][1, 0, 0] = np.inf
    state, figures = updated(example(), Objective(), params=broken)
    np.testing.assert_array_equal(state.params["table"], broken["table"])
    assert int(figures["skipped"]) == 1


def test_a_mesh_gives_the_same_numbers():
    batch = example()
    pad = 16 - STEPS
    batch = jax.tree.map(
        lambda x: np.concatenate([x, np.repeat(x[-1:], pad, 0)]), batch
    )
    objective = Objective(beta=0.1, passes=2)
    alone, figures = updated(batch, objective)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    cut = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    spread, more = updated(
        jax.device_put(batch, cut), objective, params=jax.device_put(weights(0), whole)
    )
    np.testing.assert_allclose(spread.params["table"], alone.params["table"], atol=1e-6)
    for name in figures:
        assert float(more[name]) == pytest.approx(float(figures[name]), abs=1e-5)


def test_the_learner_keeps_its_reference_and_leaves_the_callers_weights():
    space = PixEnv("color").observation_space
    run = RLRun(steps=3, optimizer=AdamW(lr=0.1, schedule="constant", warmup=0))
    policy = TinyPolicy().build(space)
    learner = build(run, policy)
    params = policy.init(jax.random.key(0))
    state = learner.init(params)
    rng = np.random.default_rng(0)
    batch = Batch(
        images=rng.integers(0, 256, (4, 64, 64, 3), np.uint8),
        instruction=np.ones((4, 16), np.int32),
        tokens=np.array([[0, 5], [0, 9], [1, 0], [0, 0]], np.int32),
        mask=np.array([[1, 1], [1, 1], [1, 0], [0, 0]], bool),
        logp=np.zeros((4, 2), np.float32),
        entropy=np.ones(4, np.float32),
        reward=np.array([1, 0, 0, 0], np.float32),
        group=np.array([0, 0, 0, -1], np.int32),
        lag=np.zeros(4, np.int32),
    )
    state, _ = learner.update(state, batch)
    state, _ = learner.update(state, batch)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, params)
    assert max(jax.tree.leaves(moved)) > 0.01
    same = jax.tree.map(np.array_equal, state.reference, params)
    assert all(jax.tree.leaves(same))
    none = build(replace(run, objective=Objective(beta=0.0)), policy)
    assert none.init(params).reference is None


# ---------------------------------------------------------------------- imitation


def test_cloning_is_the_likelihood_of_what_was_shown():
    batch, params = example(), weights(0)
    tx = optax.sgd(0.1)
    update = partial(clone_update, score=score, tx=tx)
    train, figures = jax.jit(update)(new_state(params, tx, ema=False), batch)
    table = params["table"].astype(np.float64)
    total, real = 0.0, batch.mask.any(1).sum()
    gradient = np.zeros_like(table)
    for s, t in zip(*np.nonzero(batch.mask), strict=True):
        word, token = batch.instruction[s, 0], batch.tokens[s, t]
        shares = np.exp(table[word, t]) / np.exp(table[word, t]).sum()
        total -= np.log(shares[token]) / real
        gradient[word, t] += (shares - (np.arange(CHOICES) == token)) / real
    assert float(figures["loss"]) == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(train.params["table"], table - 0.1 * gradient, atol=1e-6)


def shown(policy, number=24):
    jobs = [Job(i, "color", i) for i in range(number)]
    return list(demonstrate(policy, PixEnv("color"), jobs))


def test_cloning_learns_and_repeats_itself():
    env = PixEnv("color")
    policy = TinyPolicy().build(env.observation_space)
    params = policy.init(jax.random.key(0))
    demonstrations = shown(policy)
    run = Cloning(updates=60, batch=16, optimizer=AdamW(lr=0.05, weight_decay=0.0))

    def losses():
        return [
            float(figures["loss"])
            for _, figures in clone(run, policy, params, demonstrations, seed=3)
        ]

    first = losses()
    assert np.mean(first[-10:]) < 0.6 * np.mean(first[:5])
    assert first == losses()
    with pytest.raises(ValueError, match="none of 1 demonstrations"):
        next(clone(run, policy, params, [demonstrations[0]._replace(reward=0.0)], 0))
