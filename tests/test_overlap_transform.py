"""Transparent overlap: the same numbers and gradients as the function as written."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab.overlap import OverlapSkipped, Policy, explain, overlap
from jaxlab.overlap.hardware import V5E
from jaxlab.overlap.policy import measured_apart
from tests.overlap_programs import compiled

RING = Policy(mode="ring")


def gather(x):
    return lax.all_gather(x, "t", axis=0, tiled=True)


def scatter(y):
    return lax.psum_scatter(y, "t", scatter_dimension=0, tiled=True)


def mlp(x, up, down, bias):
    return scatter(jax.nn.gelu(gather(x) @ up) @ down)


def transposed(x, up, down, bias):
    h = jax.nn.gelu(jnp.einsum("kn,mk->nm", up, gather(x)))
    return scatter(jnp.einsum("nm,nd->md", h, down))


def reshaped(x, up, down, bias):
    h = gather(x.reshape(-1, 2, 4)).reshape(-1, 8) @ up
    y = (jnp.tanh(h) @ down).reshape(-1, 2, 8)
    return scatter(y).reshape(-1, 8)


def biased(x, up, down, bias):
    return scatter(jax.nn.gelu(gather(x) @ up) @ down + bias[None])


def several(x, up, down, bias):
    whole = gather(x)
    q, k, v = whole @ up, whole @ (2 * up), whole @ jnp.sin(up)
    return scatter((q * jax.nn.silu(k) + v) @ down) + x


def gated(x, up, down, bias):
    whole = gather(x)
    gate, value = whole @ up + bias[None, :1], jnp.einsum("mk,kn->mn", whole, up[::-1])
    return scatter((jax.nn.silu(gate) * value.astype(jnp.float32)) @ down)


def kept(x, up, down, bias):
    whole = gather(x)
    return scatter((whole @ up) @ down) + whole.sum()


def summed(x, up, down, bias):
    y = lax.psum(jax.nn.gelu(gather(x) @ up) @ down + bias[None], "t")
    return lax.dynamic_slice_in_dim(y, lax.axis_index("t") * x.shape[0], x.shape[0])


def untiled(x, up, down, bias):
    whole = lax.all_gather(x, "t", axis=0)
    y = jax.nn.gelu(whole @ up) @ down
    return lax.psum_scatter(y, "t", scatter_dimension=0)


def in_jit(x, up, down, bias):
    return scatter(jax.jit(lambda h: jnp.tanh(h @ up))(gather(x)) @ down)


def in_remat(x, up, down, bias):
    return jax.checkpoint(mlp)(x, up, down, bias)


def in_scan(x, up, down, bias):
    layer = jax.checkpoint(lambda x: x + mlp(x, up, down, bias))
    return lax.scan(lambda x, _: (layer(x), None), x, None, length=2)[0]


def in_cond(x, up, down, bias):
    branches = [lambda x: mlp(x, up, down, bias), lambda x: mlp(2 * x, up, down, bias)]
    return lax.switch(lax.axis_size("t") % 2, branches, x)


def in_custom_vjp(x, up, down, bias):
    @jax.custom_vjp
    def f(x, up, down):
        return mlp(x, up, down, bias)

    def backward(saved, dy):
        return jax.vjp(lambda *a: mlp(*a, bias), *saved)[1](dy)

    f.defvjp(lambda *a: (f(*a), a), backward)
    return f(x, up, down)


FUNCTIONS = [
    mlp,
    transposed,
    reshaped,
    biased,
    several,
    gated,
    kept,
    summed,
    untiled,
    in_jit,
    in_remat,
    in_scan,
    in_cond,
    in_custom_vjp,
]


def on_mesh(f, size):
    mesh = jax.make_mesh(
        (size,), ("t",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size]
    )
    specs = (P("t"), P(None, "t"), P("t"), P())
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("t"))


def arguments(size):
    rng = np.random.default_rng(0)
    shapes = ((4 * size, 8), (8, 3 * size), (3 * size, 8), (8,))
    return [jnp.asarray(rng.normal(size=s) / 2, jnp.float32) for s in shapes]


def assert_close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.abs(w).max()) + 1e-6
        np.testing.assert_allclose(g / scale, w / scale, atol=5e-6)


def graded(f):
    """Gradients, and what the function gives."""

    def loss(*arrays):
        y = f(*arrays)
        return jnp.sum(y**2), y

    return jax.grad(loss, (0, 1, 2), has_aux=True)


CASES = [(f, 4) for f in FUNCTIONS]
CASES += [(f, size) for f in (reshaped, gated) for size in (2, 3, 8)]


@pytest.mark.parametrize(("f", "size"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_the_same_numbers_and_gradients(f, size):
    plain, args = on_mesh(f, size), arguments(size)
    forward = overlap(plain, policy=RING, on_skip="error")
    want = compiled(graded(plain))(*args)
    assert_close(compiled(graded(forward))(*args), want)
    around = overlap(graded(plain), policy=RING, on_skip="ignore")
    assert_close(compiled(around)(*args), want)


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_no_gather_and_no_scatter_is_left(f):
    plain, args = on_mesh(f, 4), arguments(4)
    text = jax.jit(overlap(plain, policy=RING)).lower(*args).as_text()
    assert "stablehlo.collective_permute" in text and "reduce_scatter" not in text
    assert ("all_gather" in text) == (f is summed)


def wide(x, up, down, bias):
    """In float32 what a product in bfloat16 is, as before a rotation or a loss."""
    y = (gather(x).astype(jnp.bfloat16) @ up.astype(jnp.bfloat16)).astype(jnp.float32)
    return scatter(jnp.sort(y) @ down)


def shared(x, up, down, bias):
    """Others want the products as well: three arrays in place of two."""
    gate, value = (gather(x) @ w for w in (up, jnp.sin(up)))
    return scatter((jnp.tanh(gate) * value + jnp.sort(gate) + jnp.sort(value)) @ down)


@pytest.mark.parametrize(
    ("f", "name", "blocks"),
    [
        (mlp, "tanh", True),
        (gated, "logistic", True),
        (transposed, "tanh", True),
        (shared, "tanh", False),
        (wide, "convert_element_type", False),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_is_elementwise_is_done_by_the_block_where_that_writes_less(
    f, name, blocks
):
    args = arguments(4)
    ring = on_mesh(overlap(f, policy=RING, on_skip="error"), 4)
    text = str(jax.make_jaxpr(ring)(*args))
    # 4 rows of the 16, of 3 columns.
    found = re.findall(rf"f32\[([\d,]+)\]\S* = {name}\b", text)
    rows = {max(map(int, shape.split(","))) for shape in found}
    assert rows == ({4} if blocks else {16}), found
    if f is not wide:  # XLA rounds to bfloat16 in between where it likes
        assert_close(compiled(ring)(*args), compiled(on_mesh(f, 4))(*args))


def test_auto_stays_plain_on_a_cpu_and_says_why():
    plain, args = on_mesh(mlp, 4), arguments(4)
    lines = []
    found = explain(plain, *args, log=lines.append)
    assert [s.form for s in found.sites] == ["plain", "plain"]
    assert "0 of 2 collectives are overlapped" in lines[0]
    assert "XLA on CPU multiplies and communicates one after the other" in lines[0]
    assert_close(compiled(overlap(plain))(*args), compiled(plain)(*args))


def test_unknown_hardware_is_measured_also_while_tracing():
    found = []

    def body(x):
        found.append(measured_apart())
        return x

    jax.jit(on_mesh(lambda x, *_: body(x), 4))(*arguments(4))
    assert "measured" in found[0].name and found[0].peak > 0
    assert found[0].link_rate > 0 and not found[0].overlaps


def test_auto_says_what_it_predicts_where_nothing_gains():
    plain, args = on_mesh(mlp, 4), arguments(4)
    lines = []
    policy = Policy(hardware=V5E)
    found = explain(plain, *args, policy=policy, log=lines.append)
    assert all(s.seconds == s.plain_seconds for s in found.sites)
    assert "predicted" in lines[0] and not found.rewritten


def test_auto_overlaps_where_the_hardware_is_predicted_to_gain():
    specs = (P("t"), P(None, "t"), P("t"), P())
    mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))
    plain = jax.shard_map(mlp, mesh=mesh, in_specs=specs, out_specs=P("t"))
    shapes = ((8192, 8192), (8192, 28672), (28672, 8192), (8192,))
    avals = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    found = explain(plain, *avals, policy=Policy(hardware=V5E), log=lambda text: None)
    assert len(found.rewritten) == 2
    assert all(s.seconds < s.plain_seconds for s in found.rewritten)


def product_between(x, up, down, bias):
    h = gather(x) @ up
    return scatter(2 * (h @ down))


def used_twice(x, up, down, bias):
    y = jnp.tanh(gather(x) @ up) @ down
    return scatter(y) + y.sum()


def summed_over(x, up, down, bias):
    whole = gather(x)
    return x @ (whole.T @ whole)


def squared(x, up, down, bias):
    whole = gather(x)
    return x + jnp.einsum("mk,nk->mn", whole, whole).sum()


def batched(x, up, down, bias):
    whole = gather(x.reshape(-1, 2, 4))
    return x + jnp.einsum("mbk,nbk->mnb", whole, x.reshape(-1, 2, 4)).sum()


def added_to(x, up, down, bias):
    return scatter(jnp.tanh(gather(x) @ up) @ down + gather(x))


SKIPPED = {
    product_between: "mul stands between the product and the sum",
    used_twice: "the product before the sum is used elsewhere too",
    summed_over: "the product sums over what is gathered, so it needs all of it",
    squared: "both operands of the product are what it gathers",
    batched: "the product is batched",
    added_to: "something other than a bias is added before it",
}


@pytest.mark.parametrize("f", SKIPPED, ids=lambda f: f.__name__)
def test_what_is_skipped_is_named_with_the_reason(f):
    plain, args = on_mesh(f, 4), arguments(4)
    found = explain(plain, *args, policy=RING, log=lambda text: None)
    assert any(SKIPPED[f] in s.reason for s in found.skipped)
    assert all("test_overlap_transform.py" in s.where for s in found.skipped)
    with pytest.raises(ValueError, match=SKIPPED[f]):
        overlap(plain, policy=RING, on_skip="error")(*args)
    with pytest.warns(OverlapSkipped, match=SKIPPED[f]):
        got = compiled(overlap(plain, policy=RING))(*args)
    assert_close(got, compiled(plain)(*args))


def test_lanes_that_do_not_divide_are_named():
    plain, args = on_mesh(mlp, 4), arguments(4)
    policy = Policy(mode="ring", chunks=3)
    found = explain(plain, *args, policy=policy, log=lambda text: None)
    reasons = [s.reason for s in found.skipped]
    assert reasons == ["4 rows do not divide into 3 lanes"] * 2


def test_both_ways_and_several_lanes_are_the_same_numbers():
    plain, args = on_mesh(several, 4), arguments(4)
    policy = Policy(mode="bidirectional", chunks=2)
    got = compiled(overlap(plain, policy=policy, on_skip="error"))(*args)
    assert_close(got, compiled(plain)(*args))


def test_without_explicit_collectives_it_says_what_it_cannot_see():
    lines = []
    found = explain(lambda a, b: a @ b, *arguments(1)[:2], log=lines.append)
    assert not found.sites and "cannot be seen" in lines[0]


@pytest.mark.parametrize("f", [mlp, summed, several], ids=lambda f: f.__name__)
def test_inside_shard_map_without_its_checks(f):
    """The gradient is taken inside, where a psum's cotangent is one share of it."""
    mesh = jax.make_mesh(
        (4,), ("t",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
    )
    specs = (P("t"), P(None, "t"), P("t"), P())
    args = arguments(4)

    def gradient(f):
        inside = jax.grad(lambda *a: jnp.sum(f(*a) ** 2), (0, 1, 2))
        return jax.shard_map(
            inside, mesh=mesh, in_specs=specs, out_specs=specs[:3], check_vma=False
        )

    want = compiled(gradient(f))(*args)
    assert_close(compiled(gradient(overlap(f, policy=RING)))(*args), want)


def test_a_gather_that_stays_leaves_its_product_to_the_sum_behind_it():
    def f(x, up, down, bias):
        return scatter(gather(x[:, :2]) @ up[:2])

    plain, args = on_mesh(f, 4), arguments(4)
    both = explain(plain, *args, policy=RING, log=lambda text: None)
    assert [s.form for s in both.sites] == ["ring", "skipped"]
    assert "its product hides an all-gather already" in both.sites[1].reason
    large = Policy(mode="ring", min_bytes=4 * 16 * 2 + 1)
    kept = explain(plain, *args, policy=large, log=lambda text: None)
    assert [s.form for s in kept.sites] == ["plain", "ring"]
    got = compiled(overlap(plain, policy=large))(*args)
    assert_close(got, compiled(plain)(*args))


def test_small_collectives_and_other_axes_stay():
    plain, args = on_mesh(mlp, 4), arguments(4)
    small = Policy(mode="ring", min_bytes=10**6)
    found = explain(plain, *args, policy=small, log=lambda text: None)
    assert [s.reason for s in found.sites] == ["under min_bytes"] * 2
    other = Policy(mode="ring", axes=("other",))
    assert not explain(plain, *args, policy=other, log=lambda text: None).sites


def in_custom_jvp(x, up, down, bias):
    f = jax.custom_jvp(lambda *a: mlp(*a, bias))
    f.defjvp(lambda primals, tangents: (f(*primals), tangents[0]))
    return f(x, up, down)


def test_what_it_does_not_look_into_is_named():
    plain, args = on_mesh(in_custom_jvp, 4), arguments(4)
    found = explain(plain, *args, policy=RING, log=lambda text: None)
    assert [s.reason for s in found.sites] == [
        "it is inside custom_jvp_call, which is left alone"
    ]
    got = compiled(overlap(plain, policy=RING, on_skip="ignore"))(*args)
    assert_close(got, compiled(plain)(*args))


# ------------------------------------------------------------------ Pallas kernels

KERNELS = Policy(mode="pallas")


@pytest.mark.parametrize(
    "f", [mlp, transposed, reshaped, several, kept, summed], ids=lambda f: f.__name__
)
def test_kernels_have_the_same_numbers_and_gradients(f):
    plain, args = on_mesh(f, 4), arguments(4)
    kernels = overlap(plain, policy=KERNELS, on_skip="error")
    found = explain(plain, *args, policy=KERNELS, log=lambda text: None)
    assert {s.form for s in found.sites} == {"pallas"}

    def both(f):
        return compiled(graded(f))(*args)

    assert_close(both(kernels), both(plain))


def test_kernels_want_all_axes_by_hand():
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    specs = (P("t"), P(None, "t"), P("t"), P())
    plain = jax.shard_map(
        mlp, mesh=mesh, in_specs=specs, out_specs=P("t"), axis_names={"t"}
    )
    found = explain(plain, *arguments(4), policy=KERNELS, log=lambda text: None)
    assert all("axes ['d'] of the mesh are not manual" in s.reason for s in found.sites)
    assert len(found.skipped) == 2
