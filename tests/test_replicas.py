"""Training replicas that drift apart, as `scripts/train.py` does it."""

import dataclasses
import json
import math
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import config, program, replicas
from jaxlab.data import Batch
from jaxlab.errors import ConfigError, UserError
from jaxlab.mesh import local_rows, put_batch
from jaxlab.optim import audit, exchange_bytes, partners
from jaxlab.train import train
from tests import runs


def gossip(**fields):
    inner = config.AdamW(lr=1e-2, warmup=2)
    return config.NoLoCo(**{"inner": inner, "inner_steps": 4} | fields)


def tiny(tmp_path, replica=8, **fields):
    mesh = config.MeshShape(replica=replica, data=1)
    base = dict(mesh=mesh, optimizer=gossip(), batch=16, steps=10)
    return runs.tiny(tmp_path, **base | fields)


def program_of(**fields):
    run = config.Run(
        model=config.GPT(layers=2, width=32, heads=4, mlp=64, vocab=320),
        batch=16,
        length=16,
        optimizer=gossip(inner_steps=2),
    )
    return program.build(dataclasses.replace(run, **fields), 320)


def batch_of(made, seed=0):
    run = made.run
    rows = run.batch // run.accumulate
    tokens = np.random.default_rng(seed).integers(
        0, 300, (run.accumulate, rows, run.length + 1), np.int32
    )
    ones = np.ones(tokens[..., 1:].shape, np.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], ones, None)


def put(made, batch):
    rows = made.run.batch // made.run.accumulate
    return put_batch(made.mesh, batch, rows, local_rows(made.mesh, rows))


MESHES = [
    (dict(replica=8, data=1), {}),
    (dict(replica=4, data=1, fsdp=2), {}),
    (dict(replica=2, data=2, fsdp=2), dict(accumulate=2)),
    (dict(replica=2, data=1, fsdp=2, tensor=2), dict(ema=0.9)),
    (
        dict(replica=2, data=1, fsdp=2, tensor=2),
        dict(parallel=config.Parallel("plain")),
    ),
]


@pytest.mark.parametrize(("shape", "fields"), MESHES)
def test_nothing_but_the_exchange_crosses_replicas(shape, fields):
    made = program_of(mesh=config.MeshShape(**shape), **fields)
    with jax.set_mesh(made.mesh):
        state, batch = made.init(), put(made, batch_of(made))
        compiled = made.step.lower(state, batch).compile()
        text = compiled.as_text()
        before = jax.tree.map(lambda x: x.sharding, state)
        for _ in range(3):
            state, values = made.step(state, batch)
    each = 8 // shape["replica"]
    across = []
    for c in audit.collectives(text):
        groups = c.groups or c.pairs or ((0, 7),)
        if any(len({device // each for device in group}) > 1 for group in groups):
            across.append(c)
    assert {c.kind for c in across} == {"collective-permute"}
    assert all(c.conditional for c in across)
    assert values["loss"].shape == values["replica_std"].shape == (shape["replica"],)
    assert text.count("may-alias") + text.count("must-alias") >= len(
        jax.tree.leaves(state)
    )
    after = jax.tree.map(lambda x: x.sharding, state)
    kept = jax.tree.map(
        lambda a, b, x: a.is_equivalent_to(b, x.ndim), before, after, state
    )
    assert all(jax.tree.leaves(kept))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "fields"), MESHES[1:])
def test_other_axes_do_not_change_the_numbers(shape, fields):
    def run(shape):
        made = program_of(mesh=config.MeshShape(**shape), **fields)
        with jax.set_mesh(made.mesh):
            state = made.init()
            for seed in range(5):
                state, values = made.step(state, put(made, batch_of(made, seed)))
        return jax.device_get((state.params, values["loss"]))

    alone = dict(replica=shape["replica"], data=1)
    devices = jax.devices()[: shape["replica"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices)
        want = run(alone)
    got = run(shape)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), got, want
    )


def test_a_replica_that_is_not_finite_harms_no_other():
    made = program_of(mesh=config.MeshShape(replica=8, data=1), on_nonfinite="skip")
    batch = batch_of(made)
    mask = batch.mask_abt.copy()
    mask[:, 6:8] = math.nan  # the rows of replica 3
    with jax.set_mesh(made.mesh):
        state, good = made.init(), made.init()
        broken = put(made, batch._replace(mask_abt=mask))
        state, values = made.step(state, broken)
        good, _ = made.step(good, put(made, batch))
        assert values["finite"].tolist() == [i != 3 for i in range(8)]
        for a, b, first in zip(
            jax.tree.leaves(state.params),
            jax.tree.leaves(good.params),
            jax.tree.leaves(made.init().params),
            strict=True,
        ):
            others = [i for i in range(8) if i != 3]
            np.testing.assert_array_equal(a[np.array(others)], b[np.array(others)])
            np.testing.assert_array_equal(a[3], first[3])
        state, values = made.step(state, broken)  # now they exchange
    assert int(state.opt_state.count) == 2
    assert state.skipped.tolist() == [2 * (i == 3) for i in range(8)]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert np.isfinite(values["replica_std"]).all()


@pytest.mark.slow
def test_a_run_tells_of_its_exchanges(tmp_path):
    lines = []
    run = tiny(tmp_path, steps=12)
    state = train(run, lines.append)
    assert any(
        line == "replicas  8, exchanging every 4 steps (round_robin)" for line in lines
    )
    rows = runs.metrics(run.out)
    weights = jax.tree.map(lambda x: x[0], state.params)
    for outer in range(3):
        row = rows[4 * (outer + 1)]
        partner = [row[f"noloco/partner_of_{i}"] for i in range(8)]
        assert partner == partners("round_robin", 8, run.seed, outer).tolist()
        assert row["noloco/bytes"] == (outer + 1) * exchange_bytes(weights, axis_size=8)
        assert row["noloco/replica_std"] > 1e-4
        assert row["noloco/loss_min"] <= row["train/loss"] <= row["noloco/loss_max"]
    assert "noloco/bytes" not in rows[5]
    last = rows[12]
    assert last["noloco/eval_loss_min"] <= last["noloco/eval_loss_mean"]
    assert last["eval/loss"] < rows[3]["eval/loss"]
    # The exact hand-over: after an exchange the weights are the slow ones.
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(state.params),
        jax.device_get(state.opt_state.slow),
    )


def test_a_trained_model_is_the_mean_of_its_replicas(tmp_path):
    run = tiny(tmp_path, steps=7)
    state = train(run, lambda line: None)
    found = program.load(run.out)
    jax.tree.map(
        lambda mean, x: np.testing.assert_allclose(mean, x.mean(0), atol=1e-6),
        jax.device_get(found.params),
        jax.device_get(state.params),
    )
    loss, _, _ = program.held_out_loss(found, run.data.corpus, batches=2)
    assert math.isfinite(loss)


def test_two_processes_hold_the_replicas_of_one(tmp_path):
    alone = tiny(tmp_path, replica=4, steps=9)
    code, _, error = runs.finish(runs.launch(alone, devices=4))
    assert code == 0, error
    pair = dataclasses.replace(alone, out=str(tmp_path / "pair"))
    ended = [runs.finish(process) for process in runs.launch_pair(pair)]
    assert [code for code, *_ in ended] == [0, 0], ended
    one, two = (program.load(run.out) for run in (alone, pair))
    assert one.step == two.step == 9
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    # Process 0 tells of the two replicas that it holds.
    here, there = runs.metrics(alone.out)[8], runs.metrics(pair.out)[8]
    assert here["noloco/partner_of_3"] == there["noloco/partner_of_3"]
    assert here["noloco/loss_min"] <= there["noloco/loss_min"]
    assert there["noloco/loss_max"] <= here["noloco/loss_max"]
    scores = [runs.metrics(run.out)[9]["eval/loss"] for run in (alone, pair)]
    np.testing.assert_allclose(*scores, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("pairing", ["round_robin", "all"])
def test_killed_within_a_round_it_ends_with_the_same_numbers(tmp_path, pairing):
    """Another process goes on from step 37, seven steps after an exchange."""
    whole = tiny(
        tmp_path,
        steps=120,
        optimizer=gossip(pairing=pairing, inner_steps=10),
        evaluate=config.Evaluate(every=0, batches=1),
        checkpoint=config.Checkpoint(every=0),
    )
    want = jax.device_get(train(whole, lambda line: None))
    cut = dataclasses.replace(
        whole, out=str(tmp_path / "cut"), checkpoint=config.Checkpoint(every=37)
    )
    process = runs.launch(cut, devices=8)
    deadline = time.monotonic() + 120
    manifest = tmp_path / "cut/checkpoints/37/manifest.json"
    while not manifest.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = []
    got = jax.device_get(train(cut, lines.append))
    assert any("restored from step 37" in line for line in lines)
    jax.tree.map(np.testing.assert_array_equal, got, want)

    def exchanges(run):
        rows = runs.metrics(run.out).items()
        return {
            step: {k: v for k, v in row.items() if k.startswith("noloco/")}
            for step, row in rows
            if step < 120
        }

    assert exchanges(cut) == exchanges(whole)


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_replicas(tmp_path):
    lines = []
    run = tiny(tmp_path, steps=6)
    eight = jax.device_get(train(run, lines.append))
    code, _, err = runs.finish(
        runs.launch(
            run, "--mesh.replica", "4", "--steps", "6", "--out", run.out, devices=4
        )
    )
    assert code == 0, err
    code, out, err = runs.finish(
        runs.launch(run, "--mesh.replica", "4", "--steps", "8", devices=4)
    )
    assert code == 0, err
    assert "the checkpoint has 8 replicas and this run 4: the first ones go on" in out
    rows = runs.metrics(run.out)
    assert rows[8]["noloco/partner_of_3"] < 4 and "noloco/partner_of_4" not in rows[8]
    lines.clear()
    again = train(dataclasses.replace(run, steps=10), lines.append)
    assert any(
        "has 4 replicas and this run 8: the first ones are copied" in x for x in lines
    )
    assert again.step.tolist() == [10] * 8
    assert eight.step.tolist() == [6] * 8


def test_bad_outer_settings_fail_before_compilation(tmp_path):
    run = tiny(tmp_path, optimizer=gossip(momentum=0.9))
    with pytest.raises(ConfigError, match="gamma 0.7 is unstable: with momentum 0.9"):
        train(run, lambda line: None)
    process = runs.launch(tiny(tmp_path), "--optimizer.gamma", "3", devices=8)
    code, _, err = runs.finish(process)
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert "it must be below 1.6154" in err


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    bad = config.AdamW(lr=1e30, warmup=0, clip=None, schedule="constant")
    run = tiny(tmp_path, optimizer=gossip(inner=bad), steps=6)
    with pytest.raises(
        UserError, match="is not finite.*last checkpoint there is whole"
    ):
        train(run, lambda line: None)


def test_config_with_either_optimizer_survives_json(tmp_path):
    run = tiny(tmp_path)
    config.save(run, tmp_path / "x.json")
    assert config.load(tmp_path / "x.json") == run
    assert (
        json.loads((tmp_path / "x.json").read_text())["optimizer"]["type"] == "NoLoCo"
    )
    edited = config.parse(
        [str(tmp_path / "x.json"), "--optimizer.inner.lr", "0.5", "--mesh.replica", "4"]
    )
    assert edited.optimizer.inner.lr == 0.5 and edited.mesh.replica == 4


def test_metrics_of_replicas_come_to_the_host():
    mesh = jax.make_mesh((8,), ("replica",))
    x = jax.device_put(
        jnp.arange(8.0), jax.NamedSharding(mesh, jax.sharding.PartitionSpec("replica"))
    )
    assert replicas.to_host({"x": x})["x"].tolist() == list(range(8))
