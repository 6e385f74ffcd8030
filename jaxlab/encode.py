"""A corpus into token files: the held-out split and the encoding.

The corpus is read as a stream, twice (three times where a tokenizer is trained on
it), so it may be far larger than memory; only a single document has to fit.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxlab.corpora import Document
from jaxlab.tokens import Tokenizer, train_bpe

# Characters of a text that are encoded in one go, and of the texts that are encoded
# side by side: they bound the memory and keep the cores busy.
_PIECE, _BATCH = 2**18, 2**22
_BPE_CHARACTERS = 2**28  # to train on; more text costs time and changes few merges


class Split(NamedTuple):
    """How a corpus is divided, and its size.

    A document is held out when its `name_hash` is below `cutoff`; a single
    document is divided by position instead, and has no cutoff.
    """

    fraction: float
    cutoff: int | None
    documents: int
    characters: int


class _Piece(NamedTuple):
    """A text, or as much of a long one as is encoded in one go."""

    split: str
    text: str
    last: bool  # of its document: an eos follows


def name_hash(name: str) -> int:
    """First 8 bytes of the SHA-256 of a name, from 0 to 2**64 - 1, big-endian."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")


def plan_split(documents: Iterable[Document], fraction: float) -> Split:
    """Chooses what to hold out: about `fraction` of the documents.

    The cutoff is `fraction * 2**64`, moved just so far that the document with the
    lowest hash is held out and the one with the highest is not.
    """
    count, characters, lowest, highest = 0, 0, 2**64, 0
    for name, text in documents:
        count += 1
        characters += len(text)
        lowest = min(lowest, name_hash(name))
        highest = max(highest, name_hash(name))
    cutoff = min(max(round(fraction * 2**64), lowest + 1), highest)
    return Split(fraction, cutoff if count > 1 else None, count, characters)


def write_tokens(
    folder: Path,
    read: Callable[[], Iterator[Document]],
    tokenizer: Tokenizer | int,
    fraction: float,
) -> dict[str, Any]:
    """Writes train.bin, eval.bin and tokenizer.json.

    Args:
        folder: an empty one.
        read: starts a pass over the corpus.
        tokenizer: what to encode with, or the vocabulary of a BPE tokenizer to be
            trained on the documents that are not held out.
        fraction: share of the documents to hold out.

    Returns:
        What describes the files: how the corpus was split, the tokenizer, the type
        of the ids, and for each split documents, tokens and SHA-256.
    """
    split = plan_split(_progress(read(), "reading"), fraction)

    def pieces(task: str) -> Iterator[_Piece]:
        return _pieces(_progress(read(), task, split.characters), split)

    if isinstance(tokenizer, int):
        texts = (p.text for p in pieces("training BPE") if p.split == "train")
        every = -(-split.characters // _BPE_CHARACTERS)
        tokenizer = train_bpe(itertools.islice(texts, 0, None, every), tokenizer)
    tokenizer.save(folder / "tokenizer.json")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with (
        open(folder / "train.bin", "wb") as train,
        open(folder / "eval.bin", "wb") as held_out,
    ):
        sinks = {"train": _Sink(train), "eval": _Sink(held_out)}
        for batch in _batches(pieces("encoding")):
            encoded = tokenizer.encode_batch([piece.text for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                sink = sinks[piece.split]
                sink.write(ids.astype(dtype))
                if piece.last:
                    sink.write(np.array([tokenizer.eos], dtype))
                    sink.documents += 1
    return {
        "split": "position" if split.cutoff is None else "document",
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
        },
        "dtype": dtype.name,
        "documents": {name: sink.documents for name, sink in sinks.items()},
        "tokens": {name: sink.tokens for name, sink in sinks.items()},
        "sha256": {name: sink.digest.hexdigest() for name, sink in sinks.items()},
    }


class _Sink:
    """A token file being written, with what is to be known of it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.documents = 0
        self.tokens = 0
        self.digest = hashlib.sha256()

    def write(self, ids: np.ndarray) -> None:
        self.file.write(ids.data)
        self.digest.update(ids.data)
        self.tokens += ids.size


def _pieces(documents: Iterable[Document], split: Split) -> Iterator[_Piece]:
    for name, text in documents:
        if split.cutoff is None:
            head = min(round(len(text) * (1 - split.fraction)), len(text) - 1)
            yield from _cut("train", text, 0, head)
            yield from _cut("eval", text, head, len(text))
        else:
            side = "eval" if name_hash(name) < split.cutoff else "train"
            yield from _cut(side, text, 0, len(text))


def _cut(split: str, text: str, start: int, stop: int) -> Iterator[_Piece]:
    """Cuts a long text after lines, where the tokens are the least disturbed."""
    while start < stop:
        end = min(start + _PIECE, stop)
        if end < stop:
            end = text.rfind("\n", start + _PIECE // 2, end) + 1 or end
        yield _Piece(split, text[start:end], last=end == stop)
        start = end


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _progress(
    documents: Iterable[Document], task: str, total: int | None = None
) -> Iterator[Document]:
    """Shows how far a pass is, if it takes long; sparingly where that is a log."""
    from tqdm import tqdm

    with tqdm(
        desc=task,
        total=total,
        unit=" characters",
        unit_scale=True,
        delay=2,
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 30,
        maxinterval=30,
    ) as bar:
        for document in documents:
            yield document
            bar.update(len(document.text))
