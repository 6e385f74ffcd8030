"""One outer exchange between processes in network namespaces of their own.

Not how long it takes: that is a benchmark's. What is sent, that the result is the
simulation's, and that nothing is left behind.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multi.namespaces import interrupt

FILE = Path(__file__).parents[2] / "benchmarks" / "noloco_links.py"
GOSSIP = ("gossip", "gossip_bfloat16", "gossip_int8")


def command(*options):
    return [sys.executable, str(FILE), *options]


@pytest.mark.slow
def test_what_processes_send_and_compute(links):
    """16 MiB of parameters: 4 MiB of int8."""
    shape = ("--processes", "4", "--rates", "1000", "--sizes", "16", "--rounds", "2")
    done = subprocess.run(
        command(*shape, "--slow-rate", "0"), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    job = json.loads(done.stdout)["jobs"]["4"]
    apart = job["apart_from_simulation"]
    assert [apart[arm] for arm in GOSSIP] == [0, 0, 0]  # bit for bit
    assert apart["all_reduce"] < 1e-5  # sums in another order
    rows = {row["arm"]: row for row in job["links"]}
    for arm in (*GOSSIP, "all_reduce"):
        median, least, _ = rows[arm]["bytes_interface"]
        assert rows[arm]["bytes_computed"] <= least, arm
        assert median < 1.1 * rows[arm]["bytes_computed"], arm
    sent = {arm: rows[arm]["bytes_computed"] for arm in rows}
    assert sent["gossip"] == 2 * sent["gossip_bfloat16"] == 16 * 2**20
    assert 4 * 2**20 < sent["gossip_int8"] < 1.01 * 4 * 2**20
    assert sent["all_reduce"] == 24 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(links, number):
    # The job runs when it says so, and this goes on for minutes.
    shape = ("--processes", "2", "--slow-rate", "0", "--rates", "8", "--sizes", "1")
    interrupt(command(*shape), number, "compiled")


def test_without_the_tools_it_says_so_in_one_line():
    done = subprocess.run(
        command("--processes", "2"),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": "/nonexistent"},
    )
    assert done.returncode != 0 and not done.stdout
    assert done.stderr.splitlines() == ["error: ip is not installed (package iproute2)"]
