"""The supervisor with real agents, workers and signals, on one machine."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab import program
from jaxlab.health.journal import table

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).parent / "health_worker.py"
PATIENCE = 300.0  # seconds for what takes one or two on a quiet machine


def environment(**more):
    """This one, without what the test's own process has set for JAX."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | more


class Job:
    """A supervised job in a folder."""

    def __init__(self, folder, *options, steps=10**6, processes=3, command=None):
        self.folder, self.health = folder, folder / "health"
        worker = command or [sys.executable, str(WORKER), str(folder), str(steps)]
        script = [sys.executable, str(ROOT / "scripts/supervise.py")]
        where = ["--health", str(self.health)]
        if "--hosts" not in options:
            where += ["--local", str(processes)]
        self.command = [*script, *where, *options, "--", *worker]
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self.command,
            env=environment(),
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def events(self, kind=None):
        with contextlib.suppress(FileNotFoundError):
            lines = (self.health / "events.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            return [r for r in rows if kind is None or r["event"] == kind]
        return []

    def status(self):
        return json.loads((self.health / "status.json").read_text())

    def wait(self, done, what):
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            with contextlib.suppress(FileNotFoundError, IndexError, KeyError):
                if done():
                    return
            time.sleep(0.05)
        raise AssertionError(f"no {what}: {self.events()}")

    def steps(self, generation):
        """Waits until a generation has done some steps; its workers' pids."""

        def stepping():
            found = self.status()
            same = found["generation"] == generation
            return same and all(row["step"] > 5 for row in found["ranks"])

        self.wait(stepping, f"steps of generation {generation}")
        return [row["pid"] for row in self.status()["ranks"]]

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture
def job(tmp_path):
    jobs = []

    def make(*options, **more):
        jobs.append(Job(tmp_path, *options, **more))
        return jobs[-1]

    yield make
    for made in jobs:
        made.stop()


def alive(pid):
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        )
    return False


def gone(pids):
    until = time.monotonic() + 30
    while time.monotonic() < until and any(map(alive, pids)):
        time.sleep(0.05)
    return not any(map(alive, pids))


def test_a_job_that_ends_ends_well(job):
    made = job(steps=20)
    assert made.process.wait(PATIENCE) == 0
    assert [e["event"] for e in made.events()] == ["start", "done"]
    assert (made.folder / "steps").read_text().splitlines()[-1] == "3 20"


def test_kill_stop_and_stuck_are_named_and_survived(job):
    made = job("--sizes", "1", "2", "3")
    first = made.steps(0)
    os.kill(first[2], signal.SIGKILL)
    second = made.steps(1)
    assert gone(first)
    os.kill(second[1], signal.SIGSTOP)
    third = made.steps(2)
    assert gone(second) and len(third) == 2
    # Alive, its heart beats, and it does not come: JAX would wait for ever.
    (made.folder / "stuck-1").touch()
    fourth = made.steps(3)
    assert gone(third) and len(fourth) == 1
    found = [(e["kind"], e["ranks"]) for e in made.events("diagnosis")]
    assert found == [("crash", [2]), ("frozen", [1]), ("noncomm_hang", [1])]
    recovered = made.events("recovered")
    assert len(recovered) == 3
    assert all(e["reinit"] > 0 and e["isolation"] >= 0 for e in recovered)
    text = table(made.status(), time.time())
    assert "generation 3" in text and "evicted" in text
    assert made.stop() == 130
    assert gone(fourth)


@pytest.mark.slow
def test_two_faults_at_once_on_two_hosts(job, tmp_path):
    (tmp_path / "hosts.txt").write_text("a 127.0.0.1\nb 127.0.0.1  # here as well\n")
    # Any prefix starts an agent; `env` does it on this machine.
    launch = ["--hosts", str(tmp_path / "hosts.txt"), "--launch", "env HOST={host}"]
    told = tmp_path / "told"
    hook = f'{sys.executable} -c \'import sys; open(sys.argv[1], "a").write('
    hook += f"sys.stdin.read() + chr(10))' {told}"
    made = job(*launch, "--nproc", "2", "--sizes", "2", "4", "--hook", hook)
    first = made.steps(0)
    assert [row["slot"] for row in made.status()["ranks"]] == "a:0 a:1 b:0 b:1".split()
    os.kill(first[1], signal.SIGSTOP)
    os.kill(first[2], signal.SIGKILL)
    made.steps(1)
    assert gone(first)
    found = made.events("diagnosis")[0]
    assert (found["kind"], found["ranks"]) == ("crash", [2])  # explains the most
    assert made.stop() == 130
    kinds = [json.loads(line)["event"] for line in told.read_text().splitlines()]
    assert kinds[:2] == ["diagnosis", "restart"]


@pytest.mark.slow
def test_without_a_supervisor_a_stuck_rank_hangs_the_job_for_ever(tmp_path):
    """JAX issue 38503: heartbeats go on, so nobody ends it."""
    heartbeat = 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{probe.getsockname()[1]}"
    more = {"JAX_COORDINATOR_ADDRESS": meet, "JAX_NUM_PROCESSES": "2"}
    more["HEARTBEAT"] = str(heartbeat)
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), str(10**6)],
            env=environment(**more, JAX_PROCESS_ID=str(rank)),
        )
        for rank in range(2)
    ]
    steps = tmp_path / "steps"
    try:
        until = time.monotonic() + PATIENCE
        while not steps.exists() and time.monotonic() < until:
            time.sleep(0.1)
        (tmp_path / "stuck-1").touch()
        time.sleep(1)
        size = steps.stat().st_size
        time.sleep(4 * heartbeat)
        assert [worker.poll() for worker in workers] == [None, None]
        assert steps.stat().st_size == size
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_the_trainer_goes_on_with_fewer_processes_to_the_same_numbers(job, tmp_path):
    """After a restart: what a run from that checkpoint on as many processes does."""
    run = tmp_path / "run"
    sizes = "--model.layers 1 --model.width 16 --model.heads 2 --model.mlp 32"
    numbers = "--batch 4 --length 16 --steps 1500 --log-every 250 --evaluate.every 0"
    kept = "--checkpoint.every 100 --checkpoint.keep-last 99 --sample.tokens 0"
    command = [sys.executable, str(ROOT / "scripts/train.py")]
    command += [str(ROOT / "configs/gpt_tiny.py"), "--out", str(run)]
    command += f"{sizes} {numbers} {kept}".split()
    made = job(processes=2, command=command)
    made.wait(lambda: all(row["pid"] for row in made.status()["ranks"]), "processes")
    pids = [row["pid"] for row in made.status()["ranks"]]
    made.wait((run / "checkpoints/100").exists, "checkpoint")  # sooner than the status
    os.kill(pids[1], signal.SIGSTOP)
    assert made.process.wait(PATIENCE) == 0
    assert [e["kind"] for e in made.events("diagnosis")] == ["frozen"]
    log = (made.health / "logs/g1-r0.log").read_text()
    assert "1 process(es)" in log
    step = log.partition("restored from step ")[2].partition(",")[0]
    assert int(step) >= 100

    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("lock", "events*"))
    for folder in (again / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > int(step):
            shutil.rmtree(folder)
    command[command.index(str(run))] = str(again)
    # The same batch of 4 rows, with as many at once as each of two processes had.
    words = made.events("start")[1]["text"].partition(", with ")[2].split()
    assert words == ["--accumulate", "2", "--evaluate.batches", "32"]
    command += words
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    ours, theirs = (program.load(folder) for folder in (run, again))
    assert ours.step == theirs.step == 1500
    pairs = zip(*map(jax.tree.leaves, (ours.params, theirs.params)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_throttled_worker_of_the_trainer_is_named(tmp_path):
    """As a newcomer would: it knows a healthy step, then gets a slow rank.

    Up to three times, for a busy machine throttles whom it likes.
    """
    told = []
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        made = Job(folder, processes=2, command=small_trainer(folder))
        try:
            found = throttled(made)
        finally:
            made.stop()
        if found == [[1]]:
            return
        told.append(made.events())
    raise AssertionError(told)


def small_trainer(folder):
    sizes = "--model.layers 1 --model.width 64 --model.heads 2 --model.mlp 256"
    numbers = "--batch 8 --length 64 --steps 1000000 --evaluate.every 0"
    command = [sys.executable, str(ROOT / "scripts/train.py")]
    command += [str(ROOT / "configs/gpt_tiny.py"), "--out", str(folder / "run")]
    return command + f"{sizes} {numbers} --checkpoint.every 10000".split()


def throttled(made, patience=90.0):
    """Stops rank 1 most of the time; the ranks of diagnoses that name somebody."""

    def until(done):
        end = time.monotonic() + patience
        while time.monotonic() < end and not done():
            time.sleep(0.05)
        return done()

    if not until(lambda: made.events("learned") or made.events("restart")):
        return None
    pids = [row["pid"] for row in made.status()["ranks"]]
    ended = threading.Event()

    def throttle():
        while len(pids) == 2 and not ended.wait(0.03):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[1], signal.SIGSTOP)
                ended.wait(0.25)
                os.kill(pids[1], signal.SIGCONT)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        until(lambda: made.events("restart"))
    finally:
        ended.set()
        thread.join()
    return [e["ranks"] for e in made.events("diagnosis") if e["ranks"]]


@pytest.mark.slow
def test_a_supervisor_that_is_killed_is_succeeded(job):
    made = job()
    workers = made.steps(0)
    made.process.kill()
    made.process.wait()
    before = made.status()["ranks"][0]["step"]
    made.start()
    made.wait(lambda: made.events("takeover"), "takeover")
    made.wait(lambda: made.status()["ranks"][0]["step"] > before + 20, "further steps")
    assert [row["pid"] for row in made.status()["ranks"]] == workers
    assert len(made.events("start")) == 1
    os.kill(workers[0], signal.SIGKILL)
    made.steps(1)


@pytest.mark.slow
def test_a_supervisor_that_is_killed_for_good_leaves_no_orphans(job):
    made = job("--patience", "5")
    workers = made.steps(0)
    agent = parent(workers[0])
    made.process.kill()
    assert gone([*workers, agent])


@pytest.mark.slow
def test_an_agent_that_is_killed_leaves_no_orphans_and_is_replaced(job):
    made = job()
    workers = made.steps(0)
    os.kill(parent(workers[0]), signal.SIGKILL)
    assert gone(workers)
    made.steps(1)
    assert [e["event"] for e in made.events()][1:3] == ["lost", "diagnosis"]


def parent(pid):
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def test_a_command_that_cannot_run_is_not_tried_again(job):
    made = job()
    made.stop()
    made.command[-1] = "not-a-number"
    (made.health / "job.json").unlink(missing_ok=True)
    made.start()
    assert made.process.wait(PATIENCE) == 1
    assert "exit code 1" in made.events("give_up")[0]["text"]
