"""What a training process does under a supervisor: it records, and looks when asked.

`monitor()` is all that a training script needs; without a supervisor it does nothing::

    with monitor() as health:
        step_fn = health.wrap(jax.jit(train_step))
        for step in range(...):
            health.step(step)
            state, metrics = step_fn(state, batch)
            with health.pause("checkpoint"):
                save(state)
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlab.health.agent import BOARD, LOOKED, REQUEST
from jaxlab.health.detect import Phase

SMALLER = "JAXLAB_HEALTH_SMALLER"
"""the variable that has `Monitor.smaller`, as JSON"""
PAUSES = {"checkpoint": Phase.CHECKPOINT, "evaluation": Phase.EVALUATION}
"""Names of pauses that have a limit of their own."""


class Monitor:
    """Nothing, for a process without a supervisor."""

    def step(self, step: int) -> None:
        """Says which step comes next."""

    def pause(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Says that the rank does something else than steps, such as "checkpoint"."""
        return contextlib.nullcontext()

    def wrap(self, step_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The step, watched; its last result must not be donated."""
        return step_fn

    def smaller(self) -> dict[int, list[str]]:
        """Numbers of processes that the job may go on with after a fault.

        Each with what its command line would have besides.
        """
        return {}


class _Supervised(Monitor):
    def __init__(self, recorder: Any, folder: Path) -> None:
        self._recorder, self._folder = recorder, folder

    def step(self, step: int) -> None:
        self._recorder.step(step)

    def pause(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return self._recorder.phase(PAUSES.get(name, Phase.OTHER))

    def wrap(self, step_fn: Callable[..., Any]) -> Callable[..., Any]:
        from jaxlab.health.look import Looks
        from jaxlab.health.record import watch

        looks = Looks(self._folder / REQUEST, self._folder / LOOKED, self._recorder)
        return looks.wrap(watch(step_fn, self._recorder))

    def smaller(self) -> dict[int, list[str]]:
        found = json.loads(os.environ.get(SMALLER) or "{}")
        return {int(count): list(words) for count, words in found.items()}


@contextlib.contextmanager
def monitor() -> Iterator[Monitor]:
    """The supervisor's view of this process, from here to the end of the block.

    Raises:
        UserError: the board cannot be written.
    """
    path = os.environ.get(BOARD)
    if path is None:
        yield Monitor()
        return
    from jaxlab.health.record import Recorder

    with contextlib.ExitStack() as stack:
        rank = int(os.environ.get("JAX_PROCESS_ID", 0))
        recorder = stack.enter_context(Recorder(path, rank))
        stack.enter_context(recorder.tell_collections())
        yield _Supervised(recorder, Path(path).parent)
