"""The training loop: same numbers whatever happens, and errors that help."""

import dataclasses
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab import config, program
from jaxlab.config import Checkpoint, MeshShape
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import locked_folder
from jaxlab.train import train
from tests.runs import finish, launch, launch_pair, losses, metrics, spoken, tiny

equal = partial(jax.tree.map, np.testing.assert_array_equal)


def quiet(line):
    """Takes no notice of what the run says."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An undisturbed run on 8 devices: its config and last state."""
    run = tiny(tmp_path_factory.mktemp("reference"))
    return run, jax.device_get(train(run, quiet))


def test_a_run_leaves_what_it_promises(reference):
    run, state = reference
    out, rows = Path(run.out), metrics(run.out)
    assert int(state.step) == 6 and sorted(rows)[-1] == 6
    assert {
        "config.json",
        "versions.json",
        "tokenizer.json",
        "metrics.jsonl",
        "checkpoints",
    } <= {p.name for p in out.iterdir()}
    wanted = {
        "train/loss",
        "train/grad_norm",
        "train/param_norm",
        "train/learning_rate",
        "time/step",
        "time/tokens_per_second",
        "time/mfu",
        "time/data",
        "time/compile",
        "time/checkpoint",
        "eval/loss",
    }
    assert wanted <= rows[6].keys()
    assert rows[1]["time/compile"] > 0
    assert losses(out)[-1] < losses(out)[0]
    versions = json.loads((out / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    again = config.load(out / "config.json")
    assert dataclasses.replace(again, model=run.model) == run
    events = list(out.glob("events.out.tfevents.*"))
    assert len(events) == 1


def test_saved_config_runs_again_to_the_same_numbers(reference, tmp_path):
    run, state = reference
    again = config.load(Path(run.out) / "config.json")
    other = train(dataclasses.replace(again, out=str(tmp_path / "again")), quiet)
    equal(jax.device_get(other), state)
    assert losses(tmp_path / "again") == losses(run.out)


@pytest.mark.parametrize("first", [2, 3])
def test_resumed_run_is_bit_equal(reference, tmp_path, first):
    run, state = reference
    run = dataclasses.replace(run, out=str(tmp_path / "run"))

    # The schedule depends on `steps`, so the run is cut by a signal, not by them.
    def interrupt(line):
        if line.startswith(f"step {first}/") and "tokens/s" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(run, interrupt)
    assert first <= int(stopped.step) < 6
    lines = []
    resumed = train(run, lines.append)
    assert any(f"restored from step {int(stopped.step)}" in line for line in lines)
    equal(jax.device_get(resumed), state)
    assert losses(run.out) == losses(reference[0].out)


@pytest.mark.slow
def test_finished_run_says_so_and_can_be_prolonged(reference, tmp_path):
    run = dataclasses.replace(
        reference[0],
        out=str(tmp_path / "run"),
        optimizer=config.AdamW(schedule="constant", warmup=2),
    )
    train(dataclasses.replace(run, steps=4), quiet)
    lines = []
    train(dataclasses.replace(run, steps=4), lines.append)
    assert any("raise --steps" in line for line in lines)
    longer = train(run, quiet)
    whole = train(dataclasses.replace(run, out=str(tmp_path / "whole")), quiet)
    equal(jax.device_get(longer), jax.device_get(whole))


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(fsdp=8),
        MeshShape(fsdp=4, tensor=2),
        MeshShape(fsdp=2, tensor=2),
        MeshShape(replica=2, data=2, fsdp=1, tensor=2),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same_curve(reference, tmp_path, shape):
    run = dataclasses.replace(reference[0], out=str(tmp_path / "run"), mesh=shape)
    train(run, quiet)
    np.testing.assert_allclose(losses(run.out), losses(reference[0].out), rtol=2e-5)


@pytest.mark.slow
def test_accumulation_and_scan_give_the_same_curve(reference, tmp_path):
    run = dataclasses.replace(
        reference[0], out=str(tmp_path / "run"), batch=16, mesh=MeshShape(fsdp=4)
    )
    train(run, quiet)
    cut = dataclasses.replace(run, out=str(tmp_path / "cut"), accumulate=2)
    train(cut, quiet)
    np.testing.assert_allclose(losses(cut.out), losses(run.out), rtol=2e-5)


@pytest.mark.slow
def test_resumes_onto_another_mesh(reference, tmp_path):
    run = dataclasses.replace(
        reference[0],
        out=str(tmp_path / "run"),
        optimizer=config.AdamW(schedule="constant", lr=1e-2, warmup=2),
    )
    train(dataclasses.replace(run, out=str(tmp_path / "whole")), quiet)
    train(dataclasses.replace(run, steps=4, mesh=MeshShape(fsdp=8)), quiet)
    train(dataclasses.replace(run, mesh=MeshShape(fsdp=2, tensor=2)), quiet)
    np.testing.assert_allclose(losses(run.out), losses(tmp_path / "whole"), rtol=2e-5)


def test_one_device_and_two_processes_give_the_same_curve(reference, tmp_path):
    alone = dataclasses.replace(reference[0], out=str(tmp_path / "alone"))
    code, said, error = finish(launch(alone))
    assert code == 0, error
    assert "1 x cpu" in said and "restored" not in said
    np.testing.assert_allclose(losses(alone.out), losses(reference[0].out), rtol=2e-5)

    pair = dataclasses.replace(
        alone, out=str(tmp_path / "pair"), mesh=MeshShape(fsdp=2)
    )
    ended = [finish(p) for p in launch_pair(pair)]
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "4 x cpu" in ended[0][1]
    assert spoken(ended[1][1]) == []  # process 0 speaks for all
    np.testing.assert_allclose(losses(pair.out), losses(alone.out), rtol=2e-5)
    scores = [metrics(run.out)[6]["eval/loss"] for run in (alone, pair)]
    np.testing.assert_allclose(*scores, rtol=2e-5)  # of all rows, not of process 0's
    assert len(list(Path(pair.out).glob("events.*"))) == 1


def wait_for_step(run, step, seconds=120):
    """Waits until a started run has logged a step."""
    path, end = Path(run.out) / "metrics.jsonl", time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and f'"step": {step}' in path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not reach step {step}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signalled_run_goes_on_to_the_same_weights(tmp_path, number):
    run = tiny(tmp_path, steps=400, log_every=5, checkpoint=Checkpoint(every=20))
    whole = dataclasses.replace(run, out=str(tmp_path / "whole"))
    code, _, error = finish(launch(whole))
    assert code == 0, error
    process = launch(run)
    wait_for_step(run, 45)
    process.send_signal(number)
    code, said, error = finish(process)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 0, error
        assert f"stopped by {number.name}" in said and error == ""
    code, said, error = finish(launch(run))
    assert code == 0, error
    assert "restored from step" in said
    ours, theirs = program.load(run.out), program.load(whole.out)
    assert ours.step == theirs.step == 400
    equal(ours.params, theirs.params)
    assert losses(run.out) == losses(whole.out)


def test_a_signal_to_one_of_two_processes_stops_and_saves_both(tmp_path):
    run = tiny(tmp_path, steps=100_000, log_every=5, checkpoint=Checkpoint(every=0))
    pair = launch_pair(run)
    wait_for_step(run, 20)
    pair[1].send_signal(signal.SIGTERM)
    ended = [finish(p) for p in pair]
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "stopped by" in ended[0][1]
    assert 20 <= program.load(run.out).step < 100_000


def test_nonfinite_loss_stops_with_the_last_good_state_saved(tmp_path):
    bad = config.AdamW(lr=1e30, warmup=0, clip=None, schedule="constant")
    run = tiny(tmp_path, optimizer=bad, checkpoint=Checkpoint(every=100), log_every=1)
    with pytest.raises(UserError, match=r"step \d+ is not finite") as caught:
        train(run, quiet)
    step = int(str(caught.value).split("step ")[1].split()[0])
    kept = program.load(run.out)
    assert kept.step == step - 1
    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(kept.params))
    )


def test_nonfinite_loss_can_be_skipped(tmp_path):
    bad = config.AdamW(lr=1e30, warmup=0, clip=None, schedule="constant")
    run = tiny(tmp_path, optimizer=bad, on_nonfinite="skip")
    state = train(run, quiet)
    assert int(state.step) == 6 and int(state.skipped) > 0
    assert metrics(run.out)[6]["train/skipped"] == int(state.skipped)


def test_second_process_in_a_run_folder_is_refused(tmp_path):
    run = tiny(tmp_path)
    with locked_folder(run.out):
        code, _, error = finish(launch(run))
    assert code == 1
    assert error.count("\n") == 1 and f"pid {os.getpid()}" in error


def test_run_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder.*--out"):
        train(tiny(tmp_path, out=str(tmp_path / "file" / "run")), quiet)


def test_mesh_that_does_not_divide_is_refused_before_compilation(tmp_path):
    with pytest.raises(ConfigError, match="model.heads 2 .* mesh.tensor 4"):
        train(tiny(tmp_path, mesh=MeshShape(tensor=4)), quiet)


def test_sequence_longer_than_the_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="1000000"):
        train(tiny(tmp_path, length=1_000_000), quiet)


def test_another_model_or_tokenizer_is_refused_with_the_field_named(
    reference, tmp_path
):
    run = dataclasses.replace(reference[0], out=str(tmp_path / "run"), steps=2)
    train(run, quiet)
    wider = dataclasses.replace(
        run, steps=6, model=dataclasses.replace(run.model, mlp=64)
    )
    before = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    with pytest.raises(UserError, match="model.mlp.*64.*32"):
        train(wider, quiet)
    words = dataclasses.replace(run.data, tokenizer="bpe:300")
    with pytest.raises(UserError, match="model.tokenizer"):
        train(dataclasses.replace(run, steps=6, data=words), quiet)
    assert before == sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())


def test_damaged_newest_checkpoint_is_named_and_passed_over(reference, tmp_path):
    run = dataclasses.replace(reference[0], out=str(tmp_path / "run"))
    train(run, quiet)
    newest = Path(run.out) / "checkpoints" / "6"
    victim = max(newest.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    lines = []
    state = train(run, lines.append)
    assert any(victim.name in line for line in lines)
    assert any("restored from step 4" in line for line in lines)
    equal(jax.device_get(state), reference[1])


def test_no_good_checkpoint_never_means_a_fresh_start(reference, tmp_path):
    run = dataclasses.replace(reference[0], out=str(tmp_path / "run"), steps=2)
    train(run, quiet)
    for path in (Path(run.out) / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(UserError):
        train(run, quiet)


def test_average_weights_are_evaluated_and_restored(tmp_path):
    run = tiny(tmp_path, ema=0.5)
    state = train(run, quiet)
    kept = program.load(run.out)
    equal(jax.device_get(kept.params), jax.device_get(state.ema))


def test_profile_is_written(tmp_path):
    run = tiny(tmp_path, steps=10, profile=True)
    train(run, quiet)
    assert list(Path(run.out).glob("profile/**/*.xplane.pb"))


def test_sample_is_logged(tmp_path):
    run = tiny(tmp_path, steps=2, sample=config.Sample(prompt="def ", tokens=5))
    train(run, quiet)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(run.out)
    events.Reload()
    (event,) = events.Tensors("sample")
    assert "def " in event.tensor_proto.string_val[0].decode()
