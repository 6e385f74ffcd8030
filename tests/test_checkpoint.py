"""Checkpoints: bit-exact, kept by rule, and honest about damage."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlab import checkpoint, manifest
from jaxlab.checkpoint import CheckpointError, open_checkpoints, restore, save, steps
from jaxlab.errors import ConfigError, UserError
from jaxlab.state import new_state
from tests.runs import spoken

ROOT = Path(__file__).parent.parent
MODEL = {"model": {"layers": 4, "rope": {"theta": 1e4}}, "tokenizer": "abc"}


def make_state(seed=0, width=64):
    params = {
        "w": jax.random.normal(jax.random.key(seed), (width, 8)),
        "bf16": jnp.arange(8, dtype=jnp.bfloat16) + seed,
        # What a text format or a cast would lose: NaN with a payload, -0, subnormal.
        "odd": jnp.array(
            np.array([0x7FC12345, 0x80000000, 1, 0xFF800000], np.uint32).view("f4")
        ),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return new_state(params, tx, ema=False)._replace(step=jnp.int32(seed))


def as_bytes(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )


def save_all(folder, wanted, **options):
    with open_checkpoints(folder, **options) as manager:
        for step in wanted:
            assert save(manager, step, make_state(step), MODEL)


def reopen(folder, log=print, **options):
    with open_checkpoints(folder, **options) as manager:
        return restore(manager, abstract(make_state()), description=MODEL, log=log)


def largest_file(folder):
    return max(Path(folder).rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_restores_what_was_saved_bit_for_bit_although_it_was_donated(tmp_path):
    next_step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = make_state(3, width=200_000)  # 19 MB take a while to write
    expected = as_bytes(make_state(3, width=200_000))
    with open_checkpoints(tmp_path) as manager:
        assert save(manager, 3, state, MODEL)
        for _ in range(5):  # overwrites the buffers meanwhile
            state = next_step(state)
        manager.wait()
        restored, step = restore(manager, abstract(state), description=MODEL)
    assert step == 3
    assert as_bytes(restored) == expected
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    next_step(restored)  # may be donated in its turn


def test_an_empty_folder_gives_none(tmp_path):
    assert reopen(tmp_path / "new") is None
    assert reopen(tmp_path / "absent", read_only=True) is None
    assert not (tmp_path / "absent").exists()


def test_restores_onto_another_mesh(tmp_path):
    def sharding(shape, names, *spec):
        kinds = (AxisType.Auto,) * len(names)
        mesh = jax.make_mesh(shape, names, axis_types=kinds)
        return NamedSharding(mesh, PartitionSpec(*spec))

    state = {"w": make_state().params["w"]}
    fsdp = sharding((8,), ("fsdp",), "fsdp")
    eight = jax.device_put(state, fsdp)
    # As in the training loop, whose mesh is in force while it saves and restores.
    with jax.set_mesh(fsdp.mesh), open_checkpoints(tmp_path) as manager:
        save(manager, 1, eight, MODEL)
        for other in (
            sharding((2, 4), ("data", "tensor"), "data", "tensor"),
            sharding((4, 2), ("data", "tensor"), None, "tensor"),
            jax.sharding.SingleDeviceSharding(jax.devices()[3]),
        ):
            found = restore(manager, abstract(state, other), description=MODEL)
            assert found is not None
            assert found[0]["w"].sharding.is_equivalent_to(other, 2)
            assert as_bytes(found[0]) == as_bytes(state)


def test_keeps_the_last_and_the_best_also_after_reopening(tmp_path):
    losses = {1: 0.5, 2: 3.0, 3: float("nan"), 4: 0.4, 5: float("-inf")}
    with open_checkpoints(tmp_path, keep_last=2, keep_best=1) as manager:
        for step, loss in losses.items():
            save(manager, step, make_state(step), MODEL, {"eval/loss": loss})
            if step == 3:
                assert steps(manager) == [1, 2, 3]
        assert steps(manager) == [4, 5]
    for step in (6, 7):  # as after two restarts; without a loss
        save_all(tmp_path, [step], keep_last=2, keep_best=1)
    with open_checkpoints(tmp_path, keep_last=1, keep_best=0) as manager:
        assert steps(manager) == [4, 6, 7]
        save(manager, 8, make_state(8), MODEL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["8"]


def test_a_step_is_saved_once(tmp_path):
    with open_checkpoints(tmp_path) as manager:
        assert save(manager, 5, make_state(5), MODEL)
        assert not save(manager, 5, make_state(6), MODEL, force=True)
        assert not save(manager, 4, make_state(4), MODEL)
        assert save(manager, 4, make_state(4), MODEL, force=True)
        _, step = restore(manager, abstract(make_state()), description=MODEL)
    assert step == 5


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("where", "harm", "complaint"),
    [
        ("state", flip_bit, "the sha256 of state/"),
        ("state", truncate, "bytes instead of"),
        ("state", Path.unlink, "is missing"),
        ("description", flip_bit, "the sha256 of description/metadata"),
        (manifest.NAME, truncate, "manifest.json is unreadable"),
    ],
)
def test_a_damaged_one_is_named_kept_aside_and_the_one_before_used(
    tmp_path, where, harm, complaint
):
    save_all(tmp_path, [1, 2])
    spot = tmp_path / "2" / where
    harm(spot if spot.is_file() else largest_file(spot))
    lines = []
    restored, step = reopen(tmp_path, lines.append)
    assert step == 1
    assert as_bytes(restored) == as_bytes(make_state(1))
    (line,) = lines
    assert str(tmp_path / "2") in line and complaint in line
    assert str(tmp_path / "damaged" / "2") in line and "\n" not in line
    # The run goes on, reaches the step again, and is damaged again.
    save_all(tmp_path, [2])
    flip_bit(largest_file(tmp_path / "2"))
    assert reopen(tmp_path)[1] == 1
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["2", "2-2"]


def test_no_sound_checkpoint_is_an_error_now_and_later(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in (1, 2):
        flip_bit(largest_file(tmp_path / str(step)))
    for _ in range(2):  # the second time, only damaged/ is left
        with pytest.raises(CheckpointError) as error:
            reopen(tmp_path, log=lambda line: None)
        assert str(tmp_path / "damaged") in str(error.value)
        assert "from scratch" in str(error.value)
    (tmp_path / "damaged" / "1").rename(tmp_path / "1")
    flip_bit(largest_file(tmp_path / "1"))  # mends it
    assert reopen(tmp_path)[1] == 1


def test_a_reader_changes_nothing(tmp_path):
    save_all(tmp_path, [1, 2])
    flip_bit(largest_file(tmp_path / "2"))
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()  # a training beside it writes this
    before = sorted(tmp_path.rglob("*"))
    lines = []
    assert reopen(tmp_path, lines.append, read_only=True)[1] == 1
    assert "2 is damaged" in lines[0] and "skipped" in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_manifest_it_is_tried_and_announced(tmp_path):
    save_all(tmp_path, [1, 2])
    (tmp_path / "2" / manifest.NAME).unlink()
    lines = []
    assert reopen(tmp_path, lines.append)[1] == 2
    where = tmp_path / "2"
    assert lines == [f"checkpoint {where} has no manifest.json: used unverified"]
    truncate(largest_file(tmp_path / "2"))
    lines.clear()
    assert reopen(tmp_path, lines.append)[1] == 1
    assert "used unverified" in lines[0] and "is damaged" in lines[1]
    assert (tmp_path / "damaged" / "2").is_dir()


@pytest.mark.parametrize(
    ("model", "field", "here", "there"),
    [
        ({"layers": 6, "rope": {"theta": 1e4}}, "model.layers", "6", "4"),
        ({"layers": 4, "rope": {"theta": 2.0}}, "model.rope.theta", "2.0", "10000.0"),
        ({"layers": 4}, "model.rope", "absent", "{'theta': 10000.0}"),
        (MODEL["model"] | {"tied": True}, "model.tied", "True", "absent"),
    ],
)
def test_another_model_is_refused_with_the_field(tmp_path, model, field, here, there):
    save_all(tmp_path, [1])
    with open_checkpoints(tmp_path) as manager, pytest.raises(UserError) as error:
        restore(manager, abstract(make_state()), description={"model": model})
    message = str(error.value)
    assert message.startswith(f"{field} is {here} here but {there} in the checkpoint")
    assert str(tmp_path / "1") in message
    assert steps(manager) == [1]


def test_another_state_is_refused_with_the_leaf(tmp_path):
    save_all(tmp_path, [1])
    half = make_state(width=32)
    cast = make_state()
    cast = cast._replace(params=cast.params | {"odd": jnp.zeros(4, jnp.bfloat16)})
    sgd = make_state()._replace(opt_state=())
    with open_checkpoints(tmp_path) as manager:
        for state, complaint in (
            (half, r"state.params/w is float32\[32,8\] here but float32\[64,8\] in"),
            (cast, r"state.params/odd is bfloat16\[4\] here but float32\[4\] in"),
            (sgd, r"state.opt_state/\S+ is absent here but int32\[\] in"),
        ):
            with pytest.raises(UserError, match=complaint):
                restore(manager, abstract(state), description=MODEL)


def test_bad_folders_and_numbers(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/checkpoints: Not a directory"):
        open_checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(ConfigError, match="keep_last is 0"):
        open_checkpoints(tmp_path, keep_last=0)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT TESTED: a full disk, since mounting a tmpfs failed ({error})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_named_and_training_can_go_on(small_disk, caplog):
    caplog.set_level("DEBUG")
    caplog.clear()
    large = {"w": jax.random.normal(jax.random.key(0), (3_000_000,))}
    folder = small_disk / "checkpoints"
    with open_checkpoints(folder) as manager:
        save(manager, 1, make_state(1), MODEL)
        with pytest.raises(UserError, match="no space left") as error:
            save(manager, 2, large, MODEL)
            manager.wait()
        assert str(folder) in str(error.value) and "checkpoint 2" in str(error.value)
        assert steps(manager) == [1]
        assert save(manager, 3, large, MODEL)
        with pytest.raises(UserError, match="checkpoint 3 was not written"):
            save(manager, 4, make_state(4), MODEL)  # tells of the one before
        assert save(manager, 4, make_state(4), MODEL)
    assert not [r for r in caplog.records if "orbax" in r.pathname]
    assert sorted(p.name for p in folder.iterdir()) == ["1", "4"]
    flip_bit(largest_file(folder / "4"))
    restored, step = reopen(folder)
    assert step == 1
    assert as_bytes(restored) == as_bytes(make_state(1))


def run_python(code, *args):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


KILLED_WHILE_SAVING = """
    import os, signal, sys, time
    from pathlib import Path
    import jax
    from jaxlab.checkpoint import open_checkpoints, restore, save

    folder = Path(sys.argv[1])
    state = {"w": jax.random.normal(jax.random.key(0), (16, 1024, 1024))}
    manager = open_checkpoints(folder)
    save(manager, 1, state, {})
    assert restore(manager, state, description={})[1] == 1
    save(manager, 2, state, {})
    while not (folder / "2.orbax-checkpoint-tmp").exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_a_kill_in_the_middle_of_a_save_the_last_whole_one_is_used(tmp_path):
    process = run_python(KILLED_WHILE_SAVING, tmp_path)
    output = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    assert output == ("", "")  # silent by default
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["1", "2.orbax-checkpoint-tmp"]
    state = {"w": jax.ShapeDtypeStruct((16, 1024, 1024), jnp.float32)}
    with open_checkpoints(tmp_path) as manager:
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        restored, step = restore(manager, state, description={})
    assert step == 1
    expected = jax.random.normal(jax.random.key(0), (16, 1024, 1024))
    np.testing.assert_array_equal(restored["w"], expected)


TWO_PROCESSES = """
    import sys
    from pathlib import Path
    import jax, numpy as np
    from jax.experimental import multihost_utils
    from jaxlab.checkpoint import CheckpointError, open_checkpoints, restore, save

    port, rank, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=kinds)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp"))

    def state(step):
        numbers = np.arange(4000, dtype=np.float32) + step
        w = jax.make_array_from_callback((4000,), sharding, numbers.__getitem__)
        return {"w": w}

    def harm(step):
        if rank == 0:
            files = (folder / str(step)).rglob("*")
            path = max(files, key=lambda p: p.is_file() and p.stat().st_size)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 16
            path.write_bytes(data)
        multihost_utils.sync_global_devices(f"harmed {step}")

    with open_checkpoints(folder) as manager:
        for step in (1, 2):
            save(manager, step, state(step), {"model": {"layers": 2}})
    harm(2)
    with open_checkpoints(folder) as manager:
        found, step = restore(manager, state(0), description={"model": {"layers": 2}})
        mine = found["w"].addressable_data(0)
        assert (np.asarray(mine) == np.asarray(state(1)["w"].addressable_data(0))).all()
        print("restored", step)
        try:
            restore(manager, state(0), description={"model": {"layers": 3}})
        except Exception as error:
            print(type(error).__name__, error)
    harm(1)
    with open_checkpoints(folder) as manager:
        try:
            restore(manager, state(0), description={"model": {"layers": 2}})
        except CheckpointError as error:
            print("refused", error)
"""


def test_two_processes_decide_alike(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [run_python(TWO_PROCESSES, port, rank, tmp_path) for rank in (0, 1)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], outputs
    first, second = (spoken(out) for out, _ in outputs)
    told = [line for line in first if "is damaged" in line]
    assert len(told) == 2 and str(tmp_path / "2") in told[0]
    assert [line for line in first if line not in told] == second  # only 0 reports
    assert second[0] == "restored 1"
    assert second[1].startswith("UserError model.layers is 3 here but 2 in")
    assert second[2].startswith("refused none of the checkpoints")


def test_importing_it_does_not_import_orbax():
    process = run_python(
        "import sys, jaxlab.checkpoint; print('orbax.checkpoint' in sys.modules)"
    )
    assert process.communicate(timeout=60)[0] == "False\n"
    assert checkpoint.BEST_METRIC == "eval/loss"
