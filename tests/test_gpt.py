"""The model: against its equations in float64, and what must hold whatever it learns.

The reference below is written from the papers' equations, head by head and position
by position where that is clearer; it shares nothing with the model but the weights.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import config
from jaxlab.models import gpt, kernels

SMALL = config.GPT(layers=2, width=16, heads=4, kv_heads=2, mlp=24, vocab=32)
MODELS = {
    "gqa": SMALL,
    "gelu-untied": dataclasses.replace(
        SMALL, activation="gelu", tied=False, kv_heads=None
    ),
    "qk_norm-scan": dataclasses.replace(
        SMALL, qk_norm=True, scan=True, kv_heads=1, head_dim=6
    ),
    "rope_scaling": dataclasses.replace(
        SMALL,
        head_dim=16,
        rope_theta=100.0,
        rope_scaling=config.RopeScaling(4.0, 1.0, 4.0, original_length=16),
    ),
}


def make(model, seed=0):
    """A resolved model, and weights of which none is at a special value."""
    model = config.resolve_model(model, 32)
    shapes = jax.eval_shape(lambda: gpt.init_params(model, jax.random.key(0)))
    draw = np.random.default_rng(seed)

    def weight(path, x):
        mean, deviation = (1, 0.1) if path[-1].key == "scale" else (0, 0.3)
        return jnp.asarray(draw.normal(mean, deviation, x.shape), jnp.float32)

    return model, jax.tree.map_with_path(weight, shapes)


@functools.cache
def forward(model):
    """Compiled once for all tests that use the same model and shape."""
    return jax.jit(gpt.GPT(model).apply)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 32, shape, np.int32)


# ------------------------------------------------------- float64 reference


def reference_logits(model, params, tokens_t):
    """Logits of one sequence, float64[t, v]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    layers = [p[f"layer_{i}"] for i in range(model.layers)] if not model.scan else [
        jax.tree.map(lambda x, i=i: x[i], p["layers"]) for i in range(model.layers)
    ]  # fmt: skip

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + model.norm_eps) * scale

    def frequency(pair):
        w = model.rope_theta ** (-2 * pair / model.head_dim)
        s = model.rope_scaling
        if s is None:
            return w
        wavelength = 2 * np.pi / w
        if wavelength < s.original_length / s.high_freq_factor:
            return w
        if wavelength > s.original_length / s.low_freq_factor:
            return w / s.factor
        smooth = (s.original_length / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        return (1 - smooth) * w / s.factor + smooth * w

    def turn(x, position):
        """The pair (i, i + e/2) as a complex number, times exp(i angle)."""
        half = model.head_dim // 2
        pairs = x[:half] + 1j * x[half:]
        angles = np.array([position * frequency(i) for i in range(half)])
        turned = pairs * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag])

    def attention(x_td, w):
        e, out = model.head_dim, np.zeros((len(x_td), model.heads * model.head_dim))

        def head(name, t, h):
            x = (x_td[t] @ w[name]["kernel"])[h * e : (h + 1) * e]
            if name != "v":
                if model.qk_norm:
                    x = norm(x, w[f"{name}_norm"]["scale"])
                x = turn(x, t)
            return x

        for h in range(model.heads):
            shared = h * model.kv_heads // model.heads
            for t in range(len(x_td)):
                q = head("q", t, h)
                keys = [head("k", s, shared) for s in range(t + 1)]
                weights = np.exp([q @ k / np.sqrt(e) for k in keys])
                values = [head("v", s, shared) for s in range(t + 1)]
                out[t, h * e : (h + 1) * e] = weights / weights.sum() @ values
        return out @ w["out"]["kernel"]

    def mlp(x, w):
        up = x @ w["up"]["kernel"]
        if model.activation == "swiglu":
            gate = x @ w["gate"]["kernel"]
            hidden = gate / (1 + np.exp(-gate)) * up
        else:
            cubic = np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)
            hidden = 0.5 * up * (1 + np.tanh(cubic))
        return hidden @ w["down"]["kernel"]

    x_td = p["embedding"][tokens_t]
    for w in layers:
        x_td = x_td + attention(
            norm(x_td, w["attention_norm"]["scale"]), w["attention"]
        )
        x_td = x_td + mlp(norm(x_td, w["mlp_norm"]["scale"]), w["mlp"])
    x_td = norm(x_td, p["norm"]["scale"])
    return x_td @ (p["embedding"].T if model.tied else p["output"])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_equations(name):
    model, params = make(MODELS[name])
    x = tokens(2, 9)
    got = forward(model)({"params": params}, x)
    assert got.dtype == jnp.float32
    wanted = np.stack([reference_logits(model, params, row) for row in x])
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_bfloat16_computes_in_bfloat16_and_stays_close():
    model, params = make(SMALL)
    x = tokens(2, 9)
    low = dataclasses.replace(model, dtype="bfloat16")
    text = forward(low).lower({"params": params}, x).as_text()
    products = [row for row in text.splitlines() if "dot_general" in row]
    assert len(products) == 2 * 9 + 1  # 7 matrices and 2 of attention; the output
    operands = [row.split(":")[-1].split("->")[0] for row in products]
    assert all(row.count("bf16") == 2 for row in operands)
    got, wanted = (forward(m)({"params": params}, x) for m in (low, model))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, atol=0.05 * float(jnp.abs(wanted).max()))


# -------------------------------------------------------------- properties


def test_no_position_sees_a_later_one():
    model, params = make(SMALL)
    x = tokens(2, 9)
    changed = x.copy()
    changed[:, 5] = (x[:, 5] + 1) % 32
    before, after = (forward(model)({"params": params}, y) for y in (x, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after)[:, 5:].max(-1) > 1e-4).all()


def test_segments_are_as_good_as_sequences_of_their_own():
    model, params = make(SMALL)
    apply = forward(model)
    alone = tokens(2, 9)  # of the first row 4 tokens, of the second 5
    packed = np.tile(np.concatenate([alone[0, :4], alone[1, :5]]), (2, 1))
    segments = np.tile(np.repeat([1, 2], (4, 5)), (2, 1)).astype(np.int32)
    together = apply({"params": params}, packed, segments_bt=segments)
    wanted = apply({"params": params}, alone)
    wanted = np.concatenate([wanted[0, :4], wanted[1, :5]])
    # Not to the bit: rotary positions go on over the seam.
    np.testing.assert_allclose(together[0], wanted, rtol=1e-4, atol=1e-5)
    leaking = apply({"params": params}, packed)
    assert np.abs(leaking[0] - wanted)[4:].max() > 1e-2


def test_positions_matter_only_relative_to_each_other():
    model, params = make(SMALL)
    x, later = tokens(2, 9), np.tile(np.arange(9, dtype=np.int32) + 50, (2, 1))
    here = forward(model)({"params": params}, x)
    there = forward(model)({"params": params}, x, positions_bt=later)
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def loss_and_gradient(model):
    def loss(params, x):
        logits = gpt.GPT(model).apply({"params": params}, x)
        return jnp.mean(jnp.sin(logits))

    return jax.jit(jax.value_and_grad(loss))


def test_scan_and_remat_change_nothing():
    model, params = make(SMALL)
    x = tokens(2, 9)
    value, gradient = loss_and_gradient(model)(params, x)

    def stack(tree):
        rest = {k: v for k, v in tree.items() if not k.startswith("layer_")}
        layers = [tree[f"layer_{i}"] for i in range(model.layers)]
        return rest | {"layers": jax.tree.map(lambda *x: np.stack(x), *layers)}

    def check(changes, params, wanted):
        other = dataclasses.replace(model, **changes)
        got = loss_and_gradient(other)(params, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            got,
            (value, wanted),
        )

    check({"remat": "dots"}, params, gradient)
    check({"remat": "block", "scan": True}, stack(params), stack(gradient))


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_has_a_name_for_each_dimension(name):
    model = config.resolve_model(MODELS[name], 32)
    shapes = jax.eval_shape(lambda: gpt.init_params(model, jax.random.key(0)))
    names = gpt.param_names(model)
    jax.tree.map(lambda x, n: (len(x.shape), len(n)), shapes, names)
    flat = jax.tree.leaves(shapes)
    tuples = jax.tree.leaves(names, is_leaf=lambda n: isinstance(n, tuple))
    assert [len(x.shape) for x in flat] == [len(n) for n in tuples]
    assert gpt.parameter_count(shapes) == sum(x.size for x in flat)


def test_layers_start_different_and_residual_branches_small():
    model = config.GPT(layers=4, width=64, heads=4, vocab=32, scan=True)
    model = config.resolve_model(model, 32)
    layers = jax.jit(gpt.init_params, static_argnums=0)(model, jax.random.key(0))[
        "layers"
    ]
    up, down = layers["mlp"]["up"]["kernel"], layers["mlp"]["down"]["kernel"]
    assert np.abs(up[0] - up[1]).max() > 1e-2
    assert np.std(up) == pytest.approx(64**-0.5, rel=0.05)
    assert np.std(down) == pytest.approx((2 * 4 * model.mlp) ** -0.5, rel=0.05)


# ----------------------------------------------------------------- kernels


def normal(shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def tree_close(got, wanted, tolerance):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def value_and_vjp(function, *args):
    def run(*args):
        out, pull = jax.vjp(function, *args)
        return out, *pull(jnp.cos(out))

    return jax.jit(run)(*args)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_is_the_product(dtype):
    x, w = normal((2, 5, 8), dtype), normal((8, 12), dtype)
    got, wanted = (
        value_and_vjp(lambda x, w, p=p: kernels.matmul(x, w, p), x, w)
        for p in (False, True)
    )
    tree_close(got, wanted, 1e-6 if dtype == "float32" else 0.02)


@pytest.mark.parametrize(
    "mask,heads,kv_heads,dtype",
    [
        ("causal", 4, 4, "float32"),
        ("causal", 6, 1, "bfloat16"),
        ("segments", 4, 2, "float32"),
        ("segments", 4, 2, "bfloat16"),
        ("cache", 6, 1, "float32"),
        ("cache", 4, 2, "bfloat16"),
    ],
)
def test_attention_is_that_of_jax(mask, heads, kv_heads, dtype):
    t, s = (3, 11) if mask == "cache" else (7, 7)
    q = normal((2, t, heads, 8), dtype)
    k, v = (normal((2, s, kv_heads, 8), dtype, seed=i) for i in (1, 2))
    mask_bts = {
        "causal": lambda: None,
        "segments": lambda: kernels.causal_mask(
            jnp.arange(t)[None],
            jnp.arange(s)[None],
            jnp.arange(2 * t).reshape(2, t) // 3,
        ),
        "cache": lambda: kernels.causal_mask(
            jnp.array([[2, 3, 4], [7, 8, 9]]), jnp.arange(s)[None]
        ),
    }[mask]()
    got, wanted = (
        value_and_vjp(lambda *x, p=p: kernels.attention(*x, mask_bts, p), q, k, v)
        for p in (False, True)
    )
    tree_close(got, wanted, 1e-5 if dtype == "float32" else 0.05)


def test_a_query_with_nothing_to_see_is_finite():
    x = normal((1, 2, 1, 4), "float32")
    mask_bts = jnp.array([[[False, False], [True, True]]])
    out = value_and_vjp(lambda q: kernels.attention(q, x, x, mask_bts, False), x)
    assert all(np.isfinite(y).all() for y in out)


@settings(deadline=None, max_examples=25)
@given(
    positions=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    segments=st.none() | st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_causal_mask_entry_by_entry(positions, segments):
    slots = np.arange(4) if segments is not None else np.arange(6)
    got = kernels.causal_mask(
        jnp.array([positions]),
        jnp.array(slots)[None],
        None if segments is None else jnp.array([segments]),
    )
    for t in range(4):
        for s in range(len(slots)):
            same = segments is None or segments[t] == segments[s]
            assert got[0, t, s] == (slots[s] <= positions[t] and same)
