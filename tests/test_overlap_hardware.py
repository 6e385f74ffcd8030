"""Predictions against formulas written a second time, their bounds, and measuring."""

import dataclasses
import math
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import overlap_predict as bench
from jaxlab.overlap import hardware as hw

KINDS: tuple[hw.Kind, ...] = ("gather", "scatter", "reduce")
RINGS = [(m, c) for m in ("ring", "bidirectional") for c in (1, 2, 4)]
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


def product_seconds(m, k, n, itemsize, chip):
    sides = [math.ceil(s / chip.tile) * chip.tile for s in (m, k, n)]
    flops = 2.0 * sides[0] * sides[1] * sides[2]
    moved = float(itemsize) * (m * k + k * n + m * n)
    return max(flops / chip.peak, moved / chip.memory_rate)


def reference(kind, rows, k, n, size, itemsize, chip, mode, chunks, aside=(0, 0.0)):
    """Seconds by a walk through the steps.

    `aside`: columns that travel beside, and seconds of work beside, in each step.
    """
    travels = {"gather": k}.get(kind, n)
    per_device = rows * travels * itemsize / size
    fast = chip.link_rate * (1 + chip.both_ways)
    collective = chip.launch
    for _ in range(size - 1):
        collective += per_device / fast + chip.latency
    if mode == "plain":
        total = chip.launch + product_seconds(rows, k, n, itemsize, chip) + collective
        return total + (collective if kind == "reduce" else 0)
    both = mode == "bidirectional"
    lanes = (1 if kind == "gather" else chunks) * (1 + both)
    columns, work = aside
    for _ in range(lanes):
        work += product_seconds(rows / size / lanes, k, n, itemsize, chip)
        work += chip.launch * 2
    work += chip.launch * (1 + both) * bool(columns)
    # What each direction of the ring carries in a step: bytes, transfers.
    extra = rows * columns * itemsize / size
    there = (per_device, lanes), (extra, int(columns > 0))
    if both:
        there = ((per_device + extra) / 2, lanes / 2 + bool(columns)), (0, 0)
    times = [b / chip.link_rate + t * chip.latency for b, t in there]
    if both:
        times[1] = times[0]
    wire = max(times) if chip.both_ways else times[0] + times[1]
    rate = chip.memory_rate if chip.copy_rate is None else chip.copy_rate
    add = 0.0 if kind == "gather" else 3 * rows / size * n * itemsize / rate
    now = 0.0  # the clock
    if kind == "gather" and both:
        now += 2 * per_device / rate
    if kind != "gather" and chunks % 2 == 0:  # two halves, each a tick behind the other
        add = 0.0
        if chip.overlaps:
            now += work / 2
            for _ in range(2 * size - 2):
                now += max(work / 2, wire / 2)
            now += work / 2
    if chip.overlaps and (kind == "gather" or chunks % 2):
        for s in range(size):
            sends = s < size - 1 if kind == "gather" else s > 0
            now += max(work, wire if sends else 0)
            now += add if s > 0 else 0
    if not chip.overlaps:
        now += work
        for _ in range(size - 1):
            now += wire + work + add
    return now + (collective if kind == "reduce" else 0)


@given(kinds, shapes, chips, forms, st.booleans())
def test_predictions_are_the_formulas(kind, shape, chip, form, overlaps):
    chip = dataclasses.replace(chip, overlaps=overlaps)
    mode, chunks = form
    found = hw.predict(kind, hardware=chip, mode=mode, chunks=chunks, **shape)
    expected = reference(kind, **shape, chip=chip, mode=mode, chunks=chunks)
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


@given(kinds, shapes, chips, forms, st.booleans())
def test_the_backward_pass_is_a_ring_and_its_products(kind, shape, chip, form, saved):
    rows, k, n, size, itemsize = (shape[name] for name in LARGE)
    found = hw.predict_backward(
        kind,
        hardware=chip,
        mode=form[0],
        chunks=form[1],
        save_gathered=saved,
        **shape,
    )
    weights = product_seconds(k, rows, n, itemsize, chip) + chip.launch
    if kind == "reduce":
        expected = weights + chip.launch + product_seconds(rows, n, k, itemsize, chip)
        assert math.isclose(found, expected, rel_tol=1e-12)
        return
    saved = saved and kind == "gather"
    aside = (0, 0.0)
    if form[0] != "plain" and not saved:
        ways = 2 if form[0] == "bidirectional" else 1
        travels = k if kind == "gather" else n
        rate = chip.copy_rate or chip.memory_rate
        work = 2 * rows * travels * itemsize / size / rate
        if k * n * 4 <= 32 * 2**20:
            work, weights = 0.0, 0.0
            for _ in range(ways):
                work += product_seconds(k, rows // size // ways, n, itemsize, chip)
                work += chip.launch
        aside = (k if kind == "gather" else 0, work)
    turned: dict[str, Any] = dict(rows=rows, k=n, n=k, size=size, itemsize=itemsize)
    turned |= dict(chip=chip, mode=form[0], chunks=form[1], aside=aside)
    dual = "scatter" if kind == "gather" else "gather"
    expected = weights + reference(dual, **turned)
    assert math.isclose(found, expected, rel_tol=1e-12)


def test_what_is_gathered_costs_copies_forward_and_no_wire_backward():
    form: dict[str, Any] = dict(mode="ring", chunks=2, hardware=hw.V5E, **LARGE)
    kept = dict(save_gathered=True, **form)
    block = LARGE["rows"] / LARGE["size"] * LARGE["k"] * LARGE["itemsize"]
    forward = hw.predict("gather", **kept) - hw.predict("gather", **form)
    copies = LARGE["size"] * 2 * block / hw.V5E.memory_rate
    assert math.isclose(forward, copies, rel_tol=1e-9)
    assert hw.predict_backward("gather", **kept) < hw.predict_backward("gather", **form)
    for kind in ("scatter", "reduce"):
        assert hw.predict(kind, **kept) == hw.predict(kind, **form)
        assert hw.predict_backward(kind, **kept) == hw.predict_backward(kind, **form)


@given(kinds, shapes, chips, st.booleans(), st.booleans())
@settings(deadline=None)
def test_a_choice_is_the_best_form_or_plain(kind, shape, chip, backward, saved):
    kept = dict(backward=backward, save_gathered=saved)
    choice = hw.choose(kind, hardware=chip, **kept, **shape)

    def seconds(mode, chunks):
        form = dict(hardware=chip, mode=mode, chunks=chunks, **shape)
        form["save_gathered"] = saved and backward
        total = hw.predict(kind, **form)
        return total + hw.predict_backward(kind, **form) if backward else total

    rings = [
        seconds(m, c)
        for m, c in chip.forms
        if shape["rows"] % (shape["size"] * c * (2 if m != "ring" else 1)) == 0
    ]
    assert choice.plain_seconds == seconds("plain", 1)
    assert choice.seconds == seconds(choice.mode, choice.chunks)
    if rings and min(rings) < (1 - hw.MARGIN) * choice.plain_seconds:
        assert choice.seconds == min(rings)
    else:
        assert choice[:2] == ("plain", 1)


def test_a_form_that_wins_forward_can_lose_backward():
    shape: dict[str, Any] = dict(
        rows=8192, k=2048, n=512, size=8, itemsize=2, hardware=hw.V5E
    )
    assert hw.choose("gather", **shape).mode != "plain"
    assert hw.choose("gather", backward=True, **shape).mode == "plain"


@given(kinds, shapes, st.booleans())
def test_what_a_compiler_schedules_badly_is_never_chosen(kind, shape, backward):
    for chip in (hw.V5P, hw.V6E, hw.H100):
        free = dataclasses.replace(chip, forms=hw.FORMS)
        choice = hw.choose(kind, hardware=chip, backward=backward, **shape)
        other = hw.choose(kind, hardware=free, backward=backward, **shape)
        assert choice.mode != "bidirectional"
        assert choice.chunks == 1 or chip is not hw.H100
        if other[:2] in (("plain", 1), *chip.forms):
            assert choice == other


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
