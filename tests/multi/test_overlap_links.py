"""A matmul and reduce-scatter between two processes in namespaces of their own.

Not how long it takes: that is a benchmark's. That all forms do the same work, in the
order that each is about, and that nothing is left behind.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multi.namespaces import interrupt

FILE = Path(__file__).parents[2] / "benchmarks" / "overlap_links.py"


def command(*options):
    return [sys.executable, str(FILE), *options]


def order(**times):
    """What callbacks did: each word so many times."""
    return [" ".join(w.replace("_", " ") for w, n in times.items() for _ in range(n))]


@pytest.mark.slow
def test_all_forms_do_the_same_work_in_their_order(links):
    done = subprocess.run(
        command("--quick"), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    setting = json.loads(done.stdout)["settings"]["sleep"]
    rows = {(row["form"], row["chunks"]): row for row in setting["arms"]}
    assert len(rows) == len(setting["arms"]) == 15
    message = 128 * 1024 * 4
    assert setting["message"] == message <= setting["queue"] / 4
    assert setting["burst"] <= message / 4 / 8  # four pieces, each far above it
    assert {row["error"] for row in rows.values()} == {0}
    sends = {arm: row for arm, row in rows.items() if arm[0] != "products"}
    sent = [row["bytes"][0] for row in sends.values()]
    assert message <= min(sent) and max(sent) <= 1.05 * min(sent)
    for (form, _), row in rows.items():
        assert row["slept"] == (0 if form.endswith("_wire") else 0.05), form
    for n in (1, 4):
        # A transfer begins before the products of the other half, or after all.
        overlapped = order(product_start=n, product=n, wait=n)
        assert rows["engine", n]["order"] == overlapped
        assert rows["engine_serial", n]["order"] == order(
            product=2 * n, start=n, wait=n
        )
        assert rows["engine_wire", n]["order"] == order(start=n, wait=n)
        for form in ("ring", "ring_serial", "products"):
            assert rows[form, n]["order"] == order(product=2 * n)
        for form in ("ring", "engine"):
            row = rows[form, n]
            assert 0.5 < row["model"] < 1
            assert row["meets"] == (row["ratio"][0] <= row["model"] + 0.06)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(links, number):
    interrupt(command("--compute", "1"), number, "both processes run")


@pytest.mark.parametrize(
    "options, said",
    [
        (("--chunks", "8"), "8 times as long as the burst"),
        (("--chunks", "3"), "half of 256 rows in 3 chunks"),
        (("--rows", "131072"), "a queue of"),
        (("--rate", "0"), "rate is 0"),
    ],
)
def test_a_link_that_would_say_nothing_is_refused(options, said):
    done = subprocess.run(command(*options), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_the_tools_it_says_so_in_one_line():
    done = subprocess.run(
        command(),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": "/nonexistent"},
    )
    assert done.returncode != 0 and not done.stdout
    assert done.stderr.splitlines() == ["error: ip is not installed (package iproute2)"]
