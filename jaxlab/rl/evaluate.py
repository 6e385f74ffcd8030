"""Success of an agent on seeds that no training has seen, beside what bounds it.

MiniWoB++ is judged by Farama's environments and Selenium, each task in a browser of its
own: neither the browser, nor the clicks, nor the reward are those of training. Four
actors play the same seeds:

- policy: the agent;
- shuffled: the agent, but each page has the instruction of another seed; what it still
  solves, it solves without reading;
- oracle: the scripted expert, the ceiling (some problems have no solution);
- random: any action but DONE, at any place, the floor.

An episode whose browser died is played again, once, and else left out and counted.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from jaxlab.errors import ConfigError, UserError
from jaxlab.files import write_text
from jaxlab.rl.config import RLRun
from jaxlab.rl.envs.api import FIELDS, KEYS, Action, Crash, Kind
from jaxlab.rl.play import wilson

ACTORS = ("policy", "shuffled", "oracle", "random")
HELD_OUT = 1_000_000
"""the first seed that training never uses"""
JUDGES = {"jaxlab/MiniWoB-v0": "jaxlab/Farama-v0"}
"""who judges what other environments have trained"""


@runtime_checkable
class Actor(Protocol):
    """What acts: a trained policy, or anything like it."""

    def act(self, observation: dict[str, Any]) -> Action:
        """The action on an observation, as of `envs.api`."""
        ...


class Episode(NamedTuple):
    """What came of one episode."""

    actor: str
    task: str
    seed: int
    success: bool
    reward: float
    steps: int
    outcome: str
    """solved, failed, limit; stuck: the oracle saw nothing to do; crash"""
    seconds: float


def parse_seeds(text: str) -> range:
    """Seeds of "first:end".

    Raises:
        ConfigError: it is none such, or none that training leaves alone.
    """
    first, mark, end = text.partition(":")
    try:
        seeds = range(int(first), int(end))
    except ValueError:
        seeds = range(0)
    if not mark or not seeds:
        raise ConfigError(f"--seeds {text!r}; give first:end, as in 1000000:1000200")
    if seeds[0] < HELD_OUT:
        raise ConfigError(
            f"--seeds {text} includes seeds that are trained on; begin at {HELD_OUT}"
        )
    return seeds


def evaluate(
    make: Callable[[str], Any],
    actor: Actor | None,
    tasks: Sequence[str],
    seeds: Sequence[int],
    actors: Sequence[str] = ACTORS,
    *,
    workers: int = 1,
    told: Callable[[Episode], Any] = lambda episode: None,
) -> list[Episode]:
    """Plays every seed of every task with every actor.

    Args:
        make: an environment of a task, its own browser included.
        actor: the agent; None where `actors` has neither policy nor shuffled.
        tasks: their names.
        seeds: of the episodes.
        actors: of ACTORS.
        workers: environments at a time, each on a thread.
        told: is called with each episode as it ends, from one thread at a time.

    Returns:
        The episodes, ordered by actor, task and seed.

    Raises:
        ConfigError: no such actor.
    """
    for name in actors:
        if name not in ACTORS:
            raise ConfigError(f"no actor {name!r}; give some of {', '.join(ACTORS)}")
    share = max(-(-len(seeds) // workers), 1)
    parts = [seeds[start : start + share] for start in range(0, len(seeds), share)]
    lock = threading.Lock()

    def work(job: tuple[str, str, Sequence[int]]) -> list[Episode]:
        name, task, own = job
        episodes, env = [], make(task)
        try:
            for seed in own:
                for attempt in (1, 2):
                    episode = _play(env, name, actor, task, seed)
                    if episode.outcome != "crash" or attempt == 2:
                        break
                    env.close()
                    env = make(task)
                episodes.append(episode)
                with lock:
                    told(episode)
        finally:
            env.close()
        return episodes

    jobs = [(name, task, part) for name in actors for task in tasks for part in parts]
    with ThreadPoolExecutor(workers) as pool:
        return [episode for part in pool.map(work, jobs) for episode in part]


def load_actor(folder: str | Path, run: RLRun, space: Any) -> tuple[Actor, int]:
    """The newest published policy of a run, always doing what it thinks best.

    Args:
        folder: of the run.
        run: its config.
        space: of the observations.

    Returns:
        The actor, and the updates that it has seen.

    Raises:
        UserError: the run has published none, or its weights are damaged.
    """
    import jax

    from jaxlab.rl import figures
    from jaxlab.rl.store import Store
    from jaxlab.rl.weights import load_weights

    policy = run.policy.build(space)
    with Store(folder, run.store) as store:
        newest = figures.latest(store.database)
    if newest is None:
        raise UserError(f"{folder} has no weights yet; train it first")
    shapes = jax.eval_shape(policy.init, jax.random.key(0))
    try:
        params = load_weights(Path(folder) / newest.path, newest.sha256, shapes)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the weights of {folder}: {error}") from None
    act = jax.jit(policy.act)
    keys = jax.random.split(jax.random.key(0), 1)  # of no matter at temperature 0

    class Greedy:
        def act(self, observation: dict[str, Any]) -> Action:
            image, words = observation["image"], observation["instruction"]
            acted = act(params, image[None], words[None], keys, np.float32(0))
            return policy.action(np.asarray(acted.tokens[0]))

    return Greedy(), newest.step


def evaluate_run(
    folder: str | Path,
    tasks: Sequence[str],
    seeds: Sequence[int],
    actors: Sequence[str] = ACTORS,
    *,
    env: str | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Evaluates a run; its episodes become lines of `eval/episodes.jsonl` there.

    Args:
        folder: of the run.
        tasks: names; none: those of the run.
        seeds: of the episodes.
        actors: see `evaluate`.
        env: gymnasium's name; None: Farama's for MiniWoB++, else the run's own.
        workers: environments at a time.

    Raises:
        UserError: the run has no weights, or a part is not installed.
        ConfigError: no such task or actor.
    """
    import gymnasium

    from jaxlab import config
    from jaxlab.rl.cluster import make_env, tokenized

    run = config.load(Path(folder) / "config.json")
    tasks = tuple(tasks) or run.envs.tasks
    judge = env or str(JUDGES.get(run.envs.id, run.envs.id))
    actor, step = None, 0
    if {"policy", "shuffled"} & set(actors):
        own = make_env(run.envs)
        actor, step = load_actor(folder, run, own.observation_space)
        own.close()

    def make(task: str) -> Any:
        try:
            made = gymnasium.make(judge, task=task, disable_env_checker=True)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return tokenized(made.unwrapped, run.envs)

    out = Path(folder) / "eval"
    out.mkdir(exist_ok=True)
    total = len(actors) * len(tasks) * len(seeds)
    with tqdm(total=total, unit="episode", disable=None) as bar:
        episodes = evaluate(
            make,
            actor,
            tasks,
            seeds,
            actors,
            workers=workers,
            told=lambda episode: bar.update(),
        )
    lines = [json.dumps(episode._asdict()) for episode in episodes]
    write_text(out / "episodes.jsonl", "\n".join(lines) + "\n")
    result = summary(episodes)
    print(table(result), file=sys.stderr)
    return {
        "run": str(folder),
        "step": step,
        "env": judge,
        "seeds": [seeds[0], seeds[-1] + 1],
        "success": result,
    }


def _play(env: Any, name: str, actor: Actor | None, task: str, seed: int) -> Episode:
    rng = Random(f"{task}/{seed}")
    begun, steps = time.monotonic(), 0
    info: dict[str, Any] = {"outcome": "", "success": False}
    reward, over = 0.0, False
    try:
        options = {"task": task, "shuffled": name == "shuffled"}
        observation, _ = env.reset(seed=seed, options=options)
        while not over:
            if name == "oracle":
                action = env.unwrapped.oracle_action(rng)
                if action is None:
                    info = {**info, "outcome": "stuck"}
                    break
            elif name == "random":
                action = random_action(rng, len(env.unwrapped.vocabulary)).to_dict()
            else:
                assert actor is not None
                action = actor.act(observation).to_dict()
            observation, reward, ended, cut, info = env.step(action)
            steps += 1
            over = ended or cut
    except Crash:
        reward, info = 0.0, {"outcome": "crash", "success": False}
    seconds, success = time.monotonic() - begun, bool(info["success"])
    return Episode(
        name, task, seed, success, float(reward), steps, info["outcome"], seconds
    )


def random_action(rng: Random, words: int) -> Action:
    """Any action but DONE, each kind as likely."""
    kind = rng.choice([kind for kind in Kind if kind is not Kind.DONE])
    at, to = ((rng.random(), rng.random()) for _ in range(2))
    return Action(
        kind,
        at,
        to,
        rng.randrange(words),
        rng.randrange(FIELDS),
        rng.randrange(len(KEYS)),
    )


def summary(episodes: Iterable[Episode]) -> dict[str, Any]:
    """Success rates by actor and task with their intervals, and means over tasks.

    The mean's interval is that of all its episodes together; crashes are in no rate.
    """
    episodes = list(episodes)
    result: dict[str, Any] = {}
    for name in dict.fromkeys(episode.actor for episode in episodes):
        own = [episode for episode in episodes if episode.actor == name]
        tasks = {
            task: _rate([episode for episode in own if episode.task == task])
            for task in dict.fromkeys(episode.task for episode in own)
        }
        rates = [rate["success"] for rate in tasks.values() if rate["episodes"]]
        mean = float(np.mean(rates)) if rates else 0.0
        result[name] = {"mean": mean, "all": _rate(own), "tasks": tasks}
    return result


def _rate(episodes: Sequence[Episode]) -> dict[str, Any]:
    judged = [episode for episode in episodes if episode.outcome != "crash"]
    solved = sum(episode.success for episode in judged)
    low, high = wilson(solved, len(judged))
    steps = [episode.steps for episode in judged]
    return {
        "success": round(solved / len(judged), 4) if judged else 0.0,
        "low": round(low, 4),
        "high": round(high, 4),
        "episodes": len(judged),
        "crashes": len(episodes) - len(judged),
        "steps": round(float(np.mean(steps)), 2) if steps else 0.0,
    }


def table(result: dict[str, Any]) -> str:
    """A summary as Markdown."""
    actors = list(result)
    tasks = list(next(iter(result.values()))["tasks"]) if result else []
    rows = ["| task | " + " | ".join(actors) + " |", "| --- |" + " --- |" * len(actors)]
    for task in tasks:
        cells = [result[actor]["tasks"][task] for actor in actors]
        shown = [
            f"{c['success']:.3f} ({c['low']:.2f} to {c['high']:.2f})" for c in cells
        ]
        rows.append(f"| {task} | " + " | ".join(shown) + " |")
    means = [f"{result[actor]['mean']:.3f}" for actor in actors]
    return "\n".join([*rows, "| mean | " + " | ".join(means) + " |"])
