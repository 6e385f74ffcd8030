"""Programs of a smaller job, compiled by a larger one, are those it needs."""

import dataclasses
import json
import socket
from pathlib import Path

import pytest

from jaxlab.config import Checkpoint, Evaluate, MeshShape, Run, check_rows
from jaxlab.errors import ConfigError
from jaxlab.fewer import meshes, same_batch
from tests.runs import finish, launch, tiny


def entries(tmp_path):
    """Names of the programs that the cache has, and how many of each."""
    return sorted(p.name for p in (tmp_path / "xla").glob("*-cache"))


@pytest.mark.slow
def test_one_process_compiles_nothing_that_two_have_compiled_for_it(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    none, seldom = Evaluate(every=0, batches=1), Checkpoint(every=0)
    run = tiny(tmp_path, steps=30, evaluate=none, checkpoint=seldom)
    words = ["--accumulate", "2", "--evaluate.batches", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("JAXLAB_HEALTH_SMALLER", json.dumps({1: words}))
    pair = []
    for i in range(2):
        monkeypatch.setenv("JAXLAB_HEALTH_BOARD", str(tmp_path / f"{i}.board"))
        where = [("coordinator", address), ("processes", "2"), ("index", str(i))]
        given = [w for key, value in where for w in (f"--distributed.{key}", value)]
        pair.append(launch(run, *given, devices=1))
    ended = [finish(process) for process in pair]
    assert [code for code, *_ in ended] == [0, 0], ended
    before = entries(tmp_path)
    monkeypatch.delenv("JAXLAB_HEALTH_BOARD")
    alone = dataclasses.replace(run, out=str(tmp_path / "alone"))
    code, said, error = finish(launch(alone, *words))
    assert code == 0, error
    names = [name.rpartition("-")[0].rpartition("-")[0] for name in entries(tmp_path)]
    steps = [name for name in names if "train_step" in name]
    assert len(steps) == 3, names  # of each of the two, and of the one
    new = {name for name in entries(tmp_path) if name not in before}
    assert not [name for name in new if "train_step" in name]
    assert Path(alone.out, "config.json").exists() and "restored" not in said


@pytest.mark.parametrize(
    ("shape", "batch", "accumulate", "processes", "left", "words"),
    [
        ({}, 16, 1, 4, 2, "--accumulate 2 --evaluate.batches 32"),
        ({}, 16, 2, 4, 2, "--accumulate 4 --evaluate.batches 32"),
        ({}, 16, 1, 4, 4, ""),
        ({}, 24, 1, 4, 3, "--accumulate 2 --evaluate.batches 32"),
        ({}, 12, 1, 4, 1, "--accumulate 4 --evaluate.batches 64"),
        ({"tensor": 2}, 8, 1, 4, 2, "--accumulate 2 --evaluate.batches 32"),
        ({"replica": 2}, 8, 1, 4, 2, "--accumulate 2 --evaluate.batches 32"),
    ],
)
def test_fewer_devices_do_the_same_batch_with_as_many_rows_at_once(
    tmp_path, shape, batch, accumulate, processes, left, words
):
    run = Run(batch=batch, accumulate=accumulate, mesh=MeshShape(**shape))
    allowed = meshes(run, processes)
    now = allowed[left]
    found = same_batch(run, allowed[processes], now)
    assert found == words.split()
    if found:
        changed = dataclasses.replace(run, accumulate=int(found[1]))
        check_rows(changed, now)
        with pytest.raises(ConfigError):
            check_rows(dataclasses.replace(run, accumulate=5), now)


def test_numbers_of_processes_are_those_that_the_batch_divides_by():
    assert sorted(meshes(Run(batch=16), 4)) == [1, 2, 4]
    assert sorted(meshes(Run(batch=24), 4)) == [1, 2, 3, 4]
    assert sorted(meshes(Run(batch=16, mesh=MeshShape(fsdp=2)), 4)) == [2, 4]
    assert sorted(meshes(Run(mesh=MeshShape(data=4)), 4)) == [1, 2, 4]
    assert sorted(meshes(Run(mesh=MeshShape(data=8)), 4)) == [1, 2, 4]
    with pytest.raises(ConfigError, match="needs 2 devices, and there are 4"):
        meshes(Run(mesh=MeshShape(data=2)), 4)
    with pytest.raises(ConfigError, match="16 is not a multiple of"):
        meshes(Run(batch=16), 3)
