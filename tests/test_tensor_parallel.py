"""The tensor axis handled by hand: the same numbers as on one device."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab import config, manual, program
from jaxlab.data import Batch
from jaxlab.errors import ConfigError
from jaxlab.mesh import AXES, batch_sharding, local_rows, partition_spec, put_batch
from jaxlab.models import gpt
from jaxlab.step import cross_entropy, mean_gradient
from jaxlab.train import train
from tests import runs

SMALL = config.GPT(layers=2, width=32, heads=8, kv_heads=8, mlp=64, vocab=64)


def mesh_of(**sizes):
    shape = [sizes.get(name, 1) for name in AXES]
    devices = jax.devices()[: int(np.prod(shape))]
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)


def make_batch(a=1, b=4, t=16, segments=False, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, n, (a, b, t), np.int32)  # noqa: E731
    mask = (rng.random((a, b, t)) > 0.2).astype(np.float32)
    return Batch(draw(64), draw(64), mask, np.sort(draw(3)) if segments else None)


def by_hand(model, mesh, **options):
    """`mean_gradient` on the mesh: of global weights and batch, jitted."""
    names = gpt.param_names(model)
    specs = manual.param_specs(names)
    ours = gpt.GPT(gpt.local(model, mesh.shape["tensor"]), by_hand=True)
    gradient = partial(
        mean_gradient,
        apply=ours.apply,
        row_axes=manual.row_axes(replicas_apart=False),
        **options,
    )
    spread = manual.spread(gradient, specs, (specs, P()), mesh)
    places = jax.tree.map(
        lambda n: NamedSharding(mesh, partition_spec(n)),
        names,
        is_leaf=lambda n: isinstance(n, tuple),
    )

    def run(params, batch):
        with jax.set_mesh(mesh):
            params = jax.device_put(params, places)
            batch = jax.device_put(batch, batch_sharding(mesh))
            return jax.jit(spread, out_shardings=(places, None))(params, batch)

    return run


def on_one_device(model, **options):
    return jax.jit(partial(mean_gradient, apply=gpt.GPT(model).apply, **options))


@partial(jax.jit, static_argnums=0)
def weights(model):
    """Fresh ones, but none of them at a special value."""
    key = jax.random.key(1)
    return jax.tree.map(
        lambda x: 1.5 * x + 0.1 * jax.random.normal(key, x.shape),
        gpt.init_params(model, jax.random.key(0)),
    )


def close(got, wanted, tolerance):
    """Each array to `tolerance` of its largest entry."""

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        worst = np.abs(a - b).max() / np.abs(b).max()
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)}: {worst:.1e}"

    jax.tree.map_with_path(check, got, wanted)


ALL = dict(data=2, fsdp=2, tensor=2)
CASES = {
    "2": (dict(tensor=2), dict(remat="dots", head_dim=6), {}),
    "8-accumulate": (dict(tensor=8), {}, dict(a=3)),
    "4-gelu-untied-qk_norm-scan-block": (
        dict(tensor=4),
        dict(
            activation="gelu",
            tied=False,
            qk_norm=True,
            kv_heads=4,
            scan=True,
            remat="block",
        ),
        dict(segments=True),
    ),
    "2x2x2-gqa-accumulate-segments": (
        ALL,
        dict(kv_heads=2, qk_norm=True),
        dict(a=2, segments=True),
    ),
    "2x2x2-scan-block": (ALL, dict(scan=True, remat="block", tied=False), {}),
    "2x2x2-scan-dots": (ALL, dict(scan=True, remat="dots"), dict(segments=True)),
    "replica": (dict(replica=2, fsdp=2, tensor=2), dict(activation="gelu"), {}),
}


@pytest.mark.parametrize(("sizes", "fields", "rows"), CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_are_those_of_one_device(sizes, fields, rows):
    model = config.resolve_model(dataclasses.replace(SMALL, **fields), 64)
    params, batch = weights(model), make_batch(**rows)
    got = by_hand(model, mesh_of(**sizes), z_loss=1e-3)(params, batch)
    close(got, on_one_device(model, z_loss=1e-3)(params, batch), 2e-5)


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_on_one_device():
    exact = config.resolve_model(dataclasses.replace(SMALL, scan=True), 64)
    model = dataclasses.replace(exact, dtype="bfloat16", remat="dots")
    params, batch = weights(exact), make_batch()
    wanted = on_one_device(exact)(params, batch)
    alone = on_one_device(model)(params, batch)
    got = by_hand(model, mesh_of(**ALL))(params, batch)

    def distance(found):
        flat, exact = (
            np.concatenate([x.ravel() for x in jax.tree.leaves(jax.device_get(tree))])
            for tree in (found[0], wanted[0])
        )
        return np.linalg.norm(flat - exact) / np.linalg.norm(exact)

    assert distance(got) < 1.3 * distance(alone) < 0.1
    np.testing.assert_allclose(got[1], wanted[1], rtol=2e-3)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_cross_entropy_of_a_cut_vocabulary(scale):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 5, 64)) * scale, jnp.float32)
    targets = jnp.asarray(rng.integers(0, 64, (3, 5)), jnp.int32)

    def total(logits, targets, by_hand=False):
        nll, log_z = cross_entropy(logits, targets, by_hand)
        return jnp.sum(nll + 0.1 * jnp.sin(log_z)), (nll, log_z)

    one = jax.value_and_grad(total, has_aux=True)
    cut = P(None, None, "tensor")
    spread = jax.shard_map(
        partial(one, by_hand=True),
        mesh=mesh_of(tensor=8),
        in_specs=(cut, P()),
        out_specs=(P(), cut),
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6 * scale),
        jax.jit(spread)(logits, targets),
        jax.jit(one)(logits, targets),
    )


def test_rows_of_a_cut_table_are_the_table_s():
    table = jnp.arange(48.0).reshape(16, 3)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 8)), jnp.int32)
    look_up = jax.shard_map(
        partial(manual.look_up, by_hand=True),
        mesh=mesh_of(tensor=4),
        in_specs=(P("tensor"), P()),
        out_specs=P(None, "tensor"),
    )
    np.testing.assert_array_equal(jax.jit(look_up)(table, tokens), table[tokens])


# -------------------------------------------------------------- the program


def made(overlap, mesh, **fields):
    run = config.Run(
        model=config.GPT(layers=1, width=32, heads=4, mlp=64, vocab=320),
        batch=16,
        length=16,
        steps=6,
        optimizer=config.AdamW(lr=1e-2, warmup=2),
        mesh=config.MeshShape(**mesh),
        parallel=config.Parallel(overlap),
    )
    return program.build(dataclasses.replace(run, **fields), 320)


def curve(program, steps=6):
    """Loss, norm of the gradient and of the weights of each step."""
    values, run = [], program.run
    rows = run.batch // run.accumulate
    with jax.set_mesh(program.mesh):
        state = program.init()
        for seed in range(steps):
            batch = make_batch(run.accumulate, rows, run.length, seed=seed)
            local = local_rows(program.mesh, rows)
            state, scalars = program.step(
                state, put_batch(program.mesh, batch, rows, local)
            )
            values.append(jax.device_get(scalars))
    same = jax.tree.map(
        lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim),
        state,
        program.abstract,
    )
    assert all(jax.tree.leaves(same))
    return values


GOSSIP = config.NoLoCo(inner=config.AdamW(lr=1e-2, warmup=2), inner_steps=2)
PROGRAMS = {
    "adamw": (ALL, dict(accumulate=2, ema=0.9, z_loss=1e-3)),
    "noloco": (
        dict(replica=2, data=1, fsdp=2, tensor=2),
        dict(optimizer=GOSSIP, accumulate=2, on_nonfinite="skip"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "fields"), PROGRAMS.values(), ids=PROGRAMS.keys())
def test_a_run_by_hand_has_the_curve_of_one_by_the_partitioner(mesh, fields):
    got, wanted = (curve(made(how, mesh, **fields)) for how in ("plain", "off"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), got, wanted)


def test_the_collectives_stand_in_the_program():
    """One gather for each sub-layer and the output, one sum for each and the input."""
    model = config.resolve_model(SMALL, 64)
    ours = gpt.GPT(gpt.local(model, 4), by_hand=True)
    params, specs = weights(model), manual.param_specs(gpt.param_names(model))
    spread = manual.spread(
        lambda params, tokens: ours.apply({"params": params}, tokens[0]),
        specs,
        P(("replica", "data", "fsdp"), None, "tensor"),
        mesh_of(tensor=4, data=2),
    )
    tokens = jax.ShapeDtypeStruct((1, 4, 16), jnp.int32)
    text = str(jax.make_jaxpr(spread)(params, tokens))
    found = re.findall(r"= (all_gather|reduce_scatter|psum_scatter|psum\w*)\[", text)
    assert sorted(found) == ["all_gather"] * 5 + ["reduce_scatter"] * 5
    # Bare products beside them, not calls that a transformation cannot look into.
    assert len(re.findall(r"= dot_general\[", text)) >= 7 * 2 + 1


def test_no_device_computes_on_the_rows_of_others():
    """As happens beside automatic axes, where XLA copies the batch to all devices."""
    plain = made("plain", ALL)
    with jax.set_mesh(plain.mesh):
        batch = put_batch(plain.mesh, make_batch(b=16), 16, np.arange(16))
        text = plain.step.lower(plain.abstract, batch).compile().as_text()
    gathered = set(re.findall(r"= (f32\[\S+?\])\S* all-gather\(", text))
    assert "f32[4,16,32]" in gathered  # rows / (data x fsdp), time, width
    assert "f32[16,16,32]" not in text and "f32[16,8,32]" not in text


@pytest.mark.slow
def test_rings_have_the_curve_of_the_plain_collectives():
    """Also with replicas that drift apart, and fsdp inside each."""
    mesh = dict(replica=2, data=1, fsdp=2, tensor=2)
    ring = made("ring", mesh, optimizer=GOSSIP, accumulate=2)
    wanted = curve(made("plain", mesh, optimizer=GOSSIP, accumulate=2), 4)
    near = partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(near, curve(ring, 4), wanted)
    assert ring.overlap_report is not None
    with jax.set_mesh(ring.mesh):
        report = ring.overlap_report()
    assert len(report.rewritten) >= 4 * ring.run.model.layers
    assert not report.skipped


def test_with_one_device_there_is_nothing_to_do(tmp_path):
    lines = []
    run = runs.tiny(tmp_path, steps=1, parallel=config.Parallel("ring"))
    train(run, lines.append)
    assert "tensor    one device: parallel.overlap ring has nothing to do" in lines


@pytest.mark.slow
def test_a_run_by_hand_can_go_on_without(tmp_path):
    """Evaluation, samples and checkpoints do not know who placed the collectives."""
    lines = []
    run = runs.tiny(
        tmp_path,
        steps=2,
        mesh=config.MeshShape(fsdp=2, tensor=2),
        parallel=config.Parallel("plain"),
        sample=config.Sample(tokens=4),
    )
    run = dataclasses.replace(
        run, data=dataclasses.replace(run.data, isolate_documents=True)
    )
    train(run, lines.append)
    assert any(line.startswith("tensor    collectives by hand, one") for line in lines)
    off = dataclasses.replace(run, parallel=config.Parallel(), steps=4)
    assert int(train(off, lines.append).step) == 4
    assert any("restored from step 2" in line for line in lines)
    rows = runs.metrics(run.out)
    assert rows[4]["eval/loss"] < rows[2]["eval/loss"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(length=30), ["length 30", "mesh.tensor 4", "overlap ring", "off"]),
        (dict(model=config.GPT(width=48, heads=6, vocab=64)), ["heads 6"]),
        (dict(model=dataclasses.replace(SMALL, kv_heads=2)), ["kv_heads 2"]),
        (dict(model=dataclasses.replace(SMALL, mlp=66)), ["mlp 66", "mesh.tensor 4"]),
        (dict(model=dataclasses.replace(SMALL, vocab=66)), ["vocab 66"]),
    ],
)
def test_what_does_not_divide_is_refused(change, words):
    run = config.Run(model=SMALL, parallel=config.Parallel("ring"))
    run = dataclasses.replace(run, **change)
    run = dataclasses.replace(run, model=config.resolve_model(run.model, 64))
    with pytest.raises(ConfigError) as caught:
        config.validate(run, config.MeshShape(data=1, tensor=4))
    assert all(word in str(caught.value) for word in words)
    off = dataclasses.replace(run, parallel=config.Parallel())
    if "length" in change:
        config.validate(off, config.MeshShape(data=1, tensor=4))


def test_the_command_line_knows_it(tmp_path):
    run = config.Run(model=SMALL)
    config.save(run, tmp_path / "x.json")
    got = config.parse([str(tmp_path / "x.json"), "--parallel.overlap", "auto"])
    assert got == dataclasses.replace(run, parallel=config.Parallel("auto"))
    with pytest.raises(ConfigError, match="bidirectional"):
        config.parse([str(tmp_path / "x.json"), "--parallel.overlap", "rings"])
