"""Reinforcement learning on a real, local Ray cluster, with an actor that is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.rl.config import Envs, Rollout
from tests.test_rl_run import check_store, killer, tiny

ROOT = Path(__file__).parent.parent.parent


def a_run(out):
    """Two updates with one host of environments, as actors."""
    return tiny(
        out,
        engine="ray",
        steps=2,
        envs=Envs(tasks=("color",), hosts=1, slots=2, max_steps=3),
        rollout=Rollout(max_lag=1, buckets=(1,), workers=1),
    )


def train(out):
    """Trains, and kills the host once there is a second version of the weights."""
    from jaxlab.rl import launch

    watch = killer("host0")
    launch.train(a_run(out), print, watch)
    assert not watch.left


@pytest.mark.slow
@pytest.mark.requires("ray")
def test_a_run_on_ray_survives_the_death_of_an_actor(tmp_path):
    """In a process of its own: Ray warns of threads and sockets as it likes."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    program = f"from {__name__} import train; train({str(tmp_path / 'run')!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    check_store(a_run(tmp_path / "run"))
