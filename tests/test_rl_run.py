"""Whole runs: all processes, on the embedded interface, with a tiny policy."""

import collections
import contextlib
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import config, metrics
from jaxlab.errors import ConfigError
from jaxlab.optimizers import AdamW
from jaxlab.rl import figures, launch, learner
from jaxlab.rl.cluster import STATES, make_env
from jaxlab.rl.config import Curation, Envs, RLRun, Rollout
from jaxlab.rl.rollout import Planner
from jaxlab.rl.store import Store
from jaxlab.rl.trajectory import Step, assemble, collate, padded_size
from jaxlab.rl.weights import load_weights

CONSTANT = AdamW(lr=3e-2, schedule="constant", warmup=1, weight_decay=0.0)


def tiny(out, **fields) -> RLRun:
    given = {
        "steps": 3,
        "groups": 2,
        "envs": Envs(tasks=("color",), hosts=1, slots=3, max_steps=3),
        "rollout": Rollout(max_lag=0, buckets=(1,)),
        "curation": Curation(n_max=4, keep_uninformative=True, experience=False),
        "optimizer": CONSTANT,
        "checkpoint": config.Checkpoint(every=2),
    }
    return RLRun(out=str(out), **(given | fields))


def played(run, policy, act, params, version, ticket, env, root) -> list:
    """One rollout, in this process."""
    observation, _ = env.reset(seed=ticket.seed, options={"task": ticket.task})
    steps, reward, ended, cut = [], 0.0, False, False
    while not ended and not cut and len(steps) < ticket.cap:
        key = jax.random.fold_in(jax.random.fold_in(root, ticket.rollout), len(steps))
        seen = (observation[name][None] for name in ("image", "instruction"))
        acted = act(params, *seen, key[None])
        tokens, logp, entropy = (np.asarray(x)[0] for x in acted)
        steps.append(Step(observation["image"], tokens, logp, entropy, version))
        action = policy.action(tokens).to_dict()
        observation, gained, ended, cut, _ = env.step(action)
        reward += gained
    return assemble(
        steps,
        id=ticket.rollout,
        task=ticket.task,
        seed=ticket.seed,
        group=ticket.group,
        text=observation["text"],
        instruction=observation["instruction"],
        final=observation["image"],
        reward=float(reward),
        cap_truncated=not ended and not cut and ticket.cap < run.envs.max_steps,
    )


def synchronous(run: RLRun, folder) -> list:
    """The weights of each version of textbook GRPO: act, then update, and so on."""
    with Store(folder) as store, contextlib.closing(make_env(run.envs)) as env:
        return _synchronous(run, store, env)


def _synchronous(run, store, env):
    policy = run.policy.build(env.observation_space)
    act = jax.jit(lambda p, i, w, k: policy.act(p, i, w, k, run.rollout.temperature))
    root = jax.random.key(run.seed)
    made = learner.build(run, policy)
    state = made.init(policy.init(root))
    versions = [jax.device_get(state.params)]
    store.publish(0, 0, "none", "00")
    plan = Planner(run, store)
    for version in range(run.steps):
        groups = collections.defaultdict(list)
        for ticket in plan.plan(99, 0, 0):
            one = played(run, policy, act, state.params, version, ticket, env, root)
            store.put(one)
            groups[ticket.group].append(one)
        batch = list(groups.values())
        steps = sum(one.length for group in batch for one in group)
        state, _ = made.update(state, collate(batch, version, padded_size(steps)))
        versions.append(jax.device_get(state.params))
        with store.database.transaction() as t:
            t.run("UPDATE grouping SET state = 'USED'")
        store.publish(version + 1, version + 1, "none", "00")
    return versions


def killer(*names):
    """Kills parts by their process ids, once there are weights that have learnt."""
    left = list(names)

    def watch(hub, engine):
        if hub.version < 1:
            return
        for name in [name for name in left if engine.pid(name) is not None]:
            os.kill(engine.pid(name), signal.SIGKILL)
            left.remove(name)

    watch.left = left
    return watch


def check_store(run):
    """What holds of every run: once stored, once used, and not too old."""
    with Store(run.out, run.store) as store:
        query = store.database.query
        paths = query("SELECT rollout, path, sha256 FROM trajectory")
        assert len({row[0] for row in paths}) == len(paths)
        done = {row[0] for row in query("SELECT id FROM rollout WHERE state = 'DONE'")}
        assert done == {row[0] for row in paths}
        assert figures.largest_lag(store.database) <= run.rollout.max_lag
        assert not query("SELECT id FROM grouping WHERE state = 'TRAINED'")
        used = query(
            "SELECT COUNT(*), COUNT(DISTINCT grouping.lease) FROM grouping"
            " WHERE state = 'USED'"
        )
        assert used == [(run.steps * run.groups, run.steps)]
        versions = query("SELECT version, step, saved FROM checkpoint ORDER BY version")
        counts = figures.group_counts(store.database)
        return versions, counts


def test_without_lag_it_is_synchronous_grpo_to_the_bit_whatever_dies(tmp_path):
    run, lines = tiny(tmp_path / "run"), []
    watch = killer("host0", "worker1", "worker0")
    launch.train(run, lines.append, watch)
    assert not watch.left, lines
    versions, counts = check_store(run)
    assert [v[0] for v in versions] == [0, 1, 2, 3]
    assert counts["USED"] == 6
    expected = synchronous(run, tmp_path / "alone")
    with Store(run.out) as store:
        newest = figures.latest(store.database)
    got = load_weights(f"{run.out}/{newest.path}", newest.sha256, expected[-1])
    jax.tree.map(np.testing.assert_array_equal, got, expected[-1])
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), expected[0], expected[-1])
    assert max(jax.tree.leaves(moved)) > 1e-3  # it has learnt something, too

    rows = metrics.read_jsonl(f"{run.out}/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["rl/lag_max"] == 0 for row in rows)
    assert sum(rows[-1][f"rl/env_{state}"] for state in STATES) == pytest.approx(1)
    assert config.load(f"{run.out}/config.json") == run


@pytest.mark.slow
def test_a_killed_learner_goes_on_and_uses_nothing_twice(tmp_path):
    run = tiny(
        tmp_path / "run",
        steps=4,
        rollout=Rollout(max_lag=1, buckets=(1,), workers=1),
        envs=Envs(tasks=("color", "click"), hosts=1, slots=4, max_steps=3),
    )
    watch = killer("learner")
    launch.train(run, print, watch)
    assert not watch.left
    versions, _ = check_store(run)
    steps = [step for _, step, _ in versions]
    assert steps[-1] == 4 and len(versions) > 5  # it published again what it restored
    rows = metrics.read_jsonl(f"{run.out}/metrics.jsonl")
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})

    # A run that has ended is resumed and has nothing to do; a longer one goes on.
    longer = tiny(run.out, steps=5, rollout=run.rollout, envs=run.envs)
    launch.train(longer)
    check_store(longer)


def test_an_unknown_task_or_environment_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no task 'colour'"):
        launch.train(tiny(tmp_path, envs=Envs(tasks=("colour",))))
    with pytest.raises(ConfigError, match="envs.id jaxlab/Pics-v0"):
        launch.train(tiny(tmp_path, envs=Envs(id="jaxlab/Pics-v0")))
