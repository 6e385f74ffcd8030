"""Snapshots on local disks: a lost host, one that comes back, and what is damaged."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
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
from tests.runs import ROOT, finish, launch, spoken, tiny
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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(port), str(rank),
             str(root), action],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {
                "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            },
        )
        for rank in range(4)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * 4, outputs
    return [json.loads(line) for out, _ in outputs for line in spoken(out)]


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


def test_what_is_damaged_is_read_from_its_copy(hosts):
    for path in files(hosts, 1):
        flip_bit(path, 0.99)
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


def test_a_variable_that_is_not_set_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_DISK", raising=False)
    with pytest.raises(UserError, match=r"snapshot_folder is '\$LOCAL_DISK/x'"):
        open_snapshots(tmp_path / "c/s", 1.0, local="$LOCAL_DISK/x")
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path / "disk"))
    hot = open_snapshots(tmp_path / "c/s", 1.0, local="$LOCAL_DISK/x")
    assert hot.folder.parent == tmp_path / "disk/x"


# ---------------------------------------------------------------- the whole program


def start_pair(run, monkeypatch):
    """The run on two hosts, each with its half of the state and a disk of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        monkeypatch.setenv("DISK", str(Path(run.out).parent / f"disk{rank}"))
        place = f"""--distributed.coordinator 127.0.0.1:{port}
            --distributed.processes 2 --distributed.index {rank}"""
        processes.append(launch(run, *place.split()))
    return processes


@pytest.mark.slow
def test_a_run_goes_on_after_a_host_is_lost_with_its_disk(tmp_path, monkeypatch):
    hot = Checkpoint(every=0, snapshot_seconds=0.05, snapshot_folder="$DISK")
    run = tiny(tmp_path, steps=120, checkpoint=hot, evaluate=Evaluate(every=0),
               mesh=MeshShape(fsdp=2))  # fmt: skip
    pair = start_pair(run, monkeypatch)
    disks, until = "disk*/*/*.snapshot", time.monotonic() + 120
    while len(list(tmp_path.glob(disks))) < 4 and time.monotonic() < until:
        time.sleep(0.005)
    for process in pair:
        process.send_signal(signal.SIGKILL)
    assert [finish(p)[0] for p in pair] == [-signal.SIGKILL] * 2
    assert not any(p.name.isdecimal() for p in Path(run.out, "checkpoints").iterdir())
    shutil.rmtree(tmp_path / "disk0")
    (code, said, error), (other, *_) = map(finish, start_pair(run, monkeypatch))
    assert code == other == 0, error
    assert "of 2 process(es) is newer than checkpoints" in said
    assert "restored from step" in said
    assert list(tmp_path.glob(disks)) == []  # the checkpoint is newer

    whole = dataclasses.replace(run, out=str(tmp_path / "whole"))
    assert [finish(p)[0] for p in start_pair(whole, monkeypatch)] == [0, 0]
    ours, theirs = program.load(run.out), program.load(whole.out)
    pairs = zip(*map(jax.tree.leaves, (ours.params, theirs.params)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
