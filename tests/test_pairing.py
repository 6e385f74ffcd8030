"""Pairings and the theory of how fast they mix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.optim import (
    contraction,
    gamma_max,
    noloco,
    outer_step,
    partners,
    replica_axes,
    stationary_variance,
)
from jaxlab.optim.pairing import (
    MAX_ROWS,
    key_data,
    pairing_table,
    random_groups,
    round_robin,
    row_index,
)
from jaxlab.optim.stability import moment_matrix
from tests.noloco_reference import groups_of, outer_round


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 7, 8, 33, 64])
def test_round_robin_has_every_pair_exactly_once(replicas):
    table = round_robin(replicas)
    own = np.arange(replicas)
    met = set()
    for partner in table:
        assert (partner[partner] == own).all()
        assert (partner == own).sum() == replicas % 2
        met |= {(i, int(j)) for i, j in enumerate(partner) if i < j}
    assert len(met) == replicas * (replicas - 1) // 2
    assert sum((p != own).sum() // 2 for p in table) == len(met)


@pytest.mark.parametrize(("replicas", "group"), [(8, 2), (8, 4), (16, 16), (11, 4)])
def test_random_rows_are_partitions_into_groups(replicas, group):
    table = random_groups(replicas, group, 5, np.random.default_rng(0))
    for partner_sn in table:
        groups = groups_of(partner_sn)
        sizes = sorted(len(g) for g in groups)
        left = replicas % group
        assert sizes == [1] * left + [group] * (replicas - left)
        assert all(groups[j] == g for g in groups for j in g)


def test_an_epoch_uses_every_row_once_and_is_a_pure_function():
    for replicas in (8, 9, 64):
        rows = len(pairing_table("round_robin", replicas))
        assert rows == min(MAX_ROWS, replicas - 1 + replicas % 2)
        for epoch in range(3):
            rounds = range(epoch * rows, (epoch + 1) * rows)
            epoch_rows = [
                tuple(partners("round_robin", replicas, 5, t)) for t in rounds
            ]
            assert len(set(epoch_rows)) == rows
            again = [tuple(partners("round_robin", replicas, 5, t)) for t in rounds]
            assert epoch_rows == again
    first, second = (
        [tuple(partners("round_robin", 8, seed, t)) for t in range(7)]
        for seed in (0, 1)
    )
    assert first != second


def test_the_program_draws_the_row_that_the_host_names():
    table = pairing_table("round_robin", 8)
    draw = jax.jit(lambda key, t: row_index(key, t, len(table)))
    for t in range(20):
        row = table[int(draw(key_data(3), t))][0]
        np.testing.assert_array_equal(row, partners("round_robin", 8, 3, t))


def test_the_draw_does_not_depend_on_the_default_generator():
    before = partners("round_robin", 8, 3, 11)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(partners("round_robin", 8, 3, 11), before)


# ------------------------------------------------------------------ stability


@pytest.mark.parametrize("nesterov", [False, True])
def test_gamma_max_is_where_the_contraction_crosses_one(nesterov):
    for replicas in (2, 4, 8, 64, 10**6):
        for group in (2, 4, 8):
            for alpha in (0.0, 0.3, 0.5, 0.7, 0.9):
                low, high = 0.001, 5.0
                while high - low > 1e-7:
                    middle = (low + high) / 2
                    stable = contraction(
                        alpha, middle, replicas, group, nesterov=nesterov
                    ) < (1 - 1e-12)
                    low, high = (middle, high) if stable else (low, middle)
                bound = gamma_max(alpha, replicas, group, nesterov=nesterov)
                assert abs(bound - low) < 1e-3, (replicas, group, alpha)


def test_bounds_of_pairs_among_many():
    for alpha, bound in ((0.0, 2.0), (0.3, 1.82), (0.5, 1.5), (0.7, 1.02), (0.9, 0.38)):
        assert gamma_max(alpha, 10**9) == pytest.approx(bound, abs=1e-6)
    assert gamma_max(0.5, 8) == pytest.approx(1.615, abs=1e-3)
    assert contraction(0.0, 1.0, 10**9) == pytest.approx(0.5, abs=1e-6)
    assert contraction(0.5, 0.7, 10**9) == pytest.approx(0.700, abs=1e-3)
    assert contraction(0.9, 0.7, 10**9) == pytest.approx(1.098, abs=1e-3)
    assert stationary_variance(0.5, 0.7, 64) == pytest.approx(1.243, abs=1e-3)


def simulate(
    replicas, alpha, gamma, rounds, rng, noise=0.0, trials=1, dim=16, nesterov=False
):
    """Variance of phi over the rounds, float64[rounds + 1], with uniform pairs.

    The equations once more, for many trials at a time; `outer_round` has them for one.
    """
    phi = rng.normal(size=(trials, replicas, dim))
    m = np.zeros_like(phi)
    variance = [phi.var(1).mean()]
    for _ in range(rounds):
        order = rng.random((trials, replicas)).argsort(1)
        partner = np.empty_like(order)
        half = replicas // 2
        np.put_along_axis(partner, order[:, :half], order[:, half:], 1)
        np.put_along_axis(partner, order[:, half:], order[:, :half], 1)
        delta = noise * rng.normal(size=phi.shape)

        def paired(x, partner=partner):
            return (x + np.take_along_axis(x, partner[..., None], 1)) / 2

        drive = 0.7 * paired(delta) - gamma * (phi - paired(phi))
        m = alpha * m + drive
        phi = phi + (alpha * m + drive if nesterov else m)
        variance.append(phi.var(1).mean())
    return np.asarray(variance)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("replicas", [8, 64])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.0, 1.0), (0.5, 0.7), (0.3, 0.7)])
def test_contraction_is_the_theory(replicas, alpha, gamma, nesterov):
    rng = np.random.default_rng(0)
    trials = 10_000 if replicas == 8 else 400
    measured = simulate(
        replicas, alpha, gamma, 10, rng, trials=trials, dim=8, nesterov=nesterov
    )
    matrix = moment_matrix(alpha, gamma, replicas, nesterov=nesterov)
    moments = np.array([1.0, 0.0, 0.0])
    for t in range(1, 11):
        moments = matrix @ moments
        assert measured[t] / measured[0] == pytest.approx(moments[0], rel=0.05), t


@pytest.mark.parametrize(
    ("alpha", "gamma", "nesterov"), [(0.9, 0.7, False), (0.5, 1.6, True)]
)
def test_an_unstable_gamma_grows(alpha, gamma, nesterov):
    assert gamma > gamma_max(alpha, 64, nesterov=nesterov)
    rng = np.random.default_rng(0)
    grown = simulate(64, alpha, gamma, 60, rng, trials=20, nesterov=nesterov)
    assert grown[-1] > 3 * grown[0]


@pytest.mark.parametrize("nesterov", [False, True])
def test_stationary_variance_is_the_theory(nesterov):
    rng = np.random.default_rng(0)
    path = simulate(64, 0.5, 0.7, 400, rng, noise=1.0, nesterov=nesterov)
    theory = stationary_variance(0.5, 0.7, 64, nesterov=nesterov)
    assert path[50:].mean() == pytest.approx(theory, rel=0.05)


def test_one_round_of_the_program_contracts_by_the_theory():
    """Over all rows of the table, which are equally likely, so exactly."""
    replicas = 8
    phi = jnp.asarray(np.random.default_rng(0).normal(size=(replicas, 512)))
    tx = noloco(optax.sgd(0.0), axis_size=replicas)
    axes = replica_axes(jax.eval_shape(tx.init, phi[0]))
    state = jax.vmap(tx.init, out_axes=axes)(phi)
    variances = []
    for row in round_robin(replicas):
        _, after = jax.vmap(
            partial(outer_step, axis_size=replicas, row=row),
            in_axes=(0, axes),
            out_axes=(0, axes),
            axis_name="replica",
        )(phi, state)
        variances.append(np.asarray(after.slow).var(0).mean())
    factor = np.mean(variances) / np.asarray(phi).var(0).mean()
    theory = moment_matrix(0.5, 0.7, replicas)[0, 0]
    assert factor == pytest.approx(theory, rel=1e-4)


@pytest.mark.parametrize("shuffled", [True, False])
def test_walking_the_table_in_order_diverges_and_the_shuffled_one_does_not(shuffled):
    replicas, rounds = 16, 600
    rng = np.random.default_rng(0)
    phi, m = rng.normal(size=(replicas, 8)), np.zeros((replicas, 8))
    table = round_robin(replicas)
    for t in range(rounds):
        row = partners("round_robin", replicas, 0, t) if shuffled else table[t % 15]
        phi, m = outer_round(
            phi, phi, m, groups_of(row), alpha=0.5, beta=0.7, gamma=0.7
        )
    spread = phi.var(0).mean()
    assert spread < 1e-12 if shuffled else spread > 1e6
