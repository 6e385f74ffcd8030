"""Two profiles compared: whose work, or whether the communication, has grown."""

import json
import signal
import subprocess
import sys
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jaxlab.health.detect import Kind
from jaxlab.health.look import Looks, Times, compare, read
from jaxlab.health.record import Recorder

T = 5
REFUSED = (KeyError, TypeError, ValueError)


def profile(local_n, comm, noise=0.0, seed=0):
    """T steps of ranks that work `local_n` and then communicate: the last waits least.

    Args:
        local_n: seconds of each rank's own work.
        comm: seconds of the collective itself.
        noise: part by which work varies from step to step.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    spread = 1 + noise * rng.uniform(-1, 1, (T, len(local_n)))
    local = np.asarray(local_n, float) * spread
    step = np.repeat((local.max(1) + comm)[:, None], len(local_n), axis=1)
    wait = step - local
    paused = np.full((1, len(local_n)), 0.01)
    return Times(step, wait - comm, local, np.full(T, float(comm)), paused)


RANKS = st.integers(2, 12)
WORK = st.floats(0.01, 1.0)
HEALTHY = st.builds(
    lambda n, work, uneven, comm, seed: profile(
        work * (1 + uneven * np.random.default_rng(seed).random(n)), comm, 0.02, seed
    ),
    RANKS,
    WORK,
    st.sampled_from([0.0, 0.1]),
    st.floats(0.001, 0.5),
    st.integers(0, 1000),
)


def grown(times, more_n, more_comm=0.0, noise=0.02, seed=1):
    """The same program where work and communication take longer by so much."""
    local = np.median(times.local, axis=0) + more_n
    return profile(local, np.median(times.pure_comm) + more_comm, noise, seed)


@given(HEALTHY, st.integers(0, 11), st.floats(1.0, 20.0))
def test_a_rank_whose_work_has_grown_is_named(before, rank, times):
    """Its own work is more by `times` the step that was."""
    n = before.local.shape[1]
    more = np.zeros(n)
    more[rank % n] = times * np.median(before.step)
    found = compare(before, grown(before, more))
    assert (found.kind, found.scope) == (Kind.NONCOMM_SLOW, "rank")
    assert found.ranks == (rank % n,) and found.links == ()
    assert 0.5 <= found.confidence <= 1


@given(HEALTHY, st.floats(1.0, 20.0))
def test_communication_that_has_grown_blames_no_rank(before, times):
    more = times * float(np.median(before.step))
    found = compare(before, grown(before, 0.0, more))
    assert (found.kind, found.ranks, found.scope) == (Kind.COMM_SLOW, (), "none")
    assert 0.5 <= found.confidence <= 1


def test_who_waits_for_a_late_message_seems_to_work_longer_and_is_not_blamed():
    """As two of four ranks did whose neighbours' link carried a tenth."""
    before = profile(np.full(4, 0.04), 0.02)
    now = grown(before, np.array([0, 0.018, 0, 0.018]), 0.03)
    assert compare(before, now)[:2] == (Kind.COMM_SLOW, ())


@given(HEALTHY, st.integers(0, 11), st.floats(1.0, 20.0), st.floats(0.6, 1.0))
def test_a_rank_that_is_held_back_is_to_blame_for_late_collectives(
    before, rank, times, share
):
    n = before.local.shape[1]
    more = float(times * np.median(before.step))
    now = grown(before, np.zeros(n), more)
    assert compare(before, now).kind == Kind.COMM_SLOW
    now.paused[0, rank % n] += share * more
    found = compare(before, now)
    assert (found.kind, found.ranks) == (Kind.NONCOMM_SLOW, (rank % n,))
    assert "pauses" in found.evidence
    late = grown(before, np.roll(np.eye(n)[rank % n] * more, 1))
    late.paused[:] = now.paused  # the next rank begins late because of it
    assert compare(before, late).ranks == (rank % n,)
    now.paused[:] += 10 * more  # all alike: a loaded host, and no rank's fault
    assert compare(before, now).ranks == (rank % n,)
    now.paused[:] = more
    assert compare(before, now).kind == Kind.COMM_SLOW


def test_a_process_that_is_stopped_has_paused_for_so_long():
    """By signals to another process, which measures itself."""
    program = (
        "import time; from jaxlab.health.look import pauses\n"
        "with pauses() as late:\n"
        "    print(flush=True); input()\n"
        "print(sum(late))"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        process.stdout.readline()
        stopped = 0.0
        for _ in range(5):
            begin = time.monotonic()
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            process.send_signal(signal.SIGCONT)
            stopped += time.monotonic() - begin
            time.sleep(0.1)
        measured = float(process.communicate("\n")[0])
    assert measured > 0.8 * stopped  # more, where others have the processors too


@given(HEALTHY, st.floats(1.0, 20.0))
def test_work_that_has_grown_everywhere_blames_nobody(before, times):
    more = times * float(np.median(before.step))
    found = compare(before, grown(before, more))
    assert (found.kind, found.ranks, found.scope) == (Kind.NONCOMM_SLOW, (), "all")


@given(HEALTHY, st.floats(1.0, 1.0) | st.floats(0.3, 0.9))
def test_steps_that_are_no_longer_are_healthy(before, factor):
    shorter = Times(*(factor * x for x in before))
    assert compare(before, shorter).kind == Kind.HEALTHY


def test_a_rank_is_not_to_blame_for_steps_that_are_hardly_longer():
    """Its work has grown by more than that, and nobody waits for it."""
    before = profile([0.1, 0.05, 0.05, 0.05], 0.02)
    now = profile([0.105, 0.09, 0.05, 0.05], 0.02)
    found = compare(before, now)
    assert found.kind == Kind.HEALTHY and "+5 ms" in found.evidence
    later = compare(before, profile([0.1, 0.15, 0.05, 0.05], 0.02))
    assert (later.kind, later.ranks) == (Kind.NONCOMM_SLOW, (1,))


def test_two_slow_ranks_of_five_are_both_named_and_of_two_the_slower():
    before = profile(np.full(5, 0.1), 0.02)
    found = compare(before, grown(before, np.array([0, 0.5, 0, 0, 0.4])))
    assert found.ranks == (1, 4)
    before = profile(np.full(2, 0.1), 0.02)
    assert compare(before, grown(before, np.array([0.5, 0.1]))).ranks == (0,)


def test_a_rank_of_a_job_of_one():
    before = profile([0.1], 0.0)
    found = compare(before, profile([0.3], 0.0))
    assert (found.kind, found.ranks) == (Kind.NONCOMM_SLOW, (0,))


@given(
    HEALTHY,
    st.lists(st.floats(0, 1.0), min_size=12, max_size=12),
    st.floats(0, 1.0),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_ranks_does_not_matter(before, more, comm, random):
    """Whatever the fault: the same kind, and the same ranks under their new names."""
    n = before.local.shape[1]
    order = random.sample(range(n), n)
    now = grown(before, np.array(more[:n]), comm)

    def moved(times):
        tables = (x[:, order] if x.ndim == 2 else x for x in times)
        return Times(*tables)

    found, other = compare(before, now), compare(moved(before), moved(now))
    assert found.kind == other.kind and found.scope == other.scope
    assert sorted(order[rank] for rank in other.ranks) == list(found.ranks)
    assert found.confidence == pytest.approx(other.confidence)


@given(HEALTHY, st.integers(0, 11), st.floats(0.5, 20.0), st.floats(1e-3, 1e3))
def test_the_unit_does_not_matter(before, rank, times, unit):
    more = np.zeros(before.local.shape[1])
    more[rank % len(more)] = times * np.median(before.step)
    now = grown(before, more)
    found = compare(before, now)
    scaled = compare(
        Times(*(unit * x for x in before)), Times(*(unit * x for x in now))
    )
    assert found[:4] == scaled[:4]
    assert found.confidence == pytest.approx(scaled.confidence)


# ----------------------------------------------------------------- the answer


@given(HEALTHY)
def test_an_answer_is_read_as_it_was_written(times):
    body = {name: getattr(times, name).tolist() for name in Times._fields}
    found = read(json.loads(json.dumps(body)))
    for name in Times._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(times, name))


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5)
GARBAGE = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    GARBAGE
    | st.dictionaries(st.sampled_from(Times._fields), GARBAGE)
    | st.tuples(st.sampled_from(Times._fields), GARBAGE).map(
        lambda pair: (
            {name: x.tolist() for name, x in profile([1, 2], 1)._asdict().items()}
            | {pair[0]: pair[1]}
        )
    )
)
def test_an_answer_that_is_none_is_refused(body):
    try:
        found = read(body)
    except REFUSED:
        return
    assert found.step.ndim == 2 and found.step.size
    assert found.step.shape == found.wait.shape == found.local.shape


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"kind": "x", "step": 1, "id": 1}',
        '{"kind": "profile"}',
        '{"kind": "profile", "step": null, "id": 1}',
        '{"kind": "profile", "step": Infinity, "id": 1}',
    ],
)
def test_a_request_that_is_none_does_not_disturb_the_step(tmp_path, text):
    with Recorder(tmp_path / "board", 0) as recorder:
        looks = Looks(tmp_path / "request", tmp_path / "looked", recorder)
        step_fn = looks.wrap(lambda x: x + 1)
        (tmp_path / "request").write_text(text)
        for step in range(3):
            recorder.step(step)
            assert step_fn(step) == step + 1
    assert not (tmp_path / "looked").exists()
