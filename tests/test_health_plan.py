"""Plans of rings, meshes and pairs against all others, and against doing nothing."""

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.health import pairs, plan, rings
from jaxlab.health.pairs import plan_pairs
from jaxlab.health.plan import grid_cost, plan_grid, plan_mesh, plan_order, ring_cost
from jaxlab.optim import partners
from jaxlab.optim.pairing import check_table

# Few values make ties; one may be out of reach and one not measured.
DELAYS = st.sampled_from([1e-3, 2e-3, 2.5e-3, 0.1, 7.0])


@st.composite
def matrices(draw, smallest=1, largest=7, values=DELAYS):
    n = draw(st.integers(smallest, largest))
    rows = st.lists(values, min_size=n, max_size=n)
    return np.array(draw(st.lists(rows, min_size=n, max_size=n)))


def random_delay(n, seed, clusters=0):
    rng = np.random.default_rng(seed)
    if not clusters:
        return rng.random((n, n))
    group = rng.permutation(n) % clusters
    near = group[:, None] == group
    return np.where(near, 1e-3, 5e-3) * rng.uniform(0.8, 1.2, (n, n))


def plain_cost(delay, order, both_ways):
    """(worst, total) of a ring, link by link."""
    used = []
    for a, b in zip(order, [*order[1:], order[0]], strict=True):
        if a != b:
            used.append(max(delay[a, b], delay[b, a]) if both_ways else delay[a, b])
    return max(used, default=0.0), math.fsum(used)


def close(cost, other):
    return np.allclose(cost, other, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------- rings


@given(matrices(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_small_rings_are_the_best_of_all(delay, both_ways):
    n = len(delay)
    order = plan_order(delay, both_ways=both_ways)
    every = [(0, *rest) for rest in itertools.permutations(range(1, n))]
    best = min(plain_cost(delay, o, both_ways) for o in every)
    assert sorted(order) == list(range(n)) and order[0] == 0
    assert close(ring_cost(delay, order, both_ways=both_ways), best)
    if close(plain_cost(delay, range(n), both_ways), best):
        assert order == tuple(range(n))


@given(matrices(largest=9), st.permutations(range(9)))
@settings(deadline=None, max_examples=30)
def test_names_of_nodes_do_not_matter(delay, names):
    names = np.array([i for i in names if i < len(delay)])
    other = delay[np.ix_(names, names)]
    plans = [ring_cost(d, plan_order(d)) for d in (delay, other)]
    assert close(*plans)


@pytest.mark.parametrize("n", [9, 10])
@pytest.mark.parametrize("kind", ["random", "clustered", "one way"])
def test_search_finds_what_dynamic_programming_finds(monkeypatch, n, kind):
    both_ways = kind != "one way"
    for seed in range(3):
        delay = random_delay(n, seed, 3 if kind == "clustered" else 0)
        exact = ring_cost(
            delay, plan_order(delay, both_ways=both_ways), both_ways=both_ways
        )
        with monkeypatch.context() as patch:
            patch.setattr(rings, "EXACT_RING", 3)
            found = plan_order(delay, both_ways=both_ways)
        searched = ring_cost(delay, found, both_ways=both_ways)
        assert searched.worst <= 1.05 * exact.worst
        if searched.worst == exact.worst:
            assert searched.total <= 1.05 * exact.total


def test_long_ring_meets_a_bound_that_no_ring_beats():
    delay = random_delay(64, 0)
    order = plan_order(delay)
    both = np.maximum(delay, delay.T) + np.diag(np.full(64, np.inf))
    second = np.sort(both, axis=1)[:, 1].max()  # each node has two neighbours
    assert sorted(order) == list(range(64))
    assert ring_cost(delay, order).worst <= 1.1 * second
    assert order == plan_order(delay)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 13, 20])
def test_uniform_network_keeps_its_order(n):
    assert plan_order(np.full((n, n), 1e-3)) == tuple(range(n))


@pytest.mark.parametrize("n", [5, 8, 16])
@pytest.mark.parametrize("both_ways", [True, False])
def test_one_slow_link_is_avoided(n, both_ways):
    delay = np.full((n, n), 1e-3)
    delay[1, 2] = 25e-3
    assert ring_cost(delay, range(n), both_ways=both_ways).worst == 25e-3
    order = plan_order(delay, both_ways=both_ways)
    assert ring_cost(delay, order, both_ways=both_ways).worst == 1e-3


def test_one_direction_may_be_used_where_the_other_is_slow():
    delay = np.full((4, 4), 1e-3)
    delay[1, 0] = delay[2, 1] = delay[3, 2] = delay[0, 3] = 25e-3
    assert plan_order(delay, both_ways=False) == (0, 1, 2, 3)
    assert ring_cost(delay, range(4)).worst == 25e-3


@pytest.mark.parametrize("n", [6, 16])
def test_slow_node_cannot_be_avoided(n):
    delay = np.full((n, n), 1e-3)
    delay[3, :] = 25e-3
    order = plan_order(delay)
    assert ring_cost(delay, order).worst == 25e-3
    assert order == tuple(range(n))  # nothing gained, nothing moved
    kept = np.delete(np.delete(delay, 3, 0), 3, 1)
    assert ring_cost(kept, plan_order(kept)).worst == 1e-3


def test_noise_moves_nothing():
    delay = 1e-3 * np.random.default_rng(0).uniform(0.97, 1.03, (8, 8))
    assert plan_order(delay) != tuple(range(8))
    assert plan_order(delay, noise=0.1) == tuple(range(8))
    delay[4, 5] = 1.0
    order = plan_order(delay, noise=0.1)
    assert ring_cost(delay, order).worst < 1.1e-3


def test_within_noise_the_sum_decides():
    # The only ring with a worst link of 1.0 is slow everywhere else.
    delay = np.full((4, 4), 1.0)
    for a, b in ((0, 1), (1, 2), (2, 3)):
        delay[a, b] = delay[b, a] = 0.1
    delay[0, 3] = delay[3, 0] = 1.05
    assert ring_cost(delay, plan_order(delay)).worst == 1.0
    assert plan_order(delay, noise=0.1) == (0, 1, 2, 3)


@pytest.mark.parametrize("n", [6, 14])
def test_unmeasured_is_used_only_where_it_must_be(n):
    delay = np.full((n, n), 1e-3)
    delay[0, 1] = delay[1, 0] = np.nan
    delay[4, 5] = delay[5, 4] = 3e-3
    order = plan_order(delay)
    assert ring_cost(delay, order).worst == 1e-3
    assert ring_cost(delay, range(n)).worst == 3e-3
    delay[1, 0] = 2e-3  # one way is better than nothing
    total = ring_cost(delay, range(n)).total
    assert math.isclose(total, (n - 2) * 1e-3 + 2e-3 + 3e-3)


@pytest.mark.parametrize("n", [6, 14])
def test_unreachable_links_are_never_used(n):
    delay = np.full((n, n), 1e-3)
    delay[0, 1] = delay[2, 3] = np.inf
    assert ring_cost(delay, plan_order(delay)).worst == 1e-3
    delay[:3, :3] = 1e-3
    delay[:3, 3:] = np.inf
    with pytest.raises(ValueError, match=f"no ring over {n} nodes .*0->3"):
        plan_order(delay)


@pytest.mark.parametrize(
    ("delay", "message"),
    [
        (np.ones((2, 3)), r"shape \(2, 3\).*\[n, n\]"),
        (np.ones(4), r"shape \(4,\)"),
        (np.zeros((0, 0)), r"shape \(0, 0\)"),
        (np.array([[0, -1.0], [1.0, 0]]), r"delay\[0, 1\] is -1.0 s"),
        (np.full((3, 3), np.nan), "no finite entry between 3 nodes"),
        (np.full((3, 3), np.inf), "no finite entry"),
    ],
)
def test_delays_that_cannot_be_used(delay, message):
    with pytest.raises(ValueError, match=message):
        plan_order(delay)


def test_names_the_node_that_too_little_reaches():
    delay = np.ones((5, 5))
    delay[2, [0, 1, 3]] = np.inf
    with pytest.raises(ValueError, match=r"node 2 reaches only \[4\] of 5 nodes"):
        plan_order(delay)
    assert ring_cost(delay, plan_order(delay, both_ways=False), both_ways=False)[0] == 1
    delay[:, 2] = np.inf
    with pytest.raises(ValueError, match="node 2 is reached by only none"):
        plan_order(delay, both_ways=False)


def test_order_must_name_each_node():
    with pytest.raises(ValueError, match=r"order \(0, 1, 1\) does not name each of 3"):
        ring_cost(np.ones((3, 3)), (0, 1, 1))


# --------------------------------------------------------------------------- meshes


def plain_grid_cost(delay, grid, weights):
    used = []
    for axis, size in enumerate(grid.shape):
        for line in np.moveaxis(grid, axis, -1).reshape(-1, size):
            for a, b in zip(line, np.roll(line, -1), strict=True):
                if size > 1:
                    used.append(weights[axis] * max(delay[a, b], delay[b, a]))
    return max(used, default=0.0), math.fsum(used)


@given(st.sampled_from([(1,), (3, 1), (2, 2), (2, 3), (3, 2), (1, 6)]), st.data())
@settings(deadline=None, max_examples=30)
def test_small_meshes_are_the_best_of_all(shape, data):
    n = math.prod(shape)
    delay = data.draw(matrices(n, n))
    weights = data.draw(
        st.lists(
            st.sampled_from([0.5, 1.0, 4.0]), min_size=len(shape), max_size=len(shape)
        )
    )
    grid = plan_grid(delay, shape, weights=weights)
    every = (np.array(p).reshape(shape) for p in itertools.permutations(range(n)))
    best = min(plain_grid_cost(delay, g, weights) for g in every)
    assert grid.shape == shape
    assert close(grid_cost(delay, grid, weights=weights), best)
    given_grid = np.arange(n).reshape(shape)
    if close(plain_grid_cost(delay, given_grid, weights), best):
        assert (grid == given_grid).all()


@pytest.mark.parametrize("shape", [(4, 4), (2, 2, 4), (16, 1), (3, 5)])
@given(st.integers(0, 99), st.booleans())
@settings(deadline=None, max_examples=3)
def test_large_meshes_are_never_worse_than_given(shape, seed, clustered):
    n = math.prod(shape)
    delay = random_delay(n, seed, shape[0] if clustered else 0)
    grid = plan_grid(delay, shape, seed=seed)
    assert sorted(grid.ravel()) == list(range(n))
    assert grid_cost(delay, grid) <= grid_cost(delay, np.arange(n).reshape(shape))


@pytest.mark.parametrize("shape", [(2, 4), (4, 4), (3, 1, 5)])
def test_uniform_network_keeps_its_mesh(shape):
    n = math.prod(shape)
    grid = plan_grid(np.full((n, n), 1e-3), shape)
    assert (grid == np.arange(n).reshape(shape)).all()


def test_search_finds_what_trying_all_finds(monkeypatch):
    for seed in range(3):
        delay = random_delay(8, seed)
        exact = grid_cost(delay, plan_grid(delay, (2, 4)))
        with monkeypatch.context() as patch:
            patch.setattr(plan, "EXACT_GRID", 1)
            searched = grid_cost(delay, plan_grid(delay, (2, 4)))
        assert searched.worst <= 1.1 * exact.worst


def test_heavy_axis_stays_where_links_are_fast():
    # Hosts of two devices, given so that the last axis runs across them.
    host = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    delay = np.where(host[:, None] == host, 1e-5, 1e-3)
    grid = plan_grid(delay, (4, 2), weights=(1, 8))
    assert (host[grid[:, 0]] == host[grid[:, 1]]).all()
    assert grid_cost(delay, grid, weights=(1, 8)).worst == 1e-3


@pytest.mark.parametrize(
    ("shape", "weights", "message"),
    [
        ((2, 3), None, r"shape \(2, 3\) does not hold 8 nodes"),
        ((2, 4), (1.0,), "not a positive one for each axis"),
        ((2, 4), (1.0, 0.0), "not a positive one"),
    ],
)
def test_meshes_that_do_not_fit(shape, weights, message):
    with pytest.raises(ValueError, match=message):
        plan_grid(np.ones((8, 8)), shape, weights=weights)
    with pytest.raises(ValueError, match="does not name each of 8"):
        grid_cost(np.ones((8, 8)), np.zeros((2, 4)))


def test_mesh_of_devices_computes():
    delay = np.full((8, 8), 1e-3)
    delay[2, 3] = 1.0
    mesh = plan_mesh(jax.devices(), delay, (2, 4), ("data", "tensor"))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert mesh.axis_names == ("data", "tensor")
    assert sorted(ids.ravel()) == list(range(8))
    assert grid_cost(delay, ids).worst == 1e-3
    spec = jax.sharding.PartitionSpec("data", "tensor")
    x = jax.device_put(np.arange(32.0).reshape(4, 8), jax.NamedSharding(mesh, spec))
    total = jax.shard_map(
        lambda x: jax.lax.psum(x.sum(), ("data", "tensor")),
        mesh=mesh,
        in_specs=spec,
        out_specs=jax.sharding.PartitionSpec(),
    )(x)
    assert float(total) == np.arange(32.0).sum()


def test_mesh_places_hosts_whole():
    # Four hosts of two devices; the link between hosts 1 and 2 is slow.
    delay = 1e-3 * np.random.default_rng(0).uniform(0.7, 1.0, (4, 4))
    delay[1, 2] = 1.0
    hosts = np.repeat(np.arange(4), 2)
    mesh = plan_mesh(jax.devices(), delay, (4, 2), ("data", "tensor"), hosts=hosts)
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    order = hosts[ids[:, 0]]
    assert (ids[:, 0] % 2 == 0).all() and (ids[:, 1] == ids[:, 0] + 1).all()
    assert ring_cost(delay, order).worst <= 1e-3


def test_mesh_follows_hosts_whose_devices_are_mixed():
    delay = np.full((4, 4), 1e-3)
    hosts = [0, 1, 2, 3, 0, 1, 2, 3]
    mesh = plan_mesh(
        jax.devices(), delay, (4, 2), ("data", "tensor"), hosts=hosts, weights=(1, 8)
    )
    row = np.vectorize(lambda device: hosts[device.id])(mesh.devices)
    assert (row[:, 0] == row[:, 1]).all()


def test_mesh_says_what_does_not_fit():
    devices, names = jax.devices(), ("data",)
    with pytest.raises(ValueError, match="delay is for 3 nodes; there are 8 devices"):
        plan_mesh(devices, np.ones((3, 3)), (8,), names)
    with pytest.raises(ValueError, match="hosts must name a row of delay for each of"):
        plan_mesh(devices, np.ones((3, 3)), (8,), names, hosts=[0, 1, 2])
    mesh = plan_mesh(devices, np.zeros((1, 1)), (8,), names)  # a single process
    assert list(mesh.devices) == devices


# ---------------------------------------------------------------------------- pairs


def matchings(nodes):
    """All ways to pair; with an odd number one has a bye."""
    if not nodes:
        yield ()
        return
    first, *rest = nodes
    for other in rest:
        yield from (
            ((first, other), *more)
            for more in matchings([r for r in rest if r != other])
        )
    if len(nodes) % 2:
        yield from matchings(rest)


def pairs_cost(delay, row):
    used = [max(delay[i, j], delay[j, i]) for i, j in enumerate(row) if i < j]
    return max(used, default=0.0), math.fsum(used)


@given(matrices(2, 7))
@settings(deadline=None, max_examples=40)
def test_first_row_is_the_best_of_all(delay):
    table = plan_pairs(delay)
    used = [
        [max(delay[i, j], delay[j, i]) for i, j in pairs]
        for pairs in matchings(list(range(len(delay))))
    ]
    best = min((max(u), math.fsum(u)) for u in used)
    assert close(pairs_cost(delay, table[0]), best)


@given(st.integers(2, 16), st.integers(0, 99))
@settings(deadline=None, max_examples=12)
def test_pairs_never_meet_twice_and_connect_all(n, seed):
    table = plan_pairs(random_delay(n, seed))
    check_table(table[:, None], n)
    met = [(i, j) for row in table for i, j in enumerate(row) if i < j]
    assert len(set(met)) == len(met)
    byes = np.argwhere(table == np.arange(n))[:, 1]
    assert len(byes) == len(table) * (n % 2) == len(set(byes))
    group = np.arange(n)
    for i, j in met:
        group[group == group[i]] = group[j]
    assert len(set(group)) == 1
    assert len(table) >= max(n // 2, 1)


def test_slow_pair_and_slow_clusters():
    delay = np.full((8, 8), 1e-3)
    delay[2, 5] = 1.0
    table = plan_pairs(delay)
    assert (table[:, 2] != 5).all()
    group = np.arange(8) // 4
    delay = np.where(group[:, None] == group, 1e-3, 1.0)
    table = plan_pairs(delay, 1)  # one row would leave two halves
    across = [(group[row] != group).any() for row in table]
    assert across == [False] * 3 + [True]


def test_search_for_pairs_finds_what_dynamic_programming_finds(monkeypatch):
    delay = random_delay(12, 1)
    exact = pairs_cost(delay, plan_pairs(delay, 1)[0])
    monkeypatch.setattr(pairs, "EXACT_PAIRS", 2)
    assert close(pairs_cost(delay, plan_pairs(delay, 1)[0]), exact)


def test_noloco_takes_the_table():
    delay = random_delay(6, 0)
    table = plan_pairs(delay)
    drawn = {tuple(partners(table, 6, 0, r)) for r in range(len(table))}
    assert drawn == {tuple(row) for row in table}


def test_pairs_that_cannot_be():
    with pytest.raises(ValueError, match="rows is 4; 4 nodes have 1 to 3"):
        plan_pairs(np.ones((4, 4)), 4)
    delay = np.full((4, 4), np.inf)
    delay[:2, :2] = delay[2:, 2:] = 1e-3
    with pytest.raises(ValueError, match="no row 1 of pairs .*unreachable 0->2"):
        plan_pairs(delay)
    assert plan_pairs(np.zeros((1, 1))).tolist() == [[0]]
