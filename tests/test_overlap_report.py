"""scripts/overlap_report.py, run for real: a step compiled for absent chips."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = (
    "configs/gpt_tiny.py --mesh.data 1 --batch 8 --length 512 --model.layers 2 "
    "--model.width 512 --model.heads 8 --model.kv-heads 8 --model.mlp 2048 "
    "--model.dtype bfloat16 --model.scan"
).split()


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/overlap_report.py"), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report(*arguments: str) -> str:
    process = start(*arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def refused(*arguments: str) -> tuple[int, str]:
    """Exit code, and the one line that says why."""
    process = start(*arguments)
    out, err = process.communicate(timeout=600)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert not out and len(lines) == 1 and err.splitlines()[-1] == lines[0], err
    return process.returncode, lines[0]


@pytest.mark.slow
@pytest.mark.requires("libtpu")
def test_on_tpu_all_of_a_training_step_is_covered():
    mesh = ["--mesh.tensor", "4", "--target", "tpu:v5e:2x2"]
    found = json.loads(report(*SMALL, *mesh, "--json"))
    assert found["mesh"] == "tensor 4" and not found["notes"]
    plain, ring = found["forms"]["plain"], found["forms"]["ring"]
    assert plain["covered"] == 0 and plain["synchronous"]["all-gather"] >= 4
    # Of 3 steps each: forward 3 gathers and 2 sums; backward a gather is two rings. XLA
    # shares the first steps of a few.
    assert ring["covered"] == ring["asynchronous"] >= 3 * 12
    assert ring["exposed"] == 0 < plain["exposed"], ring["left"]
    # Only the look-up's sum and, for its gradient, gather are left: no products there.
    rows = [x for x in ring["left"] if x["kind"] != "all-reduce"]
    assert len(rows) <= 2 and all("look_up" in x["where"] for x in rows)
    assert ring["sites_overlapped"] == ring["sites"] - 1 == 5
    assert ring["products"] > plain["products"]
    assert all(x["where"] and x["reason"] for x in ring["left"])


@pytest.mark.slow
@pytest.mark.requires("jax_cuda13_plugin")
def test_on_gpu_all_of_a_training_step_is_covered():
    mesh = ["--mesh.tensor", "8", "--target", "cuda:h100:8"]
    how = ["--parallel.overlap", "ring", "--model.remat", "block"]
    text = report(*SMALL, *mesh, *how)
    assert text.startswith("one training step for cuda:h100:8, mesh tensor 8: 1 x 8 x ")
    assert "5 of 6 collectives are overlapped" in text
    total, covered, exposed = (
        [int(n) for n in line.split()[-2:]]
        for line in text.splitlines()
        if line.startswith(("asynchronous", "  with a product", "beside a product"))
    )
    assert exposed[0] >= 8 and exposed[1] == 0
    left = text.split("ring, not behind a product:")[1]
    assert left.count("uncovered") == total[1] - covered[1] <= 6
    assert "collective-permute" not in left
    assert "look_up" in left and "log_partition" in left


TINY = "configs/gpt_tiny.py"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["usage: scripts/overlap_report.py CONFIG"]),
        (["configs/gpt_tinny.py"], 2, ["no config file", "gpt_tiny.py"]),
        ([TINY, "--target", "tpu"], 2, ["no target 'tpu'", "tpu:v5e:2x4"]),
        ([TINY, "--target", "cuda:a100:8"], 2, ["no target 'cuda:a100:8'"]),
        ([TINY, "--traget", "x"], 2, ["--traget", "--target"]),
    ],
)
def test_bad_usage_is_one_line(arguments, code, words):
    got, line = refused(*arguments)
    assert got == code
    assert all(word in line for word in words), line


@pytest.mark.requires("jax_cuda13_plugin")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mesh.data", "3", "--mesh.tensor", "2"], ["needs 6 devices", "are 8"]),
        (["--mesh.data", "8"], ["mesh.tensor is 1", "--mesh.tensor"]),
        (
            ["--mesh.data", "1", "--mesh.tensor", "8", "--model.heads", "4"],
            ["model.heads 4", "mesh.tensor 8"],
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(arguments, words):
    code, line = refused(TINY, "--target", "cuda:h100:8", *arguments)
    assert code == 2
    assert all(word in line for word in words), line


def test_a_compiler_that_is_not_here_or_refuses_is_one_line():
    here = importlib.util.find_spec("libtpu") is not None
    target = "tpu:v5e:3x7" if here else "tpu:v5e:2x4"
    sizes = ["--mesh.data", "-1", "--mesh.tensor", "1"]
    code, line = refused(TINY, "--target", target, *sizes)
    assert code == 1
    assert f"cannot compile for {target}" in line and "jaxlab[peers]" in line
