"""Traffic of training jobs on a Clos network, flow by flow, with max-min fairness.

For C4's traffic planning (C4P in arXiv 2406.04594): nodes whose NICs bond two ports,
each port on a leaf switch of its own (a plane), leaves joined by spines, and pods of
leaves by cores. A job is an all-reduce over a ring of nodes, one ring per NIC; each
hop of a ring is cut over several queue pairs (QPs), which are the flows. Three ways to
route them:

    ecmp     every choice by a hash, here at random: port, spine, core, port of arrival
    planned  ports alternate over a hop's QPs and are the same at both ends, and the QPs
             that leave a leaf are dealt out over its spines in turn
    adapted  planned, and then, step by step, each hop gives more of its data to the QPs
             that are faster and, if asked to, moves its slowest QP to an idle spine

All rates are bit/s. Flows are long: what one gets is the max-min fair share, at once.
There are no packets, queues, losses or latencies.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Failover = Literal["next", "spread"]
"""Where a leaf sends what would have gone over a dead link: all over the next spine, or
each flow over any spine that is left"""


@dataclasses.dataclass(frozen=True)
class Clos:
    """A network, and how jobs use it. All that is free is here."""

    nodes: int = 16
    nics: int = 8
    """of a node; a ring of every job goes through each"""
    ports: int = 2
    """of a NIC, bonded; port p is on plane p, a leaf of its own"""
    port_rate: float = 200e9
    groups: int = 2
    """of nodes that share leaves; node i is in group i % groups"""
    spines: int = 8
    """of a pod; each joins all leaves of the pod by one link"""
    oversubscription: float = 1.0
    """rate of a leaf's ports to nodes, over that of its links to spines"""
    pods: int = 1
    """group g is in pod g % pods"""
    cores: int = 4
    """above each spine, for flows between pods; as fast as all links below the spine"""
    qps: int = 8
    """of a hop"""
    cap: float = 362e9
    """of a job's bus bandwidth by NIC, set by what is inside a node"""
    failover: Failover = "next"

    @property
    def uplink_rate(self) -> float:
        """Between a leaf and a spine."""
        leaf = self.nodes / self.groups * self.nics * self.port_rate
        return leaf / self.spines / self.oversubscription

    @property
    def core_rate(self) -> float:
        """Between a spine and a core."""
        leaves = self.groups / self.pods * self.ports
        return self.uplink_rate * leaves / self.cores


class Flows(NamedTuple):
    """QPs of all jobs; int[flows] each."""

    job: np.ndarray
    hop: np.ndarray
    """numbered over all jobs; the QPs of a hop share its data"""
    source: np.ndarray
    target: np.ndarray
    nic: np.ndarray
    qp: np.ndarray


class Paths(NamedTuple):
    """What was chosen for each flow; int[flows] each."""

    leaves: np.ndarray
    """port, and so plane, at the source"""
    arrives: np.ndarray
    """at the target"""
    spine: np.ndarray
    core: np.ndarray


class Uplink(NamedTuple):
    """A link between a leaf and a spine."""

    group: int
    plane: int
    spine: int


class Moment(NamedTuple):
    """State after a step of `adapt`."""

    paths: Paths
    share: np.ndarray
    """float[flows]: part of its hop's data; sums to 1 over a hop"""
    busbw: np.ndarray
    """float[jobs]"""


def max_min(capacity: np.ndarray, routes: np.ndarray) -> np.ndarray:
    """Max-min fair rates by progressive filling (Bertsekas and Gallager, 1992, 6.5.2).

    All rates rise together; whoever reaches a full link stops.

    Args:
        capacity: float[links], finite.
        routes: int[flows, hops]: links of each flow, each once; -1: none.

    Returns:
        float[flows].

    Raises:
        ValueError: a flow without links, whose rate nothing bounds, or an unknown link.
    """
    capacity, routes = np.asarray(capacity, float), np.asarray(routes, int)
    used = routes >= 0
    if (~used.any(1)).any():
        raise ValueError(f"flow {int((~used.any(1)).argmax())} has no link")
    if routes.max(initial=-1) >= len(capacity):
        raise ValueError(f"routes name link {routes.max()} of {len(capacity)}")
    # One more link, without bounds, stands for none.
    route = np.where(used, routes, len(capacity))
    room = np.append(capacity, np.inf)
    rate, moving = np.zeros(len(route)), np.ones(len(route), bool)
    level = 0.0
    while moving.any():
        count = np.bincount(route[moving].ravel(), minlength=len(room))
        count[-1] = 0
        rise = np.divide(room, count, out=np.full(len(room), np.inf), where=count > 0)
        step = float(rise.min())
        level += step
        full = rise <= step + 1e-12 * level
        room = np.where(count > 0, np.maximum(room - step * count, 0.0), room)
        stopped = moving & full[route].any(1)
        rate[stopped] = level
        moving &= ~stopped
    return rate


def ring_flows(clos: Clos, jobs: Sequence[Sequence[int]]) -> Flows:
    """The QPs of jobs, each a ring over its nodes in the given order.

    Raises:
        ValueError: a job has fewer than two nodes, or one that does not exist.
    """
    hops = []
    for job, nodes in enumerate(jobs):
        if len(set(nodes)) < 2 or not set(nodes) <= set(range(clos.nodes)):
            raise ValueError(f"job {job} needs two or more of {clos.nodes}: {nodes}")
        ring = zip(nodes, [*nodes[1:], nodes[0]], strict=True)
        hops += [(job, a, b, nic) for a, b in ring for nic in range(clos.nics)]
    job, source, target, nic = np.repeat(np.array(hops), clos.qps, axis=0).T
    hop, qp = np.divmod(np.arange(len(job)), clos.qps)
    return Flows(job, hop, source, target, nic, qp)


# ----------------------------------------------------------------------------- links


def capacities(clos: Clos) -> np.ndarray:
    """Of all links: ports out, in, leaves up, down, spines up, down; float[links]."""
    port = clos.nodes * clos.nics * clos.ports
    up = clos.groups * clos.ports * clos.spines
    core = clos.pods * clos.spines * clos.cores
    rates = (clos.port_rate, clos.uplink_rate, clos.core_rate)
    return np.repeat(rates, [2 * port, 2 * up, 2 * core])


def links(clos: Clos, flows: Flows, paths: Paths) -> np.ndarray:
    """The links of each flow, int[flows, 6], -1 where it has fewer."""
    port = clos.nodes * clos.nics * clos.ports
    up = clos.groups * clos.ports * clos.spines
    core = clos.pods * clos.spines * clos.cores
    out = (flows.source * clos.nics + flows.nic) * clos.ports + paths.leaves
    into = (flows.target * clos.nics + flows.nic) * clos.ports + paths.arrives
    near, far = flows.source % clos.groups, flows.target % clos.groups
    climbs = _climbs(clos, flows, paths)
    rises = (near * clos.ports + paths.leaves) * clos.spines + paths.spine
    falls = (far * clos.ports + paths.arrives) * clos.spines + paths.spine
    crosses = near % clos.pods != far % clos.pods
    above = near % clos.pods * clos.spines + paths.spine
    below = far % clos.pods * clos.spines + paths.spine
    start = 2 * port
    return np.stack(
        [
            out,
            port + into,
            np.where(climbs, start + rises, -1),
            np.where(climbs, start + up + falls, -1),
            np.where(crosses, start + 2 * up + above * clos.cores + paths.core, -1),
            np.where(
                crosses, start + 2 * up + core + below * clos.cores + paths.core, -1
            ),
        ],
        axis=1,
    )


def _climbs(clos: Clos, flows: Flows, paths: Paths) -> np.ndarray:
    """Whether a flow leaves its leaf for a spine."""
    same = flows.source % clos.groups == flows.target % clos.groups
    return ~(same & (paths.leaves == paths.arrives))


# ---------------------------------------------------------------------------- routes


def ecmp(clos: Clos, flows: Flows, rng: np.random.Generator) -> Paths:
    """Every choice at random, as a hash of the flow would make it."""
    n = len(flows.job)
    choices = (clos.ports, clos.ports, clos.spines, clos.cores)
    return Paths(*(rng.integers(k, size=n) for k in choices))


def planned(clos: Clos, flows: Flows) -> Paths:
    """Balanced by hand: ports alternate, spines and cores are dealt out in turn.

    Dealing starts anew for each pair of leaves: where the QPs between every two divide
    by the spines, what leaves a leaf and what arrives at one are even over them.
    """
    port = flows.qp % clos.ports
    pair = flows.source % clos.groups * clos.groups + flows.target % clos.groups
    turn = np.empty(len(port), int)
    for stream in np.unique(key := pair * clos.ports + port):
        members = np.flatnonzero(key == stream)
        turn[members] = np.arange(len(members))
    spine, round_ = turn % clos.spines, turn // clos.spines
    return Paths(port, port, spine, round_ % clos.cores)


def fail(
    clos: Clos, flows: Flows, paths: Paths, dead: Uplink, rng: np.random.Generator
) -> Paths:
    """What switches make of a dead link, either way: its flows take other spines.

    Both ends know it from the routing protocol; nobody knows what else is on the spine
    that is taken instead.

    Raises:
        ValueError: there is no such link, or no other spine.
    """
    limits = Uplink(clos.groups, clos.ports, clos.spines)
    if not all(0 <= x < k for x, k in zip(dead, limits, strict=True)):
        raise ValueError(f"{dead} is not in a network of {limits}")
    if clos.spines < 2:
        raise ValueError("there is only one spine, which nothing can replace")
    leaf = (dead.group, dead.plane)
    rises = (flows.source % clos.groups == leaf[0]) & (paths.leaves == leaf[1])
    falls = (flows.target % clos.groups == leaf[0]) & (paths.arrives == leaf[1])
    hit = (rises | falls) & _climbs(clos, flows, paths) & (paths.spine == dead.spine)
    if clos.failover == "next":
        away = np.ones(len(hit), int)
    else:
        away = rng.integers(1, clos.spines, size=len(hit))
    spine = np.where(hit, (paths.spine + away) % clos.spines, paths.spine)
    return paths._replace(spine=spine)


# ----------------------------------------------------------------------------- rates


def rates(clos: Clos, flows: Flows, paths: Paths) -> np.ndarray:
    """float[flows]: of QPs that always have something to send."""
    return max_min(capacities(clos), links(clos, flows, paths))


def busbw(
    clos: Clos, flows: Flows, rate: np.ndarray, share: np.ndarray | None = None
) -> np.ndarray:
    """Bus bandwidth of each job, by NIC; float[jobs].

    A hop is done when its slowest QP is, and a ring goes at the pace of its slowest
    hop; rings have equal parts, so the slowest of a job decides.

    Args:
        clos: for its `cap`.
        flows: the QPs.
        rate: of each.
        share: part of its hop's data that each has; None: equal parts.
    """
    part = 1 / clos.qps if share is None else share
    slowest = np.full(flows.job.max() + 1, clos.cap)
    np.minimum.at(slowest, flows.job, rate / part)
    return slowest


def adapt(
    clos: Clos,
    flows: Flows,
    paths: Paths,
    steps: int,
    *,
    dead: Sequence[Uplink] = (),
    gain: float = 0.5,
    drop: float = 0.1,
    reroute: bool = False,
) -> list[Moment]:
    """Senders that watch their QPs, step by step.

    In each step all QPs send; then every hop moves its shares by `gain` towards the
    measured rates, so that a path that slows carries less. With `reroute`, a hop whose
    slowest QP is behind its fastest by more than `drop` and goes through a spine also
    moves that QP to the spine where it would get most (as a planner knows that sees all
    paths), one hop after the other and only if its rate rises by more than `drop`.

    Args:
        clos: the network.
        flows: the QPs.
        paths: where they are at first, such as after `fail`.
        steps: at least 0.
        dead: links that must not be chosen.
        gain: of the new shares in each step, in (0, 1].
        drop: part of the rate below which differences are let be.
        reroute: whether QPs move.

    Returns:
        steps + 1 moments; the first with equal shares.
    """
    share = np.full(len(flows.job), 1 / clos.qps)
    rate = rates(clos, flows, paths)
    moments = [Moment(paths, share, busbw(clos, flows, rate, share))]
    for _ in range(steps):
        by_hop = rate.reshape(-1, clos.qps)
        measured = by_hop / by_hop.sum(1, keepdims=True)
        share = share + gain * (measured.ravel() - share)
        if reroute:
            uneven = by_hop.min(1) < (1 - drop) * by_hop.max(1)
            slowest = by_hop.argmin(1) + clos.qps * np.arange(len(by_hop))
            paths = _move(clos, flows, paths, slowest[uneven], dead, drop)
        rate = rates(clos, flows, paths)
        moments.append(Moment(paths, share, busbw(clos, flows, rate, share)))
    return moments


def _move(
    clos: Clos,
    flows: Flows,
    paths: Paths,
    moving: np.ndarray,
    dead: Sequence[Uplink],
    drop: float,
) -> Paths:
    """Moves flows one by one to the spine whose two links have most room for one."""
    room, spine = capacities(clos), paths.spine.copy()
    climbs = _climbs(clos, flows, paths)
    for flow in moving[climbs[moving]]:
        now = paths._replace(spine=spine)
        load = np.bincount(
            (route := links(clos, flows, now))[route >= 0], minlength=len(room)
        )
        one = Flows(*(np.repeat(x[flow], clos.spines) for x in flows))
        path = Paths(*(np.repeat(x[flow], clos.spines) for x in paths))
        options = links(clos, one, path._replace(spine=np.arange(clos.spines)))[:, 2:4]
        own = np.arange(clos.spines) == spine[flow]
        fair = (room[options] / (load[options] + ~own[:, None])).min(1)
        for link in dead:
            ends = (
                (flows.source[flow] % clos.groups, paths.leaves[flow]),
                (flows.target[flow] % clos.groups, paths.arrives[flow]),
            )
            if (link.group, link.plane) in ends:
                fair[link.spine] = 0.0
        best = int(fair.argmax())
        if fair[best] * (1 - drop) > fair[spine[flow]]:
            spine[flow] = best
    return paths._replace(spine=spine)
