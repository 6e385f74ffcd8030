"""Tells somebody else what the supervisor has found: a command or a web address.

Each event is one JSON object, a command's standard input or the body of a POST, in the
order in which they happened. A thread delivers them, so a hook that is slow or broken
delays nobody.
"""

import contextlib
import json
import queue
import shlex
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxlab.errors import ConfigError

TOLD = frozenset(
    "diagnosis restart reorder resigned recovered lost takeover give_up done".split()
)
"""events that a hook gets"""
WAITING = 1000
"""events that wait for delivery at most; later ones are dropped"""

Tell = Callable[[Mapping[str, Any]], None]


@contextlib.contextmanager
def hook(
    target: str, complain: Callable[[str], Any], timeout: float = 10.0
) -> Iterator[Tell]:
    """A function that tells the target an event, at some later time.

    Args:
        target: `http://...` or `https://...`, a command with its arguments (without a
            shell), or "": nobody is told.
        complain: takes a line if the target cannot be told; once, until it can again.
        timeout: seconds for a delivery, and for what is left at the end.

    Raises:
        ConfigError: the command cannot be split into words.
    """
    if not target:
        yield lambda event: None
        return
    deliver = _deliverer(target, timeout)
    events: queue.Queue[bytes | None] = queue.Queue(WAITING)

    def run() -> None:
        broken = False
        for body in iter(events.get, None):
            try:
                deliver(body)
                broken = False
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                if not broken:
                    complain(f"the hook {target} fails: {error}")
                broken = True

    def tell(event: Mapping[str, Any]) -> None:
        if event.get("event") in TOLD:
            with contextlib.suppress(queue.Full):
                events.put_nowait(json.dumps(event).encode())

    thread = threading.Thread(target=run, name="jaxlab-hook", daemon=True)
    thread.start()
    try:
        yield tell
    finally:
        with contextlib.suppress(queue.Full):
            events.put(None, timeout=timeout)
        thread.join(timeout)


def _deliverer(target: str, timeout: float) -> Callable[[bytes], None]:
    if target.startswith(("http://", "https://")):

        def post(body: bytes) -> None:
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(target, body, head)
            urllib.request.urlopen(request, timeout=timeout).close()

        return post
    words = _split(target)

    def run(body: bytes) -> None:
        subprocess.run(words, input=body, timeout=timeout, check=True)

    return run


def _split(command: str) -> Sequence[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--hook {command}: {error}") from None
    if not words:
        raise ConfigError("--hook has no words")
    return words
