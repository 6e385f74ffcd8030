"""DART in one process and without a clock: the synchronous loop that studies share.

What `jaxlab.rl.launch` does with processes, step for step in one: groups of rollouts,
curation, an update, again. Everything follows from the seed.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import gymnasium
import jax

from jaxlab.rl.config import Curation, RLRun
from jaxlab.rl.curation import (
    Experience,
    PoolState,
    Source,
    is_informative,
    length_cap,
    needs_experience,
    pool_add,
    pool_sample,
    rollout_number,
    success_rate,
)
from jaxlab.rl.play import Job, play
from jaxlab.rl.policy import Learner, Policy
from jaxlab.rl.trajectory import Trajectory, collate

TRAINING_SEEDS = 1_000_000
"""episodes are trained on seeds below this; those from it on are for evaluation"""
WAVES = 3
"""waves of groups that an update waits for, at most"""


@dataclass
class Memory:
    """What curation knows; changed in place."""

    rewards: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    capped: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    longest: dict[str, int] = field(default_factory=dict)
    pool: PoolState = field(default_factory=PoolState)
    stored: dict[str, Trajectory] = field(default_factory=dict)

    def note(
        self,
        members: Sequence[Trajectory],
        limits: dict[int, int],
        run: RLRun,
        version: int,
    ) -> None:
        """Takes in the rollouts of a group, which may act so long each."""
        for one in members:
            cut = one.truncated and limits[one.id] < run.envs.max_steps
            self.rewards[one.task].append(one.reward)
            self.capped[one.task].append(cut)
            if one.reward > 0:
                self.longest[one.task] = max(self.longest.get(one.task, 0), one.length)
                self.store(f"own-{one.id}", one, version, run.curation.per_task)

    def store(self, name: str, one: Trajectory, version: int, per_task: int) -> None:
        """Puts a success into the pool."""
        item = Experience(one.task, name, Source(one.source), version)
        self.pool = pool_add(self.pool, item, per_task)
        self.stored[name] = one
        kept = {x.trajectory for x in self.pool.items}
        self.stored = {k: v for k, v in self.stored.items() if k in kept}


class Round(NamedTuple):
    """One update."""

    state: Any
    figures: dict[str, float]
    """of the update, and of the rollouts before it"""
    actions: int
    """of all environments since the start"""


def train(
    run: RLRun,
    policy: Policy,
    learner: Learner,
    state: Any,
    envs: Sequence[gymnasium.Env],
    steps: int,
    demonstrations: Sequence[Trajectory] = (),
    acting: Any = None,
) -> Iterator[Round]:
    """Updates without end.

    Args:
        run: its `groups`, `seed`, `envs.tasks`, `envs.max_steps` and `curation`.
        policy: what acts.
        learner: what learns.
        state: its state at the start.
        envs: that act together.
        steps: of a batch; groups that do not fit into it are left out.
        demonstrations: for the experience pool.
        acting: `acting(params)`: the weights to act with; None: the learner's.
    """
    curation, memory, rng = run.curation, Memory(), Random(f"{run.seed}/groups")
    act, key = jax.jit(policy.act), jax.random.key(run.seed)
    actions = begun = waves = version = 0
    for number, one in enumerate(demonstrations):
        if one.reward > 0:
            memory.store(f"shown-{number}", one, 0, curation.per_task)
    while True:
        kept: list[list[Trajectory]] = []
        played: list[Trajectory] = []
        injected = used = 0
        start = time.process_time()
        for _ in range(WAVES):
            missing = run.groups - len(kept)
            jobs = [
                job
                for group in range(begun, begun + missing)
                for job in _group(run, memory, group, rng)
            ]
            begun, waves = begun + missing, waves + 1
            params = state.params if acting is None else acting(state.params)
            wave = play(
                policy,
                params,
                envs,
                jobs,
                jax.random.fold_in(key, waves),
                temperature=run.rollout.temperature,
                version=version,
                act=act,
            )
            ended = sorted(wave, key=lambda one: one.id)
            played += ended
            for members in _by_group(ended):
                extra = _success(run.curation, memory, members, version, rng)
                memory.note(members, {job.id: job.limit for job in jobs}, run, version)
                size = sum(one.length for one in members + extra)
                wanted = curation.keep_uninformative or is_informative(
                    [one.reward for one in members + extra]
                )
                if wanted and used + size <= steps:
                    kept.append(members + extra)
                    used, injected = used + size, injected + len(extra)
            if len(kept) == run.groups:
                break
        acted = time.process_time()
        figures: dict[str, float] = {}
        if kept:
            state, found = learner.update(state, collate(kept, version, steps))
            figures = {name: float(x) for name, x in jax.device_get(found).items()}
            version += 1
        actions += sum(one.length for one in played)
        figures |= {
            "sampled_success": sum(one.reward for one in played) / len(played),
            "length": sum(one.length for one in played) / len(played),
            "rollouts": len(played),
            "groups": len(kept),
            "injected": injected,
            "batch_steps": used,
            "act_cpu_s": acted - start,
            "learn_cpu_s": time.process_time() - acted,
        }
        yield Round(state, figures, actions)


def _by_group(ended: Sequence[Trajectory]) -> list[list[Trajectory]]:
    groups: dict[int, list[Trajectory]] = {}
    for one in ended:
        groups.setdefault(one.group, []).append(one)
    return list(groups.values())


def _group(run: RLRun, memory: Memory, group: int, rng: Random) -> list[Job]:
    """The rollouts of a new group."""
    curation, most = run.curation, run.envs.max_steps
    task = run.envs.tasks[group % len(run.envs.tasks)]
    number = curation.n_max
    if curation.dynamic_rollouts:
        number = rollout_number(
            success_rate(memory.rewards[task], memory.capped[task]),
            curation.n_max,
            curation.n_min,
            threshold=curation.threshold,
        )
    seed, jobs = rng.randrange(TRAINING_SEEDS), []
    for index in range(number):
        cap, draw = most, rng.random()
        if curation.dynamic_length:
            longest = memory.longest.get(task)
            share = curation.probe_share
            cap = length_cap(longest, most, draw=draw, probe_share=share)
        jobs.append(Job(group * curation.n_max + index, task, seed, group, cap))
    return jobs


def _success(
    curation: Curation,
    memory: Memory,
    members: Sequence[Trajectory],
    version: int,
    rng: Random,
) -> list[Trajectory]:
    """A stored success for a group that failed, if there is one."""
    if not curation.experience or not needs_experience([m.reward for m in members]):
        return []
    memory.pool, found = pool_sample(
        memory.pool,
        members[0].task,
        version,
        rng.random(),
        max_age=curation.max_age,
        max_injections=curation.max_injections,
    )
    return [] if found is None else [memory.stored[found.trajectory]]
