"""What a run is: frozen dataclasses, their file format and their checks.

A config file (`configs/*.py`) is ordinary Python that exposes `config() -> Run`;
the command line edits single fields of it (`--optimizer.lr 1e-3`), and
`runs/<name>/config.json` is the exact record from which it can be run again.
Nothing here touches a device: a bad combination fails before compilation, with
both values in the message.
"""

import dataclasses
import difflib
import importlib.util
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxlab.errors import ConfigError
from jaxlab.optimizers import AdamW, NoLoCo


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of the rotary embeddings as Llama 3.1 defines it."""

    factor: float = 8.0
    """how much longer the context is than the original one"""
    low_freq_factor: float = 1.0
    """wavelengths above original_length / this are stretched by `factor`"""
    high_freq_factor: float = 4.0
    """wavelengths below original_length / this are left alone"""
    original_length: int = 8192
    """context length of the unscaled model, in tokens"""


@dataclass(frozen=True)
class GPT:
    """Decoder-only transformer: RMSNorm, rotary embeddings, gated MLP, GQA."""

    vocab: int | None = None
    """vocabulary; None: the tokenizer's, rounded up to a multiple of 64"""
    layers: int = 6
    """number of blocks"""
    width: int = 256
    """width of the residual stream"""
    heads: int = 4
    """query heads"""
    kv_heads: int | None = None
    """key and value heads; None: as many as query heads"""
    head_dim: int | None = None
    """width of a head; None: width / heads"""
    mlp: int | None = None
    """hidden width of the MLP; None: 4 x width (8/3 x for swiglu, to 64)"""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu (gated, three matrices) or gelu (tanh form, two matrices)"""
    tied: bool = True
    """share the embedding with the output matrix"""
    qk_norm: bool = False
    """RMSNorm on each query and key head"""
    rope_theta: float = 10000.0
    """base of the rotary frequencies"""
    rope_scaling: RopeScaling | None = None
    """Llama 3 frequency scaling"""
    norm_eps: float = 1e-5
    """epsilon of RMSNorm"""
    scan: bool = False
    """compile one block and scan it over the layers (slower on CPU)"""
    remat: Literal["none", "block", "dots"] = "none"
    """recompute in the backward pass: each block, or all but its matmuls"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute type; the weights are float32 always"""


@dataclass(frozen=True)
class Data:
    """Where the text comes from and how it becomes tokens."""

    corpus: str = "stdlib"
    """stdlib, pydocs, linuxdocs, or a folder, glob, .txt, .jsonl or .parquet"""
    tokenizer: str = "bytes"
    """bytes, bpe:4096 (trained on the corpus), a tokenizer.json, or init: the one
    beside the weights of init.path"""
    text_field: str = "text"
    """field of a .jsonl or .parquet row that holds the text"""
    eval_fraction: float = 0.01
    """share of the documents held out for evaluation"""
    isolate_documents: bool = False
    """no attention and no loss across the documents packed in a sequence"""
    cache: str | None = None
    """folder of token files; None: $JAXLAB_CACHE or ~/.cache/jaxlab"""
    threads: int = 2
    """threads that read ahead of the training step"""


@dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; -1 on one axis: all that are left."""

    replica: int = 1
    """replicas of the model that may drift apart (low-communication training)"""
    data: int = -1
    """copies of the model in step with each other"""
    fsdp: int = 1
    """shards of parameters, optimizer state and batch"""
    tensor: int = 1
    """shards of heads, MLP and vocabulary"""


@dataclass(frozen=True)
class Parallel:
    """Who places the collectives, where the mesh axis `tensor` is more than one."""

    overlap: Literal["off", "plain", "auto", "ring", "bidirectional"] = "off"
    """off: the compiler; plain: the model, which is then sequence-parallel; ring and
    bidirectional: it, hidden behind its matmuls; auto: where that is worth it"""


@dataclass(frozen=True)
class Distributed:
    """Processes of the job; found by themselves under SLURM, TPU, Kubernetes, MPI."""

    coordinator: str | None = None
    """address of process 0, as host:port"""
    processes: int | None = None
    """number of processes"""
    index: int | None = None
    """number of this process, from 0"""


@dataclass(frozen=True)
class Health:
    """What the run does about its links; `scripts/supervise.py` does the rest."""

    plan_mesh: bool = False
    """measure the links between the processes at the start, and lay the mesh's rings
    around the slow ones"""


@dataclass(frozen=True)
class Evaluate:
    """Loss on held-out documents."""

    every: int = 100
    """steps between evaluations; 0: only at the end"""
    batches: int = 16
    """batches of an evaluation at most; 0: the whole split"""


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved and what is kept."""

    every: int = 100
    """steps between checkpoints; 0: only at the end"""
    keep_last: int = 2
    """newest checkpoints to keep"""
    keep_best: int = 1
    """checkpoints of the lowest evaluation loss to keep"""
    snapshot_seconds: float = 0.0
    """seconds of work that a fault may cost: the state is also written this often to
    OUT/checkpoints/snapshots, where a start after a fault finds it; 0: not"""
    snapshot_folder: str = ""
    """a folder on each host's own disk, for them to lie in instead, in two copies on
    different hosts; `~` and environment variables are filled in"""


@dataclass(frozen=True)
class Sample:
    """Text that the model writes at the end and after each evaluation."""

    prompt: str = "def "
    """start of the text"""
    tokens: int = 200
    """tokens to write; 0: none"""
    temperature: float = 0.8
    """0: always the likeliest token"""
    top_k: int = 0
    """choose among the k likeliest; 0: all"""
    top_p: float = 0.95
    """choose among the likeliest of this total probability"""


@dataclass(frozen=True)
class Init:
    """Weights to start from; fresh ones without a path."""

    path: str | None = None
    """folder with a Hugging Face config.json and .safetensors (Llama family)"""


@dataclass(frozen=True)
class Run:
    """One training run of a language model."""

    out: str = "runs/gpt"
    """run folder; one that has a checkpoint is resumed"""
    steps: int = 1000
    """optimizer steps in all"""
    seed: int = 0
    """seed of the weights, the order of the data and the samples"""
    batch: int = 16
    """sequences a step, over all devices and micro-batches"""
    length: int = 256
    """tokens a sequence"""
    accumulate: int = 1
    """micro-batches whose gradients are added up in a step"""
    z_loss: float = 0.0
    """weight of the squared log-partition in the loss"""
    ema: float | None = None
    """decay of a moving average of the weights, used for evaluation"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """a step whose loss or gradient is not finite: stop there, or skip it"""
    log_every: int = 10
    """steps between logged training metrics"""
    profile: bool = False
    """write a trace of a few steps to OUT/profile for xprof"""
    model: GPT = field(default_factory=GPT)
    init: Init = field(default_factory=Init)
    data: Data = field(default_factory=Data)
    optimizer: AdamW | NoLoCo = field(default_factory=AdamW)
    mesh: MeshShape = field(default_factory=MeshShape)
    parallel: Parallel = field(default_factory=Parallel)
    distributed: Distributed = field(default_factory=Distributed)
    health: Health = field(default_factory=Health)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    sample: Sample = field(default_factory=Sample)


# ------------------------------------------------------------------ files


def to_json(value: Any) -> Any:
    """Plain JSON form of a config; each dataclass carries its name as `type`."""
    if dataclasses.is_dataclass(value):
        items = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__} | {
            k: to_json(v) for k, v in items.items()
        }
    return value


def from_json(value: Any, where: str = "config") -> Any:
    """Inverse of `to_json`.

    Raises:
        ConfigError: an unknown type or field, by name and with the nearest one,
            or a value of the wrong type.
    """
    if not (isinstance(value, dict) and "type" in value):
        return value
    cls: Any = _dataclass(value["type"])
    if cls is None:
        raise ConfigError(f"{where}: no config is called {value['type']!r}")
    hints = typing.get_type_hints(cls)
    fields = {}
    for name, item in value.items():
        if name == "type":
            continue
        if name not in hints:
            raise ConfigError(
                f"{where}: {cls.__name__} has no field {name!r}" + _nearest(name, hints)
            )
        item = from_json(item, f"{where}.{name}")
        if typing.get_origin(hints[name]) is tuple and isinstance(item, list):
            item = tuple(item)  # JSON has lists only
        fields[name] = item
        if not _fits(fields[name], hints[name]):
            raise ConfigError(f"{where}.{name} is {item!r}, not {hints[name]}")
    return cls(**fields)


def _dataclass(name: Any) -> Any:
    found = globals().get(name)
    if found is None:
        from jaxlab.rl import config as rl  # which imports this module

        found = vars(rl).get(name)
    return found if dataclasses.is_dataclass(found) else None


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is tuple:  # of any length, of one type
        each = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(v, each) for v in value)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, h) for h in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _nearest(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def load(path: str | Path) -> Any:
    """Reads a config: `config()` of a Python file, or a saved config.json.

    Raises:
        ConfigError: the file is missing or exposes no config.
    """
    path = Path(path)
    if not path.is_file():
        near = _nearest(path.name, [p.name for p in path.parent.glob("*.py")])
        raise ConfigError(f"no config file {path}{near}")
    if path.suffix == ".json":
        try:
            return from_json(json.loads(path.read_text()), path.name)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if path.suffix != ".py" or spec is None or spec.loader is None:
        raise ConfigError(f"{path} is neither a .py nor a .json config")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ConfigError(f"{path} has no function config() that returns a Run")
    return module.config()


def parse(argv: Sequence[str], prog: str = "train.py") -> Any:
    """The run that a command line describes: CONFIG, then edits of its fields.

    Args:
        argv: `["configs/gpt_tiny.py", "--steps", "60", ...]`.
        prog: name of the program in messages.

    Returns:
        The config, of the type that the file's `config()` returns.

    Raises:
        ConfigError: bad usage, in one line, with the nearest right option.
    """
    from jaxlab.cli import parse_options

    base, edits = Run(), list(argv)
    if edits and not edits[0].startswith("-"):
        base = load(edits.pop(0))
    elif not set(edits) & {"-h", "--help"}:
        raise ConfigError(f"usage: {prog} CONFIG [--field value ...]; see configs/")
    return parse_options(type(base), edits, f"{prog} CONFIG", default=base)


def save(run: Any, path: str | Path) -> None:
    """Writes the config so that `load` gives an equal one; atomic."""
    from jaxlab.files import write_text

    write_text(path, json.dumps(to_json(run), indent=1) + "\n")


def describe(run: Any) -> dict[str, Any]:
    """What a run is before it starts: its config and the version of its corpus.

    Raises:
        UserError: the corpus is missing.
    """
    from jaxlab.corpora import corpus_version

    data = getattr(run, "data", None)
    version = corpus_version(data.corpus) if isinstance(data, Data) else None
    return {"config": to_json(run), "data": version}


# ----------------------------------------------------------------- checks


def resolve_model(model: GPT, tokenizer_vocab: int) -> GPT:
    """The model with every None replaced by the number it stands for.

    Raises:
        ConfigError: the vocabulary is smaller than the tokenizer's, or the heads
            do not divide.
    """
    heads, kv_heads = model.heads, model.kv_heads or model.heads
    if heads % kv_heads:
        raise ConfigError(
            f"model.heads {heads} is not a multiple of model.kv_heads {kv_heads}"
        )
    if model.head_dim is None and model.width % heads:
        raise ConfigError(
            f"model.width {model.width} is not a multiple of "
            f"model.heads {heads}; set model.head_dim"
        )
    head_dim = model.head_dim or model.width // heads
    if head_dim % 2:
        raise ConfigError(
            f"model.head_dim {head_dim} is odd; rotary embeddings turn pairs"
        )
    wide = model.width * 8 // 3 if model.activation == "swiglu" else model.width * 4
    vocab = model.vocab or -(-tokenizer_vocab // 64) * 64
    if vocab < tokenizer_vocab:
        raise ConfigError(
            f"model.vocab {vocab} is smaller than the tokenizer's {tokenizer_vocab}"
        )
    return dataclasses.replace(
        model,
        vocab=vocab,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=model.mlp or -(-wide // 64) * 64,
    )


def resolve_mesh(shape: MeshShape, devices: int) -> MeshShape:
    """The mesh with -1 replaced by the devices left over.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    sizes = dataclasses.asdict(shape)
    free = [name for name, size in sizes.items() if size == -1]
    bad = [name for name, size in sizes.items() if size < 1 and size != -1]
    if bad or len(free) > 1:
        name = (bad or free)[0]
        raise ConfigError(
            f"mesh.{name} is {sizes[name]}; axes are at least 1, and "
            "-1 (all that are left) on one axis only"
        )
    fixed = 1
    for size in sizes.values():
        fixed *= 1 if size == -1 else size
    if devices % fixed or (not free and fixed != devices):
        axes = ", ".join(f"{k} {v}" for k, v in sizes.items() if v != 1)
        raise ConfigError(
            f"mesh ({axes}) needs {'a multiple of ' if free else ''}"
            f"{fixed} devices, and there are {devices}"
        )
    return dataclasses.replace(shape, **{name: devices // fixed for name in free})


def validate(run: Run, mesh: MeshShape) -> None:
    """Checks a resolved run (`resolve_model`, `resolve_mesh`) before compilation.

    Raises:
        ConfigError: a field out of range, or two that do not go together; the
            message names both and their values.
    """
    model = run.model
    for name in ("steps", "batch", "length", "accumulate", "log_every"):
        if getattr(run, name) < 1:
            raise ConfigError(f"{name} is {getattr(run, name)}, and must be at least 1")
    if run.ema is not None and not 0 < run.ema < 1:
        raise ConfigError(f"ema is {run.ema}, and must lie between 0 and 1")
    if run.checkpoint.keep_last < 1:
        raise ConfigError(
            f"checkpoint.keep_last is {run.checkpoint.keep_last}, and "
            "must be at least 1, or there is nothing to resume from"
        )
    if not 0 <= run.checkpoint.snapshot_seconds < float("inf"):
        raise ConfigError(
            f"checkpoint.snapshot_seconds is {run.checkpoint.snapshot_seconds}, and "
            "must be 0 (none) or a number of seconds"
        )
    check_rows(run, mesh)
    for value, name, size, axis in (
        (model.width, "model.width", mesh.fsdp, "mesh.fsdp"),
        (model.heads, "model.heads", mesh.tensor, "mesh.tensor"),
        (model.kv_heads, "model.kv_heads", mesh.tensor, "mesh.tensor"),
        (model.mlp, "model.mlp", mesh.tensor, "mesh.tensor"),
        (model.vocab, "model.vocab", mesh.tensor, "mesh.tensor"),
    ):
        _check_multiple(value, name, size, axis)
    how = run.parallel.overlap
    if how != "off" and run.length % mesh.tensor:
        raise ConfigError(
            f"length {run.length} is not a multiple of mesh.tensor {mesh.tensor}, and "
            f"parallel.overlap {how} cuts the time by it; change one of them, or set "
            "--parallel.overlap off"
        )


def check_rows(run: Run, mesh: MeshShape) -> None:
    """Checks that the batch divides among a resolved mesh.

    Raises:
        ConfigError: it does not.
    """
    shards = mesh.replica * mesh.data * mesh.fsdp
    rows = run.batch // run.accumulate
    _check_multiple(run.batch, "batch", run.accumulate, "accumulate")
    _check_multiple(rows, "batch / accumulate", shards, "mesh.replica x data x fsdp")


def _check_multiple(value: int | None, name: str, size: int, axis: str) -> None:
    if value is None or value % size:
        raise ConfigError(f"{name} {value} is not a multiple of {axis} {size}")
