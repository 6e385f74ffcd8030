"""Transparent overlap: the same numbers and gradients as the function as written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab.optim.audit import collectives
from jaxlab.overlap import Policy, overlap

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


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_same_numbers_and_gradients(f, size):
    plain, args = on_mesh(f, size), arguments(size)

    def loss(f):
        return lambda *a: jnp.sum(f(*a) ** 2)

    forward = overlap(plain, policy=RING, on_skip="error")
    assert_close(jax.jit(forward)(*args), jax.jit(plain)(*args))
    want = jax.jit(jax.grad(loss(plain), (0, 1, 2)))(*args)
    assert_close(jax.jit(jax.grad(loss(forward), (0, 1, 2)))(*args), want)
    around = overlap(jax.grad(loss(plain), (0, 1, 2)), policy=RING, on_skip="ignore")
    assert_close(jax.jit(around)(*args), want)


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_no_gather_and_no_scatter_is_left(f):
    plain, args = on_mesh(f, 4), arguments(4)
    compiled = jax.jit(overlap(plain, policy=RING)).lower(*args).compile()
    kinds = {c.kind for c in collectives(compiled.as_text())}
    assert "collective-permute" in kinds and "reduce-scatter" not in kinds
    if f is not summed:
        assert "all-gather" not in kinds
