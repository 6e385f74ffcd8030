"""Predictions against formulas written a second time, their bounds, and measuring."""

import dataclasses
import math
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import overlap_predict as bench
from jaxlab.overlap import hardware as hw

KINDS: tuple[hw.Kind, ...] = ("gather", "scatter", "reduce")
RINGS = [(m, c) for m in ("ring", "bidirectional") for c in hw.CHUNKS]
LARGE: dict[str, Any] = dict(rows=8192, k=8192, n=2 * 28672 // 8, size=8, itemsize=2)

shapes = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 64).map(lambda i: i * 128),
        "k": st.integers(1, 16384),
        "n": st.integers(1, 16384),
        "size": st.sampled_from([2, 4, 8, 16]),
        "itemsize": st.sampled_from([1, 2, 4]),
    }
)
slow_copies = dataclasses.replace(hw.V5E, copy_rate=3e11)
chips = st.sampled_from([*hw.HARDWARE.values(), slow_copies])
kinds = st.sampled_from(KINDS)
forms = st.sampled_from([("plain", 1), *RINGS])


def reference(kind, rows, k, n, size, itemsize, chip, mode, chunks, beside=0):
    """Seconds by a walk through the steps."""

    def product(m):
        sides = [math.ceil(s / chip.tile) * chip.tile for s in (m, k, n)]
        flops = 2.0 * sides[0] * sides[1] * sides[2]
        moved = float(itemsize) * (m * k + k * n + m * n)
        return max(flops / chip.peak, moved / chip.memory_rate)

    travels = {"gather": k}.get(kind, n)
    per_device = rows * travels * itemsize / size
    fast = chip.link_rate * (1 + chip.both_ways)
    collective = chip.launch
    for _ in range(size - 1):
        collective += per_device / fast + chip.latency
    if mode == "plain":
        total = chip.launch + product(rows) + collective
        return total + (collective if kind == "reduce" else 0)
    both = mode == "bidirectional"
    lanes = chunks + chunks * both
    work = 0.0
    for _ in range(lanes):
        work += product(rows / size / lanes)
        work += chip.launch * (3 if beside else 2)
    copy_rate = chip.memory_rate if chip.copy_rate is None else chip.copy_rate
    per_column = rows / size * itemsize / copy_rate
    work += 2 * beside * per_column
    # What each direction of the ring carries in a step: bytes, transfers.
    aside = rows * beside * itemsize / size
    extra = 1 if beside else 0
    if both:
        there = back = (per_device / 2 + aside / 2, chunks + chunks * extra)
    else:
        there, back = (per_device, chunks), (aside, chunks * extra)
    times = [b / chip.link_rate + t * chip.latency for b, t in (there, back)]
    wire = max(times) if chip.both_ways else times[0] + times[1]
    total = size * (n if kind == "gather" else beside) * per_column
    if lanes > 1:
        total += 2 * travels * per_column
    add = 0.0 if kind == "gather" else 3 * n * per_column
    now = total  # the clock
    if kind == "gather":
        for s in range(size):
            arrived = now + wire if s < size - 1 else now
            done = now + work
            now = max(done, arrived) if chip.overlaps else done + arrived - now
    else:
        sent, now = now + work / chunks, now + work
        for _ in range(size - 1):
            done = now + work
            now = max(done, sent + wire) if chip.overlaps else done + wire
            sent, now = now + add / chunks, now + add
    total = now
    return total + (collective if kind == "reduce" else 0)
    both = mode == "bidirectional"
    lanes = chunks + chunks * both
    work = 0.0
    for _ in range(lanes):
        work += product(rows / size / lanes)
        work += chip.launch * (3 if beside else 2)
    copy_rate = chip.memory_rate if chip.copy_rate is None else chip.copy_rate
    per_column = rows / size * itemsize / copy_rate
    work += 2 * beside * per_column
    # What each direction of the ring carries in a step: bytes, transfers.
    aside = rows * beside * itemsize / size
    extra = 1 if beside else 0
    if both:
        there = back = (per_device / 2 + aside / 2, chunks + chunks * extra)
    else:
        there, back = (per_device, chunks), (aside, chunks * extra)
    times = [b / chip.link_rate + t * chip.latency for b, t in (there, back)]
    wire = max(times) if chip.both_ways else times[0] + times[1]
    total = size * (n if kind == "gather" else beside) * per_column
    if lanes > 1:
        total += 2 * travels * per_column
    add = 0.0 if kind == "gather" else 3 * n * per_column
    # A clock for the matrix unit; a step's wire starts when its first chunk is ready.
    now = ready = total
    for s in range(size):
        arrived = now if s == 0 else ready + wire
        ready = now + (work / chunks if s == 0 and add else 0.0)
        if chip.overlaps:
            now = max(now + work, arrived)
        else:
            now = now + work + (wire if s else 0.0)
        if s:
            ready = now + add / chunks
            now += add
        elif kind == "gather":
            now = total
            break
    if kind == "gather":
        now = total + work
        for _ in range(size - 1):
            now += max(work, wire) if chip.overlaps else work + wire
    total = now
    return total + (collective if kind == "reduce" else 0)
    both = mode == "bidirectional"
    lanes = chunks + chunks * both
    work = 0.0
    for _ in range(lanes):
        work += product(rows / size / lanes)
        work += chip.launch * (3 if beside else 2)
    touched = n if kind == "gather" else k + beside
    work += 2 * rows / size * touched * itemsize / chip.memory_rate
    add = 0.0 if kind == "gather" else 3 * rows / size * n * itemsize / chip.memory_rate
    # What each direction of the ring carries in a step: bytes, transfers.
    aside = rows * beside * itemsize / size
    extra = 1 if beside else 0
    if both:
        there = back = (per_device / 2 + aside / 2, chunks + chunks * extra)
    else:
        there, back = (per_device, chunks), (aside, chunks * extra)
    times = [b / chip.link_rate + t * chip.latency for b, t in (there, back)]
    wire = max(times) if chip.both_ways else times[0] + times[1]
    if not chip.overlaps:
        total = work + sum(work + wire + add for _ in range(size - 1))
    elif chunks == 1:
        total = work
        for _ in range(size - 1):
            total += max(work, wire) + add
    else:
        busy = size * work + (size - 1) * add
        slow = work / chunks + (size - 1) * (wire + add / chunks)
        total = busy if busy > slow else slow
    return total + (collective if kind == "reduce" else 0)


@given(kinds, shapes, chips, forms, st.booleans(), st.sampled_from([0, 512]))
def test_predictions_are_the_formulas(kind, shape, chip, form, overlaps, beside):
    chip = dataclasses.replace(chip, overlaps=overlaps)
    beside = 0 if kind == "gather" else beside
    mode, chunks = form
    found = hw.predict(
        kind, hardware=chip, mode=mode, chunks=chunks, beside=beside, **shape
    )
    expected = reference(
        kind, **shape, chip=chip, mode=mode, chunks=chunks, beside=beside
    )
    assert math.isclose(found, expected, rel_tol=1e-12)


@given(kinds, shapes, chips, forms)
def test_nothing_is_faster_than_the_product_or_the_wire(kind, shape, chip, form):
    rows, k, n, size, itemsize = (shape[name] for name in LARGE)
    compute = 2 * rows * k * n / chip.peak
    carried = (size - 1) / size * rows * itemsize * (k if kind == "gather" else n)
    carried *= 2 if kind == "reduce" else 1
    wire = carried / (chip.link_rate * (2 if chip.both_ways else 1))
    found = hw.predict(kind, hardware=chip, mode=form[0], chunks=form[1], **shape)
    assert found >= max(compute, wire)


@given(kinds, shapes, chips, forms, st.floats(1.0, 100.0))
def test_more_bytes_are_slower_and_faster_links_are_not(kind, shape, chip, form, by):
    def seconds(chip, shape):
        return hw.predict(kind, hardware=chip, mode=form[0], chunks=form[1], **shape)

    now = seconds(chip, shape)
    assert seconds(chip, shape | {"itemsize": 2 * shape["itemsize"]}) >= now
    assert seconds(chip, shape | {"rows": 2 * shape["rows"]}) >= now
    assert seconds(chip, shape | {"k": 2 * shape["k"], "n": 2 * shape["n"]}) >= now
    faster = dataclasses.replace(chip, link_rate=chip.link_rate * by)
    assert seconds(faster, shape) <= now


@given(kinds, shapes, chips, forms)
def test_the_backward_pass_is_a_ring_and_a_product(kind, shape, chip, form):
    rows, k, n, size, itemsize = (shape[name] for name in LARGE)
    common: dict[str, Any] = dict(chip=chip, itemsize=itemsize)
    whole: dict[str, Any] = dict(mode="plain", chunks=1, size=1, **common)
    free = reference("gather", 0, 0, 0, **whole)  # two launches, where there is one
    expected = reference("gather", rows=k, k=rows, n=n, **whole) - free / 2
    if kind == "reduce":
        expected += reference("gather", rows=rows, k=n, n=k, **whole) - free / 2
    else:
        turned: dict[str, Any] = dict(
            rows=rows, k=n, n=k, size=size, mode=form[0], chunks=form[1]
        )
        if kind == "gather":
            expected += reference("scatter", beside=k, **turned, **common)
        else:
            expected += reference("gather", **turned, **common)
    found = hw.predict_backward(
        kind, hardware=chip, mode=form[0], chunks=form[1], **shape
    )
    assert math.isclose(found, expected, rel_tol=1e-12)


@given(kinds, shapes, chips, st.booleans())
def test_a_choice_is_the_best_form_or_plain(kind, shape, chip, backward):
    choice = hw.choose(kind, hardware=chip, backward=backward, **shape)

    def seconds(mode, chunks):
        form = dict(hardware=chip, mode=mode, chunks=chunks, **shape)
        total = hw.predict(kind, **form)
        return total + hw.predict_backward(kind, **form) if backward else total

    rings = [
        seconds(m, c)
        for m, c in RINGS
        if shape["rows"] % (shape["size"] * c * (2 if m != "ring" else 1)) == 0
    ]
    assert choice.plain_seconds == seconds("plain", 1)
    assert choice.seconds == seconds(choice.mode, choice.chunks)
    if min(rings) < (1 - hw.MARGIN) * choice.plain_seconds:
        assert choice.seconds == min(rings)
    else:
        assert choice[:2] == ("plain", 1)


def test_a_form_that_wins_forward_can_lose_backward():
    shape: dict[str, Any] = dict(
        rows=8192, k=2048, n=512, size=8, itemsize=2, hardware=hw.V5E
    )
    assert hw.choose("gather", **shape).mode != "plain"
    assert hw.choose("gather", backward=True, **shape).mode == "plain"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chip", hw.HARDWARE.values(), ids=hw.HARDWARE)
def test_tiny_shapes_are_plain(kind, chip):
    tiny: dict[str, Any] = dict(rows=64, k=64, n=64, size=8, itemsize=4)
    assert hw.choose(kind, hardware=chip, **tiny).mode == "plain"


def test_large_shapes_are_not_and_one_device_is():
    for kind in KINDS:
        choice = hw.choose(kind, hardware=hw.V5E, **LARGE)
        assert choice.mode != "plain" and choice.seconds < choice.plain_seconds
    alone = hw.choose("gather", hardware=hw.V5E, **{**LARGE, "size": 1})
    assert alone.mode == "plain" and alone.seconds == alone.plain_seconds


def test_rows_that_do_not_divide():
    odd = {**LARGE, "rows": 8 * 9}
    with pytest.raises(ValueError, match="72 rows do not divide among 8 devices x 2"):
        hw.predict("gather", hardware=hw.V5E, mode="bidirectional", **odd)
    with pytest.raises(ValueError, match="2 chunks of mode 'plain'"):
        hw.predict("gather", hardware=hw.V5E, mode="plain", chunks=2, **odd)
    assert hw.choose("gather", hardware=hw.V5E, **odd).chunks == 1
    prime = hw.choose("reduce", hardware=hw.V5E, **{**LARGE, "rows": 8191})
    assert prime.mode == "plain"


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v5 lite", hw.V5E),
        ("TPU v5e", hw.V5E),
        ("TPU v5", hw.V5P),
        ("TPU v5p", hw.V5P),
        ("TPU v6 lite", hw.V6E),
        ("TPU v6e", hw.V6E),
        ("NVIDIA H100 80GB HBM3", hw.H100),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_names_of_devices(kind, chip):
    assert hw.find(kind) is chip


@pytest.mark.parametrize("count", [1, 8])
def test_measured_on_cpu_everything_is_plain(count):
    found = hw.measure(jax.devices()[:count])
    numbers = (found.peak, found.memory_rate, found.link_rate, found.latency)
    for number in (*numbers, found.launch):
        assert math.isfinite(number) and number > 0
    assert not found.overlaps
    for kind in KINDS:
        assert hw.choose(kind, hardware=found, **LARGE).mode == "plain"


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="no devices"):
        hw.measure([])


def test_predicted_steps_of_whole_models():
    report = bench.predict_all(bench.Options())
    assert report["what"] == "prediction"
    cases = report["cases"]
    assert {(c["model"], c["hardware"]) for c in cases} == {
        (m, c.name) for m in ("gpt_1b", "llama_70b_layer") for c in bench.CHIPS
    }
    for case in cases:
        assert 0 < case["overlapped_seconds"] <= case["plain_seconds"]
        # At least 6 FLOPs for each weight and token, however it is cut.
        assert case["plain_seconds"] > case["floor_seconds"]
        assert case["overlapped_seconds"] > case["floor_seconds"]
