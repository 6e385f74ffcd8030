"""The processes of a run on this host, and what is done when one dies.

A process that died is started again after a pause of 0.5 s, doubled with each death in
the last minute up to 30 s. With five deaths in a minute it stays down for a minute:
what kills it will kill it again.
"""

import multiprocessing
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxlab.errors import UserError

PAUSE, LONGEST_PAUSE = 0.5, 30.0
WINDOW, DEATHS = 60.0, 5
USER_ERROR = 2
"""exit code of a part that cannot go on, for a reason that the user can mend"""


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


class Engine(ABC):
    """Keeps parts alive; how one is started and looked at is the subclass's."""

    address = "127.0.0.1"
    """at which this process listens for the parts"""

    def __init__(self) -> None:
        self.processes: dict[str, Process] = {}

    def add(self, name: str, main: Callable[[Any], None], spec: Any) -> None:
        """A part that `poll` keeps alive; `main` and `spec` can be pickled."""
        self.processes[name] = Process(name, main, spec)

    def poll(self) -> list[str]:
        """Starts what is to be started; names of the parts that have died since."""
        now, died = time.monotonic(), []
        for process in self.processes.values():
            code = None if process.handle is None else self.code(process.handle)
            if code is not None:
                process.code, process.handle = code, None
                process.deaths.append(now)
                while process.deaths and now - process.deaths[0] > WINDOW:
                    process.deaths.popleft()
                process.start_at = now + pause(len(process.deaths))
                died.append(process.name)
            if process.handle is None and now >= process.start_at:
                process.handle = self.start(process)
                process.starts += 1
        return died

    def stop(self, seconds: float) -> None:
        """Waits for all to end by themselves, and kills what does not."""
        until = time.monotonic() + seconds
        handles = [p.handle for p in self.processes.values() if p.handle is not None]
        while time.monotonic() < until:
            if all(self.code(handle) is not None for handle in handles):
                break
            time.sleep(0.02)
        for handle in handles:
            if self.code(handle) is None:
                self.kill(handle)

    def pid(self, name: str) -> int | None:
        """Of a part's process; None: it is down."""
        handle = self.processes[name].handle
        return None if handle is None else self.handle_pid(handle)

    @abstractmethod
    def start(self, process: Process) -> Any:
        """Starts a part; what it is known by."""

    @abstractmethod
    def code(self, handle: Any) -> int | None:
        """Exit code; None: it lives."""

    @abstractmethod
    def kill(self, handle: Any) -> None:
        """Ends a part at once."""

    @abstractmethod
    def handle_pid(self, handle: Any) -> int | None:
        """Process id of a part."""


class Local(Engine):
    """Starts parts as processes of this host.

    Environment hosts are forked from a server that has loaded what they need, so that
    one is back in a moment; jax, which must not be forked, is loaded by each process
    that needs it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload(["jaxlab.rl.cluster", "jaxlab.rl.envs"])
        self._spawn = multiprocessing.get_context("spawn")

    def start(self, process: Process) -> Any:
        """A daemonic process: it ends with this one."""
        light = process.name.startswith("host")
        context = self._fork if light else self._spawn
        handle = context.Process(
            target=child,
            args=(process.main, process.spec),
            name=process.name,
            daemon=True,
        )
        handle.start()
        return handle

    def code(self, handle: Any) -> int | None:
        """As `multiprocessing` has it: negative for a signal."""
        return handle.exitcode

    def kill(self, handle: Any) -> None:
        """By SIGKILL."""
        handle.kill()
        handle.join()

    def handle_pid(self, handle: Any) -> int | None:
        """Of the process itself."""
        return handle.pid


def child(main: Callable[[Any], None], spec: Any) -> None:
    """Runs a part: signals to the group are the parent's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share it
    try:
        main(spec)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
