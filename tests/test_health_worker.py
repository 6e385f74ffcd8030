"""What a training process does with and without a supervisor."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.health import look
from jaxlab.health.detect import Phase
from jaxlab.health.record import read_board
from jaxlab.health.worker import Monitor, monitor

ROOT = Path(__file__).parent.parent


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv("JAXLAB_HEALTH_BOARD", raising=False)


@pytest.fixture
def board(monkeypatch, tmp_path):
    """The path of the board that a supervisor asks for, of rank 2."""
    path = tmp_path / "board"
    monkeypatch.setenv("JAXLAB_HEALTH_BOARD", str(path))
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    return path


def test_without_a_supervisor_nothing_happens(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = threading.active_count()
    with monitor() as health:
        assert type(health) is Monitor

        def step_fn(x):
            return x

        assert health.wrap(step_fn) is step_fn
        health.step(3)
        with health.pause("checkpoint"):
            pass
        assert threading.active_count() == threads
    assert not [*tmp_path.iterdir()]


def test_an_error_in_the_loop_is_the_loops_own(alone):
    with pytest.raises(ZeroDivisionError), monitor():
        raise ZeroDivisionError


def test_a_board_that_cannot_be_written_is_named(board, monkeypatch):
    monkeypatch.setenv("JAXLAB_HEALTH_BOARD", str(board / "no" / "folder"))
    with pytest.raises(UserError, match="cannot write the board"), monitor():
        pass


def test_phases_are_on_the_board(board):
    def phase():
        return Phase(read_board(board).phase)

    with monitor() as health:
        state = read_board(board)
        assert (state.rank, state.pid) == (2, os.getpid())
        assert phase() == Phase.STARTING
        health.step(7)
        assert (phase(), read_board(board).step) == (Phase.STEP, 7)
        for name, expected in (
            ("checkpoint", Phase.CHECKPOINT),
            ("evaluation", Phase.EVALUATION),
            ("tidying up", Phase.OTHER),
        ):
            with health.pause(name):
                assert phase() == expected
            assert phase() == Phase.STEP
        with health.pause("evaluation"), health.pause("checkpoint"):
            assert phase() == Phase.CHECKPOINT
    assert phase() == Phase.DONE


def test_a_rank_that_fails_is_not_done(board):
    """It may keep the others waiting for as long as it takes to end."""
    with pytest.raises(ZeroDivisionError), monitor() as health:
        health.step(1)
        raise ZeroDivisionError
    assert Phase(read_board(board).phase) == Phase.STEP


# A training loop on 8 devices. Requests appear while it runs, as an agent writes them.
LOOP = """
    import json, os, sys
    from pathlib import Path

    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, PartitionSpec as P

    jax.config.update("jax_num_cpu_devices", 8)

    from jaxlab.health.worker import monitor

    folder = Path(sys.argv[1])
    requests = {int(k): v for k, v in json.loads(sys.argv[2]).items()}
    collective = sys.argv[3] == "collective"

    def local(w, x):
        x = jnp.tanh(x @ w)
        mean = jax.lax.pmean(x.mean(), "data") if collective else x.mean()[None]
        return w * 0.999, mean

    with monitor() as health:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        out = P() if collective else P("data")
        specs = dict(in_specs=(P(), P("data")), out_specs=(P(), out))
        step_fn = jax.jit(jax.shard_map(local, mesh=mesh, **specs))
        watched = health.wrap(step_fn)
        w, x, means = jnp.eye(64), jnp.ones((64, 64)), []
        for step in range(60):
            if step in requests:
                (folder / "request.json").write_text(requests[step])
            health.step(step)
            w, mean = watched(w, x)
            means.append(mean.block_until_ready())
            looked = folder / "looked.json"
            if looked.exists():
                looked.rename(folder / f"looked-{step}.json")
    w = jnp.eye(64)
    for mean in means:  # nobody looks, and the numbers are the same
        w, same = step_fn(w, x)
        assert (same == mean).all()
"""


def loop(folder, requests, program="collective"):
    """Runs the loop; answers by the step after which they were there."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env |= {"JAXLAB_HEALTH_BOARD": str(folder / "board")}
    words = [str(folder), json.dumps(requests), program]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOOP), *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr

    def refuse(name):
        raise AssertionError(f"{name} is no JSON, and the agent could not send it")

    return {
        int(path.stem.partition("-")[2]): json.loads(
            path.read_text(), parse_constant=refuse
        )
        for path in folder.glob("looked-*.json")
    }


STEPS = 6


def request(kind, step, number):
    return json.dumps({"kind": kind, "step": step, "steps": STEPS, "id": number})


def test_it_records_and_looks_when_asked(tmp_path):
    answers = loop(
        tmp_path,
        {
            5: request("learn", 10, 1),
            20: "{",  # cut off while it is written
            21: request("probe", 30, 2),
            35: request("profile", 3, 3),  # of a step that is past
            36: request("profile", 40, 4),
        },
    )
    learned, compared = (step + STEPS - 1 for step in (10, 40))
    assert {step: body["id"] for step, body in answers.items()} == {
        learned: 1,
        30: 2,
        compared: 4,
    }
    assert look.read(answers[compared]).step.shape == (STEPS - 1, 1)
    times = look.read(answers[learned])
    # One column a process, and this is one.
    assert times.step.shape == (STEPS - 1, 1)
    assert (times.step > 0).all() and (times.pure_comm > 0).all()
    assert (times.local >= 0).all() and (times.local <= times.step).all()
    assert answers[30]["delay"] == [[None]]

    state = read_board(tmp_path / "board", 0)
    assert Phase(state.phase) == Phase.DONE and state.step == 59
    assert state.enter_seq == state.exit_seq == len(state.samples) == 60
    assert [sample.step for sample in state.samples] == [*range(60)]
    judged = [s.step for s in state.samples if s.phase == Phase.STEP]
    # All but what was compiled: the first step is no measure of the others.
    assert 0 not in judged and set(range(1, 60)) - set(judged) <= {1, 10, 30, 40}
    spent = np.array([s.t_exit - s.t_start for s in state.samples])
    assert (spent > 0).all()


def test_a_program_without_collectives_says_so(tmp_path):
    answers = loop(tmp_path, {5: request("profile", 10, 4)}, "none")
    (body,) = answers.values()
    assert body["id"] == 4 and "with collectives" in body["failed"]
