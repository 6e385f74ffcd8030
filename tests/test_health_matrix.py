"""Slow and unreachable links, senders and receivers."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxlab.health.detect import DetectConfig, Kind
from jaxlab.health.matrix import classify_hang, classify_matrix, explain

NAN, INF = math.nan, math.inf


def healthy(n, seed=0, low=0.3e-3, high=1.5e-3):
    """float[n, n]: healthy cells as measured on a small cluster, seconds."""
    delay = np.random.default_rng(seed).uniform(low, high, (n, n))
    np.fill_diagonal(delay, 0.0)
    return delay


def put(delay, *cells, value=25e-3):
    """A copy with a value in cells; None in an index stands for all."""
    delay = delay.copy()
    for i, j in cells:
        delay[slice(None) if i is None else i, slice(None) if j is None else j] = value
    return delay


H4 = healthy(4)
SLOW, HANG, FINE = Kind.COMM_SLOW, Kind.COMM_HANG, Kind.HEALTHY
MATRICES = {
    "healthy": (H4, FINE, (), (), "none"),
    "both ways": (put(H4, (1, 2), (2, 1)), SLOW, (), ((1, 2), (2, 1)), "point"),
    "one way": (put(H4, (1, 2)), SLOW, (), ((1, 2),), "point"),
    "sender": (put(H4, (2, None)), SLOW, (2,), (), "row"),
    "receiver": (put(H4, (None, 2)), SLOW, (2,), (), "column"),
    "sender and receiver": (
        put(H4, (2, None), (None, 2)),
        SLOW,
        (2,),
        (),
        "row",
    ),
    "sender and another's link": (
        put(H4, (2, None), (0, 3)),
        SLOW,
        (2,),
        ((0, 3),),
        "row",
    ),
    "receiver and another's link": (
        put(H4, (None, 0), (1, 2)),
        SLOW,
        (0,),
        ((1, 2),),
        "column",
    ),
    "sender of ten, two cells of it not measured": (
        put(put(healthy(10), (4, None)), (4, 0), (4, 9), value=NAN),
        SLOW,
        (4,),
        (),
        "row",
    ),
    "two senders of ten": (
        put(healthy(10), (4, None), (7, None)),
        SLOW,
        (4, 7),
        (),
        "row",
    ),
    "a sender and a receiver of ten": (
        put(healthy(10), (4, None), (None, 7)),
        SLOW,
        (4, 7),
        (),
        "row",
    ),
    "two links of one sender of ten": (
        put(healthy(10), (4, 1), (4, 2)),
        SLOW,
        (),
        ((4, 1), (4, 2)),
        "point",
    ),
    "not measured": (put(H4, (None, None), value=NAN), Kind.UNKNOWN, (), (), "none"),
    "half not measured": (
        put(put(H4, (1, 2)), (0, None), (None, 0), value=NAN),
        SLOW,
        (),
        ((1, 2),),
        "point",
    ),
    "cut both ways": (
        put(H4, (1, 2), (2, 1), value=INF),
        HANG,
        (),
        ((1, 2), (2, 1)),
        "point",
    ),
    "a host cut off": (
        put(H4, (3, None), (None, 3), value=INF),
        HANG,
        (3,),
        (),
        "row",
    ),
    "cut and slow": (
        put(put(H4, (0, 1)), (2, 3), value=INF),
        HANG,
        (),
        ((0, 1), (2, 3)),
        "point",
    ),
    "all cut": (put(H4, (None, None), value=INF), HANG, (), (), "all"),
    "one rank": (np.zeros((1, 1)), Kind.UNKNOWN, (), (), "none"),
    "two ranks": (healthy(2, low=1e-3), FINE, (), (), "none"),
    "two ranks, one way: row, column or link?": (
        put(healthy(2), (1, 0)),
        SLOW,
        (),
        ((1, 0),),
        "point",
    ),
    "two ranks, both slow, with nothing to compare": (
        put(healthy(2), (None, None)),
        FINE,
        (),
        (),
        "none",
    ),
    "two ranks, cut": (
        put(healthy(2), (0, 1), value=INF),
        HANG,
        (),
        ((0, 1),),
        "point",
    ),
    "three ranks, sender": (put(healthy(3), (0, None)), SLOW, (0,), (), "row"),
    "three ranks, both ways": (
        put(healthy(3), (0, 1), (1, 0)),
        SLOW,
        (),
        ((0, 1), (1, 0)),
        "point",
    ),
    "all the same": (np.full((5, 5), 1e-3), FINE, (), (), "none"),
    "below the clock's resolution": (
        put(put(H4, (0, 1), (2, 1), value=0.0), (3, 0)),
        SLOW,
        (),
        ((3, 0),),
        "point",
    ),
    "all zero": (np.zeros((3, 3)), FINE, (), (), "none"),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name):
    delay, *expected = MATRICES[name]
    found = classify_matrix(delay)
    assert [*found[:4]] == expected, str(found)
    assert found.evidence and 0 <= found.confidence <= 1
    if found.kind in (SLOW, HANG):
        assert found.confidence >= 0.5


@pytest.mark.parametrize("axis", [0, 1])
def test_both_lines_are_in_the_evidence(axis):
    delay = put(healthy(10), (4, None), (None, 7))
    words = classify_matrix(delay.T if axis else delay).evidence
    assert ("row 7 and column 4" if axis else "row 4 and column 7") in words


def test_a_hang_is_explained_by_what_carries_nothing():
    """Of a campaign: a link was cut, and another one took three times as long."""
    slower = put(healthy(4, low=1.9e-3, high=2.2e-3), (1, 2), value=6.6e-3)
    cut = put(slower, (0, 3), (3, 0), value=INF)
    assert classify_matrix(cut).links == ((0, 3), (1, 2), (3, 0))
    assert classify_hang(cut)[:3] == (HANG, (), ((0, 3), (3, 0)))
    assert classify_hang(slower)[:3] == (HANG, (), ((1, 2),))
    assert classify_hang(put(H4, (None, None), value=INF)).scope == "all"
    assert classify_hang(H4).kind == FINE


def two_hosts(first, second, inside=0.05):
    """Links between hosts of so many ranks are 20 times as slow as those within."""
    host = np.repeat([0, 1], [first, second])
    same = host[:, None] == host
    return np.where(same, inside, 1) * healthy(len(host), low=0.8e-3, high=1.2e-3)


def test_topology_is_no_fault_and_a_baseline_sees_through_it():
    assert "topology" in classify_matrix(two_hosts(14, 6)).evidence
    assert classify_matrix(two_hosts(14, 6)).kind == FINE
    usual = two_hosts(4, 4)
    assert classify_matrix(usual).kind == FINE
    now = usual * np.random.default_rng(1).uniform(0.8, 1.2, usual.shape)
    assert classify_matrix(now, baseline=usual).kind == FINE
    # Slow for a link within a host, though still the fastest kind of between hosts.
    now[1, 2] *= 10
    found = classify_matrix(now, baseline=usual)
    assert found.links == ((1, 2),) and found.scope == "point"
    cut = now.copy()
    cut[5, 0] = INF
    assert classify_matrix(cut).links == ((5, 0),)


def test_all_slow_is_seen_with_a_baseline_only():
    slow = 10 * H4
    assert classify_matrix(slow).kind == FINE
    found = classify_matrix(slow, baseline=H4)
    assert (found.kind, found.scope, found.ranks) == (SLOW, "all", ())
    assert "10 times the baseline" in found.evidence
    assert classify_matrix(slow, baseline=1e-3).scope == "all"
    assert classify_matrix(put(slow, (0, 1), value=INF), baseline=H4).kind == HANG
    unknown = put(H4, (0, None), value=NAN)
    assert classify_matrix(H4, baseline=unknown).kind == FINE


def test_what_cannot_be_a_matrix_of_delays_is_refused():
    with pytest.raises(ValueError, match="shape"):
        classify_matrix(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="2->0 is negative"):
        classify_matrix(put(H4, (2, 0), value=-1.0))
    with pytest.raises(ValueError, match="baseline"):
        classify_matrix(H4, baseline=np.ones((3, 3)))


@pytest.mark.parametrize("n", [3, 4, 8, 32])
@pytest.mark.parametrize("sigma", [0.1, 0.35])
def test_noise_is_hardly_ever_a_fault(n, sigma):
    """The stated probability is 0.001, so more than 4 of 1000 would be a surprise."""
    rng = np.random.default_rng(n)
    delays = np.exp(sigma * rng.standard_normal((1000, n, n)))
    alarms = sum(classify_matrix(delay).kind != FINE for delay in delays)
    assert alarms <= 4, alarms


@pytest.mark.parametrize("n", [4, 8, 32])
def test_a_link_of_ten_times_the_delay_is_found(n):
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(100):
        delay = np.exp(0.3 * rng.standard_normal((n, n)))
        i, j = rng.choice(n, 2, replace=False).tolist()
        delay[i, j] = 10 * np.exp(0.3 * rng.standard_normal())
        hits += classify_matrix(delay).links == ((i, j),)
    assert hits >= 90, hits


def test_fast_links_within_hosts_do_not_hide_a_slow_one_between():
    host = np.arange(32) // 8
    delay = np.where(host[:, None] == host, 0.05, 1) * healthy(32, low=0.8, high=1.2)
    delay[3, 20] = 10.0
    assert classify_matrix(delay).links == ((3, 20),)


def test_of_a_row_and_a_column_with_as_many_the_row_goes_first():
    bad = np.zeros((3, 3), bool)
    bad[[0, 0, 1], [1, 2, 2]] = True
    assert explain(bad, ~np.eye(3, dtype=bool)) == ((0,), (), ((1, 2),))


cells = st.sampled_from([1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 40.0, NAN, INF])
matrices = st.integers(2, 6).flatmap(
    lambda n: st.lists(
        st.lists(cells, min_size=n, max_size=n), min_size=n, max_size=n
    ).map(np.array)
)


@given(delay=matrices, data=st.data())
def test_renaming_ranks_renames_the_culprits(delay, data):
    order = data.draw(st.permutations(range(len(delay))))
    before, after = (
        classify_matrix(delay),
        classify_matrix(delay[np.ix_(order, order)]),
    )
    assert (before.kind, before.scope) == (after.kind, after.scope)
    assert tuple(sorted(order[i] for i in after.ranks)) == before.ranks
    links = sorted((order[i], order[j]) for i, j in after.links)
    assert tuple(links) == before.links


@given(delay=matrices, scale=st.floats(1e-6, 1e6))
def test_the_unit_does_not_matter(delay, scale):
    delay = delay * 1e-3
    one, other = classify_matrix(delay), classify_matrix(delay * scale)
    assert one[:4] == other[:4]
    np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-6)
    based = classify_matrix(delay * scale, baseline=scale)
    assert based[:4] == classify_matrix(delay, baseline=1.0)[:4]


@given(delay=matrices)
def test_the_diagonal_does_not_matter(delay):
    other = delay.copy()
    np.fill_diagonal(other, 1e9)
    assert classify_matrix(delay) == classify_matrix(other)


@given(bad=matrices)
def test_every_bad_cell_is_explained_once(bad):
    measured = ~np.isnan(bad)
    wrong = measured & (bad > 2)
    rows, columns, points = explain(wrong, measured)
    marked = np.zeros_like(wrong)
    marked[list(rows)] = True
    marked[:, list(columns)] = True
    for point in points:
        assert not marked[point]
        marked[point] = True
    assert (marked | ~wrong).all()
    for i in rows:
        assert 2 <= wrong[i].sum()
    for j in columns:
        assert 2 <= wrong[:, j].sum()


def test_4096_ranks():
    rng = np.random.default_rng(0)
    delay = np.exp(0.4 * rng.standard_normal((4096, 4096)))
    delay[77], delay[:, 3000], delay[12, 13] = 30.0, 50.0, 60.0
    delay[rng.random(delay.shape) < 0.1] = NAN
    delay[12, 13] = 60.0
    found = classify_matrix(delay)
    assert (found.kind, found.ranks, found.links) == (SLOW, (77, 3000), ((12, 13),))
    assert classify_matrix(delay, DetectConfig(link_ratio=100.0)).kind == FINE
