"""Token files, and batches that are a pure function of (seed, step, rows).

`prepare` encodes a corpus once into a folder of token files, split by document
into training and held-out text; `open_tokens` checks the folder and maps the files
into memory. `train_batches` and `eval_batches` make grain datasets with random
access: `dataset[step]` depends on nothing before it, so that a run resumes exactly
from its step number alone, and neither the number of hosts nor gradient
accumulation changes which sequences a step sees. `prefetch` reads ahead.

Documents are packed end to end, the tokenizer's eos after each. Sequence i is
`tokens[i * length : i * length + length + 1]`: all but its last token are the
inputs, all but its first the targets.

Dimensions: a microbatches of gradient accumulation, b rows of each, t positions.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlab import corpora, encode
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import write_text
from jaxlab.tokens import Tokenizer, byte_tokenizer, load_tokenizer

if TYPE_CHECKING:
    import grain

_FORMAT = 1  # of the token files; with another number prepare makes new ones
_HASHED_BYTES = 2**30  # larger files are checked for their size alone
_REMEDY = "delete the folder and prepare the corpus again"


class Tokens(NamedTuple):
    """An opened folder of token files."""

    train: np.ndarray  # uint16 or uint32 [n], memory-mapped, read-only
    eval: np.ndarray
    tokenizer: Tokenizer
    meta: dict[str, Any]  # what meta.json says


class Batch(NamedTuple):
    """Sequences of one step."""

    inputs_abt: np.ndarray  # int32
    targets_abt: np.ndarray  # int32, the token after each input
    mask_abt: np.ndarray  # float32, the weight of each target in the loss
    segments_abt: np.ndarray | None  # int32, which document: 1, 2, ...; padding 0


def prepare(
    corpus: str,
    tokenizer: str = "bytes",
    *,
    eval_fraction: float = 0.01,
    text_field: str = "text",
    cache: str | Path | None = None,
) -> Path:
    """Makes the token files of a corpus, unless the cache has them already.

    A document is held out when the first 8 bytes of the SHA-256 of its name, as a
    fraction of 2**64, are below `eval_fraction`. So a file stays on its side when
    others come or go. Of two or more documents, at least one is on each side (if
    need be, the one with the lowest or the highest hash); of a single one, the last
    `eval_fraction` of its characters is held out.

    Processes that prepare the same files wait for one of them to do it. The files
    appear at once when complete, under a name that depends on the corpus and its
    version, the tokenizer and the split.

    Args:
        corpus: see `jaxlab.corpora`.
        tokenizer: "bytes", "bpe:4096" (trained on the documents not held out, here
            with 4096 ids), or a path for `load_tokenizer`.
        eval_fraction: share to hold out, more than 0 and less than 1.
        text_field: field or column with the text of `.jsonl` and `.parquet` rows.
        cache: folder of token folders; None for `$JAXLAB_CACHE`, and where that is
            not set `~/.cache/jaxlab`.

    Returns:
        The folder: train.bin, eval.bin, tokenizer.json, meta.json.

    Raises:
        ConfigError: no such tokenizer or fraction.
        UserError: the corpus cannot be read, or the cache not be written.
    """
    if not 0 < eval_fraction < 1:
        raise ConfigError(
            f"the eval fraction is {eval_fraction}; it must be between 0 and 1"
        )
    known = _named_tokenizer(tokenizer)
    named = corpus in corpora.NAMED
    key = {
        "format": _FORMAT,
        "corpus": corpus if named else os.path.abspath(Path(corpus).expanduser()),
        "version": corpora.corpus_version(corpus),
        "tokenizer": known if isinstance(known, int) else known.fingerprint,
        "eval_fraction": eval_fraction,
        "text_field": text_field,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    readable = re.sub(r"\W+", "-", f"{Path(corpus).name} {Path(tokenizer).stem}")
    root = Path(cache or os.environ.get("JAXLAB_CACHE") or "~/.cache/jaxlab")
    folder = root.expanduser() / f"{readable.strip('-')[-64:]}-{digest}"
    if not os.path.exists(folder):
        read = functools.partial(corpora.documents, corpus, text_field)
        try:
            _make(folder, key, read, known)
        except OSError as error:
            if not os.path.exists(folder):  # else another process was faster
                raise UserError(
                    f"cannot write token files into {folder.parent}:"
                    f" {error.strerror or error}; name another folder with --cache or"
                    " $JAXLAB_CACHE"
                ) from error
    return folder


def _make(
    folder: Path,
    key: dict[str, Any],
    read: Callable[[], Iterator[corpora.Document]],
    tokenizer: Tokenizer | int,
) -> None:
    """Writes a folder of token files beside its place, then renames it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(f".{folder.name}.lock")) as locked:
        if folder.exists():
            return
        prefix = f".{folder.name}.tmp"
        if locked:  # so nobody is at work on what a killed process left behind
            for left in folder.parent.glob(f"{prefix}*"):
                shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
        try:
            made = encode.write_tokens(temporary, read, tokenizer, key["eval_fraction"])
            meta = json.dumps(key | made, indent=2) + "\n"
            write_text(temporary / "meta.json", meta)
            os.chmod(temporary, 0o755)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Waits until no other process holds the file; False where locks do not work."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems
            yield False
        else:
            yield True


def _named_tokenizer(name: str) -> Tokenizer | int:
    """The tokenizer, or the vocabulary of one that is to be trained."""
    if name == "bytes":
        return byte_tokenizer()
    if match := re.fullmatch(r"bpe:(\d+)", name):
        return int(match[1])
    if not Path(name).expanduser().exists():
        raise ConfigError(
            f'no tokenizer "{name}": write bytes, bpe:4096 (to train one with so many'
            " tokens), or the path of a tokenizer.json"
        )
    return load_tokenizer(name)


def open_tokens(folder: str | Path, *, verify: bool = False) -> Tokens:
    """Checks a folder of token files against its meta.json and opens it.

    Args:
        folder: what `prepare` returned.
        verify: also compares the checksums of files over 1 GiB.

    Raises:
        UserError: a file is missing, or is not the one that `prepare` wrote.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != _FORMAT:
            raise UserError(
                f"{folder} has the token files of another version of jaxlab: {_REMEDY}"
            )
        train = _open_file(folder / "train.bin", "train", meta, verify)
        held_out = _open_file(folder / "eval.bin", "eval", meta, verify)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        if tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
            raise UserError(
                f"{folder / 'tokenizer.json'} is not the tokenizer that made the token"
                f" files beside it: put that one back, or {_REMEDY}"
            )
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; {_REMEDY}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'meta.json'} is damaged ({error!r}): {_REMEDY}"
        ) from None
    return Tokens(train, held_out, tokenizer, meta)


def _open_file(path: Path, split: str, meta: dict, verify: bool) -> np.ndarray:
    dtype = np.dtype(meta["dtype"])
    size, expected = path.stat().st_size, meta["tokens"][split] * dtype.itemsize
    if size != expected:
        raise UserError(f"{path} has {size} bytes instead of {expected}: {_REMEDY}")
    if verify or size <= _HASHED_BYTES:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != meta["sha256"][split]:
            raise UserError(f"{path} is damaged, its SHA-256 is another: {_REMEDY}")
    if not size:  # which cannot be mapped
        return np.empty(0, dtype)
    # A plain array over the mapping: slicing the subclass costs more.
    return np.asarray(np.memmap(path, dtype, "r"))


def train_batches(
    tokens: np.ndarray,
    *,
    length: int,
    batch: int,
    seed: int,
    rows: Sequence[int] | np.ndarray | None = None,
    accumulate: int = 1,
    eos: int | None = None,
) -> grain.MapDataset[Batch]:
    """An endless dataset of training batches: `dataset[step]` is that of a step.

    Each epoch has every sequence once, in an order of its own. Example k of a step
    is number `step * batch + k` of the stream of all epochs; it lies in microbatch
    `k // (batch // accumulate)`, row `k % (batch // accumulate)`.

    Args:
        tokens: [n] token ids.
        length: tokens of a sequence.
        batch: sequences of a step, over all hosts and microbatches.
        seed: of the order, 0 or more.
        rows: which of the `batch // accumulate` rows of a microbatch to load, in
            the order given; None for all. Every host names its own.
        accumulate: microbatches of a step.
        eos: the id that ends a document, to keep packed documents apart: batches
            have segments, and a target of the next document weighs 0. None: no
            segments, and every target weighs 1.

    Returns:
        Batches of shape [accumulate, len(rows), length].

    Raises:
        UserError: the text is shorter than a sequence.
        ConfigError: `accumulate` does not divide `batch`.
    """
    import grain
    from grain.experimental import index_shuffle

    if batch % accumulate:
        raise ConfigError(
            f"a batch of {batch} does not divide into {accumulate} microbatches"
        )
    count = (len(tokens) - 1) // length
    if count < 1:
        raise UserError(
            f"a sequence of {length} tokens is longer than the training text, which"
            f" has {len(tokens)} tokens: choose a shorter length or a larger corpus"
        )
    examples_ab = np.arange(batch).reshape(accumulate, -1)
    if rows is not None:
        examples_ab = examples_ab[:, np.asarray(rows)]

    @functools.lru_cache(maxsize=4)
    def epoch_seed(epoch: int) -> int:
        return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])

    def sequence(index: int) -> int:
        epoch, position = divmod(index, count)
        return index_shuffle(position, count - 1, epoch_seed(epoch), 4)  # 4 rounds

    def load(step: int) -> Batch:
        # Only the rows asked for: grain's own shuffle().batch() would draw the
        # indices of the whole global batch on every host.
        indices = [sequence(step * batch + k) for k in examples_ab.ravel().tolist()]
        return _gather(tokens, np.reshape(indices, examples_ab.shape), length, eos)

    return grain.MapDataset.range(sys.maxsize // batch).map(load)


def eval_batches(
    tokens: np.ndarray,
    *,
    length: int,
    batch: int,
    rows: Sequence[int] | np.ndarray | None = None,
    limit: int | None = None,
    eos: int | None = None,
) -> grain.MapDataset[Batch]:
    """A dataset with every target of a split once, in order.

    What is missing from the last sequence and the last batch is padded with
    targets of weight 0, so that all batches have the same shape.

    Args:
        tokens: [n] token ids.
        length: tokens of a sequence.
        batch: sequences of a batch, over all hosts.
        rows: which rows of a batch to load, None for all.
        limit: at most so many batches, the first ones; None for all.
        eos: as in `train_batches`.

    Returns:
        Batches of shape [1, len(rows), length].

    Raises:
        UserError: the split has less than two tokens, so nothing to predict.
    """
    import grain

    if len(tokens) < 2:
        raise UserError(
            f"the held-out text has {len(tokens)} tokens, too few to evaluate on:"
            " choose a larger eval fraction or corpus"
        )
    rows_1b = np.arange(batch)[None, :]
    if rows is not None:
        rows_1b = rows_1b[:, np.asarray(rows)]

    def load(index: int) -> Batch:
        return _gather(tokens, index * batch + rows_1b, length, eos)

    count = -(-(len(tokens) - 1) // (length * batch))
    if limit is not None:
        count = min(count, limit)
    return grain.MapDataset.range(count).map(load)


@contextlib.contextmanager
def prefetch(
    dataset: grain.MapDataset[Batch], start: int = 0, *, threads: int = 2
) -> Iterator[Iterator[Batch]]:
    """Reads a dataset ahead, in threads that end with the `with` block.

    Args:
        dataset: of `train_batches` or `eval_batches`.
        start: the step to begin with.
        threads: they hold two batches each in advance; 0 reads in the caller.

    Yields:
        An iterator over dataset[start], dataset[start + 1] and so on.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    batches = iter(dataset.to_iter_dataset(options))
    batches.set_state({"next_index": start})
    try:
        yield batches
    finally:
        batches.close()


def _gather(
    tokens: np.ndarray, sequences_ab: np.ndarray, length: int, eos: int | None
) -> Batch:
    """Copies sequences; beyond the end of the tokens there is padding."""
    sequences = sequences_ab.ravel()
    inputs = _rows(tokens[:-1], sequences, length)
    targets = _rows(tokens[1:], sequences, length)
    mask = np.ones(inputs.shape, np.float32)
    left = len(tokens) - 1 - sequences * length  # targets from a sequence's start on
    if left.min() < length:
        mask[np.arange(length) >= left[:, None]] = 0
    shape_abt = (*sequences_ab.shape, length)
    segments_abt = None
    if eos is not None:
        ends = inputs == eos
        segments = np.cumsum(ends, axis=1, dtype=np.int32) - ends + 1
        segments_abt = np.where(mask > 0, segments, 0).reshape(shape_abt)
        mask[ends] = 0  # the target belongs to the next document
    return Batch(
        inputs.reshape(shape_abt),
        targets.reshape(shape_abt),
        mask.reshape(shape_abt),
        segments_abt,
    )


def _rows(tokens: np.ndarray, rows: np.ndarray, length: int) -> np.ndarray:
    """int32[len(rows), length], row i being tokens[i * length :], padded with 0."""
    count = len(tokens) // length
    if rows.max() < count:
        # Indexing copies whole rows, and other threads run meanwhile.
        table = tokens[: count * length].reshape(count, length)
        return table[rows].astype(np.int32)
    found = np.zeros((len(rows), length), np.int32)
    for row, start in zip(found, (rows * length).tolist(), strict=True):
        part = tokens[start : start + length]
        row[: len(part)] = part
    return found
