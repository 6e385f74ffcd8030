"""Collective matmuls against the plain form and against float64 NumPy."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab.optim.audit import collectives
from jaxlab.overlap import (
    OverlapSkipped,
    all_gather_matmul,
    matmul_all_reduce,
    matmul_reduce_scatter,
)
from tests.overlap_programs import compiled


def mesh_of(size):
    return jax.make_mesh(
        (size,), ("t",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size]
    )


def plain_gather(x, w, axis_name, *, dim=0, epilogue=None, **options):
    y = jnp.matmul(lax.all_gather(x, axis_name, axis=dim, tiled=True), w, **options)
    return y if epilogue is None else epilogue(y)


def plain_scatter(x, w, axis_name, *, dim=0, epilogue=None, **options):
    y = jnp.matmul(x, w, **options)
    dim %= x.ndim
    y = lax.psum_scatter(y, axis_name, scatter_dimension=dim, tiled=True)
    return y if epilogue is None else epilogue(y)


def plain_reduce(x, w, axis_name, *, dim=0, epilogue=None, **options):
    del dim
    y = lax.psum(jnp.matmul(x, w, **options), axis_name)
    return y if epilogue is None else epilogue(y)


FORMS = {
    "gather": (all_gather_matmul, plain_gather),
    "scatter": (matmul_reduce_scatter, plain_scatter),
    "reduce": (matmul_all_reduce, plain_reduce),
}


def on_mesh(form, op, size, dim, ndim, **options):
    """The op on global arrays x [..., k] and w [k, n], and a loss of it."""
    rows = [None] * ndim
    rows[dim] = "t"
    columns = P(*[None] * (ndim - 1), "t")
    rows = P(*rows)
    ins, outs = ((rows, P(None, "t")), columns)
    if form != "gather":
        ins, outs = ((columns, P("t", None)), rows if form == "scatter" else P())
    f = jax.shard_map(
        lambda x, w: op(x, w, "t", dim=dim, **options),
        mesh=mesh_of(size),
        in_specs=ins,
        out_specs=outs,
    )

    def loss(x, w, target):
        y = f(x, w)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)) * target), y

    return compiled(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def arrays(shape, n, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    w = rng.normal(size=(shape[-1], n)) / np.sqrt(shape[-1])
    target = rng.normal(size=(*shape[:-1], n))
    return [jnp.asarray(a, dtype) for a in (x, w)] + [jnp.asarray(target, jnp.float32)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (3, dict(bidirectional=True)),
        (4, dict(chunks=2)),
        (4, dict(chunks=2, bidirectional=True, epilogue=jax.nn.gelu)),
        (2, dict(chunks=2)),
        (8, {}),
        (8, dict(bidirectional=True, epilogue=jax.nn.gelu)),
    ],
)
def test_equals_the_plain_form_and_float64(form, size, options):
    op, plain = FORMS[form]
    x, w, target = arrays((size * 4, size * 3), size * 5)
    (_, y), grads = on_mesh(form, op, size, 0, 2, **options)(x, w, target)
    same = {"epilogue": options.get("epilogue")}
    (_, want), want_grads = on_mesh(form, plain, size, 0, 2, **same)(x, w, target)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-6)
    for a, b in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if not same["epilogue"]:
        exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=5e-6)
        slope = np.cos(exact) * np.asarray(target, np.float64)
        np.testing.assert_allclose(grads[0], slope @ np.asarray(w).T, atol=2e-5)
        np.testing.assert_allclose(grads[1], np.asarray(x).T @ slope, atol=5e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_any_dimension_but_the_last_may_be_cut(form, dim):
    op, plain = FORMS[form]
    x, w, target = arrays((4, 8, 12), 16)
    (_, y), grads = on_mesh(form, op, 4, dim, 3)(x, w, target)
    (_, want), want_grads = on_mesh(form, plain, 4, dim, 3)(x, w, target)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-6)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), grads, want_grads)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_sums_in_the_type_asked_for(form):
    op, plain = FORMS[form]
    x, w, target = arrays((32, 64), 32, jnp.bfloat16)
    wide = dict(preferred_element_type=jnp.float32)
    (_, y), grads = on_mesh(form, op, 4, 0, 2, **wide)(x, w, target)
    (_, want), _ = on_mesh(form, plain, 4, 0, 2, **wide)(x, w, target)
    assert y.dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    (_, narrow), _ = on_mesh(form, op, 4, 0, 2)(x, w, target)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), want, atol=0.06)


@pytest.mark.parametrize("form", FORMS)
def test_rings_send_by_permutes_alone_forward_and_backward(form):
    size, lanes = 4, 2
    op, _ = FORMS[form]
    x, w, target = arrays((32, 16), 24)
    step = on_mesh(form, op, size, 0, 2, bidirectional=True)
    text = step.lower(x, w, target).compile().as_text()
    found = collectives(text)
    if form == "reduce":  # its other half, which has nothing to hide behind
        assert [c.kind for c in found if c.kind == "all-gather"] == ["all-gather"]
        found = [c for c in found if c.kind != "all-gather"]
    permutes = [c for c in found if c.kind == "collective-permute"]
    # The loss itself is summed over devices; nothing of the matmuls is.
    assert {c.kind for c in found} - {"all-reduce"} == {"collective-permute"}
    assert all(c.bytes <= 4 for c in found if c.kind == "all-reduce")
    each = lanes * (size - 1)
    # Forward once and backward once. Of the second gathering of x, beside the backward
    # ring, XLA takes what it can from the forward where no remat keeps them apart.
    extra = each if form == "gather" else 0
    both = each if form == "reduce" else 2 * each
    assert both <= len(permutes) <= both + extra


def gathering(ws, target, wrapper=lambda f: f, **options):
    """The gradient of products of one gathered x, and how many permutes it takes."""

    def local(x, *ws):
        return all_gather_matmul(x, ws, "t", **options)

    f = jax.shard_map(
        wrapper(local),
        mesh=mesh_of(4),
        in_specs=(P("t"), *(P(None, "t") for _ in ws)),
        out_specs=P(None, "t"),
    )

    def loss(x, *ws):
        return sum(jnp.sum(jnp.sin(y) * target) for y in jax.tree.leaves(f(x, *ws)))

    return jax.grad(loss, argnums=tuple(range(len(ws) + 1)))


def count(f, word, *arrays):
    """How often a word stands in the jaxpr, whatever f is compiled with."""
    f = f.__wrapped__ if hasattr(f, "lower") else f
    return str(jax.make_jaxpr(f)(*arrays)).count(word)


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.checkpoint])
@pytest.mark.parametrize("limit", [0, 2**25])
@pytest.mark.parametrize(
    "options",
    [
        dict(epilogue=None),
        dict(epilogue=lambda a, b: jax.nn.gelu(a) * b),
        dict(epilogue=lambda a, b: (a * b, jnp.tanh(b)), bidirectional=True, chunks=2),
    ],
)
def test_a_gathered_input_that_is_kept_is_not_sent_again(
    monkeypatch, wrapper, limit, options
):
    monkeypatch.setattr("jaxlab.overlap.ring.SUMS", limit)  # sums, or one product
    x, w, target = arrays((16, 8), 12)
    v = arrays((16, 8), 12, seed=1)[1]
    plain = options["epilogue"] or (lambda *products: products)

    def loss(x, *ws):
        found = jax.tree.leaves(plain(*(x @ w for w in ws)))
        return sum(jnp.sum(jnp.sin(y) * target) for y in found)

    want = jax.grad(loss, argnums=(0, 1, 2))(x, w, v)
    counts = []
    for save in (False, True):
        step = gathering((w, v), target, wrapper, save_gathered=save, **options)
        got = compiled(step)(x, w, v)
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), got, want)
        counts.append(count(step, "ppermute[", x, w, v))
    once = 6 if options.get("bidirectional") else 3
    # Remat computes nothing again for products alone, but to have the gathered x.
    again = wrapper is jax.checkpoint and options["epilogue"] is None
    assert counts[0] - counts[1] == (0 if again else once)


@pytest.mark.parametrize("form", ["gather", "scatter"])
@pytest.mark.parametrize("options", [{}, dict(chunks=2, bidirectional=True)])
def test_weights_too_large_for_sums_by_block(monkeypatch, form, options):
    x, w, target = arrays((32, 16), 24)
    step = partial(on_mesh, form, FORMS[form][0], 4, 0, 2, **options)
    want = step()(x, w, target)
    monkeypatch.setattr("jaxlab.overlap.ring.SUMS", 0)
    by_one = step()
    products = count(by_one, "dot_general[", x, w, target)
    monkeypatch.undo()
    assert products < count(step(), "dot_general[", x, w, target)
    got = by_one(x, w, target)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), got, want)


def test_bfloat16_derivatives_of_weights_are_summed_in_float32():
    """As exact as the product of the plain form, which rounds once, at the end."""
    x, w, target = arrays((512, 16), 16, jnp.bfloat16)
    exact = [a.astype(jnp.float32) for a in (x, w)]
    (_, _), (_, want) = on_mesh("scatter", plain_scatter, 8, 0, 2)(*exact, target)
    errors = []
    for op in FORMS["scatter"]:
        f = on_mesh("scatter", op, 8, 0, 2)
        (_, _), (_, dw) = f(x, w, target)
        errors.append(float(jnp.abs(dw.astype(jnp.float32) - want).max()))
    assert errors[0] <= 1.5 * errors[1] + 1e-6


@pytest.mark.parametrize("both_ways", [False, True])
def test_the_gathered_input_and_an_epilogue_with_a_bias_have_derivatives(both_ways):
    x, w, target = arrays((16, 8), 12)
    bias = jnp.linspace(-1, 1, 12)

    def run(op_gathers):
        def local(x, w, b):
            def activate(p):  # traced for the rows of one block alone
                return jnp.where(p > b[None], jnp.tanh(p + b[None]), jnp.sin(b)[None])

            if op_gathers:
                y, gathered = all_gather_matmul(
                    x,
                    w,
                    "t",
                    epilogue=activate,
                    return_gathered=True,
                    bidirectional=both_ways,
                )
            else:
                gathered = lax.all_gather(x, "t", axis=0, tiled=True)
                y = activate(gathered @ w)
            return y, y * jnp.sum(gathered**2, axis=-1, keepdims=True)

        f = jax.shard_map(
            local,
            mesh=mesh_of(4),
            in_specs=(P("t"), P(None, "t"), P("t")),
            out_specs=(P(None, "t"), P(None, "t")),
        )

        def loss(x, w, b):
            y, z = f(x, w, b)
            return jnp.sum((y + z) * target)

        return compiled(jax.grad(loss, argnums=(0, 1, 2)))(x, w, bias)

    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), run(True), run(False)
    )


@pytest.mark.parametrize("wrapper", [jax.checkpoint, lambda f: f])
def test_under_remat_and_scan(wrapper):
    weights = jnp.asarray(
        np.random.default_rng(0).normal(size=(3, 2, 8, 8)) / 3, jnp.float32
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 8)), jnp.float32)

    def run(gather, scatter):
        @wrapper
        def layer(x, pair):
            hidden = jax.nn.relu(gather(x, pair[0], "t"))
            return x + scatter(hidden, pair[1].T, "t"), None

        f = jax.shard_map(
            lambda x, w: lax.scan(layer, x, w)[0],
            mesh=mesh_of(4),
            in_specs=(P("t"), P(None, None, None, "t")),
            out_specs=P("t"),
        )
        return compiled(jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), (0, 1)))(
            x, weights
        )

    ours = run(all_gather_matmul, matmul_reduce_scatter)
    want = run(plain_gather, plain_scatter)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), ours, want)


def test_a_long_ring_is_a_loop_with_the_same_numbers(monkeypatch):
    x, w, target = arrays((16, 8), 16)
    for form, (op, _) in FORMS.items():
        want = on_mesh(form, op, 8, 0, 2)(x, w, target)
        with monkeypatch.context() as patch:
            patch.setattr("jaxlab.overlap.ring.UNROLLED", 4)
            looped = on_mesh(form, op, 8, 0, 2)
            text = looped.lower(x, w, target).compile().as_text()
            got = looped(x, w, target)
        assert " while(" in text
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got, want)


def test_what_does_not_divide_is_plain_and_says_so():
    x, w, target = arrays((12, 8), 16)
    with pytest.warns(OverlapSkipped, match="3 rows of x do not divide into 2 lanes"):
        (_, y), _ = on_mesh("gather", all_gather_matmul, 4, 0, 2, chunks=2)(
            x, w, target
        )
    np.testing.assert_allclose(y, x @ w, atol=1e-5)
    with pytest.warns(OverlapSkipped, match="3 rows of a block do not divide into 2"):
        (_, y), _ = on_mesh(
            "scatter", matmul_reduce_scatter, 4, 0, 2, bidirectional=True
        )(x, w, target)
    np.testing.assert_allclose(y, x @ w, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one device has nothing to overlap
        on_mesh("gather", all_gather_matmul, 1, 0, 2, chunks=5)(x[:10], w, target[:10])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: all_gather_matmul(x, w, "t", dim=1), "dim is 1"),
        (lambda x, w: all_gather_matmul(x, w, "t", dim=5), "dim is 5"),
        (lambda x, w: all_gather_matmul(x, w.T, "t"), "are no"),
        (lambda x, w: all_gather_matmul(x, w, "t", chunks=0), "chunks is 0"),
        (lambda x, w: matmul_reduce_scatter(x[:3], w, "t"), "do not divide among 4"),
        (lambda x, w: matmul_reduce_scatter(x, w, "other"), "no axis 'other'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    f = jax.shard_map(
        call, mesh=mesh_of(4), in_specs=(P(), P()), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(f, jnp.ones((8, 8)), jnp.ones((8, 4)))
