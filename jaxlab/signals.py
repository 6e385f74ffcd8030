"""SIGTERM and SIGINT as a request to stop after the step under way."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that gets a signal's name when SIGTERM or SIGINT asks to stop.

    A second signal ends at once. In a job of several processes JAX's own preemption
    notice takes SIGTERM on any of them, and SIGINT is passed on as one.
    """
    asked: list[str] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    def forward(number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = {signal.SIGINT: note, signal.SIGTERM: note}
    if jax.process_count() > 1:
        handlers = {signal.SIGINT: forward}
    before = {number: signal.signal(number, h) for number, h in handlers.items()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_agreed(asked: list[str], step: int) -> bool:
    """Whether to stop after this step; every process gets the same answer."""
    if jax.process_count() == 1:
        return bool(asked)
    return multihost_utils.reached_preemption_sync_point(step)
