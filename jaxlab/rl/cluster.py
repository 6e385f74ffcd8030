"""A process that hosts environments, each on a thread that is a peer of the hub.

A slot asks for a rollout, resets its environment, and sends each observation to the
hub, which answers with an action of some rollout worker. A finished rollout is written
to the spool before it is handed in, and stays there until the hub says that it is
stored; what a killed process leaves in its spool, the next one hands in.

An environment that raises, or that takes longer than `step_timeout`, is given up
with its rollout: that one has died, which is no failure of the policy. A thread cannot
be stopped, so a slot whose environment hangs gets a new thread; when too many hang, the
process ends itself, to be started anew.

Nothing here imports jax.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.files import write_bytes
from jaxlab.rl import wire
from jaxlab.rl.config import Envs
from jaxlab.rl.trajectory import Step, assemble, encode

STATES: tuple[str, ...] = ("busy", "reset", "wait_policy", "wait_task", "down")
"""what a slot does: busy in a step, reset, waiting, or making its environment"""
BEAT = 0.5
"""seconds between heartbeats"""
LOST = 60.0
"""seconds without a word from the hub after which a process ends itself"""
ASK_AGAIN = 5.0
"""seconds after which a request is repeated; it is answered once"""


class HostSpec(NamedTuple):
    """What a host process is told; plain data."""

    name: str
    keys: wire.Keys
    envs: Envs
    spool: str
    """folder of its own"""


class Meter:
    """Seconds spent in each state."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.state, self.since = "down", clock()
        self._totals = dict.fromkeys(STATES, 0.0)

    def enter(self, state: str) -> float:
        """Changes the state; seconds that the last one took."""
        now = self._clock()
        seconds = now - self.since
        self._totals[self.state] += seconds
        self.state, self.since = state, now
        return seconds

    def totals(self) -> dict[str, float]:
        """Seconds of each state up to now."""
        running = self._clock() - self.since
        return {k: v + running * (k == self.state) for k, v in self._totals.items()}


class Slot:
    """One environment and the thread that drives it."""

    def __init__(self, spec: HostSpec, index: int) -> None:
        self.spec, self.name = spec, f"{spec.name}/{index}"
        self.meter = Meter()
        self.abandoned = threading.Event()
        self.episodes = self.steps = 0
        self.env: Any = None
        self.rollout = -1
        self.thread = threading.Thread(target=self._drive, daemon=True, name=self.name)
        self.thread.start()

    def _drive(self) -> None:
        with wire.connect(self.spec.keys) as channel:
            for path in sorted(Path(self.spec.spool).glob("*.trajectory")):
                if not self.abandoned.is_set():
                    channel.send("done", {"slot": self.name, "blob": path.read_bytes()})
            while not self.abandoned.is_set():
                try:
                    if self.env is None:
                        self.env = make_env(self.spec.envs)
                    self._one(channel)
                except _Ended:
                    return
                except Exception as error:
                    self._died(channel, f"{type(error).__name__}: {error}")
            self._close()

    def _died(self, channel: wire.Channel, reason: str) -> None:
        """Reports a rollout that died, and gives up the environment."""
        self.meter.enter("down")
        if not self.abandoned.is_set():
            body = {"slot": self.name, "rollout": self.rollout, "error": reason}
            channel.send("died", body)
            self._close()
            if self.rollout < 0:
                time.sleep(1.0)  # it cannot even be made: not in a tight loop
        self.rollout = -1

    def _close(self) -> None:
        env, self.env = self.env, None
        try:
            if env is not None:
                env.close()
        except Exception:  # it is being given up because it is broken
            pass

    def _one(self, channel: wire.Channel) -> None:
        """Waits for a rollout, does it and hands it in."""
        self.meter.enter("wait_task")
        ticket = self._receive(channel, "run", {"kind": "free"})
        self.rollout = ticket["rollout"]
        started, begun = time.time(), time.monotonic()
        self.meter.enter("reset")
        task = {"task": ticket["task"]}
        observation, _ = self.env.reset(seed=ticket["seed"], options=task)
        steps: list[Step] = []
        reward, ended, cut = 0.0, False, False
        while not ended and not cut and len(steps) < ticket["cap"]:
            if self.abandoned.is_set():
                return
            self.meter.enter("wait_policy")
            answer = self._act(channel, ticket, len(steps), observation)
            wait = self.meter.enter("busy")
            before = observation
            observation, gained, ended, cut, _ = self.env.step(answer["action"])
            reward += float(gained)
            self.steps += 1
            steps.append(
                Step(
                    before["image"],
                    answer["tokens"],
                    answer["logp"],
                    answer["entropy"],
                    answer["version"],
                    answer["worker"],
                    wait,
                    time.monotonic() - self.meter.since,
                )
            )
        capped = not ended and not cut and ticket["cap"] < self.spec.envs.max_steps
        trajectory = assemble(
            steps,
            id=ticket["rollout"],
            task=ticket["task"],
            seed=ticket["seed"],
            group=ticket["group"],
            text=str(observation["text"]),
            instruction=np.asarray(observation["instruction"], np.int32),
            final=np.asarray(observation["image"]),
            reward=min(max(reward, 0.0), 1.0),
            truncated=not ended,
            cap_truncated=capped,
            probe=ticket["probe"],
            source="human" if any(step.version < 0 for step in steps) else "self",
            started=started,
            seconds=time.monotonic() - begun,
        )
        blob = encode(trajectory)
        # Not synced: a power cut loses a rollout that the store does not have, and it
        # is done again.
        write_bytes(self._spooled(ticket["rollout"]), blob, sync=False)
        self.episodes += 1
        self.rollout = -1
        channel.send("done", {"slot": self.name, "blob": blob})

    def _act(
        self, channel: wire.Channel, ticket: dict, t: int, observation: Any
    ) -> dict[str, Any]:
        body = {
            "kind": "act",
            "rollout": ticket["rollout"],
            "t": t,
            "image": observation["image"],
            "instruction": observation["instruction"],
            "text": str(observation["text"]),
            "least": ticket["least"],
        }
        while True:
            answer = self._receive(channel, "acted", body)
            if (answer["rollout"], answer["t"]) == (ticket["rollout"], t):
                return answer

    def _receive(
        self, channel: wire.Channel, kind: str, request: dict[str, Any]
    ) -> dict[str, Any]:
        """Sends a request, again and again, until something of a kind arrives."""
        request = {"slot": self.name, **request}
        sent = -1e9
        while not self.abandoned.is_set():
            if time.monotonic() - sent > ASK_AGAIN:
                channel.send(request["kind"], request)
                sent = time.monotonic()
            found = None
            for message in channel.receive(0.5):
                if message.kind == "stored":
                    path = self._spooled(message.body["rollout"])
                    path.unlink(missing_ok=True)
                elif message.kind == kind:
                    found = message.body
            if found is not None:
                return found
        raise _Ended

    def _spooled(self, rollout: int) -> Path:
        return Path(self.spec.spool) / f"{rollout}.trajectory"

    def hangs(self) -> bool:
        """Whether the environment has been silent for too long."""
        meter = self.meter
        silent = time.monotonic() - meter.since > self.spec.envs.step_timeout
        return meter.state in ("busy", "reset", "down") and silent


class _Ended(Exception):
    """The slot is to end."""


def make_env(envs: Envs) -> Any:
    """One environment, as gymnasium makes it."""
    import gymnasium

    import jaxlab.rl.envs  # noqa: F401 (registers them)

    return tokenized(gymnasium.make(envs.id, disable_env_checker=True), envs)


def tokenized(env: Any, envs: Envs) -> Any:
    """The environment, with instructions as the run's policy reads them."""
    if envs.tokenizer is None:
        return env
    from jaxlab.rl.envs.tokenized import Tokenized

    return Tokenized(env, envs.tokenizer, envs.tokens)


def host_main(spec: HostSpec) -> None:
    """The process: its slots, their watchdog, and heartbeats."""
    Path(spec.spool).mkdir(parents=True, exist_ok=True)
    slots = [Slot(spec, index) for index in range(spec.envs.slots)]
    retired = dict.fromkeys((*STATES, "steps", "episodes"), 0.0)
    hung = 0
    with wire.connect(spec.keys) as channel:
        for _ in heartbeats(channel):
            for index, slot in enumerate(slots):
                if not slot.hangs():
                    continue
                hung += 1
                _give_up(slot, channel)
                _add(retired, slot)
                slots[index] = Slot(spec, index)
            if hung > 2 * spec.envs.slots:
                os._exit(4)  # their threads are too many to keep
            totals = dict(retired)
            for slot in slots:
                _add(totals, slot)
            body = {"name": spec.name, "pid": os.getpid(), "totals": totals}
            channel.send("beat", body)
    for slot in slots:
        slot.abandoned.set()
    for slot in slots:
        slot.thread.join(2.0)


def heartbeats(channel: wire.Channel) -> Iterator[None]:
    """Beats until the hub says stop; ends the process if the hub or parent is gone.

    What arrives besides is dropped: this is a channel for heartbeats alone.
    """
    parent, last_word = os.getppid(), time.monotonic()
    while True:
        yield
        until = time.monotonic() + BEAT
        while (left := until - time.monotonic()) > 0:
            for message in channel.receive(left):
                last_word = time.monotonic()
                if message.kind == "stop":
                    return
        if os.getppid() != parent or time.monotonic() - last_word > LOST:
            os._exit(3)


def _give_up(slot: Slot, channel: wire.Channel) -> None:
    """Leaves a slot's thread to itself, and says that its rollout has died."""
    slot.abandoned.set()
    error = f"{slot.meter.state} for more than {slot.spec.envs.step_timeout} s"
    body = {"slot": slot.name, "rollout": slot.rollout, "error": error}
    channel.send("died", body)
    inner = None if slot.env is None else slot.env.unwrapped
    abort = getattr(inner, "abort", None)  # what a browser can be freed by
    if abort is not None:
        threading.Thread(target=abort, daemon=True).start()


def _add(totals: dict[str, float], slot: Slot) -> None:
    for state, seconds in slot.meter.totals().items():
        totals[state] += seconds
    totals["steps"] += slot.steps
    totals["episodes"] += slot.episodes
