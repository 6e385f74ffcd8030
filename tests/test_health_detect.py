"""Alignment of samples and diagnosis of programs that stand still."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxlab.health.detect import (
    Baseline,
    Board,
    DetectConfig,
    Diagnosis,
    Kind,
    Phase,
    RankSample,
    align,
    detect_stall,
    median,
    stall_limit,
)

CFG = DetectConfig()
BASELINE = Baseline(CFG, step=0.05)  # the limit of a stall is then 1.5 s
NOW = 1000.0


def board(enter, exit=None, *, age=2.0, silence=0.1, phase=Phase.STEP, **flags):
    """A board of len(enter) ranks; what is one number holds for all of them."""
    n = len(enter)

    def field(x, dtype):
        return np.broadcast_to(np.asarray(x, dtype), (n,)).copy()

    return Board(
        alive=~field([i in flags.get("dead", ()) for i in range(n)], bool),
        stopped=field([i in flags.get("stopped", ()) for i in range(n)], bool),
        heartbeat=NOW - field(silence, float),
        progress=NOW - field(age, float),
        enter_seq=field(enter, np.int64),
        exit_seq=field(enter if exit is None else exit, np.int64),
        phase=field(phase, np.int64),
        step=field(enter, np.int64),
    )


CHECKPOINT, STEP, DONE = Phase.CHECKPOINT, Phase.STEP, Phase.DONE
STALLS = {
    "runs": (board([9, 9, 8], [8, 9, 8], age=0.1), Kind.HEALTHY, (), "none"),
    "dead": (board([9, 9, 9], [8, 8, 8], dead=[1]), Kind.CRASH, (1,), "rank"),
    "dead at once": (board([9, 9], age=0.01, dead=[0, 1]), Kind.CRASH, (0, 1), "rank"),
    "dead explains who stands still": (
        board([9, 9, 8], [8, 9, 8], dead=[2]),
        Kind.CRASH,
        (2,),
        "rank",
    ),
    "dead and frozen": (
        board([9, 9, 9], [8, 8, 8], dead=[0], stopped=[2], silence=[9, 0.1, 4]),
        Kind.CRASH,
        (0, 2),
        "rank",
    ),
    "done is not dead": (
        board([9, 9], [9, 9], dead=[0, 1], phase=DONE),
        Kind.HEALTHY,
        (),
        "none",
    ),
    "stopped inside": (
        board([9, 9, 9], [8, 8, 8], stopped=[1], silence=[0.1, 1.2, 0.1]),
        Kind.FROZEN,
        (1,),
        "rank",
    ),
    "stopped just now": (
        board([9, 9], [8, 8], age=0.2, stopped=[1], silence=[0.1, 0.2]),
        Kind.HEALTHY,
        (),
        "none",
    ),
    "silent in a stall, as where the kernel cannot be asked": (
        board([9, 9, 9], [8, 8, 8], silence=[0.1, 0.1, 1.8]),
        Kind.FROZEN,
        (2,),
        "rank",
    ),
    "silent while it goes on: a lock held, a loaded host": (
        board([9, 9], age=0.1, silence=[0.1, 3.0]),
        Kind.HEALTHY,
        (),
        "none",
    ),
    "silent for long": (
        board([9, 9], age=0.1, silence=[0.1, 11.0]),
        Kind.FROZEN,
        (1,),
        "rank",
    ),
    "silent in its imports": (
        board([0, 0], age=60, silence=[50, math.nan], phase=Phase.STARTING),
        Kind.HEALTHY,
        (),
        "none",
    ),
    "frozen and hung": (
        board([9, 8, 9, 9], [8, 8, 8, 8], stopped=[3], silence=[0.1, 0.1, 0.1, 3]),
        Kind.FROZEN,
        (1, 3),
        "rank",
    ),
    "stuck in host code": (
        board([121, 121, 120, 121], [120] * 4),
        Kind.NONCOMM_HANG,
        (2,),
        "rank",
    ),
    "two stuck": (
        board([121, 120, 120, 121], [120] * 4),
        Kind.NONCOMM_HANG,
        (1, 2),
        "rank",
    ),
    "all pause": (board([7, 7, 7], age=5.9), Kind.HEALTHY, (), "none"),
    "all stuck": (board([7, 7, 7], age=6.1), Kind.NONCOMM_HANG, (0, 1, 2), "all"),
    "link cut": (board([104] * 4, [103] * 4), Kind.COMM_HANG, (), "none"),
    "link cut, staggered exits: rank 1 is behind and not to blame": (
        board([104, 103, 104, 104], [103, 102, 103, 103]),
        Kind.COMM_HANG,
        (),
        "none",
    ),
    "the last has just entered": (
        board([9, 9, 9], [8, 8, 8], age=[2, 2, 0.3]),
        Kind.HEALTHY,
        (),
        "none",
    ),
    "the others wait for a checkpoint": (
        board([9, 8, 9], [8, 8, 8], age=30, phase=[STEP, CHECKPOINT, STEP]),
        Kind.HEALTHY,
        (),
        "none",
    ),
    "a checkpoint without end": (
        board([9, 8, 9], [8, 8, 8], age=601, phase=[STEP, CHECKPOINT, STEP]),
        Kind.NONCOMM_HANG,
        (1,),
        "rank",
    ),
    "a collective of an evaluation": (
        board([9, 9], [8, 8], age=30, phase=Phase.EVALUATION),
        Kind.HEALTHY,
        (),
        "none",
    ),
    "at a barrier of the host": (
        board([8, 8, 8], age=30, phase=[STEP, CHECKPOINT, CHECKPOINT]),
        Kind.HEALTHY,
        (),
        "none",
    ),
    "gone early": (
        board([9, 8, 9], [8, 8, 8], phase=[STEP, DONE, STEP]),
        Kind.NONCOMM_HANG,
        (1,),
        "rank",
    ),
    "done in turn": (
        board([9, 9, 9], [8, 9, 8], age=[0.1, 0.2, 0.1], phase=[STEP, DONE, STEP]),
        Kind.HEALTHY,
        (),
        "none",
    ),
    "one rank, outside": (board([9], age=6.1), Kind.NONCOMM_HANG, (0,), "rank"),
    "one rank, inside": (board([9], [8]), Kind.NONCOMM_HANG, (0,), "rank"),
    "one rank, runs": (board([9], [8], age=1.4), Kind.HEALTHY, (), "none"),
    "two ranks, one outside": (
        board([9, 8], [8, 8]),
        Kind.NONCOMM_HANG,
        (1,),
        "rank",
    ),
    "two ranks, both inside": (board([9, 9], [8, 8]), Kind.COMM_HANG, (), "none"),
}


@pytest.mark.parametrize("name", STALLS)
def test_stalls(name):
    given_board, kind, ranks, scope = STALLS[name]
    found = detect_stall(given_board, NOW, BASELINE)
    assert (found.kind, found.ranks, found.scope) == (kind, ranks, scope), str(found)
    assert found.links == () and 0 <= found.confidence <= 1 and found.evidence
    assert "\n" not in str(found)
    if kind != Kind.HEALTHY:
        assert found.confidence >= 0.5


def test_the_evidence_says_which_rank_has_which_fault():
    found = detect_stall(STALLS["frozen and hung"][0], NOW, BASELINE)
    assert "rank 3 is frozen, no heartbeat for 3 s, stopped by a signal" in str(found)
    assert "rank 1 has stood outside" in str(found)
    staggered = [s for n, s in STALLS.items() if "staggered" in n][0][0]
    assert "rank 1 still in the one before" in str(
        detect_stall(staggered, NOW, BASELINE)
    )
    waits = STALLS["the others wait for a checkpoint"][0]
    assert "waiting for rank 1 in phase CHECKPOINT" in str(
        detect_stall(waits, NOW, BASELINE)
    )


def test_the_limit_follows_the_step():
    assert stall_limit(BASELINE, CFG) == 1.5
    assert stall_limit(Baseline(CFG, step=2.0), CFG) == 24.0
    assert stall_limit(Baseline(CFG), CFG) == CFG.stall_first
    stuck = board([9, 8], [8, 8], age=20)
    kinds = [
        detect_stall(stuck, NOW, Baseline(CFG, step=step)).kind
        for step in (1.0, 2.0, math.nan)
    ]
    assert kinds == [Kind.NONCOMM_HANG, Kind.HEALTHY, Kind.HEALTHY]


def test_confidence_grows_with_the_stall():
    sure = [
        detect_stall(board([9, 8], [8, 8], age=age), NOW, BASELINE).confidence
        for age in (1.51, 3.0, 15.0)
    ]
    np.testing.assert_allclose(sure, [1 - 0.75 / 1.51, 0.75, 0.95])


def test_4096_ranks():
    enter = np.full(4096, 50)
    enter[[7, 4000]] = 49
    found = detect_stall(board(enter, np.full(4096, 49)), NOW, BASELINE)
    assert (found.kind, found.ranks) == (Kind.NONCOMM_HANG, (7, 4000))
    crowd = detect_stall(
        board(enter, np.full(4096, 49), dead=range(100)), NOW, BASELINE
    )
    assert crowd.ranks == tuple(range(100)) and "and 92 more" in str(crowd)


def test_a_board_of_several_shapes_is_refused():
    wrong = board([1, 2])._replace(step=np.zeros(3, int))
    with pytest.raises(ValueError, match="must be"):
        detect_stall(wrong, NOW, BASELINE)


@pytest.mark.parametrize(
    "field", ["stall_min", "chance", "link_ratio", "false_alarms_per_hour", "history"]
)
def test_limits_that_cannot_work_are_refused(field):
    wrong = {"chance": 0.95, "link_ratio": 1.0, "history": 3}.get(field, 0.0)
    with pytest.raises(ValueError, match=field):
        DetectConfig(**{field: wrong})


def test_a_diagnosis_is_one_line():
    found = Diagnosis(Kind.COMM_SLOW, (2,), ((0, 1),), "row", "25 ms", 0.9)
    assert (
        str(found) == "COMM_SLOW row of rank 2, link 0->1 (90%): 25 ms"
        and str(Diagnosis(Kind.HEALTHY, evidence="fine", confidence=1.0))
        == "HEALTHY (100%): fine"
        and str(Diagnosis(Kind.COMM_SLOW, scope="all", evidence="x", confidence=0.5))
        == "COMM_SLOW everywhere (50%): x"
    )


ranks_of_boards = st.lists(
    st.tuples(
        st.booleans(),  # inside
        st.sampled_from([0.1, 2.0, 700.0]),  # age
        st.sampled_from([0.1, 1.5, 20.0, math.nan]),  # silence
        st.sampled_from(list(Phase)),
        st.sampled_from(["", "", "", "dead", "stopped"]),
    ),
    min_size=1,
    max_size=6,
)


@given(rows=ranks_of_boards, data=st.data())
def test_renaming_ranks_renames_the_culprits(rows, data):
    order = data.draw(st.permutations(range(len(rows))))

    def diagnose(rows):
        inside, age, silence, phase, flag = zip(*rows, strict=True)
        flags = {
            name: [i for i, f in enumerate(flag) if f == name]
            for name in ("dead", "stopped")
        }
        enter = [9 if i else 8 for i in inside]
        made = board(
            enter, [8] * len(rows), age=age, silence=silence, phase=phase, **flags
        )
        return detect_stall(made, NOW, BASELINE)

    before, after = diagnose(rows), diagnose([rows[i] for i in order])
    assert (before.kind, before.scope) == (after.kind, after.scope)
    assert sorted(order[i] for i in after.ranks) == list(before.ranks)
    np.testing.assert_allclose(before.confidence, after.confidence)


def reference_align(logs):
    """`align` of complete logs in plain loops: number -> (local, wait, pure, step)."""
    rows = {}
    for rank, log in enumerate(logs):
        before = -math.inf
        for number, start, enter, leave, phase, paused in log:
            begin = max(start, before)
            arrive = max(enter, begin)
            before = leave
            if phase == Phase.STEP and enter >= start and leave >= arrive:
                held = min(paused, leave - arrive)
                cell = arrive - begin + held, leave - arrive - held, leave - arrive
                rows.setdefault(number, {})[rank] = cell
    out = {}
    for number, cells in sorted(rows.items()):
        if len(cells) == len(logs):
            local, wait, inside = np.array([cells[r] for r in range(len(logs))]).T
            out[number] = (local, wait, min(inside), np.median(local + wait))
    return out


def random_logs(rng, n, steps, first=3):
    """Logs on clocks of their own, with pauses, overlaps and tails that are missing."""
    logs = []
    for _ in range(n):
        clock, log = 1e5 * rng.random(), []
        for number in range(first, first + steps - int(rng.integers(3))):
            start = clock + rng.choice([0.0, 0.3, -0.02])
            enter = start + rng.exponential(0.03)
            clock = max(enter, clock) + rng.exponential(0.02)
            phase = Phase.STEP if rng.random() < 0.9 else Phase.OTHER
            paused = rng.choice([0.0, 0.01])
            log.append(RankSample(number, start, enter, clock, phase, paused))
        logs.append(log)
    return logs


@pytest.mark.parametrize("n", [1, 2, 5])
def test_align_is_the_plain_loop(n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        logs = random_logs(rng, n, 20)
        window, expected = align(logs), reference_align(logs)
        assert window.number is not None
        assert window.number.tolist() == list(expected)
        for t, (local, wait, pure, step) in enumerate(expected.values()):
            np.testing.assert_allclose(window.local[t], local, rtol=1e-12)
            np.testing.assert_allclose(window.wait[t], wait, rtol=1e-12)
            np.testing.assert_allclose(window.pure_comm[t], pure, rtol=1e-12)
            np.testing.assert_allclose(window.step[t], step, rtol=1e-12)


def test_align_ignores_the_clocks_and_what_is_garbled():
    log = [RankSample(t, 10.0 * t, 10.0 * t + 3, 10.0 * t + 5) for t in range(8)]
    other = [RankSample(t, a + 77, b + 77, c + 77, *d) for t, a, b, c, *d in log[2:]]
    other[1] = RankSample(3, 5.0, 4.0, 6.0)  # enters before it starts
    other[2] = RankSample(4, 1.0, math.nan, 6.0)
    other.append(RankSample(5, 0.0, 7.0, 9.0))  # recorded again: the last counts
    other[-1] = other[-1]._replace(t_start=200.0, t_enter=207.0, t_exit=209.0)
    window = align({0: log, 2: other})
    assert window.number is not None
    assert window.number.tolist() == [2, 5, 6, 7]
    assert window.local.shape == (4, 3)
    np.testing.assert_array_equal(window.local[:, 0], [3, 3, 3, 3])
    np.testing.assert_array_equal(window.local[:, 2], [3, 7, 3, 3])
    assert np.isnan(window.local[:, 1]).all() and np.isnan(window.wait[:, 1]).all()
    np.testing.assert_array_equal(window.pure_comm, [2, 2, 2, 2])
    np.testing.assert_array_equal(window.step, [5, 7, 5, 5])


def test_work_dispatched_early_waits_for_others():
    """Its local time begins when the collective before has ended."""
    log = [RankSample(0, 0.0, 1.0, 5.0), RankSample(1, 2.0, 6.0, 8.0)]
    window = align([log])
    np.testing.assert_array_equal(window.local[:, 0], [1, 1])
    np.testing.assert_array_equal(window.wait[:, 0], [4, 2])


def test_pauses_inside_the_collective_are_the_ranks_own():
    """The others wait for them as for its work; more than it was inside cannot be."""
    log = [RankSample(0, 0, 1, 5), RankSample(1, 5, 6, 10), RankSample(2, 10, 11, 15)]
    pauses = 3.0, 0.0, 9.0
    held = [s._replace(paused=p) for s, p in zip(log, pauses, strict=True)]
    window = align([log, held, [*held[:1], held[1]._replace(paused=-1.0), held[2]]])
    assert window.number is not None and window.number.tolist() == [0, 2]
    np.testing.assert_array_equal(window.local, [[1, 4, 4], [1, 5, 5]])
    np.testing.assert_array_equal(window.wait, [[4, 1, 1], [4, 0, 0]])
    np.testing.assert_array_equal(window.step, [5, 5])
    np.testing.assert_array_equal(window.pure_comm, [4, 4])


def test_align_of_nothing():
    empty = align([[], []])
    assert empty.local.shape == (0, 2) and empty.step.shape == (0,)
    apart = align([[RankSample(1, 0, 1, 2)], [RankSample(2, 0, 1, 2)]])
    assert len(apart.pure_comm) == 0
    with pytest.raises(ValueError, match="no rank"):
        align([])


def test_align_4096_ranks():
    clocks = np.random.default_rng(0).random(4096) * 1e6
    log = [(t, 0.1 * t, 0.1 * t + 0.06, 0.1 * t + 0.1) for t in range(32)]
    logs = [
        [RankSample(t, c + a, c + b, c + d) for t, a, b, d in log]
        for c in clocks.tolist()
    ]
    window = align(logs)
    assert window.local.shape == (32, 4096)
    np.testing.assert_allclose(window.local, 0.06, atol=1e-8)
    np.testing.assert_allclose(window.step, 0.1, atol=1e-8)


@given(
    st.lists(
        st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=3, max_size=3),
        min_size=1,
        max_size=7,
    )
)
def test_median_is_the_plain_one(rows):
    x = np.array(rows)
    for axis in (0, 1):
        lines = x.T if axis == 0 else x
        expected = [
            np.median(known) if len(known := line[~np.isnan(line)]) else np.nan
            for line in lines
        ]
        np.testing.assert_allclose(median(x, axis), expected)
