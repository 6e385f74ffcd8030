"""Episodes in this process: of a policy, for evaluation, and of experts, to imitate.

The asynchronous parts (`jaxlab.rl.launch`) do the same with processes and faults; this
is for where neither is wanted.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from random import Random
from typing import Any, NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.rl.envs.api import Action, Crash, parse_action
from jaxlab.rl.policy import Policy
from jaxlab.rl.trajectory import Step, Trajectory, assemble

PART = 20
"""demonstrations that an environment plays at a stretch"""


class Job(NamedTuple):
    """An episode to be played."""

    id: int
    """unique among those played with one key: it decides what is sampled"""
    task: str
    seed: int
    group: int = -1
    limit: int = 10**9
    """actions, where the environment has no lower limit"""


class Acting(NamedTuple):
    """An episode that goes on."""

    job: Job
    observation: dict[str, Any]
    steps: list[Step]


def play(
    policy: Policy,
    params: Any,
    envs: Sequence[gymnasium.Env],
    jobs: Iterable[Job],
    key: jax.Array,
    *,
    temperature: float = 1.0,
    version: int = 0,
    options: dict[str, Any] | None = None,
    act: Callable[..., Any] | None = None,
) -> Iterator[Trajectory]:
    """Plays episodes, and yields each as it ends.

    All environments act together, in one batch of constant size; one whose episode
    ended takes the next. What an episode's actions are depends on the key and its job,
    not on the others.

    Args:
        policy: what acts.
        params: its weights.
        envs: of the same spaces; `reset` takes a task among its options.
        jobs: the episodes.
        key: of what is sampled.
        temperature: 0: always the likeliest action.
        version: of the weights, to be recorded.
        options: more of `reset`, as {"shuffled": True}.
        act: the policy's `act`, compiled; None: it is compiled here.
    """
    run = jax.jit(policy.act) if act is None else act
    queue = iter(jobs)
    slots: list[Acting | None] = [None] * len(envs)
    blank: dict[str, Any] = {}

    def begin(index: int) -> None:
        job = next(queue, None)
        slots[index] = None
        if job is not None:
            task = {"task": job.task} | (options or {})
            observation, _ = envs[index].reset(seed=job.seed, options=task)
            slots[index] = Acting(job, observation, [])

    for index in range(len(envs)):
        begin(index)
    while any(slots):
        blank = next(slot.observation for slot in slots if slot is not None)
        seen = [blank if slot is None else slot.observation for slot in slots]
        names = [(0, 0) if s is None else (s.job.id, len(s.steps)) for s in slots]
        acted = jax.device_get(
            run(
                params,
                np.stack([one["image"] for one in seen]),
                np.stack([one["instruction"] for one in seen]),
                _keys(key, np.array(names, np.uint32)),
                jnp.float32(temperature),
            )
        )
        for index, slot in enumerate(slots):
            if slot is None:
                continue
            tokens = acted.tokens[index]
            action = policy.action(tokens).to_dict()
            image = slot.observation["image"]
            logp, entropy = acted.logp[index], acted.entropy[index]
            slot.steps.append(Step(image, tokens, logp, entropy, version))
            observation, reward, ended, cut, _ = envs[index].step(action)
            if ended or cut or len(slot.steps) >= slot.job.limit:
                yield _finished(slot, observation, float(reward), not ended)
                begin(index)
            else:
                slots[index] = slot._replace(observation=observation)


def demonstrate(
    policy: Policy,
    env: gymnasium.Env,
    jobs: Iterable[Job],
) -> Iterator[Trajectory]:
    """Episodes of the environment's own expert, as the policy would have acted them.

    Its actions are carried out as the policy can say them: what succeeds here, the
    policy can do.

    Args:
        policy: whose tokens they are written in.
        env: with an `oracle_action`.
        jobs: the episodes.

    Yields:
        those that come to an end within their limit, whatever the reward; not those
        whose environment crashed.
    """
    for job in jobs:
        try:
            shown = _shown(policy, env, job)
        except Crash:
            continue
        if shown is not None:
            yield shown


def _shown(policy: Policy, env: gymnasium.Env, job: Job) -> Trajectory | None:
    """An episode of the expert; None: it saw nothing to do, or had not ended."""
    words = int(env.action_space["token"].n)  # pyright: ignore
    observation, _ = env.reset(seed=job.seed, options={"task": job.task})
    slot, ended, cut, reward = Acting(job, observation, []), False, False, 0.0
    while not (ended or cut) and len(slot.steps) < job.limit:
        wanted = env.unwrapped.oracle_action()  # pyright: ignore
        if wanted is None:
            break
        action, _ = parse_action(wanted, words)
        tokens = policy.tokens(action)
        unknown = np.full(len(tokens), np.nan, np.float32)
        image = slot.observation["image"]
        slot.steps.append(Step(image, tokens, unknown, unknown, -1))
        said: Action = policy.action(tokens)
        observation, reward, ended, cut, _ = env.step(said.to_dict())
        slot = slot._replace(observation=observation)
    if not slot.steps or not (ended or cut):
        return None
    return _finished(slot, observation, float(reward), cut, id=-1, source="oracle")


def demonstrations(
    policy: Policy,
    envs: Sequence[gymnasium.Env],
    tasks: Sequence[str],
    number: int,
    seed: int,
    limit: int,
    below: int,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Trajectory]:
    """Episodes to imitate: as many of each task, by the expert's middlemost choices.

    Task after task, as to another page it is a longer way than to another episode. The
    environments play side by side, on a thread each, whatever comes next.

    Args:
        policy: whose tokens they are written in.
        envs: with an `oracle_action`; which of them plays what, makes no difference.
        tasks: of the episodes.
        number: of episodes, all tasks together.
        seed: of which seeds they have.
        limit: actions of an episode, at most.
        below: bound on their seeds.
        stopped: asked before each; True: no further one is begun.
    """
    drawn = seeds(seed, number, below)
    jobs = [
        Job(index, tasks[index * len(tasks) // number], drawn[index], limit=limit)
        for index in range(number)
    ]
    parts = [jobs[start : start + PART] for start in range(0, number, PART)]
    free: SimpleQueue[gymnasium.Env] = SimpleQueue()
    for env in envs:
        free.put(env)

    def play_part(part: Sequence[Job]) -> list[Trajectory]:
        going = itertools.takewhile(lambda _: not stopped(), part)
        env = free.get()
        try:
            return list(demonstrate(policy, env, going))
        finally:
            free.put(env)

    with ThreadPoolExecutor(len(envs)) as pool:
        for shown in pool.map(play_part, parts):
            yield from shown


def seeds(seed: int, number: int, below: int) -> list[int]:
    """Different seeds below a bound, drawn with another."""
    return Random(seed).sample(range(below), number)


def wilson(successes: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share: 95 % by default."""
    if not number:
        return 0.0, 1.0
    share = successes / number
    middle = share + z * z / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + (z / (2 * number)) ** 2)
    scale = 1 + z * z / number
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


@jax.jit
def _keys(key: jax.Array, names: jax.Array) -> jax.Array:
    """One key for each (job, step)."""

    def fold(name: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, name[0]), name[1])

    return jax.vmap(fold)(names)


def _finished(
    slot: Acting, observation: dict[str, Any], reward: float, cut: bool, **rest: Any
) -> Trajectory:
    job = slot.job
    fields = {
        "id": job.id,
        "task": job.task,
        "seed": job.seed,
        "group": job.group,
        "text": str(slot.observation.get("text", "")),
        "instruction": np.asarray(slot.observation["instruction"], np.int32),
        "final": observation["image"],
        "reward": reward,
        "truncated": cut,
    }
    return assemble(slot.steps, **(fields | rest))
