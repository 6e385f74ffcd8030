"""The sequential test for slowness: statistics, false alarms, power, blame."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jaxlab.health.detect import DetectConfig, Kind, Window
from jaxlab.health.sequential import (
    alarm_limit,
    detect_slow,
    init_baseline,
    init_slow,
    median_of_others,
    slow_from_start,
    statistics,
    update_baseline,
    update_slow,
)

CFG = DetectConfig()
STEP = 0.25  # seconds; so a block has two steps
LOCAL, COMM = 0.15, 0.1


def window(local_tn, comm_t=None, first=0):
    """Steps that all ranks begin together, and end when the last has arrived."""
    comm_t = np.full(len(local_tn), COMM) if comm_t is None else comm_t
    end_t = local_tn.max(1) + comm_t
    wait_tn = end_t[:, None] - local_tn
    numbers = np.arange(first, first + len(local_tn))
    return Window(local_tn, wait_tn, wait_tn.min(1), end_t, numbers)


def noise(kind, rng, steps, n):
    """float[steps, n]: seconds to add to the local time of healthy ranks."""
    z = 0.01 * rng.standard_normal((steps, n))
    if kind == "normal":
        return z
    if kind == "student":
        return 0.01 * rng.standard_t(2, (steps, n))
    if kind == "pareto":
        rare = rng.random((steps, n)) < 0.02
        return z + 0.05 * rare * rng.pareto(1.2, (steps, n))
    if kind == "correlated":  # over 3 s
        out = np.zeros((steps, n))
        for t in range(1, steps):
            out[t] = 0.92 * out[t - 1] + z[t]
        return 0.5 * out
    # Bursts of load, of 2 s each on average: on all ranks, each its own way, or on one.
    shared = kind == "shared bursts"
    for column in range(1 if shared else n):
        t = 0
        while (t := t + int(rng.exponential((60 if shared else 300) / STEP))) < steps:
            length = 1 + int(rng.exponential((2 if shared else 0.5) / STEP))
            burst = z[t : t + length] if shared else z[t : t + length, [column]]
            burst += 0.1 * rng.uniform(0.5, 1.5, burst.shape)
            t += length
    return z


NOISES = ("normal", "student", "pareto", "correlated", "shared bursts", "own bursts")


def healthy(kind, rng, steps, n):
    """float[steps, n]: local times; the hosts are not equally fast."""
    hosts = LOCAL * rng.uniform(0.8, 1.0, n)
    return np.maximum(hosts + noise(kind, rng, steps, n), 0.001)


def stream(full, cfg=CFG, chunk=4):
    """All diagnoses of a stream of small windows: (index of the last step, it)."""
    state, baseline = init_slow(full.local.shape[1], cfg), init_baseline(cfg)
    out = []
    for t in range(0, len(full.step), chunk):
        part = Window(*(x[t : t + chunk] for x in full))
        state, diagnosis = update_slow(state, part, baseline, cfg)
        baseline = update_baseline(baseline, part, diagnosis)
        out.append((min(t + chunk, len(full.step)) - 1, diagnosis))
    return out, baseline


def alarms(diagnoses):
    """The first diagnosis of each alarm."""
    bad = [d.kind in (Kind.NONCOMM_SLOW, Kind.COMM_SLOW) for _, d in diagnoses]
    return [
        found
        for found, now, before in zip(diagnoses, bad, [False, *bad], strict=False)
        if now and not before
    ]


def baseline_of(n, cfg=CFG, local=None):
    local = np.full((600, n), LOCAL) if local is None else local
    return update_baseline(init_baseline(cfg), window(local))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_statistics_are_the_plain_loop(n):
    rng = np.random.default_rng(n)
    made = window(rng.random((9, n)), rng.random(9))
    if n > 4:
        made.local[:, 1] = made.wait[:, 1] = np.nan  # absent
    rows = statistics(made)
    assert rows.shape == (9, 3 * n + 3)

    def others(x, r, upper=False):
        rest = sorted(float(v) for i, v in enumerate(x) if i != r and v == v)
        middle = len(rest) // 2 if upper else (len(rest) - 1) // 2
        return rest[middle] if rest and x[r] == x[r] else math.nan

    for t in range(9):
        for r in range(n):
            local, wait = made.local[t], made.wait[t]
            expected = [
                local[r],
                local[r] - others(local, r),
                others(wait, r, upper=True) - wait[r],
            ]
            np.testing.assert_allclose(rows[t, [r, n + r, 2 * n + r]], expected)
        np.testing.assert_allclose(rows[t, -3], np.nanmedian(made.local[t]))
    np.testing.assert_array_equal(rows[:, -2:].T, [made.pure_comm, made.step])


def test_median_of_others_with_ties():
    x = np.array([[1.0, 1.0, 2.0, 2.0], [5.0, 5.0, 5.0, 0.0]])
    np.testing.assert_array_equal(median_of_others(x), [[2, 2, 1, 1], [5, 5, 5, 5]])


def test_evidence_is_the_shiryaev_roberts_sum():
    """All products of e-values over all times of change, in the plain."""
    cfg = DetectConfig(false_alarms_per_hour=1e-6)
    baseline = baseline_of(4, cfg)
    unusual = [0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1]
    local = np.full((2 * len(unusual), 4), LOCAL)
    local[:, 2] += 0.1 * np.repeat(unusual, 2)
    state, chain, before = init_slow(4, cfg), 0, 0
    e = []
    for t, now in enumerate(unusual):
        part = window(local[2 * t : 2 * t + 2], first=1000 + 2 * t)
        state, _ = update_slow(state, part, baseline, cfg)
        p = cfg.persistence if before else cfg.chance
        e.append(0.2 + 0.8 * now / p)
        before, chain = now, chain + 1
        expected = sum(math.prod(e[j:]) for j in range(chain))
        np.testing.assert_allclose(state.log_evidence[2], math.log(expected))
    assert state.run[2] == 9  # blocks since the first unusual one


def test_the_rate_at_the_edge_of_the_null_hypothesis():
    """Unusual blocks at exactly the probabilities assumed: the hardest healthy case."""
    cfg = DetectConfig(false_alarms_per_hour=20.0, block=0.5)
    rng = np.random.default_rng(0)
    n, steps = 3, 4000  # one step a block
    unusual = np.zeros((steps, n), bool)
    for t in range(1, steps):
        p = np.where(unusual[t - 1], cfg.persistence, cfg.chance)
        unusual[t] = rng.random(n) < p
    baseline = baseline_of(n, cfg, np.full((400, n), 0.4))
    local = 0.4 + 0.2 * unusual
    state, starts, was, seconds = init_slow(n, cfg), 0, False, 0.0
    for t in range(steps):
        part = window(local[t : t + 1], first=1000 + t)
        seconds += part.step[0]
        state, found = update_slow(state, part, baseline, cfg)
        now = found.kind == Kind.NONCOMM_SLOW
        starts, was = starts + (now and not was), now
    stated = cfg.false_alarms_per_hour * seconds / 3600
    assert 0 < starts <= stated, (starts, stated)


def test_the_rate_where_the_chain_runs_in_time_and_steps_end_when_it_is_over():
    """As above, where a run of unusual blocks is one long step."""
    cfg = DetectConfig(false_alarms_per_hour=20.0, block=0.5)
    rng = np.random.default_rng(1)
    runs = np.zeros((4000, 3), int)
    where = rng.random(runs.shape) < cfg.chance
    runs[where] = rng.geometric(1 - cfg.persistence, where.sum())
    baseline = baseline_of(3, cfg, np.full((400, 3), 0.4))
    diagnoses, state, seconds = [], init_slow(3, cfg), 0.0
    for t, run in enumerate(runs):
        part = window(0.4 + 0.5 * run[None], first=1000 + t)
        seconds += part.step[0]
        state, found = update_slow(state, part, baseline, cfg)
        diagnoses.append((t, found))
    assert runs.max() >= 4
    stated = cfg.false_alarms_per_hour * seconds / 3600
    assert 0 < len(alarms(diagnoses)) <= stated


@pytest.mark.parametrize("n, steps", [(2, 2), (4, 2), (64, 3), (4096, 3)])
def test_steps_many_times_as_long_are_named_after_a_few_and_not_after_one(n, steps):
    baseline, state = baseline_of(n, local=np.full((60, n), LOCAL)), init_slow(n)
    seen = []
    for t in range(steps):
        long = np.full((1, n), LOCAL)
        long[:, 1] += 1000.0 if t == 0 else 3.0
        state, found = update_slow(state, window(long, first=1000 + t), baseline)
        seen.append(found[:2])
    assert seen == [(Kind.HEALTHY, ())] * (steps - 1) + [(Kind.NONCOMM_SLOW, (1,))]


@pytest.mark.parametrize("kind", NOISES)
def test_false_alarms_are_at_most_the_stated_rate(kind):
    cfg = DetectConfig(false_alarms_per_hour=4.0)
    rng = np.random.default_rng(7)
    full = window(healthy(kind, rng, 15_000, 8))
    hours = full.step.sum() / 3600
    diagnoses, baseline = stream(full, cfg, chunk=10)
    found = alarms(diagnoses)
    assert len(found) <= cfg.false_alarms_per_hour * hours, [str(d) for _, d in found]
    assert hours > 1 and baseline.center is not None
    np.testing.assert_allclose(baseline.step, np.median(full.step), rtol=0.05)


def injected(kind, what, slowdown, seed, n=8, steps=1200, at=800):
    """A stream in which something takes longer by parts of a step, and the victim."""
    rng = np.random.default_rng(seed)
    local, comm = healthy(kind, rng, steps, n), np.full(steps, COMM)
    victim = int(rng.integers(n))
    if what == "rank":
        # Beyond the slowest host, or nobody would notice.
        local[at:, victim] += slowdown * STEP + LOCAL - np.median(local[:, victim])
    elif what == "all":
        local[at:] += slowdown * STEP
    else:
        comm[at:] += slowdown * STEP
    full = window(local, comm)
    diagnoses, _ = stream(full)
    clock = np.cumsum(full.step)
    return [(clock[t] - clock[at - 1], d) for t, d in alarms(diagnoses)], victim


@pytest.mark.parametrize("what", ["rank", "communication", "all"])
@pytest.mark.parametrize("kind", ["normal", "student", "pareto", "correlated"])
def test_power(kind, what):
    """A quarter of a step is found in 8 s (all ranks: 30 s), and rightly named."""
    delays = []
    for seed in range(4):
        found, victim = injected(kind, what, 0.25, seed)
        (delay, diagnosis), *_ = found
        ranks = (victim,) if what == "rank" else ()
        scope = {"rank": "rank", "all": "all"}.get(what, "none")
        named = Kind.COMM_SLOW if what == "communication" else Kind.NONCOMM_SLOW
        assert diagnosis[:4] == (named, ranks, (), scope), str(diagnosis)
        assert delay > 0 and diagnosis.confidence >= 0.5
        delays.append(delay)
    assert np.median(delays) < (30 if what == "all" else 8), delays


def test_bursts_delay_an_alarm_and_do_not_prevent_it():
    found, victim = injected("own bursts", "rank", 0.5, 3)
    assert found and found[0][1].ranks == (victim,) and 0 < found[0][0] < 60


def after(local_tn, comm_t=None, n=4):
    """The diagnosis of a window after a clean baseline without noise."""
    baseline = baseline_of(n)
    return detect_slow(window(local_tn, comm_t, first=1000), baseline)


def slowed(n, **by):
    local = np.full((120, n), LOCAL)
    for rank, seconds in by.items():
        local[:, int(rank[1:])] += seconds
    return local


@pytest.mark.parametrize(
    ("n", "by", "ranks", "scope"),
    [
        (1, {}, (), "none"),
        (1, {"r0": 0.1}, (), "all"),
        (2, {"r1": 0.1}, (1,), "rank"),
        (2, {"r0": 0.1, "r1": 0.1}, (), "all"),
        (2, {"r0": -0.1}, (), "none"),  # rank 1 is not slow: rank 0 is faster
        (3, {"r0": 0.1, "r2": 0.2}, (0, 2), "rank"),
        (4, {"r0": 0.1, "r2": 0.2}, (0, 2), "rank"),
        (4, {"r0": 0.1, "r1": 0.1, "r2": 0.1}, (), "all"),
        (4, {"r0": 0.1, "r1": 0.1, "r2": 0.1, "r3": 0.1}, (), "all"),
        (4, {"r3": 0.02}, (), "none"),  # less than a tenth of a step
    ],
)
def test_who_is_slow(n, by, ranks, scope):
    found = after(slowed(n, **by), n=n)
    assert (found.ranks, found.scope) == (ranks, scope), str(found)
    assert found.kind == (Kind.HEALTHY if scope == "none" else Kind.NONCOMM_SLOW)


def test_the_evidence_has_the_numbers():
    found = after(slowed(4, r2=0.1))
    assert str(found).startswith("NONCOMM_SLOW rank 2 (88%): own work takes 100 ms ")
    assert "40% of a step of 250 ms" in found.evidence
    np.testing.assert_allclose(found.confidence, 1 - 0.5 * 25 / 100)


def test_a_slow_rank_that_nobody_waits_for_is_not_blamed():
    """It began earlier: more work of its own, and it does not arrive later."""
    made = window(slowed(4, r2=0.1), first=1000)
    made = made._replace(wait=np.full((120, 4), COMM), pure_comm=np.full(120, COMM))
    assert detect_slow(made, baseline_of(4)).kind == Kind.HEALTHY


def test_a_rank_that_is_late_in_phase_is_not_blamed():
    """All sleep beside a step that was dispatched ahead, one of them later than others.

    The others have begun their sleep when the step before ends, so less of it counts;
    the steps are as long as ever.
    """
    made = window(np.full((120, 4), LOCAL), first=1000)
    made.local[:, 1] += 0.1
    made.wait[:, 1] -= 0.1
    assert detect_slow(made, baseline_of(4)).kind == Kind.HEALTHY
    longer = made._replace(step=made.step + 0.1)
    assert detect_slow(longer, baseline_of(4)).ranks == (1,)


def test_a_rank_that_is_let_out_late_is_not_blamed():
    """The others wait for it, but not for its work: a link, say."""
    made = window(np.full((120, 4), LOCAL), first=1000)
    made.wait[:, [0, 1, 3]] += 0.2
    assert detect_slow(made, baseline_of(4)).kind == Kind.HEALTHY


def test_slow_communication_is_not_confused_with_loaded_hosts():
    assert after(slowed(4), np.full(120, 3 * COMM)).kind == Kind.COMM_SLOW
    loaded = slowed(4, r0=LOCAL, r1=LOCAL, r2=LOCAL, r3=LOCAL)  # all at half speed
    found = after(loaded, np.full(120, 2 * COMM))
    assert (found.kind, found.scope) == (Kind.NONCOMM_SLOW, "all")
    slight = after(1.1 * slowed(4), np.full(120, 1.3 * COMM))
    assert slight.kind == Kind.HEALTHY


def test_what_little_a_host_does_before_a_step_excuses_no_slow_communication():
    """As in a step that is not split: all of it counts as communication."""
    local = np.full((600, 4), 0.0003)
    baseline = update_baseline(init_baseline(), window(local, np.full(600, STEP)))
    slow = window(20 * local[:120], np.full(120, 3 * STEP), first=1000)
    assert detect_slow(slow, baseline).kind == Kind.COMM_SLOW


def each_after(local_tn, comm_t):
    """The diagnoses of a stream after a clean baseline, where not healthy."""
    baseline, state, found = baseline_of(4), init_slow(4), []
    full = window(local_tn, comm_t, first=1000)
    for t in range(len(full.step)):
        part = Window(*(x[t : t + 1] for x in full))
        state, diagnosis = update_slow(state, part, baseline)
        found.append(diagnosis)
    return [d for d in found if d.kind != Kind.HEALTHY]


def test_all_slow_is_not_communication_first():
    """Its evidence grows faster, and means nothing while all hosts are slow."""
    local = slowed(4, r0=0.1, r1=0.1, r2=0.1, r3=0.1)
    slow = each_after(local, np.full(120, 4 * COMM))
    assert slow and {d[:4:3] for d in slow} == {(Kind.NONCOMM_SLOW, "all")}


def test_bursts_are_learned_and_shared():
    baseline, state = baseline_of(4), init_slow(4)
    run = window(slowed(4, r0=0.3)[:6])._replace(number=None)
    other = window(slowed(4, r1=0.3)[:6])._replace(number=None)
    calm = window(slowed(4)[:20])._replace(number=None)
    fresh = update_slow(state, other, baseline)[0]
    for part in (run, calm) * 8:
        state, found = update_slow(state, part, baseline)
        assert found.kind == Kind.HEALTHY
    # As probable as it was for rank 0 it is now thought to be for rank 1.
    assert update_slow(state, other, baseline)[0].log_evidence[1] < (
        fresh.log_evidence[1] - 2
    )


def test_a_throttled_rank_slows_its_communication_and_is_the_one_to_blame():
    local = slowed(4, r1=0.1)
    local[10:12] = LOCAL  # the evidence for the communication is ahead
    slow = each_after(local, np.full(120, 2 * COMM))
    assert slow and {d[:2] for d in slow} == {(Kind.NONCOMM_SLOW, (1,))}
    assert "communication has become slow too" in slow[-1].evidence


def test_it_recovers_and_finds_the_next_fault():
    local = np.concatenate(
        [slowed(4)] * 6 + [slowed(4, r1=0.1), slowed(4), slowed(4, r3=0.1), slowed(4)]
    )
    diagnoses, _ = stream(window(local))
    found = alarms(diagnoses)
    assert [d.ranks for _, d in found] == [(1,), (3,)]
    assert diagnoses[-1][1].kind == Kind.HEALTHY


def test_hosts_that_were_always_slow_are_another_question():
    local = slowed(4, r2=0.1)
    diagnoses, baseline = stream(window(np.concatenate([local] * 4)))
    assert not alarms(diagnoses)
    found = slow_from_start(baseline)
    assert (found.kind, found.ranks) == (Kind.NONCOMM_SLOW, (2,))
    assert slow_from_start(baseline_of(4)).kind == Kind.HEALTHY
    assert slow_from_start(init_baseline()).kind == Kind.UNKNOWN


def test_nothing_is_said_before_the_baseline_is_ready():
    diagnoses, baseline = stream(window(slowed(4)[:30]))
    assert {d.kind for _, d in diagnoses} == {Kind.UNKNOWN}
    assert (
        "15 of 20 blocks"
        in update_slow(init_slow(4), window(slowed(4)[:1]), baseline)[1].evidence
    )
    np.testing.assert_allclose(baseline.step, STEP)
    assert baseline.center is None
    one = update_baseline(init_baseline(), window(slowed(4)[:1]))
    np.testing.assert_allclose(one.step, STEP)


def test_the_baseline_does_not_learn_from_what_ails():
    baseline = baseline_of(4)
    bad = window(slowed(4, r1=0.5), first=1000)
    ill = detect_slow(bad, baseline)
    assert ill.kind == Kind.NONCOMM_SLOW
    frozen = update_baseline(baseline, bad, ill)
    assert frozen.history is baseline.history and frozen.last == 1119
    suspected = ill._replace(kind=Kind.HEALTHY, confidence=0.4)
    assert update_baseline(baseline, bad, suspected).seen == baseline.seen
    sound = ill._replace(kind=Kind.HEALTHY, confidence=0.9)
    assert update_baseline(baseline, bad, sound).seen > baseline.seen


def test_the_baseline_follows_slow_drift():
    drift = 1 + np.linspace(0, 1, 12_000)[:, None] * np.ones(4)
    diagnoses, baseline = stream(window(LOCAL * drift), chunk=20)
    assert not alarms(diagnoses)
    assert baseline.step > 1.4 * STEP


def test_windows_may_overlap_and_come_in_any_size():
    rng = np.random.default_rng(0)
    baseline = baseline_of(4)
    full = window(healthy("normal", rng, 60, 4), first=1000)
    once, _ = update_slow(init_slow(4), full, baseline)
    for size, stride in ((1, 1), (7, 7), (9, 4), (30, 10)):
        state = init_slow(4)
        for t in range(0, 60, stride):
            part = Window(*(x[t : t + size] for x in full))
            state, _ = update_slow(state, part, baseline)
        for one, other in zip(once, state, strict=True):
            np.testing.assert_allclose(one, other)


def test_another_number_of_ranks_needs_a_new_baseline():
    with pytest.raises(ValueError, match="new baseline"):
        detect_slow(window(slowed(3)), baseline_of(4))
    with pytest.raises(ValueError, match="3 ranks, the state 4"):
        update_slow(init_slow(4), window(slowed(3)), baseline_of(4))
    with pytest.raises(ValueError, match="new baseline"):
        update_baseline(baseline_of(4), window(slowed(3)))


def test_absent_ranks_are_not_judged():
    local = slowed(5, r1=0.1)
    made = window(local, first=1000)
    usual = window(slowed(5))
    for w in (made, usual):
        w.local[:, 3] = w.wait[:, 3] = np.nan
    found = detect_slow(made, update_baseline(init_baseline(), usual))
    assert found.ranks == (1,)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 6),
    kind=st.sampled_from(NOISES),
    size=st.floats(0, 2),
)
def test_a_delay_of_all_never_names_one(seed, n, kind, size):
    rng = np.random.default_rng(seed)
    hosts = LOCAL * rng.uniform(0.8, 1, n)
    usual = np.maximum(hosts + noise("normal", rng, 400, n), 0.001)
    common = size * rng.random((200, 1)) * rng.integers(0, 2, (200, 1))
    later = np.maximum(hosts + noise("normal", rng, 200, n), 0.001) + common
    baseline = baseline_of(n, local=usual)
    found = detect_slow(window(later, first=1000), baseline)
    assert found.ranks == () and found.kind != Kind.COMM_SLOW, str(found)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(2, 6),
    victims=st.sets(st.integers(0, 5), max_size=3),
)
def test_renaming_ranks_renames_the_culprits(seed, n, victims):
    rng = np.random.default_rng(seed)
    local = healthy("student", rng, 700, n)
    for victim in victims & set(range(n)):
        local[600:, victim] += 0.15
    order = rng.permutation(n)

    def diagnose(local):
        return detect_slow(
            window(local[600:], first=1000), baseline_of(n, local=local[:600])
        )

    before, now = diagnose(local), diagnose(local[:, order])
    assert (before.kind, before.scope) == (now.kind, now.scope)
    assert tuple(sorted(order[list(now.ranks)].tolist())) == before.ranks
    np.testing.assert_allclose(before.confidence, now.confidence)


def test_4096_ranks_are_each_as_in_a_small_crowd():
    """The statistics of a rank do not depend on how many others are like it."""
    rng = np.random.default_rng(0)
    made = window(healthy("normal", rng, 32, 4096))
    rows = statistics(made)
    for rank in (0, 1, 2000, 4095):
        rest = np.delete(made.local, rank, axis=1)
        expected = made.local[:, rank] - np.sort(rest, axis=1)[:, (4095 - 1) // 2]
        np.testing.assert_allclose(rows[:, 4096 + rank], expected)
    assert alarm_limit(4096, CFG) == pytest.approx(math.log(4098 * 7200 / 0.05))
    cfg = DetectConfig()
    baseline = baseline_of(4096, local=np.full((60, 4096), LOCAL))
    slow = np.full((60, 4096), LOCAL)
    slow[:, [3, 2222]] += 0.1
    found = detect_slow(window(slow, first=1000), baseline, cfg)
    assert (found.kind, found.ranks) == (Kind.NONCOMM_SLOW, (3, 2222))
