"""The schedules of real compilers for chips that are not here, and of made-up text."""

import functools

import pytest

from benchmarks import overlap_schedule as bench
from jaxlab.overlap import schedule_report, target_mesh

SCHEDULED = """HloModule m, is_scheduled=true

%fused (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %s1 = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%a), channel_id=1
  %work = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%fused, "estimated_cycles":"70"
  %d1 = f32[8,8]{1,0} collective-permute-done(%s1)
  %s2 = (f32[8,8]{1,0}, f32[8,8]{1,0}) collective-permute-start(%d1), channel_id=2
  %idle = f32[8,8]{1,0} add(%a, %work), "estimated_cycles":"5"
  %d2 = f32[8,8]{1,0} collective-permute-done(%s2)
  ROOT %r = f32[8,8]{1,0} all-reduce(%d2), channel_id=3, to_apply=%fused
}
"""


def test_windows_products_and_what_is_uncovered():
    report = schedule_report(SCHEDULED)
    assert [(w.name, w.dots) for w in report.windows] == [("s1", ("work",)), ("s2", ())]
    assert (report.n_async, report.n_covered, report.n_dots) == (2, 1, 1)
    assert report.uncovered == ("s2",)
    assert report.synchronous == (("r", "all-reduce"),)
    assert (report.dot_cycles, report.cycles) == (70, 75)
    printed = str(report)
    assert "1 of 2 asynchronous" in printed and "uncovered: s2" in printed


def test_what_has_no_order_is_refused():
    with pytest.raises(ValueError, match="not scheduled"):
        schedule_report("HloModule m\nENTRY %main () -> f32[] {\n}\n")


@pytest.mark.parametrize("target", ["tpu", "cuda:a100:8", "cuda:h100", "metal:m1:1"])
def test_targets_that_there_are_not(target):
    with pytest.raises(ValueError, match="choose tpu:<kind>:<topology>"):
        target_mesh(target, {"t": 8})


WHOLE, SMALL = bench.Options(), bench.Options(rows=2048, width=1024, hidden=4096)


@functools.cache
def compiled(target, form, flags="recommended", options=WHOLE):
    """What the compiler made of an MLP on 8 devices; once for all tests of this file,
    which pytest gives to one worker.
    """
    return bench.run_case(target, form, flags, options)


# Forward with two chunks: 7 permutes of the gather, 2 x 7 of the scatter. Backward a
# gather ring of 7 more, and a scatter of 2 x 7 with a gather of 7 beside it; XLA makes
# one of the first step that two of them share.
PERMUTES = {"": 21, "-gradient": 48}


@pytest.mark.slow
@pytest.mark.requires("libtpu")
@pytest.mark.parametrize("form", PERMUTES)
def test_on_tpu_every_permute_has_a_product(form):
    ring = compiled(bench.TPU, f"ring-2{form}")
    assert ring["asynchronous"] == ring["covered"] >= PERMUTES[form]
    assert not ring["synchronous"]
    plain = compiled(bench.TPU, f"plain{form}")
    assert plain["synchronous"] and plain["covered"] <= 1


@pytest.mark.requires("libtpu")
@pytest.mark.parametrize("form", PERMUTES)
def test_on_tpu_a_ring_costs_hardly_more_than_plain(form):
    ring, plain = (compiled(bench.TPU, f"{f}{form}") for f in ("ring-2", "plain"))
    # Additions and copies too, of which the plain form has few.
    assert ring["cycles"] <= 1.05 * plain["cycles"]
    assert ring["temporary_bytes"] <= plain["temporary_bytes"]
    products = ring["product_cycles"] / plain["product_cycles"]
    if form:
        assert products <= 1.05
    else:
        # These products add as well (1.057); those of one chunk do not.
        assert products <= 1.06
        alone = compiled(bench.TPU, "ring")
        assert alone["asynchronous"] == alone["covered"] == 14
        assert alone["product_cycles"] <= 1.05 * plain["product_cycles"]


@pytest.mark.requires("libtpu")
@pytest.mark.parametrize("target", bench.TPUS[1:])
@pytest.mark.parametrize("form", PERMUTES)
def test_so_it_is_on_other_tpus(target, form):
    """The last half step of a scatter too, whose products stay on the device."""
    for ring, permutes in (("ring", 34 if form else 14), ("ring-2", PERMUTES[form])):
        found = compiled(target, f"{ring}{form}", options=SMALL)
        assert found["asynchronous"] == found["covered"] >= permutes
        assert not found["synchronous"]


@pytest.mark.requires("libtpu")
def test_sums_in_float32_are_hidden_as_well():
    ring = compiled(bench.TPU, "ring-2-gradient-float32", options=SMALL)
    assert ring["asynchronous"] == ring["covered"] >= PERMUTES["-gradient"]
    assert not ring["synchronous"]


@pytest.mark.slow
@pytest.mark.requires("jax_cuda13_plugin")
def test_on_gpu_the_barriers_keep_the_ring_and_the_textbook_loses_it():
    ring = compiled(bench.GPU, "ring")
    assert ring["asynchronous"] == ring["covered"] == 14
    ring = compiled(bench.GPU, "ring", "default")
    assert ring["asynchronous"] == 14 and ring["covered"] >= 13
    ring = compiled(bench.GPU, "ring-gradient")
    assert ring["asynchronous"] == ring["covered"] == 34
    textbook = compiled(bench.GPU, "textbook", "default")
    assert textbook["asynchronous"] >= 7 and textbook["covered"] == 0
