"""Which rollouts begin, and when: the four modes, the bound on lag, and curation.

All modes are one code path: `room` says how many groups may begin by what the learner
still has before it, `Planner.plan` by what the environments have. A mode decides only
what it waits for:

- rollout: a free environment takes the next rollout (DART);
- task: the environments of a group are free when the whole group has ended;
- batch: nothing begins until the batch has ended and was trained;
- lockstep: batch, and all environments step together (the hub holds the requests).

A group that begins now is trained after all that is pending, so the lag that it will
have is known in advance: pending groups over groups a batch. None begins that would be
late; what is late all the same (a straggler) is dropped when it is leased.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from jaxlab.rl import figures
from jaxlab.rl.config import Curation, RLRun
from jaxlab.rl.curation import (
    Experience,
    PoolState,
    Source,
    is_informative,
    length_cap,
    needs_experience,
    pool_sample,
    rollout_number,
    success_rate,
)
from jaxlab.rl.store import Choose, Store
from jaxlab.rl.tables import Choice, Stored, TaskStats, Ticket, Version

TRAINING_SEEDS = 1_000_000
"""episodes are trained on seeds below this; those from it on are for evaluation"""


class Pending(NamedTuple):
    """Groups before the learner."""

    open: int = 0
    """whose rollouts have not all ended"""
    ready: int = 0
    leased: int = 0
    """in the update under way"""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def room(mode: str, pending: Pending, batch: int, max_lag: int) -> int:
    """Groups that may begin.

    Args:
        mode: see the module.
        pending: groups before the learner.
        batch: groups an update.
        max_lag: versions that a group may be behind when it is trained. With 0 the
            run is synchronous: the groups of an update begin together, with the
            newest weights, when nothing is under way.
    """
    if mode in ("batch", "lockstep") or max_lag == 0:
        # A group that was dropped as not worth training is replaced in a next wave.
        missing = batch - pending.ready - pending.leased
        return 0 if pending.open else max(missing, 0)
    return max((max_lag + 1) * batch - pending.total, 0)


def slots_free(mode: str, slots: int, running: int, queued: int, held: int) -> int:
    """Environments for which rollouts are wanted.

    Args:
        mode: see the module.
        slots: environments that are up.
        running: rollouts that run.
        queued: rollouts that wait for an environment.
        held: rollouts of all open groups, ended or not.
    """
    return slots - (max(held, running + queued) if mode == "task" else running + queued)


def group_plan(
    curation: Curation, stats: TaskStats, max_steps: int, rng: Random
) -> list[tuple[int, bool]]:
    """Cap and whether it is a probe, of each rollout of a new group."""
    number = curation.n_max
    if curation.dynamic_rollouts:
        number = rollout_number(
            success_rate(stats.rewards, stats.cap_truncated),
            curation.n_max,
            curation.n_min,
            threshold=curation.threshold,
        )
    plan = []
    for _ in range(number):
        draw, cap = rng.random(), max_steps
        if curation.dynamic_length:
            cap = length_cap(
                stats.longest, max_steps, draw=draw, probe_share=curation.probe_share
            )
        plan.append((cap, curation.dynamic_length and draw < curation.probe_share))
    return plan


def chooser(curation: Curation, version: int, seed: int) -> Choose:
    """What becomes of a ready group: trained, trained with a success, or dropped."""

    def choose(
        group: int,
        task: str,
        rewards: Sequence[float],
        pool: Callable[[], list[Stored]],
    ) -> Choice:
        injected = None
        if curation.experience and needs_experience(rewards):
            stored = pool()
            state = PoolState(
                tuple(
                    Experience(task, str(x.id), Source(x.source), x.version, x.injected)
                    for x in stored
                )
            )
            _, found = pool_sample(
                state,
                task,
                version,
                Random(f"{seed}/inject/{group}").random(),
                max_age=curation.max_age,
                max_injections=curation.max_injections,
            )
            if found is not None:
                injected = next(x for x in stored if str(x.id) == found.trajectory)
                rewards = [*rewards, 1.0]
        keep = curation.keep_uninformative or is_informative(rewards)
        return Choice(keep, injected if keep else None)

    return choose


class Planner:
    """Begins groups; the state of it all is in the store.

    Args:
        run: what is run.
        store: of the planner's thread.
    """

    def __init__(self, run: RLRun, store: Store) -> None:
        self.run, self.store = run, store
        self.begun = figures.groups_begun(store.database)
        self.newest: Version | None = None
        """weights that are published"""

    @property
    def version(self) -> int:
        """Of the newest weights; -1: there are none."""
        return -1 if self.newest is None else self.newest.version

    def plan(self, slots: int, running: int, queued: int) -> list[Ticket]:
        """Begins the groups for which there is room, and gives their rollouts."""
        tickets: list[Ticket] = []
        mode = self.run.rollout.mode
        rows = figures.pending(self.store.database)
        # After it: weights that what is pending has been trained into are seen, too.
        self.newest = figures.latest(self.store.database)
        if self.newest is None:
            return tickets
        waves = mode in ("batch", "lockstep") or self.run.rollout.max_lag == 0
        counts = {
            state: sum(n for _, s, n, _ in rows if s == state)
            for state in ("OPEN", "READY", "LEASED")
        }
        pending = Pending(counts["OPEN"], counts["READY"], counts["LEASED"])
        held = sum(int(size) for _, state, _, size in rows if state == "OPEN")
        paused = figures.paused(self.store.database)
        load = {task: 0 for task in self.run.envs.tasks if task not in paused}
        for task, _, number, _ in rows:
            if task in load:
                load[task] += number
        free = room(mode, pending, self.run.groups, self.run.rollout.max_lag)
        with self.store.database.transaction():
            for _ in range(free):
                wanted = slots_free(
                    mode, slots, running, queued + len(tickets), held + len(tickets)
                )
                idle = not pending.open and not tickets
                if not waves and wanted < self._least(mode) and not idle:
                    break
                made = self._begin(load)
                if not made:
                    break
                tickets += made
        return tickets

    def _least(self, mode: str) -> int:
        """Free environments that a new group needs."""
        return self.run.curation.n_max if mode == "task" else 1

    def _begin(self, load: dict[str, int]) -> list[Ticket]:
        """Begins a group of the task that has fewest before the learner."""
        if not load:  # all of them are paused
            return []
        task = min(load, key=lambda t: (load[t], self.begun.get(t, 0)))
        number = sum(self.begun.values())
        load[task] += 1
        self.begun[task] = self.begun.get(task, 0) + 1
        rng = Random(f"{self.run.seed}/{number}")
        seed = rng.randrange(TRAINING_SEEDS)
        stats = figures.task_stats(self.store.database, task)
        caps = group_plan(self.run.curation, stats, self.run.envs.max_steps, rng)
        return self.store.add_group(task, seed, caps, self.version)
