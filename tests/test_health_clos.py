"""Fair shares against their definition and a linear program; routes against counts."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from benchmarks import health_clos as bench
from jaxlab.health import clos as net
from jaxlab.health.clos import Clos, Uplink, max_min

SMALL = Clos(nodes=4, nics=2, spines=4, qps=4)
PAIRS = [(0, 1), (2, 3)]


@st.composite
def networks(draw):
    """Capacities of some links, and flows over one to three of them each."""
    n = draw(st.integers(1, 8))
    rate = st.sampled_from([0.5, 1.0, 2.0, 3.0, 1e9]) | st.floats(0.1, 100.0)
    capacity = np.array(draw(st.lists(rate, min_size=n, max_size=n)))
    link = st.integers(-1, n - 1)
    route = st.tuples(st.integers(0, n - 1), link, link).map(
        lambda r: [r[0], *(x if x not in r[:i] else -1 for i, x in enumerate(r) if i)]
    )
    return capacity, np.array(draw(st.lists(route, min_size=1, max_size=12)))


def use_matrix(capacity, routes):
    use = np.zeros((len(capacity), len(routes)))
    for flow, route in enumerate(routes):
        use[route[route >= 0], flow] = 1
    return use


def linear_program(capacity, routes):
    """Max-min by its definition: raise the least as far as it goes, fix, repeat."""
    use = use_matrix(capacity, routes)
    flows, fixed = len(routes), {}
    while len(fixed) < flows:
        free = [f for f in range(flows) if f not in fixed]
        rooms = capacity - sum(use[:, f] * r for f, r in fixed.items())
        # Variables: free rates, then their least, which is to be largest.
        a = np.hstack([use[:, free], np.zeros((len(capacity), 1))])
        b = np.hstack([-np.eye(len(free)), np.ones((len(free), 1))])
        objective = np.append(np.zeros(len(free)), -1.0)
        bounds = np.append(rooms, np.zeros(len(free)))
        found = linprog(objective, A_ub=np.vstack([a, b]), b_ub=bounds)
        level = -found.fun
        for k, flow in enumerate(free):
            # Can this one have more while none of the others has less?
            more = np.zeros(len(free) + 1)
            more[k] = -1.0
            floor = [(level * (1 - 1e-9), None)] * len(free) + [(None, None)]
            best = linprog(more, A_ub=a, b_ub=rooms, bounds=floor)
            if -best.fun <= level * (1 + 1e-6):
                fixed[flow] = level
    return np.array([fixed[f] for f in range(flows)])


@given(networks())
@settings(deadline=None, max_examples=40)
def test_max_min_is_what_linear_programs_find(network):
    capacity, routes = network
    capacity = np.minimum(capacity, 100.0)  # the solver's tolerance is absolute
    found = max_min(capacity, routes)
    assert np.allclose(found, linear_program(capacity, routes), rtol=1e-5)


@given(networks())
def test_each_flow_has_a_bottleneck_and_no_link_is_overfull(network):
    capacity, routes = network
    rate = max_min(capacity, routes)
    use = use_matrix(capacity, routes)
    load = use @ rate
    assert (load <= capacity * (1 + 1e-9)).all()
    for flow, route in enumerate(routes):
        assert any(
            load[x] >= capacity[x] * (1 - 1e-9)
            and rate[flow] >= rate[use[x] > 0].max() * (1 - 1e-9)
            for x in route[route >= 0]
        )


@given(networks(), st.randoms())
def test_order_of_flows_and_links_does_not_matter(network, random):
    capacity, routes = network
    flows, names = list(range(len(routes))), list(range(len(capacity)))
    random.shuffle(flows)
    random.shuffle(names)
    renamed = np.empty_like(capacity)
    renamed[names] = capacity
    moved = np.where(routes >= 0, np.array(names)[routes], -1)[flows]
    assert np.allclose(max_min(renamed, moved), max_min(capacity, routes)[flows])


@given(networks(), st.floats(0.01, 1e9))
def test_rates_scale_with_capacities(network, factor):
    capacity, routes = network
    scaled = max_min(factor * capacity, routes)
    assert np.allclose(scaled, factor * max_min(capacity, routes), rtol=1e-9)


def test_textbook_line():
    # One long flow over three links, one short flow on each.
    routes = np.array([[0, 1, 2], [0, -1, -1], [1, -1, -1], [2, -1, -1]])
    assert max_min(np.array([1.0, 2.0, 4.0]), routes).tolist() == [0.5, 0.5, 1.5, 3.5]


def test_refuses_flows_that_nothing_bounds():
    with pytest.raises(ValueError, match="flow 1 has no link"):
        max_min(np.ones(1), np.array([[0], [-1]]))
    with pytest.raises(ValueError, match="routes name link 3 of 2"):
        max_min(np.ones(2), np.array([[3]]))


# --------------------------------------------------------------------------- routes


def test_flows_of_a_ring():
    flows = net.ring_flows(SMALL, [(2, 0, 1), (0, 3)])
    assert len(flows.job) == (3 + 2) * SMALL.nics * SMALL.qps
    hops = set(zip(*map(np.ndarray.tolist, flows[:1] + flows[2:4]), strict=True))
    assert sorted(hops) == [(0, 0, 1), (0, 1, 2), (0, 2, 0), (1, 0, 3), (1, 3, 0)]
    assert (np.bincount(flows.hop) == SMALL.qps).all()
    with pytest.raises(ValueError, match="job 1 needs two or more of 4"):
        net.ring_flows(SMALL, [(0, 1), (2, 4)])
    with pytest.raises(ValueError, match="job 0 needs two"):
        net.ring_flows(SMALL, [(1, 1)])


def names_of_links(clos):
    """What each link joins, in the order of `capacities`."""
    ports = [
        (node, nic, port)
        for node in range(clos.nodes)
        for nic in range(clos.nics)
        for port in range(clos.ports)
    ]
    leaves = [(g, p) for g in range(clos.groups) for p in range(clos.ports)]
    spines = [(pod, s) for pod in range(clos.pods) for s in range(clos.spines)]
    up = [("leaf", leaf, s) for leaf in leaves for s in range(clos.spines)]
    core = [("spine", spine, c) for spine in spines for c in range(clos.cores)]
    names = [("out", p) for p in ports] + [("in", p) for p in ports]
    for layer in (up, core):
        names += [("up", *x) for x in layer] + [("down", *x) for x in layer]
    return names


@pytest.mark.parametrize("pods", [1, 2])
def test_links_join_source_to_target(pods):
    clos = dataclasses.replace(SMALL, nodes=8, groups=4, pods=pods)
    names = names_of_links(clos)
    assert len(names) == len(net.capacities(clos))
    flows = net.ring_flows(clos, [(0, 1, 2, 3, 4), (5, 7)])
    paths = net.ecmp(clos, flows, np.random.default_rng(0))
    lengths = set()
    for f, route in enumerate(net.links(clos, flows, paths)):
        a, b, nic = flows.source[f], flows.target[f], flows.nic[f]
        leaf, other = (a % 4, paths.leaves[f]), (b % 4, paths.arrives[f])
        spine, core = paths.spine[f], paths.core[f]
        wanted = [("out", (a, nic, leaf[1])), ("in", (b, nic, other[1]))]
        if leaf != other:
            wanted += [("up", "leaf", leaf, spine), ("down", "leaf", other, spine)]
        if a % 4 % pods != b % 4 % pods:
            near, far = (a % 4 % pods, spine), (b % 4 % pods, spine)
            wanted += [("up", "spine", near, core), ("down", "spine", far, core)]
        assert [names[x] for x in route if x >= 0] == wanted
        lengths.add(len(wanted))
    assert lengths == ({2, 4} if pods == 1 else {2, 4, 6})


def test_capacities_add_up_over_layers():
    for factor in (1.0, 2.0):
        clos = dataclasses.replace(SMALL, groups=2, pods=2, oversubscription=factor)
        names = names_of_links(clos)
        of = dict.fromkeys(("out", "leaf", "spine"), 0.0)
        for name, rate in zip(names, net.capacities(clos), strict=True):
            if name[0] in ("out", "up"):
                of[name[1] if name[0] == "up" else "out"] += rate
        assert np.isclose(of["out"], factor * of["leaf"])
        assert np.isclose(of["leaf"], of["spine"])


@pytest.mark.parametrize("spines", [2, 4, 8])
def test_planned_flows_are_even_over_every_layer(spines):
    clos = dataclasses.replace(SMALL, spines=spines, qps=8)
    flows = net.ring_flows(clos, PAIRS)
    paths = net.planned(clos, flows)
    assert (paths.leaves == paths.arrives).all()
    routes = net.links(clos, flows, paths)
    load = np.bincount(routes[routes >= 0], minlength=len(net.capacities(clos)))
    for kind in ("out", "in", "up", "down"):
        loads = {
            count
            for count, name in zip(load, names_of_links(clos), strict=True)
            if name[0] == kind and name[1] != "spine"
        }
        assert len(loads) == 1, (kind, loads)
    assert (net.busbw(clos, flows, net.rates(clos, flows, paths)) == clos.cap).all()


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 4, 8]))
@settings(deadline=None, max_examples=30)
def test_ecmp_is_never_better_than_planned(seed, qps):
    clos = dataclasses.replace(SMALL, qps=qps, cap=1e15)
    flows = net.ring_flows(clos, PAIRS)
    hashed = net.ecmp(clos, flows, np.random.default_rng(seed))
    planned = net.planned(clos, flows)
    rate = [
        net.busbw(clos, flows, net.rates(clos, flows, p)) for p in (hashed, planned)
    ]
    assert (rate[0] <= rate[1] * (1 + 1e-9)).all()
    whole = clos.port_rate * clos.ports
    assert (rate[1] <= whole * (1 + 1e-9)).all()


def test_two_qps_on_one_port_have_half_a_nic():
    clos = dataclasses.replace(SMALL, nodes=2, nics=1, spines=1, qps=2)
    flows = net.ring_flows(clos, [(0, 1)])
    paths = net.planned(clos, flows)
    bent = paths._replace(arrives=np.zeros_like(paths.arrives))
    rate = net.rates(clos, flows, bent)
    assert net.busbw(clos, flows, rate).tolist() == [clos.port_rate]


# --------------------------------------------------------------------------- faults


def users(clos, flows, paths, broken):
    """Which flows go over any of these links."""
    names = names_of_links(clos)
    return np.array(
        [
            any(names[x] in broken for x in route if x >= 0)
            for route in net.links(clos, flows, paths)
        ]
    )


@pytest.mark.parametrize("failover", ["next", "spread"])
def test_nothing_uses_a_dead_link(failover):
    clos = dataclasses.replace(SMALL, failover=failover)
    flows = net.ring_flows(clos, PAIRS)
    broken = {("up", "leaf", (1, 0), 2), ("down", "leaf", (1, 0), 2)}
    hashed = net.ecmp(clos, flows, np.random.default_rng(1))
    for before in (net.planned(clos, flows), hashed):
        rng = np.random.default_rng(0)
        after = net.fail(clos, flows, before, Uplink(1, 0, 2), rng)
        hit = users(clos, flows, before, broken)
        assert hit.any() and not users(clos, flows, after, broken).any()
        assert (after.spine == before.spine)[~hit].all()
        assert len(set(after.spine[hit])) == (1 if failover == "next" else 3)


def test_faults_that_cannot_be():
    flows = net.ring_flows(SMALL, PAIRS)
    paths, rng = net.planned(SMALL, flows), np.random.default_rng(0)
    with pytest.raises(ValueError, match="spine=9.* is not in a network of"):
        net.fail(SMALL, flows, paths, Uplink(0, 0, 9), rng)
    with pytest.raises(ValueError, match="only one spine"):
        lone = dataclasses.replace(SMALL, spines=1)
        net.fail(lone, flows, paths, Uplink(0, 0, 0), rng)


@pytest.mark.parametrize("reroute", [False, True])
@pytest.mark.parametrize("qps", [2, 4])
def test_adapting_recovers_part_of_what_a_fault_took(qps, reroute):
    clos = dataclasses.replace(SMALL, qps=qps)
    flows = net.ring_flows(clos, PAIRS)
    dead = Uplink(0, 1, 0)
    rng = np.random.default_rng(0)
    paths = net.fail(clos, flows, net.planned(clos, flows), dead, rng)
    moments = net.adapt(clos, flows, paths, 30, dead=[dead], reroute=reroute)
    first, last = moments[0].busbw, moments[-1].busbw
    assert len(moments) == 31
    assert (first < clos.cap).any() and last.min() > 1.2 * first.min()
    for moment in moments:
        assert np.allclose(moment.share.reshape(-1, qps).sum(1), 1)
        assert (moment.share > 0).all()
        used = moment.paths.spine[
            (flows.source % 2 == 0) & (moment.paths.leaves == 1)
            | (flows.target % 2 == 0) & (moment.paths.arrives == 1)
        ]
        assert (used != 0).all()
    # No more than the links that are left can carry.
    whole = (3 / 4 + 1) * clos.port_rate
    assert last.mean() <= min(clos.cap, whole) * (1 + 1e-6)
    if not reroute:
        assert (moments[-1].paths.spine == paths.spine).all()


def test_shares_go_where_rates_are():
    # Two QPs share a port that the third has to itself.
    clos = dataclasses.replace(SMALL, nodes=2, nics=1, spines=1, qps=3, cap=1e15)
    flows = net.ring_flows(clos, [(0, 1)])
    moments = net.adapt(clos, flows, net.planned(clos, flows), 40)
    assert np.allclose(moments[0].busbw, 1.5 * clos.port_rate)
    assert np.allclose(moments[-1].busbw, 2.0 * clos.port_rate)
    assert np.allclose(moments[-1].share[:3], [0.25, 0.5, 0.25])


def test_rerouting_finds_the_idle_spine():
    clos = dataclasses.replace(SMALL, nodes=2, nics=2, qps=2, spines=4, cap=1e15)
    flows = net.ring_flows(clos, [(0, 1)])
    paths = net.planned(clos, flows)
    crowded = paths._replace(spine=np.where(flows.qp == 1, 0, paths.spine))
    moments = net.adapt(clos, flows, crowded, 10, reroute=True)
    even = net.busbw(clos, flows, net.rates(clos, flows, paths))
    assert moments[0].busbw < even
    assert np.allclose(moments[-1].busbw, even, rtol=0.01)


def test_adapting_without_a_fault_changes_nothing():
    flows = net.ring_flows(SMALL, PAIRS)
    paths = net.planned(SMALL, flows)
    for moment in net.adapt(SMALL, flows, paths, 3, reroute=True):
        assert (moment.busbw == SMALL.cap).all()
        assert (moment.paths.spine == paths.spine).all()


# ------------------------------------------------------------------------ the paper


def test_benchmark_says_what_is_predicted(capsys):
    bench.main(["--seeds", "3"])
    printed = json.loads(capsys.readouterr().out)
    rows = {row["scenario"]: row for row in printed["table"]}
    assert set(rows) == set(bench.PAPER)
    for row in rows.values():
        assert np.isclose(row["error"], row["ours"] - row["paper"], atol=0.011)
    origins = {name: row["origin"] for name, row in rows.items()}
    assert {n for n, o in origins.items() if o == "used"} == set(bench.USED)
    assert len({n for n, o in origins.items() if o == "predicted"}) == 6
    # What must hold whatever the free parameters are.
    ours = {name: row["ours"] for name, row in rows.items()}
    assert ours["one job, ECMP, mean"] < ours["one job, planned, mean"]
    assert ours["8 jobs, gain of planning, %"] > 0
    assert ours["8 jobs at 2:1, gain of planning, %"] > 0
    assert ours["failed uplink, gain of adapting, %"] > 0
    steps = printed["after_a_failed_uplink_by_step"]["shares"]
    assert steps == sorted(steps)
