"""Files with pieces of the arrays of a state, checksummed, to be put together again.

A file is a magic line, the SHA-256 of its header, the header (JSON, with its length
before it) and the bytes of the pieces. Several files are one state if their pieces
cover every leaf; how it was cut does not matter to what is read back.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAGIC = b"jaxlab snapshot 1\n"
Range = tuple[tuple[int, int], ...]
"""start and stop in each dimension of a global array"""


class Shard(NamedTuple):
    """Where a piece of an array lies in a file."""

    leaf: int
    range: Range
    offset: int
    """bytes after the header"""
    size: int
    sha256: str


class Header(NamedTuple):
    """What a file says of itself."""

    description: dict[str, Any]
    leaves: dict[str, str]
    """path to "dtype[shape]", see `checkpoint.leaf_types`"""
    shards: tuple[Shard, ...]


def to_range(index: tuple[slice, ...], shape: Sequence[int]) -> Range:
    """Start and stop in each dimension of what slices take of an array."""
    return tuple(i.indices(n)[:2] for i, n in zip(index, shape, strict=True))


def write(
    path: Path, head: Header, pieces: Sequence[tuple[int, Range, np.ndarray]]
) -> None:
    """Writes one file, whole or not at all.

    Not synced to the disk: it outlives the process, and after a power cut the sums
    show what is missing.

    Args:
        path: of the file.
        head: its shards are not read.
        pieces: number of the leaf, range in it, and the numbers.
    """
    shards, blobs, offset = [], [], 0
    for leaf, cut, data in pieces:
        blob = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        digest = hashlib.sha256(blob.data).hexdigest()
        shards.append(Shard(leaf, cut, offset, blob.nbytes, digest))
        blobs.append(blob)
        offset += blob.nbytes
    text = json.dumps(head._replace(shards=tuple(shards))._asdict()).encode()
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(MAGIC + hashlib.sha256(text).digest())
        file.write(len(text).to_bytes(8, "little") + text)
        for blob in blobs:
            file.write(blob.data)
    os.replace(part, path)


def read_header(path: Path) -> tuple[Header, int]:
    """What a file says of itself, and where its data begin.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no snapshot, or its header is damaged.
    """
    with open(path, "rb") as file:
        start = file.read(len(MAGIC) + 40)
        if len(start) < len(MAGIC) + 40 or not start.startswith(MAGIC):
            raise ValueError("it is no snapshot")
        digest, size = start[len(MAGIC) : -8], int.from_bytes(start[-8:], "little")
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError("its header is damaged")
        text = file.read(size)
        if hashlib.sha256(text).digest() != digest:
            raise ValueError("its header is damaged")
        begin = file.tell()
    row = json.loads(text)
    shards = tuple(
        Shard(leaf, tuple((a, b) for a, b in cut), offset, size, digest)
        for leaf, cut, offset, size, digest in row["shards"]
    )
    return Header(row["description"], row["leaves"], shards), begin


class Piece(NamedTuple):
    """A shard and the file that has it."""

    path: Path
    begin: int
    shard: Shard


class Whole(NamedTuple):
    """A snapshot whose shards cover every leaf."""

    description: dict[str, Any]
    leaves: dict[str, str]
    pieces: dict[int, list[Piece]]


def whole_of(paths: Sequence[Path]) -> Whole:
    """The headers of all files of a snapshot, put together.

    A file that cannot be read is done without, if the others have copies of its shards.

    Raises:
        ValueError: with the name of the file at fault.
    """
    heads, faults = [], []
    for path in paths:
        try:
            heads.append((path, *read_header(path)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{path.name}: {error}")
    if not heads:
        raise ValueError(faults[0])
    head = heads[0][1]
    pieces: dict[int, list[Piece]] = {}
    for path, other, begin in heads:
        if (other.description, other.leaves) != (head.description, head.leaves):
            raise ValueError(f"{path.name}: it is of another state than the others")
        for shard in other.shards:
            pieces.setdefault(shard.leaf, []).append(Piece(path, begin, shard))
    for number, (leaf, kind) in enumerate(head.leaves.items()):
        cuts = {piece.shard.range for piece in pieces.get(number, [])}
        there = sum(math.prod(b - a for a, b in cut) for cut in cuts)
        if there != math.prod(_type(kind)[1]):
            raise ValueError(faults[0] if faults else f"shards of {leaf} are missing")
    return Whole(head.description, head.leaves, pieces)


def _type(text: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Data type and shape of "float32[2,3]"."""
    name, _, shape = text.rstrip("]").partition("[")
    return jnp.dtype(name), tuple(map(int, filter(None, shape.split(","))))


def assembled(
    pieces: Sequence[Piece],
    cut: Range,
    dtype: Any,
    read: Callable[[Piece], np.ndarray],
) -> np.ndarray:
    """A range of an array from the shards that meet it."""
    for piece in pieces:
        if piece.shard.range == cut:
            return read(piece)
    out = np.empty([b - a for a, b in cut], dtype)
    for piece in pieces:
        both = [
            (max(a, c), min(b, d))
            for (a, b), (c, d) in zip(cut, piece.shard.range, strict=True)
        ]
        if all(a < b for a, b in both):
            into = tuple(
                slice(a - c, b - c) for (a, b), (c, _) in zip(both, cut, strict=True)
            )
            of = tuple(
                slice(a - c, b - c)
                for (a, b), (c, _) in zip(both, piece.shard.range, strict=True)
            )
            out[into] = read(piece)[of]
    return out


def read_shard(leaf: str, dtype: Any, piece: Piece) -> np.ndarray:
    """The numbers of a shard; raises ValueError if they are not what was written."""
    shard = piece.shard
    with open(piece.path, "rb") as file:
        file.seek(piece.begin + shard.offset)
        data = file.read(shard.size)
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        where = ",".join(f"{a}:{b}" for a, b in shard.range)
        raise ValueError(
            f"{piece.path.name}: the sha256 of {leaf}[{where}] is not what was written"
        )
    return np.frombuffer(data, dtype).reshape([b - a for a, b in shard.range])


def read_sound(
    leaf: str, dtype: Any, pieces: Sequence[Piece], piece: Piece
) -> np.ndarray:
    """The numbers of a shard, from a copy of it where it is damaged.

    Args:
        leaf: its name.
        dtype: its data type.
        pieces: all of the leaf, copies among them.
        piece: which one.

    Raises:
        OSError, ValueError: it cannot be read or is damaged, and so are its copies.
    """
    try:
        return read_shard(leaf, dtype, piece)
    except (OSError, ValueError):
        for other in pieces:
            if other is not piece and other.shard.range == piece.shard.range:
                with contextlib.suppress(OSError, ValueError):
                    return read_shard(leaf, dtype, other)
        raise


def placed(whole: Whole, names: Iterable[str], abstract_state: Any) -> Any:
    """The state on the mesh; this process reads what its devices hold.

    Args:
        whole: of `whole_of`.
        names: of the leaves, as the header has them.
        abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings, on any mesh.

    Raises:
        OSError, ValueError: a file cannot be read, or a shard is damaged.
    """
    flat, tree = jax.tree.flatten(abstract_state)
    numbers = {name: number for number, name in enumerate(whole.leaves)}
    arrays = []
    for name, x in zip(names, flat, strict=True):
        pieces = whole.pieces[numbers[name]]
        read = functools.cache(functools.partial(read_sound, name, x.dtype, pieces))
        parts: dict[Range, np.ndarray] = {}
        for index in x.sharding.addressable_devices_indices_map(x.shape).values():
            assert index is not None
            cut = to_range(index, x.shape)
            if cut not in parts:
                parts[cut] = assembled(pieces, cut, x.dtype, read)

        def part(index: Any, parts: Any = parts, shape: Any = x.shape) -> np.ndarray:
            return parts[to_range(index, shape)]

        array = jax.make_array_from_callback(x.shape, x.sharding, part, dtype=x.dtype)
        arrays.append(array)
    return jax.tree.unflatten(tree, arrays)
