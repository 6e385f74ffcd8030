"""Hugging Face checkpoints of the Llama family: read them, write them.

A checkpoint is a folder with a `config.json` (see `jaxlab.models.hf_config`) and
`.safetensors` files. Weights are read tensor by tensor, and of each tensor only
what this process's devices hold. Nothing is ever unpickled.

Supported: `LlamaForCausalLM`, `MistralForCausalLM` without sliding window and
`Qwen3ForCausalLM` (QK-norm), each with plain or Llama 3 rotary embeddings. The
computation is that of transformers 5.23 (`models/llama/modeling_llama.py`).
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import config
from jaxlab.errors import UserError
from jaxlab.models import gpt
from jaxlab.models.hf_config import (
    encode_prompt,
    end_tokens,
    is_checkpoint,
    load_config,
    read_object,
    settings,
    short,
)

__all__ = [
    "encode_prompt",
    "end_tokens",
    "is_checkpoint",
    "load_config",
    "load_params",
    "save",
]

# Our parameter -> tensor, both within a layer.
_LAYER = {
    "attention_norm/scale": "input_layernorm",
    "attention/q/kernel": "self_attn.q_proj",
    "attention/k/kernel": "self_attn.k_proj",
    "attention/v/kernel": "self_attn.v_proj",
    "attention/out/kernel": "self_attn.o_proj",
    "attention/q_norm/scale": "self_attn.q_norm",
    "attention/k_norm/scale": "self_attn.k_norm",
    "mlp_norm/scale": "post_attention_layernorm",
    "mlp/gate/kernel": "mlp.gate_proj",
    "mlp/up/kernel": "mlp.up_proj",
    "mlp/down/kernel": "mlp.down_proj",
}
_TOP = {
    "embedding": "model.embed_tokens",
    "norm/scale": "model.norm",
    "output": "lm_head",
}
_FLOATS = ("F64", "F32", "BF16", "F16")
_EXECUTION = ("scan", "remat", "dtype")  # how a model runs, not what it computes


# --------------------------------------------------------------------- load


def load_params(
    folder: str | Path, model: config.GPT | None = None, shardings: Any = None
) -> tuple[config.GPT, Any]:
    """Reads the weights of a checkpoint.

    Args:
        folder: config.json with model.safetensors, or with several files and their
            model.safetensors.index.json; tensors in float32, bfloat16 or float16.
        model: what the checkpoint must be, as a resolved config; its `scan`,
            `remat` and `dtype` are free. None: what the folder says.
        shardings: where each array goes, a tree like the parameters; None: the
            default device.

    Returns:
        the model's config, and its parameters in float32. On the host there is one
        array at a time (with `scan` a stack over all layers).

    Raises:
        UserError: an unsupported or damaged checkpoint, by the name of the file,
            field or tensor at fault.
    """
    folder = Path(folder).expanduser()
    found = load_config(folder)
    model = found if model is None else model
    for field, value in vars(model).items():
        if field not in _EXECUTION and getattr(found, field) != value:
            raise UserError(
                f"{folder} has {field} {getattr(found, field)}, and the model to "
                f"load has {value}"
            )
    shapes = jax.eval_shape(lambda: gpt.init_params(model, jax.random.key(0)))
    with _open_tensors(folder) as tensors:
        _check_names(folder, tensors, model, shapes)

        def load(path, shape, sharding=None):
            names, stacked = _tensor_names(path, model.layers)
            wanted = shape.shape[1:] if stacked else shape.shape
            flip = _is_kernel(path)
            _check_tensors(folder, tensors, names, wanted[::-1] if flip else wanted)
            read = partial(_read, tensors, names, stacked, flip)
            if sharding is None:
                array = jax.device_put(read((slice(None),) * len(shape.shape)))
            else:
                array = jax.make_array_from_callback(shape.shape, sharding, read)
            # The host's copy lives until the device has its own.
            return array.block_until_ready()

        rest = () if shardings is None else (shardings,)
        return model, jax.tree.map_with_path(load, shapes, *rest)


def _tensor_names(path: tuple[Any, ...], layers: int) -> tuple[list[str], bool]:
    """Tensors of a parameter, and whether they are stacked along a first axis."""
    first, *rest = (key.key for key in path)
    inner = "/".join(rest)
    if first == "layers":  # scanned: one array for all
        numbers = range(layers)
        return [f"model.layers.{i}.{_LAYER[inner]}.weight" for i in numbers], True
    if first.startswith("layer_"):
        return [f"model.layers.{first[6:]}.{_LAYER[inner]}.weight"], False
    return [_TOP["/".join((first, *rest))] + ".weight"], False


def _is_kernel(path: tuple[Any, ...]) -> bool:
    """Whether a tensor is [out, in] and the parameter [in, out]."""
    return path[-1].key in ("kernel", "output")


def _read(
    tensors: Mapping[str, Any],
    names: list[str],
    stacked: bool,
    flip: bool,
    index: Any,
) -> np.ndarray:
    """The part of a parameter at `index`, a tuple of slices; float32."""
    part = index[1:] if stacked else index

    def one(name):
        x = tensors[name].get_slice(name)[part[::-1] if flip else part]
        return (x.T if flip else x).astype(np.float32)

    if not stacked:
        return one(names[0])
    chosen = names[index[0]]
    first = one(chosen[0])
    whole = np.empty((len(chosen), *first.shape), np.float32)
    for i, name in enumerate(chosen):
        whole[i] = one(name) if i else first
    return whole


@contextlib.contextmanager
def _open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """The open file of each tensor of a checkpoint."""
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as stack:
        tensors = {}
        for name in _weight_files(folder):
            path = folder / name
            try:
                file: Any = stack.enter_context(safe_open(path, framework="np"))
            except OSError:
                raise UserError(f"{folder} lacks the file {name}") from None
            except SafetensorError as error:
                raise UserError(
                    f"{path} is damaged or cut short ({error}); fetch it again"
                ) from None
            tensors |= dict.fromkeys(file.keys(), file)
        yield tensors


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        _refuse_pickles(folder)
        return ["model.safetensors"]
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index} has no weight_map")
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {short(name)}, not a .safetensors file")
        if Path(name).name != name or "\\" in name:
            raise UserError(f"{index} names {name!r}, a file outside its own folder")
    return sorted(set(names.values()))


def _refuse_pickles(folder: Path) -> None:
    if (folder / "model.safetensors").exists():
        return
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt")
    pickled = sorted(p.name for pattern in patterns for p in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run any "
            "code when read; convert it to safetensors"
        )
    raise UserError(f"{folder} has no model.safetensors")


def _check_names(folder: Path, tensors: dict, model: config.GPT, shapes: Any) -> None:
    """That the tensors are the model's, no more and no fewer."""
    paths = [path for path, _ in jax.tree.leaves_with_path(shapes)]
    wanted = {n for path in paths for n in _tensor_names(path, model.layers)[0]}
    missing = sorted(wanted - set(tensors))
    # Old checkpoints carry the rotary frequencies, which follow from the config.
    extra = {x for x in tensors if not x.endswith(".rotary_emb.inv_freq")} - wanted
    if model.tied and "lm_head.weight" in extra and not missing:
        extra.discard("lm_head.weight")
        pair = ("lm_head.weight", "model.embed_tokens.weight")
        head, table = (tensors[name].get_tensor(name) for name in pair)
        if not np.array_equal(head, table):
            raise UserError(
                f"{folder}: tie_word_embeddings is true, and lm_head.weight is not "
                "model.embed_tokens.weight; set it to false in config.json"
            )
    for names, what in ((missing, "lacks"), (sorted(extra), "has the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{folder} {what} tensor {names[0]}{more}")


def _check_tensors(
    folder: Path, tensors: dict, names: list[str], wanted: tuple[int, ...]
) -> None:
    for name in names:
        part = tensors[name].get_slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if shape != tuple(wanted):
            raise UserError(
                f"{folder}: tensor {name} is {list(shape)}, and config.json makes it "
                f"{list(wanted)}"
            )
        if dtype not in _FLOATS:
            raise UserError(f"{folder}: tensor {name} is {dtype}, not floating point")


# --------------------------------------------------------------------- save


def save(
    folder: str | Path,
    model: config.GPT,
    params: Any,
    tokenizer: Any = None,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    context: int = 2048,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint that transformers loads.

    All of it is written beside `folder` and then renamed, so `folder` is whole or
    not there.

    Args:
        folder: a new or empty folder.
        model: resolved config.
        params: its weights; every array must be within reach of this process.
        tokenizer: what goes into tokenizer.json (a `jaxlab.tokens.Tokenizer`).
        dtype: type of the tensors in the file.
        context: sequence length the model was trained with (tokens); a note for
            the programs that load it (`max_position_embeddings`).
        max_shard_size: largest size of a file in bytes; a larger tensor has one of
            its own.

    Raises:
        UserError: the model has no such form in transformers, or the folder is not
            empty or cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    config_json = settings(model, tokenizer, dtype, context)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; name a new folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            _write_tensors(temporary, params, model, dtype, max_shard_size)
            if tokenizer is not None:
                tokenizer.save(temporary / "tokenizer.json")
            _write_json(temporary / "config.json", config_json)
            os.chmod(temporary, 0o755)
            for path in temporary.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error


def _write_tensors(folder, params, model, dtype, max_shard_size) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # Sizes first, then one file's worth of arrays at a time.
    shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = []
    total, size = 0, math.inf
    for name, shape, fetch in _tensors_to_write(params, model.layers, jnp.dtype(dtype)):
        bytes_ = math.prod(shape) * jnp.dtype(dtype).itemsize
        if size + bytes_ > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append((name, fetch))
        total, size = total + bytes_, size + bytes_
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [
            f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            for i in range(len(shards))
        ]
    for file, shard in zip(names, shards, strict=True):
        arrays = {name: fetch() for name, fetch in shard}
        try:
            save_file(arrays, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"cannot write {folder / file}: {error}") from error
    if len(shards) > 1:
        places = zip(names, shards, strict=True)
        weight_map = {name: file for file, shard in places for name, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _tensors_to_write(params, layers, dtype):
    """Name, shape and maker of each tensor, in the order of the parameters."""

    def fetch(x, layer, flip):
        array = np.asarray(x) if layer is None else np.asarray(x)[layer]
        return np.ascontiguousarray((array.T if flip else array).astype(dtype))

    for path, x in jax.tree.leaves_with_path(params):
        names, stacked = _tensor_names(path, layers)
        flip = _is_kernel(path)
        shape = x.shape[1:] if stacked else x.shape
        for i, name in enumerate(names):
            yield name, shape, partial(fetch, x, i if stacked else None, flip)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
