"""The script that starts itself again with its allocator's settings."""

import json
import os
import subprocess
import sys

import pytest

from jaxlab import allocator

PROGRAM = """
import json, os, sys
with open(sys.argv[1], "a") as log:
    log.write("started\\n")
from jaxlab import allocator
allocator.tune()
print(json.dumps({
    "pid": os.getpid(),
    "argv": sys.argv,
    "optimize": sys.flags.optimize,
    "dev_mode": sys.flags.dev_mode,
    "executable": sys.executable,
    "tunables": os.environ.get("GLIBC_TUNABLES"),
    "jax": "jax" in sys.modules,
}))
"""


def start(tmp_path, *options, **environment):
    """What the program reports, and how often it started."""
    script, log = tmp_path / "program.py", tmp_path / "log"
    script.write_text(PROGRAM)
    log.write_text("")
    known = ("GLIBC_TUNABLES", allocator.SWITCH, "JAX_PLATFORMS")
    inherited = {k: v for k, v in os.environ.items() if k not in known}
    process = subprocess.Popen(
        [sys.executable, *options, str(script), str(log), "two words", "--x=:"],
        env={**inherited, "PYTHONPATH": os.getcwd(), **environment},
        stdout=subprocess.PIPE,
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    report = json.loads(out)
    assert report["argv"] == [str(script), str(log), "two words", "--x=:"]
    assert report["pid"] == process.pid
    assert report["executable"] == sys.executable
    assert not report["jax"]
    return report, log.read_text().count("started")


glibc = pytest.mark.skipif(not allocator._glibc(), reason="needs Linux with glibc")


@glibc
def test_starts_again_once_and_keeps_arguments_and_options(tmp_path):
    report, starts = start(tmp_path, "-O", "-X", "dev", JAX_PLATFORMS="cpu")
    assert starts == 2
    assert report["optimize"] == 1
    assert report["dev_mode"]
    items = dict(item.split("=") for item in report["tunables"].split(":"))
    assert items == allocator.TUNABLES


@glibc
def test_settings_of_the_user_win(tmp_path):
    mine = "glibc.malloc.top_pad=65536:glibc.malloc.check=0"
    report, starts = start(tmp_path, JAX_PLATFORMS="cpu", GLIBC_TUNABLES=mine)
    assert starts == 2
    items = dict(item.split("=") for item in report["tunables"].split(":"))
    assert items == allocator.TUNABLES | {
        "glibc.malloc.top_pad": "65536",
        "glibc.malloc.check": "0",
    }


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_PLATFORMS": "cpu", allocator.SWITCH: "default"},
        {"JAX_PLATFORMS": "cpu", allocator.SWITCH: "tuned"},
        {"JAX_PLATFORMS": "cuda,cpu"},
        {"JAX_PLATFORMS": "tpu"},
    ],
    ids=["switched off", "already done", "gpu", "tpu"],
)
def test_leaves_the_process_alone(tmp_path, environment):
    report, starts = start(tmp_path, **environment)
    assert starts == 1
    assert report["tunables"] is None


def test_an_accelerator_is_seen_by_its_device_file(tmp_path, monkeypatch):
    monkeypatch.setattr(allocator, "ACCELERATORS", (f"{tmp_path}/nvidia[0-9]*",))
    assert allocator.cpu_only({})
    (tmp_path / "nvidia0").touch()
    assert not allocator.cpu_only({})
    assert allocator.cpu_only({"JAX_PLATFORMS": "cpu"})


PAGE_FAULTS = """
import resource, sys
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@glibc
def test_freed_memory_is_used_again_without_page_faults():
    def second_allocation(environment):
        command = [sys.executable, "-c", PAGE_FAULTS]
        return int(subprocess.check_output(command, env=environment, timeout=60))

    plain = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    plain.pop(allocator.SWITCH, None)
    settings = allocator.tuned(plain)
    assert settings is not None
    assert second_allocation(settings) < 100
