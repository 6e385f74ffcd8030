"""Which trajectories and steps are worth their cost (DART, arXiv 2509.23866).

Pure functions of explicit state; chance comes in as a `draw`, uniform in [0, 1), so
that a run can be replayed. Four levels, each with the value that switches it off:

- task: `rollout_number`, fewer rollouts where success is common (n_min = n_max);
- trajectory: `length_cap`, no longer than a success needs (probe_share = 1), and the
  experience pool, a stored success where a whole group failed (an empty pool);
- step: `entropy_mask`, the steps at which the policy wavers (quantile = 0);
- token: `jaxlab.rl.loss.truncated_importance_weights` (equal policies).

"Released code" below is the authors' Computer-use-agents/dart-gui. Where it and the
paper differ, or where both leave a rule open, the docstring says what holds here.
"""

import enum
import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, Real


def rollout_number(
    success_rate: SupportsFloat | None,
    n_max: int = 8,
    n_min: int = 2,
    *,
    threshold: SupportsFloat = 0.6,
) -> int:
    """Rollouts that a task gets, by how often it succeeds (DART, "dynamic rollouts").

    n_max up to the threshold, above it floor(9 / success_rate - 7) within n_min and
    n_max: 8 at 0.6, 5 at 0.7, 4 at 0.8, 3 at 0.9, 2 at 1.0. The paper gives the
    threshold, the released code the formula, whose constants belong to n_max = 8 (and
    whose threshold is 1, so that it never lowers anything). There n_min is 1; a group
    of one has no baseline, so 2 here.

    Args:
        success_rate: in [0, 1], as of `success_rate`; None: not known yet.
        n_max: rollouts of a hard task; at least n_min.
        n_min: rollouts of a solved task; at least 1.
        threshold: success rate up to which a task keeps n_max.

    Returns:
        n_min to n_max; never more for a higher success rate.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 1 <= n_min <= n_max:
        raise ValueError(f"rollouts need 1 <= n_min <= n_max, not {n_min} and {n_max}")
    if success_rate is None:
        return n_max
    rate = float(success_rate)
    if not 0 <= rate <= 1:
        raise ValueError(f"success_rate is {rate}; it must be in [0, 1]")
    if rate <= max(float(threshold), 0.0):
        return n_max
    # With a tiny threshold a tiny rate gets here, and the quotient would overflow.
    return min(max(math.floor(9 / max(rate, 1e-9) - 7), n_min), n_max)


def length_cap(
    longest_success: SupportsFloat | None,
    l_max: int = 30,
    l_min: int = 1,
    *,
    draw: SupportsFloat = 1.0,
    probe_share: SupportsFloat = 0.05,
    slack: SupportsFloat = 1.25,
    extra: int = 2,
) -> int:
    """Steps that a rollout may take (DART, "dynamic trajectory length").

    ceil(slack * longest_success) + extra within l_min and l_max. The paper caps at the
    longest success itself and releases no code for it; such a cap can only shrink. So
    some slack, and a share of the rollouts are probes without a cap: they find out
    that a task has longer solutions.

    A trajectory that a cap below l_max cut off has reward 0 but says nothing about
    the task: leave it out of `success_rate` (its `capped`).

    Args:
        longest_success: steps of the task's longest success; None: none yet, no cap.
        l_max: steps that any rollout may take.
        l_min: no cap is below this.
        draw: uniform in [0, 1), one for each rollout; below `probe_share` the rollout
            is a probe. The default is never one.
        probe_share: share of the rollouts without a cap.
        slack: factor on the longest success.
        extra: steps added to it.

    Returns:
        l_min to l_max.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 1 <= l_min <= l_max:
        raise ValueError(f"steps need 1 <= l_min <= l_max, not {l_min} and {l_max}")
    for name, value in (("draw", draw), ("probe_share", probe_share)):
        if not 0 <= float(value) <= 1:
            raise ValueError(f"{name} is {value}; it must be in [0, 1]")
    is_probe = float(draw) < float(probe_share) or float(probe_share) == 1
    if longest_success is None or is_probe:
        return l_max
    longest = float(longest_success)
    if longest < 0:
        raise ValueError(f"longest_success is {longest}; it must be at least 0")
    return min(max(math.ceil(float(slack) * longest) + extra, l_min), l_max)


def success_rate(
    rewards: Iterable[SupportsFloat | None],
    capped: Iterable[object] | None = None,
    window: int = 16,
) -> float | None:
    """Mean reward of a task's newest rollouts that say something about it.

    Args:
        rewards: in [0, 1], oldest first; None: the rollout ended without one (its
            environment died), which is no failure of the policy.
        capped: which were cut off by a `length_cap` below l_max; these count only if
            they earned something. None: none of them.
        window: how many of those that count are averaged.

    Returns:
        in [0, 1], for `rollout_number`; None if nothing counts.

    Raises:
        ValueError: `capped` has another length, or the window is empty.
    """
    if window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    values = [None if reward is None else float(reward) for reward in rewards]
    cut = [False] * len(values) if capped is None else capped
    counted = [
        value
        for value, short in zip(values, cut, strict=True)
        if value is not None and (value > 0 or not short)
    ]
    newest = counted[-window:]
    return sum(newest) / len(newest) if newest else None


def needs_experience(rewards: Iterable[SupportsFloat]) -> bool:
    """Whether all of a group's rollouts failed, so that only the pool can teach."""
    return max(map(float, rewards), default=math.inf) <= 0


def is_informative(
    rewards: Iterable[SupportsFloat], mean_max: SupportsFloat = 1.0
) -> bool:
    """Whether a group, the pool's success included, gives any gradient.

    Equal rewards have no advantage. The released code also drops groups whose mean
    reward reaches its `acc_max`, here `mean_max`; 1 drops the solved ones.
    """
    values = [float(reward) for reward in rewards]
    if len(values) < 2 or min(values) == max(values):
        return False
    return sum(values) / len(values) < float(mean_max)


class Source(enum.StrEnum):
    """Who acted in a stored trajectory."""

    ORACLE = "oracle"
    """a script that knows the solution"""
    SELF = "self"
    """an earlier version of the policy"""
    HUMAN = "human"


class Experience(NamedTuple):
    """A successful trajectory in the pool; its steps are stored elsewhere."""

    task: str
    trajectory: str
    """its id, unique in the pool"""
    source: Source
    version: int
    """the policy's when it was added"""
    injected: int = 0
    """how often it was given to a group"""

    def age(self, version: int) -> int:
        """Versions since it was added."""
        return version - self.version


class PoolState(NamedTuple):
    """The experience pool: successes that are given to groups that failed."""

    items: tuple[Experience, ...] = ()
    """in the order added"""


def pool_add(pool: PoolState, experience: Experience, per_task: int = 16) -> PoolState:
    """The pool with a success added.

    Args:
        pool: stays as it is.
        experience: a trajectory that the pool has already changes nothing, so an add
            may be repeated.
        per_task: successes kept of a task, at least 1. Of more, the one from the
            oldest version that the policy itself produced goes, and demonstrations
            only when no such is left: the policy renews its own.

    Raises:
        ValueError: nothing is to be kept.
    """
    if per_task < 1:
        raise ValueError(f"per_task is {per_task}; it must be at least 1")
    if any(item.trajectory == experience.trajectory for item in pool.items):
        return pool
    items = (*pool.items, experience)
    places = [place for place, item in enumerate(items) if item.task == experience.task]

    def worth(place: int) -> tuple[bool, int, int]:
        item = items[place]
        return item.source != Source.SELF, item.version, place

    gone = set(sorted(places, key=worth)[: max(len(places) - per_task, 0)])
    return PoolState(tuple(x for place, x in enumerate(items) if place not in gone))


def pool_sample(
    pool: PoolState,
    task: str,
    version: int,
    draw: SupportsFloat,
    *,
    max_age: int | None = None,
    max_injections: int | None = None,
) -> tuple[PoolState, Experience | None]:
    """One of a task's stored successes, each as likely, and the pool that counts it.

    The paper inserts one random pre-collected success where all rollouts of a group
    failed (`needs_experience`). The released code instead takes the newest success of
    any version, used or not. Here: one at random, with a bound on age and on use.

    Its rollout log-probabilities are those stored with it or, of a demonstration, a
    teacher-forced pass of the trainer's policy at injection (weight 1).

    Args:
        pool: stays as it is.
        task: whose group failed.
        version: of the policy now.
        draw: uniform in [0, 1).
        max_age: versions that a success of the policy itself stays eligible; a
            demonstration never was on policy and does not age. None: no bound.
        max_injections: times that one success may be given. None: no bound.

    Returns:
        the pool with the injection counted, and the success as it was before; the
        same pool and None if the task has no eligible one.

    Raises:
        ValueError: the draw is not in [0, 1).
    """
    if not 0 <= float(draw) < 1:
        raise ValueError(f"draw is {draw}; it must be in [0, 1)")
    places = [
        place
        for place, item in enumerate(pool.items)
        if item.task == task
        and not _is_stale(item, version, max_age)
        and (max_injections is None or item.injected < max_injections)
    ]
    if not places:
        return pool, None
    place = places[int(float(draw) * len(places))]
    chosen = pool.items[place]
    counted = chosen._replace(injected=chosen.injected + 1)
    items = (*pool.items[:place], counted, *pool.items[place + 1 :])
    return PoolState(items), chosen


def expire(pool: PoolState, version: int, max_age: int) -> PoolState:
    """The pool without the policy's own successes that are older than `max_age`."""
    return PoolState(tuple(x for x in pool.items if not _is_stale(x, version, max_age)))


def provenance(pool: PoolState) -> dict[Source, int]:
    """How many of the pool's successes come from each source."""
    counts = Counter(item.source for item in pool.items)
    return {source: counts[source] for source in Source}


def _is_stale(item: Experience, version: int, max_age: int | None) -> bool:
    own = item.source == Source.SELF
    return own and max_age is not None and item.age(version) > max_age


def entropy_mask(
    entropy: Real[ArrayLike, " step"],
    group: Int[ArrayLike, " step"] | None = None,
    quantile: SupportsFloat | Array = 0.2,
    *,
    mask: Bool[ArrayLike, " step"] | None = None,
) -> Bool[Array, " step"]:
    """The steps whose entropy is at least their group's quantile (DART, J's indicator).

    1[H >= q(H)], H the mean entropy of a step's tokens, recorded at the rollout, and q
    the quantile over all steps of the task's group. The released code has this
    commented out.

    Of n steps exactly floor(quantile * n) are left out if no two are equal, and fewer
    if those at the threshold are: ties stay. So at least the share 1 - quantile is
    kept of any group. (An interpolated quantile would keep 1 of 2 steps at 0.2.) A
    step whose entropy is NaN, unknown, is kept: it counts as the highest.

    Args:
        entropy: nats; any real type, compared in float32 or wider.
        group: task of each step: any integers (within int32 unless x64 is on), in any
            order. None: one group.
        quantile: in [0, 1]; 0 keeps all, 1 keeps the highest. May be traced.
        mask: False where the step is padding: not counted, not kept.

    Returns:
        True for the steps to train on.

    Raises:
        ValueError: the quantile is out of its range, or `group` is no array of steps.
    """
    if not isinstance(quantile, jax.Array):
        quantile = float(quantile)
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile is {quantile}; it must be in [0, 1]")
    values = jnp.asarray(entropy)
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if values.size == 0:
        return jnp.zeros(values.shape, bool)
    values = jnp.where(jnp.isnan(values), jnp.inf, values)
    index, sizes = group_index(values.shape[0], group, mask)
    drop = jnp.floor(quantile * sizes).astype(jnp.int32)
    drop = jnp.clip(drop, 0, jnp.maximum(sizes - 1, 0))
    # Sorted by group, then entropy: a group's threshold is the entry after the dropped.
    ascending = values[jnp.lexsort((values, index))]
    place = jnp.cumsum(sizes) - sizes + drop
    threshold = ascending[jnp.minimum(place, values.shape[0] - 1)]
    kept = values >= threshold[index]
    return kept if mask is None else kept & jnp.asarray(mask, bool)


def group_index(
    steps: int,
    group: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> tuple[Int[Array, " step"], Int[Array, " segment"]]:
    """Numbers the groups, for segment sums; works under `jax.jit`.

    Args:
        steps: how many there are, at least 1.
        group: int[step]; equal integers are one group. None: one group.
        mask: bool[step]; False: in none of the groups. None: all True.

    Returns:
        the number of each step's group, int32[step], `steps` where it has none; and
        how many steps each number has, int32[steps + 1].

    Raises:
        ValueError: `group` or `mask` does not have one entry for each step.
    """
    for name, value in (("group", group), ("mask", mask)):
        if value is not None and jnp.shape(value) != (steps,):
            raise ValueError(
                f"{name} has shape {jnp.shape(value)} instead of ({steps},): "
                "one entry for each step"
            )
    index = jnp.zeros(steps, jnp.int32)
    if group is not None:
        index = jnp.unique(group, return_inverse=True, size=steps)[1]
        index = index.astype(jnp.int32)
    if mask is not None:
        index = jnp.where(jnp.asarray(mask, bool), index, steps)
    sizes = jax.ops.segment_sum(jnp.ones(steps, jnp.int32), index, steps + 1)
    return index, sizes
