"""The policy that points: its tokens, its probabilities, and what it is built of."""

import itertools
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import config, tokens
from jaxlab.errors import ConfigError
from jaxlab.models import gpt, gui_policy, hf
from jaxlab.rl import launch
from jaxlab.rl.actions import LENGTH, ActionTokens
from jaxlab.rl.cluster import make_env
from jaxlab.rl.config import Curation, Envs, GuiPolicy, RLRun, Rollout, complete
from jaxlab.rl.envs.api import (
    ARGUMENTS,
    FIELDS,
    KEYS,
    Action,
    Kind,
    observation_space,
    parse_action,
)
from jaxlab.rl.envs.pix import PixEnv
from jaxlab.rl.envs.tokenized import Tokenized
from jaxlab.rl.evaluate import evaluate_run, load_actor

SMALL = GuiPolicy(cell=4, stride=2, patch=6, features=4, width=8, layers=1, heads=2)
WORDS = 12
SPACE = observation_space(16, 20, WORDS, 5, 64)
GRID = ActionTokens(4, 5, WORDS)


@cache
def built():
    policy = SMALL.build(SPACE)
    params = policy.init(jax.random.key(0))
    # Larger than at the start: nothing is near uniform, no head near zero.
    params = jax.tree.map(lambda x: x * 1.5, params)
    return policy, params, jax.jit(policy.act), jax.jit(policy.score)


def seen(rows, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, 16, 20, 3), np.uint8)
    instruction = rng.integers(1, WORDS, (rows, 5)).astype(np.int32)
    instruction[:, 4] = 0
    return images, instruction


# ------------------------------------------------------------------------- tokens

ACTIONS = st.builds(
    Action,
    st.sampled_from(list(Kind)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.integers(0, WORDS - 1),
    st.integers(0, FIELDS - 1),
    st.integers(0, len(KEYS) - 1),
)


@given(ACTIONS, st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None)
def test_tokens_say_the_action(action, rows, columns):
    grid = ActionTokens(rows, columns, WORDS)
    said = grid.encode(action)
    assert said.shape == (LENGTH,) and said.dtype == np.int32
    assert said.max() < grid.size
    names = ARGUMENTS[action.kind]
    assert list(said >= 0) == [place <= len(names) for place in range(LENGTH)]
    again = grid.decode(said)
    assert np.array_equal(grid.encode(again), said)
    assert again.kind == action.kind
    for name in names:
        if name not in ("xy", "to"):
            assert getattr(again, name) == getattr(action, name)
            continue
        for size, a, b in zip(
            (columns, rows), getattr(again, name), getattr(action, name), strict=True
        ):
            assert abs(a - b) <= 0.5 / size + 1e-9


def test_experts_points_are_the_middles_of_cells():
    grid = ActionTokens(16, 16, WORDS)
    env = PixEnv("form")
    for seed in range(5):
        env.reset(seed=seed)
        wanted, _ = parse_action(env.oracle_action(), len(PixEnv.vocabulary))
        assert grid.decode(grid.encode(wanted)).xy == pytest.approx(wanted.xy)


def all_tokens():
    """Every action there is, and no other."""
    first = len(Kind)
    after = first + GRID.cells
    ranges = {
        "xy": range(first, after),
        "to": range(first, after),
        "token": range(after, after + WORDS),
        "field": range(after + WORDS, after + WORDS + FIELDS),
        "key": range(after + WORDS + FIELDS, after + WORDS + FIELDS + len(KEYS)),
    }
    for kind, names in ARGUMENTS.items():
        for rest in itertools.product(*(ranges[name] for name in names)):
            yield [int(kind), *rest] + [-1] * (2 - len(rest))


def test_what_is_no_action_is_refused():
    assert GRID.size == len(Kind) + GRID.cells + WORDS + FIELDS + len(KEYS)
    known = {tuple(said) for said in all_tokens()}
    for said in itertools.product(range(-1, GRID.size + 1, 3), repeat=2):
        full = (*said, -1)
        if full in known:
            assert tuple(GRID.encode(GRID.decode(full))) == full
        elif said[0] not in (Kind.WAIT, Kind.DONE):  # the rest is not read
            with pytest.raises(ValueError, match="action token"):
                GRID.decode(full)


# ------------------------------------------------------------------ probabilities


@pytest.mark.slow
def test_probabilities_of_all_actions_sum_to_one():
    policy, params, _, score = built()
    said = np.array(list(all_tokens()), np.int32)
    images, instruction = (np.repeat(x, len(said), 0) for x in seen(1))
    mask = said >= 0
    found = score(params, images, instruction, np.where(mask, said, 0), mask)
    logp = np.where(mask, np.asarray(found.logp, np.float64), 0)
    probability = np.exp(logp.sum(1))
    assert probability.sum() == pytest.approx(1, abs=1e-4)
    assert probability.max() < 0.9  # it is no triviality
    # The entropies are those of these probabilities: of the kind, and of its argument.
    kinds = np.array([probability[said[:, 0] == k].sum() for k in Kind])
    entropy = -(kinds * np.log(kinds)).sum()
    assert np.asarray(found.entropy)[:, 0] == pytest.approx(entropy, abs=1e-4)
    for kind in (Kind.CLICK, Kind.TYPE, Kind.KEY):
        rows = said[:, 0] == kind
        share = probability[rows] / kinds[kind]
        entropy = -(share * np.log(share)).sum()
        assert np.asarray(found.entropy)[rows, 1] == pytest.approx(entropy, abs=1e-4)
    drags = said[:, 0] == Kind.DRAG
    first = said[drags][0, 1]
    rows = drags & (said[:, 1] == first)
    share = probability[rows] / probability[rows].sum()
    entropy = -(share * np.log(share)).sum()
    assert np.asarray(found.entropy)[rows, 2] == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_acts_says_what_scoring_says(temperature):
    policy, params, act, score = built()
    images, instruction = seen(64)
    keys = jax.random.split(jax.random.key(1), 64)
    acted = act(params, images, instruction, keys, temperature)
    said = np.asarray(acted.tokens)
    mask = said >= 0
    assert len({policy.action(row).kind for row in said}) > 4
    found = score(params, images, instruction, np.where(mask, said, 0), mask)
    if temperature == 1:
        for a, b in zip(acted[1:], found, strict=True):
            np.testing.assert_allclose(
                np.where(mask, a, 0), np.where(mask, b, 0), atol=2e-6
            )
    else:  # sharper: less entropy
        assert np.asarray(acted.entropy)[:, 0].mean() < found.entropy[:, 0].mean()


def test_samples_have_the_probabilities_they_say():
    policy, params, act, _ = built()
    images, instruction = (np.repeat(x, 512, 0) for x in seen(1))
    keys = jax.random.split(jax.random.key(2), 512)
    acted = act(params, images, instruction, keys, 1.0)
    kinds = np.asarray(acted.tokens)[:, 0]
    for kind in set(kinds.tolist()):
        said = float(np.exp(np.asarray(acted.logp)[kinds == kind, 0][0]))
        deviation = (said * (1 - said) / 512) ** 0.5
        assert abs(np.mean(kinds == kind) - said) < 4.5 * deviation + 1e-3


def test_an_answer_depends_on_its_own_row_alone():
    policy, params, act, _ = built()
    images, instruction = seen(64)
    keys = jax.random.split(jax.random.key(1), 64)
    together = act(params, images, instruction, keys, 1.0)
    order = np.random.default_rng(0).permutation(64)
    mixed = act(params, images[order], instruction[order], keys[order], 1.0)
    assert np.array_equal(np.asarray(together.tokens)[order], mixed.tokens)


def test_cold_is_the_likeliest_action():
    policy, params, act, _ = built()
    images, instruction = seen(64)
    one = act(params, images, instruction, jax.random.split(jax.random.key(1), 64), 0.0)
    two = act(params, images, instruction, jax.random.split(jax.random.key(9), 64), 0.0)
    assert np.array_equal(one.tokens, two.tokens)
    assert np.isfinite(one.logp).all() and np.isfinite(one.entropy).all()


def test_it_uses_the_image_the_words_and_their_order_but_no_padding():
    policy, params, _, score = built()
    images, instruction = seen(1)
    said = GRID.encode(Action(Kind.DRAG, (0.1, 0.1), (0.9, 0.9)))[None]

    def logp(images, instruction):
        return np.asarray(score(params, images, instruction, said, said >= 0).logp)[0]

    base = logp(images, instruction)
    other = instruction.copy()
    other[0, 0] = other[0, 0] % (WORDS - 1) + 1
    swapped = instruction[:, [1, 0, 2, 3, 4]]
    assert instruction[0, 0] != instruction[0, 1]
    for changed in (
        logp(255 - images, instruction),
        logp(images, other),
        logp(images, swapped),
    ):
        assert (np.abs(changed - base) > 1e-4).all()


# ------------------------------------------------------------------------- pieces


def test_blocks_and_patches_are_those_of_the_pixels():
    images, _ = seen(2)
    rgb = images.astype(np.float64) / 64
    luma = rgb @ [0.299, 0.587, 0.114]
    luma -= luma.mean((1, 2), keepdims=True)
    coarse = np.stack([luma, rgb[..., 2] - luma, rgb[..., 0] - luma], -1)
    blocks = np.asarray(gui_policy.luma_chroma(jnp.asarray(images), 2))
    assert blocks.shape == (2, 8, 10, 7)
    for r, c in itertools.product(range(8), range(10)):
        square = (slice(None), slice(2 * r, 2 * r + 2), slice(2 * c, 2 * c + 2))
        wanted = np.concatenate(
            [np.abs(luma[square]).reshape(2, 4), coarse[square].mean((1, 2))], 1
        )
        np.testing.assert_allclose(blocks[:, r, c], wanted, atol=1e-5)
    large = np.asarray(gui_policy.patches(jnp.asarray(blocks), 3))
    padded = np.pad(blocks, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for r, c in itertools.product(range(8), range(10)):
        wanted = padded[:, r : r + 3, c : c + 3].reshape(2, -1)
        np.testing.assert_array_equal(large[:, r, c], wanted)


@pytest.mark.slow
@given(st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_what_is_around_and_in_line_with_a_cell_are_maxima(rows, columns):
    cells = np.random.default_rng(1).normal(size=(2, rows * columns, 3))
    cells = cells.astype(np.float32)
    near = np.asarray(gui_policy.around(jnp.asarray(np.abs(cells)), rows, columns))
    lines = np.asarray(gui_policy.aligned(jnp.asarray(cells), rows, columns))
    grid = cells.reshape(2, rows, columns, 3)
    for r, c in itertools.product(range(rows), range(columns)):
        square = grid[:, max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2]
        here = r * columns + c
        np.testing.assert_array_equal(near[:, here], np.abs(square).max((1, 2)))
        ways = (cells[:, here], grid[:, r].max(1), grid[:, :, c].max(1))
        np.testing.assert_array_equal(lines[:, :, here], np.stack(ways, 1))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_pooling_is_a_maximum_over_squares(rows, columns, size):
    cells = np.random.default_rng(0).normal(size=(2, rows * columns, 3))
    cells = cells.astype(np.float32)
    pooled = gui_policy.pool(jnp.asarray(cells), rows, columns, size)
    back = np.asarray(gui_policy.unpool(pooled, rows, columns, size))
    grid = cells.reshape(2, rows, columns, 3)
    for r, c in itertools.product(range(rows), range(columns)):
        top, left = r - r % size, c - c % size
        square = grid[:, top : top + size, left : left + size]
        np.testing.assert_array_equal(back[:, r * columns + c], square.max((1, 2)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cell": 5}, "height 16 is not a multiple of policy.cell 5"),
        ({"cell": 8}, "width 20 is not a multiple of policy.cell 8"),
        ({"stride": 3}, "policy.cell 4 is not a multiple of policy.stride 3"),
        ({"patch": 7}, "policy.patch 7 is not a multiple of policy.stride 2"),
        ({"heads": 3}, "policy.width 8 is not a multiple of policy.heads 3"),
        ({"heads": 8}, "is odd"),
    ],
)
def test_sizes_that_do_not_fit_are_told(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change).build(SPACE)


def test_browser_sized_screens_need_no_other_code():
    space = observation_space(210, 160, 300, 40, 64)
    policy = GuiPolicy(cell=5, stride=5, patch=20, pool=4).build(space)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((3, 210, 160, 3), jnp.uint8)
    instruction = jax.ShapeDtypeStruct((3, 40), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    acted = jax.eval_shape(policy.act, params, images, instruction, keys, 1.0)
    assert acted.tokens.shape == acted.logp.shape == acted.entropy.shape == (3, 3)
    assert gpt.parameter_count(params) < 500_000


# -------------------------------------------------------------------------- tower


@pytest.fixture
def checkpoint(tmp_path):
    """A language model in Hugging Face's format, with its tokenizer."""
    tokenizer = tokens.train_bpe(["PRESS THE RED BOX AND OPEN CAT"], 270)
    model = config.resolve_model(
        config.GPT(layers=1, width=16, heads=2), tokenizer.vocab_size
    )
    params = gpt.init_params(model, jax.random.key(5))
    hf.save(tmp_path, model, params, tokenizer=tokenizer)
    tokenizer.save(tmp_path / "tokenizer.json")
    return tmp_path, model, params


@pytest.mark.slow
def test_a_run_with_a_language_model(checkpoint, tmp_path):
    """Through all processes: hosts tokenize, workers and the learner read."""
    folder, _, _ = checkpoint
    sizes = {"features": 4, "width": 8, "heads": 2, "stride": 4}
    run = RLRun(
        out=str(tmp_path / "run"),
        steps=1,
        groups=1,
        policy=GuiPolicy(**sizes, tower=str(folder), typed=len(PixEnv.vocabulary)),
        envs=Envs(
            tasks=("color",),
            hosts=1,
            slots=2,
            max_steps=2,
            tokens=12,
        ),
        rollout=Rollout(workers=1, buckets=(1,)),
        curation=Curation(n_max=2, keep_uninformative=True, experience=False),
        checkpoint=config.Checkpoint(every=1),
    )
    launch.train(run, print)
    space = make_env(complete(run).envs).observation_space
    actor, step = load_actor(run.out, run, space)
    assert step == 1
    found = evaluate_run(run.out, (), range(10**6, 10**6 + 2), ("policy",), workers=1)
    assert found["success"]


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_a_language_model_reads_the_instruction(checkpoint, train):
    folder, model, weights = checkpoint
    env = Tokenized(PixEnv("click"), folder, 12)
    typed = len(PixEnv.vocabulary)
    sizes = {"features": 4, "width": 8, "heads": 2, "stride": 4}
    policy = GuiPolicy(
        **sizes, tower=str(folder), train_tower=train, typed=typed
    ).build(env.observation_space)
    params = policy.init(jax.random.key(0))
    for a, b in zip(
        jax.tree.leaves(params["tower"]), jax.tree.leaves(weights), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    observation, _ = env.reset(seed=0)
    ids = observation["instruction"]
    assert env.observation_space["instruction"].contains(ids)
    text = env.tokenizer.decode(ids[ids > 0] - 1)
    assert text == observation["text"]

    said = policy.tokens(Action(Kind.CLICK))[None]
    inputs = observation["image"][None], ids[None], said, said >= 0

    def total(params):
        return jnp.sum(jnp.where(inputs[3], policy.score(params, *inputs).logp, 0))

    gradient = jax.jit(jax.grad(total))(params)
    size = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(gradient["tower"])))
    assert size > 0 if train else size == 0
    # What it reads counts: as the language model computes it.
    hidden = gpt.GPT(model).apply(
        {"params": weights}, jnp.maximum(ids - 1, 0)[None], features=True
    )
    logits = gpt.GPT(model).apply({"params": weights}, jnp.maximum(ids - 1, 0)[None])
    np.testing.assert_allclose(
        logits, hidden @ weights["embedding"].T, rtol=1e-4, atol=1e-5
    )
