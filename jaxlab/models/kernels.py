"""The two matrix kernels of the model: `matmul` and `attention`.

Accelerators get JAX's own (cuDNN flash attention on GPU in half precision). XLA's
CPU backend does not: the transposes of its own derivative rules end up in strided
element-wise loops that cost more than the products. So there both have
derivatives written out as products whose operands lie as they are. `plain=True`
turns that off (it is the reference in the tests).

Dims: b rows, t query time, s key time, h query heads, k key heads, g query heads that
share a key head, m = g x t, e head width.
"""

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
            q_bthe,
            k_bske,
            v_bske,
            mask=None if mask_bts is None else mask_bts[:, None],
            is_causal=mask_bts is None,
            implementation="cudnn" if cudnn else "xla",
        )
    b, t, h, e = q_bthe.shape
    s, k = k_bske.shape[1:3]
    if mask_bts is None:
        mask_bts = jnp.tril(jnp.ones((1, t, s), bool))
    # Batch and key heads stay two dimensions: merged, the partitioner could not keep
    # both cut. The queries that share a key head are rows of one matrix.
    q_bkgte = q_bthe.reshape(b, t, k, h // k, e).transpose(0, 2, 3, 1, 4)
    out_bkme = _attention(
        q_bkgte.reshape(b, k, -1, e) * e**-0.5,
        k_bske.transpose(0, 2, 1, 3),
        v_bske.transpose(0, 2, 1, 3),
        mask_bts,
    )
    out_bkgte = out_bkme.reshape(q_bkgte.shape)
    return out_bkgte.transpose(0, 3, 1, 2, 4).reshape(b, t, h, e)


@jax.custom_vjp
def _attention(q_bkme, k_bkse, v_bkse, mask_bts):
    return _attention_forward(q_bkme, k_bkse, v_bkse, mask_bts)[0]


def _attention_forward(q_bkme, k_bkse, v_bkse, mask_bts):
    b, k, m, _ = q_bkme.shape
    t, s = mask_bts.shape[1:]
    logits_bkms = _product(q_bkme, k_bkse, 3, 3, preferred_element_type=jnp.float32)
    logits_bkgts = logits_bkms.reshape(b, k, m // t, t, s)
    logits_bkgts = jnp.where(mask_bts[:, None, None], logits_bkgts, MASKED)
    weights_bkms = jax.nn.softmax(logits_bkgts).reshape(b, k, m, s)
    weights_bkms = weights_bkms.astype(v_bkse.dtype)
    out_bkme = _product(weights_bkms, v_bkse, 3, 2)
    return out_bkme, (q_bkme, k_bkse, v_bkse, weights_bkms, out_bkme)


def _attention_backward(saved, dout_bkme):
    q_bkme, k_bkse, v_bkse, weights_bkms, out_bkme = saved
    dout_bkme = lax.optimization_barrier(dout_bkme)
    dv_bkse = _transposed_product(weights_bkms, dout_bkme)
    dweights_bkms = _product(
        dout_bkme, v_bkse, 3, 3, preferred_element_type=jnp.float32
    )
    # sum_s dweights * weights, by way of the output
    dot_bkm1 = jnp.sum(dout_bkme.astype(jnp.float32) * out_bkme, axis=-1, keepdims=True)
    dlogits_bkms = (weights_bkms * (dweights_bkms - dot_bkm1)).astype(q_bkme.dtype)
    dlogits_bkms = lax.optimization_barrier(dlogits_bkms)
    dq_bkme = _product(dlogits_bkms, k_bkse, 3, 2)
    dk_bkse = _transposed_product(dlogits_bkms, q_bkme)
    return dq_bkme, dk_bkse, dv_bkse, None


def _product(a, b, a_dim, b_dim, **options):
    """Matrix products of two batches [b, k, ...], contracting one dimension each."""
    dims = (((a_dim,), (b_dim,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, **options)


def _transposed_product(a_bkms, b_bkme):
    """a^T b as (b^T a)^T: it is the small matrix that is turned."""
    turned_bkem = lax.optimization_barrier(b_bkme.swapaxes(2, 3))
    out_bkes = lax.optimization_barrier(_product(turned_bkem, a_bkms, 3, 2))
    return out_bkes.swapaxes(2, 3)


_attention.defvjp(_attention_forward, _attention_backward)
