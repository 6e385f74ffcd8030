"""The language model: a decoder-only transformer as it is built today.

RMSNorm before each sub-layer, rotary embeddings (half-split pairs, as Hugging
Face's Llama has them), grouped-query attention, SwiGLU or GELU, no biases. Each
parameter carries the logical names of its dimensions (`jaxlab.mesh.RULES` maps
them to the mesh); weights are float32, and are cast to `config.dtype` where used.

With `by_hand` the modules run inside a `shard_map` over the mesh, on the sizes of
`local`, and are sequence-parallel: between the sub-layers x_btd holds this device's
part of the time, and the logits its part of the vocabulary (`jaxlab.manual`).

Dims: b rows, t time, s cache slots, d width, h query heads, k key heads,
e head width, f hidden width of the MLP, v vocabulary, l layers.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab import config, manual
from jaxlab.manual import gather_rows, look_up, scatter_rows
from jaxlab.mesh import constrain
from jaxlab.models import kernels


class Cache(NamedTuple):
    """Keys and values of the positions seen so far; slot = position."""

    k_lbske: Float[Array, "l b s k e"]
    v_lbske: Float[Array, "l b s k e"]


def empty_cache(model: config.GPT, rows: int, slots: int) -> Cache:
    """Cache for `slots` positions of `rows` sequences, in the compute dtype."""
    assert model.kv_heads and model.head_dim, "resolve the config first"
    shape = (model.layers, rows, slots, model.kv_heads, model.head_dim)
    return Cache(jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype))


def rope_frequencies(model: config.GPT) -> np.ndarray:
    """Angular frequency of each rotary pair, float32[head_dim / 2].

    Su et al. 2021 (arXiv 2104.09864), section 3.4.2; with `rope_scaling` the
    frequency bands of Llama 3.1.
    """
    assert model.head_dim, "resolve the config first"
    pairs = np.arange(0, model.head_dim, 2, dtype=np.float32)
    frequency = (1.0 / model.rope_theta ** (pairs / model.head_dim)).astype(np.float32)
    scaling = model.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_length * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    mixed = (1 - keep) * frequency / scaling.factor + keep * frequency
    return mixed.astype(np.float32)


def rotation(
    angle_bte: Float[Array, "b t half"],
) -> tuple[Float[Array, "b t half"], Float[Array, "b t half"]]:
    """Cosines and sines of the rotary angles.

    Behind a barrier, or XLA would compute them again for every element of every
    layer that they turn.
    """
    return jax.lax.optimization_barrier((jnp.cos(angle_bte), jnp.sin(angle_bte)))


def rotate(
    x_bthe: Float[Array, "b t h e"],
    turn_bte: tuple[Float[Array, "#b t half"], Float[Array, "#b t half"]],
) -> Float[Array, "b t h e"]:
    """Turns each pair (i, i + e/2) of a head by its angle; computed in float32."""
    cos, sin = (x[:, :, None, None] for x in turn_bte)
    # Halves of a head as an axis of two: a flip costs nothing where a concatenation
    # is a branch per element.
    halves = x_bthe.astype(jnp.float32).reshape(*x_bthe.shape[:-1], 2, -1)
    sin = jnp.concatenate([-sin, sin], axis=-2)
    turned = halves * cos + jnp.flip(halves, -2) * sin
    return turned.reshape(x_bthe.shape).astype(x_bthe.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, in float32 (arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        scale: Any = self.param("scale", ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Linear(nn.Module):
    """Product with a kernel [in, out]; no bias."""

    features: int
    names: tuple[str, str]
    scale: float = 1.0
    """variance of the initial kernel times its input width"""
    by_hand: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(
            self.scale, "fan_in", "truncated_normal"
        )
        shape = (x.shape[-1], self.features)
        kernel = _weight(self, "kernel", init, shape, self.names, x.dtype, self.by_hand)
        return _matmul(x, kernel, self.by_hand)


def _weight(module, name, init, shape, names, dtype, by_hand) -> Any:
    """A weight in the compute type, whole along `fsdp`."""
    init = nn.with_logical_partitioning(init, names)
    if not by_hand:
        return module.param(name, init, shape).astype(dtype)
    held = module.param(name, init, manual.held_shape(shape, names))
    return manual.gather_weight(held.astype(dtype), names)


def _matmul(x: Array, kernel: Array, by_hand: bool) -> Array:
    # Beside collectives a bare product, for `jaxlab.overlap` to see.
    return kernels.matmul(x, kernel, True if by_hand else None)


def _accelerated() -> bool | None:
    """True on a mesh of accelerators, which need not be here; None: nobody knows."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return True if device is not None and device.platform != "cpu" else None


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embeddings (arXiv 2305.13245)."""

    model: config.GPT
    by_hand: bool = False

    @nn.compact
    def __call__(self, x_btd, turn_bte, mask_bts, positions_bt, cache):
        c = self.model
        linear = partial(Linear, by_hand=self.by_hand)
        x_btd = gather_rows(x_btd, self.by_hand)
        b, t, _ = x_btd.shape

        def heads(name, count, axis):
            x = linear(count * c.head_dim, ("embed", axis), name=name)(x_btd)
            return constrain(
                x.reshape(b, t, count, c.head_dim), "batch", None, axis, None
            )

        q_bthe = heads("q", c.heads, "heads")
        k_btke = heads("k", c.kv_heads, "kv_heads")
        v_btke = heads("v", c.kv_heads, "kv_heads")
        if c.qk_norm:
            q_bthe = RMSNorm(c.norm_eps, name="q_norm")(q_bthe)
            k_btke = RMSNorm(c.norm_eps, name="k_norm")(k_btke)
        q_bthe, k_btke = rotate(q_bthe, turn_bte), rotate(k_btke, turn_bte)
        if cache is not None:
            write = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=0))
            start_b = positions_bt[:, 0]
            cache = Cache(
                write(cache[0], k_btke, start_b), write(cache[1], v_btke, start_b)
            )
            k_btke, v_btke = cache
        out_bthe = kernels.attention(q_bthe, k_btke, v_btke, mask_bts, _accelerated())
        out = linear(c.width, ("heads", "embed"), 1 / (2 * c.layers), name="out")
        y_btd = out(out_bthe.reshape(b, t, -1))
        return scatter_rows(y_btd, self.by_hand), cache


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202) or GELU feed-forward layer."""

    model: config.GPT
    by_hand: bool = False

    @nn.compact
    def __call__(self, x_btd):
        c = self.model
        assert c.mlp, "resolve the config first"
        linear = partial(Linear, by_hand=self.by_hand)
        x_btd = gather_rows(x_btd, self.by_hand)
        hidden = partial(linear, c.mlp, ("embed", "mlp"))
        if c.activation == "swiglu":
            h_btf = nn.silu(hidden(name="gate")(x_btd)) * hidden(name="up")(x_btd)
        else:
            h_btf = nn.gelu(hidden(name="up")(x_btd))
        h_btf = constrain(h_btf, "batch", None, "mlp")
        down = linear(c.width, ("mlp", "embed"), 1 / (2 * c.layers), name="down")
        return scatter_rows(down(h_btf), self.by_hand)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    model: config.GPT
    by_hand: bool = False

    @nn.compact
    def __call__(self, x_btd, cache, turn_bte, mask_bts, positions_bt):
        eps, by_hand = self.model.norm_eps, self.by_hand
        y_btd, cache = Attention(self.model, by_hand, name="attention")(
            RMSNorm(eps, name="attention_norm")(x_btd),
            turn_bte,
            mask_bts,
            positions_bt,
            cache,
        )
        x_btd = constrain(x_btd + y_btd, "batch", None, None)
        y_btd = MLP(self.model, by_hand, name="mlp")(
            RMSNorm(eps, name="mlp_norm")(x_btd)
        )
        return constrain(x_btd + y_btd, "batch", None, None), cache


class GPT(nn.Module):
    """The whole model; `config.resolve_model` must have filled in its config."""

    model: config.GPT
    by_hand: bool = False
    """gathers and scatters by itself along the mesh; `model` is then `local`"""

    @nn.compact
    def __call__(
        self,
        tokens_bt: Int[Array, "b t"],
        *,
        segments_bt: Int[Array, "b t"] | None = None,
        positions_bt: Int[Array, "b t"] | None = None,
        cache: Cache | None = None,
        features: bool = False,
    ) -> Any:
        """Logits of the next token.

        Args:
            tokens_bt: token numbers.
            segments_bt: document of each token; none sees another document.
            positions_bt: position of each token, consecutive in a row; 0, 1, ...
                by default.
            cache: keys and values before these tokens; theirs are written to the
                slots of their positions.
            features: what the logits would be computed from, instead of them.

        Returns:
            float32[b, t, v], or features[b, t, d] in the compute type; with a cache the
            pair (logits, cache).
        """
        c, by_hand = self.model, self.by_hand
        assert not by_hand or cache is None, "no cache where time is cut"
        b, t = tokens_bt.shape
        dtype = jnp.dtype(c.dtype)
        init = nn.initializers.normal(0.02)
        weight = partial(_weight, self, dtype=dtype, by_hand=by_hand)
        table_vd = weight("embedding", init, (c.vocab, c.width), ("vocab", "embed"))
        # Whole in width before the look-up: the partitioner would otherwise copy the
        # activations to every device to turn the cut in width into one in rows.
        table_vd = constrain(table_vd, "vocab", None)
        x_btd = constrain(look_up(table_vd, tokens_bt, by_hand), "batch", None, None)

        mask_bts = None
        if cache is not None or segments_bt is not None:
            now_bt = jnp.arange(t)[None] if positions_bt is None else positions_bt
            slots = t if cache is None else cache.k_lbske.shape[2]
            mask_bts = kernels.causal_mask(now_bt, jnp.arange(slots)[None], segments_bt)
        if positions_bt is None:
            positions_bt = jnp.arange(t)[None]
        angle_bte = positions_bt[:, :, None] * rope_frequencies(c)[None, None]
        turn_bte = rotation(angle_bte)
        positions_bt = jnp.broadcast_to(positions_bt, (b, t))

        x_btd, cache = self._blocks(x_btd, cache, turn_bte, mask_bts, positions_bt)
        x_btd = RMSNorm(c.norm_eps, name="norm")(x_btd)
        if features:
            return x_btd if cache is None else (x_btd, cache)
        if c.tied:
            kernel_dv: Any = table_vd.T
        else:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            shape = (c.width, c.vocab)
            kernel_dv = weight("output", init, shape, ("embed", "vocab"))
        x_btd = gather_rows(x_btd, by_hand)
        logits_btv = _matmul(x_btd, kernel_dv, by_hand).astype(jnp.float32)
        logits_btv = constrain(logits_btv, "batch", None, "vocab")
        return logits_btv if cache is None else (logits_btv, cache)

    def _blocks(self, x_btd, cache, *shared):
        c = self.model
        block = Block
        if c.remat != "none":
            dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            block = nn.remat(
                Block,
                prevent_cse=not c.scan,
                policy=dots if c.remat == "dots" else None,
            )
        if c.scan:
            in_axes: Any = (0, nn.broadcast, nn.broadcast, nn.broadcast)
            layers = nn.scan(
                block,
                length=c.layers,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=in_axes,
                metadata_params={nn.PARTITION_NAME: None},
            )
            return layers(c, self.by_hand, name="layers")(x_btd, cache, *shared)
        caches = []
        for i in range(c.layers):
            layer = None if cache is None else Cache(cache[0][i], cache[1][i])
            layer_i = block(c, self.by_hand, name=f"layer_{i}")
            x_btd, layer = layer_i(x_btd, layer, *shared)
            caches.append(layer)
        if cache is not None:
            cache = jax.tree.map(lambda *x: jnp.stack(x), *caches)
        return x_btd, cache


def local(model: config.GPT, size: int) -> config.GPT:
    """The model that one of `size` devices computes of a resolved one.

    Its part of the heads, the MLP and the vocabulary; all must divide
    (`config.validate`).
    """
    assert model.kv_heads and model.head_dim and model.mlp and model.vocab
    return dataclasses.replace(
        model,
        heads=model.heads // size,
        kv_heads=model.kv_heads // size,
        mlp=model.mlp // size,
        vocab=model.vocab // size,
    )


def init_params(model: config.GPT, key: jax.Array) -> Any:
    """Fresh weights: a tree of float32 arrays."""
    return nn.unbox(_boxed_params(model, key))


def param_names(model: config.GPT) -> Any:
    """Logical dimension names of each weight: the tree of `init_params`, of tuples."""
    boxed = jax.eval_shape(partial(_boxed_params, model), jax.random.key(0))
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)


def _boxed_params(model, key):
    return GPT(model).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def parameter_count(params: Any) -> int:
    """Numbers in a tree of parameters (or of their shapes)."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
