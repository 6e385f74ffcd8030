"""A web page to watch a run by: environments live, stored episodes, and one's own hand.

    python scripts/train.py configs/gui_pix.py --page 0     # prints the address

It shows what every environment shows, replays stored episodes, pauses tasks, and lets a
person take over an environment: that one's next actions are the person's, carried out
as the policy could say them, and a success goes to the experience pool as `human`.

The server is on a thread of its own and does not touch the hub: what it shows is copied
for it by `turn`, in the run's main loop, and what people ask for waits in a queue until
then. It reads the store through a connection of its own.

Only who knows the token gets an answer: the address printed holds it, and a cookie that
no other site can use or read keeps it. The server listens on loopback, answers for its
own name alone (no other site's name can be made to point here), and its page loads
nothing from anywhere else. On another host's page: ssh -L PORT:127.0.0.1:PORT.
"""

import contextlib
import functools
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxlab.errors import UserError
from jaxlab.rl.config import RLRun
from jaxlab.rl.envs.api import Action, parse_action
from jaxlab.rl.hub import Hub
from jaxlab.rl.page_app import App

COPY = 0.1
"""seconds between two copies of what is shown"""
IDLE = 120.0
"""seconds without an action after which a taken environment is given back"""


class View(NamedTuple):
    """An environment as the page shows it."""

    task: str
    seed: int
    text: str
    """the instruction"""
    t: int
    """actions so far"""
    action: str
    """the newest one, in words; empty: it is waited for"""
    image: np.ndarray | None
    """uint8 [height, width, 3]"""
    taken: bool
    """by a person"""
    asking: bool
    """for that person's action"""
    rollout: int
    """which episode of the run it is"""


class Shown(NamedTuple):
    """All that the page shows, at one moment; nothing in it changes."""

    slots: dict[str, View]
    tasks: list[dict[str, Any]]
    figures: dict[str, float]
    actions: dict[str, Any]
    """what may be done: kinds and their arguments, keys, words"""


class Site:
    """What the main loop and the server share.

    Args:
        run: what is run.
        token: that a visitor must know.
        port: on loopback.
    """

    def __init__(self, run: RLRun, token: str, port: int) -> None:
        self.run, self.token, self.port = run, token, port
        self.wishes: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.shown = Shown({}, [], {}, {})
        self._copied = 0.0
        self._acted: dict[str, float] = {}

    @property
    def address(self) -> str:
        """Where it is, token included."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    # ------------------------------------------------------------ in the main loop

    def turn(self, hub: Hub) -> None:
        """Does what people asked for, and copies what is to be shown."""
        while True:
            try:
                wish = self.wishes.get_nowait()
            except queue.Empty:
                break
            self._grant(hub, wish)
        now = time.monotonic()
        for slot in [s for s, at in self._acted.items() if now - at > IDLE]:
            self._grant(hub, {"do": "release", "slot": slot})
        if now - self._copied >= COPY:
            self._copied = now
            self.shown = self._look(hub)

    def _grant(self, hub: Hub, wish: dict[str, Any]) -> None:
        kind, slot = wish["do"], wish.get("slot", "")
        if kind == "pause":
            hub.pause(wish["task"], wish["paused"])
        elif kind == "take" and slot in hub.slots:
            hub.take(slot)
            self._acted[slot] = time.monotonic()
        elif kind == "release":
            hub.release(slot)
            self._acted.pop(slot, None)
        elif kind == "act" and slot in self._acted:
            self._acted[slot] = time.monotonic()
            tokens = self.policy.tokens(wish["action"])
            action = self.policy.action(tokens)
            hub.act(slot, wish["rollout"], wish["t"], tokens, action)

    @functools.cached_property
    def policy(self) -> Any:
        """Says what a person does as the policy could."""
        from jaxlab.rl.cluster import make_env

        env = make_env(self.run.envs)
        try:
            return self.run.policy.build(env.observation_space)
        finally:
            env.close()

    def _look(self, hub: Hub) -> Shown:
        slots = {}
        for name, slot in sorted(hub.slots.items()):
            ticket, frame = slot.ticket, slot.frame
            if frame is None:
                continue
            slots[name] = View(
                "" if ticket is None else ticket.task,
                -1 if ticket is None else ticket.seed,
                frame.text,
                frame.t,
                "" if frame.action is None else str(_read(frame.action)),
                frame.image,
                name in hub.taken,
                hub.taken.get(name) is not None,
                -1 if ticket is None else ticket.rollout,
            )
        tasks = [
            {"task": task, "paused": task in hub.paused} for task in self.run.envs.tasks
        ]
        figures = {f"env_{state}": value for state, value in hub.utilisation().items()}
        figures |= {"version": hub.version}
        return Shown(slots, tasks, figures, self._choices)

    @functools.cached_property
    def _choices(self) -> dict[str, Any]:
        from jaxlab.rl.envs.api import ARGUMENTS, FIELDS, KEYS

        return {
            "kinds": {kind.name: list(names) for kind, names in ARGUMENTS.items()},
            "keys": list(KEYS),
            "fields": FIELDS,
            "words": list(self.vocabulary),
        }

    @functools.cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Words that can be typed."""
        from jaxlab.rl.cluster import make_env

        env = make_env(self.run.envs)
        try:
            return tuple(env.unwrapped.vocabulary)
        finally:
            env.close()


@contextlib.contextmanager
def serve(run: RLRun) -> Iterator[Site]:
    """A web page of a run at `run.page`, until the block is left.

    Args:
        run: what is run; `Site.turn` must be called in its main loop.

    Raises:
        UserError: the port is taken, or Starlette or uvicorn is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise UserError(
            "the page needs Starlette and uvicorn: pip install 'jaxlab[web]'"
        ) from None
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", run.page or 0))
        listener.listen()  # who comes before the server is up, waits
    except OSError as error:
        listener.close()
        raise UserError(
            f"page {run.page}: {error.strerror}; give another port"
        ) from None
    site = Site(run, secrets.token_urlsafe(24), listener.getsockname()[1])
    config = uvicorn.Config(
        App(site).build(),
        log_level="error",
        access_log=False,  # it would hold the token
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, args=([listener],), daemon=True, name="page"
    )
    thread.start()
    try:
        yield site
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def _read(action: dict[str, Any]) -> Action:
    return parse_action(action, 1 << 30)[0]
