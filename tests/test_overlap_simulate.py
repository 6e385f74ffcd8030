"""The simulation of T3's system against closed forms, its bounds, and the paper."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import overlap_simulate as bench
from jaxlab.overlap import simulate
from jaxlab.overlap.simulate import Hardware, Sublayer, run

FREE = 1e30  # a rate at which nothing takes time
DEFAULT = Hardware()
POLICIES: tuple[simulate.Policy, ...] = (
    "sequential",
    "t3",
    "t3_mca",
    "ideal",
    "ideal_nmc",
)
PAPER = bench.sublayers([*bench.SMALL, *bench.LARGE])

sublayers = st.builds(
    Sublayer,
    name=st.just("any"),
    m=st.integers(1, 128).map(lambda i: 128 * i),
    n=st.integers(1, 8192),
    k=st.integers(1, 8192),
    devices=st.sampled_from([2, 3, 4, 8, 16]),
)
machines = st.builds(
    Hardware,
    efficiency=st.floats(0.1, 1.0),
    memory_rate=st.floats(1e11, 1e13),
    link_rate=st.floats(1e10, 1e12),
    latency=st.floats(0.0, 1e-5),
    update_cost=st.floats(1.0, 3.0),
    floor=st.floats(0.0, 0.4),
)
policies = st.sampled_from(POLICIES)


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-15)


def machine(**changes: Any) -> Hardware:
    return dataclasses.replace(DEFAULT, **changes)


@given(sublayers, machines, policies)
def test_every_byte_sent_arrives(sublayer, hardware, policy):
    found = run(sublayer, hardware, policy)
    bytes_of_two_rings = 2 * (sublayer.devices - 1) * sublayer.chunk
    assert close(found.sent, bytes_of_two_rings)
    assert close(found.received, bytes_of_two_rings)


@given(sublayers, machines, st.booleans())
def test_the_memory_moves_what_is_counted(sublayer, hardware, compute_first):
    played = simulate._fused(sublayer, hardware, compute_first=compute_first)
    counted = run(sublayer, hardware, "t3").traffic
    updates = counted.gemm_writes + counted.scatter_writes
    moved = counted.gemm_reads + counted.scatter_reads + updates * hardware.update_cost
    assert close(played.memory, moved)
    # No faster than the memory, the link or the compute units, and never idle: no
    # slower than all of them one after the other.
    steps = sublayer.devices - 1
    busy = (
        moved / hardware.memory_rate,
        steps * sublayer.chunk / hardware.link_rate,
        sublayer.flops / hardware.flop_rate,
    )
    latencies = played.events * hardware.latency
    assert max(busy) * (1 - 1e-6) <= played.seconds
    assert played.seconds <= (sum(busy) + latencies) * (1 + 1e-6)


@given(sublayers, machines)
def test_one_after_the_other_is_the_closed_form(sublayer, hardware):
    """The GEMM stage by stage; the rings step by step, and the last sum."""
    found = run(sublayer, hardware, "sequential")
    chunk, steps = sublayer.chunk, sublayer.devices - 1
    rate, link = hardware.memory_rate, chunk / hardware.link_rate
    gemm = sum(
        stage.fill / rate + max(stage.seconds, stage.memory / rate)
        for stage in simulate._stages(sublayer, hardware, fused=False)
    )
    first, others = max(link, 2 * chunk / rate), max(link, 3 * chunk / rate)
    scatter = first + (steps - 1) * others + steps * hardware.latency
    scatter += 3 * chunk / rate
    gather = steps * (first + hardware.latency)
    assert close(found.gemm_seconds, gemm)
    assert close(found.scatter_seconds, scatter)
    assert close(found.gather_seconds, gather)
    assert close(found.seconds, gemm + scatter + gather)


@given(sublayers, machines)
def test_fused_without_contention_is_the_closed_form(sublayer, hardware):
    """A piece leaves when it is made, its sum so far is here and the link is free."""
    hardware = dataclasses.replace(hardware, memory_rate=FREE)
    piece = hardware.compute_units * hardware.tile**2 * sublayer.itemsize
    count = math.ceil(sublayer.chunk / piece * (1 - 1e-9))
    sizes = [piece] * (count - 1) + [sublayer.chunk - piece * (count - 1)]
    clock = link = end = 0.0
    arrived = [0.0] * count
    for chunk in range(sublayer.devices):
        for i, size in enumerate(sizes):
            seconds = sublayer.flops * size / sublayer.result / hardware.flop_rate
            clock += seconds
            end = max(clock, arrived[i])
            if chunk < sublayer.devices - 1:
                link = max(link, end) + size / hardware.link_rate
                arrived[i] = link + hardware.latency
    end = max([clock, *arrived])
    for policy in ("t3", "t3_mca"):
        found = run(sublayer, hardware, policy)
        assert close(found.gemm_seconds, clock)
        assert close(found.scatter_seconds, end)


@given(sublayers)
def test_limits(sublayer):
    # Nothing but the GEMM takes time.
    alone = machine(memory_rate=FREE, link_rate=FREE, latency=0.0)
    for policy in POLICIES:
        gemm = sublayer.flops / alone.flop_rate
        assert close(run(sublayer, alone, policy).seconds, gemm)
    # Nothing but the wire does.
    wire = machine(memory_rate=FREE, efficiency=FREE, latency=0.0)
    ring = (sublayer.devices - 1) * sublayer.chunk / wire.link_rate
    for policy in POLICIES:
        assert close(run(sublayer, wire, policy).seconds, 2 * ring)


@given(sublayers, machines)
def test_ideal_is_at_most_half_as_fast_again(sublayer, hardware):
    """The all-gather takes as long as the reduce-scatter, and nothing overlaps it."""
    hardware = dataclasses.replace(hardware, memory_rate=FREE)
    found = run(sublayer, hardware, "sequential")
    assert close(found.gather_seconds, found.scatter_seconds)
    ideal = run(sublayer, hardware, "ideal").seconds
    assert found.seconds <= 1.5 * ideal * (1 + 1e-6)
    for policy in POLICIES:
        seconds = run(sublayer, hardware, policy).seconds
        # A fused ring hides latencies that a ring of whole chunks shows.
        hidden = sublayer.devices * hardware.latency
        assert (ideal - hidden) * (1 - 1e-6) <= seconds


def test_ideal_is_half_as_fast_again_where_both_take_the_same():
    sublayer = Sublayer("balanced", m=1280, n=1024, k=1024, devices=8)
    free = machine(memory_rate=FREE, latency=0.0)
    gemm = sublayer.flops / free.flop_rate
    balanced = dataclasses.replace(free, link_rate=7 * sublayer.chunk / gemm)
    sequential = run(sublayer, balanced, "sequential").seconds
    assert close(sequential, 1.5 * run(sublayer, balanced, "ideal").seconds)


@pytest.mark.parametrize("case", PAPER, ids=lambda c: f"{c.name} {c.devices}")
def test_policies_are_ordered(case):
    seconds = {p: run(case, DEFAULT, p).seconds for p in POLICIES}
    for fused in ("t3", "t3_mca"):
        assert seconds["ideal_nmc"] <= 1.002 * seconds[fused]
        assert seconds[fused] < seconds["sequential"]
    assert seconds["ideal"] < seconds["sequential"]
    # Arbitration helps where the GEMM is the longer part. Where the ring is, putting
    # the GEMM first can lose, and here it does once: see the next test.
    run_alone = run(case, DEFAULT, "sequential")
    if run_alone.gemm_seconds > run_alone.scatter_seconds:
        assert seconds["t3_mca"] <= seconds["t3"]


def test_arbitration_loses_where_the_ring_is_the_longer_part():
    case = next(c for c in PAPER if c.name == "Mega-GPT-2 OP" and c.devices == 16)
    assert run(case, DEFAULT, "t3_mca").seconds > run(case, DEFAULT, "t3").seconds


@given(sublayers, machines, policies, st.floats(1.0, 50.0))
def test_a_faster_link_is_not_slower(sublayer, hardware, policy, by):
    faster = dataclasses.replace(hardware, link_rate=by * hardware.link_rate)
    now = run(sublayer, hardware, policy).seconds
    # Fused, a burst on a fast link can come when the GEMM wants to read.
    room = 1e-9 if policy in ("sequential", "ideal", "ideal_nmc") else 0.02
    assert run(sublayer, faster, policy).seconds <= now * (1 + room)


def test_counted_traffic():
    """By hand, for four devices and an operand that the cache holds."""
    case = Sublayer("small", m=1024, n=512, k=256, devices=4)
    chunk, inputs = case.chunk, 2.0 * (1024 * 256 + 256 * 512)
    assert chunk == 2 * 1024 * 512 / 4
    plain = run(case, DEFAULT, "sequential").traffic
    expected = (inputs, 4 * chunk, 7 * chunk, 4 * chunk, 3 * chunk, 3 * chunk)
    assert plain == pytest.approx(expected)
    fused = run(case, DEFAULT, "t3_mca").traffic
    expected = (inputs, 3 * chunk, 2 * chunk, 3 * chunk, 3 * chunk, 3 * chunk)
    assert fused == pytest.approx(expected)
    assert fused.total == pytest.approx(inputs + 14 * chunk)
    assert fused.fused == pytest.approx(inputs + 8 * chunk)


def test_a_cache_that_results_leave_alone_saves_reads():
    case = Sublayer("wide", m=2048, n=8192, k=4096, devices=8)
    plain, fused = (run(case, DEFAULT, p).traffic for p in ("sequential", "t3"))
    assert fused.gemm_reads < plain.gemm_reads
    once = 2.0 * case.k * (case.m + case.n)
    endless = machine(cache=1e12)
    assert run(case, endless, "sequential").traffic.gemm_reads == pytest.approx(once)


def test_what_is_refused():
    case = PAPER[0]
    with pytest.raises(ValueError, match="1 devices are no ring"):
        run(dataclasses.replace(case, devices=1), DEFAULT, "t3")
    with pytest.raises((ValueError, TypeError)):  # beartype may be first
        run(case, DEFAULT, "magic")  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_beside_the_paper():
    """What agrees, within what, and that what does not agree is still shown."""
    report = bench.compare(DEFAULT)
    table = {row["quantity"]: row for row in report["table"]}
    assert set(table) == set(bench.PAPER)
    for name in ("reads of reduce-scatter, 8 devices", "t3_mca, mean", "ideal, mean"):
        assert abs(table[name]["error"]) < 5
    assert abs(table["reduce-scatter near memory, 16 devices"]["error"]) < 1
    misses = {name for name, row in table.items() if abs(row["error"]) > 5}
    assert misses == {
        "t3, mean",
        "t3, largest",
        "t3_mca of large models, largest",
        "traffic, largest",
        "traffic without all-gather, mean",
    }
    assert abs(table["reads of GEMM"]["error"]) > 0.4
    assert report["assumptions"]
