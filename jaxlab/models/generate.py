"""Text from a model: sampling, the key-value cache, and the loop that streams.

The prompts, all but their last tokens, go through the model once, in chunks, and
fill the cache; nothing is computed of their logits. From then on one step feeds
each row its newest token and draws the next. The rows may differ in length: they
are padded on the right, and a row reads no slot beyond its own position, which its
own tokens overwrite before.

The draw of a row is a function of (key, row, position) and of the logits, so one
seed gives one text, and a text cut short goes on as it would have.

Dims: b rows, t time, v vocabulary, n candidates (the likeliest tokens).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab import config
from jaxlab.errors import ConfigError
from jaxlab.mesh import RULES, constrain
from jaxlab.models import gpt

CHUNK = 512
"""Tokens of a prompt that go through the model at once; it bounds the memory."""


# ----------------------------------------------------------------- sampling


def sample_token(
    logits_bv: Float[Array, "b v"],
    key_b: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, " b"]:
    """Draws a token for each row.

    Temperature first, then top-k, then top-p among what is left. The three are
    Python numbers: greedy choice and plain sampling compile to no sort.

    Args:
        logits_bv: unnormalised log-probabilities.
        key_b: a random key for each row.
        temperature: divides the logits; 0 takes the likeliest token, of equal ones
            the lowest number.
        top_k: keeps exactly the k likeliest, of equal ones the lower numbers first;
            0 keeps all.
        top_p: keeps the shortest list of likeliest tokens whose total probability
            is at least this, and never less than one (Holtzman et al.,
            arXiv 1904.09751).

    Returns:
        token numbers, int32.
    """
    if temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    # At most 0 before the division, so that no temperature overflows.
    logits = logits_bv.astype(jnp.float32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    tokens_bn, vocab = None, logits.shape[-1]
    if 0 < top_k < vocab or top_p < 1:
        logits, tokens_bn = jax.lax.top_k(logits, min(top_k or vocab, vocab))
    if top_p < 1:
        total_bn = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
        before_bn = jnp.pad(total_bn[:, :-1], ((0, 0), (1, 0)))
        keep_bn = (before_bn < top_p).at[:, 0].set(True)
        logits = jnp.where(keep_bn, logits, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(key_b)
    choice_b = jnp.argmax(logits + noise, axis=-1)
    if tokens_bn is not None:
        choice_b = jnp.take_along_axis(tokens_bn, choice_b[:, None], axis=-1)[:, 0]
    return choice_b.astype(jnp.int32)


# ---------------------------------------------------------- compiled pieces


def _lay_out(cache: gpt.Cache) -> gpt.Cache:
    names = (None, "batch", None, "kv_heads", None)
    return gpt.Cache(*(constrain(x, *names) for x in cache))


def _forward(model, params, cache, tokens_bt, positions_bt) -> tuple[Any, gpt.Cache]:
    result: Any = gpt.GPT(model).apply(
        {"params": params}, tokens_bt, positions_bt=positions_bt, cache=cache
    )
    return result[0], _lay_out(result[1])


@partial(jax.jit, static_argnames=("model", "rows", "slots"))
def new_cache(model: config.GPT, rows: int, slots: int) -> gpt.Cache:
    """`gpt.empty_cache`, laid over the mesh."""
    return _lay_out(gpt.empty_cache(model, rows, slots))


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
    model: config.GPT,
    params: Any,
    cache: gpt.Cache,
    tokens_bt: Int[Array, "b t"],
    start: Int[Array, ""],
) -> gpt.Cache:
    """Adds the tokens at positions start, start + 1, ... to the cache (donated)."""
    time_t = jnp.arange(tokens_bt.shape[1])
    positions_bt = jnp.broadcast_to(start + time_t[None], tokens_bt.shape)
    return _forward(model, params, cache, tokens_bt, positions_bt)[1]


@partial(
    jax.jit,
    static_argnames=("model", "temperature", "top_k", "top_p", "vocab"),
    donate_argnames="cache",
)
def decode(
    model: config.GPT,
    params: Any,
    cache: gpt.Cache,
    token_b: Int[Array, " b"],
    position_b: Int[Array, " b"],
    key: Array,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    vocab: int | None = None,
) -> tuple[Int[Array, " b"], Int[Array, " b"], gpt.Cache]:
    """Feeds each row its token and draws the one after it.

    Args:
        model: resolved config.
        params: its weights.
        cache: keys and values of the positions before; donated.
        token_b: newest token of each row.
        position_b: its position.
        key: of the whole text; the draw's own comes from it, the row and the
            position of the token drawn.
        temperature: see `sample_token`.
        top_k: see `sample_token`.
        top_p: see `sample_token`.
        vocab: only tokens below this are drawn; None: all.

    Returns:
        the tokens drawn (whole on every device), their positions, and the cache.
    """
    logits_btv, cache = _forward(
        model, params, cache, token_b[:, None], position_b[:, None]
    )
    position_b = position_b + 1
    key_b = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(token_b)))
    key_b = jax.vmap(jax.random.fold_in)(key_b, position_b)
    token_b = sample_token(logits_btv[:, 0, :vocab], key_b, temperature, top_k, top_p)
    return constrain(token_b, None), position_b, cache


# ----------------------------------------------------------------- the loop


def bucket(size: int) -> int:
    """The next size up of a series with few members: at most a fourth is wasted.

    Shapes are rounded up to these so that few are compiled: 32, 64, 96, 128, 160,
    192, 224, 256, 320, ..., four in each doubling.
    """
    step = max(32, 1 << max((size - 1).bit_length() - 3, 0))
    return max(-(-size // step), 1) * step


def generate(
    model: config.GPT,
    params: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    tokens: int,
    key: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos: int | Sequence[int] | None = None,
    vocab: int | None = None,
) -> Iterator[np.ndarray]:
    """Continues prompts, and hands out each token as soon as it is there.

    Weights that lie on a mesh need `jax.set_mesh` around the iteration. The cache
    is as large as prompt and continuation need; rotary embeddings set no limit.

    Args:
        model: resolved config (`config.resolve_model`).
        params: its weights.
        prompts: the rows: token numbers, at least one each, of any lengths.
        tokens: how many to write for each row.
        key: random key; the same one gives the same text.
        temperature: see `sample_token`; 0 is greedy.
        top_k: see `sample_token`.
        top_p: see `sample_token`.
        eos: token or tokens that end a row; when all rows have ended, the iteration
            does.
        vocab: only tokens below this are drawn, for a model whose vocabulary was
            rounded up; None: all.

    Yields:
        int32[b]: the next token of each row; a row that has ended repeats the token
        that ended it.

    Raises:
        ConfigError: no prompt, an empty one, a token outside the vocabulary, or a
            sampling parameter out of its range.
    """
    _check(model, prompts, tokens, temperature, top_k, top_p)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    # What concerns only training would compile the same step again.
    model = dataclasses.replace(model, remat="none")
    return _generate(
        model, params, prompts, tokens, key, sampling | {"vocab": vocab}, eos
    )


def _check(model, prompts, tokens, temperature, top_k, top_p):
    if not len(prompts):
        raise ConfigError("there is no prompt to continue")
    for row, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if not ids.size:
            raise ConfigError(f"prompt {row} is empty; give it at least one token")
        if ids.min() < 0 or ids.max() >= model.vocab:
            bad = ids[(ids < 0) | (ids >= model.vocab)][0]
            raise ConfigError(
                f"prompt {row} has token {bad}, and the model's vocabulary ends at "
                f"{model.vocab - 1}; the tokenizer is another model's"
            )
    for name, value, low, high in (
        ("tokens", tokens, 0, np.inf),
        ("temperature", temperature, 0, np.inf),
        ("top_k", top_k, 0, np.inf),
        ("top_p", top_p, 0, 1),
    ):
        if not low <= value <= high:
            bounds = f"at least {low}" if high == np.inf else f"from {low} to {high}"
            raise ConfigError(f"{name} is {value}, and must be {bounds}")


def _generate(model, params, prompts, tokens, key, sampling, eos):
    if not tokens:
        return
    # As many rows as the mesh cuts the batch into, or a multiple: a row that is not
    # asked for costs nothing on a device that would idle.
    rows, shards = len(prompts), _batch_shards()
    prompts = [*prompts, *[[0]] * (-rows % shards)]
    length_b = np.array([len(prompt) for prompt in prompts], np.int32)
    before = int(length_b.max()) - 1  # the newest token is the first step's
    chunk = min(bucket(before), CHUNK)
    padded = -(-before // chunk) * chunk
    tokens_bt = np.zeros((len(prompts), padded + 1), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_bt[row, : len(prompt)] = prompt
    cache = new_cache(model, len(prompts), bucket(max(before + tokens, padded)))
    for start in range(0, padded, chunk):
        part_bt = tokens_bt[:, start : start + chunk]
        cache = prefill(model, params, cache, part_bt, np.int32(start))

    step = partial(decode, model, params, key=key, **sampling)
    position_b = length_b - 1
    last_b = tokens_bt[np.arange(len(prompts)), position_b]
    ended_b = np.zeros(len(prompts), bool)
    next_b, position_b, cache = step(cache, last_b, position_b)
    for left in reversed(range(tokens)):
        drawn_b = next_b
        if left:  # the device has the next step to do while the host reads this one
            next_b, position_b, cache = step(cache, drawn_b, position_b)
        last_b = np.where(ended_b, last_b, np.asarray(drawn_b))
        yield last_b[:rows]
        if eos is not None:
            ended_b |= np.isin(last_b, eos)
            if ended_b[:rows].all():
                return


def _batch_shards() -> int:
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in RULES["batch"])


# ----------------------------------------------------- from a folder to text


def stream_text(
    folder: str | Path,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[str]:
    """Text that a saved model writes after a prompt, piece by piece.

    Args:
        folder: a run folder, or one with a Hugging Face checkpoint.
        prompt: start of the text; an empty one starts a document.
        tokens: how many tokens at most; the end of the document comes first.
        temperature: see `sample_token`; 0 is greedy.
        top_k: see `sample_token`.
        top_p: see `sample_token`.
        seed: the same one gives the same text.

    Yields:
        what is new of the text; joined they are the continuation. Half of a UTF-8
        character is held back until the rest is there.

    Raises:
        UserError: the folder holds no model that can be read.
    """
    from jaxlab import program
    from jaxlab.models import hf
    from jaxlab.tokens import load_tokenizer, stream_decoder

    if hf.is_checkpoint(folder):
        tokenizer = load_tokenizer(folder)
        model, params = hf.load_params(folder)
        ids = hf.encode_prompt(folder, prompt)
        eos = hf.end_tokens(folder) or tokenizer.eos
    else:
        _, model, params, tokenizer, _ = program.load(folder)
        ids, eos = tokenizer.encode(prompt).tolist(), tokenizer.eos
    written = generate(
        model,
        params,
        [ids or [tokenizer.eos]],
        tokens=tokens,
        eos=eos,
        key=jax.random.key(seed),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        vocab=min(tokenizer.vocab_size, model.vocab),
    )
    decode_next = stream_decoder(tokenizer)
    for token_b in written:
        yield decode_next(int(token_b[0]))
