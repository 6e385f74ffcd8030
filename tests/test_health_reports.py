"""What agents report: what is right is read, what is garbled is refused."""

import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from jaxlab.health import reports
from jaxlab.health.detect import (
    Diagnosis,
    Kind,
    Phase,
    RankSample,
    align,
    detect_stall,
)
from jaxlab.health.sequential import init_baseline

REFUSED = (KeyError, TypeError, ValueError)
"""What the roster catches; anything else would end the supervisor."""

HELLO = {
    "host": "a",
    "instance": "5f3a",
    "slots": 2,
    "address": "127.0.0.1",
    "probe": 4001,
    "port": 4002,
    "running": [[3, 0], [3, 1]],
}
ROW = {
    "rank": 0,
    "generation": 3,
    "pid": 77,
    "code": None,
    "stopped": False,
    "heartbeat": 0.25,
    "progress": 1.5,
    "enter_seq": 9,
    "exit_seq": 8,
    "phase": int(Phase.STEP),
    "step": 8,
    "samples": [[7, 10.0, 10.5, 11.0, int(Phase.STEP), 0.25]],
}

# What `json.loads` makes of any text: it knows Infinity, NaN and whole numbers of any
# size.
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 10**400]),
    st.floats(),
    st.text(max_size=5),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from([*ROW]), inner)
    ),
    max_leaves=12,
)


def garbled(message):
    """The message with some fields replaced, or left out."""
    names = st.lists(st.sampled_from([*message]), min_size=1, unique=True)

    def replace(draw):
        found = dict(message)
        for name in draw[0]:
            found[name] = draw[1]
        for name in draw[2]:
            found.pop(name, None)
        return found

    missing = st.lists(st.sampled_from([*message]), max_size=2)
    return st.tuples(names, JSON, missing).map(replace)


def test_a_hello_is_read():
    found = reports.read_hello(b"me", HELLO, 5.0)
    assert found == reports.Agent(
        b"me", "5f3a", 2, "127.0.0.1", 4001, 4002, [(3, 0), (3, 1)], 5.0
    )


def test_a_row_is_read_with_ages_as_times():
    kept, samples = reports.read_row(ROW, 100.0)
    assert kept["heartbeat"] == 99.75 and kept["progress"] == 98.5
    assert kept["pid"] == 77 and kept["code"] is None and kept["told"] == 100.0
    assert samples == [RankSample(7, 10.0, 10.5, 11.0, Phase.STEP, 0.25)]
    before = {name: ROW[name] for name in ("rank", "pid", "code", "stopped")}
    kept, samples = reports.read_row(before | {"code": -9}, 100.0)
    assert kept["code"] == -9 and "heartbeat" not in kept and samples == []


@pytest.mark.parametrize("name", [n for n in ROW if n not in ("rank", "generation")])
def test_a_row_without_a_field_is_refused(name):
    row = {key: value for key, value in ROW.items() if key != name}
    if name == "heartbeat":  # as of a process that has no board yet
        assert reports.read_row(row, 0.0)[1] == []
    else:
        with pytest.raises(KeyError, match=name):
            reports.read_row(row, 0.0)


@settings(deadline=None, max_examples=300)
@given(message=JSON | garbled(HELLO))
@example(HELLO | {"slots": math.inf})
@example(HELLO | {"running": [[1]]})
def test_any_hello_is_read_or_refused(message):
    message = json.loads(json.dumps(message))
    try:
        agent = reports.read_hello(b"", message, 0.0)
    except REFUSED:
        return
    assert isinstance(agent.slots, int) and isinstance(agent.address, str)
    assert all(isinstance(x, int) for pair in agent.running for x in pair)


@settings(deadline=None, max_examples=300)
@given(row=JSON | garbled(ROW))
@example(ROW | {"step": math.inf})
@example(ROW | {"step": 10**30})
@example(ROW | {"heartbeat": 10**400})
@example(ROW | {"samples": [[10**400, 0, 0, 0, 1, 0]]})
@example(ROW | {"samples": [[1, 0, 0, 0, 10**400, 0]]})
@example(ROW | {"samples": [[1, 0, 0, 0, 1, 10**400]]})
def test_any_row_is_refused_or_harmless(row):
    """What is read makes a board and a window, and those a diagnosis."""
    row = json.loads(json.dumps(row))
    try:
        kept, samples = reports.read_row(row, 100.0)
    except REFUSED:
        return
    board = reports.board_of({0: kept, 1: {}}, 2, 90.0, 100.0)
    assert {field.shape for field in board} == {(2,)}
    assert isinstance(detect_stall(board, 100.0, init_baseline()), Diagnosis)
    assert align({0: samples, 1: []}).local.shape[1] == 2


@settings(deadline=None, max_examples=300)
@given(cells=JSON)
@example([[10**400]])
@example([[1.0], [1.0, 2.0]])
def test_any_delays_are_numbers_or_refused(cells):
    cells = json.loads(json.dumps(cells))
    try:
        found = reports.read_delays(cells)
    except REFUSED:
        return
    assert found.dtype == np.float64


def test_delays_that_are_nested_without_end_are_refused():
    cells = 1.0
    for _ in range(5000):
        cells = [cells]
    with pytest.raises(REFUSED):
        reports.read_delays(cells)


def test_delays_keep_what_was_not_measured_and_what_did_not_answer():
    found = reports.read_delays([[None, 0.5], ["inf", None]])
    np.testing.assert_array_equal(found, [[np.nan, 0.5], [np.inf, np.nan]])


# ------------------------------------------------------------------ the board


def test_ranks_that_have_not_reported_are_starting():
    board = reports.board_of({}, 3, 90.0, 100.0)
    assert board.alive.all() and not board.stopped.any()
    assert (board.phase == Phase.STARTING).all() and (board.progress == 90.0).all()
    assert np.isnan(board.heartbeat).all() and (board.step == -1).all()
    assert detect_stall(board, 100.0, init_baseline()).kind == Kind.HEALTHY


def test_a_step_is_taken_once_all_have_told_of_it():
    def told(*steps):
        return [RankSample(t, 10.0 * t, 10.0 * t + 1, 10.0 * t + 3) for t in steps]

    logs = {0: told(0, 1, 2), 1: told(0, 1), 2: []}
    assert reports.take_window(logs) is None and len(logs[0]) == 3
    logs[2] += told(0)
    window = reports.take_window(logs)
    assert window is not None and window.number is not None
    assert window.number.tolist() == [0] and window.local.shape == (1, 3)
    assert {rank: len(log) for rank, log in logs.items()} == {0: 2, 1: 1, 2: 0}
    logs[2] += told(1)
    window = reports.take_window(logs)
    assert window is not None and not np.isnan(window.local).any()
    assert reports.take_window({}) is None
    # One that never tells is not waited for.
    logs = {0: told(*range(reports.UNHEARD)), 1: []}
    window = reports.take_window(logs)
    assert window is not None and len(window.step) == reports.UNHEARD
    assert np.isnan(window.local[:, 1]).all() and logs == {0: [], 1: []}


def test_an_exit_code_is_an_end_and_zero_a_good_one():
    rows = {r: reports.read_row(ROW | {"code": c}, 100.0)[0] for r, c in ((0, 0),)}
    rows[1] = reports.read_row(ROW | {"code": -9}, 100.0)[0]
    board = reports.board_of(rows, 2, 90.0, 100.0)
    assert board.alive.tolist() == [False, False]
    assert board.phase.tolist() == [Phase.DONE, Phase.STEP]
    found = detect_stall(board, 100.0, init_baseline())
    assert (found.kind, found.ranks) == (Kind.CRASH, (1,))


@given(age=st.floats(0, 100), told=st.floats(0, 1000), late=st.floats(0, 100))
def test_a_late_report_makes_no_rank_older(age, told, late):
    """A rank is as old as when its agent told, however long ago that was."""
    rows = {0: reports.read_row(ROW | {"heartbeat": age, "progress": age}, told)[0]}
    now = told + late
    board = reports.board_of(rows, 1, 0.0, now)
    assert now - board.heartbeat[0] == pytest.approx(age, abs=1e-9)
    assert now - board.progress[0] == pytest.approx(age, abs=1e-9)


def test_ranks_of_which_nothing_is_told_are_listed():
    rows = {0: {"told": 10.0}, 2: {"told": 4.0}}
    assert reports.untold(rows, 4, 5.0) == [1, 2, 3]


@pytest.mark.parametrize(
    "codes, ranks",
    [
        ({}, ()),
        ({1: -9}, (1,)),
        ({1: 1}, ()),  # it may be another's fault
        ({1: 1, 2: -9, 3: -6}, (2,)),  # whoever was heard of first
        ({0: -11, 3: -9}, (0, 3)),
        ({0: -6, 1: -6}, ()),
    ],
)
def test_who_is_killed_died_first_and_who_fails_followed(codes, ranks):
    assert reports.died_first(codes) == ranks
