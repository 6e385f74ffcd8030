"""The processes of a run on this host, and what is done when one dies.

A process that died is started again after a pause of 0.5 s, doubled with each death in
the last minute up to 30 s. With five deaths in a minute it stays down for a minute:
what kills it will kill it again.
"""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PAUSE, LONGEST_PAUSE = 0.5, 30.0
WINDOW, DEATHS = 60.0, 5


def pause(deaths: int) -> float:
    """Seconds before a process is started that died so often in the last minute."""
    if deaths >= DEATHS:
        return WINDOW
    return min(PAUSE * 2 ** max(deaths - 1, 0), LONGEST_PAUSE)


@dataclass
class Process:
    """A part of the run that is to be alive."""

    name: str
    main: Callable[[Any], None]
    spec: Any
    handle: Any = None
    deaths: deque[float] = field(default_factory=deque)
    start_at: float = 0.0
    """when it may be started; monotonic"""
    starts: int = 0
    code: int | None = None
    """exit code of its last death"""


class Local:
    """Starts parts as processes of this host and watches them.

    Environment hosts are forked from a server that has loaded what they need, so that
    one is back in a moment; jax, which must not be forked, is loaded by each process
    that needs it.
    """

    def __init__(self) -> None:
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload(["jaxlab.rl.cluster", "jaxlab.rl.envs"])
        self._spawn = multiprocessing.get_context("spawn")
        self.processes: dict[str, Process] = {}

    def add(self, name: str, main: Callable[[Any], None], spec: Any) -> None:
        """A part that `poll` keeps alive; `main` and `spec` can be pickled."""
        self.processes[name] = Process(name, main, spec)

    def poll(self) -> list[str]:
        """Starts what is to be started; names of the parts that have died since."""
        now, died = time.monotonic(), []
        for process in self.processes.values():
            handle = process.handle
            if handle is not None and handle.exitcode is not None:
                process.code, process.handle = handle.exitcode, None
                process.deaths.append(now)
                while process.deaths and now - process.deaths[0] > WINDOW:
                    process.deaths.popleft()
                process.start_at = now + pause(len(process.deaths))
                died.append(process.name)
            if process.handle is None and now >= process.start_at:
                process.handle = self._start(process)
                process.starts += 1
        return died

    def _start(self, process: Process) -> Any:
        light = process.name.startswith("host")
        context = self._fork if light else self._spawn
        handle = context.Process(
            target=_child,
            args=(process.main, process.spec),
            name=process.name,
            daemon=True,
        )
        handle.start()
        return handle

    def pid(self, name: str) -> int | None:
        """Of a part's process; None: it is down."""
        handle = self.processes[name].handle
        return None if handle is None else handle.pid

    def stop(self, seconds: float) -> None:
        """Waits for all to end by themselves, and kills what does not."""
        until = time.monotonic() + seconds
        handles = [p.handle for p in self.processes.values() if p.handle is not None]
        for handle in handles:
            handle.join(max(until - time.monotonic(), 0.0))
        for handle in handles:
            if handle.exitcode is None:
                handle.kill()
                handle.join()


def _child(main: Callable[[Any], None], spec: Any) -> None:
    """Runs a part: signals to the group are the parent's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share it
    main(spec)
