"""Hub, keeper, slots and store together, with a worker that clicks at random.

Everything is real but the policy and the learner, and runs on threads of this process.
"""

import threading
import time

import numpy as np
import pytest

from jaxlab.rl import figures, wire
from jaxlab.rl.cluster import HostSpec, Slot
from jaxlab.rl.config import Curation, Envs, RLRun, Rollout
from jaxlab.rl.hub import Counters, Hub
from jaxlab.rl.report import Report, describe, rows, strip, table
from jaxlab.rl.store import Store
from jaxlab.rl.tables import Choice


class RandomWorker(threading.Thread):
    """Answers requests, and loads whatever it is told to."""

    def __init__(self, keys, name):
        super().__init__(daemon=True)
        self.keys, self.name_, self.stopped = keys, name, threading.Event()
        self.rng, self.version, self.batches = np.random.default_rng(0), -1, []
        self.start()

    def run(self):
        with wire.connect(self.keys) as channel:
            channel.send("serve", {"name": self.name_, "pid": 0})
            while not self.stopped.is_set():
                asked = []
                for message in channel.receive(0.05):
                    if message.kind == "load":
                        self.version = message.body["version"]
                        told = {"name": self.name_, "version": self.version}
                        channel.send("loaded", told)
                    elif message.kind == "act":
                        asked.append(message.body)
                for body in asked:
                    channel.send("acted", {"name": self.name_, **self.answer(body)})
                self.batches.append(len(asked))

    def answer(self, body):
        x, y = self.rng.random(2)
        return {
            "rollout": body["rollout"],
            "t": body["t"],
            "tokens": np.array([0, 5], np.int32),
            "logp": np.array([-1, -2], np.float32),
            "entropy": np.array([1, 2], np.float32),
            "version": self.version,
            "worker": 0,
            "action": {"kind": 0, "xy": [x, y]},
        }


class Stage:
    """A hub with its peers."""

    def __init__(self, tmp_path, channel, keys, **fields):
        given = {
            "groups": 2,
            "envs": Envs(tasks=("click", "color"), hosts=1, slots=3, max_steps=3),
            "curation": Curation(n_max=4, keep_uninformative=True),
        }
        self.run = RLRun(out=str(tmp_path), **(given | fields))
        self.store = Store(tmp_path)
        self.store.publish(0, 0, "weights/0", "00")
        self.hub = Hub(self.run, channel)
        self.hub.keeper.thread.start()
        self.spec = HostSpec("host0", keys, self.run.envs, str(tmp_path / "spool"))
        (tmp_path / "spool").mkdir()
        self.slots = [Slot(self.spec, i) for i in range(self.run.envs.slots)]
        self.version = 0

    def until(self, condition, seconds=60.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            self.hub.step(0.02)

    def update(self):
        """What a learner does."""
        taken = []

        def try_lease():
            found = self.store.lease(
                self.run.groups,
                self.version,
                self.run.rollout.max_lag,
                lambda *_: Choice(True),
                consumer="learner",
            )
            taken.extend([found] if found else [])
            return taken

        self.until(try_lease)
        self.version += 1
        path = f"weights/{self.version}"
        self.store.publish(self.version, self.version, path, "00", taken[0].id)

    def close(self):
        for slot in self.slots:
            slot.abandoned.set()
        self.hub.keeper.inbox.put(("stop", None))
        self.hub.keeper.thread.join(30)
        assert not self.hub.keeper.thread.is_alive()
        self.store.close()


@pytest.fixture
def stage(tmp_path, request):
    keys = wire.new_keys()
    with wire.listen(keys) as channel:
        made = Stage(tmp_path, channel, keys, **getattr(request, "param", {}))
        yield made
        made.close()


@pytest.mark.parametrize(
    "stage",
    [
        {"rollout": Rollout(mode=mode, max_lag=lag)}
        for mode, lag in [("rollout", 2), ("rollout", 0), ("task", 1)]
        + [("batch", 2), ("lockstep", 1)]
    ],
    indirect=True,
    ids=lambda p: f"{p['rollout'].mode}-{p['rollout'].max_lag}",
)
def test_rollouts_come_in_and_are_never_too_old(stage):
    worker = RandomWorker(stage.spec.keys, "worker0")
    for _ in range(4):
        stage.update()
    database = stage.store.database
    assert figures.largest_lag(database) <= stage.run.rollout.max_lag
    trained = database.query("SELECT COUNT(*) FROM grouping WHERE state = 'TRAINED'")
    assert trained == [(8,)]
    tasks = {t for (t,) in database.query("SELECT DISTINCT task FROM trajectory")}
    assert tasks == {"click", "color"}
    if stage.run.rollout.mode == "lockstep":
        assert max(worker.batches) >= 2  # they stepped together
    worker.stopped.set()


def test_a_worker_that_dies_and_a_slot_that_is_given_up(stage):
    first = RandomWorker(stage.spec.keys, "worker0")
    stage.update()
    first.stopped.set()
    stage.until(lambda: first.join(0) or not first.is_alive())
    stage.until(lambda: len(stage.hub.router.waiting) + len(first.batches) > 0)
    stage.hub.gone("worker0")
    assert stage.hub.router.serving() == 0
    second = RandomWorker(stage.spec.keys, "worker1")
    stage.update()
    for slot in stage.slots:
        slot.abandoned.set()
    stage.hub.gone("host0")  # its rollouts are queued again
    assert stage.hub.slots == {}
    stage.slots = [Slot(stage.spec, i) for i in range(3)]
    stage.update()
    stage.update()
    query = stage.store.database.query
    stored = [r for (r,) in query("SELECT rollout FROM trajectory")]
    assert len(stored) == len(set(stored))
    events = {kind for (kind,) in query("SELECT kind FROM event")}
    assert "process_ended" in events
    second.stopped.set()


def test_what_a_page_and_a_table_show(stage):
    worker = RandomWorker(stage.spec.keys, "worker0")
    report = Report(stage.run)
    stage.update()
    report.stored_trajectories(stage.hub.stored)
    shown = dict(rows(stage.hub, report, 1))
    assert "stored" in shown["rollouts"] and "versions [" in shown["workers"]
    assert table(list(shown.items())).row_count == len(shown)
    frames = [slot.frame for slot in stage.hub.slots.values() if slot.frame]
    assert frames and frames[0].image.shape == (64, 64, 3)
    one = stage.hub.stored[0]
    assert strip(one).shape == (64, 64 * (one.length + 1) + 2 * one.length, 3)
    assert one.text in describe(one) and "`0 5`" in describe(one)
    stage.hub.hosts.update("host0", {"busy": 1.0, "reset": 0.5, "steps": 3.0})
    values = report.scalars(stage.hub)
    states = ("busy", "reset", "wait_policy", "wait_task", "down")
    assert sum(values[f"rl/env_{state}"] for state in states) == pytest.approx(1)
    assert values["rl/env_utilisation"] > 0 and "rl/success" in values
    assert {"rl/success/click", "rl/success/color"} & set(values)
    worker.stopped.set()


def test_a_bad_message_is_noted_and_harms_nobody(stage):
    with wire.connect(stage.spec.keys) as stranger:
        stranger.send("done", {"slot": "host0/9", "blob": b"no trajectory"})
        stranger.send("act", {"slot": "host0/9"})
        stranger.send("no_such_kind", {})

        def noted():
            rows = stage.store.database.query(
                "SELECT body FROM event WHERE kind = 'bad_message'"
            )
            return len(rows) == 2

        stage.until(noted)


def test_counters_outlive_processes():
    counters = Counters()
    counters.update("host0", {"steps": 3.0})
    counters.update("host0", {"steps": 5.0})
    counters.retire("host0")
    counters.update("host0", {"steps": 1.0})
    counters.update("host1", {"steps": 2.0})
    assert counters.total() == {"steps": 8.0}
