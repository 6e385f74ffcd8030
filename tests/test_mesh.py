"""Meshes, sharding by names, and which rows a process loads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxlab import config, mesh
from jaxlab.config import Distributed, MeshShape
from jaxlab.errors import ConfigError
from jaxlab.models import gpt
from jaxlab.state import new_state, state_shardings, with_shardings

SHAPE = MeshShape(replica=1, data=2, fsdp=2, tensor=2)


def test_a_planned_mesh_keeps_neighbours_off_a_slow_link_and_rows_in_place():
    delay = np.full((8, 8), 1e-3)
    delay[2, 3] = delay[3, 2] = 1.0
    made = mesh.make_mesh(MeshShape(data=8), delay)
    order = [device.id for device in made.devices.flat]
    ring = set(zip(order, [*order[1:], order[0]], strict=True))
    assert sorted(order) == list(range(8)) and not ring & {(2, 3), (3, 2)}
    batch = np.arange(8 * 3).reshape(1, 8, 3)
    rows = mesh.local_rows(made, 8)
    placed = mesh.put_batch(made, batch, rows=8, local=rows)
    np.testing.assert_array_equal(placed, batch)


def test_mesh_has_the_four_axes_in_order():
    made = mesh.make_mesh(SHAPE)
    assert dict(made.shape) == {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.make_mesh(MeshShape(tensor=4)).shape["data"] == 2
    with pytest.raises(ConfigError, match="tensor 3"):
        mesh.make_mesh(MeshShape(tensor=3))


def test_names_become_axes():
    assert mesh.partition_spec(("embed", "heads")) == P("fsdp", "tensor")
    assert mesh.partition_spec((None, "unheard-of")) == P(None, None)


def test_constrain_lays_out_and_is_nothing_without_a_mesh():
    x = jnp.ones((8, 4, 16))
    lay = jax.jit(lambda x: mesh.constrain(x, "batch", None, "mlp"))
    assert lay(x).sharding.is_fully_replicated
    with jax.set_mesh(mesh.make_mesh(SHAPE)):
        shard = lay(x).sharding.shard_shape(x.shape)
    assert shard == (2, 4, 8)


def test_constrain_leaves_manual_axes_alone():
    made = mesh.make_mesh(SHAPE)

    def body(x):
        return mesh.constrain(x, "batch", "mlp") * 2

    with jax.set_mesh(made):
        double = jax.jit(
            jax.shard_map(
                body,
                axis_names={"tensor"},
                in_specs=P(None, "tensor"),
                out_specs=P(None, "tensor"),
            )
        )
        x = jnp.arange(64.0).reshape(8, 8)
        np.testing.assert_array_equal(double(x), 2 * x)


@pytest.mark.parametrize("scan", [False, True])
def test_state_is_cut_as_its_weights_are(scan):
    model = config.resolve_model(
        config.GPT(layers=2, width=32, heads=4, mlp=64, scan=scan, tied=False), 64
    )
    made, tx = mesh.make_mesh(SHAPE), config.AdamW().build(10)
    shapes = jax.eval_shape(
        lambda: new_state(gpt.init_params(model, jax.random.key(0)), tx, True)
    )
    names = gpt.param_names(model)
    shardings = state_shardings(shapes, names, tx, made)
    state = with_shardings(shapes, shardings)
    for tree in (
        state.params,
        state.ema,
        optax.tree.get(state.opt_state, "mu"),
        optax.tree.get(state.opt_state, "nu"),
    ):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path)
            cut = np.prod(x.shape) // np.prod(x.sharding.shard_shape(x.shape))
            assert cut == (1 if "scale" in name else 4), name
    assert state.step.sharding.is_fully_replicated


def test_every_row_is_loaded_and_put_in_its_place():
    made, rows = mesh.make_mesh(SHAPE), 8
    local = mesh.local_rows(made, rows)
    np.testing.assert_array_equal(local, np.arange(rows))
    batch = np.arange(2 * rows * 3, dtype=np.int32).reshape(2, rows, 3)
    placed = mesh.put_batch(made, {"x": batch, "none": None}, rows, local)
    np.testing.assert_array_equal(placed["x"], batch)
    assert placed["x"].sharding.shard_shape(batch.shape) == (2, 2, 3)


def test_half_given_distributed_settings_are_refused():
    with pytest.raises(ConfigError, match="go together"):
        mesh.start_processes(Distributed(coordinator="localhost:1"), MeshShape())


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_jobs_of_several_processes_are_noticed(monkeypatch, environment, several):
    for name in (
        "SLURM_NTASKS",
        "OMPI_COMM_WORLD_SIZE",
        "PMI_SIZE",
        "TPU_WORKER_HOSTNAMES",
        "JOB_COMPLETION_INDEX",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mesh.several_processes() == several
