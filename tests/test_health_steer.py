"""The policy: what is done about which diagnosis, and when nothing is."""

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from jaxlab.health.detect import Diagnosis, Kind
from jaxlab.health.steer import Job, Slot, SteerConfig, decide, next_members, restarted

SLOTS = tuple(Slot("a", i) for i in range(4))
JOB = Job(SLOTS)


def found(kind, ranks=(), links=(), scope="rank"):
    return Diagnosis(kind, ranks, links, scope, "seen", 0.9)


def after(diagnosis, times=2, job=JOB, step=10, slowdown=1.0, config=None, now=0.0):
    """The state and the action when the same is seen so often in a row."""
    action = None
    for i in range(times):
        job, action = decide(job, diagnosis, now + i, step, slowdown, config)
    return job, action


def test_a_crash_starts_the_same_slots_at_once_and_evicts_the_second_time():
    crash = found(Kind.CRASH, (2,))
    job, action = after(crash, 1)
    assert (action.kind, action.members, action.evict) == ("restart", SLOTS, ())
    job = restarted(job, action, 1.0, 10)
    assert job.generation == 1 and job.suspicion is None
    _, action = after(crash, 1, job, now=100.0, step=20)
    assert action.evict == (SLOTS[2],) and SLOTS[2] not in action.members
    _, later = after(crash, 1, job, now=5000.0, step=20)
    assert later.evict == ()


@pytest.mark.parametrize("kind", [Kind.FROZEN, Kind.NONCOMM_HANG])
def test_a_rank_that_stands_is_evicted_once_that_is_confirmed(kind):
    assert after(found(kind, (1,)), 1)[1].kind == "continue"
    _, action = after(found(kind, (1,)), 2)
    assert action.kind == "restart" and action.evict == (SLOTS[1],)
    assert action.members == (SLOTS[0], SLOTS[2], SLOTS[3])


def test_another_diagnosis_begins_its_own_count():
    job, _ = after(found(Kind.FROZEN, (1,)), 1)
    job, action = after(found(Kind.FROZEN, (2,)), 1, job)
    assert action.kind == "continue"
    job, _ = after(Diagnosis(Kind.HEALTHY), 1, job)
    assert job.suspicion is None


def test_only_sizes_that_the_job_can_run_with():
    config = SteerConfig(sizes=(1, 2, 4))
    job, action = after(found(Kind.FROZEN, (0,)), config=config)
    assert action.members == (SLOTS[1], SLOTS[2])
    job = restarted(job, action, 2.0, 10)
    assert job.spares == (SLOTS[3],)
    assert [slot for slot, _ in job.evicted] == [SLOTS[0]]
    # The spare takes the place of the next one that fails.
    job, action = after(found(Kind.FROZEN, (1,)), 2, job, config=config, now=10.0)
    assert action.members == (SLOTS[1], SLOTS[3])


def test_an_evicted_slot_comes_back():
    config = SteerConfig(readmit_after=100.0)
    job, action = after(found(Kind.FROZEN, (3,)), config=config)
    job = restarted(job, action, 2.0, 10)
    assert SLOTS[3] not in next_members(job, (), 50.0, config)
    assert SLOTS[3] in next_members(job, (), 102.0, config)


def test_a_hang_of_the_communication_is_probed_first():
    job, action = after(found(Kind.COMM_HANG, scope="none"))
    assert action.kind == "probe"
    links = ((1, 2), (2, 1), (2, 3))
    _, action = after(found(Kind.COMM_HANG, (), links, "point"), 2, job)
    assert action.kind == "restart" and action.evict == (SLOTS[2],)
    # The probe has found nothing: the same slots once more.
    _, action = after(found(Kind.COMM_HANG, scope="none"), 1, job)
    assert (action.kind, action.evict) == ("restart", ())


def test_slow_communication_is_looked_at_and_then_steered_around():
    job, action = after(found(Kind.COMM_SLOW, scope="none"), 1, slowdown=3.0)
    assert action.kind == "profile"
    job, action = after(found(Kind.COMM_SLOW, scope="none"), 1, job, slowdown=3.0)
    assert action.kind == "probe"
    # A probe answers once: what it names is confirmed by the suspicion before it.
    link = found(Kind.COMM_SLOW, (), ((1, 2),), "point")
    _, action = after(link, 1, job, slowdown=3.0)
    assert action.kind == "reorder" and action.links == ((1, 2),)
    node = found(Kind.COMM_SLOW, (2,), (), "row")
    _, action = after(node, 1, job, slowdown=3.0)
    assert action.kind == "restart" and action.evict == (SLOTS[2],)


def test_a_slow_rank_that_is_named_is_left_out_at_once():
    """By a profile, or by the test, which has observed it often."""
    job, action = after(found(Kind.COMM_SLOW, scope="none"), 1, slowdown=3.0)
    assert action.kind == "profile"
    for before in (job, JOB):
        _, action = after(found(Kind.NONCOMM_SLOW, (2,)), 1, before, slowdown=3.0)
        assert action.kind == "restart" and action.evict == (SLOTS[2],)


@pytest.mark.parametrize("slowdown, kind", [(1.2, "continue"), (1.6, "restart")])
def test_a_slow_rank_is_left_out_only_where_that_pays(slowdown, kind):
    """Three of four take 4/3 of the time."""
    slow = found(Kind.NONCOMM_SLOW, (3,))
    assert after(slow, slowdown=slowdown)[1].kind == kind


def test_with_a_spare_a_slow_rank_costs_nothing_to_leave_out():
    job = JOB._replace(spares=(Slot("b", 0),))
    _, action = after(found(Kind.NONCOMM_SLOW, (3,)), job=job, slowdown=1.2)
    assert action.members == (*SLOTS[:3], Slot("b", 0))


def test_everybody_slow_is_nobodys_fault():
    slow = found(Kind.NONCOMM_SLOW, scope="all")
    job, action = after(slow, 1, slowdown=9.0)
    assert action.kind == "profile"
    assert after(slow, 5, job, slowdown=9.0)[1].kind == "continue"


def test_too_many_evictions_within_an_hour_restart_the_same_slots():
    config = SteerConfig(evictions_per_hour=1)
    job, action = after(found(Kind.FROZEN, (3,)), config=config)
    job = restarted(job, action, 2.0, 10)
    job, action = after(found(Kind.FROZEN, (0,)), 2, job, config=config, now=9.0)
    assert action.kind == "restart" and action.evict == ()
    slow = found(Kind.NONCOMM_SLOW, (0,))
    assert after(slow, 2, job, slowdown=9.0, config=config)[1].kind == "continue"


def test_it_gives_up_where_nothing_advances():
    job, config = JOB, SteerConfig(without_progress=3, crashes=99)
    crash = found(Kind.CRASH, (0,))
    for i in range(3):
        job, action = after(crash, 1, job, 7, config=config, now=float(i))
        assert action.kind == "restart"
        job = restarted(job, action, float(i), 7)
    _, action = after(crash, 1, job, 7, config=config, now=9.0)
    assert action.kind == "give_up" and "without a step more" in action.reason
    _, action = after(crash, 1, job, 8, config=config, now=9.0)
    assert action.kind == "restart"


def test_it_gives_up_where_too_few_are_left():
    config = SteerConfig(least=4)
    _, action = after(found(Kind.FROZEN, (0,)), config=config)
    assert action.kind == "give_up" and "too few" in action.reason


KINDS = st.sampled_from(list(Kind))
RANKS = st.sets(st.integers(0, 3), max_size=2).map(lambda r: tuple(sorted(r)))
EVENTS = st.lists(st.tuples(KINDS, RANKS, st.floats(0, 600)), max_size=60)


@example(
    [
        (Kind.NONCOMM_SLOW, (0, 1), 0.0),
        *[(Kind.HEALTHY, (), 600.0)] * 3,
        *[(Kind.NONCOMM_SLOW, (0,), 10.0)] * 3,
    ]
)
@given(EVENTS)
def test_slots_are_never_lost_or_doubled_and_limits_hold(events):
    config = SteerConfig(evictions_per_hour=3, restarts_per_hour=5, without_progress=99)
    job, now, restarts, evictions = JOB, 0.0, [], []
    for kind, ranks, wait in events:
        now += wait
        ranks = tuple(r for r in ranks if r < len(job.members))
        diagnosis = found(kind, ranks)
        job, action = decide(job, diagnosis, now, 1, 5.0, config)
        if action.kind in ("restart", "reorder"):
            job = restarted(job, action, now, 1)
            restarts.append(now)
            evictions += [now] * len(action.evict)
        everybody = [*job.members, *job.spares, *(slot for slot, _ in job.evicted)]
        assert sorted(everybody) == sorted(SLOTS)
        assert job.members or action.kind == "give_up"
    for times, most in ((restarts, 5), (evictions, 3)):
        assert all(sum(t <= u < t + 3600 for u in times) <= most for t in times)
