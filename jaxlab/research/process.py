"""Processes that outlive the driver: launched apart, known again, ended as a group.

A process is known by its pid and its start time, so that a resumed driver never takes
a stranger that got the same pid for its own. `process.json` beside its log holds both.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Process:
    """A launched process; the leader of its process group and session."""

    pid: int
    started: int
    """clock ticks after boot, from /proc"""


def launch(
    command: Sequence[str], log: Path, cwd: Path, env: Mapping[str, str]
) -> Process:
    """Starts a command in a session of its own, its output appended to `log`.

    It inherits no descriptor and no variable beyond `env`, and goes on when the driver
    dies; the caller writes `process.json`.
    """
    with open(log, "ab") as out:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
        )
    child.returncode = 0  # it is not ours to wait for: no warning when it is forgotten
    return Process(child.pid, _start_time(child.pid) or 0)


def alive(process: Process) -> bool:
    """Whether it still runs; takes in its exit status where it is our child."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    return _start_time(process.pid) == process.started


def end_group(*processes: Process, patience: float = 0.7) -> None:
    """Ends whole process groups: SIGTERM, and SIGKILL after `patience` seconds."""
    left = [*processes]
    for number, wait in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        left = [p for p in left if alive(p) or _left_over(p)]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = time.monotonic() + wait
        while left and time.monotonic() < until:
            time.sleep(0.02)
            left = [p for p in left if alive(p) or _left_over(p)]


def _start_time(pid: int) -> int | None:
    """Start of a process that is no zombie, in ticks after boot; None: gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _left_over(process: Process) -> bool:
    """Whether the leader is gone and members of its group run on.

    The kernel gives no pid to a new process while a group has that number, so a leader
    with another start time means that the old group is gone as well.
    """
    if _start_time(process.pid) is not None:
        return False
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == process.pid and fields[0] not in "ZX":
                    return True
    return False
