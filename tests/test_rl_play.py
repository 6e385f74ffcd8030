"""Episodes played in the process: by a policy, and by experts."""

import jax
import numpy as np
import pytest

from jaxlab.rl.config import TinyPolicy
from jaxlab.rl.envs.api import Crash
from jaxlab.rl.envs.pix import PixEnv, advance, start
from jaxlab.rl.play import Job, demonstrate, demonstrations, play, seeds, wilson
from jaxlab.rl.trajectory import Trajectory

SPACE = PixEnv("color").observation_space


def setup():
    policy = TinyPolicy().build(SPACE)
    return policy, policy.init(jax.random.key(0))


def same(a: Trajectory, b: Trajectory) -> bool:
    return all(
        np.array_equal(x, y, equal_nan=True) if isinstance(x, np.ndarray) else x == y
        for x, y in zip(a, b, strict=True)
    )


def played(slots, **options):
    policy, params = setup()
    jobs = [Job(10 + i, "color", i % 5, group=i // 2, limit=3) for i in range(11)]
    envs = [PixEnv("color") for _ in range(slots)]
    found = play(policy, params, envs, jobs, jax.random.key(1), **options)
    return {one.id: one for one in found}, jobs


def test_every_episode_is_played_once_and_told_whole():
    found, jobs = played(4)
    assert sorted(found) == [job.id for job in jobs]
    for job in jobs:
        one = found[job.id]
        assert (one.task, one.seed, one.group) == (job.task, job.seed, job.group)
        assert 1 <= one.length <= 3 and one.version.tolist() == [0] * one.length
        episode = start(job.task, job.seed)
        assert one.text == episode.shown.text
        policy, _ = setup()
        reward = 0.0
        for tokens in one.tokens:
            reward = advance(episode, policy.action(tokens))
        assert reward == one.reward
        assert one.truncated == (episode.outcome == "")
        assert (one.logp[one.mask] < 0).all() and np.isfinite(one.entropy).all()


def test_what_is_played_depends_on_key_and_job_alone():
    one, _ = played(4)
    two, _ = played(7)
    for name in one:
        # Another batch size is another program, which may round otherwise.
        assert np.array_equal(one[name].tokens, two[name].tokens)
        np.testing.assert_allclose(one[name].logp, two[name].logp, atol=1e-5)


def test_the_temperature_reaches_the_policy():
    warm, _ = played(4)
    cold, _ = played(4, temperature=0.0)
    for name in warm:
        assert cold[name].entropy[0].sum() < warm[name].entropy[0].sum()


def test_options_reach_the_environment():
    shuffled, _ = played(4, options={"shuffled": True})
    plain, _ = played(4)
    assert any(shuffled[i].text != plain[i].text for i in plain)
    assert all(np.array_equal(shuffled[i].images[0], plain[i].images[0]) for i in plain)


@pytest.mark.parametrize("task", ["click", "check", "enter", "drag", "form"])
def test_experts_show_what_the_policy_can_do(task):
    from jaxlab.rl.config import GuiPolicy

    policy = GuiPolicy().build(SPACE)
    jobs = [Job(i, task, i) for i in range(6)]
    one = list(demonstrate(policy, PixEnv(task), jobs))
    two = list(demonstrate(policy, PixEnv(task), jobs))
    assert len(one) == 6
    for a, b in zip(one, two, strict=True):
        assert same(a, b)
        assert a.reward == 1.0 and not a.truncated
        assert a.source == "oracle" and a.id == -1
        assert np.isnan(a.logp).all() and (a.version == -1).all()
        for tokens in a.tokens:
            assert np.array_equal(policy.tokens(policy.action(tokens)), tokens)


def test_demonstrations_do_not_depend_on_who_plays_them():
    policy, tasks = setup()[0], ("click", "color")

    def shown(slots):
        envs = [PixEnv("color") for _ in range(slots)]
        told = {"seed": 3, "limit": 9, "below": 1000}
        return list(demonstrations(policy, envs, tasks, 50, **told))

    one, four = shown(1), shown(4)
    assert all(same(a, b) for a, b in zip(one, four, strict=True))
    assert [a.task for a in one] == ["click"] * 25 + ["color"] * 25
    assert [a.seed for a in one] == seeds(3, 50, 1000)


def test_what_crashes_or_was_not_begun_is_not_shown():
    class Fragile(PixEnv):
        def reset(self, *, seed=None, options=None):
            if seed % 3 == 0:
                raise Crash("the page died")
            return super().reset(seed=seed, options=options)

    policy, drawn = setup()[0], seeds(0, 12, 100)
    told = {"seed": 0, "limit": 9, "below": 100}
    shown = demonstrations(policy, [Fragile("color")], ("color",), 12, **told)
    assert [one.seed for one in shown] == [seed for seed in drawn if seed % 3]
    asked = iter([False] * 5)
    few = demonstrations(
        policy,
        [PixEnv("color")],
        ("color",),
        12,
        **told,
        stopped=lambda: next(asked, True),
    )
    assert [one.seed for one in few] == drawn[:5]


def test_seeds_differ_and_repeat():
    found = seeds(1, 100, 1000)
    assert found == seeds(1, 100, 1000) != seeds(2, 100, 1000)
    assert len(set(found)) == 100 and max(found) < 1000


def test_wilsons_interval():
    # Newcombe 1998, table I: 81 of 263.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20)[0] == 0 and wilson(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
