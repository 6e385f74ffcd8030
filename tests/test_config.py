"""Configs: exact files, helpful errors, checks before compilation."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab import config
from jaxlab.config import GPT, AdamW, MeshShape, Run
from jaxlab.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_survives_its_file(path, tmp_path):
    run = config.load(path)
    assert run.steps >= 1 and run.seed >= 0 and run.out
    config.save(run, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == run


@given(
    lr=st.floats(allow_nan=False, allow_infinity=False),
    seed=st.integers(0, 2**31),
    scaling=st.none() | st.builds(config.RopeScaling),
    kv_heads=st.none() | st.integers(1, 64),
)
def test_json_is_exact(lr, seed, scaling, kv_heads):
    run = Run(
        seed=seed,
        optimizer=AdamW(lr=lr),
        model=GPT(rope_scaling=scaling, kv_heads=kv_heads),
    )
    assert config.from_json(json.loads(json.dumps(config.to_json(run)))) == run


def test_command_line_edits_fields():
    path = str(ROOT / "configs/gpt_tiny.py")
    run = config.parse(
        [
            path,
            "--steps",
            "60",
            "--out",
            "runs/a",
            "--optimizer.lr",
            "1e-4",
            "--mesh.fsdp",
            "8",
            "--profile",
            "--model.kv-heads",
            "3",
        ]
    )
    base = config.load(path)
    assert (run.steps, run.out, run.optimizer.lr) == (60, "runs/a", 1e-4)
    assert (run.mesh.fsdp, run.profile, run.model.kv_heads) == (8, True, 3)
    assert dataclasses.replace(run.model, kv_heads=base.model.kv_heads) == base.model


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--optimzer.lr", "3"], ["--optimzer.lr", "--optimizer.lr"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--model.activation", "relu"], ["relu", "swiglu", "gelu"]),
        (["--model.dtype", "float16"], ["float16", "bfloat16"]),
    ],
)
def test_bad_usage_is_one_line_that_names_it(arguments, words, capsys):
    path = str(ROOT / "configs/gpt_tiny.py")
    with pytest.raises(ConfigError) as caught:
        config.parse([path, *arguments])
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message


def test_missing_config_suggests_the_nearest():
    with pytest.raises(ConfigError, match="gpt_tiny.py"):
        config.load(ROOT / "configs/gpt_tinny.py")
    with pytest.raises(ConfigError, match="usage"):
        config.parse(["--steps", "3"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"setps": 3}, ["setps", "steps"]),
        ({"steps": "3"}, ["steps", "'3'"]),
        ({"steps": True}, ["steps"]),
        ({"on_nonfinite": "panic"}, ["on_nonfinite", "panic"]),
        ({"model": {"type": "Path"}}, ["Path"]),
    ],
)
def test_a_wrong_saved_config_is_named(change, words):
    with pytest.raises(ConfigError) as caught:
        config.from_json(config.to_json(Run()) | change)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_typo_on_the_command_line_exits_with_2_and_one_line(encoding):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "scripts/train.py",
            ROOT / "configs/gpt_tiny.py",
            "--stps",
            "3",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("--stps, 3; perhaps you meant --steps\n")
    assert done.stdout == ""


def test_resolved_model_has_no_gaps():
    model = config.resolve_model(GPT(width=192, heads=6), 257)
    assert (model.vocab, model.kv_heads, model.head_dim, model.mlp) == (320, 6, 32, 512)
    assert config.resolve_model(model, 257) == model
    assert config.resolve_model(GPT(activation="gelu", width=64), 257).mlp == 256


@pytest.mark.parametrize(
    "model, words",
    [
        (GPT(heads=6, kv_heads=4, width=192), ["heads 6", "kv_heads 4"]),
        (GPT(heads=5, width=256), ["width 256", "heads 5"]),
        (GPT(vocab=100), ["100", "257"]),
        (GPT(heads=4, head_dim=7), ["7", "odd"]),
    ],
)
def test_impossible_models_are_refused(model, words):
    with pytest.raises(ConfigError) as caught:
        config.resolve_model(model, 257)
    assert all(word in str(caught.value) for word in words)


def test_free_axis_takes_what_is_left():
    assert config.resolve_mesh(MeshShape(fsdp=2), 8).data == 4
    assert config.resolve_mesh(MeshShape(data=2, tensor=-1), 8).tensor == 4
    assert config.resolve_mesh(MeshShape(), 1) == MeshShape(data=1)


@pytest.mark.parametrize(
    "shape, devices, words",
    [
        (MeshShape(fsdp=3), 8, ["fsdp 3", "8"]),
        (MeshShape(data=2, fsdp=2), 8, ["data 2", "fsdp 2", "8"]),
        (MeshShape(data=-1, fsdp=-1), 8, ["-1"]),
        (MeshShape(tensor=0), 8, ["mesh.tensor"]),
    ],
)
def test_meshes_that_do_not_fit_are_refused(shape, devices, words):
    with pytest.raises(ConfigError) as caught:
        config.resolve_mesh(shape, devices)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "change, mesh, words",
    [
        ({"batch": 12}, MeshShape(data=8), ["12", "mesh", "8"]),
        ({"batch": 16, "accumulate": 3}, MeshShape(data=1), ["16", "accumulate 3"]),
        ({"batch": 16, "accumulate": 4}, MeshShape(data=8), ["4", "8"]),
        ({}, MeshShape(data=1, tensor=8), ["model.heads 4", "mesh.tensor 8"]),
        ({}, MeshShape(data=1, fsdp=3, replica=1), ["16", "3"]),
        ({"steps": 0}, MeshShape(data=1), ["steps"]),
        ({"ema": 1.5}, MeshShape(data=1), ["ema"]),
    ],
)
def test_combinations_that_do_not_divide_are_refused(change, mesh, words):
    run = Run(model=config.resolve_model(GPT(), 257))
    with pytest.raises(ConfigError) as caught:
        config.validate(dataclasses.replace(run, **change), mesh)
    assert all(word in str(caught.value) for word in words)


def test_dry_run_prints_what_would_be_run(tmp_path, capsys):
    run = runpy.run_path(str(ROOT / "scripts/train.py"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("words")
    arguments = ["configs/gpt_tiny.py", "--data.corpus", str(tmp_path / "text")]
    run["main"]([str(ROOT / arguments[0]), *arguments[1:], "--steps", "7", "--dry-run"])
    told = json.loads(capsys.readouterr().out)
    assert config.from_json(told["config"]).steps == 7
    before = told["data"]
    (tmp_path / "text/b.txt").write_text("more words")
    run["main"]([str(ROOT / arguments[0]), *arguments[1:], "--dry-run"])
    assert json.loads(capsys.readouterr().out)["data"] != before
