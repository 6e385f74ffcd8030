"""The agent of one host: starts the workers, reads their boards, tells the master.

It does what the master says and decides nothing, but for one thing: if it hears nothing
of a master for `patience` seconds it kills its workers and ends, so that a job without
a supervisor leaves nothing behind. A master that comes back sooner takes the workers
over as they are.

A worker is told its place by the environment: `JAX_COORDINATOR_ADDRESS`,
`JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`, and `JAXLAB_HEALTH_BOARD`, the file of its board.
It dies with its agent, also where that one is killed (`setpriv --pdeathsig`, on Linux).
One agent has JAX's coordinator in its own process, so that no rank's death is that of
all.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from jaxlab.errors import UserError
from jaxlab.files import write_text
from jaxlab.health import board
from jaxlab.health._compat import coordination_service
from jaxlab.health.channel import Channel, Keys, Message, connect
from jaxlab.health.probe import tcp_listener, tcp_probe
from jaxlab.health.reports import told_delays

BOARD = "JAXLAB_HEALTH_BOARD"
REQUEST, LOOKED = "request.json", "looked.json"
"""beside the board: what all ranks are asked, and rank 0's answer"""
POLL = 0.05
"""seconds between two looks at the workers"""
REPORT = 0.1
"""seconds between two reports, where nothing new has happened"""
OUTPUT = 2**16
"""bytes of a worker's output in a report"""


@dataclass
class Worker:
    """A process of the job."""

    rank: int
    generation: int
    process: subprocess.Popen
    board: Path
    log: BinaryIO
    """what it writes, opened to be read"""
    told: int = 0
    """samples that the master has"""
    row: dict[str, Any] = field(default_factory=dict)

    def kill(self) -> None:
        """Kills the process and what it has started; waits for its end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_agent(
    keys: Keys,
    host: str,
    slots: int,
    folder: Path,
    *,
    address: str = "127.0.0.1",
    patience: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Serves the master until it says `bye` or has been silent too long.

    Args:
        keys: of the job (`channel.read_keys`).
        host: name of this host in the job.
        slots: how many processes may run here.
        folder: for the workers' output; made if it is not there.
        address: where other agents reach this one's probe, and JAX the other ranks.
        patience: seconds without a master before the workers are killed.
        clock: seconds.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with contextlib.ExitStack() as stack:
        boards = stack.enter_context(tempfile.TemporaryDirectory(dir=shared))
        token = keys.agent_secret.encode()
        listener = stack.enter_context(tcp_listener(token, host=address))
        hello = {"host": host, "slots": slots, "address": address}
        hello["instance"] = secrets.token_hex(8)
        hello["probe"] = listener.address[1]
        state = stack.enter_context(_State(Path(boards), logs, token))
        workers = state.workers
        channel = stack.enter_context(connect(keys))

        def greet() -> None:
            running = [[w.generation, rank] for rank, w in workers.items()]
            more = {"running": running, "port": free_port(address)}
            channel.send("hello", hello | more)

        greet()
        heard, reported = clock(), -float("inf")
        while True:
            for message in channel.receive(POLL):
                heard = clock()
                if message.kind == "bye":
                    return
                if message.kind == "who":
                    greet()
                else:
                    _obey(message, state, channel)
            now = clock()
            if now - heard > patience:
                raise UserError(
                    f"{host}: no master at {keys.address} for {patience:g} s; its "
                    "workers are killed"
                )
            answer = state.answer()
            if answer is not None:
                channel.send("looked", answer)
            changed = [w for w in workers.values() if _look(w)]
            if changed or now - reported >= REPORT:
                reported = now
                rows = [_report(w) for w in workers.values()]
                channel.send("report", {"host": host, "workers": rows})


class _State:
    """What is running here; a context manager that leaves nothing behind."""

    def __init__(self, boards: Path, logs: Path, token: bytes) -> None:
        self.boards, self.logs, self.token = boards, logs, token
        self.workers: dict[int, Worker] = {}
        self.coordinator = contextlib.ExitStack()
        self.looked = 0

    def __enter__(self) -> "_State":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Ends all workers, at once, and the coordinator a little later."""
        for worker in self.workers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.process.pid, signal.SIGKILL)
        for worker in self.workers.values():
            worker.kill()
            worker.log.close()
        self.workers.clear()
        # It waits for ranks that it cannot reach: not for us to wait for.
        closing = self.coordinator.pop_all()
        threading.Thread(target=closing.close, daemon=True).start()
        for name in (REQUEST, LOOKED):
            (self.boards / name).unlink(missing_ok=True)

    def answer(self) -> dict[str, Any] | None:
        """What rank 0 has found since the last call."""
        path = self.boards / LOOKED
        with contextlib.suppress(OSError, ValueError):
            changed = path.stat().st_mtime_ns
            if changed != self.looked:
                self.looked = changed
                return json.loads(path.read_text())
        return None


def _obey(message: Message, state: _State, channel: Channel) -> None:
    """Carries out one message; a malformed one is answered, and changes nothing."""
    body = message.body
    try:
        if message.kind == "start":
            state.kill()
            meet = body["coordinator"]
            if meet:
                service = coordination_service(meet["address"], int(meet["processes"]))
                state.coordinator.enter_context(service)
            for order in body["workers"]:
                worker = start(body, order, state.boards, state.logs)
                state.workers[worker.rank] = worker
        elif message.kind == "kill":
            state.kill()
            port = free_port(body["address"])
            channel.send("killed", {"generation": body["generation"], "port": port})
        elif message.kind == "request":
            write_text(state.boards / REQUEST, json.dumps(body))
        elif message.kind == "probe":
            peers = [
                None if p is None else (str(p[0]), int(p[1])) for p in body["peers"]
            ]
            delays = tcp_probe(peers, state.token, timeout=float(body["timeout"]))
            channel.send("probed", {"delay": told_delays(delays)})
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        channel.send("failed", {"what": message.kind, "why": repr(error)})


def free_port(address: str) -> int:
    """A port of this host that nobody listens at."""
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


def start(
    body: Mapping[str, Any], order: Mapping[str, Any], boards: Path, logs: Path
) -> Worker:
    """Starts one worker.

    Args:
        body: `command` (list), `folder` to run it in, `env` of all workers,
            `generation`.
        order: `rank`, and `env` of this one.
        boards: folder for its board and the requests.
        logs: folder for its output.
    """
    rank, generation = int(order["rank"]), int(body["generation"])
    path = boards / f"g{generation}-r{rank}.board"
    log = logs / f"g{generation}-r{rank}.log"
    command = [str(word) for word in body["command"]]
    if shutil.which("setpriv"):
        command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command,
            env={**os.environ, **body["env"], **order["env"], BOARD: str(path)},
            cwd=body["folder"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Worker(rank, generation, process, path, open(log, "rb"))  # noqa: SIM115


def _look(worker: Worker) -> bool:
    """Reads the worker's board; whether something is worth a report at once."""
    code = worker.process.poll()
    now, state = time.monotonic(), None
    with contextlib.suppress(FileNotFoundError, UserError):
        state = board.read_board(worker.board, worker.told)
    letter, _ = board.process(worker.process.pid)
    before = worker.row
    worker.row = {
        "rank": worker.rank,
        "generation": worker.generation,
        "pid": worker.process.pid,
        "code": code,
        "stopped": letter in ("T", "t"),
    }
    if state is not None:
        worker.told = state.count
        worker.row |= {
            "heartbeat": now - state.heartbeat,
            "progress": now - state.progress,
            "enter_seq": state.enter_seq,
            "exit_seq": state.exit_seq,
            "phase": int(state.phase),
            "step": state.step,
            "samples": [*before.get("samples", []), *state.samples],
        }
    watched = ("code", "stopped", "phase")
    return any(before.get(name) != worker.row.get(name) for name in watched)


def _report(worker: Worker) -> dict[str, Any]:
    """What the master is told; samples and output once."""
    row = worker.row | {"output": worker.log.read(OUTPUT).decode(errors="replace")}
    worker.row = {**worker.row, "samples": []}
    return row
