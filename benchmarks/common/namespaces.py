"""A job of processes, each in a network namespace of its own, with shaped links.

Linux, as root. Veth pairs join the namespaces to a bridge in another one, and `tc`
limits what each may send (tbf). Nothing of the host's network is touched, and what was
made is removed at the end.
"""

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError

INTERFACE = "eth0"
QUEUE = 32 * 2**20  # bytes; one that overflows costs a time-out of TCP
START_SECONDS, ANSWER_SECONDS = 180, 60  # before a process counts as stuck


@contextlib.contextmanager
def network(processes: int) -> Iterator[tuple[str, list[str]]]:
    """Namespaces: of the bridge, and of each process. All links go with them."""
    switch, *names = (f"jaxlab-{os.getpid()}-{i}" for i in range(processes + 1))
    link = ("ip", "-n", switch, "link")
    made = []
    try:
        for name in (switch, *names):
            made.append(name)
            tool("ip", "netns", "add", name)
            tool("ip", "-n", name, "link", "set", "lo", "up")
        tool(*link, "add", "bridge", "type", "bridge", "forward_delay", "0")
        tool(*link, "set", "bridge", "up")
        for i, name in enumerate(names):
            peer = ("peer", "name", INTERFACE, "netns", name)
            tool(*link, "add", f"port{i}", "type", "veth", *peer)
            tool(*link, "set", f"port{i}", "master", "bridge", "up")
            tool("ip", "-n", name, "addr", "add", f"{address(i)}/24", "dev", INTERFACE)
            tool("ip", "-n", name, "link", "set", INTERFACE, "up")
        yield switch, names
    finally:
        for name in made:
            with contextlib.suppress(FileNotFoundError):  # no ip: said already
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def address(index: int) -> str:
    """Of a process."""
    return f"10.77.0.{index + 1}"


def burst(mbit: float) -> int:
    """Bytes that a link of this rate sends at any speed.

    Few beside a message, and yet as many as the kernel's timer needs.
    """
    return max(16 * 2**10, int(mbit * 1e6 / 8 * 0.5e-3))


def shape(name: str, device: str, mbit: float) -> None:
    """Limits what a device of a namespace sends; 0: no limit."""
    kind = ["tbf", "rate", f"{int(mbit * 1000)}kbit", "burst", str(burst(mbit))]
    kind = [*kind, "limit", str(QUEUE)] if mbit else ["noqueue"]
    tool("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *kind)


def tool(*command: str) -> None:
    """Runs ip or tc."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed (package iproute2)") from None
    if done.returncode:
        why = " ".join(done.stderr.split()) or f"exit {done.returncode}"
        raise UserError(f"no shaped links, root has them: {' '.join(command)}: {why}")


def bytes_sent(pid: int) -> int:
    """Bytes that have left the interface in the namespace of a process."""
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()
    counts = next(x for x in lines if f"{INTERFACE}:" in x).partition(":")[2]
    return int(counts.split()[8])


def summary(values: list[float]) -> list[float]:
    """Median, least and most."""
    return [round(f(values), 5) for f in (statistics.median, min, max)]


def stop_on_signals() -> None:
    """SIGINT and SIGTERM raise KeyboardInterrupt, so that `network` cleans up.

    Said for both: a shell has its background jobs ignore SIGINT.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


class Job:
    """The processes of one job, and how to ask them all at once.

    Each runs `file --process INDEX PROCESSES` in its namespace, prints a line of JSON
    when it is ready, and then answers each line of JSON with another.
    """

    def __init__(self, names: list[str], file: str, log: Any) -> None:
        self.log, self.processes = log, []
        path = {"PYTHONPATH": str(Path(__file__).parents[2])}
        pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        for i, name in enumerate(names):
            inside = ["ip", "netns", "exec", name, "unshare", "--uts", sys.executable]
            program = [file, "--process", str(i), str(len(names))]
            # A session of its own: Ctrl-C is for the one that cleans up.
            process = subprocess.Popen(
                inside + program, env=os.environ | path, start_new_session=True, **pipes
            )
            self.processes.append(process)

    def close(self) -> None:
        """Ends the processes, gently first."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        end = time.monotonic() + 2
        for process in self.processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, **order: Any) -> list[dict[str, Any]]:
        """Sends an order to all; their answers."""
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):  # found below
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.flush()
        return self.answers(ANSWER_SECONDS)

    def answers(self, seconds: float) -> list[dict[str, Any]]:
        """One line of each process."""
        end, found = time.monotonic() + seconds, []
        for index, process in enumerate(self.processes):
            left = max(0.0, end - time.monotonic())
            ready, _, _ = select.select([process.stdout], [], [], left)
            line = process.stdout.readline() if ready else b""
            if not line:
                what = "ended" if ready else f"did not answer in {seconds:.0f} s"
                self.log.seek(0)
                said = self.log.read().decode(errors="replace").split()
                raise UserError(f"process {index} {what}: {' '.join(said)[-300:]}")
            found.append(json.loads(line))
        return found

    def trial(self, **order: Any) -> dict[str, list]:
        """An order that all start at the same moment: answers, and bytes sent."""
        before = [bytes_sent(p.pid) for p in self.processes]
        ran = self.ask(**order, at=time.monotonic() + 0.05)
        after = [bytes_sent(p.pid) for p in self.processes]
        sent = [b - a for a, b in zip(before, after, strict=True)]
        return {k: [x[k] for x in ran] for k in ran[0]} | {"bytes": sent}
