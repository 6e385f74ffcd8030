"""Evaluation: intervals, controls, crashes, and Farama's own browser as the judge."""

import contextlib
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from random import Random

import jax
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import config
from jaxlab.errors import ConfigError, UserError
from jaxlab.rl import evaluate
from jaxlab.rl.config import Envs, RLRun
from jaxlab.rl.envs import adapters
from jaxlab.rl.envs.adapters import BrowserGymEnv, FaramaEnv, browsergym_action
from jaxlab.rl.envs.api import KEYS, Action, Crash, Kind
from jaxlab.rl.envs.miniwob import MiniWoBEnv
from jaxlab.rl.envs.pix import PixEnv
from jaxlab.rl.evaluate import Episode, summary, table
from jaxlab.rl.play import wilson
from jaxlab.rl.store import Store
from jaxlab.rl.weights import save_weights

SLOW = 60.0


def missing() -> str:
    """Why Farama's environments cannot run; empty: they can."""
    try:
        with adapters.selenium_paths():
            return ""
    except UserError as error:
        return str(error)


needs_selenium = pytest.mark.skipif(bool(missing()), reason=missing())


# ---------------------------------------------------------------- intervals


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_own_equation(case):
    """The bounds are the shares p with |share - p| = z sqrt(p (1 - p) / n)."""
    solved, number = case
    share = solved / number
    low, high = wilson(solved, number)
    assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1
    for bound in (low, high):
        if 1e-6 < bound < 1 - 1e-6:
            distance = 1.96 * math.sqrt(bound * (1 - bound) / number)
            assert abs(share - bound) == pytest.approx(distance, rel=1e-6, abs=1e-9)


def test_wilson_of_known_cases():
    assert wilson(0, 0) == (0.0, 1.0)
    assert np.allclose(wilson(190, 200), (0.9104, 0.9726), atol=1e-4)
    assert wilson(200, 200)[1] == 1.0


def test_seeds_of_training_are_refused():
    assert evaluate.parse_seeds("1000000:1000200") == range(1000000, 1000200)
    for bad in ("0:10", "999999:1000001"):
        with pytest.raises(ConfigError, match="trained on"):
            evaluate.parse_seeds(bad)
    for bad in ("", "1000000", "2000000:1000000", "a:b"):
        with pytest.raises(ConfigError, match="give first:end"):
            evaluate.parse_seeds(bad)


# -------------------------------------------------------------------- actors


class Expert:
    """Acts by the instruction alone: presses the button of the name that it reads."""

    def __init__(self, env: PixEnv) -> None:
        self.env = env

    def act(self, observation: dict) -> Action:
        from jaxlab.rl.envs.pix import next_action

        assert observation["text"] == self.env.episode.shown.text
        action = next_action(self.env.episode)
        assert action is not None
        return action


def test_actors_and_their_controls():
    env = PixEnv("click")
    seeds = range(1_000_000, 1_000_040)
    told: list[Episode] = []
    episodes = evaluate.evaluate(
        lambda task: env, Expert(env), ["click"], seeds, told=told.append
    )
    assert sorted(told) == sorted(episodes) and len(episodes) == 4 * len(seeds)
    result = summary(episodes)
    rates = {name: entry["tasks"]["click"]["success"] for name, entry in result.items()}
    assert rates["policy"] == rates["oracle"] == 1.0
    assert rates["shuffled"] < 0.6 and rates["random"] < 0.6  # several buttons
    again = evaluate.evaluate(lambda task: env, None, ["click"], seeds, ["random"])
    first = [e for e in episodes if e.actor == "random"]
    assert [e[:7] for e in again] == [e[:7] for e in first]
    shown = table(result)
    assert shown.splitlines()[0] == "| task | policy | shuffled | oracle | random |"
    with pytest.raises(ConfigError, match="no actor 'expert'"):
        evaluate.evaluate(lambda task: env, None, ["click"], seeds, ["expert"])


def test_a_crash_is_played_again_and_never_scored():
    class Fragile(PixEnv):
        crashes = {1_000_001: 1, 1_000_002: 2}

        def reset(self, *, seed=None, options=None):
            if self.crashes.get(seed, 0):
                self.crashes[seed] -= 1
                raise Crash("gone")
            return super().reset(seed=seed, options=options)

    made: list[str] = []

    def make(task: str) -> Fragile:
        made.append(task)
        return Fragile(task)

    episodes = evaluate.evaluate(
        make, None, ["click"], range(1_000_000, 1_000_004), ["oracle"]
    )
    assert [e.outcome for e in episodes] == ["solved", "solved", "crash", "solved"]
    rate = summary(episodes)["oracle"]["tasks"]["click"]
    assert (rate["success"], rate["episodes"], rate["crashes"]) == (1.0, 3, 1)
    assert len(made) == 3


def test_random_actions_are_of_every_kind_but_done():
    rng = Random(0)
    kinds = {evaluate.random_action(rng, 5).kind for _ in range(300)}
    assert kinds == set(Kind) - {Kind.DONE}


# ---------------------------------------------------------------------- a run


def test_the_newest_weights_of_a_run_are_judged(tmp_path):
    run = RLRun(out=str(tmp_path), envs=Envs(tasks=("click", "check")))
    config.save(run, tmp_path / "config.json")
    with pytest.raises(UserError, match="no weights yet"):
        evaluate.evaluate_run(tmp_path, (), range(1_000_000, 1_000_002))
    policy = run.policy.build(PixEnv().observation_space)
    store = Store(tmp_path)
    for version in (0, 1):
        path = f"weights/{version}.safetensors"
        sha256 = save_weights(tmp_path / path, policy.init(jax.random.key(version)))
        store.publish(version, 10 * version, path, sha256)
    store.close()
    output = subprocess.check_output(
        [
            *(sys.executable, "scripts/eval.py", str(tmp_path), "--tasks", "click"),
            *("--seeds", "1000000:1000003", "--actors", "policy", "oracle"),
        ],
        cwd=Path(__file__).parent.parent,
        stderr=subprocess.DEVNULL,
    )
    result = json.loads(output)
    assert (result["step"], result["env"]) == (10, "jaxlab/Pix-v0")
    assert result["success"]["oracle"]["tasks"]["click"]["success"] == 1.0
    lines = (tmp_path / "eval" / "episodes.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] % 1000 for line in lines] == [0, 1, 2] * 2
    (tmp_path / path).write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        evaluate.evaluate_run(tmp_path, (), range(1_000_000, 1_000_001), ("policy",))


# ------------------------------------------------------------------ adapters


def test_actions_in_browsergyms_words():
    def said(kind, **rest):
        return browsergym_action(
            Action(kind, (0.5, 0.25), (1.0, 0.0), **rest), (210, 160), "a\"'"
        )

    assert said(Kind.CLICK) == "mouse_click(80.0, 52.5)"
    assert said(Kind.DOUBLE_CLICK) == "mouse_dblclick(80.0, 52.5)"
    assert said(Kind.DRAG) == "mouse_drag_and_drop(80.0, 52.5, 160.0, 0.0)"
    assert said(Kind.KEY, key=KEYS.index("TAB")) == "keyboard_press('Tab')"
    assert eval(said(Kind.TYPE), {"keyboard_type": lambda text: text}) == "a\"'"
    assert said(Kind.SCROLL_UP).endswith("scroll(0, -60)")
    assert said(Kind.WAIT) == "noop(200)"


def test_browsergym_absent_says_what_to_install():
    with pytest.raises(UserError, match="pip install jaxlab browsergym-nothing"):
        BrowserGymEnv("browsergym/nothing.task")


@needs_selenium
def test_farama_is_the_same_task_and_an_independent_judge():
    """One browser for all of it: they start slowly."""
    ours = MiniWoBEnv("click-button", timeout=SLOW)
    with contextlib.closing(FaramaEnv("click-button")) as env, contextlib.closing(ours):
        seen, info = env.reset(seed=3)
        mine, _ = ours.reset(seed=3)
        assert seen["text"] == mine["text"] == 'Click on the "no" button.'
        assert np.array_equal(seen["instruction"], mine["instruction"])
        assert env.observation_space == ours.observation_space
        assert env.action_space == ours.action_space
        assert set(info) == set(ours._info(False))
        # The same fonts and layout; a pixel may differ between the two builds.
        different = (seen["image"].astype(int) - mine["image"].astype(int)) != 0
        assert different.mean() < 0.01

        _, reward, ended, _, info = env.step(ours.oracle_action())
        assert (reward, ended, info["success"], info["raw_reward"]) == (
            1.0,
            True,
            True,
            1.0,
        )

        env.reset(seed=3)
        wrong = env.step(Action(Kind.CLICK, (0.99, 0.99)).to_dict())
        assert wrong[1:4] == (0.0, False, False)

        texts = {env.reset(seed=s)[0]["text"] for s in range(6)}
        shuffled = env.reset(seed=3, options={"shuffled": True})[0]
        assert shuffled["text"] != seen["text"] or len(texts) == 1
        same = digest(shuffled["image"][50:]) == digest(seen["image"][50:])
        assert same and digest(shuffled["image"][:50]) != digest(seen["image"][:50])
        check_env(env, skip_render_check=True)


@needs_selenium
def test_experts_solve_tasks_in_faramas_browser():
    episodes = evaluate.evaluate(
        FaramaEnv,
        None,
        ["enter-text", "drag-box"],
        range(1_000_000, 1_000_002),
        ["oracle"],
    )
    assert [e.success for e in episodes] == [True] * 4


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
