"""The `config.json` of a Hugging Face checkpoint, and what is beside the weights.

What a config asks for and the model does not have is refused by name, never left
out. transformers 5 writes the rotary settings as `rope_parameters`, older versions
as `rope_theta` and `rope_scaling`; both are read, and the older form, which both
versions read, is written.
"""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jaxlab import config
from jaxlab.errors import ConfigError, UserError

# Architecture -> what its transformers config means by a field that is not there.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen3ForCausalLM": {"num_key_value_heads": 32, "head_dim": 128},
}

# The one value that the model can do of fields that change the computation.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder's config.json is Hugging Face's (and not that of a run)."""
    try:
        values = json.loads((Path(folder) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and bool(
        {"architectures", "model_type"} & {*values}
    )


def load_config(folder: str | Path) -> config.GPT:
    """The model that a checkpoint's config.json describes.

    Args:
        folder: the checkpoint.

    Returns:
        a resolved config, with the defaults of `scan`, `remat` and `dtype`, which say
        how a model runs and not what it computes.

    Raises:
        UserError: no config.json, an architecture or a feature that the model does
            not have, or a field that is missing or no number.
    """
    path = Path(folder) / "config.json"
    values = read_object(path)
    kind = _architecture(values, path)
    values = _DEFAULTS[kind] | values
    if kind == "Qwen3ForCausalLM" and not values.get("use_sliding_window"):
        values.pop("sliding_window", None)  # its size alone does not turn it on
    for field, only in _ONLY.items():
        if values.get(field) not in (only, None):
            raise UserError(f"{path}: {field} {short(values[field])} is not supported")
    integer = partial(_integer, values, path)
    layers = integer("num_hidden_layers")
    if values.get("layer_types") not in (None, ["full_attention"] * layers):
        raise UserError(
            f"{path}: layer_types {short(values['layer_types'])} is not supported"
        )
    tied = values.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise UserError(f"{path}: tie_word_embeddings is {short(tied)}, not a boolean")
    width, heads = integer("hidden_size"), integer("num_attention_heads")
    theta, scaling = _rope(values, path)
    model = config.GPT(
        vocab=integer("vocab_size"),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", width // heads),
        mlp=integer("intermediate_size"),
        tied=tied,
        qk_norm=kind == "Qwen3ForCausalLM",
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_float(values, path, "rms_norm_eps", 1e-6),
    )
    try:
        return config.resolve_model(model, integer("vocab_size"))
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None


def _architecture(values: dict, path: Path) -> str:
    by_type = {name.removesuffix("ForCausalLM").lower(): name for name in _DEFAULTS}
    kind, names = str(values.get("model_type")), values.get("architectures")
    if not isinstance(names, list) or not names:
        names = [by_type.get(kind, kind)]
    name = str(names[0])
    if name not in _DEFAULTS:
        raise UserError(
            f"{path}: architecture {name} is not supported; these are: "
            + ", ".join(_DEFAULTS)
        )
    return name


def _rope(values: dict, path: Path) -> tuple[float, config.RopeScaling | None]:
    """Base and scaling; transformers 5 calls both `rope_parameters`."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(x, dict) for x in rope.values()):
        raise UserError(f"{path}: rotary embeddings by layer type are not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = _float({**values, **rope}, path, "rope_theta", 10000.0)
    if rope.get("partial_rotary_factor") not in (1, None):
        raise UserError(f"{path}: partial_rotary_factor is not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(
            f"{path}: rope type {kind!r} is not supported; 'default' and 'llama3' are"
        )
    name = "original_max_position_embeddings"
    longest = _integer(values, path, "max_position_embeddings", 2048)
    number = partial(_float, rope, path)
    scaling = config.RopeScaling(
        factor=number("factor"),
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        original_length=_integer({**rope, **values}, path, name, longest),
    )
    return theta, scaling


def _integer(
    values: Mapping, path: Path, field: str, default: int | None = None
) -> int:
    value = values.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {field} is {short(value)}, not a positive integer")
    return value


def _float(
    values: Mapping, path: Path, field: str, default: float | None = None
) -> float:
    value = values.get(field)
    value = default if value is None else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if 0 < value < math.inf:
            return float(value)
    raise UserError(f"{path}: {field} is {short(value)}, not a positive number")


def short(value: Any) -> str:
    """A JSON value for an error message."""
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that must hold an object.

    Raises:
        UserError: it cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def settings(model: config.GPT, tokenizer: Any, dtype: str, context: int) -> dict:
    """What goes into the config.json of a model.

    Args:
        model: resolved config.
        tokenizer: a `jaxlab.tokens.Tokenizer` that names the end of a text, or None.
        dtype: type of the tensors.
        context: sequence length the model was trained with.

    Raises:
        UserError: transformers has no such model.
    """
    if model.activation != "swiglu":
        raise UserError(
            f"a model with activation {model.activation} has no Llama form; only "
            "swiglu can be saved for Hugging Face"
        )
    if model.width % model.heads and not model.qk_norm:
        raise UserError(
            f"transformers' Llama wants a width ({model.width}) that is a multiple of "
            f"the heads ({model.heads})"
        )
    scaling = model.rope_scaling
    rope = scaling and {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
    kind = "qwen3" if model.qk_norm else "llama"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "intermediate_size": model.mlp,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": model.tied,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None if tokenizer is None else tokenizer.eos,
        "torch_dtype": dtype,
    }


def end_tokens(folder: str | Path) -> list[int]:
    """Tokens that end a text, by generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        value = read_object(path).get("eos_token_id") if path.exists() else None
        if value is not None:
            return value if isinstance(value, list) else [value]
    return []


def encode_prompt(folder: str | Path, text: str) -> list[int]:
    """Token numbers of a text with what the model expects before it (BOS).

    They are those of `transformers.AutoTokenizer`: the special tokens are the ones
    that the tokenizer.json itself adds.
    """
    from tokenizers import Tokenizer

    from jaxlab.tokens import load_tokenizer

    path = Path(folder) / "tokenizer.json"
    if "model" not in read_object(path):  # jaxlab's byte tokenizer
        return load_tokenizer(path).encode(text).tolist()
    tokenizer: Any = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    return tokenizer.encode(text).ids
