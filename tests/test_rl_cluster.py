"""Environments on their threads: what they do, and what is done when they do not."""

import threading
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from jaxlab.rl import cluster, wire
from jaxlab.rl.cluster import HostSpec, Meter, Slot
from jaxlab.rl.config import Envs
from jaxlab.rl.envs.api import observation_space
from jaxlab.rl.processes import DEATHS, WINDOW, Local, pause
from jaxlab.rl.trajectory import decode


class Stubborn(gymnasium.Env):
    """Does what its task says: ends after two steps, raises, or hangs."""

    observation_space = observation_space(8, 8, 4, 2, 8)
    action_space = gymnasium.spaces.Discrete(2)
    released = threading.Event()

    def reset(self, *, seed=None, options=None):
        self.task, self.t = options["task"], 0
        return self._see(), {}

    def _see(self):
        image = np.full((8, 8, 3), self.t, np.uint8)
        return {"image": image, "instruction": np.zeros(2, np.int32), "text": "go"}

    def step(self, action):
        self.t += 1
        if self.task == "raise":
            raise RuntimeError("the page crashed")
        if self.task == "hang":
            self.released.wait(30)
        return self._see(), float(self.t == 2), self.t == 2, False, {}

    def abort(self):
        self.released.set()


gymnasium.register(id="Stubborn-v0", entry_point=Stubborn)


class FakeHub:
    """Answers every request; what it is told is in `told`."""

    def __init__(self, channel, tickets):
        self.channel, self.tickets, self.told = channel, tickets, []
        self.store = True

    def run(self, until, seconds=30.0):
        end = time.monotonic() + seconds
        while not until(self.told):
            assert time.monotonic() < end, self.told
            for m in self.channel.receive(0.05):
                if m.kind == "free" and self.tickets:
                    self.channel.send("run", self.tickets.pop(0), m.sender)
                elif m.kind == "act":
                    self.channel.send("acted", self.answer(m.body), m.sender)
                elif m.kind in ("done", "died"):
                    self.told.append((m.kind, m.body))
                    if m.kind == "done" and self.store:
                        one = decode(m.body["blob"])
                        self.channel.send("stored", {"rollout": one.id}, m.sender)

    def answer(self, body):
        return {
            "rollout": body["rollout"],
            "t": body["t"],
            "tokens": np.array([1, -1], np.int32),
            "logp": np.array([-0.5, 0], np.float32),
            "entropy": np.array([0.5, 0], np.float32),
            "version": 3,
            "worker": 1,
            "action": {"kind": 0},
        }


def ticket(rollout, task, cap=5):
    return {
        "rollout": rollout,
        "group": 1,
        "task": task,
        "seed": 9,
        "cap": cap,
        "probe": False,
        "least": 0,
    }


def kinds(told):
    return [kind for kind, _ in told]


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "make_env", lambda envs: Stubborn())
    envs = Envs(id="Stubborn-v0", slots=1, step_timeout=1.0, max_steps=5)
    (tmp_path / "spool").mkdir()
    return HostSpec("host0", wire.new_keys(), envs, str(tmp_path / "spool"))


def spooled(spec):
    return sorted(path.name for path in Path(spec.spool).glob("*.trajectory"))


def test_a_rollout_is_handed_in_and_leaves_the_spool_when_it_is_stored(spec):
    with wire.listen(spec.keys) as channel:
        hub = FakeHub(channel, [ticket(4, "end"), ticket(5, "end", cap=1)])
        slot = Slot(spec, 0)
        hub.run(lambda told: len(told) == 2)
        hub.tickets.append(ticket(6, "end"))
        hub.run(lambda told: len(told) == 3)
        slot.abandoned.set()
        slot.thread.join(10)
    first, second = (decode(body["blob"]) for _, body in hub.told[:2])
    assert first.id == 4 and first.length == 2 and first.reward == 1
    assert not first.truncated and first.version.tolist() == [3, 3]
    assert [image[0, 0, 0] for image in first.images] == [0, 1]
    assert first.final[0, 0, 0] == 2
    assert second.length == 1 and second.cap_truncated and second.reward == 0
    assert "4.trajectory" not in spooled(spec) and "5.trajectory" not in spooled(spec)
    assert slot.steps == 5 and slot.episodes == 3


def test_what_was_not_acknowledged_is_handed_in_by_the_next_process(spec):
    with wire.listen(spec.keys) as channel:
        hub = FakeHub(channel, [ticket(4, "end")])
        hub.store = False
        slot = Slot(spec, 0)
        hub.run(lambda told: len(told) == 1)
        slot.abandoned.set()
        slot.thread.join(10)
        assert spooled(spec) == ["4.trajectory"]
        again = FakeHub(channel, [])
        slot = Slot(spec, 0)
        again.run(lambda told: len(told) == 1)
        slot.abandoned.set()
        slot.thread.join(10)
    assert again.told[0][1]["blob"] == hub.told[0][1]["blob"]


def test_an_environment_that_raises_has_died_and_is_made_anew(spec):
    with wire.listen(spec.keys) as channel:
        hub = FakeHub(channel, [ticket(4, "raise"), ticket(5, "end")])
        slot = Slot(spec, 0)
        hub.run(lambda told: len(told) == 2)
        slot.abandoned.set()
    assert kinds(hub.told) == ["died", "done"]
    assert hub.told[0][1]["rollout"] == 4
    assert hub.told[0][1]["error"] == "RuntimeError: the page crashed"


def test_an_environment_that_hangs_is_given_up(spec):
    Stubborn.released.clear()
    main = threading.Thread(target=cluster.host_main, args=(spec,), daemon=True)
    with wire.listen(spec.keys) as channel:
        hub = FakeHub(channel, [ticket(4, "hang"), ticket(5, "end")])
        main.start()
        try:
            hub.run(lambda told: len(told) == 2)
        finally:
            beats = stopped(main, channel)
    assert kinds(hub.told) == ["died", "done"]
    assert "busy for more than 1.0 s" in hub.told[0][1]["error"]
    assert Stubborn.released.is_set()  # the environment's own way out was used
    assert beats[0].body["totals"]["busy"] >= 1.0


def stopped(main, channel):
    """Stops a host, which ends the whole process once it hears of no hub; its beats."""
    beats, until = [], time.monotonic() + 60
    while main.is_alive() and time.monotonic() < until:
        fresh = [m for m in channel.receive(0.1) if m.kind == "beat"]
        for beat in fresh:
            channel.send("stop", {}, beat.sender)
        beats += fresh
    assert not main.is_alive()
    return beats


def test_the_meter_adds_up_to_the_time_that_has_passed():
    now = [0.0]
    meter = Meter(lambda: now[0])
    for state, seconds in [("busy", 2.0), ("wait_policy", 1.0), ("busy", 3.0)]:
        meter.enter(state)
        now[0] += seconds
    totals = meter.totals()
    assert totals["busy"] == 5 and totals["wait_policy"] == 1
    assert sum(totals.values()) == now[0]
    assert meter.enter("down") == 3.0


def test_pauses_double_and_then_the_circuit_breaks():
    assert [pause(n) for n in range(1, 5)] == [0.5, 1.0, 2.0, 4.0]
    assert pause(DEATHS) == WINDOW


def _sleep(spec):
    time.sleep(spec)


def test_a_part_that_dies_is_started_again():
    engine = Local()
    engine.add("host0", _sleep, 60)
    engine.poll()
    first = engine.pid("host0")
    assert first is not None
    engine.kill(engine.processes["host0"].handle)
    assert engine.poll() == ["host0"] and engine.pid("host0") is None
    assert engine.processes["host0"].code == -9
    until = time.monotonic() + 30
    while engine.pid("host0") is None and time.monotonic() < until:
        engine.poll()
        time.sleep(0.05)
    assert engine.pid("host0") not in (None, first)
    engine.stop(0.1)
    assert engine.processes["host0"].handle.exitcode == -9
