"""A closer look at a running program, on request and between two steps.

The step times of a program that was not split tell that it has become slow and not
where. The supervisor then asks all ranks to look, from one step on: they profile some
steps (`profile`), or probe the links (`probe`). Both need all ranks at the same step,
so a request names one that lies ahead; a rank that is told too late makes the others
wait, which the supervisor sees as a hang and ends as one.

A healthy profile comes first (`learn`): each rank keeps it and, as all have the same,
all see alike whether the communication has grown; then the links are probed at once,
by programs that were compiled when they learned.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from jaxlab.files import write_text
from jaxlab.health.detect import Diagnosis, Kind, Phase, few
from jaxlab.health.probe import ppermute_probe
from jaxlab.health.profile import collective_times, profiled
from jaxlab.health.record import Recorder
from jaxlab.health.reports import told_delays

KINDS = ("learn", "profile", "probe")
STEPS = 20
"""steps that are profiled at most, one of which only says when the next began"""
LEAST = 0.1
"""part of a step; what it has become longer by less is no slowness"""
SHARE = 0.5
"""part of what a step has become longer by that its cause must explain"""
TICK = 0.005
"""seconds; a process that is late by less has not paused"""


class Looks:
    """Reads requests and carries them out; wraps a step."""

    def __init__(self, request: str | Path, result: str | Path, recorder: Recorder):
        """`request` is the file of the agent, `result` that of rank 0's answer."""
        self._request, self._result = Path(request), Path(result)
        self._recorder = recorder
        self._seen = 0
        self._due: dict[str, Any] | None = None
        self._profile: contextlib.ExitStack | None = None
        self._found: list[Any] = []
        self._asked: dict[str, Any] = {}
        self._healthy: Times | None = None
        self._left = 0

    def wrap(self, step_fn: Callable[..., Any]) -> Callable[..., Any]:
        """A function like `step_fn`, before and after which requests are served."""

        def looked(*args: Any, **kwargs: Any) -> Any:
            self._before(args)
            out = step_fn(*args, **kwargs)
            self._after(out)
            return out

        return looked

    def _before(self, args: Any) -> None:
        refused = OSError, KeyError, TypeError, ValueError, OverflowError
        with contextlib.suppress(*refused):
            changed = os.stat(self._request).st_mtime_ns
            if changed != self._seen:
                self._seen, self._due = changed, _checked(self._request.read_text())
        due = self._due
        if due is None or self._recorder.current < due["step"]:
            return
        self._due = None
        if self._recorder.current > due["step"]:
            return  # of an earlier generation: nobody takes it up
        jax.block_until_ready(args)
        if due["kind"] == "probe":
            with self._recorder.phase(Phase.OTHER):
                delay = ppermute_probe(one_device_each())
            self._tell(due["id"], {"delay": told_delays(delay)})
            return
        self._profile, self._asked = contextlib.ExitStack(), due
        self._left = due["steps"]
        self._found = self._profile.enter_context(profiled())
        self._paused = self._profile.enter_context(pauses())

    def _after(self, out: Any) -> None:
        if self._profile is None:
            return
        self._left -= 1
        if self._left:
            return
        jax.block_until_ready(out)
        paused = np.float32(sum(self._paused) / self._asked["steps"])
        with self._recorder.phase(Phase.OTHER):
            self._profile.close()
            self._profile = None
            try:
                found = collective_times(self._found[0]).per_process()
            except ValueError as error:  # a program without collectives, say
                self._tell(self._asked["id"], {"failed": str(error)})
                return
            every = np.atleast_1d(multihost_utils.process_allgather(paused))
            times = Times(
                found.step,
                found.wait,
                found.local,
                found.pure_comm,
                paused=every[None].astype(float),
            )
            told = {name: x.tolist() for name, x in times._asdict().items()}
            if self._asked["kind"] == "learn":
                self._healthy = times
                ppermute_probe(one_device_each(), reps=1, retries=0)  # compiles
            elif self._healthy is not None:
                if compare(self._healthy, times).kind == Kind.COMM_SLOW:
                    delay = ppermute_probe(one_device_each())
                    told["delay"] = told_delays(delay)
        self._tell(self._asked["id"], told)

    def _tell(self, number: int, found: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            write_text(self._result, json.dumps({"id": number, **found}))


def _checked(text: str) -> dict[str, Any] | None:
    """A request, or None."""
    found = json.loads(text)
    if not isinstance(found, Mapping) or found.get("kind") not in KINDS:
        return None
    steps = min(max(int(found["steps"]), 2), STEPS)
    whole = {name: int(found[name]) for name in ("step", "id")}
    return {**found, **whole, "steps": steps}


def one_device_each() -> Mesh:
    """A mesh of one device of each process, in their order."""
    first = {d.process_index: d for d in reversed(jax.devices())}
    devices = np.array([first[i] for i in sorted(first)])
    return Mesh(devices, ("rank",), axis_types=(AxisType.Auto,))


@contextlib.contextmanager
def pauses() -> Iterator[list[float]]:
    """Within the block: the seconds by which a thread that ticks was late.

    That is when the process did not run: it was stopped, a quota held it back, others
    had the processors, or code that keeps the interpreter's lock went on for long.
    """
    late: list[float] = []
    over = threading.Event()

    def tick() -> None:
        before = time.monotonic()
        while not over.wait(TICK):
            now = time.monotonic()
            if now - before > 2 * TICK:
                late.append(now - before - TICK)
            before = now

    thread = threading.Thread(target=tick, name="jaxlab-pauses", daemon=True)
    thread.start()
    try:
        yield late
    finally:
        over.set()
        thread.join()


class Times(NamedTuple):
    """What a profile found, seconds of T steps on n ranks."""

    step: np.ndarray
    """[T, n]"""
    wait: np.ndarray
    """[T, n]"""
    local: np.ndarray
    """[T, n]"""
    pure_comm: np.ndarray
    """[T]"""
    paused: np.ndarray
    """[1, n]: for which the rank's process did not run, mean of a step (`pauses`)"""


def read(body: Mapping[str, Any]) -> Times:
    """The answer to a request for a profile.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    times = Times(*(np.array(body[name], float) for name in Times._fields))
    if times.step.ndim != 2 or not times.step.size:
        raise ValueError("the profile has no steps")
    if not times.step.shape == times.wait.shape == times.local.shape:
        raise ValueError("the profile's tables differ in shape")
    if times.paused.shape != (1, times.step.shape[1]):
        raise ValueError("the profile's ranks differ in number")
    if times.pure_comm.shape != times.step.shape[:1]:
        raise ValueError("the profile's communication is not that of its steps")
    if not all(np.isfinite(table).all() for table in times):
        raise ValueError("the profile has times that are not finite")
    return times


def compare(before: Times, now: Times) -> Diagnosis:
    """Why steps take longer than they did, from a profile of each time.

    A rank is to blame if the time that its process did not run has grown, beyond what
    the others' has, by at least half of what the step has: it is late in its part of
    the collectives, and that looks like slow communication. If there is none, the
    communication is, if it has grown by half: who waits for a late message begins its
    own work late, which looks like more of it. Else a rank is whose own work has grown
    so. Medians over steps.

    Args:
        before: healthy, one column a rank.
        now: the same ranks.
    """

    def median(x):
        return np.median(np.asarray(x, float), axis=0)

    step = float(np.median(median(before.step)))
    longer = float(np.median(median(now.step))) - step
    text = f"steps have become {longer * 1e3:.3g} ms longer"

    def blamed(cause, before, now):
        """The ranks of which this has grown, beyond what the others' has."""
        own = median(now) - median(before)
        if len(own) > 1:
            own = own - [np.median(np.delete(own, i)) for i in range(len(own))]
        ranks = tuple(int(i) for i in np.flatnonzero(own > SHARE * longer))
        if not ranks:
            return None
        most = float(own[list(ranks)].max())
        words = f"{text}, and by {most * 1e3:.3g} ms the {cause} of rank {few(ranks)}"
        certain = 1 - SHARE * longer / (2 * most)
        return Diagnosis(Kind.NONCOMM_SLOW, ranks, (), "rank", words, certain)

    if longer <= LEAST * step:
        words = f"steps are as short as they were, {longer * 1e3:+.3g} ms"
        return Diagnosis(Kind.HEALTHY, evidence=words, confidence=0.5)
    # Who waits for a rank that pauses, or for a late message, begins its own work late.
    if found := blamed("pauses", before.paused, now.paused):
        return found
    comm = float(median(now.pure_comm) - median(before.pure_comm))
    if comm > SHARE * longer:
        text += f", the communication by {comm * 1e3:.3g} ms"
        certain = 1 - SHARE * longer / (2 * comm)
        return Diagnosis(Kind.COMM_SLOW, (), (), "none", text, certain)
    if found := blamed("own work", before.local, now.local):
        return found
    local = float(np.median(median(now.local) - median(before.local)))
    text += f", the own work of all by {local * 1e3:.3g} ms"
    return Diagnosis(Kind.NONCOMM_SLOW, (), (), "all", text, 0.5)
