"""The schedules of real compilers for chips that are not here, and of made-up text."""

import functools
import os
import subprocess
import sys

import pytest

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


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxlab.overlap import (all_gather_matmul, aot_compile, matmul_reduce_scatter,
                            schedule_report, target_mesh)
target, form, options = sys.argv[1:]
mesh = target_mesh(target, {"t": 8})

def plain(x, w1, w2):
    h = jax.nn.gelu(lax.all_gather(x, "t", axis=0, tiled=True) @ w1)
    return lax.psum_scatter(h @ w2, "t", scatter_dimension=0, tiled=True)

def ring(x, w1, w2):
    h = all_gather_matmul(x, w1, "t", epilogue=jax.nn.gelu)
    return matmul_reduce_scatter(h, w2, "t")

def textbook(x, w1, w2):
    # The ring of many tutorials: no barriers.
    me, rows = lax.axis_index("t"), x.shape[0]
    def turn(x): return lax.ppermute(x, "t", [((i + 1) % 8, i) for i in range(8)])
    h = jnp.zeros((8 * rows, w1.shape[1]), x.dtype)
    h = lax.pcast(h, "t", to="varying")
    for s in range(8):
        h = lax.dynamic_update_slice_in_dim(h, x @ w1, (me + s) % 8 * rows, 0)
        x = turn(x) if s < 7 else x
    return lax.psum_scatter(jax.nn.gelu(h) @ w2, "t", scatter_dimension=0, tiled=True)

specs = (P("t"), P(None, "t"), P("t"))
f = jax.shard_map(globals()[form.split("-")[0]], mesh=mesh, in_specs=specs,
                  out_specs=P("t"))
if form.endswith("-grad"):
    f = jax.grad(lambda *a, g=f: jnp.sum(g(*a).astype(jnp.float32) ** 2), (0, 1, 2))
shapes = ((8192, 4096), (4096, 14336), (14336, 4096))
avals = tuple(
    jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, p))
    for s, p in zip(shapes, specs)
)
given = {} if options == "default" else None
report = schedule_report(aot_compile(f, avals, target, options=given))
print("RESULT", report.n_async, report.n_covered, len(report.synchronous),
      report.n_dots, report.dot_cycles or 0, report.temporary_bytes)
"""


@functools.cache
def compiled(target, form, options="recommended"):
    """n_async, n_covered, synchronous, dots, dot cycles and bytes of an MLP on 8."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, target, form, options],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    return [int(word) for word in line.split()[1:]]


@pytest.mark.requires("libtpu")
@pytest.mark.parametrize(("form", "permutes"), [("ring", 14), ("ring-grad", 28)])
def test_on_tpu_every_permute_has_a_product(form, permutes):
    target = "tpu:v5e:2x4"
    n_async, covered, synchronous, _, cycles, memory = compiled(target, form)
    assert n_async == covered >= permutes and synchronous == 0
    _, plain_covered, plain_synchronous, _, plain, plain_memory = compiled(
        target, form.replace("ring", "plain")
    )
    assert plain_synchronous and plain_covered <= 1
    assert cycles <= 1.05 * plain
    assert memory <= 1.05 * plain_memory


@pytest.mark.requires("jax_cuda13_plugin")
def test_on_gpu_the_barriers_keep_the_ring_and_the_textbook_loses_it():
    target = "cuda:h100:8"
    n_async, covered, *_ = compiled(target, "ring")
    assert n_async == covered == 14
    n_async, covered, *_ = compiled(target, "ring", "default")
    assert n_async == 14 and covered >= 13
    n_async, covered, *_ = compiled(target, "textbook", "default")
    assert n_async >= 7 and covered == 0
