"""The middle of a run: all peers' messages, and the thread that writes the store.

The hub only passes messages on, so that no environment waits for a disk: the store's
thread (`Keeper`) writes what has finished, many at once, and plans what comes next.
What a page or a table shows is read from here (`slots` with their last frames) and
from the store.
"""

import queue
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxlab.rl import figures, wire
from jaxlab.rl.cluster import STATES
from jaxlab.rl.config import RLRun
from jaxlab.rl.rollout import Planner
from jaxlab.rl.service import Router, Send, plain_action
from jaxlab.rl.store import Store
from jaxlab.rl.tables import Ticket
from jaxlab.rl.trajectory import decode
from jaxlab.rl.upkeep import prune


class Frame(NamedTuple):
    """The last thing an environment showed."""

    image: Any
    """uint8 [height, width, 3]"""
    text: str
    t: int
    action: dict[str, Any] | None
    """what was answered, if it was"""


@dataclass
class SlotView:
    """What the hub knows of a slot."""

    peer: bytes
    ticket: Ticket | None = None
    waiting: bool = False
    """it has asked for a rollout"""
    frame: Frame | None = None


@dataclass
class Counters:
    """Seconds and numbers since the run began, over the deaths of processes."""

    ended: dict[str, float] = field(default_factory=dict)
    """of processes that are gone"""
    now: dict[str, dict[str, float]] = field(default_factory=dict)
    """by name, of those that live"""

    def update(self, name: str, totals: dict[str, float]) -> None:
        """A process has told its totals."""
        self.now[name] = totals

    def retire(self, name: str) -> None:
        """A process is gone; what it did stays counted."""
        for key, value in self.now.pop(name, {}).items():
            self.ended[key] = self.ended.get(key, 0.0) + value

    def total(self) -> dict[str, float]:
        """Sums over all of them."""
        total = dict(self.ended)
        for totals in self.now.values():
            for key, value in totals.items():
                total[key] = total.get(key, 0.0) + value
        return total


class Keeper:
    """The thread that writes the store and plans; it and the hub share two queues."""

    def __init__(self, run: RLRun) -> None:
        self.run = run
        self.inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.demand: tuple[int, int, int] = (0, 0, 0)
        """slots that are up, rollouts that run, rollouts that wait for a slot"""
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._main, daemon=True, name="keeper")

    def _main(self) -> None:
        try:
            with Store(self.run.out, self.run.store) as store:
                with ThreadPoolExecutor(4) as pool:
                    self._work(store, pool)
        except BaseException as error:  # the run ends with it, in the main thread
            traceback.print_exc()
            self.failure = error

    def _work(self, store: Store, pool: ThreadPoolExecutor) -> None:
        planner = Planner(self.run, store)
        # What the last coordinator had begun, and no spool has handed in.
        store.requeue()
        self.outbox.put(("tickets", (planner.version, store.queued())))
        self.outbox.put(("paused", figures.paused(store.database)))
        looked, pruned = 0.0, time.monotonic()
        while True:
            items = self._take()
            self._write(store, pool, items)
            if any(kind == "stop" for kind, _ in items):
                return
            if self.run.keep_blobs is not None and time.monotonic() - pruned > 10.0:
                pruned = time.monotonic()
                prune(store, self.run.keep_blobs)
            if items or time.monotonic() - looked > 0.05:
                looked = time.monotonic()
                before = planner.version
                tickets = planner.plan(*self.demand)
                if planner.version != before:
                    self.outbox.put(("version", planner.newest))
                if tickets:
                    slots, running, queued = self.demand
                    self.demand = (slots, running, queued + len(tickets))
                    self.outbox.put(("tickets", (planner.version, tickets)))

    def _take(self) -> list[tuple[str, Any]]:
        items = []
        try:
            items.append(self.inbox.get(timeout=0.05))
            while len(items) < 64:
                items.append(self.inbox.get_nowait())
        except queue.Empty:
            pass
        return items

    def _write(
        self, store: Store, pool: ThreadPoolExecutor, items: list[tuple[str, Any]]
    ) -> None:
        """Blobs first, side by side; then all rows in one transaction."""
        blobs = [item for kind, item in items if kind == "done"]
        written = iter(
            list(pool.map(lambda b: store.write(b[1], b[2].id), blobs)) if blobs else ()
        )
        keep = self.run.curation.per_task if self.run.curation.experience else None
        replies: list[tuple[str, Any]] = []
        again: list[Ticket] = []
        with store.database.transaction():
            for kind, item in items:
                if kind == "begun":
                    store.start(*item)
                elif kind == "done":
                    peer, _, trajectory = item
                    new = store.record(trajectory, *next(written), keep)
                    replies.append(("stored", (peer, trajectory, new)))
                elif kind == "died":
                    ticket, error = item
                    if store.fail(ticket.rollout, error, self.run.rollout.attempts):
                        again.append(ticket)
                elif kind == "note":
                    store.note(item[0], **item[1])
                elif kind == "pause":
                    store.pause(*item)
                    replies.append(("paused", figures.paused(store.database)))
        for reply in replies:
            self.outbox.put(reply)
        if again:
            self.outbox.put(("tickets", (-1, again)))


class Hub:
    """Passes messages between environments, workers, learner and keeper.

    Args:
        run: what is run.
        channel: the hub's end.
    """

    def __init__(self, run: RLRun, channel: wire.Channel) -> None:
        self.run, self.channel = run, channel
        self.router = Router(run.rollout.sync)
        self.keeper = Keeper(run)
        self.slots: dict[str, SlotView] = {}
        self.hosts, self.workers = Counters(), Counters()
        self.taken: dict[str, tuple[bytes, dict[str, Any]] | None] = {}
        """slots that a person acts in, and what they ask of that person"""
        self.paused: set[str] = set()
        """tasks"""
        self.queue: list[Ticket] = []
        self.version = -1
        self.finished = False
        self.answers = 0
        """actions answered"""
        self.stored: list[Any] = []
        """trajectories stored since somebody last looked"""
        self.news: list[dict[str, Any]] = []
        """what the learner has told since somebody last looked"""
        self.deaths = 0
        """of environments, since the last rollout that was finished"""
        self.last_death = ""
        self.lines: list[str] = []
        """for the user"""
        self._held: dict[str, tuple[bytes, dict[str, Any]]] = {}
        """in lockstep: the requests of the slots that wait for the others"""
        self._since = time.monotonic()
        self._peers: dict[str, bytes] = {}
        """of processes, by name"""

    def step(self, seconds: float) -> None:
        """Handles what arrives within so many seconds."""
        if self.keeper.failure is not None:
            raise self.keeper.failure
        for message in self.channel.receive(seconds):
            handler = getattr(self, f"_on_{message.kind}", None)
            if handler is None:
                continue
            try:
                handler(message.sender, message.body)
            except (KeyError, TypeError, ValueError) as error:
                self.note("bad_message", message=message.kind, error=repr(error))
        self._from_keeper()
        self._assign()
        running = sum(slot.ticket is not None for slot in self.slots.values())
        self.keeper.demand = (len(self.slots), running, len(self.queue))
        if self.run.rollout.mode == "lockstep":
            self._barrier()

    def note(self, kind: str, **body: Any) -> None:
        """Writes an event."""
        self.keeper.inbox.put(("note", (kind, body)))

    def stop(self) -> None:
        """Tells every process to end."""
        for peer in (*self._peers.values(), *(s.peer for s in self.slots.values())):
            self.channel.send("stop", {}, peer)

    # ---------------------------------------------------------- environments

    def _on_free(self, peer: bytes, body: dict[str, Any]) -> None:
        slot = self._slot(peer, body)
        slot.waiting = True
        if slot.ticket is not None:
            self._run(slot)  # it has not heard of it

    def _on_act(self, peer: bytes, body: dict[str, Any]) -> None:
        slot = self._slot(peer, body)
        slot.frame = Frame(body["image"], body["text"], body["t"], None)
        if body["slot"] in self.taken:
            self.taken[body["slot"]] = peer, body
        else:
            self._ask(peer, body)

    def _ask(self, peer: bytes, body: dict[str, Any]) -> None:
        if self.run.rollout.mode == "lockstep":
            self._held[body["slot"]] = (peer, body)
        else:
            self._send(self.router.ask(peer, body))

    def _on_done(self, peer: bytes, body: dict[str, Any]) -> None:
        slot = self._slot(peer, body)
        trajectory = decode(body["blob"])
        if slot.ticket is not None and slot.ticket.rollout == trajectory.id:
            slot.ticket = None
            self._held.pop(body["slot"], None)
        self.deaths = 0
        self.router.forget(trajectory.id)
        self.queue = [t for t in self.queue if t.rollout != trajectory.id]
        self.keeper.inbox.put(("done", (peer, body["blob"], trajectory)))

    def _on_died(self, peer: bytes, body: dict[str, Any]) -> None:
        self.deaths, self.last_death = self.deaths + 1, str(body["error"])
        slot = self.slots.get(body["slot"])
        ticket = slot.ticket if slot is not None else None
        if slot is None or ticket is None:
            self.note("environment_died", slot=body["slot"], error=body["error"])
        elif ticket.rollout == body["rollout"]:
            slot.ticket = None
            self._held.pop(body["slot"], None)
            self._lost(ticket, body["error"])

    def _lost(self, ticket: Ticket, error: str) -> None:
        self.router.forget(ticket.rollout)
        self.keeper.inbox.put(("died", (ticket, error)))

    def _slot(self, peer: bytes, body: dict[str, Any]) -> SlotView:
        slot = self.slots.setdefault(body["slot"], SlotView(peer))
        slot.peer = peer
        return slot

    def _assign(self) -> None:
        """Gives rollouts that wait to environments that wait."""
        free = [s for s in self.slots.values() if s.waiting and s.ticket is None]
        for slot, ticket in zip(free, list(self.queue), strict=False):
            self.queue.remove(ticket)
            slot.ticket = ticket
            name = next(n for n, s in self.slots.items() if s is slot)
            self.keeper.inbox.put(("begun", (ticket.rollout, name)))
            self._run(slot)

    def _run(self, slot: SlotView) -> None:
        assert slot.ticket is not None
        # Workers that are behind serve while others load, but not into the lag
        # that the run does not have.
        least = max(self.version - min(self.run.rollout.max_lag, 1), 0)
        body = {**slot.ticket._asdict(), "least": least}
        slot.waiting = False
        self.channel.send("run", body, slot.peer)

    def _barrier(self) -> None:
        """Lockstep: lets the requests go when every environment at work has asked."""
        running = sum(slot.ticket is not None for slot in self.slots.values())
        if self._held and len(self._held) >= running:
            held, self._held = self._held, {}
            for peer, body in held.values():
                self._send(self.router.ask(peer, body))

    # --------------------------------------------------------------- workers

    def _on_serve(self, peer: bytes, body: dict[str, Any]) -> None:
        self._peers[body["name"]] = peer
        self._send(self.router.join(body["name"], peer))

    def _on_acted(self, peer: bytes, body: dict[str, Any]) -> None:
        self.answers += 1
        for slot in self.slots.values():
            ticket, frame = slot.ticket, slot.frame
            if ticket is not None and ticket.rollout == body["rollout"] and frame:
                slot.frame = frame._replace(action=body["action"])
        self._send(self.router.answer(body["name"], body))

    def _on_loaded(self, peer: bytes, body: dict[str, Any]) -> None:
        self._send(self.router.loaded(body["name"], body["version"]))

    def _on_beat(self, peer: bytes, body: dict[str, Any]) -> None:
        name = body["name"]
        self._peers[name] = peer
        if name.startswith("host"):
            self.hosts.update(name, body["totals"])
        elif name.startswith("worker"):
            self.workers.update(name, body["totals"])
        self.channel.send("beat", {}, peer)

    def _on_trained(self, peer: bytes, body: dict[str, Any]) -> None:
        self.news.append(body)

    def _on_line(self, peer: bytes, body: dict[str, Any]) -> None:
        self.lines.append(str(body["line"]))

    def _on_finished(self, peer: bytes, body: dict[str, Any]) -> None:
        self.finished = True

    def _send(self, sends: list[Send]) -> None:
        for peer, kind, body in sends:
            self.channel.send(kind, body, peer)

    # -------------------------------------------------------------- a person

    def pause(self, task: str, paused: bool) -> None:
        """Lets no more rollouts of a task begin, or lets them."""
        self.keeper.inbox.put(("pause", (task, paused)))

    def take(self, slot: str) -> None:
        """Lets a person act in a slot, from its next step on."""
        self.taken.setdefault(slot, None)

    def release(self, slot: str) -> None:
        """Lets the policy act there again."""
        asked = self.taken.pop(slot, None)
        if asked is not None:
            self._ask(*asked)

    def act(self, slot: str, rollout: int, t: int, tokens: Any, action: Any) -> None:
        """A person's action number t in a slot that waits for it; else nothing.

        Args:
            slot: that was taken.
            rollout: that the person saw there.
            t: actions before it.
            tokens: int32 [token]: as the policy would have said it.
            action: `envs.api.Action`: what those mean.
        """
        asked = self.taken.get(slot)
        if asked is None or (asked[1]["rollout"], asked[1]["t"]) != (rollout, t):
            return
        self.taken[slot] = None
        peer, body = asked
        unknown = np.full(len(tokens), np.nan, np.float32)
        answer = {
            "rollout": body["rollout"],
            "t": t,
            "tokens": tokens,
            "logp": unknown,
            "entropy": unknown,
            "version": -1,
            "worker": -1,
            "action": plain_action(action),
        }
        self.channel.send("acted", answer, peer)

    # ------------------------------------------------- keeper and supervisor

    def _from_keeper(self) -> None:
        while not self.keeper.outbox.empty():
            kind, item = self.keeper.outbox.get()
            if kind == "tickets":
                self.queue += item[1]
            elif kind == "version":
                self.version = item.version
                self._send(self.router.publish(item))
            elif kind == "paused":
                self.paused = item
            elif kind == "stored":
                peer, trajectory, new = item
                self.channel.send("stored", {"rollout": trajectory.id}, peer)
                if new:
                    self.stored.append(trajectory)

    def gone(self, name: str) -> None:
        """A process has ended: what it did is another's now."""
        self.note("process_ended", name=name)
        self._peers.pop(name, None)
        if name.startswith("host"):
            self.hosts.retire(name)
            for slot in [s for s in self.slots if s.startswith(name + "/")]:
                ticket = self.slots.pop(slot).ticket
                self.taken.pop(slot, None)
                if ticket is not None:
                    self._lost(ticket, f"{name} ended")
            self._held = {k: v for k, v in self._held.items() if k in self.slots}
        elif name.startswith("worker"):
            self.workers.retire(name)
            self._send(self.router.leave(name))

    def utilisation(self) -> dict[str, float]:
        """Slot-seconds of each state since the run began; down: all that is left."""
        total = self.hosts.total()
        slots = self.run.envs.hosts * self.run.envs.slots
        known = {state: total.get(state, 0.0) for state in STATES}
        wall = (time.monotonic() - self._since) * slots
        known["down"] = max(wall - sum(known.values()) + known["down"], 0.0)
        return known
