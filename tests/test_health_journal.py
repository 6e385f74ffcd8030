"""What the supervisor writes: read back by TensorBoard, JSON and plain arithmetic."""

import contextlib
import io
import json
import math
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxlab.health import journal
from jaxlab.health.detect import Board, Diagnosis, Kind, Phase, Window
from jaxlab.health.journal import Downtime, Goodput, Journal, heat, table
from jaxlab.health.steer import Job, Slot
from jaxlab.metrics import open_writer, read_jsonl

NOW = 500.0
CLOCK = time.strftime("%H:%M:%S", time.localtime(1000.0))


def window(number, step, local=None, wait=None):
    number, step = np.array(number, np.int64), np.array(step, float)
    blank = np.tile(step[:, None] / 2, 2)
    local = blank if local is None else np.array(local, float)
    wait = blank if wait is None else np.array(wait, float)
    return Window(local, wait, np.nanmin(wait, axis=1), step, number)


def board(n, phase=Phase.STEP):
    return Board(
        alive=np.ones(n, bool),
        stopped=np.zeros(n, bool),
        heartbeat=np.full(n, NOW),
        progress=NOW - np.arange(n),
        enter_seq=np.arange(n),
        exit_seq=np.arange(n),
        phase=np.full(n, phase),
        step=np.arange(n) + 10,
    )


def reader(folder):
    everything = {"scalars": 0, "tensors": 0, "images": 0}
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def events(folder):
    return [json.loads(x) for x in (folder / "events.jsonl").read_text().splitlines()]


def points(found, tag):
    return [(event.step, event.value) for event in found.Scalars(tag)]


@pytest.fixture
def said():
    return []


@pytest.fixture
def made(tmp_path, said):
    with open_writer(tmp_path, None) as write:
        with contextlib.closing(
            Journal(tmp_path, write, said.append, wall=lambda: 1000.0)
        ) as found:
            yield found


# ------------------------------------------------------------- files and curves


def test_an_event_is_a_line_a_text_and_said(made, tmp_path, said):
    diagnosis = Diagnosis(Kind.COMM_SLOW, (1, 2), ((1, 2),), "row", "why", 0.75)
    made.event("quiet", 3, pids=[1])
    made.event(
        "diagnosis",
        7,
        str(diagnosis),
        kind=diagnosis.kind,
        ranks=diagnosis.ranks,
        links=diagnosis.links,
    )
    rows = events(tmp_path)
    quiet = {"time": 1000.0, "event": "quiet", "step": 3, "text": "", "pids": [1]}
    assert rows[0] == quiet
    assert rows[1]["kind"] == "comm_slow" and rows[1]["links"] == [[1, 2]]
    line = "COMM_SLOW row of ranks 1, 2, link 1->2 (75%): why"
    assert rows[1]["text"] == line and said == [f"{CLOCK} [diagnosis] {line}"]
    found = reader(tmp_path)
    assert found.Tags()["tensors"] == ["health/diagnosis"]
    (text,) = found.Tensors("health/diagnosis")
    assert text.step == 7 and text.tensor_proto.string_val[0].decode() == line


def test_a_second_journal_adds_to_the_events(made, tmp_path):
    made.event("one")
    with contextlib.closing(Journal(tmp_path, None, print)) as later:
        later.event("two")
    rows = events(tmp_path)
    assert [row["event"] for row in rows] == ["one", "two"]


def test_curves_are_means_over_the_window(made, tmp_path):
    local = [[0.1, 0.3], [0.3, np.nan]]
    wait = [[0.4, 0.2], [0.2, np.nan]]
    down = Downtime(1.0, 2.0, 3.0, 4.0)
    goodput = Goodput(NOW - 100, 25.0, 8, down)
    made.window(window([8, 9], [0.5, 0.7], local, wait), goodput, NOW)
    made.window(Window(*np.zeros((4, 0, 2))), goodput, NOW)
    expected = {
        "health/step_time": 0.6,
        "health/pure_comm": 0.2,
        "health/goodput": 0.25,
        "health/local/rank_0": 0.2,
        "health/local/rank_1": 0.3,
        "health/wait/rank_0": 0.3,
        "health/wait/rank_1": 0.2,
        "health/downtime/lost_work": 1.0,
        "health/downtime/detection": 2.0,
        "health/downtime/isolation": 3.0,
        "health/downtime/reinit": 4.0,
    }
    found = reader(tmp_path)
    assert set(found.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        assert points(found, tag) == [(9, pytest.approx(value, rel=1e-6))]
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert {tag: row[tag] for tag in expected} == pytest.approx(expected)


def test_an_absent_rank_has_no_number_and_no_warning(made, tmp_path):
    absent = [[0.1, np.nan]]
    made.window(window([1], [0.2], absent, absent), Goodput(0.0), NOW)
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert math.isnan(row["health/local/rank_1"]) and row["health/local/rank_0"] == 0.1


def test_a_matrix_is_numbers_and_a_picture(made, tmp_path):
    from PIL import Image

    delay = np.array([[np.nan, 1e-3, 1.0], [1e-3, np.nan, np.inf], [np.nan, 2e-3, 0]])
    made.matrix(5, delay)
    (row,) = events(tmp_path)
    assert row["seconds"][0] == [None, 1e-3, 1.0] and row["step"] == 5
    (image,) = reader(tmp_path).Images("health/delay")
    assert (image.step, image.width, image.height) == (5, 48, 48)
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(pixels, heat(delay))


def test_the_status_is_what_a_terminal_shows(made, tmp_path):
    suspicion = (Diagnosis(Kind.FROZEN, (1,)), NOW, 1)
    slots = Slot("a", 0), Slot("b", 0)
    job = Job(slots, (Slot("c", 1),), 4, ((Slot("d", 0), 9.0),), suspicion=suspicion)
    goodput = Goodput(NOW - 10, 5.0, 11, Downtime(0, 1.5, 0, 0))
    pids = {0: 70, 1: None}
    made.status(job, board(2, Phase.CHECKPOINT), pids, goodput, "FROZEN rank 1", NOW)
    status = json.loads((tmp_path / "status.json").read_text())
    assert [row["pid"] for row in status["ranks"]] == [70, None]
    assert status["ranks"][1] == {
        "rank": 1,
        "slot": "b:0",
        "phase": Phase.CHECKPOINT,
        "step": 11,
        "progress": 1.0,
        "pid": None,
    }
    made.event("diagnosis", 11, "FROZEN rank 1")
    made.window(window([3], [0.2]), goodput, NOW)
    made.status(job, board(2, Phase.CHECKPOINT), pids, goodput, "FROZEN rank 1", NOW)
    status = json.loads((tmp_path / "status.json").read_text())
    text = table(status, 1003.0)
    assert text.splitlines()[0] == (
        "suspicious, generation 4, step 11, goodput 50.0%, 3 s ago"
    )
    for part in ("checkpoint", "spares c:1", "evicted d:0", "detection 1.5 s"):
        assert part in text
    assert text.splitlines()[-1] == f"  {CLOCK} [diagnosis] FROZEN rank 1"
    assert text.splitlines()[2].split()[:4] == ["0", "a:0", "70", "checkpoint"]
    assert "ms" in text.splitlines()[3]
    made.status(Job(slots), board(2), pids, goodput, "", NOW)
    text = table(json.loads((tmp_path / "status.json").read_text()), 1000.0)
    assert text.startswith("running")
    assert "spares none" in text and "evicted none" in text


# --------------------------------------------------------------------- goodput


def test_a_window_without_steps_changes_nothing():
    before = Goodput(1.0, 2.0, 3)
    assert before.advanced(Window(*np.zeros((4, 0, 2)))) == before
    unnumbered = window([1], [1.0])._replace(number=None)
    assert before.advanced(unnumbered) == before


SECONDS = st.floats(1e-3, 100.0)


@st.composite
def histories(draw):
    """Windows of ascending steps; a restart goes back to some earlier step."""
    step, out = 0, []
    for _ in range(draw(st.integers(0, 8))):
        if draw(st.booleans()):
            step = draw(st.integers(0, step))
        numbers = []
        for _ in range(draw(st.integers(0, 6))):
            step += draw(st.integers(1, 3))
            numbers.append(step)
        times = draw(st.lists(SECONDS, min_size=len(numbers), max_size=len(numbers)))
        out.append((numbers, times))
    return out


@given(histories(), st.floats(0, 1e4))
def test_goodput_equals_the_plain_sum(history, idle):
    """Step by step: the first time it is useful, the next times it is lost."""
    goodput, furthest, useful, lost = Goodput(0.0), 0, [], []
    for numbers, times in history:
        goodput = goodput.advanced(window(numbers, times))
        for number, seconds in zip(numbers, times, strict=True):
            (useful if number > furthest else lost).append(seconds)
            furthest = max(furthest, number)
    assert goodput.step == furthest
    assert goodput.useful == pytest.approx(math.fsum(useful))
    assert goodput.downtime.lost_work == pytest.approx(math.fsum(lost))
    assert goodput.downtime[1:] == (0.0, 0.0, 0.0)
    spent = math.fsum(useful + lost) + idle
    if spent:
        share = math.fsum(useful) / spent
        assert goodput.share(spent) == pytest.approx(share)
        assert 0 <= goodput.share(spent) <= 1 + 1e-9


@given(st.lists(st.tuples(SECONDS, SECONDS, SECONDS, SECONDS), max_size=5))
def test_downtime_adds_row_by_row(rows):
    total = Downtime()
    for row in rows:
        total = total.plus(Downtime(*row))
    expected = [math.fsum(column) for column in zip(*rows, strict=True)] or [0.0] * 4
    np.testing.assert_allclose(total, expected)


# -------------------------------------------------------------------- heat map


DELAYS = st.integers(1, 70).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, 2**32 - 1))
)


@given(DELAYS)
def test_a_heat_map_orders_delays_and_marks_what_has_none(draw):
    n, seed = draw
    rng = np.random.default_rng(seed)
    delay = 10 ** rng.uniform(-5, 1, (n, n))
    delay[rng.random((n, n)) < 0.1] = np.nan
    delay[rng.random((n, n)) < 0.1] = np.inf
    delay[rng.random((n, n)) < 0.05] = 0.0
    pixels = heat(delay)
    cell = len(pixels) // n
    assert pixels.dtype == np.uint8 and pixels.shape == (n * cell, n * cell, 3)
    assert 1 <= cell <= 16 and len(pixels) <= 1120
    small = pixels[::cell, ::cell]
    np.testing.assert_array_equal(small.repeat(cell, 0).repeat(cell, 1), pixels)
    assert (small[np.isnan(delay)] == 128).all()
    assert (small[np.isinf(delay)] == (255, 0, 0)).all()
    order = np.argsort(delay[np.isfinite(delay)])
    bright = small[np.isfinite(delay)].astype(int).sum(-1)[order]
    assert (np.diff(bright) >= 0).all()


def test_a_heat_map_of_one_delay_is_dark():
    """Noise between links that are alike is not blown up to a contrast."""
    assert heat(np.full((2, 2), 1e-3)).max() < 70
    nearly = heat(np.array([[1.0, 1.1], [1.05, 1.0]]))[..., 0]
    assert nearly.max() < 30


def test_the_protocol_is_that_of_the_metrics_writer(tmp_path):
    with open_writer(tmp_path, None) as write:
        assert isinstance(write, journal.Writer)
