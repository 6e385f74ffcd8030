"""The two matrix kernels of the model: `matmul` and `attention`.

Accelerators get JAX's own (cuDNN flash attention on GPU in half precision). XLA's
CPU backend does not: the transposes of its own derivative rules end up in strided
element-wise loops that cost more than the products. So there both have
derivatives written out as products whose operands lie as they are. `plain=True`
turns that off (it is the reference in the tests).

Dims: b rows, t query time, s key time, h query heads, k key heads, e head width.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite: a row with nothing to attend to must not become NaN


def on_cpu() -> bool:
    """Whether programs traced now are for XLA's CPU backend."""
    return jax.default_backend() == "cpu"


# ------------------------------------------------------------------- matmul


def matmul(
    x: Float[Array, "*rows d"], w: Float[Array, "d f"], plain: bool | None = None
) -> Float[Array, "*rows f"]:
    """`x @ w` with a derivative that suits the backend; output in x's dtype."""
    if plain if plain is not None else not on_cpu():
        return x @ w
    return _matmul(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def _matmul(x, w):
    return x @ w


def _matmul_forward(x, w):
    return x @ w, (x, w)


def _matmul_backward(saved, dy):
    x, w = saved
    # Without the barrier XLA computes dy again inside the layout it wants for dw.
    dy = lax.optimization_barrier(dy)
    dx = lax.dot_general(dy, w, (((1,), (1,)), ((), ())))
    dw = lax.dot_general(x, dy, (((0,), (0,)), ((), ())))
    return dx, dw


_matmul.defvjp(_matmul_forward, _matmul_backward)


# ---------------------------------------------------------------- attention


def causal_mask(
    positions_bt: Int[Array, "#b t"],
    slots_bs: Int[Array, "#b s"],
    segments_bt: Int[Array, "#b t"] | None = None,
) -> Bool[Array, "_ t s"]:
    """Which keys a query sees: none after its position, none of other segments."""
    mask_bts = slots_bs[:, None, :] <= positions_bt[:, :, None]
    if segments_bt is not None:
        mask_bts &= segments_bt[:, :, None] == segments_bt[:, None, :]
    return mask_bts


def attention(
    q_bthe: Float[Array, "b t h e"],
    k_bske: Float[Array, "b s k e"],
    v_bske: Float[Array, "b s k e"],
    mask_bts: Bool[Array, "#b t s"] | None = None,
    plain: bool | None = None,
) -> Float[Array, "b t h e"]:
    """Scaled dot-product attention, causal where no mask is given.

    Query head i reads key head i // (h / k). The softmax is taken in float32.
    """
    if plain if plain is not None else not on_cpu():
        cudnn = (
            jax.default_backend() == "gpu"
            and q_bthe.dtype in (jnp.bfloat16, jnp.float16)
            and mask_bts is None
        )
        return jax.nn.dot_product_attention(
            q_bthe, k_bske, v_bske,
            mask=None if mask_bts is None else mask_bts[:, None],
            is_causal=mask_bts is None,
            implementation="cudnn" if cudnn else "xla",
        )
    b, t, h, e = q_bthe.shape
    _, s, k, _ = k_bske.shape
    group = h // k
    if mask_bts is None:
        mask_bts = jnp.tril(jnp.ones((1, t, s), bool))
    # Heads become rows of a batch, and the queries that share a key head its rows.
    q = q_bthe.reshape(b, t, k, group, e).transpose(0, 2, 3, 1, 4)
    out = _attention(
        q.reshape(b * k, group * t, e) * e**-0.5,
        k_bske.transpose(0, 2, 1, 3).reshape(b * k, s, e),
        v_bske.transpose(0, 2, 1, 3).reshape(b * k, s, e),
        mask_bts, (k, group),
    )
    out = out.reshape(b, k, group, t, e).transpose(0, 3, 1, 2, 4)
    return out.reshape(b, t, h, e)


def _weights(q, k, mask_bts, heads):
    logits = lax.dot_general(
        q, k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    shape = (-1, heads[0], heads[1], *mask_bts.shape[1:])
    logits = jnp.where(mask_bts[:, None, None], logits.reshape(shape), MASKED)
    return jax.nn.softmax(logits, axis=-1).reshape(*q.shape[:2], k.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, mask_bts, heads):
    return _attention_forward(q, k, v, mask_bts, heads)[0]


def _attention_forward(q, k, v, mask_bts, heads):
    weights = _weights(q, k, mask_bts, heads).astype(v.dtype)
    out = lax.dot_general(weights, v, (((2,), (1,)), ((0,), (0,))))
    return out, (q, k, v, weights, out)


def _attention_backward(heads, saved, dout):
    q, k, v, weights, out = saved
    dout = lax.optimization_barrier(dout)
    dv = lax.dot_general(weights, dout, (((1,), (1,)), ((0,), (0,))))
    dweights = lax.dot_general(
        dout, v, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    # sum_s dweights * weights, by way of the output
    dot = jnp.sum(dout.astype(jnp.float32) * out, axis=-1, keepdims=True)
    dlogits = (weights * (dweights - dot)).astype(q.dtype)
    dlogits = lax.optimization_barrier(dlogits)
    dq = lax.dot_general(dlogits, k, (((2,), (1,)), ((0,), (0,))))
    dk = lax.dot_general(dlogits, q, (((1,), (1,)), ((0,), (0,))))
    return dq, dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)
