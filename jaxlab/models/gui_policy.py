"""A policy that points at what its instruction names, without convolutions.

Small overlapping patches of the screen become features; each is compared with each
word of the instruction ("is this written here?"). Cells, the places that can be
pointed at, take the best match of their patches; what is written beside a cell, or
above it, counts as well, since that is where labels are. Each word learns what it looks
like around the place where it is written (a box that is checked, say). A transformer
over the words and the pooled cells says which word counts now, and what lies around
each cell. An action is written token by token: its kind, then arguments that know the
tokens before.

A comparison of words with local features is what learns to read in minutes: patches in
a generic transformer did not, and convolutions' derivatives are slow on XLA's CPU
backend (docs/decisions.md).

Dims: b rows of the batch, r and c rows and columns of patches, g cells, l words,
f features of a patch, d width, k what is compared, n choices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxlab.config import GPT, resolve_model
from jaxlab.models import gpt, kernels
from jaxlab.rl.config import GuiPolicy

Choose = Callable[[int, Array], tuple[Array, Array]]
"""`choose(place, logits_bn) -> index_b, logits_bn`: which is taken as the token at that
place, and the logits of the distribution that it is from."""


def luma_chroma(
    images_bhwc: UInt8[Array, "b h w 3"], stride: int
) -> Float[Array, "b r c n"]:
    """Blocks of stride x stride pixels: contrast of each, and means of luma and chroma.

    Contrast is by how much a pixel's luma is off the image's mean, up or down: letters
    stand out alike on dark and on light paper. Chroma is subsampled as in JPEG, and so
    is luma (BT.601): which of letters and paper is darker, needs no detail.
    """
    b, h, w, _ = images_bhwc.shape
    shape = (b, h // stride, stride, w // stride, stride)
    red, green, blue = jnp.moveaxis(images_bhwc.astype(jnp.float32) / 64, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    luma -= luma.mean((1, 2), keepdims=True)
    contrast = jnp.abs(luma).reshape(shape).swapaxes(2, 3)
    coarse = jnp.stack([luma, blue - luma, red - luma], -1).reshape(*shape, 3)
    fine = contrast.reshape(*contrast.shape[:3], stride * stride)
    return jnp.concatenate([fine, coarse.mean((2, 4))], -1)


def patches(blocks_brcn: Array, size: int) -> Array:
    """Each block with those around it: [b, r, c, size * size * n].

    A patch begins size // 2 blocks above and to the left; beyond the edge is 0.
    """
    before, after = size // 2, size - 1 - size // 2
    _, r, c, _ = blocks_brcn.shape
    wide = jnp.pad(blocks_brcn, ((0, 0), (before, after), (before, after), (0, 0)))
    shifted = [wide[:, y : y + r, x : x + c] for y in range(size) for x in range(size)]
    return jnp.concatenate(shifted, -1)


class Dense(nn.Module):
    """A product with a weight, and a bias."""

    features: int
    names: tuple[str | None, str | None] = (None, None)
    scale: float = 1.0
    """variance of the initial weight times its input width"""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., in] to [..., features]."""
        init = nn.initializers.variance_scaling(
            self.scale, "fan_in", "truncated_normal"
        )
        shape = (x.shape[-1], self.features)
        partitioned = nn.with_logical_partitioning
        kernel: Any = self.param("kernel", partitioned(init, self.names), shape)
        zeros = partitioned(nn.initializers.zeros, self.names[1:])
        bias: Any = self.param("bias", zeros, shape[1:])
        y = kernels.matmul(x, kernel)
        return y + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class PointerPolicy(nn.Module):
    """The policy; see the module."""

    config: GuiPolicy
    words: int
    """words that an instruction may have, by id; 0 is none"""
    kinds: int
    """of actions"""
    others: int
    """arguments of actions that are no cells"""
    tower: GPT | None = None
    """language model that reads the instruction: its words are then tokens, plus 1"""

    @nn.compact
    def __call__(
        self,
        images_bhwc: UInt8[Array, "b h w 3"],
        instruction_bl: Int[Array, "b l"],
        allowed: Bool[np.ndarray, "2 kinds n"],
        choose: Choose,
    ) -> tuple[Sequence[Array], Sequence[Array], Sequence[Array]]:
        """Chooses the tokens of an action.

        Args:
            images_bhwc: screens.
            instruction_bl: ids of words, 0 after the last.
            allowed: which arguments, cells and then others, a kind takes at the second
                and at the third place.
            choose: see `Choose`.

        Returns:
            for each of three places the index chosen (of the kinds, then twice of the
            arguments), int[b], its log-probability and the entropy of the distribution
            it is from, nats, float32[b]. Where the kind takes no argument they are of a
            distribution over nothing in particular: mask them.
        """
        d = self.config.width
        read_bngl, cells_bgd, words_bld, context_bd = self._see(
            images_bhwc, instruction_bl
        )
        n = read_bngl.shape[1]
        chosen, logps, entropies = [], [], []

        def take(place: int, logits_bn: Array, mask_bn: Array | None = None) -> Array:
            if mask_bn is not None:
                logits_bn = jnp.where(mask_bn, logits_bn, kernels.MASKED)
            index_b, logits_bn = choose(place, logits_bn)
            logp_bn = jax.nn.log_softmax(logits_bn)
            picked_b1 = jnp.take_along_axis(logp_bn, index_b[:, None], 1)
            likely = jnp.exp(logp_bn)
            chosen.append(index_b)
            logps.append(picked_b1[:, 0])
            entropies.append(-jnp.sum(likely * jnp.where(likely > 0, logp_bn, 0), 1))
            return index_b

        def point(state_bd: Array, name: str) -> Array:
            """Logits of the cells."""
            query_bd = Dense(d, name=f"{name}_place")(state_bd)
            gate_bnd = Dense(d * n, name=f"{name}_word")(state_bd).reshape(-1, n, d)
            scores_bg = jnp.einsum("bd,bgd->bg", query_bd, cells_bgd)
            gates_bnl = jnp.einsum("bnd,bld->bnl", gate_bnd, words_bld)
            read_bg = jnp.einsum("bnl,bngl->bg", gates_bnl, read_bngl)
            return (scores_bg + read_bg) / d**0.5

        kind_b = take(0, Dense(self.kinds, scale=0.1, name="kind")(context_bd))
        normal = nn.initializers.normal(0.5)
        kinds_nd: Any = self.param("kinds", normal, (self.kinds, d))
        state_bd = Mix(d, name="argument")(context_bd + kinds_nd[kind_b])
        others_bn = Dense(self.others, scale=0.1, name="other")(state_bd)
        argument_bn = jnp.concatenate([point(state_bd, "first"), others_bn], 1)
        first_b = take(1, argument_bn, jnp.asarray(allowed[0])[kind_b])

        cell_b = jnp.minimum(first_b, cells_bgd.shape[1] - 1)
        here_bd = jnp.take_along_axis(cells_bgd, cell_b[:, None, None], 1)[:, 0]
        state_bd = state_bd + Dense(d, name="from")(here_bd)
        cells_bn = point(state_bd, "second")
        nowhere_bn = jnp.full_like(others_bn, kernels.MASKED)
        both_bn = jnp.concatenate([cells_bn, nowhere_bn], 1)
        take(2, both_bn, jnp.asarray(allowed[1])[kind_b])
        return chosen, logps, entropies

    def _see(self, images_bhwc: Array, instruction_bl: Array) -> tuple[Array, ...]:
        """What is written at, beside and above cells; these, the words, the whole."""
        c, d = self.config, self.config.width
        b, h, w, _ = images_bhwc.shape
        rows, columns, side = h // c.cell, w // c.cell, c.cell // c.stride
        normal = nn.initializers.normal(0.5)

        def by_cell(x_brcn: Array) -> Array:
            n = x_brcn.shape[-1]
            split = x_brcn.reshape(b, rows, side, columns, side, n)
            return split.swapaxes(2, 3).reshape(b, rows * columns, side * side, n)

        known_bld, words_bld = self._words(instruction_bl)
        real_bl = instruction_bl > 0
        blocks_brcn = patches(luma_chroma(images_bhwc, c.stride), c.patch // c.stride)
        seen_brcf = nn.relu(Dense(c.features, name="patch")(blocks_brcn))
        seen_brcf = nn.relu(Dense(c.features, name="patch_mix")(seen_brcf))

        # Is this word written here? Of each patch and word; of a cell its best patch.
        here_brck = Dense(c.features, name="here")(seen_brcf)
        word_blk = Dense(c.features, name="word")(known_bld)
        match_brcl = jnp.einsum("brck,blk->brcl", here_brck, word_blk)
        read_bgl = jax.nn.logsumexp(by_cell(match_brcl) / c.features**0.5, 2)
        read_bgl *= real_bl[:, None]

        # Cells: what they look like, which of the words they show, where they are.
        shown_bgl = nn.sigmoid(read_bgl - 2) * real_bl[:, None]
        said_bld = Dense(d, name="said")(words_bld)
        row_rd: Any = self.param("row", normal, (rows, d))
        column_cd: Any = self.param("column", normal, (columns, d))
        cells_bgd = Dense(d, name="cell")(by_cell(seen_brcf).mean(2))
        cells_bgd += (row_rd[:, None] + column_cd[None]).reshape(1, -1, d)
        cells_bgd += jnp.einsum("bgl,bld->bgd", shown_bgl, said_bld)

        # Words: what it looks like where they are written.
        near_bgd = around(nn.relu(Dense(d, name="near")(cells_bgd)), rows, columns)
        there_bgl = jax.nn.softmax(read_bgl, 1)
        found_bld = jnp.einsum("bgl,bgd->bld", there_bgl, near_bgd)
        words_bld += Dense(d, name="found")(found_bld)

        # The whole: a token that asks, the words, and cells pooled to fewer.
        ask_1d: Any = self.param("ask", normal, (1, d))
        ask_b1d = jnp.broadcast_to(ask_1d[None], (b, 1, d))
        pooled_bpd = pool(cells_bgd, rows, columns, c.pool)
        x_btd = jnp.concatenate([ask_b1d, words_bld, pooled_bpd], 1)
        mask_bt = jnp.ones(x_btd.shape[:2], bool).at[:, 1 : 1 + real_bl.shape[1]]
        x_btd = self._blocks(x_btd, mask_bt.set(real_bl))
        words_bld, around_bpd = jnp.split(x_btd[:, 1:], [real_bl.shape[1]], 1)
        cells_bgd += unpool(around_bpd, rows, columns, c.pool)
        cells_bgd = Mix(d, name="cells")(cells_bgd)
        words_bld = words_bld * real_bl[..., None]
        return aligned(read_bgl, rows, columns), cells_bgd, words_bld, x_btd[:, 0]

    def _words(self, instruction_bl: Array) -> tuple[Array, Array]:
        """Words, and words where they stand: [b, l, d] both."""
        d, normal = self.config.width, nn.initializers.normal(0.5)
        if self.tower is not None:
            tokens_bl = jnp.maximum(instruction_bl - 1, 0)
            read_blh = gpt.GPT(self.tower, name="tower")(tokens_bl, features=True)
            if not self.config.train_tower:
                read_blh = jax.lax.stop_gradient(read_blh)
            said_bld = Dense(d, name="said_by_tower")(read_blh.astype(jnp.float32))
            return said_bld, said_bld
        table_nd: Any = self.param("words", normal, (self.words, d))
        known_bld = table_nd[instruction_bl]
        order_ld: Any = self.param("order", normal, (instruction_bl.shape[1], d))
        return known_bld, known_bld + order_ld[None]

    def _blocks(self, x_btd: Array, mask_bt: Array) -> Array:
        """The transformer: everything attends to everything that is there."""
        c = self.config
        sizes = resolve_model(
            GPT(vocab=1, layers=c.layers, width=c.width, heads=c.heads), 1
        )
        length = x_btd.shape[1]
        positions_t = jnp.arange(length)
        angle_te = positions_t[:, None] * gpt.rope_frequencies(sizes)[None]
        turn = gpt.rotation(angle_te[None])
        mask_bts = jnp.repeat(mask_bt[:, None], length, 1)
        for i in range(c.layers):
            block = gpt.Block(sizes, name=f"block_{i}")
            x_btd, _ = block(x_btd, None, turn, mask_bts, positions_t[None])
        return gpt.RMSNorm(sizes.norm_eps, name="norm")(x_btd)


class Mix(nn.Module):
    """x + gelu of a product of its norm."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Of the last dimension."""
        y = gpt.RMSNorm(1e-5, name="norm")(x)
        return x + nn.gelu(Dense(self.features, name="dense")(y))


def aligned(
    read_bgl: Float[Array, "b g l"], rows: int, columns: int
) -> Float[Array, "b 3 g l"]:
    """A word's best match at each cell, anywhere in its row, and in its column."""
    b, g, words = read_bgl.shape
    here = read_bgl.reshape(b, rows, columns, words)
    ways = (here, here.max(2, keepdims=True), here.max(1, keepdims=True))
    every = jnp.stack([jnp.broadcast_to(way, here.shape) for way in ways], 1)
    return every.reshape(b, 3, g, words)


def around(
    cells_bgd: Float[Array, "b g d"], rows: int, columns: int
) -> Float[Array, "b g d"]:
    """Maximum over each cell and the eight around it, of what is positive."""
    b, _, d = cells_bgd.shape
    x = cells_bgd.reshape(b, rows, columns, d)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.maximum(jnp.maximum(x[:, :-2], x[:, 1:-1]), x[:, 2:])
    x = jnp.maximum(jnp.maximum(x[:, :, :-2], x[:, :, 1:-1]), x[:, :, 2:])
    return x.reshape(b, -1, d)


def pool(
    cells_bgd: Float[Array, "b g d"], rows: int, columns: int, size: int
) -> Float[Array, "b p d"]:
    """Maximum over squares of size x size cells; at the edges of fewer."""
    b, _, d = cells_bgd.shape
    tall, wide = -(-rows // size), -(-columns // size)
    x = cells_bgd.reshape(b, rows, columns, d)
    more = ((0, 0), (0, tall * size - rows), (0, wide * size - columns), (0, 0))
    x = jnp.pad(x, more, constant_values=kernels.MASKED)
    return x.reshape(b, tall, size, wide, size, d).max((2, 4)).reshape(b, -1, d)


def unpool(
    pooled_bpd: Float[Array, "b p d"], rows: int, columns: int, size: int
) -> Float[Array, "b g d"]:
    """Each cell gets what its square has; the shapes of `pool` the other way."""
    b, _, d = pooled_bpd.shape
    tall, wide = -(-rows // size), -(-columns // size)
    x = pooled_bpd.reshape(b, tall, 1, wide, 1, d)
    x = jnp.broadcast_to(x, (b, tall, size, wide, size, d))
    x = x.reshape(b, tall * size, wide * size, d)[:, :rows, :columns]
    return x.reshape(b, -1, d)


def init_params(model: PointerPolicy, key: jax.Array, *inputs: Any) -> Any:
    """Fresh weights, float32, for (images, instruction, allowed) of a size."""

    def first(place: int, logits_bn: Array) -> tuple[Array, Array]:
        return jnp.zeros(logits_bn.shape[0], jnp.int32), logits_bn

    return nn.unbox(model.init(key, *inputs, first)["params"])
