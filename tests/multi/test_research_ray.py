"""Runs of a study on a real, local Ray cluster: one ends, one is ended."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TRAINER = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
folder.joinpath("metrics.jsonl").write_text(json.dumps({"step": 3}) + "\\n")
time.sleep(float(sys.argv[1]))
"""
LIMITS = {"wall": 60.0, "cpu": 60.0, "memory": 2**30, "disk": 2**20}


def run(folder):
    """In a process of its own: Ray warns of threads and sockets as it likes."""
    from jaxlab.research.cluster import Ray

    folder = Path(folder)
    for name, seconds in (("ends", "0"), ("is-ended", "600")):
        (folder / name).mkdir()
        spec = {
            "command": [sys.executable, str(folder / "trainer.py"), seconds],
            "cwd": str(folder),
            "config": {"steps": 3},
            "limits": LIMITS,
            "run_id": name,
            "spec_hash": "",
            "code_hash": "",
            "env": {},
        }
        (folder / name / "spec.json").write_text(json.dumps(spec))
    ends, ended = folder / "ends", folder / "is-ended"
    ray = Ray({"run_cpus": 0.1})
    assert not ray.running(ends)
    ray.start(ends)
    ray.start(ended)
    until(lambda: (ends / "result.json").exists())
    until(lambda: (ended / "metrics.jsonl").exists())
    until(lambda: not ray.running(ends))
    # Another driver finds it by its name.
    assert Ray({}).running(ended)
    Ray({}).end(ended)
    until(lambda: (ended / "result.json").exists())
    assert not ray.running(ended)


def until(done):
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.requires("ray")
def test_runs_are_actors_that_a_later_driver_finds(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import run; run({str(tmp_path)!r})"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    results = [
        json.loads((tmp_path / name / "result.json").read_text())
        for name in ("ends", "is-ended")
    ]
    assert [r["status"] for r in results] == ["done", "cancelled"]
    assert results[0]["rows"] == 1
