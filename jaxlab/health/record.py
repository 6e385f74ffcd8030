"""What a training process tells of itself while it runs: a board in a mapped file.

C4 (arXiv:2406.04594) reads the state of every rank from its collective library.
Here each process has one small file, the board, that another process of the host
reads at any time, also when the writer is stopped, stuck or dead:

- a heartbeat, written by a thread of its own. It goes on while the main thread waits
  in native code that has released the interpreter lock (a collective, a sleep). Code
  that keeps the lock stops it: such a process looks frozen, as it is;
- `progress`, when the rank last arrived, left, or changed its phase;
- `enter_seq`, `exit_seq`: how many synchronisations the rank arrived at and left;
- the phase (`jaxlab.health.detect.Phase`) and the number of the step;
- the last samples: when each step began, arrived and ended, and for how long of the
  time in between the process did not run: its heart was late. So it is where a quota
  or a signal holds it back, others have the processors, or code keeps the lock.

Times are `time.monotonic()` in seconds: comparable between processes of one host, and
only as differences between hosts.

`/dev/shm` is the best place for a board: no disk can delay a write there.
"""

import atexit
import collections
import contextlib
import functools
import gc
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlab.health.board import (
    MOST,
    RankState,
    State,
    create,
    read_board,
    read_boards,
    write_sample,
    write_state,
)
from jaxlab.health.detect import Phase, RankSample

__all__ = ["RankState", "Recorder", "instrument", "read_board", "read_boards", "watch"]

LATE = 0.05
"""seconds by which the heart is late where its process did not run"""
HASTE = 1.0
"""seconds after such a pause in which it beats faster, to measure the next ones"""
FAST = 0.01
"""seconds between its beats then"""


class Recorder:
    """The writer of a board; every method may be called from any thread.

    `step`, `enter` and `exit` are for loops that stamp themselves; `instrument` and
    `watch` call them. `close` marks the rank as done and leaves the file.
    """

    def __init__(
        self,
        path: str | Path,
        rank: int,
        *,
        period: float = 0.1,
        ring: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes the board at `path`, replacing one of an earlier process.

        Args:
          path: the file; its folder exists.
          rank: of the process in the job.
          period: seconds between heartbeats.
          ring: samples kept.
          clock: seconds; another one only where no reader compares it with its own.

        Raises:
          ValueError: a period, ring or rank out of range.
          UserError: the file cannot be written, or is something else than a board.
        """
        if period <= 0 or not 0 < ring <= MOST or not 0 <= rank < 2**32:
            raise ValueError(f"rank {rank}, period {period}, ring {ring}: out of range")
        self.path, self.rank, self.ring = Path(path), rank, ring
        self._clock, self._period = clock, period
        self._lock, self._stop = threading.RLock(), threading.Event()
        self._sequence = itertools.count(1)
        # Arrived and not gone yet: step, moment, tag and what it had paused until then,
        # in the order of arrival.
        self._inside: collections.deque[tuple[int, float, int, float]]
        self._inside = collections.deque()
        self._watchers: list[_Watcher] = []
        now = self._begin = clock()
        self._paused = self._paused_begin = 0.0
        self._due, self._haste = math.inf, -math.inf
        self._state = State(now, now, 0, 0, -1, Phase.STARTING, 0)
        self._numbered = self._collecting = False
        self._map = create(self.path, rank, ring)
        self._publish()
        self._thread = threading.Thread(
            target=self._beat, name="jaxlab-heartbeat", daemon=True
        )
        self._thread.start()
        # The heart beats on while a process takes its time to end.
        atexit.register(self._unwatch)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        # A rank that failed is not done: it lives, and keeps the others waiting.
        self._unwatch() if kind else self.close()

    def close(self) -> None:
        """Marks the rank as done; nothing is written afterwards.

        As a context manager a recorder does so where nothing was raised.
        """
        self._unwatch()
        atexit.unregister(self._unwatch)
        self._stop.set()
        self._thread.join(timeout=1.0)
        with self._lock:
            self._publish(phase=int(Phase.DONE), progress=self._clock())
            self._map.close()

    def _unwatch(self) -> None:
        """Ends the watchers: a thread in native code must not outlive Python."""
        while self._watchers:
            self._watchers.pop().end()

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Says that the rank does something else than steps; may be nested."""
        before = self._state.phase
        self._change(phase)
        try:
            yield
        finally:
            self._change(before)

    @contextlib.contextmanager
    def tell_collections(self) -> Iterator[None]:
        """Says when Python collects all its garbage, as a pause of its own."""

        def told(moment: str, info: dict[str, int]) -> None:
            if info["generation"] < 2:
                return
            with self._lock:
                if moment == "start" and self._state.phase == Phase.STEP:
                    self._collecting = True
                    self._change(Phase.OTHER)
                elif moment == "stop" and self._collecting:
                    self._collecting = False
                    if self._state.phase == Phase.OTHER:
                        self._change(Phase.STEP)

        gc.callbacks.append(told)
        try:
            yield
        finally:
            gc.callbacks.remove(told)

    def step(self, step: int) -> None:
        """Says which step comes next."""
        with self._lock:
            self._numbered = True
            self._publish(step=step)
            # A watched program is still starting until it is compiled.
            if self._state.phase == Phase.STARTING and not self._watchers:
                self._change(Phase.STEP)

    @property
    def current(self) -> int:
        """The step that comes next, or is under way; -1: none yet."""
        return self._state.step

    def enter(self, step: int | None = None) -> None:
        """The rank arrived where it waits for others, in `step` (None: the current)."""
        with self._lock:
            self._awake()
            now, state = self._clock(), self._state
            at = state.step if step is None else step
            # A host that runs ahead of a device that hangs makes no progress.
            progress = state.progress if self._inside else now
            self._inside.append((at, now, state.phase, self._paused))
            self._publish(enter_seq=state.enter_seq + 1, progress=progress)

    def exit(self, tag: int | None = None) -> None:
        """What the rank arrived at first has ended: one sample more.

        Its phase is `tag`, or that in which the rank arrived.

        The sample begins where the one before it ended, or where a phase ended if
        that was later: what the host does between two steps is local time. Where the
        host arrives early, because it runs ahead of the device, arrival is then.

        Raises:
          ValueError: the rank is not inside anything.
        """
        with self._lock:
            if not self._inside:
                raise ValueError("exit without enter: call enter() first")
            self._awake()
            now = self._clock()
            step, arrived, phase, paused = self._inside.popleft()
            phase = phase if tag is None else tag
            start = min(self._begin, now)
            paused = self._paused - max(paused, self._paused_begin)
            entered = max(arrived, start)
            sample = RankSample(step, start, entered, now, int(phase), paused)
            self._begin, self._paused_begin = now, self._paused
            state = self._state
            if not self._map.closed:
                write_sample(self._map, state.count, self.ring, sample)
            self._publish(
                exit_seq=state.exit_seq + 1, count=state.count + 1, progress=now
            )

    def _next(self) -> int:
        """The number of the step that is dispatched now."""
        with self._lock:
            if not self._numbered:
                self._publish(step=self._state.step + 1)
            self._numbered = False
            return self._state.step

    def _change(self, phase: int) -> None:
        with self._lock:
            now = self._clock()
            if self._state.phase != Phase.STEP:
                # The time of another phase is no step's.
                self._begin, self._paused_begin = now, self._paused
            self._publish(phase=int(phase), progress=now)

    def _publish(self, **changes: Any) -> None:
        """Writes the state to the older slot."""
        self._state = self._state._replace(**changes)
        if not self._map.closed:
            write_state(self._map, next(self._sequence), self._state)

    def _awake(self) -> float:
        """Notes for how long the process did not run until now; says when that is."""
        now = time.monotonic()  # also where the clock is another one
        if now - self._due > LATE:
            self._paused += now - self._due
            self._due, self._haste = now, now + HASTE
        return now

    def _beat(self) -> None:
        interval = self._period
        self._due = time.monotonic() + interval
        while not self._stop.wait(interval):
            with self._lock:
                now = self._awake()
                self._publish(heartbeat=self._clock())
                interval = min(FAST if now < self._haste else math.inf, self._period)
                self._due = now + interval


class _Watcher:
    """A thread that stamps when arrays become ready, so that dispatch need not wait."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._last = recorder, None
        self._tag, self._traced = int(Phase.STEP), False
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, name="jaxlab-watcher", daemon=True
        )
        self._thread.start()
        recorder._watchers.append(self)
        _listen()

    def end(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=1.0)

    @contextlib.contextmanager
    def dispatch(self) -> Iterator[int]:
        """Around the dispatch of a step, of which it gives the number.

        A compilation in it is no time of a step, and is tagged so.
        """
        recorder = self._recorder
        step, phase = recorder._next(), recorder._state.phase
        self._tag, self._traced = phase, False
        _dispatching.watcher = self
        try:
            yield step
        finally:
            _dispatching.watcher = None
            if phase == Phase.STARTING or self._traced:
                recorder._change(Phase.STEP)

    def traced(self) -> None:
        """The step that is dispatched will be compiled."""
        if self._tag == Phase.STEP:
            self._tag, self._traced = int(Phase.OTHER), True
            self._recorder._change(Phase.OTHER)

    def arrives(self, step: int, marker: jax.Array) -> None:
        self._put(marker, lambda: self._recorder.enter(step))

    def leaves(self, result: jax.Array) -> None:
        if self._last is not None and self._last.is_deleted():
            raise ValueError(
                "the array whose readiness marks the end of a step was donated: return "
                "a scalar of its own beside the state"
            )
        tag, self._last = self._tag, result
        self._put(result, lambda: self._recorder.exit(tag))

    def _put(self, array: jax.Array, stamp: Callable[[], None]) -> None:
        if self._thread.is_alive():
            self._queue.put((array, stamp))

    def _run(self) -> None:
        for array, stamp in iter(self._queue.get, None):
            try:
                array.block_until_ready()
            except RuntimeError:
                # The main thread gets it too. The rank stays where it was, inside;
                # what comes after a broken collective compares with nothing.
                return
            stamp()


_dispatching = threading.local()


@functools.cache
def _listen() -> None:
    """Hears of every compilation of this process, from now on."""
    jax.monitoring.register_event_duration_secs_listener(_heard)


def _heard(event: str, duration_secs: float, **kwargs: Any) -> None:
    watcher = getattr(_dispatching, "watcher", None)
    if watcher is not None and event == "/jax/core/compile/jaxpr_trace_duration":
        watcher.traced()


def _smallest() -> Callable[[Any], jax.Array]:
    """A function that picks the smallest array of trees of one structure."""
    chosen: dict[int, int] = {}

    def pick(tree: Any) -> jax.Array:
        leaves = jax.tree.leaves(tree)
        if len(leaves) not in chosen:
            sizes = {
                i: leaf.nbytes
                for i, leaf in enumerate(leaves)
                if isinstance(leaf, jax.Array)
            }
            if not sizes:
                raise ValueError("no array in what marks the step: return a scalar")
            chosen[len(leaves)] = min(sizes, key=sizes.__getitem__)
        return leaves[chosen[len(leaves)]]

    return pick


def instrument(
    local_fn: Callable[[Any, Any], tuple[Any, Any]],
    sync_fn: Callable[[Any, Any], tuple[Any, Any]],
    recorder: Recorder,
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A step in two jitted parts, whose arrivals and ends are recorded.

    The numbers are those of `sync_fn(state, local_fn(state, batch)[0])`, and dispatch
    is as asynchronous: a thread waits for the marker (arrival) and for the smallest
    metric (end). Steps count from `recorder.step(n)`, or from 0.

    Args:
      local_fn: `(state, batch) -> (partial, marker)` without collectives between
        ranks; it must not donate the state that `sync_fn` takes. The marker is a
        small array (or a tree with one) which `sync_fn` does not get.
      sync_fn: `(state, partial) -> (state, metrics)` with the collectives; it may
        donate both arguments.
      recorder: where the samples go.

    Returns:
      `(state, batch) -> (state, metrics)`. It raises ValueError where there is
      nothing to wait for, or where the metrics were donated.
    """
    watcher, marked, measured = _Watcher(recorder), _smallest(), _smallest()

    def step_fn(state: Any, batch: Any) -> tuple[Any, Any]:
        with watcher.dispatch() as step:
            partial, marker = local_fn(state, batch)
            watcher.arrives(step, marked(marker))
            state, metrics = sync_fn(state, partial)
        watcher.leaves(measured(metrics))
        return state, metrics

    return step_fn


def watch(
    step_fn: Callable[..., Any],
    recorder: Recorder,
    result: Callable[[Any], Any] | None = None,
) -> Callable[..., Any]:
    """An unmodified step whose dispatch and end are recorded.

    So a stall is seen and placed: a rank whose host hangs is outside, the others are
    inside. A rank that is slow because its process is held back is, too. One that is
    slow in what it does on the device is not, since its work and its waiting are one
    time there: `jaxlab.health.profile` tells them apart.

    Args:
      step_fn: a jitted function.
      recorder: where the samples go.
      result: of what `step_fn` returns, the part that is not donated to the next
        step; None: the last of a tuple, or all of it.

    Returns:
      A function like `step_fn`, also in the numbers; errors as of `instrument`.
    """
    watcher, smallest = _Watcher(recorder), _smallest()

    def watched(*args: Any, **kwargs: Any) -> Any:
        with watcher.dispatch() as step:
            recorder.enter(step)
            out = step_fn(*args, **kwargs)
        if result is not None:
            part = result(out)
        else:
            part = out[-1] if isinstance(out, tuple) and out else out
        watcher.leaves(smallest(part))
        return out

    return watched
