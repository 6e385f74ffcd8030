"""The journal: one JSON event a line, chained by hashes, on disk before it counts.

It is the only truth of a study; all else in a workspace but blobs, runs and what
people wrote can be made again from it. One process writes (a lock), a line that a
crash tore is cut off at the next start, and every hash is computed anew at load. The
chain shows accidents and edits; whoever rewrites all of it leaves no trace, since
there is no key.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError

SCHEMA = 1


class JournalError(UserError):
    """The journal was edited, belongs to another version, or is being written."""


@dataclasses.dataclass(frozen=True)
class Event:
    """One line of the journal."""

    i: int
    """number from 0"""
    t: float
    """seconds since 1970"""
    agent: str
    """who; "driver" and "human" beside the agents' names"""
    kind: str
    """what; see `jaxlab.research.types`"""
    data: dict[str, Any]
    """what belongs to it, plain JSON"""
    prev: str
    """hash of the event before, "" for the first"""
    hash: str
    """SHA-256 of all the above"""


def digest(row: dict[str, Any]) -> str:
    """SHA-256 of a JSON value in canonical form (hash fields left out by the caller).

    Raises:
        ValueError: a number that JSON has no form for (nan, infinity).
    """
    return hashlib.sha256(canonical(row).encode()).hexdigest()


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no nan."""
    return json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )


class Journal:
    """The journal of a workspace, open for its one writer; see `open_journal`."""

    def __init__(
        self,
        path: Path,
        handle: int,
        events: list[Event],
        clean: Callable[[str], str],
        fsync: Callable[[int], None],
        clock: Callable[[], float],
    ) -> None:
        self.path, self.events = path, events
        self._handle, self._clean, self._fsync, self._clock = (
            handle,
            clean,
            fsync,
            clock,
        )

    def now(self) -> float:
        """Seconds since 1970, by the clock of the events."""
        return self._clock()

    def append(self, agent: str, kind: str, /, **data: Any) -> Event:
        """Adds an event; on disk when this returns.

        Secrets are taken out of the text first. After a failed write (a full disk)
        the file is cut back to its last whole event.

        Raises:
            JournalError: the file could not be written.
        """
        data = json.loads(self._clean(canonical(data)))
        prev = self.events[-1].hash if self.events else ""
        row = {
            "i": len(self.events),
            "t": self._clock(),
            "agent": agent,
            "kind": kind,
            "data": data,
            "prev": prev,
        }
        event = Event(**row, hash=digest(row))
        line = (canonical(dataclasses.asdict(event)) + "\n").encode()
        end = os.lseek(self._handle, 0, os.SEEK_END)
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._handle, left) :]
            self._fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, end)
            raise JournalError(
                f"cannot write {self.path}: {error.strerror}; the study goes on from "
                "its last event when that is mended (`research.py resume`)"
            ) from error
        self.events.append(event)
        return event


@contextlib.contextmanager
def open_journal(
    path: Path,
    *,
    clean: Callable[[str], str] = lambda text: text,
    fsync: Callable[[int], None] = os.fsync,
    clock: Callable[[], float] = time.time,
) -> Iterator[Journal]:
    """Opens a journal for writing, made if absent; locked until left.

    Args:
        path: the file; its folder exists.
        clean: takes secrets out of a line's text.
        fsync: called with the descriptor after each line (tests crash there).
        clock: seconds since 1970.

    Raises:
        JournalError: another process writes it, or `read_journal` refuses it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalError(
                f"another process drives the study of {path.parent}; "
                "send it a message with `research.py say`, or stop it"
            ) from None
        events, whole = _load(path)
        if whole < os.fstat(handle).st_size:
            os.ftruncate(handle, whole)
            os.fsync(handle)
        yield Journal(path, handle, events, clean, fsync, clock)
    finally:
        os.close(handle)


def locked(path: Path) -> bool:
    """Whether some process holds the journal open for writing."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def read_journal(path: Path) -> list[Event]:
    """The events of a journal, without its lock; a torn last line is left out.

    Raises:
        JournalError: no such file, another schema, or an event that was changed,
            with its number.
    """
    return _load(path)[0]


def _load(path: Path) -> tuple[list[Event], int]:
    """Events, and the bytes that they take up."""
    try:
        body = path.read_bytes()
    except OSError as error:
        raise JournalError(
            f"cannot read {path}: {error.strerror}; is this a workspace?"
        ) from error
    events: list[Event] = []
    whole = body.rfind(b"\n") + 1
    prev = ""
    for i, line in enumerate(body[:whole].splitlines()):
        try:
            row = json.loads(line)
            event = Event(**row)
            good = row.pop("hash") == digest(row)
        except (ValueError, TypeError, KeyError) as error:
            raise JournalError(f"{path}: event {i} is unreadable ({error})") from None
        if not good or event.i != i or event.prev != prev:
            raise JournalError(
                f"{path}: event {i} was changed since it was written; restore the file "
                "from a copy, or start a new workspace"
            )
        if i == 0 and event.data.get("schema", SCHEMA) != SCHEMA:
            raise JournalError(
                f"{path}: schema {event.data['schema']}, but this jaxlab writes "
                f"{SCHEMA}; use the version that made it"
            )
        events.append(event)
        prev = event.hash
    return events, whole
