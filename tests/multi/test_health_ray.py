"""Agents on a real, local Ray cluster: a job ends, and a killed agent comes back."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxlab.errors import UserError
from jaxlab.health import channel, on_ray
from jaxlab.health.journal import Journal
from jaxlab.health.roster import Roster
from jaxlab.health.steer import SteerConfig
from jaxlab.health.supervise import Supervisor

ROOT = Path(__file__).parent.parent.parent
WORKER = Path(__file__).parent / "health_worker.py"

pytestmark = [
    pytest.mark.requires("ray"),
    # Where an earlier test has started JAX in this process, it warns of Ray's forks.
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]


@pytest.mark.slow
def test_a_job_runs_on_agents_that_ray_hosts(tmp_path, monkeypatch):
    """It runs, an agent is killed and its workers with it, and it goes on."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    keys = channel.new_keys(free_address())
    hosts, events, killed = {"ray0": 1, "ray1": 1}, [], threading.Event()

    with contextlib.ExitStack() as stack:
        journal = Journal(
            tmp_path / "health", None, lambda line: None, tell=events.append
        )
        stack.callback(journal.close)
        master = stack.enter_context(channel.listen(keys))
        agents = on_ray.agents(
            keys._replace(master_secret=""),
            hosts,
            tmp_path / "health",
            address="local",
        )
        start_agent = stack.enter_context(agents)
        roster = Roster(master, journal, start_agent=start_agent)

        def kill_one():
            """Kills the process that the first rank's agent is in, once it steps."""
            row = roster.rows.get(0, {})
            if row.get("step", 0) < 5:
                timer = threading.Timer(0.2, kill_one)
                timer.daemon = True
                timer.start()
                return
            killed.set()
            os.kill(parent(row["pid"]), signal.SIGKILL)

        command = [sys.executable, str(WORKER), str(tmp_path), "400"]
        supervisor = Supervisor(
            command, roster, tmp_path, journal, steering=SteerConfig(sizes=(2,))
        )
        kill_one()
        assert supervisor.run(hosts, gather=300.0) == 0
    kinds = [event["event"] for event in events]
    # The other rank may end first, of its broken connection.
    assert kinds.count("start") >= 2 and kinds[-1] == "done"
    assert "lost" in kinds and killed.is_set()
    assert (tmp_path / "steps").read_text().splitlines()[-1] == "2 400"


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


def parent(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def test_no_cluster_is_named(tmp_path):
    with pytest.raises(UserError, match="no Ray cluster at 127.0.0.1:9"):
        ask(tmp_path, "127.0.0.1:9")


def test_no_cluster_of_this_machine_is_named(tmp_path):
    """Ray looks for one among all processes: of a namespace, so that it sees none."""
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("no namespaces of processes here (unshare, of util-linux)")
    program = f"from {__name__} import ask; ask({str(tmp_path)!r}, 'auto')"
    done = subprocess.run(
        [*alone, sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "UserError: there is no Ray cluster at auto" in done.stderr


def ask(folder, address):
    keys = channel.new_keys(free_address())
    with on_ray.agents(keys, {"a": 1}, Path(folder), address=address):
        pass
