"""The outer optimizer against the equations, on one device by vmap."""

import contextlib
import warnings
from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optim import (
    diloco,
    gamma_max,
    mean_params,
    noloco,
    outer_step,
    partners,
    replica_axes,
    replicate,
    resize,
)
from tests.noloco_reference import groups_of, outer_round

TREE = {"a": (3, 4), "b": {"c": (5,), "d": ()}}


def shapes_to_arrays(rng, replicas):
    return jax.tree.map(
        lambda shape: rng.normal(size=(replicas, *shape)),
        TREE,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def flat(tree):
    """float64[replicas, numbers] of a tree with leading axes."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def start(tx, params):
    """State of all replicas."""
    one = jax.eval_shape(tx.init, jax.tree.map(lambda x: x[0], params))
    axes = replica_axes(one)
    return jax.vmap(tx.init, out_axes=axes)(params), axes


def stepper(tx, axes, **fixed):
    """One jitted step of all replicas with given gradients, by vmap."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **fixed)
        return optax.apply_updates(params, updates), state

    return jax.jit(
        jax.vmap(step, in_axes=(0, axes, 0), out_axes=(0, axes), axis_name="replica")
    )


def float_type(x64):
    return jax.enable_x64(True) if x64 else contextlib.nullcontext()


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("pairing", "group", "replicas", "nesterov", "exchange"),
    [
        ("round_robin", 2, 8, False, "fused"),
        ("round_robin", 2, 7, True, "pair"),
        ("random", 2, 6, False, "pair"),
        ("random", 4, 8, False, "fused"),
        ("round_robin", 4, 10, True, "pair"),
        ("random", 8, 8, False, "fused"),
        ("all", 2, 5, True, "fused"),
        ("round_robin", 2, 1, False, "fused"),
    ],
)
def test_equals_the_equations(x64, pairing, group, replicas, nesterov, exchange):
    rounds, inner_steps, lr = 20, 3, 0.1
    rates = dict(alpha=0.4, beta=0.8, gamma=0.6)
    rng = np.random.default_rng(replicas)
    with float_type(x64):
        dtype = jnp.float64 if x64 else jnp.float32
        tx = noloco(
            optax.sgd(lr),
            inner_steps=inner_steps,
            outer_lr=0.8,
            momentum=0.4,
            gamma=0.6,
            nesterov=nesterov,
            axis_size=replicas,
            pairing=pairing,
            group_size=group,
            seed=3,
            exchange=exchange,
            slow_dtype=dtype,
        )
        params = jax.tree.map(
            partial(jnp.asarray, dtype=dtype), shapes_to_arrays(rng, replicas)
        )
        state, axes = start(tx, params)
        step = stepper(tx, axes)
        phi, m = flat(params), np.zeros_like(flat(params))
        theta = phi
        for outer in range(rounds):
            for _ in range(inner_steps):
                grads = jax.tree.map(
                    partial(jnp.asarray, dtype=dtype), shapes_to_arrays(rng, replicas)
                )
                params, state = step(params, state, grads)
                theta = theta - lr * flat(grads)
            if pairing == "all":
                groups = [list(range(replicas))] * replicas
            else:
                row = partners(pairing, replicas, 3, outer, group_size=group)
                groups = groups_of(row)
            phi, m = outer_round(theta, phi, m, groups, nesterov=nesterov, **rates)
            theta = phi
        tolerance = 1e-12 if x64 else 1e-5
        np.testing.assert_allclose(flat(state.slow), phi, atol=tolerance)
        np.testing.assert_allclose(flat(state.momentum), m, atol=tolerance)
        np.testing.assert_allclose(flat(params), phi, atol=tolerance)
        assert int(state.count) == rounds * inner_steps


def one_exchange(phi, theta, m, replicas, **settings):
    """The outer step alone, on [replicas, numbers]."""
    given = {k: settings.pop(k) for k in ("alive", "weight") if k in settings}
    tx = noloco(optax.sgd(0.0), axis_size=replicas, inner_steps=1, **settings)
    state, axes = start(tx, phi)
    state = state._replace(momentum=m, count=jnp.int32(1))
    exchange = partial(
        outer_step, axis_size=replicas, inner_steps=1, **settings, **given
    )
    return jax.vmap(
        exchange, in_axes=(0, axes), out_axes=(0, axes), axis_name="replica"
    )(theta, state)


@pytest.mark.slow
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    replicas=st.integers(1, 9),
    alpha=st.floats(0, 0.9),
    gamma_share=st.floats(0.01, 0.99),
    wire=st.sampled_from([None, "bfloat16", "int8"]),
    exchange=st.sampled_from(["fused", "pair"]),
    group=st.sampled_from([2, 4]),
    alive=st.booleans(),
)
def test_the_mean_obeys_the_scalar_recursion(
    seed, replicas, alpha, gamma_share, wire, exchange, group, alive
):
    rng = np.random.default_rng(seed)
    phi, theta, m = (
        jnp.asarray(rng.normal(size=(replicas, 33)), jnp.float32) for _ in range(3)
    )
    settings = {}
    if alive:
        settings["alive"] = jnp.asarray(rng.random(replicas) < 0.6)
    gamma = gamma_share * gamma_max(alpha, replicas, group)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slow contraction
        _, state = one_exchange(
            phi,
            theta,
            m,
            replicas,
            momentum=alpha,
            gamma=gamma,
            outer_lr=0.7,
            wire_dtype=wire,
            exchange=exchange,
            group_size=group,
            seed=seed % 1000,
            **settings,
        )
    wanted = alpha * np.mean(m, 0) + 0.7 * np.mean(theta - phi, 0)
    np.testing.assert_allclose(np.mean(state.momentum, 0), wanted, atol=2e-6)
    np.testing.assert_allclose(
        np.mean(state.slow, 0), np.mean(phi, 0) + wanted, atol=2e-6
    )


@pytest.mark.parametrize("pairing", ["round_robin", "all"])
def test_weights_preserve_the_weighted_mean(pairing):
    rng = np.random.default_rng(0)
    phi, theta, m = (
        jnp.asarray(rng.normal(size=(6, 9)), jnp.float32) for _ in range(3)
    )
    weight = jnp.asarray([1.0, 2, 0.5, 4, 0, 1])
    _, state = one_exchange(phi, theta, m, 6, weight=weight, pairing=pairing)
    mean = partial(np.average, axis=0, weights=np.asarray(weight))
    wanted = 0.5 * mean(m) + 0.7 * mean(theta - phi)
    np.testing.assert_allclose(mean(state.momentum), wanted, atol=1e-6)


@pytest.mark.parametrize("group", [2, 4])
def test_weights_equal_the_equations(group):
    rng = np.random.default_rng(1)
    phi, theta, m = (
        jnp.asarray(rng.normal(size=(8, 9)), jnp.float32) for _ in range(3)
    )
    weight = np.asarray([1.0, 2, 0.5, 4, 3, 1, 1, 7])
    _, state = one_exchange(
        phi, theta, m, 8, weight=jnp.asarray(weight), group_size=group, seed=2
    )
    groups = groups_of(partners("round_robin", 8, 2, 0, group_size=group))
    want, _ = outer_round(
        *(np.asarray(x, np.float64) for x in (theta, phi, m)),
        groups,
        alpha=0.5,
        beta=0.7,
        gamma=0.7,
        weight=weight,
    )
    np.testing.assert_allclose(state.slow, want, atol=2e-6)


def quadratic(replicas, seed=0, dim=12):
    """Curvatures and minima of f_i(x) = sum a (x - c_i)^2 / 2."""
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.uniform(0.2, 1.0, dim), jnp.float32)
    c = jnp.asarray(rng.normal(size=(replicas, dim)), jnp.float32)
    return a, c


def run_quadratic(tx, steps, replicas=8):
    a, c = quadratic(replicas)
    params = replicate(jnp.ones(12), replicas)
    state, axes = start(tx, params)
    step = stepper(tx, axes)
    path = []
    for _ in range(steps):
        params, state = step(params, state, a[None] * (params - c))
        path.append(np.asarray(params))
    return np.stack(path), np.asarray(state.slow)


def test_with_all_it_is_diloco_as_its_authors_write_it():
    """Outer SGD with Nesterov momentum on the mean of (phi - theta), by optax."""
    ours, slow = run_quadratic(
        diloco(
            optax.sgd(0.05), axis_size=8, inner_steps=5, momentum=0.9, nesterov=True
        ),
        120,
    )
    a, c = quadratic(8)
    phi, outer = jnp.ones(12), optax.sgd(0.7, momentum=0.9, nesterov=True)
    outer_state = outer.init(phi)
    for _ in range(24):
        theta = jnp.tile(phi, (8, 1))
        for _ in range(5):
            theta = theta - 0.05 * a[None] * (theta - c)
        updates, outer_state = outer.update(phi - theta.mean(0), outer_state)
        phi = phi + updates
    np.testing.assert_allclose(ours[-1], np.tile(phi, (8, 1)), atol=2e-6)
    assert np.ptp(slow, axis=0).max() == 0  # bit for bit the same everywhere


def test_the_mean_of_gossip_is_diloco_but_the_replicas_differ():
    both = dict(axis_size=8, inner_steps=5, momentum=0.5)
    gossip, _ = run_quadratic(noloco(optax.sgd(0.05), **both), 120)
    central, slow = run_quadratic(diloco(optax.sgd(0.05), **both), 120)
    np.testing.assert_allclose(gossip.mean(1), central.mean(1), atol=2e-6)
    after_exchange = slice(4, None, 5)
    assert gossip[after_exchange].std(1).mean() > 0.03
    assert central[after_exchange].std(1).max() < 1e-6
    assert np.ptp(slow, axis=0).max() == 0


def test_drop_out_takes_a_bye_and_the_survivors_mean_is_exact():
    rng = np.random.default_rng(4)
    phi, theta, m = (
        jnp.asarray(rng.normal(size=(8, 9)), jnp.float32) for _ in range(3)
    )
    alive = jnp.arange(8) != 3
    row = partners("round_robin", 8, 0, 0)
    _, state = one_exchange(phi, theta, m, 8, alive=alive)
    alone = 0.5 * m + 0.7 * (theta - phi)
    for i in (3, int(row[3])):
        np.testing.assert_allclose(state.momentum[i], alone[i], atol=1e-6)
        assert np.isnan(state.replica_std[i])
    living = np.asarray(alive)
    np.testing.assert_allclose(
        np.asarray(state.momentum)[living].mean(0),
        np.asarray(alone)[living].mean(0),
        atol=1e-6,
    )


def test_all_reduce_leaves_out_who_is_not_alive():
    rng = np.random.default_rng(5)
    phi, theta, m = (
        jnp.asarray(rng.normal(size=(4, 9)), jnp.float32) for _ in range(3)
    )
    _, state = one_exchange(
        phi, theta, m, 4, alive=jnp.arange(4) != 2, pairing="all", gamma=0.0
    )
    delta = np.asarray(theta - phi)
    mean = delta[[0, 1, 3]].mean(0)
    for i in range(4):
        want = 0.5 * m[i] + 0.7 * (delta[2] if i == 2 else mean)
        np.testing.assert_allclose(state.momentum[i], want, atol=1e-6)


def test_replica_std_is_that_of_the_fast_weights():
    rng = np.random.default_rng(6)
    phi = jnp.zeros((8, 20_000), jnp.float32)
    theta = jnp.asarray(rng.normal(size=(8, 20_000)) * 0.3, jnp.float32)
    for settings in ({}, {"exchange": "pair"}, {"pairing": "all"}, {"group_size": 4}):
        _, state = one_exchange(phi, theta, phi, 8, **settings)
        np.testing.assert_allclose(state.replica_std, 0.3, rtol=0.03)


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_error_feedback_carries_what_was_rounded_off(wire):
    """With a constant payload the sum of what was sent approaches the sum meant."""
    rng = np.random.default_rng(7)
    phi = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    settings = dict(wire_dtype=wire, momentum=0.0, gamma=0.5, axis_size=2)

    def drift(feedback):
        tx = noloco(optax.sgd(0.0), inner_steps=1, error_feedback=feedback, **settings)
        state, axes = start(tx, phi)
        exchange = jax.jit(
            jax.vmap(
                partial(outer_step, inner_steps=1, error_feedback=feedback, **settings),
                in_axes=(0, axes),
                out_axes=(0, axes),
                axis_name="replica",
            )
        )
        total = 0
        for count in range(1, 33):
            # Delta = 0 and phi put back: the payload is the same each time.
            state = state._replace(slow=phi, count=jnp.int32(count))
            _, state = exchange(phi, state)
            total = total + np.asarray(state.slow - phi)
        exact = 32 * 0.5 * 0.5 * np.asarray(phi[::-1] - phi)
        return np.abs(total - exact).max()

    assert drift(True) < 0.15 * drift(False)


def test_a_mask_leaves_weights_to_the_inner_optimizer():
    params = {
        "shared": jnp.asarray([[0.0], [2.0]]),
        "own": jnp.asarray([[0.0], [2.0]]),
    }
    tx = noloco(
        optax.sgd(1.0),
        inner_steps=1,
        axis_size=2,
        momentum=0.0,
        gamma=1.0,
        mask=lambda p: {"shared": True, "own": False},
    )
    state, axes = start(tx, params)
    assert jax.tree.leaves(state.slow)[0].shape == (2, 1)
    assert len(jax.tree.leaves(state.slow)) == 1
    grads = jax.tree.map(jnp.zeros_like, params)
    params, state = stepper(tx, axes)(params, state, grads)
    np.testing.assert_array_equal(params["own"], [[0.0], [2.0]])
    np.testing.assert_array_equal(params["shared"], [[1.0], [1.0]])


def test_bfloat16_weights_keep_float32_slow_weights():
    params = jnp.ones((2, 4), jnp.bfloat16)
    tx = noloco(optax.sgd(0.01), inner_steps=1, axis_size=2)
    state, axes = start(tx, params)
    step = stepper(tx, axes)
    for _ in range(20):  # each step is below a quarter of bf16's last bit
        params, state = step(params, state, jnp.full((2, 4), 0.01, jnp.bfloat16))
    assert params.dtype == jnp.bfloat16
    assert state.slow.dtype == state.momentum.dtype == jnp.float32


def test_schedules_are_of_the_outer_round():
    seen = []
    tx = noloco(
        optax.sgd(1.0),
        inner_steps=2,
        axis_size=2,
        momentum=0.0,
        gamma=0.5,
        outer_lr=lambda outer: jnp.asarray([1.0, 10.0, 100.0])[outer],
        check=False,
    )
    params = jnp.zeros((2, 1))
    state, axes = start(tx, params)
    step = stepper(tx, axes)
    for _ in range(6):
        params, state = step(params, state, jnp.full((2, 1), -0.5))
        seen.append(float(params[0, 0]))
    np.testing.assert_allclose(seen[1::2], [1.0, 11.0, 111.0])


def test_the_inner_optimizer_gets_other_arguments_and_is_not_reset():
    def update(grads, state, params, *, scale):
        return jax.tree.map(lambda g: g * scale, grads), state + 1

    inner = optax.GradientTransformationExtraArgs(lambda p: jnp.int32(0), update)
    tx = noloco(inner, inner_steps=2, axis_size=2)
    params = jnp.zeros((2, 1))
    state, axes = start(tx, params)
    step = stepper(tx, axes, scale=2.0)
    for _ in range(4):
        params, state = step(params, state, jnp.ones((2, 1)))
    np.testing.assert_array_equal(state.inner, [4, 4])


def test_resize_keeps_survivors_and_clones():
    tx = noloco(optax.adam(0.1), axis_size=8)
    params = jnp.arange(16.0).reshape(8, 2)
    state, _ = start(tx, params)
    state = state._replace(count=jnp.int32(7), momentum=params * 3)
    fewer = resize((params, state), 6)
    np.testing.assert_array_equal(fewer[1].momentum, params[:6] * 3)
    assert int(fewer[1].count) == 7 and fewer[1].key.shape == (2,)
    np.testing.assert_allclose(mean_params(fewer[0]), params[:6].mean(0))
    again = resize(fewer, 8)
    np.testing.assert_array_equal(again[0][6:], params[:2])
    np.testing.assert_array_equal(again[1].inner[0].mu.shape, (8, 2))


def test_training_goes_on_over_a_change_of_replicas():
    """Eight, six, eight: the mean of those who stay obeys the recursion throughout."""
    params, state = replicate(jnp.ones(12), 8), None
    for replicas in (8, 6, 8):
        tx = noloco(optax.sgd(0.05), axis_size=replicas, inner_steps=5)
        if state is None:
            state, axes = start(tx, params)
        params, state = resize((params, state), replicas)
        a, c = quadratic(replicas)
        step = stepper(tx, axes)
        for _ in range(5):
            before = params, state
            params, state = step(params, state, a[None] * (params - c))
        theta = before[0] - 0.05 * a[None] * (before[0] - c)
        delta = np.mean(theta - before[1].slow, 0)
        wanted = 0.5 * np.mean(before[1].momentum, 0) + 0.7 * delta
        np.testing.assert_allclose(np.mean(state.momentum, 0), wanted, atol=1e-6)
    assert int(state.count) == 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(momentum=0.9, gamma=0.7), "it must be below 0.3800"),
        (dict(momentum=0.5, gamma=-0.1), "unstable"),
        (dict(gamma=1.4, nesterov=True), "with Nesterov momentum 0.5"),
        (dict(momentum=1.0), "momentum is 1.0"),
        (dict(gamma=lambda t: 0.1 + t), "unstable"),
        (dict(group_size=3), "power of 2"),
        (dict(pairing="ring"), "no pairing 'ring'"),
        (dict(pairing=np.asarray([[1, 2, 0] + list(range(3, 10**4))])), "inverse"),
        (dict(pairing=np.asarray([[1, 0]])), "instead of"),
        (dict(wire_dtype="float16"), "wire_dtype is float16"),
        (dict(exchange="both"), "exchange is 'both'"),
        (dict(error_feedback=True), "nothing to feed back"),
        (dict(error_feedback=True, wire_dtype="int8", group_size=4), "group_size 2"),
        (dict(pairing="all", wire_dtype="int8"), "for gossip"),
        (dict(axis_size=0), "axis_size is 0"),
        (dict(inner_steps=0), "inner_steps is 0"),
    ],
)
def test_bad_settings_are_refused_when_made(settings, message):
    with pytest.raises(ValueError, match=message):
        noloco(optax.sgd(0.1), **{"axis_size": 10**4} | settings)


def test_slow_gossip_is_warned_of():
    with pytest.warns(UserWarning, match="hardly holds 8 replicas together"):
        noloco(optax.sgd(0.1), axis_size=8, gamma=0.01)
    noloco(optax.sgd(0.1), axis_size=8, gamma=0.01, check=False)


def test_outside_the_axis_and_with_another_size_it_says_so():
    tx = noloco(optax.sgd(0.1), axis_size=4)
    params = jnp.ones(3)
    with pytest.raises(ValueError, match="there is no axis 'replica'"):
        tx.update(params, tx.init(params), params)
    many = replicate(params, 2)
    state, axes = start(noloco(optax.sgd(0.1), axis_size=2), many)
    with pytest.raises(ValueError, match="axis_size is 4, and axis 'replica' has 2"):
        stepper(tx, axes)(many, state, many)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def test_a_fresh_state_can_be_donated_with_its_parameters():
    tx = noloco(optax.adam(0.1), axis_size=1, error_feedback=True, wire_dtype="int8")
    params = {"w": jnp.ones((4, 4))}
    state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    step(params, state)
