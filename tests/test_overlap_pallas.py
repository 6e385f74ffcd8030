"""The Pallas TPU kernels, interpreted on CPU with races watched, and compiled for TPU.

The interpreter executes copies either as soon as they start or as late as anyone waits
for them; what keeps a ring in order is only tested by both. What it cannot show is a
device that has not entered the kernel: it lets all of them in at once.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks import overlap_pallas as bench
from jaxlab.overlap import pallas_kernels
from jaxlab.overlap.pallas import (
    pallas_all_gather_matmul,
    pallas_matmul_reduce_scatter,
)

MODES = ("eager", "on_wait")
SMALL = (8, 128, 128)


def plain_gather(x, w, axis_name, **options):
    return jnp.matmul(lax.all_gather(x, axis_name, axis=0, tiled=True), w, **options)


def plain_scatter(x, w, axis_name, **options):
    y = jnp.matmul(x, w, **options)
    return lax.psum_scatter(y, axis_name, scatter_dimension=0, tiled=True)


FORMS = {
    "gather": (pallas_all_gather_matmul, plain_gather),
    "scatter": (pallas_matmul_reduce_scatter, plain_scatter),
}


def interpreter(mode="eager"):
    """Watches for races; where JAX would raise at one (0.12 on), it is to warn."""
    newer = "on_race" in inspect.signature(pltpu.InterpretParams).parameters
    warn = {"on_race": "warn"} if newer else {}
    return pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode, **warn)


class Watch:
    """What the interpreter has to say; JAX has no public flag for it, but a text."""

    def __init__(self, capsys, caplog):
        self.capsys, self.caplog = capsys, caplog

    def complaints(self):
        said = self.capsys.readouterr().out + self.caplog.text
        self.caplog.clear()
        known = {"RACE DETECTED": "race", "non-zero count": "semaphore"}
        return {short for text, short in known.items() if text in said}


@pytest.fixture
def watch(capsys, caplog):
    return Watch(capsys, caplog)


def mesh_of(**axes):
    """A mesh of the first devices, as many as the axes have."""
    count = np.prod(list(axes.values()))
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=jax.devices()[:count],
    )


def on_mesh(form, op, mesh, **options):
    """The op on global arrays; rows of x lie over `d` too, if the mesh has it."""
    d = "d" if "d" in mesh.axis_names else None
    if form == "gather":
        specs = (P((d, "t") if d else "t", None), P(None, "t")), P(d, "t")
    else:
        specs = (P(d, "t"), P("t", None)), P((d, "t") if d else "t", None)
    return jax.shard_map(
        lambda x, w: op(x, w, "t", **options),
        mesh=mesh,
        in_specs=specs[0],
        out_specs=specs[1],
    )


def graded(f):
    def loss(x, w, target):
        y = f(x, w)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)) * target), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def arrays(m, k, n, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(m, k))
    w = rng.normal(size=(k, n)) / np.sqrt(k)
    target = rng.normal(size=(m, n))
    return [jnp.asarray(a, dtype) for a in (x, w)] + [jnp.asarray(target, jnp.float32)]


def odd(form, size, dtype=jnp.float32):
    """Sizes of two tiles each way, the last ones not full."""
    k, n = (130, size * 150) if form == "gather" else (size * 130, 150)
    return arrays(size * 12, k, n, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("size", "mode"), [(2, "on_wait"), (4, "eager"), (4, "on_wait")]
)
def test_equals_the_plain_form_and_float64_without_races(form, size, mode, watch):
    op, plain = FORMS[form]
    x, w, target = odd(form, size)
    mesh, own = mesh_of(t=size), dict(tiles=SMALL, interpret=interpreter(mode))
    (_, y), grads = graded(on_mesh(form, op, mesh, **own))(x, w, target)
    (_, want), want_grads = graded(on_mesh(form, plain, mesh))(x, w, target)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=5e-6)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    slope = np.cos(exact) * np.asarray(target, np.float64)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(grads[0], slope @ np.asarray(w).T, atol=5e-5)
    np.testing.assert_allclose(grads[1], np.asarray(x).T @ slope, atol=1e-4)
    assert watch.complaints() == set()


@pytest.mark.parametrize(
    ("form", "result"),
    [("gather", None), ("scatter", None), ("scatter", jnp.float32)],
)
def test_bfloat16_is_summed_in_float32(form, result, watch):
    op, plain = FORMS[form]
    x, w, target = odd(form, 3, jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    mesh, kind = mesh_of(t=3), dict(preferred_element_type=result)
    own = dict(tiles=(16, 128, 128), interpret=interpreter()) | kind
    (_, y), grads = graded(on_mesh(form, op, mesh, **own))(x, w, target)
    (_, want), want_grads = graded(on_mesh(form, plain, mesh, **kind))(x, w, target)
    assert y.dtype == want.dtype == (result or jnp.bfloat16)
    error, theirs = (np.abs(np.asarray(a, np.float64) - exact).max() for a in (y, want))
    # In bfloat16 each device rounds the sum that passes through it.
    assert error <= max((2 if result else 3) * theirs, 1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        scale = float(jnp.abs(b).max())
        difference = a.astype(jnp.float32) - b.astype(jnp.float32)
        assert float(jnp.abs(difference).max()) <= 0.03 * scale
    assert watch.complaints() == set()


@pytest.mark.parametrize("form", FORMS)
def test_one_of_two_axes_default_tiles_and_interpreter(form):
    op, plain = FORMS[form]
    x, w, target = arrays(2 * 2 * 6, 40, 20)
    mesh = mesh_of(d=2, t=2)
    found = graded(on_mesh(form, op, mesh))(x, w, target)
    want = graded(on_mesh(form, plain, mesh))(x, w, target)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, want
    )


@pytest.mark.parametrize("save", [False, True])
def test_the_gathered_x_and_its_derivative(save):
    x, w, target = arrays(2 * 12, 40, 2 * 20)

    def both(op):
        def f(x, w, target):
            y, whole = op(x, w)
            return jnp.sum(jnp.sin(y) * target) + jnp.sum(jnp.cos(lax.psum(whole, "t")))

        shares = lambda *a: lax.psum(f(*a), "t")  # noqa: E731
        mesh, specs = mesh_of(t=2), (P("t", None), P(None, "t"), P(None, "t"))
        g = jax.shard_map(shares, mesh=mesh, in_specs=specs, out_specs=P())
        return jax.jit(jax.grad(g, argnums=(0, 1)))(x, w, target)

    def plain(x, w):
        whole = lax.all_gather(x, "t", axis=0, tiled=True)
        return whole @ w, whole

    def own(x, w):
        options = dict(return_gathered=True, save_gathered=save)
        return pallas_all_gather_matmul(x, w, "t", **options)

    for a, b in zip(both(own), both(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("form", "mode"), [("gather", "eager"), ("scatter", "on_wait")]
)
def test_tiles_share_semaphores_where_there_are_too_few(form, mode, watch, monkeypatch):
    monkeypatch.setattr(pallas_kernels, "SEMAPHORES", 5)
    x, w, _ = odd(form, 4)
    own = dict(tiles=SMALL, interpret=interpreter(mode))
    y = jax.jit(on_mesh(form, FORMS[form][0], mesh_of(t=4), **own))(x, w)
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=5e-6)
    assert watch.complaints() == set()


NOTICED = {  # as soon as they start, and as late as possible
    ("gather", "_wait_arrival"): ({"race", "semaphore"}, {"wrong"}),
    ("gather", "_wait_sent"): ({"semaphore"}, {"semaphore"}),
    ("scatter", "_wait_arrival"): ({"race", "semaphore"}, {"wrong"}),
    ("scatter", "_wait_sent"): ({"race", "semaphore"}, {"race", "semaphore", "wrong"}),
    ("scatter", "_wait_room"): ({"race", "semaphore"}, {"race", "semaphore"}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("form", "dropped"), NOTICED)
def test_a_wait_that_is_left_out_is_noticed(form, dropped, mode, watch, monkeypatch):
    """The gather overwrites nothing, so that nothing but the count can be wrong."""
    monkeypatch.setattr(pallas_kernels, dropped, lambda *_: None)
    size = 4 if dropped == "_wait_room" else 3  # three never want room twice
    x, w, _ = odd(form, size)
    own = dict(tiles=SMALL, interpret=interpreter(mode))
    y = jax.jit(on_mesh(form, FORMS[form][0], mesh_of(t=size), **own))(x, w)
    wrong = not np.allclose(y, x @ w, rtol=1e-4, atol=1e-4)
    noticed = watch.complaints() | ({"wrong"} if wrong else set())
    assert noticed >= NOTICED[form, dropped][MODES.index(mode)]


def test_a_single_device_multiplies_plainly():
    x, w, _ = arrays(6, 10, 4)
    for form, (op, _) in FORMS.items():
        y = jax.jit(on_mesh(form, op, mesh_of(t=1)))(x, w)
        np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (7, {}, "7 rows of x do not divide among 2 devices of 't'"),
        (8, dict(tiles=(12, 128, 128)), r"no multiples of \(8, 128, 128\)"),
        (8, dict(tiles=(8, 100, 128)), r"no multiples of \(8, 128, 128\)"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(rows, options, message):
    x, w, _ = arrays(rows, 4, 4)
    f = on_mesh("scatter", pallas_matmul_reduce_scatter, mesh_of(t=2), **options)
    with pytest.raises(ValueError, match=message) as error:
        f(x, w)
    assert "\n" not in str(error.value)


def test_other_places_than_a_whole_mesh_are_refused():
    x, w, _ = arrays(8, 4, 4)
    with pytest.raises(ValueError, match="inside jax.shard_map"):
        pallas_all_gather_matmul(x, w, "t")
    part = jax.shard_map(
        lambda x, w: pallas_matmul_reduce_scatter(x, w, "t"),
        mesh=mesh_of(d=2, t=2),
        in_specs=(P(None, "t"), P("t", None)),
        out_specs=P("t"),
        axis_names={"t"},
    )
    with pytest.raises(ValueError, match=r"axes \['d'\] of the mesh are not manual"):
        jax.jit(part)(x, w)
    with pytest.raises(ValueError, match=r"no \[m, k\] and \[k, n\]"):
        f = on_mesh("scatter", pallas_matmul_reduce_scatter, mesh_of(t=2))
        f(x, w[:2])


@pytest.mark.parametrize("form", FORMS)
def test_lowers_for_tpu_without_one(form):
    f = on_mesh(form, FORMS[form][0], mesh_of(d=2, t=4), interpret=False)
    arguments = arrays(2 * 4 * 32, 4 * 256, 4 * 256, jnp.bfloat16)

    def loss(x, w, target):
        return jnp.vdot(f(x, w), target)

    g = jax.value_and_grad(loss, argnums=(0, 1))
    lowered = jax.jit(g).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 2


@pytest.mark.slow
@pytest.mark.requires("libtpu")
@pytest.mark.parametrize(("target", "axes"), bench.TARGETS)
def test_compiles_for_tpu_as_one_kernel_each(target, axes):
    case = bench.run_case(target, axes, bench.Options())
    kernels = {form: case[form]["kernels"] for form in bench.FORMS}
    assert kernels == {
        "scatter": 1,
        "gather": 1,
        "scatter-gradient": 2,
        "gather-gradient": 2,
    }
    assert case["scatter"]["collectives"] == case["gather"]["collectives"] == []
    again = set(case["gather-gradient"]["collectives"])
    assert "all-gather" in again and "reduce-scatter" not in again
