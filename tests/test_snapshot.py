"""Hot snapshots: bit-exact on any mesh, found after a kill, honest about damage."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlab import program, shards
from jaxlab.config import Checkpoint, Evaluate
from jaxlab.errors import UserError
from jaxlab.peer_copies import plan
from jaxlab.shards import Header, Piece, assembled, read_header, read_shard, write
from jaxlab.snapshot import interval, newest, open_snapshots, restore
from tests.runs import finish, launch, losses, run_ranks, spoken, tiny

MODEL = {"model": {"layers": 4}}


def mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def make_state(step=0):
    """Eight shards, copies, a scalar, and what a cast or a text would lose."""
    spread = NamedSharding(mesh((4, 2), ("fsdp", "tensor")), PartitionSpec("fsdp"))
    odd = np.array([0x7FC12345, 0x80000000, 1, 0xFF800000], np.uint32).view("f4")
    w = np.random.default_rng(step).normal(size=(16, 6)).astype("f4")
    return {
        "w": jax.device_put(w, spread),
        "bf16": jnp.arange(8, dtype=jnp.bfloat16) + step,
        "odd": jnp.array(odd),
        "step": jnp.int32(step),
    }


def as_bytes(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def abstract(state, **fixed):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=fixed.get("sharding", x.sharding)
        ),
        state,
    )


def write_some(folder, *wanted):
    hot = open_snapshots(folder, 1.0)
    for step in wanted:
        hot.save(step, make_state(step), MODEL)
        hot.wait()
    return hot


def read_back(hot, after=-1, log=print, description=MODEL, state=None):
    wanted = abstract(make_state() if state is None else state)
    return restore(hot, wanted, description=description, after=after, log=log)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def flip_bit(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 16
    path.write_bytes(data)


# ------------------------------------------------------------------- what is written


@given(st.floats(1e-4, 1e4), st.floats(1e-3, 1e5))
def test_steps_of_snapshots_nest_and_are_no_further_apart_than_asked(pace, seconds):
    found = interval(pace, seconds)
    assert found & (found - 1) == 0
    assert found == 1 or found * pace <= seconds * (1 + 1e-9)
    assert 2 * found * pace > seconds * (1 - 1e-9)


def test_it_is_due_at_the_pace_of_the_steps(tmp_path):
    now = [0.0]
    hot = open_snapshots(tmp_path, 1.0)
    hot.clock = lambda: now[0]

    def due(step):
        now[0] += 0.2
        return hot.due(step)

    assert [step for step in range(1, 20) if due(step)] == [4, 8, 12, 16]
    hot.busy.set()  # one is still being written: nobody waits for it
    assert not any(due(step) for step in range(20, 30))
    assert not open_snapshots(tmp_path / "none", 0.0).due(64)
    assert not (tmp_path / "none").exists()


def test_one_process_writes_each_range_once():
    state = make_state()
    leaves = jax.tree.leaves(state)
    size = {number: 0 for number in range(len(leaves))}
    mine = plan(leaves, 0, [0])
    assert mine.copies == mine.moved == () and mine.alone == 0
    for number, cut, place in mine.own:
        shard = leaves[number].addressable_shards[place]
        assert shards.to_range(shard.index, leaves[number].shape) == cut
        size[number] += shard.data.size
    assert [size[number] for number in size] == [x.size for x in leaves]


@settings(max_examples=50)
@given(st.data())
def test_any_range_is_put_together_from_any_cuts(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    array = np.arange(np.prod(shape), dtype="f4").reshape(shape)

    def cuts(n):
        inner = data.draw(st.sets(st.integers(1, n), max_size=3)) - {n}
        edges = [0, *sorted(inner), n]
        return list(zip(edges, edges[1:], strict=False))

    ranges = [()]
    for n in shape:
        ranges = [(*head, cut) for head in ranges for cut in cuts(n)]
    path = tmp_path_factory.mktemp("parts") / "1-0of1.snapshot"
    numbers = [array[tuple(slice(*cut) for cut in cuts)] for cuts in ranges]
    write(
        path,
        Header({}, {"w": f"float32[{','.join(map(str, shape))}]"}, ()),
        [(0, cut, part) for cut, part in zip(ranges, numbers, strict=True)],
    )
    head, begin = read_header(path)
    pieces = [Piece(path, begin, shard) for shard in head.shards]
    pairs = [sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=2)))
             for n in shape]  # fmt: skip
    wanted = tuple((a, b) for a, b in pairs)
    found = assembled(
        pieces, wanted, np.float32, lambda piece: read_shard("w", np.float32, piece)
    )
    np.testing.assert_array_equal(found, array[tuple(slice(*cut) for cut in wanted)])


def test_restores_what_was_saved_bit_for_bit_although_it_was_donated(tmp_path):
    next_step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state, expected = make_state(3), as_bytes(make_state(3))
    with open_snapshots(tmp_path / "hot", 1.0) as hot:
        hot.save(3, state, MODEL)
        for _ in range(5):  # overwrites the buffers meanwhile
            state = next_step(state)
        hot.wait()
        restored, step = read_back(hot)
    assert step == 3 and as_bytes(restored) == expected
    same = [x.sharding == y.sharding for x, y in zip(*map(
        jax.tree.leaves, (restored, make_state())), strict=True)]  # fmt: skip
    assert all(same)


def test_restores_onto_other_meshes(tmp_path):
    hot = write_some(tmp_path, 1)
    eight = mesh((2, 4), ("data", "tensor"))
    for sharding in (
        NamedSharding(eight, PartitionSpec()),
        jax.sharding.SingleDeviceSharding(jax.devices()[3]),
    ):
        wanted = abstract(make_state(), sharding=sharding)
        restored, _ = restore(hot, wanted, description=MODEL)
        assert as_bytes(restored) == as_bytes(make_state(1))
    other = NamedSharding(eight, PartitionSpec("data", None))
    wanted = abstract(make_state()) | {
        "w": jax.ShapeDtypeStruct((16, 6), jnp.float32, sharding=other)
    }
    restored, _ = restore(hot, wanted, description=MODEL)
    assert restored["w"].sharding == other
    assert as_bytes(restored) == as_bytes(make_state(1))


def test_the_two_newest_stay_and_a_checkpoint_ends_them(tmp_path):
    folder = tmp_path / "checkpoints" / "snapshots"
    hot = write_some(folder, 1, 2, 3, 4)
    assert names(folder) == ["3-0of1.snapshot", "4-0of1.snapshot"]
    (folder.parent / "3").mkdir()
    (folder.parent / "5.orbax-checkpoint-tmp").mkdir()  # of a save that was killed
    hot.close()
    assert names(folder) == ["4-0of1.snapshot"]


def test_none_is_none(tmp_path):
    assert read_back(open_snapshots(tmp_path / "absent", 0.0)) is None
    hot = write_some(tmp_path / "hot", 4)
    assert read_back(hot, after=4) is None  # a checkpoint is as new
    assert newest(hot, after=3) == (4, 1, MODEL)


# -------------------------------------------------------------------------- damage


@pytest.mark.parametrize("where", [0.0, 0.02, 0.3, 1.0])
def test_a_damaged_one_is_named_and_the_one_before_used(tmp_path, where):
    hot, said = write_some(tmp_path, 1, 2), []
    flip_bit(tmp_path / "2-0of1.snapshot", where)
    restored, step = read_back(hot, log=said.append)
    assert step == 1 and as_bytes(restored) == as_bytes(make_state(1))
    assert len(said) == 2 and said[0].startswith("snapshot 2 is damaged: 2-0of1")
    assert names(tmp_path) == ["1-0of1.snapshot"]  # is not mixed with what comes


@pytest.mark.parametrize("size", [0, 10, 200, -1])
def test_one_that_breaks_off_is_damaged(tmp_path, size):
    hot, said = write_some(tmp_path, 1), []
    path = tmp_path / "1-0of1.snapshot"
    path.write_bytes(path.read_bytes()[:size])
    assert read_back(hot, log=said.append) is None
    assert len(said) == 1 and "damaged" in said[0] and names(tmp_path) == []


def test_one_without_all_its_parts_does_not_count(tmp_path):
    write_some(tmp_path, 1, 2)
    os.rename(tmp_path / "2-0of1.snapshot", tmp_path / "2-0of2.snapshot")
    (tmp_path / "2-1of2.part").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    hot = open_snapshots(tmp_path, 1.0)
    assert read_back(hot)[1] == 1
    assert names(tmp_path) == ["1-0of1.snapshot", "notes.txt"]


def test_parts_of_two_states_are_no_state(tmp_path):
    write_some(tmp_path / "a", 1)
    write_some(tmp_path / "b", 1)
    one, two = tmp_path / "a/1-0of2.snapshot", tmp_path / "a/1-1of2.snapshot"
    os.rename(tmp_path / "a/1-0of1.snapshot", one)
    other = tmp_path / "b/1-0of1.snapshot"
    head, begin = read_header(other)
    pieces = []
    for shard in head.shards:
        flat = Piece(other, begin, shard._replace(range=((0, shard.size),)))
        pieces.append((shard.leaf, shard.range, read_shard("x", np.uint8, flat)))
    write(two, head._replace(description={"model": {"layers": 5}}), pieces)
    said = []
    assert read_back(open_snapshots(tmp_path / "a", 1.0), log=said.append) is None
    assert "1-1of2.snapshot: it is of another state than the others" in said[0]


def test_another_model_or_state_is_an_error_and_loses_nothing(tmp_path):
    hot = write_some(tmp_path, 1)
    with pytest.raises(UserError, match="model.layers is 5 here but 4"):
        read_back(hot, description={"model": {"layers": 5}})
    other = make_state() | {"step": jnp.float32(0)}
    with pytest.raises(UserError, match="step.* is float32.* here but int32"):
        read_back(hot, state=other)
    assert names(tmp_path) == ["1-0of1.snapshot"]


def test_a_disk_that_fails_is_told_and_the_training_goes_on(tmp_path):
    folder, said = tmp_path / "hot", []
    hot = open_snapshots(folder, 1.0, said.append)
    folder.rmdir()
    hot.save(1, make_state(1), MODEL)
    hot.wait()
    assert len(said) == 1 and "1-0of1.snapshot was not written" in said[0]
    folder.mkdir()
    hot.save(2, make_state(2), MODEL)
    hot.close()
    assert names(folder) == ["2-0of1.snapshot"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the snapshots in .*file/hot"):
        open_snapshots(tmp_path / "file" / "hot", 1.0)


# ------------------------------------------------------------------- real processes


@pytest.mark.slow
def test_a_killed_run_loses_seconds_and_ends_with_the_same_weights(tmp_path):
    every = Checkpoint(every=0, snapshot_seconds=0.05)
    run = tiny(tmp_path, steps=100, checkpoint=every, evaluate=Evaluate(every=0))
    process = launch(run)
    folder, until = Path(run.out) / "checkpoints/snapshots", time.monotonic() + 120
    while not any(folder.glob("*.snapshot")) and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    saved = max(int(p.name.split("-")[0]) for p in folder.glob("*.snapshot"))
    assert [p for p in folder.parent.glob("*") if p.name.isdecimal()] == []
    code, said, error = finish(launch(run))
    assert code == 0, error
    assert f"snapshot {saved} of 1 process(es) is newer" in said
    assert f"restored from step {saved}" in said
    assert list(folder.iterdir()) == []  # the checkpoint of the end is newer

    whole = dataclasses.replace(run, out=str(tmp_path / "whole"))
    assert finish(launch(whole))[0] == 0
    ours, theirs = program.load(run.out), program.load(whole.out)
    pairs = zip(*map(jax.tree.leaves, (ours.params, theirs.params)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    shared = min(len(losses(run.out)), len(losses(whole.out)))
    assert losses(run.out)[-shared:] == losses(whole.out)[-shared:]


TWO_PROCESSES = """
    import json, sys
    from pathlib import Path
    import jax, numpy as np
    from jax.experimental import multihost_utils
    from jaxlab.snapshot import open_snapshots, restore

    port, rank, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=kinds)

    def state(step, cut="fsdp"):
        def made(numbers, *spec):
            sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
            return jax.make_array_from_callback(
                numbers.shape, sharding, numbers.__getitem__)
        w = np.arange(4000, dtype=np.float32).reshape(40, 100) + step
        return {"a": made(w[0] * 2), "b": made(w[1] * 3), "w": made(w, cut)}

    def bits(state):
        return [np.asarray(x.addressable_data(0)).tobytes()
                for x in jax.tree.leaves(state)]

    said = []
    with open_snapshots(folder, 1.0, said.append) as hot:
        for step in (2, 3):
            hot.save(step, state(step), {"model": 1})
            hot.wait()
            multihost_utils.sync_global_devices(str(step))
    if rank == 0:
        (folder / "3-1of2.snapshot").unlink()  # what a lost host had not yet written
        path = folder / "2-1of2.snapshot"
        print("bytes", [p.stat().st_size for p in sorted(folder.glob("2-*"))])
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    hot = open_snapshots(folder, 1.0)
    multihost_utils.sync_global_devices("harmed")
    found = restore(hot, state(0, None), description={"model": 1}, log=said.append)
    if rank == 0:
        print(*said, sep="\\n")
    print("none" if found is None else found[1])
    hot.save(2, state(2), {"model": 1})
    hot.wait()
    multihost_utils.sync_global_devices("again")
    found, step = restore(hot, state(0, None), description={"model": 1},
                          log=lambda line: None)
    print(step, bits(found) == bits(state(2, None)))
"""


def test_two_processes_write_halves_and_decide_alike(tmp_path):
    ended = run_ranks(TWO_PROCESSES, 2, tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    first, second = (spoken(out) for _, out, _ in ended)
    sizes = json.loads(first[0].partition(" ")[2])
    assert max(sizes) - min(sizes) < 1000  # of 16 kB: copies are shared out
    assert first[1].startswith("snapshot 2 is damaged: 2-1of2.snapshot: the sha256 of")
    # 3 lacks a part and 2 is damaged: both start anew, from a checkpoint in earnest.
    assert first[2:] == second == ["none", "2 True"]
