"""Runs one training process to its end, within limits, and writes down how it went.

Started as `python worker.py RUN_FOLDER` in a session of its own, so it outlives the
driver that started it. It needs the standard library alone. `spec.json` in the folder
says what to run and what it may use; `result.json` appears at once and whole when all
is over, so its presence is what "finished" means:

    status    done, failed, diverged, timeout or cancelled
    reason    one line for any status but done
    rc        exit code of the trainer, negative for a signal
    metrics_sha256, rows        of metrics.jsonl as the run left it
    started, ended              seconds since 1970
    seconds, cpu_seconds, peak_memory (bytes), disk (bytes)
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GRACE = 10.0  # seconds from SIGTERM, at which a trainer saves, to SIGKILL


def main(folder: Path) -> None:
    """Runs what `spec.json` says and writes `result.json`.

    Does nothing where another worker has the folder.
    """
    lock = open(folder / "worker.lock", "a")  # noqa: SIM115 (held to the end)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    _announce(folder)
    spec = json.loads((folder / "spec.json").read_text())
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: stopped.append(got))
    limits, started, clock = spec["limits"], time.time(), time.monotonic()
    command = [*spec["command"], "--out", str(folder)]
    try:
        with open(folder / "stdout.log", "ab") as log:
            child = subprocess.Popen(
                command,
                cwd=spec["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: _confine(limits),
            )
    except OSError as error:
        write(folder, spec, started, "failed", f"cannot start: {error}", 127, 0, 0.0)
        return
    peak, verdict, wait = 0, None, 0.01
    while (rc := _wait(child, wait)) is None:
        wait = min(2 * wait, 0.5)
        peak = max(peak, _memory(os.getpgid(0), os.getpid()))
        seconds = time.monotonic() - clock
        if stopped:
            verdict = "cancelled", f"stopped by {signal.Signals(stopped[0]).name}"
        elif seconds > limits["wall"]:
            verdict = "timeout", f"took more than {limits['wall']:g} s"
        elif peak > limits["memory"]:
            verdict = "failed", f"used more than {limits['memory']} bytes of memory"
        elif _size(folder) > limits["disk"]:
            verdict = "failed", f"wrote more than {limits['disk']} bytes"
        if verdict:
            rc = _end(child)
            break
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = max(peak, usage.ru_maxrss * 1024)
    if stopped and verdict is None:
        verdict = "cancelled", f"stopped by {signal.Signals(stopped[0]).name}"
    status, reason = verdict or judge(folder, spec, rc)
    cpu = usage.ru_utime + usage.ru_stime
    write(folder, spec, started, status, reason, rc, peak, cpu)
    if status == "done" and not spec.get("keep_checkpoints"):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def judge(folder: Path, spec: dict[str, Any], rc: int) -> tuple[str, str]:
    """Status and reason of a trainer that ended by itself.

    A trainer that a signal stops in good order exits with 0, so its last step counts.
    """
    log = folder / "stdout.log"
    tail = log.read_bytes()[-4000:].decode("utf-8", "replace") if log.exists() else ""
    last = tail.strip().splitlines()[-1][-300:] if tail.strip() else ""
    metrics = folder / "metrics.jsonl"
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    if any(s in row for row in rows[-3:] for s in ('"NaN"', 'Infinity"')):
        return "diverged", "a metric of the last steps is not finite"
    if rc != 0:
        if "is not finite" in tail:
            return "diverged", last
        if rc == -signal.SIGXCPU:
            return "failed", f"used more than {spec['limits']['cpu']:g} s of CPU"
        return "failed", f"exit code {rc}: {last}"
    steps = spec["config"].get("steps")
    step = json.loads(rows[-1]).get("step") if rows else None
    if steps is not None and step != steps:
        return "failed", f"ended at step {step} of {steps}: {last}"
    return "done", ""


def write(
    folder: Path,
    spec: dict[str, Any],
    started: float,
    status: str,
    reason: str,
    rc: int,
    peak: int,
    cpu: float,
) -> None:
    """Writes `result.json` at once, on disk when this returns."""
    metrics, ended = folder / "metrics.jsonl", time.time()
    body = metrics.read_bytes() if metrics.exists() else b""
    result = {
        "run_id": spec["run_id"],
        "spec_hash": spec["spec_hash"],
        "code_hash": spec["code_hash"],
        "status": status,
        "reason": reason,
        "rc": rc,
        "metrics": f"runs/{spec['run_id']}/metrics.jsonl",
        "metrics_sha256": hashlib.sha256(body).hexdigest(),
        "rows": body.count(b"\n"),
        "started": started,
        "ended": ended,
        "seconds": ended - started,
        "cpu_seconds": cpu,
        "peak_memory": peak,
        "disk": _size(folder),
        "env": spec["env"],
    }
    temporary = folder / f".result.{os.getpid()}"
    with open(temporary, "w") as file:
        file.write(json.dumps(result, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / "result.json")


def _announce(folder: Path) -> None:
    """Writes `process.json`: pid and start in ticks after boot, to be found again."""
    started = 0
    with contextlib.suppress(OSError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19])
    temporary = folder / f".process.{os.getpid()}"
    temporary.write_text(json.dumps({"pid": os.getpid(), "started": started}))
    os.replace(temporary, folder / "process.json")


def _confine(limits: dict[str, float]) -> None:
    """In the trainer, before it starts: dies with the worker; a limit of CPU time."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    cpu = int(limits["cpu"])
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _wait(child: subprocess.Popen, seconds: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(seconds)
    return None


def _end(child: subprocess.Popen) -> int:
    child.terminate()
    if _wait(child, GRACE) is None:
        child.kill()
    return child.wait()


def _memory(group: int, me: int) -> int:
    """Resident bytes of the process group but this process."""
    page, total = os.sysconf("SC_PAGE_SIZE"), 0
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit() and int(entry.name) != me:
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group:
                    total += int(fields[21]) * page
    return total


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]))
