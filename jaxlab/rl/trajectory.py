"""What the asynchronous parts hand to each other: trajectories, and padded batches.

A trajectory is one rollout: what the policy saw, the tokens it chose, with which
log-probability and entropy, and the version of the weights that chose them, step by
step, since weights may change under a rollout. Its blob, on disk and on the wire, is a
safetensors file behind zlib: numbers and text, nothing that could be executed.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.files import write_bytes

LARGEST = 2**30
"""bytes of an unpacked blob; more is refused"""


class Step(NamedTuple):
    """One observation and the action taken on it."""

    image: np.ndarray
    """uint8 [height, width, 3]"""
    tokens: np.ndarray
    """int32 [token]: the action; -1 after its end"""
    logp: np.ndarray
    """float32 [token], nats, as sampled; NaN where unknown (a demonstration's)"""
    entropy: np.ndarray
    """float32 [token], nats, of the distribution that the token was sampled from"""
    version: int
    """of the weights that chose the tokens; -1: no policy did"""
    worker: int = -1
    """rollout worker that computed it"""
    wait: float = 0.0
    """seconds between observation and action"""
    busy: float = 0.0
    """seconds that the environment took for the action"""


class Trajectory(NamedTuple):
    """One rollout of a task, finished."""

    id: int
    """of its rollout, unique in a run; -1: a demonstration, which has none"""
    task: str
    seed: int
    group: int
    """rollouts of one group are compared with each other; -1: none"""
    text: str
    """the instruction"""
    instruction: np.ndarray
    """int32 [word]: the same as ids"""
    images: np.ndarray
    """uint8 [step, height, width, 3]: before each action"""
    final: np.ndarray
    """uint8 [height, width, 3]: after the last action"""
    tokens: np.ndarray
    """int32 [step, token]; -1 after the end of an action"""
    logp: np.ndarray
    """float32 [step, token]; NaN where unknown; anything where tokens is -1"""
    entropy: np.ndarray
    """float32 [step, token]; likewise"""
    version: np.ndarray
    """int32 [step]; -1: no policy chose it"""
    worker: np.ndarray
    """int32 [step]"""
    wait: np.ndarray
    """float32 [step], seconds"""
    busy: np.ndarray
    """float32 [step], seconds"""
    reward: float
    """of the episode, in [0, 1]"""
    truncated: bool = False
    """cut off before the task ended it"""
    cap_truncated: bool = False
    """cut off by a length cap below the longest that any rollout may be"""
    probe: bool = False
    """ran without a cap, to find longer solutions"""
    source: str = "self"
    """who acted: self, oracle or human, as of `curation.Source`"""
    started: float = 0.0
    """seconds since 1970"""
    seconds: float = 0.0
    """from reset to the last observation"""

    @property
    def mask(self) -> np.ndarray:
        """The tokens that were chosen: bool [step, token]."""
        return self.tokens >= 0

    @property
    def length(self) -> int:
        """Steps."""
        return len(self.tokens)


def assemble(steps: Sequence[Step], **rest: Any) -> Trajectory:
    """A trajectory of its steps, at least one; `rest`: its other fields."""

    def stack(name: str, dtype: Any) -> np.ndarray:
        return np.stack([np.asarray(getattr(step, name), dtype) for step in steps])

    return Trajectory(
        images=stack("image", np.uint8),
        tokens=stack("tokens", np.int32),
        logp=stack("logp", np.float32),
        entropy=stack("entropy", np.float32),
        version=stack("version", np.int32),
        worker=stack("worker", np.int32),
        wait=stack("wait", np.float32),
        busy=stack("busy", np.float32),
        **rest,
    )


# dtype and dimensions of each array; equal letters are equal sizes.
_ARRAYS: dict[str, tuple[Any, str]] = {
    "instruction": (np.int32, "w"),
    "images": (np.uint8, "shxc"),
    "final": (np.uint8, "hxc"),
    "tokens": (np.int32, "st"),
    "logp": (np.float32, "st"),
    "entropy": (np.float32, "st"),
    "version": (np.int32, "s"),
    "worker": (np.int32, "s"),
    "wait": (np.float32, "s"),
    "busy": (np.float32, "s"),
}
_PLAIN: dict[str, type] = {
    name: kind
    for name, kind in Trajectory.__annotations__.items()
    if kind in (int, str, float, bool)
}


def encode(trajectory: Trajectory) -> bytes:
    """The blob of a trajectory."""
    from safetensors.numpy import save

    arrays = {
        name: np.ascontiguousarray(getattr(trajectory, name), dtype)
        for name, (dtype, _) in _ARRAYS.items()
    }
    plain = {name: kind(getattr(trajectory, name)) for name, kind in _PLAIN.items()}
    blob = save(arrays, {"trajectory": json.dumps(plain, allow_nan=False)})
    return zlib.compress(
        blob, 1
    )  # screens shrink about tenfold; 6 takes 4 times as long


def decode(blob: bytes, largest: int = LARGEST) -> Trajectory:
    """The trajectory of a blob, whoever wrote it.

    Raises:
        ValueError: it is none, is damaged, or holds more than `largest` bytes.
    """
    from safetensors.numpy import load

    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(blob, largest)
        if not unpacker.eof:
            raise ValueError(f"is cut short, or unpacks to more than {largest} bytes")
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        plain = json.loads(header["__metadata__"]["trajectory"])
        arrays = load(data)
    except Exception as error:  # safetensors has its own exception types
        raise ValueError(f"trajectory blob: {error}") from error
    return _checked(arrays, plain)


def write_blob(folder: Path, stem: str, blob: bytes) -> tuple[str, str]:
    """Writes a blob, synced, under a name that its content decides.

    Returns:
        its path within `folder`, and its sha256.
    """
    sha256 = hashlib.sha256(blob).hexdigest()
    path = f"{stem}-{sha256[:16]}.trajectory"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / path, blob)
    return path, sha256


def read_blob(path: Path, sha256: str) -> bytes:
    """A blob as it was written.

    Raises:
        ValueError: it is damaged.
        FileNotFoundError: it is gone.
    """
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != sha256:
        raise ValueError(f"blob {path} is damaged")
    return blob


def _checked(arrays: dict[str, np.ndarray], plain: Any) -> Trajectory:
    if not isinstance(plain, dict) or set(plain) != set(_PLAIN):
        raise ValueError("trajectory blob: its fields are not those of a trajectory")
    if set(arrays) != set(_ARRAYS):
        raise ValueError("trajectory blob: its arrays are not those of a trajectory")
    for name, kind in _PLAIN.items():
        if type(plain[name]) is not kind:
            raise ValueError(f"trajectory blob: {name} is {plain[name]!r}")
    sizes: dict[str, int] = {"c": 3}
    for name, (dtype, dims) in _ARRAYS.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != len(dims):
            raise ValueError(f"trajectory blob: {name} is {array.dtype}{array.shape}")
        for dim, size in zip(dims, array.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(f"trajectory blob: {name} has shape {array.shape}")
    if sizes["s"] < 1 or not 0 <= plain["reward"] <= 1:
        raise ValueError(
            f"trajectory blob: {sizes['s']} steps and reward {plain['reward']}"
        )
    return Trajectory(**arrays, **plain)


class Batch(NamedTuple):
    """What an update sees: the steps of some groups, padded to a fixed number."""

    images: np.ndarray
    """uint8 [step, height, width, 3]"""
    instruction: np.ndarray
    """int32 [step, word]"""
    tokens: np.ndarray
    """int32 [step, token]; 0 where masked"""
    mask: np.ndarray
    """bool [step, token]: chosen tokens; a step without any is padding"""
    logp: np.ndarray
    """float32 [step, token]: recorded when acting; NaN: unknown, take the trainer's
    own (weight 1)"""
    entropy: np.ndarray
    """float32 [step]: mean over the step's tokens; NaN: unknown"""
    reward: np.ndarray
    """float32 [step]: of the step's trajectory"""
    group: np.ndarray
    """int32 [step]: number of its group in this batch; -1: padding"""
    lag: np.ndarray
    """int32 [step]: versions that the policy has moved on since; 0: demonstrations"""


def collate(
    groups: Sequence[Sequence[Trajectory]], version: int, steps: int | None = None
) -> Batch:
    """Groups of trajectories as one batch.

    Args:
        groups: at least one trajectory; images, instructions and actions of one size.
        version: the learner's, to take `lag` from.
        steps: of the batch, padding included; None: as many as there are.

    Raises:
        ValueError: there are more steps than that, or none.
    """
    flat = [(g, one) for g, group in enumerate(groups) for one in group]
    total = sum(one.length for _, one in flat)
    steps = total if steps is None else steps
    if not 0 < total <= steps:
        raise ValueError(f"{total} steps do not go into a batch of {steps}")

    def column(parts: Sequence[np.ndarray], fill: Any = 0) -> np.ndarray:
        joined = np.concatenate(parts)
        out = np.full((steps, *joined.shape[1:]), fill, joined.dtype)
        out[:total] = joined
        return out

    def repeated(value: Any, one: Trajectory, dtype: Any) -> np.ndarray:
        return np.repeat(np.asarray(value, dtype)[None], one.length, axis=0)

    mask = column([one.mask for _, one in flat], False)
    tokens = column([one.tokens for _, one in flat])
    entropy = [
        np.where(one.mask, one.entropy, 0).sum(1) / np.maximum(one.mask.sum(1), 1)
        for _, one in flat
    ]
    lag = [np.where(one.version < 0, 0, version - one.version) for _, one in flat]
    return Batch(
        images=column([one.images for _, one in flat]),
        instruction=column([repeated(o.instruction, o, np.int32) for _, o in flat]),
        tokens=np.where(mask, tokens, 0),
        mask=mask,
        logp=column([np.where(one.mask, one.logp, 0) for _, one in flat]),
        entropy=column([values.astype(np.float32) for values in entropy]),
        reward=column([repeated(one.reward, one, np.float32) for _, one in flat]),
        group=column([repeated(g, one, np.int32) for g, one in flat], -1),
        lag=column([values.astype(np.int32) for values in lag]),
    )


def padded_size(steps: int, smallest: int = 32) -> int:
    """Steps of the batch that so many go into: few sizes, since each is compiled.

    `smallest` times a power of 2, so at most half is padding.
    """
    size = smallest
    while size < steps:
        size *= 2
    return size
