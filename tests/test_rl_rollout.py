"""Which rollouts begin and when, and what becomes of a group: pure, or on SQLite."""

import contextlib
import os
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.rl import figures
from jaxlab.rl.config import Curation, Envs, RLRun, Rollout
from jaxlab.rl.rollout import (
    TRAINING_SEEDS,
    Pending,
    Planner,
    chooser,
    group_plan,
    room,
    slots_free,
)
from jaxlab.rl.store import Store
from jaxlab.rl.tables import Stored, TaskStats
from tests.test_rl_store import add_done, finish, lease

small = st.integers(0, 12)


@given(st.builds(Pending, small, small, small), st.integers(1, 6), st.integers(1, 4))
def test_nothing_begins_that_would_be_too_old(pending, batch, max_lag):
    """What begins last is trained after all the rest, `batch` groups a version."""
    free = room("rollout", pending, batch, max_lag)
    if free:
        ahead = pending.total + free - 1
        assert ahead // batch <= max_lag
    if pending.total < batch:
        assert free > 0  # the learner never waits for what may not begin


@pytest.mark.parametrize("mode", ["batch", "lockstep"])
def test_a_batch_waits_for_all_of_the_last_one(mode):
    assert room(mode, Pending(), 4, 2) == 4
    assert room(mode, Pending(open=1), 4, 2) == 0
    assert room(mode, Pending(ready=4), 4, 2) == 0
    assert room(mode, Pending(leased=4), 4, 2) == 0
    assert room(mode, Pending(ready=3), 4, 2) == 1  # one was not worth training


def test_without_lag_every_mode_is_a_batch():
    assert room("rollout", Pending(leased=4), 4, 0) == 0
    assert room("rollout", Pending(open=2), 4, 0) == 0
    assert room("rollout", Pending(), 4, 0) == 4


def test_a_groups_environments_are_held_until_it_has_ended():
    assert slots_free("rollout", 8, 3, 0, 8) == 5
    assert slots_free("task", 8, 3, 0, 8) == 0


def test_plan_of_a_group_of_a_new_task_and_of_a_solved_one():
    rng = Random(0)
    plan = group_plan(Curation(), TaskStats([], [], None), 10, rng)
    assert len(plan) == 8 and {cap for cap, _ in plan} == {10}
    solved = TaskStats([1.0] * 16, [False] * 16, 3)
    plan = group_plan(Curation(probe_share=0.0), solved, 10, rng)
    assert plan == [(6, False)] * 2
    off = Curation(dynamic_rollouts=False, dynamic_length=False)
    assert group_plan(off, solved, 10, rng) == [(10, False)] * 8
    probes = group_plan(Curation(probe_share=1.0, n_min=8), solved, 10, rng)
    assert probes == [(10, True)] * 8


def pool():
    return [Stored(5, "click", "oracle", -1, 0, 3, "p", "s")]


def test_what_becomes_of_a_group():
    choose = chooser(Curation(), 3, 0)
    assert choose(1, "click", [1.0, 0.0], pool) == (True, None)
    assert choose(1, "click", [1.0, 1.0], pool) == (False, None)
    assert choose(1, "click", [0.0, 0.0], list) == (False, None)
    assert choose(1, "click", [0.0, 0.0], pool) == (True, pool()[0])
    off = chooser(Curation(experience=False), 3, 0)
    assert off(1, "click", [0.0, 0.0], pool) == (False, None)
    keep = chooser(Curation(keep_uninformative=True), 3, 0)
    assert keep(1, "click", [1.0, 1.0], pool) == (True, None)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nobody pulls the plug here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def planner():
    """Makes a planner and its store, which is closed at the end."""
    with contextlib.ExitStack() as stack:

        def made(folder, **fields):
            run = RLRun(out=str(folder), envs=Envs(tasks=("click", "color")), **fields)
            store = stack.enter_context(Store(folder))
            store.database.query("PRAGMA synchronous = OFF")
            return Planner(run, store), store

        yield made


def test_nothing_begins_before_there_are_weights(planner, tmp_path):
    plan, store = planner(tmp_path)
    assert plan.plan(8, 0, 0) == []
    store.publish(0, 0, "weights/0", "00")
    tickets = plan.plan(8, 0, 0)
    assert {t.task for t in tickets} == {"click"} and len(tickets) == 8
    assert len({t.seed for t in tickets}) == 1
    assert 0 <= tickets[0].seed < TRAINING_SEEDS
    assert plan.plan(8, 8, 0) == []
    assert {t.task for t in plan.plan(8, 7, 0)} == {"color"}


def test_a_batch_begins_as_a_whole_and_the_same_in_every_run(planner, tmp_path):
    runs = []
    for name in ("a", "b"):
        plan, store = planner(tmp_path / name, rollout=Rollout(mode="batch"), groups=3)
        store.publish(0, 0, "weights/0", "00")
        runs.append(plan.plan(4, 0, 0))
        assert plan.plan(4, 4, 20) == []
    assert runs[0] == runs[1] and len(runs[0]) == 24


def test_a_paused_task_does_not_begin(planner, tmp_path):
    plan, store = planner(tmp_path)
    store.publish(0, 0, "weights/0", "00")
    store.pause("click")
    assert {t.task for t in plan.plan(8, 0, 0)} == {"color"}
    store.pause("color")
    assert plan.plan(8, 0, 8) == [] == plan.plan(8, 0, 0)


def test_a_task_that_is_behind_goes_first(planner, tmp_path):
    plan, store = planner(tmp_path, rollout=Rollout(max_lag=4))
    store.publish(0, 0, "weights/0", "00")
    add_done(store, task="click")  # ready: the learner has enough of it
    assert {t.task for t in plan.plan(8, 0, 0)} == {"color"}


@pytest.mark.parametrize(
    ("mode", "max_lag"),
    [("rollout", 0), ("rollout", 1), ("rollout", 2), ("rollout", 4), ("task", 1)]
    + [("batch", 1)],
)
def test_the_bound_on_lag_holds_whatever_the_order(planner, tmp_path, mode, max_lag):
    """A learner, and environments that finish in any order with weights of any age."""
    plan, store = planner(
        tmp_path, rollout=Rollout(max_lag=max_lag, mode=mode), groups=2
    )
    rng = np.random.default_rng(max_lag)
    version, running = 0, []
    store.publish(0, 0, "weights/0", "00")
    for _ in range(40):
        begun = [(t, version) for t in plan.plan(24, len(running), 0)]
        running += begun
        rng.shuffle(running)
        number = int(rng.integers(0, len(running) + 1))
        for ticket, at in running[:number]:
            used = int(
                rng.integers(max(at, version - 1 if max_lag else at), version + 1)
            )
            finish(store, ticket, float(rng.integers(2)), version=used, steps=1)
        running = running[number:]
        taken = lease(store, 2, version=version, max_lag=max_lag)
        if taken is not None:
            version += 1
            store.publish(version, version, f"weights/{version}", "00", taken.id)
    assert version > 4
    lag = figures.largest_lag(store.database)
    assert lag <= max_lag
    if mode == "rollout" and max_lag:
        assert lag >= min(max_lag, 2)  # the bound is used, not only kept
