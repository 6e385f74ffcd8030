"""The parts of the benchmarks of jaxlab.health that count and compute."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def campaign():
    return _imported("health_campaign")


@pytest.fixture(scope="module")
def alarms():
    return _imported("health_alarms")


@pytest.fixture(scope="module")
def goodput():
    return _imported("health_goodput")


def _imported(name):
    sys.path.insert(0, str(FOLDER))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(FOLDER))


def event(name, time, kind="", ranks=(), links=()):
    found = {"event": name, "time": time, "text": name}
    if kind:
        found |= {"kind": kind, "ranks": list(ranks), "links": [*map(list, links)]}
    return found


def victim(ranks=(), links=()):
    _imported("health_campaign")
    return sys.modules["common.faults"].Victim(ranks, links)


def row(campaign, fault, whom, events, began=100.0, seed=0):
    found = {"fault": fault, "seed": seed, "expected": campaign.KINDS[fault]}
    found |= {"victim": whom._asdict(), "load": 1.25, "time": began}
    return found | campaign.verdict(events, began)


def test_the_verdict_is_the_last_diagnosis_before_the_supervisor_acts(campaign):
    events = [
        event("diagnosis", 105.0, "comm_slow"),
        event("diagnosis", 109.0, "comm_slow", links=[(1, 0)]),
        event("reorder", 109.0),
        event("diagnosis", 111.0, "crash", ranks=[2]),  # of what was killed
    ]
    told = row(campaign, "slow_link", victim((), ((1, 0),)), events)
    assert told["first"]["seconds"] == 5.0 and told["verdict"]["seconds"] == 9.0
    assert told["action"]["event"] == "reorder" and told["recovered"] is None
    assert campaign.right(told)
    other = row(campaign, "slow_link", victim((), ((0, 1),)), events)
    assert campaign.kind(other) == "comm_slow" and not campaign.right(other)


def test_a_fault_that_nobody_saw_is_wrong_and_a_quiet_time_right(campaign):
    missed = row(campaign, "stop", victim((1,)), [])
    calm = row(campaign, "clean", victim(), [])
    alarm = event("diagnosis", 103.0, "comm_slow")
    false = row(campaign, "clean", victim(), [alarm])
    assert [campaign.right(r) for r in (missed, calm, false)] == [False, True, False]


def test_the_tables_need_only_the_compact_rows(campaign):
    found = [event("diagnosis", 100.12, "crash", ranks=[3]), event("restart", 100.13)]
    back = event("recovered", 104.5) | dict(detection=0.1, isolation=0.1, reinit=4.0)
    rows = [
        row(campaign, "kill", victim((3,)), [*found, back], seed=i) for i in range(3)
    ]
    text = campaign.tables([campaign.compact(r) for r in rows])
    assert text == campaign.tables(rows)
    assert "| kill | 3/3 (44%-100%) | 3/3 (44%-100%) | 0.1 / 0.1 |" in text


@pytest.mark.parametrize(
    "hits, count, low, high",  # Wilson 1927, as R's prop.test without correction
    [(0, 20, 0.0, 0.1611), (10, 20, 0.2993, 0.7007), (20, 20, 0.8389, 1.0)],
)
def test_the_interval_of_a_share(campaign, hits, count, low, high):
    np.testing.assert_allclose(campaign.wilson(hits, count), (low, high), atol=1e-4)


def test_the_interval_of_a_rate(alarms):
    """Garwood's table: none seen, at most 3.00 (one-sided); five, 1.62 to 11.67."""
    np.testing.assert_allclose(alarms.rate(0, 1.0), (0, 0, 2.996), atol=1e-3)
    np.testing.assert_allclose(alarms.rate(5, 2.0), (2.5, 0.812, 5.834), atol=1e-3)


def test_alarms_of_one_occasion_count_once(alarms):
    assert alarms.bouts([[t, "", ""] for t in (300, 1, 30, 65, 301)]) == 2
    assert alarms.bouts([]) == 0


STEPS = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 100)), max_size=40)


@given(STEPS, st.floats(0, 100), st.floats(0, 100), st.floats(0, 100))
def test_fresh_steps_of_parts_add_up(progress, a, b, c):
    fresh = _imported("health_goodput").fresh
    progress.sort(key=lambda p: p[1])
    begin, middle, end = sorted((a, b, c))
    parts = fresh(progress, begin, middle), fresh(progress, middle, end)
    assert sum(parts) == fresh(progress, begin, end) and min(parts) >= 0


def test_an_hour_has_each_fault_twice(goodput):
    todo = goodput.slots(goodput.Options())
    assert sorted(f for f, _ in todo) == sorted(2 * goodput.FAULTS)
    assert todo == goodput.slots(goodput.Options())
    assert all(5 <= delay <= 60 for _, delay in todo)
