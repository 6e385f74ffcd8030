"""Messages from people: files in `inbox/new`, moved to `inbox/cur` once taken in.

A maildir: written under another name and renamed, so a reader sees whole messages; no
port, several senders, works over ssh, and what is sent while the driver is dead waits
for it.
"""

import contextlib
import dataclasses
import getpass
import os
import secrets as random
import signal
import time
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from jaxlab.errors import UserError
from jaxlab.research.state import Study
from jaxlab.research.types import Interrupted, NeedsHuman, StoppedByPerson, ToolError
from jaxlab.research.workspace import Workspace

Command = Literal["say", "interrupt", "pause", "resume", "stop", "approve", "deny"]
LONGEST = 16_384


@dataclasses.dataclass(frozen=True)
class Message:
    """What a person sent."""

    id: str
    """sorts by time"""
    command: Command
    text: str = ""
    target: str = ""
    """what is approved or denied"""
    sender: str = ""


def send(ws: Workspace, command: Command, text: str = "", target: str = "") -> str:
    """Puts a message into the inbox; returns its id.

    Raises:
        UserError: the text is too long, or the inbox cannot be written.
    """
    if len(text) > LONGEST:
        raise UserError(
            f"a message has {LONGEST} characters at most, this one has {len(text)}; "
            "put the text into a file of the workspace's notes and say its name"
        )
    name = f"{time.time_ns():020d}-{random.token_hex(4)}"
    try:
        sender = getpass.getuser()
    except (KeyError, OSError):
        sender = str(os.getuid())
    message = Message(name, command, text, target, sender)
    try:
        ws.write_json(f"inbox/new/{name}.json", message)
    except OSError as error:
        raise UserError(f"cannot write {ws.root}/inbox: {error.strerror}") from error
    return name


def waiting(ws: Workspace) -> list[Message]:
    """Messages not taken in yet, oldest first; what is no message is set aside."""
    found = []
    try:
        names = sorted(os.listdir(ws.root / "inbox/new"))
    except FileNotFoundError:
        return []
    for name in names:
        if name.startswith("."):
            continue
        message = _read(ws, name)
        if message is None:
            with contextlib.suppress(OSError):
                os.replace(
                    ws.root / "inbox/new" / name, ws.root / "inbox/cur" / f"bad-{name}"
                )
        else:
            found.append(message)
    return found


def take(
    ws: Workspace, known: Container[str], append: Callable[..., Any]
) -> Iterator[Message]:
    """Takes messages in, oldest first: into the journal, then out of the way.

    Args:
        ws: the workspace.
        known: ids that the journal has; a driver that died in between takes no
            message twice.
        append: append("human", "human", **data) writes to the journal.
    """
    new, cur = ws.root / "inbox/new", ws.root / "inbox/cur"
    for message in waiting(ws):
        if message.id not in known:
            row = dataclasses.asdict(message)
            append("human", "human", message=row.pop("id"), **row)
        with contextlib.suppress(FileNotFoundError):
            os.replace(new / f"{message.id}.json", cur / f"{message.id}.json")
        yield message


class Desk:
    """The driver's side of the inbox."""

    def __init__(
        self,
        ws: Workspace,
        study: Study,
        append: Callable[..., Any],
        say: Callable[[str], Any],
        check_limits: Callable[[], None],
    ) -> None:
        self._ws, self._study, self._append = ws, study, append
        self._say, self._check_limits = say, check_limits
        self._signals: list[int] = []
        self._polled = 0.0
        self._waiting = False

    def poll(self) -> bool:
        """Whether a message waits; looks ten times a second at most.

        Raises:
            Interrupted: one that interrupts or stops, or a signal.
            BudgetSpent: a limit is reached.
        """
        now = time.monotonic()
        if now - self._polled >= 0.1:
            self._polled = now
            messages = waiting(self._ws)
            self._waiting = bool(messages)
            urgent = any(m.command in ("interrupt", "stop") for m in messages)
            if self._signals or urgent:
                raise Interrupted
            self._check_limits()
        return self._waiting

    def take(self) -> None:
        """Takes in what people sent; stays here while they pause the study.

        Raises:
            StoppedByPerson: they stop it, or a signal does.
        """
        paused = False
        while True:
            if self._signals:
                raise StoppedByPerson(signal.Signals(self._signals[0]).name)
            for message in take(self._ws, self._study.messages, self._append):
                self._say(told(message))
                if message.command != "say" and not message.text:
                    put_answer(self._ws, message.id, f"{message.command}: done")
                if message.command == "stop":
                    raise StoppedByPerson(message.text or "a person stopped the study")
                if message.command in ("pause", "resume", "interrupt"):
                    paused = message.command == "pause"
            self._waiting = False
            if not paused:
                return
            time.sleep(0.1)

    def verdict(self, target: str, what: str, patience: float) -> bool:
        """Waits for `approve` or `deny`.

        Raises:
            NeedsHuman: neither came in `patience` seconds.
        """
        verdicts = self._study.verdicts
        if target not in verdicts and target not in self._study.asked:
            self._append("driver", "approval_request", target=target, what=what)
            self._say(f"waits for `approve {target}`: {what}")
        until = time.monotonic() + patience
        while target not in verdicts:
            self.take()
            self._check_limits()
            if time.monotonic() > until:
                raise NeedsHuman(
                    f"{what} waits for `research.py approve {target}`; resume then"
                )
            time.sleep(0.05)
        return verdicts[target]

    def sleep(self, seconds: float) -> None:
        """Waits; a message ends it."""
        until = time.monotonic() + seconds
        with contextlib.suppress(Interrupted):
            while time.monotonic() < until and not self.poll():
                time.sleep(0.05)

    @contextlib.contextmanager
    def signals_noted(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the study in order, as a person's stop does."""

        def note(number: int, frame: Any) -> None:
            self._signals.append(number)

        numbers, old = (signal.SIGINT, signal.SIGTERM), []
        with contextlib.suppress(ValueError):  # not in the main thread
            old = [signal.signal(n, note) for n in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, old, strict=False):
                signal.signal(number, handler)


def _read(ws: Workspace, name: str) -> Message | None:
    """A message file; None: it is not one."""
    path = f"inbox/new/{name}"
    try:
        if Path(ws.root, path).lstat().st_size > 8 * LONGEST:
            return None
        row = ws.read_json(path)
        message = Message(**row)
    except (ToolError, TypeError, OSError, ValueError):
        return None
    texts = (message.id, message.text, message.target, message.sender)
    good = (
        all(isinstance(text, str) for text in texts)
        and message.command in get_args(Command)
        and f"{message.id}.json" == name
        and len(message.text) <= LONGEST
    )
    return message if good else None


def put_answer(ws: Workspace, message: str, text: str) -> None:
    """Adds to what became of a message, in `outbox/<id>.json`."""
    path = f"outbox/{message}.json"
    answers = ws.read_json(path)["answers"] if ws.exists(path) else []
    ws.write_json(path, {"message": message, "answers": [*answers, text]})


def told(message: Message) -> str:
    """A message in a line."""
    words = (f"{message.sender or 'a person'}:", message.command, message.target)
    return " ".join(filter(None, (*words, message.text)))
