"""The training step against NumPy, and its invariances."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import config, optim
from jaxlab.data import Batch
from jaxlab.models import gpt
from jaxlab.state import new_state
from jaxlab.step import cross_entropy, eval_step, mean_gradient, train_step

MODEL = config.resolve_model(
    config.GPT(layers=1, width=16, heads=2, kv_heads=1, vocab=64, mlp=32), 64
)


def make_batch(seed=0, a=1, b=4, t=8, masked=0.3):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, 64, (a, b, t), dtype=np.int32)  # noqa: E731
    mask = (rng.random((a, b, t)) > masked).astype(np.float32)
    return jax.tree.map(jnp.asarray, Batch(draw(), draw(), mask, None))


@pytest.fixture(scope="module")
def params():
    return gpt.init_params(MODEL, jax.random.key(0))


apply = gpt.GPT(MODEL).apply
gradient = partial(mean_gradient, apply=apply)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 300), rows=st.integers(1, 5))
def test_cross_entropy_equals_numpy(seed, scale, rows):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(rows, 3, 17)) * scale).astype(np.float32)
    targets = rng.integers(0, 17, (rows, 3), dtype=np.int32)
    nll, log_z = cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    exact = logits.astype(np.float64)
    top = exact.max(-1, keepdims=True)
    want_z = np.log(np.exp(exact - top).sum(-1)) + top[..., 0]
    want = want_z - np.take_along_axis(exact, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_z, want_z, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(nll, want, rtol=1e-5, atol=2e-6 * scale + 1e-6)


@pytest.mark.slow
def test_loss_is_the_mean_over_unmasked_targets_of_all_micro_batches(params):
    batch = make_batch(a=2)
    _, loss = mean_gradient(params, batch, apply=apply)
    logits = [apply({"params": params}, x) for x in batch.inputs_abt]
    log_p = np.asarray(jax.nn.log_softmax(np.stack(logits).astype(np.float64)))
    nll = -np.take_along_axis(log_p, batch.targets_abt[..., None], -1)[..., 0]
    want = (nll * batch.mask_abt).sum() / batch.mask_abt.sum()
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_masked_targets_have_no_gradient(params):
    batch = make_batch()
    other = jnp.where(batch.mask_abt > 0, batch.targets_abt, 0)
    ours, _ = mean_gradient(params, batch, apply=apply, z_loss=1e-2)
    theirs, _ = mean_gradient(
        params, batch._replace(targets_abt=other), apply=apply, z_loss=1e-2
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2, 4])
def test_accumulation_does_not_change_the_gradient(params, cut):
    whole = make_batch(b=8)
    cuts = jax.tree.map(lambda x: x.reshape(cut, 8 // cut, -1), whole)
    ours, loss = mean_gradient(params, cuts, apply=apply, z_loss=1e-3)
    theirs, want = mean_gradient(params, whole, apply=apply, z_loss=1e-3)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), ours, theirs
    )


def test_z_loss_adds_its_gradient_and_not_to_the_reported_loss(params):
    batch = make_batch(masked=0.0)

    def objective(p):
        logits = apply({"params": p}, batch.inputs_abt[0])
        nll, log_z = cross_entropy(logits, jnp.asarray(batch.targets_abt[0]))
        return jnp.mean(nll + 0.1 * log_z**2)

    ours, loss = mean_gradient(params, batch, apply=apply, z_loss=0.1)
    theirs = jax.grad(objective)(params)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), ours, theirs
    )
    assert float(loss) < float(objective(params))


def adamw_in_numpy(params, gradients, lrs, b1, b2, eps, decay, clip):
    """arXiv 1711.05101, algorithm 2, after clipping by the global norm; float64."""
    w = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in w.items()}
    v = {k: np.zeros_like(x) for k, x in w.items()}
    for t, (gradient, lr) in enumerate(zip(gradients, lrs, strict=True), 1):
        norm = np.sqrt(
            sum((np.asarray(g, np.float64) ** 2).sum() for g in gradient.values())
        )
        for k in w:
            g = np.asarray(gradient[k], np.float64) * min(1, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g * g
            step = m[k] / (1 - b1**t) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            w[k] = w[k] - lr * (step + (0 if k == "scale" else decay) * w[k])
    return w


def test_optimizer_equals_numpy_with_schedule_clip_and_mask():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (5, 3), "scale": (3,)}
    w = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    gradients = [
        {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        for _ in range(12)
    ]
    rate = optim.learning_rate(0.1, 12, warmup=3)
    tx = optim.adamw(rate, weight_decay=0.2, clip=0.5)
    params, state = w, tx.init(w)
    for g in gradients:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    want = adamw_in_numpy(
        w, gradients, [float(rate(i)) for i in range(12)], 0.9, 0.95, 1e-8, 0.2, 0.5
    )
    for k in w:
        np.testing.assert_allclose(params[k], want[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@given(steps=st.integers(1, 400), warmup=st.integers(0, 500))
@settings(deadline=None, max_examples=25)
def test_schedules_equal_their_formulas(kind, steps, warmup):
    rate = optim.learning_rate(
        2.0, steps, schedule=kind, warmup=warmup, decay_share=0.25, end_factor=0.1
    )
    warmup = min(warmup, steps)
    rest, tail = max(steps - warmup, 1), max(int(steps * 0.25), 1)
    for step in {0, warmup // 2, warmup, (warmup + steps) // 2, steps - 1, steps}:
        if step < warmup:
            want = 2.0 * step / warmup
        elif kind == "constant":
            want = 2.0
        elif kind == "cosine":
            done = min((step - warmup) / rest, 1)
            want = 2.0 * (0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2)
        else:
            done = np.clip((step - warmup - max(rest - tail, 0)) / tail, 0, 1)
            want = 2.0 * (1 - 0.9 * done)
        np.testing.assert_allclose(float(rate(step)), want, rtol=2e-5, atol=1e-6)


def run_steps(params, batches, jit=True, **options):
    tx = optim.adamw(1e-2)
    step = partial(train_step, gradient=gradient, tx=tx, **options)
    step = jax.jit(step) if jit else step
    state = new_state(params, tx, options.get("ema") is not None)
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def test_jit_equals_eager(params):
    batches = [make_batch(i) for i in range(2)]
    ours, metrics = run_steps(params, batches, ema=0.9)
    theirs, eager = run_steps(params, batches, jit=False, ema=0.9)
    close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5)
    jax.tree.map(close, (ours, metrics), (theirs, eager))


def test_a_state_made_eagerly_can_be_donated(params):
    tx = optim.adamw(1e-2)
    state = new_state(jax.tree.map(jnp.copy, params), tx, True)
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert state.step.is_deleted() and state.skipped.is_deleted()


def test_ema_is_the_weighted_mean_of_the_weights(params):
    tx = optim.adamw(1e-2)
    state = new_state(params, tx, True)
    average = jax.tree.map(np.float64, params)
    for i in range(3):
        state, _ = train_step(state, make_batch(i), gradient=gradient, tx=tx, ema=0.75)
        average = jax.tree.map(
            lambda a, p: 0.75 * a + 0.25 * np.float64(p), average, state.params
        )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), state.ema, average
    )


def poisoned(batch):
    return batch._replace(mask_abt=batch.mask_abt * np.float32(np.nan))


def test_stop_freezes_the_state_before_the_bad_step(params):
    good, _ = run_steps(params, [make_batch(0)])
    stuck, metrics = run_steps(
        params, [make_batch(0), poisoned(make_batch(1)), make_batch(2)]
    )
    assert not np.isfinite(metrics["loss"]) or metrics["finite"]
    assert int(stuck.step) == 1 and int(stuck.skipped) > 0
    jax.tree.map(np.testing.assert_array_equal, stuck.params, good.params)
    jax.tree.map(np.testing.assert_array_equal, stuck.opt_state, good.opt_state)


def test_skip_passes_over_the_bad_step_alone(params):
    state, metrics = run_steps(
        params,
        [make_batch(0), poisoned(make_batch(1)), make_batch(2)],
        on_nonfinite="skip",
    )
    good, _ = run_steps(params, [make_batch(0), make_batch(2)])
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (3, 1, 1)
    assert bool(metrics["finite"])
    jax.tree.map(np.testing.assert_array_equal, state.params, good.params)


def test_evaluation_sums_can_be_added(params):
    batch = make_batch(b=6)
    nll, count = eval_step(params, batch, apply=apply)
    parts = [jax.tree.map(lambda x, i=i: x[:, i : i + 2], batch) for i in (0, 2, 4)]
    sums = [eval_step(params, part, apply=apply) for part in parts]
    np.testing.assert_allclose(sum(n for n, _ in sums), nll, rtol=1e-5)
    assert sum(float(c) for _, c in sums) == float(count) == batch.mask_abt.sum()
