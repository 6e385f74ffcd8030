"""RLRun: saved, loaded, edited on the command line, and refused where it is wrong."""

import dataclasses
import json

import pytest

from jaxlab import config
from jaxlab.errors import ConfigError
from jaxlab.rl.config import (
    Curation,
    Envs,
    GuiPolicy,
    RLRun,
    Rollout,
    complete,
    validate,
)


def test_a_run_comes_back_from_its_file(tmp_path):
    run = RLRun(envs=Envs(tasks=("click", "color")), steps=7)
    config.save(run, tmp_path / "config.json")
    assert config.load(tmp_path / "config.json") == run
    edited = config.parse(
        [str(tmp_path / "config.json"), "--rollout.max-lag", "0"]
        + ["--envs.tasks", "open", "--curation.no-experience"]
    )
    assert edited.rollout.max_lag == 0 and edited.envs.tasks == ("open",)
    assert not edited.curation.experience and edited.steps == 7


@pytest.mark.parametrize("tasks", ["click", [1], {"a": 1}])
def test_a_wrong_type_is_named(tmp_path, tasks):
    tree = config.to_json(RLRun())
    tree["envs"]["tasks"] = tasks
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"config.json.envs.tasks is"):
        config.load(path)


def changed(**fields) -> RLRun:
    return dataclasses.replace(RLRun(), **fields)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (changed(groups=0), "groups is 0"),
        (changed(envs=Envs(tasks=())), "empty"),
        (changed(envs=Envs(tasks=("a", "a"))), "twice"),
        (changed(envs=Envs(step_timeout=0.0)), "step_timeout"),
        (changed(rollout=Rollout(buckets=(4, 1))), "ascend"),
        (changed(rollout=Rollout(max_lag=-1)), "max_lag is -1"),
        (changed(curation=Curation(n_max=1)), "n_max 1 is less"),
        (changed(curation=Curation(n_min=1)), "nothing to compare"),
        (changed(curation=Curation(entropy_quantile=2.0)), "between 0 and 1"),
        (changed(curation=Curation(max_rejected=0)), "max_rejected is 0"),
        (changed(store="mysql://x"), "postgresql://"),
        (changed(ray_address="auto"), "without --engine ray"),
        (changed(ray_address="auto", engine="ray"), "may span hosts"),
        (changed(envs=Envs(tokenizer="a")), "envs.tokenizer a without policy.tower"),
        (
            changed(policy=GuiPolicy(tower="a"), envs=Envs(tokenizer="a")),
            "without policy.typed",
        ),
    ],
)
def test_what_does_not_work_is_refused(run, match):
    with pytest.raises(ConfigError, match=match):
        validate(run)


def test_the_default_is_valid():
    validate(RLRun())


def test_a_tower_brings_its_tokenizer():
    with_tower = changed(policy=GuiPolicy(tower="a", typed=1))
    made = complete(with_tower)
    validate(made)
    assert made.envs.tokenizer == "a" and complete(made) == made
    other = changed(policy=with_tower.policy, envs=Envs(tokenizer="b"))
    assert complete(other) == other and complete(RLRun()) == RLRun()
