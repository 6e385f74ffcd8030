"""Generation: exact sampling, a cache that changes nothing, rows on their own."""

import dataclasses
import functools
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from jaxlab import config
from jaxlab.errors import ConfigError
from jaxlab.mesh import make_mesh, partition_spec
from jaxlab.models import generate, gpt, hf
from jaxlab.tokens import byte_tokenizer
from tests.test_gpt import MODELS, SMALL, forward, make, tokens

ONE = dataclasses.replace(SMALL, layers=1)
KEY = jax.random.key(7)
SAMPLING = {"temperature": 1.0, "top_k": 12, "top_p": 0.9}
PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5, 8, 9, 7]]


def write(model, params, prompts=PROMPTS, **options):
    options = {"tokens": 6, "key": KEY, "temperature": 0.0} | options
    return np.stack(list(generate.generate(model, params, prompts, **options)), axis=1)


# ----------------------------------------------------------------- sampling


def kept(logits, temperature, top_k, top_p):
    """Tokens that may be drawn and their probabilities, in float64, by definition."""
    logits = np.asarray(logits, np.float64)
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: top_k or None]
    weights = np.exp((logits[order] - logits.max()) / temperature)
    weights /= weights.sum()
    total, chosen = 0.0, []
    for token, weight in zip(order, weights, strict=True):
        if chosen and total >= top_p:
            break
        chosen.append((token, weight))
        total += weight
        if top_p < 1 and abs(total - top_p) < 1e-5:
            return None  # float32 may see it on the other side
    return {token: weight / total for token, weight in chosen}


@settings(deadline=None, max_examples=20)
@given(
    logits=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=6, max_size=6),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.integers(0, 8),
    top_p=st.floats(0, 1),
)
def test_sampling_draws_from_exactly_the_tokens_kept(logits, temperature, top_k, top_p):
    wanted = kept(logits, temperature, top_k, top_p)
    assume(wanted is not None)
    # The least likely token has a share of 1/300 or more: none is missed by chance.
    drawn = generate.sample_token(
        jnp.tile(jnp.array([logits]), (4096, 1)), draws(4096), temperature, top_k, top_p
    )
    assert drawn.dtype == jnp.int32
    assert set(drawn.tolist()) == set(wanted)


@functools.cache
def draws(count):
    return jax.random.split(jax.random.key(0), count)


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (3, 1.0), (0, 0.8), (4, 0.9)])
def test_sampling_frequencies(top_k, top_p):
    logits = [0.3, 2.0, -1.0, 1.0, 1.0, 0.0]
    wanted = kept(logits, 1.5, top_k, top_p)
    count = 4096
    drawn = generate.sample_token(
        jnp.tile(jnp.array([logits]), (count, 1)), draws(count), 1.5, top_k, top_p
    )
    for token in range(6):
        share = wanted.get(token, 0.0)
        deviation = np.sqrt(share * (1 - share) / count)
        assert np.mean(np.asarray(drawn) == token) == pytest.approx(
            share, abs=4.5 * deviation
        )


def test_greedy_takes_the_first_of_the_likeliest_and_needs_no_key():
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, 5.0, 4.0]])
    assert generate.sample_token(logits, draws(2), 0.0).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures(temperature):
    logits = jnp.tile(jnp.array([[1e4, -1e4, 0.0]]), (64, 1))
    drawn = generate.sample_token(logits, draws(64), temperature, 0, 0.999)
    assert set(drawn.tolist()) == ({0} if temperature < 1 else {0, 1, 2})


def test_only_top_k_and_top_p_sort():
    def program(*options):
        lowered = jax.jit(lambda x: generate.sample_token(x, draws(2), *options)).lower(
            jnp.zeros((2, 8))
        )
        return lowered.as_text()

    for options in ((0.0, 3, 0.5), (0.7,), (0.7, 8, 1.0)):
        assert "sort" not in program(*options) and "top_k" not in program(*options)
    assert "top_k" in program(0.7, 3)


# -------------------------------------------------------------------- cache


@pytest.mark.parametrize(
    "name,dtype", [*((name, "float32") for name in MODELS), ("gqa", "bfloat16")]
)
def test_the_cache_changes_no_logit(name, dtype):
    model, params = make(dataclasses.replace(MODELS[name], dtype=dtype))
    x = tokens(2, 9)
    wanted = forward(model)({"params": params}, x)

    @jax.jit
    def step(cache, token_bt, positions_bt):
        return gpt.GPT(model).apply(
            {"params": params}, token_bt, positions_bt=positions_bt, cache=cache
        )

    cache = gpt.empty_cache(model, 2, 12)
    assert cache.k_lbske.dtype == dtype
    for t in range(9):
        at = np.full((2, 1), t, np.int32)
        logits, cache = step(cache, x[:, t : t + 1], at)
        np.testing.assert_allclose(
            logits[:, 0],
            wanted[:, t],
            rtol=1e-4,
            atol=2e-5 if dtype == "float32" else 0.1,
        )


def test_greedy_text_is_the_argmax_of_the_whole_forward_pass():
    model, params = make(ONE)
    written = write(model, params)
    texts = np.zeros((3, 15), np.int32)
    for text, prompt, row in zip(texts, PROMPTS, written, strict=True):
        text[: len(prompt) + 6] = [*prompt, *row]
    likeliest = forward(model)({"params": params}, texts).argmax(-1)
    for prompt, row, wanted in zip(PROMPTS, written, likeliest, strict=True):
        at = len(prompt) - 1
        assert row.tolist() == wanted[at : at + 6].tolist()


def test_rows_do_not_know_of_each_other():
    model, params = make(ONE)
    greedy = write(model, params)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(write(model, params, [prompt])[0], greedy[row])
    drawn = write(model, params, [PROMPTS[2]] * 3, **SAMPLING)
    assert len({tuple(row) for row in drawn}) == 3
    alone = write(model, params, [PROMPTS[2]], **SAMPLING)
    np.testing.assert_array_equal(alone[0], drawn[0])


def test_a_text_cut_short_goes_on_as_it_would_have():
    model, params = make(ONE)

    def text(prompt, **options):
        return write(model, params, [prompt], **SAMPLING, **options)[0].tolist()

    whole = text(PROMPTS[0])
    assert whole == text(PROMPTS[0])
    assert whole[2:] == text([*PROMPTS[0], *whole[:2]], tokens=4)
    assert whole != text(PROMPTS[0], key=jax.random.key(8))


def test_a_long_prompt_goes_in_chunks(monkeypatch):
    model, params = make(ONE)
    prompts = [tokens(70).tolist(), tokens(33).tolist(), [1]]
    wanted = write(model, params, prompts)
    monkeypatch.setattr(generate, "CHUNK", 32)
    np.testing.assert_array_equal(write(model, params, prompts), wanted)


def test_few_shapes_are_compiled():
    model, params = make(ONE)
    write(model, params)
    before = generate.decode._cache_size(), generate.prefill._cache_size()
    for length in (1, 5, 20):
        write(model, params, [[1] * length, [2], [3]], tokens=7)
    write(dataclasses.replace(model, remat="block"), params)
    assert before == (generate.decode._cache_size(), generate.prefill._cache_size())


@settings(deadline=None)
@given(size=st.integers(0, 10**6))
def test_buckets_are_few_and_waste_little(size):
    slots = generate.bucket(size)
    assert size <= slots <= max(32, 1.25 * size + 32)
    assert generate.bucket(slots) == slots
    assert len({generate.bucket(n) for n in range(size, 2 * size, size // 99 + 1)}) <= 9


# ---------------------------------------------------------------- the loop


def test_rows_end_at_their_eos():
    model, params = make(ONE)
    plain = write(model, params, tokens=12)
    ends = [int(plain[0, 3]), int(plain[1, 5])]

    def stop(row, ends):
        """Place of the first end, or of the last token."""
        return next((i for i, token in enumerate(row) if token in ends), 11)

    written = write(model, params, tokens=12, eos=ends)
    stops = [stop(row, ends) for row in plain]
    assert written.shape == (3, max(stops) + 1)
    for got, row, last in zip(written, plain, stops, strict=True):
        np.testing.assert_array_equal(got[: last + 1], row[: last + 1])
        assert (got[last:] == row[last]).all()

    alone = write(model, params, [PROMPTS[0]], tokens=12, eos=ends[0])
    assert alone.shape == (1, stop(plain[0], ends[:1]) + 1)


def test_tokens_come_one_by_one(monkeypatch):
    model, params = make(ONE)
    calls, decode = [], generate.decode

    def counted(*args, **options):
        calls.append(1)
        return decode(*args, **options)

    monkeypatch.setattr(generate, "decode", counted)
    stream = generate.generate(
        model, params, PROMPTS, tokens=20, key=KEY, temperature=0.0
    )
    for number in range(1, 20):
        token_b = next(stream)
        assert token_b.shape == (3,) and token_b.dtype == np.int32
        assert len(calls) == number + 1  # one ahead, for the device
    assert len(list(stream)) == 1 and len(calls) == 20
    assert not list(generate.generate(model, params, PROMPTS, tokens=0, key=KEY))


def test_no_token_beyond_the_tokenizer():
    model, params = make(ONE)
    assert write(model, params, [[1]], **SAMPLING, tokens=20).max() > 7
    assert write(model, params, [[1]], **SAMPLING, tokens=20, vocab=8).max() <= 7


@pytest.mark.parametrize(
    "prompts,options,message",
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 32]], {}, "token 32, and the model's vocabulary ends at 31"),
        ([[-1]], {}, "token -1"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1, and must be at least 0"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5, and must be from 0 to 1"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"tokens": -2}, "tokens is -2"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(prompts, options, message):
    model = config.resolve_model(SMALL, 32)
    with pytest.raises(ConfigError, match=message):
        generate.generate(model, None, prompts, **{"tokens": 1, "key": KEY} | options)


def test_weights_on_a_mesh_write_the_same(capfd):
    model, params = make(dataclasses.replace(ONE, tied=False))
    wanted = write(model, params, **SAMPLING)
    mesh = make_mesh(config.MeshShape(data=2, fsdp=2, tensor=2))
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, partition_spec(names)),
        gpt.param_names(model),
        is_leaf=lambda names: isinstance(names, tuple),
    )
    params = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(write(model, params, **SAMPLING), wanted)
        cache = generate.new_cache(model, 4, 32)
        zeros_b = np.zeros(4, np.int32)
        token_b, _, cache = generate.decode(
            model, params, cache, zeros_b, zeros_b, KEY, **SAMPLING, vocab=None
        )
    assert token_b.is_fully_replicated
    assert cache.k_lbske.sharding.shard_shape(cache.k_lbske.shape) == (1, 1, 32, 1, 4)
    # The partitioner complains where it must copy what it could have cut.
    assert "Involuntary" not in capfd.readouterr().err


# -------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent.parent / "scripts/generate.py"
    spec = importlib.util.spec_from_file_location("generate_script", path)
    module = importlib.util.module_from_spec(spec)
    # tyro reads the fields' docstrings from the source of a module it can find.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Hugging Face folder with a byte tokenizer; its vocabulary is rounded up."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    model, params = make(dataclasses.replace(ONE, vocab=320))
    hf.save(folder, model, params, byte_tokenizer())
    return folder


def run(script, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        script.run_main(script.main, [str(x) for x in arguments])
    return stop.value.code, *capsys.readouterr()


def test_script_streams_text(script, checkpoint, capsys):
    line = (checkpoint, "--prompt", "déf ", "--tokens", 20, "--top-k", 200)
    code, first, errors = run(script, capsys, *line, "--seed", 1)
    assert code == 0 and not errors
    assert first.startswith("déf ") and first.endswith("\n") and len(first) > 10
    assert run(script, capsys, *line, "--seed", 1)[1] == first
    assert run(script, capsys, *line, "--seed", 2)[1] != first
    code, empty, _ = run(script, capsys, checkpoint, *line[3:], "--tokens", 4)
    assert code == 0 and len(empty) <= 4 + 1


@pytest.mark.parametrize(
    "arguments,code,message",
    [
        (["nowhere"], 1, "nowhere"),
        (["nowhere", "--temprature", "1"], 2, "--temperature"),
        ([], 2, "FOLDER"),
        (["CHECKPOINT", "--prompt", "x", "--top-p", "2"], 2, "top_p is 2"),
    ],
)
def test_script_says_in_one_line_what_is_wrong(
    script, checkpoint, capsys, arguments, code, message
):
    words = [str(checkpoint) if x == "CHECKPOINT" else x for x in arguments]
    got, _, errors = run(script, capsys, *words)
    assert got == code
    assert errors.count("\n") == 1 and message in errors and "Traceback" not in errors
