"""Snapshots on local disks: a lost host, one that comes back, and what is damaged."""

import dataclasses
import json
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab import program
from jaxlab.config import Checkpoint, Evaluate, MeshShape
from jaxlab.errors import UserError
from jaxlab.peer_copies import neighbours
from jaxlab.snapshot import open_snapshots
from tests.runs import finish, launch_pair, run_ranks, spoken, tiny
from tests.test_snapshot import flip_bit


@given(st.lists(st.integers(0, 4), min_size=1, max_size=24))
def test_every_device_has_a_neighbour_in_another_domain(owners):
    pairs = neighbours(owners)
    if 2 * max(Counter(owners).values()) > len(owners):
        assert pairs is None
        return
    sources, destinations = zip(*pairs, strict=True)
    assert sorted(sources) == sorted(destinations) == list(range(len(owners)))
    assert all(owners[i] != owners[j] for i, j in pairs)


# Four processes, two of them on one host, which has half of the devices. `replica` is
# cut over all of them as NoLoCo's states are, `fsdp` over two, so that other processes
# hold each half as well; `copy` is held by all.
WORKER = """
    import json, sys
    from pathlib import Path
    import jax, numpy as np
    from jaxlab.snapshot import open_snapshots, restore

    port, rank, root, action = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    jax.distributed.initialize(f"localhost:{port}", 4, rank)
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=kinds)

    def state(step, *cuts):
        def made(numbers, spec):
            sharding = jax.sharding.NamedSharding(mesh, spec)
            return jax.make_array_from_callback(
                numbers.shape, sharding, numbers.__getitem__)
        w = np.arange(8000, dtype=np.float32).reshape(80, 100) + step
        cuts = cuts or (jax.P(("data", "fsdp")), jax.P("fsdp"), jax.P())
        names = ("replica", "fsdp", "copy")
        return {n: made(w * i, cut) for i, (n, cut) in enumerate(zip(names, cuts), 1)}

    def bits(state):
        return [np.asarray(x.addressable_data(0)).tobytes()
                for x in jax.tree.leaves(state)]

    shared = Path(root) / "run/checkpoints/snapshots"
    host = f"{root}/host{max(rank - 1, 0)}"
    said = []
    hot = open_snapshots(shared, 1.0, said.append, local=host)
    if action == "write":
        for step in (2, 3):
            hot.save(step, state(step), {"model": 1})
            hot.wait()
    else:
        whole = (jax.P(),) * 3
        found = restore(hot, state(0, *whole), description={"model": 1},
                        log=said.append)
        step = None if found is None else found[1]
        same = found and bits(found[0]) == bits(state(step, *whole))
        print(json.dumps([step, same, said if rank == 0 else []]))
"""


def work(root, action):
    """What four processes print that write two snapshots, or that read the newest."""
    ended = run_ranks(WORKER, 4, root, action)
    assert [code for code, _, _ in ended] == [0] * 4, ended
    return [json.loads(line) for _, out, _ in ended for line in spoken(out)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders of three hosts with the snapshots of steps 2 and 3."""
    root = tmp_path_factory.mktemp("written")
    work(root, "write")
    return root


@pytest.fixture
def hosts(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "hosts"))


def files(root, host):
    return sorted(root.glob(f"host{host}/run-*/*.snapshot"))


def test_every_piece_lies_on_two_hosts(written):
    sizes = [sum(p.stat().st_size for p in files(written, h)) for h in range(3)]
    assert [len(files(written, h)) for h in range(3)] == [4, 2, 2]
    state = 3 * 8000 * 4
    assert 2 * 2 * state < sum(sizes) < 2 * 2 * state + 40_000  # headers
    assert max(sizes) <= 2 * state + 20_000  # no host has more than all of it


@pytest.mark.parametrize("lost", range(3))
def test_losing_any_one_host_loses_nothing(hosts, lost):
    shutil.rmtree(hosts / f"host{lost}")
    told = work(hosts, "read")
    assert [row[:2] for row in told] == [[3, True]] * 4
    assert told[0][2] == ["snapshot 3 of 4 process(es) is newer than checkpoints"]
    assert all(files(hosts, host) for host in range(3))  # also the new host's


@pytest.mark.parametrize("where", [0.0, 0.02, 0.99])
def test_what_is_damaged_is_read_from_its_copy(hosts, where):
    for path in files(hosts, 1):
        flip_bit(path, where)
    assert [row[:2] for row in work(hosts, "read")] == [[3, True]] * 4


def test_an_unfinished_snapshot_does_not_count_and_is_cleared(hosts):
    shutil.rmtree(hosts / "host2")  # of 3, one of four processes' parts is left
    for path in [*hosts.glob("host0/run-*/3-0*"), *hosts.glob("host1/run-*/3-*")]:
        path.unlink()
    told = work(hosts, "read")
    assert [row[:2] for row in told] == [[2, True]] * 4
    assert {p.name.split("-")[0] for h in range(3) for p in files(hosts, h)} == {"2"}


def test_files_of_another_start_are_not_mixed_in(hosts):
    start = files(hosts, 0)[0].stem.rpartition("-")[2]
    for path in files(hosts, 1):  # a host that comes back, with what it had then
        path.rename(path.with_name(path.name.replace(start, "0a0a0a0a")))
    for path in hosts.glob("host0/run-*/3-0*"):
        path.unlink()
    # Of 3 the start of host 1 has one part in four, and the other one has two.
    told = work(hosts, "read")
    assert [row[:2] for row in told] == [[2, True]] * 4


def test_a_run_that_is_begun_anew_finds_nothing_of_the_old_one(hosts):
    shutil.rmtree(hosts / "run")
    assert [row[:2] for row in work(hosts, "read")] == [[None, None]] * 4


def test_a_disk_that_cannot_be_used_ends_all_with_one_line(hosts):
    shutil.rmtree(hosts / "host2")
    (hosts / "host2").write_text("no folder")
    for code, _, error in run_ranks(WORKER, 4, hosts, "read"):
        assert code != 0
        assert "UserError: cannot write the snapshots in" in error
        assert "host2/run-" in error


@pytest.mark.parametrize("text", ["", "../../../elsewhere", "0123456z"])
def test_an_id_that_is_none_of_ours_is_made_anew(tmp_path, text):
    shared = tmp_path / "run/checkpoints/snapshots"
    shared.mkdir(parents=True)
    (shared / "id").write_text(text)
    hot = open_snapshots(shared, 1.0, local=str(tmp_path / "disk"))
    assert hot.folder.parent == tmp_path / "disk" and hot.folder.is_dir()
    assert hot.folder.name == f"run-{(shared / 'id').read_text()}" != f"run-{text}"
    again = open_snapshots(shared, 1.0, local=str(tmp_path / "disk"))
    assert again.folder == hot.folder


def test_a_variable_that_is_not_set_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_DISK", raising=False)
    with pytest.raises(UserError, match=r"snapshot_folder is '\$LOCAL_DISK/x'"):
        open_snapshots(tmp_path / "c/s", 1.0, local="$LOCAL_DISK/x")
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path / "disk"))
    hot = open_snapshots(tmp_path / "c/s", 1.0, local="$LOCAL_DISK/x")
    assert hot.folder.parent == tmp_path / "disk/x"


# ---------------------------------------------------------------- the whole program


def test_a_run_goes_on_after_a_host_is_lost_with_its_disk(tmp_path):
    hot = Checkpoint(
        every=0, snapshot_seconds=0.05, snapshot_folder=f"{tmp_path}/disk$RANK"
    )
    run = tiny(tmp_path, steps=120, checkpoint=hot, evaluate=Evaluate(every=0),
               mesh=MeshShape(fsdp=2))  # fmt: skip
    pair = launch_pair(run, devices=1)
    disks, until = "disk*/*/*.snapshot", time.monotonic() + 120
    while len(list(tmp_path.glob(disks))) < 4 and time.monotonic() < until:
        time.sleep(0.005)
    for process in pair:
        process.send_signal(signal.SIGKILL)
    assert [finish(p)[0] for p in pair] == [-signal.SIGKILL] * 2
    assert not any(p.name.isdecimal() for p in Path(run.out, "checkpoints").iterdir())
    shutil.rmtree(tmp_path / "disk0")
    (code, said, error), (other, *_) = map(finish, launch_pair(run, devices=1))
    assert code == other == 0, error
    assert "of 2 process(es) is newer than checkpoints" in said
    assert "restored from step" in said
    assert list(tmp_path.glob(disks)) == []  # the checkpoint is newer

    whole = dataclasses.replace(run, out=str(tmp_path / "whole"))
    assert [finish(p)[0] for p in launch_pair(whole, devices=1)] == [0, 0]
    ours, theirs = program.load(run.out), program.load(whole.out)
    pairs = zip(*map(jax.tree.leaves, (ours.params, theirs.params)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
