"""What to do about a diagnosis: nothing, look closer, restart without, or give up.

A pure policy: `decide(job, diagnosis, now, config) -> job, action`. The supervisor
(`jaxlab.health.supervise`) carries actions out and tells `restarted` when it has.

A *slot* is a place for one process of the job, (host, number on it); a *rank* is the
number that its process has in this *generation*, from one restart to the next. Slots
beyond those in use are spares. An evicted slot comes back as a spare after
`readmit_after`, for machines get mended, and diagnoses may be wrong.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jaxlab.health.detect import Diagnosis, Kind


class Slot(NamedTuple):
    """A place for one process."""

    host: str
    index: int

    def __str__(self) -> str:
        return f"{self.host}:{self.index}"


class Job(NamedTuple):
    """The state of the policy."""

    members: tuple[Slot, ...]
    """by rank"""
    spares: tuple[Slot, ...] = ()
    generation: int = 0
    evicted: tuple[tuple[Slot, float], ...] = ()
    """and when"""
    crashes: tuple[tuple[Slot, float], ...] = ()
    restarts: tuple[tuple[float, int], ...] = ()
    """when, and at which step"""
    absent: frozenset[str] = frozenset()
    """hosts that do not answer: until they do, their slots cannot be used"""
    suspicion: tuple[Diagnosis, float, int] | None = None
    """what was seen, since when, and how often in a row"""
    asked: Literal["", "profile", "probe"] = ""
    """what the suspicion has been looked at with"""
    evictions: tuple[float, ...] = ()
    """when, also of slots that have come back since"""


@dataclass(frozen=True)
class SteerConfig:
    """Caution and limits."""

    confirm: int = 2
    """times in a row that a hang is seen before anything is done about it; the test for
    slowness has seen it often when it says so"""
    sizes: tuple[int, ...] | None = None
    """numbers of processes that the job can run with; None: any"""
    least: int = 1
    """processes below which the job gives up"""
    crashes: int = 2
    """crashes of a slot within an hour that evict it; before, it starts again"""
    evictions_per_hour: int = 4
    restarts_per_hour: int = 20
    without_progress: int = 3
    """restarts in a row at one and the same step before the job gives up"""
    readmit_after: float = 1800.0
    """seconds until an evicted slot is a spare again"""
    gain: float = 0.1
    """part of the step's time that eviction of a slow rank must be worth"""


class Action(NamedTuple):
    """What the supervisor is to do."""

    kind: Literal["continue", "profile", "probe", "reorder", "restart", "give_up"]
    """profile: trace a few steps on all ranks; probe: measure the delay of each link;
    reorder: restart the same slots in an order that avoids `links`"""
    reason: str = ""
    members: tuple[Slot, ...] = ()
    """of the next generation, by rank; for reorder before they are put in order"""
    evict: tuple[Slot, ...] = ()
    links: tuple[tuple[int, int], ...] = ()


CONTINUE = Action("continue")
SLOW = {Kind.NONCOMM_SLOW, Kind.COMM_SLOW}


def decide(
    job: Job,
    diagnosis: Diagnosis,
    now: float,
    step: int = 0,
    slowdown: float = 1.0,
    config: SteerConfig | None = None,
) -> tuple[Job, Action]:
    """The next action, once a diagnosis has been confirmed.

    Args:
        job: state.
        diagnosis: of `detect_stall`, `detect_slow` or, after a probe, of
            `classify_matrix`; ranks are those of this generation.
        now: seconds, of one clock throughout.
        step: last step that is done.
        slowdown: duration of a step now over the healthy one, for slow ranks.
        config: limits; None: the default ones.

    Returns:
        the state with this diagnosis in it, and what to do.
    """
    config = config or SteerConfig()
    kind, ranks = diagnosis.kind, diagnosis.ranks
    if kind == Kind.HEALTHY:
        # A look at a suspicion that finds nothing ends it.
        return job._replace(suspicion=None, asked=""), CONTINUE
    job = _suspect(job, diagnosis, now)
    assert job.suspicion is not None
    seen = job.suspicion[2]
    if kind == Kind.CRASH:
        return _crashed(job, ranks, now, step, config, str(diagnosis))
    if kind in SLOW:
        return _slow(job, diagnosis, now, step, slowdown, config)
    if seen < config.confirm or kind == Kind.UNKNOWN:
        return job, CONTINUE
    if kind == Kind.COMM_HANG and not diagnosis.links and job.asked != "probe":
        return job._replace(asked="probe"), Action("probe", str(diagnosis))
    # Nobody to blame: the same slots once more, and the limits count it.
    blamed = ranks or _ends(diagnosis.links)
    return _without(job, blamed, now, step, config, str(diagnosis))


def _suspect(job: Job, diagnosis: Diagnosis, now: float) -> Job:
    before = job.suspicion
    if before is None:
        return job._replace(suspicion=(diagnosis, now, 1), asked="")
    last, since, seen = before
    same = (last.kind, last.ranks) == (diagnosis.kind, diagnosis.ranks)
    # What a closer look names confirms the suspicion that it was asked for.
    alike = last.kind == diagnosis.kind or {last.kind, diagnosis.kind} <= SLOW
    named = bool(diagnosis.ranks or diagnosis.links)
    if same or (job.asked and alike and named):
        return job._replace(suspicion=(diagnosis, since, seen + 1))
    asked = job.asked if last.kind == diagnosis.kind else ""
    return job._replace(suspicion=(diagnosis, now, 1), asked=asked)


def _slow(job, diagnosis, now, step, slowdown, config) -> tuple[Job, Action]:
    """Rank or link: looked at closer first; left alone where nothing would be won."""
    reason = str(diagnosis)
    if not diagnosis.ranks and not diagnosis.links:
        # From the step times alone a slow rank and a slow link look alike.
        if not job.asked:
            return job._replace(asked="profile"), Action("profile", reason)
        if diagnosis.kind == Kind.COMM_SLOW and job.asked == "profile":
            return job._replace(asked="probe"), Action("probe", reason)
        return job, CONTINUE  # everything is slow alike: nothing to leave out
    if diagnosis.scope == "point":
        action = Action("reorder", reason, job.members, (), diagnosis.links)
        return job, _exhausted(job, now, step, config, reason) or action
    after = next_members(job, diagnosis.ranks, now, config)
    cost = len(job.members) / len(after) if after else float("inf")
    allowed = _may_evict(job, diagnosis.ranks, now, config)
    if not allowed or slowdown * (1 - config.gain) < cost:
        return job, CONTINUE
    return _without(job, diagnosis.ranks, now, step, config, reason)


def _ends(links: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Ranks that meet all bad links: the one with most of them, again and again."""
    left, found = list(links), []
    while left:
        ends = [rank for link in left for rank in link]
        worst = max(sorted(set(ends)), key=lambda r: (ends.count(r), r))
        found.append(worst)
        left = [link for link in left if worst not in link]
    return tuple(sorted(found))


def _crashed(job, ranks, now, step, config, reason) -> tuple[Job, Action]:
    """Starts the slot again, unless it crashes time and again."""
    slots = [job.members[rank] for rank in ranks]
    recent = [c for c in job.crashes if now - c[1] < 3600]
    job = job._replace(crashes=(*recent, *((slot, now) for slot in slots)))
    often = [
        rank
        for rank, slot in zip(ranks, slots, strict=True)
        if sum(c[0] == slot for c in job.crashes) >= config.crashes
    ]
    return _without(job, tuple(often), now, step, config, reason)


def _without(job, ranks, now, step, config, reason) -> tuple[Job, Action]:
    """A restart without these ranks, as far as the limits go."""
    if not _may_evict(job, ranks, now, config):
        ranks = ()  # so many at once are rather the network's, or our own mistake
    exhausted = _exhausted(job, now, step, config, reason)
    if exhausted:
        return job, exhausted
    members = next_members(job, ranks, now, config)
    if len(members) < config.least or not members:
        return job, Action("give_up", f"too few processes are left: {reason}")
    gone = tuple(job.members[rank] for rank in ranks)
    return job, Action("restart", reason, members, gone)


def _may_evict(job, ranks, now, config) -> bool:
    recent = [at for at in job.evictions if now - at < 3600]
    return len(recent) + len(ranks) <= config.evictions_per_hour


def _exhausted(job, now, step, config, reason) -> Action | None:
    """Giving up, where restarts have not helped."""
    restarts = [r for r in job.restarts if now - r[0] < 3600]
    if len(restarts) >= config.restarts_per_hour:
        text = f"{len(restarts)} restarts within an hour; the last: {reason}"
        return Action("give_up", text)
    stuck = [r for r in job.restarts[-config.without_progress :] if r[1] == step]
    if len(stuck) >= config.without_progress:
        text = f"{len(stuck)} restarts without a step more; the last: {reason}"
        return Action("give_up", text)
    return None


def next_members(
    job: Job, without: tuple[int, ...], now: float, config: SteerConfig
) -> tuple[Slot, ...]:
    """The slots of the next generation, without some ranks: as many as may be."""
    gone = {job.members[rank] for rank in without}
    back = [slot for slot, at in job.evicted if now - at >= config.readmit_after]
    there = [slot for slot in job.members if slot not in gone]
    there += [s for s in (*job.spares, *back) if s not in gone and s not in there]
    there = [slot for slot in there if slot.host not in job.absent]
    allowed = [n for n in range(1, len(there) + 1) if n in (config.sizes or (n,))]
    return tuple(there[: max(allowed, default=0)])


def restarted(job: Job, action: Action, now: float, step: int) -> Job:
    """The state after a restart or reorder has been carried out, at step `step`."""
    members = set(action.members)
    everybody = (*job.members, *job.spares)
    evicted = tuple(e for e in job.evicted if e[0] not in members) + tuple(
        (slot, now) for slot in action.evict
    )
    out = members | {slot for slot, _ in evicted}
    return job._replace(
        members=action.members,
        spares=tuple(s for s in everybody if s not in out),
        generation=job.generation + 1,
        evicted=evicted,
        evictions=(*job.evictions, *(now for _ in action.evict)),
        restarts=(*job.restarts, (now, step)),
        suspicion=None,
        asked="",
    )


def to_json(job: Job) -> dict[str, Any]:
    """What a later supervisor needs of a job."""
    rows = job._replace(suspicion=None, asked="")._asdict()
    return {name: value for name, value in rows.items() if name != "absent"}


def from_json(rows: Mapping[str, Any]) -> Job:
    """`to_json`, undone."""
    return Job(
        tuple(Slot(*slot) for slot in rows["members"]),
        tuple(Slot(*slot) for slot in rows["spares"]),
        int(rows["generation"]),
        tuple((Slot(*slot), at) for slot, at in rows["evicted"]),
        tuple((Slot(*slot), at) for slot, at in rows["crashes"]),
        tuple((at, step) for at, step in rows["restarts"]),
        evictions=tuple(rows.get("evictions", ())),
    )
