"""Hugging Face checkpoints: against transformers itself, and against bad folders."""

import copy
import dataclasses
import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from jaxlab import config
from jaxlab.errors import UserError
from jaxlab.mesh import make_mesh, partition_spec
from jaxlab.models import generate, gpt, hf
from jaxlab.tokens import byte_tokenizer, load_tokenizer, train_bpe
from tests.test_gpt import SMALL, forward, make, tokens

peer = pytest.mark.requires("torch", "transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THEIRS = {
    "llama-gqa": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}}),
    "llama-head_dim": ("Llama", {"head_dim": 8, "rms_norm_eps": 1e-3}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen3": ("Qwen3", {"head_dim": 6, "tie_word_embeddings": True}),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Maker of a transformers model with random weights, and of its folder."""
    import torch
    import transformers

    torch.set_num_threads(1)  # the models are tiny, and the machine is shared
    made = {}

    def get(name):
        if name not in made:
            family, settings = THEIRS[name]
            torch.manual_seed(0)
            model = getattr(transformers, f"{family}ForCausalLM")(
                getattr(transformers, f"{family}Config")(**TINY | settings)
            ).eval()
            with torch.no_grad():  # norms that are not all ones
                for key, x in model.named_parameters():
                    if "norm" in key:
                        x.add_(0.2 * torch.randn_like(x))
            folder = tmp_path_factory.mktemp("theirs") / name
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return get


def their_logits(model, x):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(x)).long()).logits.float().numpy()


# ------------------------------------------------------ against transformers


@peer
@pytest.mark.parametrize("name", THEIRS)
def test_logits_are_those_of_transformers(theirs, name):
    model, folder = theirs(name)
    x = tokens(2, 24)
    ours, params = hf.load_params(folder)
    got = forward(ours)({"params": params}, x)
    np.testing.assert_allclose(got, their_logits(model, x), atol=1e-4, rtol=1e-4)


@peer
@pytest.mark.parametrize("name", ["llama3-rope", "qwen3"])
def test_greedy_text_is_that_of_transformers(theirs, name):
    import torch

    model, folder = theirs(name)
    ours, params = hf.load_params(folder)
    prompts = tokens(2, 5)
    theirs_bt = model.generate(
        torch.from_numpy(prompts).long(),
        attention_mask=torch.ones(2, 5, dtype=torch.long),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    stream = generate.generate(
        ours, params, [*prompts], tokens=20, key=jax.random.key(0), temperature=0.0
    )
    np.testing.assert_array_equal(np.stack([*stream], 1), theirs_bt.numpy()[:, 5:])


@peer
def test_older_rope_fields_mean_the_same(theirs, tmp_path):
    model, folder = theirs("llama3-rope")
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old/config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(values))
    assert hf.load_config(path.parent) == hf.load_config(folder)
    assert hf.load_config(folder).rope_theta == 500.0


@peer
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_files_in_several_shards(theirs, tmp_path, kind):
    import torch
    from transformers import AutoModelForCausalLM

    model, _ = theirs("llama-gqa")
    half = copy.deepcopy(model).to(getattr(torch, kind))
    half.save_pretrained(tmp_path, max_shard_size=4000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    there = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, params = hf.load_params(tmp_path)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    x = tokens(2, 24)
    got = forward(ours)({"params": params}, x)
    np.testing.assert_allclose(got, their_logits(there, x), atol=1e-4, rtol=1e-4)


OURS = {
    "tied": dataclasses.replace(SMALL, vocab=320),
    "untied-scan": dataclasses.replace(SMALL, vocab=320, tied=False, scan=True),
    "rope-head_dim": dataclasses.replace(
        SMALL,
        vocab=320,
        head_dim=6,
        norm_eps=1e-3,
        rope_scaling=config.RopeScaling(4.0, 1.0, 4.0, original_length=16),
    ),
    "qk_norm": dataclasses.replace(SMALL, vocab=320, qk_norm=True),
}


@peer
@pytest.mark.parametrize("name", OURS)
def test_transformers_loads_what_we_save(tmp_path, name):
    from transformers import AutoModelForCausalLM

    model, params = make(OURS[name])
    hf.save(tmp_path / "out", model, params, byte_tokenizer(), max_shard_size=10_000)
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    there, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    assert there.config.eos_token_id == 256
    x = tokens(2, 24)
    got = forward(model)({"params": params}, x)
    np.testing.assert_allclose(got, their_logits(there, x), atol=1e-4, rtol=1e-4)


@peer
def test_transformers_opens_our_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    bpe = train_bpe(["def f(x): return x + 1\n" * 9], 300)
    model, params = make(dataclasses.replace(SMALL, vocab=320))
    hf.save(tmp_path / "out", model, params, bpe)
    there = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def g(ä): return 2"
    assert there(text)["input_ids"] == bpe.encode(text).tolist()
    assert there(text)["input_ids"] == hf.encode_prompt(tmp_path / "out", text)
    assert there.eos_token_id == bpe.eos


# ------------------------------------------------------------- round trip


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", OURS)
def test_what_was_saved_loads_bit_for_bit(tmp_path, name):
    model, params = make(OURS[name])
    hf.save(tmp_path / "a", model, params)
    hf.save(tmp_path / "b", model, params, max_shard_size=5000)
    for folder in ("a", "b"):
        found, again = hf.load_params(tmp_path / folder)
        assert found == dataclasses.replace(model, scan=False)
        found, again = hf.load_params(tmp_path / folder, model)
        assert found == model
        equal(again, params)
    sizes = [path.stat().st_size for path in (tmp_path / "b").glob("*.safetensors")]
    assert len(sizes) > 3
    table = 320 * 16 * 4  # too large for a file of 5000 bytes: one of its own
    assert sorted(sizes)[-1] < table + 1000
    index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
    numbers = sum(x.size for x in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == 4 * numbers


def test_scanned_and_unrolled_models_share_their_files(tmp_path):
    model, params = make(SMALL)
    hf.save(tmp_path / "out", model, params)
    _, stacked = hf.load_params(tmp_path / "out", dataclasses.replace(model, scan=True))
    for i in range(model.layers):
        equal(
            jax.tree.map(lambda x, i=i: x[i], stacked["layers"]), params[f"layer_{i}"]
        )


def test_bfloat16_files_are_half_as_large(tmp_path):
    model, params = make(SMALL)
    hf.save(tmp_path / "out", model, params, dtype="bfloat16")
    file = load_file(tmp_path / "out/model.safetensors")
    assert {x.dtype for x in file.values()} == {np.dtype(ml_dtypes.bfloat16)}
    _, again = hf.load_params(tmp_path / "out")
    equal(again, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype("f4"), params))


@pytest.mark.parametrize("scan", [False, True])
def test_weights_go_straight_to_their_devices(tmp_path, scan):
    model, params = make(dataclasses.replace(SMALL, tied=False, scan=scan))
    hf.save(tmp_path / "out", model, params)
    mesh = make_mesh(config.MeshShape(data=2, fsdp=2, tensor=2))
    shardings = jax.tree.map(
        lambda names: NamedSharding(mesh, partition_spec(names)),
        gpt.param_names(model),
        is_leaf=lambda names: isinstance(names, tuple),
    )
    _, placed = hf.load_params(tmp_path / "out", model, shardings)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(str(s)), placed, shardings)
    equal(placed, params)
    hf.save(tmp_path / "again", model, placed)
    equal(hf.load_params(tmp_path / "again", model)[1], params)


def test_loading_needs_little_more_than_the_model(tmp_path):
    wide = {"layers": 4, "width": 256, "mlp": 1024}
    model, params = make(dataclasses.replace(SMALL, **wide))
    hf.save(tmp_path / "out", model, params)
    tracemalloc.start()  # sees NumPy's memory
    try:
        _, again = hf.load_params(tmp_path / "out")
        final, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    weights = [x.nbytes for x in jax.tree.leaves(again)]
    # A kernel is read as it lies in the file and turned; and JAX traces the model.
    bound = 3 * max(weights) + 3_000_000
    assert peak - final < bound < sum(weights) / 2


def test_the_tokenizer_travels_with_the_model(tmp_path):
    model, params = make(dataclasses.replace(SMALL, vocab=320))
    hf.save(tmp_path / "out", model, params, byte_tokenizer(), context=128)
    assert load_tokenizer(tmp_path / "out").fingerprint == byte_tokenizer().fingerprint
    assert hf.encode_prompt(tmp_path / "out", "aä") == [97, 195, 164]
    assert hf.end_tokens(tmp_path / "out") == [256]
    (tmp_path / "out/generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert hf.end_tokens(tmp_path / "out") == [3, 4]
    assert hf.is_checkpoint(tmp_path / "out")
    assert not hf.is_checkpoint(tmp_path)


# --------------------------------------------------------------- bad input


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint in two files, to be spoiled."""
    model, params = make(SMALL)
    hf.save(tmp_path / "model", model, params, max_shard_size=10_000)
    return tmp_path / "model"


def edit(path, **changes):
    values = json.loads(path.read_text())
    values |= {k: v for k, v in changes.items() if v != "gone"}
    for key in [k for k, v in changes.items() if v == "gone"]:
        del values[key]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; "),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": None, "model_type": "gemma3"}, "gemma3 is not supported"),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window 4096"),
        ({"use_sliding_window": True}, "use_sliding_window true"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types .*sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor is null"),
        ({"rope_parameters": {"full_attention": {}}}, "by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": "gone"}, "hidden_size is null, not a positive integer"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({"rms_norm_eps": "small"}, 'rms_norm_eps is "small"'),
        ({"num_attention_heads": 3}, "heads 3 is not a multiple of model.kv_heads 2"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"intermediate_size": 32}, r"down_proj.weight is \[16, 24\].*\[16, 32\]"),
        ({"vocab_size": 33}, r"embed_tokens.weight is \[32, 16\].*\[33, 16\]"),
        ({"num_hidden_layers": 3}, "lacks tensor model.layers.2.*and 8 more"),
        ({"num_hidden_layers": 1}, "unknown tensor model.layers.1.*and 8 more"),
        ({"tie_word_embeddings": False}, "lacks tensor lm_head.weight$"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "lacks tensor .*_norm.weight"),
    ],
)
def test_what_the_model_cannot_do_is_named(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        hf.load_params(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_size_alone_turns_no_window_on(folder):
    edit(
        folder / "config.json",
        architectures=["Qwen3ForCausalLM"],
        sliding_window=4096,
        use_sliding_window=False,
        layer_types=["full_attention"] * 2,
    )
    assert hf.load_config(folder).qk_norm


def test_another_model_than_the_one_asked_for(folder):
    model = config.resolve_model(dataclasses.replace(SMALL, mlp=32), 32)
    with pytest.raises(UserError, match="has mlp 24, and the model to load has 32"):
        hf.load_params(folder, model)


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])


def integers(folder):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].astype(np.int8)}, path)


def pickled(folder):
    for path in folder.glob("model*"):
        path.unlink()
    # Protocol 0 of an object whose reading would end this process.
    (folder / "pytorch_model.bin").write_bytes(b"cos\n_exit\n(I3\ntR.")


def name_in_index(name):
    def spoil(folder):
        path = folder / "model.safetensors.index.json"
        weights = json.loads(path.read_text())["weight_map"]
        edit(path, weight_map=weights | {min(weights): name})

    return spoil


@pytest.mark.parametrize(
    "spoil,message",
    [
        (truncate, "model-00001-of-00002.safetensors is damaged or cut short"),
        (integers, "is I8, not floating point"),
        (pickled, "pytorch_model.bin, a pickle"),
        (
            name_in_index("../model/x.safetensors"),
            "'../model/x.safetensors', a file out",
        ),
        (name_in_index("/etc/x.safetensors"), "outside its own folder"),
        (name_in_index("pytorch_model.bin"), "not a .safetensors file"),
        (name_in_index(7), "names 7"),
        (name_in_index("model-9.safetensors"), "lacks the file model-9.safetensors"),
        (lambda f: (f / "config.json").unlink(), "cannot read .*config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{}"),
            "has no weight_map",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            "has no model.safetensors",
        ),
        (lambda f: shutil.rmtree(f), "cannot read"),
    ],
)
def test_damage_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        hf.load_params(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_second_copy_of_tied_weights(tmp_path):
    model, params = make(SMALL)
    hf.save(tmp_path / "out", model, params)
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    save_file(tensors | old | {"lm_head.weight": table}, path)
    equal(hf.load_params(tmp_path / "out")[1], params)
    save_file(tensors | {"lm_head.weight": table + 1}, path)
    with pytest.raises(UserError, match="tie_word_embeddings is true, and lm_head"):
        hf.load_params(tmp_path / "out")


def test_saving_is_all_or_nothing(tmp_path):
    model, params = make(SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="full is not empty"):
        hf.save(tmp_path / "full", model, params)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/model"):
        hf.save(tmp_path / "file/model", model, params)
    (tmp_path / "empty").mkdir()
    hf.save(tmp_path / "empty", model, params)

    def stop():
        raise KeyboardInterrupt

    class Half:
        eos = 0

        def save(self, path):
            stop()

    with pytest.raises(KeyboardInterrupt):
        hf.save(tmp_path / "half", model, params, Half())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"full", "file", "empty"}
    assert {p.name for p in (tmp_path / "full").iterdir()} == {"thesis.txt"}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"activation": "gelu"}, "activation gelu has no Llama form"),
        ({"heads": 3, "kv_heads": 3, "head_dim": 4}, "multiple of the heads"),
    ],
)
def test_models_that_transformers_does_not_have(tmp_path, changes, message):
    model = config.resolve_model(dataclasses.replace(SMALL, **changes), 32)
    with pytest.raises(UserError, match=message):
        hf.save(tmp_path / "out", model, {})
    assert not list(tmp_path.iterdir())
