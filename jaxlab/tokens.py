"""Tokenizers: bytes, byte-level BPE trained on the corpus, or a Hugging Face file.

All of them are the same to the rest of jaxlab, a `Tokenizer`: text to ids and
back, the id that ends a document, and a fingerprint that token files and
checkpoints remember. Text is encoded as it is: nothing is put around it, and
special tokens spelled out in it (`<eos>`) are ordinary text, so that no document
can end another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsInt, runtime_checkable

import numpy as np

from jaxlab.errors import ConfigError, UserError
from jaxlab.files import write_text

_BYTES = '{"jaxlab": "bytes"}\n'
_EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: one more than the largest id.
        eos: the id that ends a document.
        fingerprint: SHA-256 of the definition, in hexadecimal digits.
    """

    vocab_size: int
    eos: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32[n]; no special tokens are added."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, each int32[n]; on all cores where that helps."""
        ...

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Text of ids; special tokens and ids beyond the vocabulary give none."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes `path` (call it `tokenizer.json`) for `load_tokenizer`.

        A tokenizer of the `tokenizers` library also writes `tokenizer_config.json`
        beside it, which names the end of a document; with it the folder opens in
        `transformers.AutoTokenizer` too.
        """
        ...


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""
    return _Bytes()


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; the same texts give the same one.

    Args:
        texts: what to learn the merges from; read once, not kept.
        vocab: the number of ids: 256 bytes, `<eos>` and the merges. Texts with
            fewer repeated pairs give fewer.

    Returns:
        A tokenizer that encodes any text without loss.

    Raises:
        ConfigError: the vocabulary has no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < 257:
        raise ConfigError(
            f"a BPE vocabulary of {vocab} is too small: 256 bytes and <eos> need 257"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _Subwords(bpe.to_str(), "<eos>")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a saved tokenizer, or any Hugging Face `tokenizer.json`.

    The end of a document is the `eos_token` of a `tokenizer_config.json` in the
    same folder, else `<eos>`, `</s>`, `<|endoftext|>` or `<|end_of_text|>`,
    whichever the vocabulary has. Truncation and padding that a file may ask for
    are left out: they would cut documents.

    Args:
        path: the file, or its folder.

    Raises:
        UserError: no such file, not a tokenizer, or no token that ends a document.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    definition = _read(path)
    if definition == _BYTES:
        return _Bytes()
    config = path.with_name("tokenizer_config.json")
    eos = None
    if config.exists():
        try:
            eos = json.loads(_read(config)).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config} is not a JSON object: {error}") from None
        if isinstance(eos, dict):  # how transformers saves a token with options
            eos = eos.get("content")
    try:
        return _Subwords(definition, eos)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def stream_decoder(tokenizer: Tokenizer) -> Callable[[SupportsInt], str]:
    """Decodes a stream of ids as they come, for printing.

    Returns:
        A function from the next id to the text that is complete with it, often
        empty: a part of a UTF-8 character waits for the rest. The texts joined are
        the decoded stream, but for such a part at its very end. Bytes that cannot
        become a character give U+FFFD.
    """
    ids: list[int] = []
    context = 0  # so many of ids were shown before; they only help to decode
    shown = 0  # characters of the text of ids

    def push(token: SupportsInt) -> str:
        nonlocal ids, context, shown
        ids.append(int(token))
        text = tokenizer.decode(ids)
        # An unfinished character has up to 3 bytes, and decodes to one U+FFFD or,
        # with some decoders, to one for each byte.
        waiting = min(len(text) - len(text.rstrip("\ufffd")), 3)
        ready = text[: len(text) - waiting]
        new, shown = ready[shown:], max(shown, len(ready))
        if not waiting:
            # The newest ids stay as context: some decoders treat the first id of a
            # text apart (they drop its space).
            ids, context = ids[context:], len(ids) - context
            shown = len(tokenizer.decode(ids))
        return new

    return push


class _Bytes:
    """UTF-8 bytes."""

    vocab_size = 257
    eos = 256
    fingerprint = hashlib.sha256(_BYTES.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        write_text(path, _BYTES)


class _Subwords:
    """A tokenizer of the `tokenizers` library, whatever its model."""

    def __init__(self, definition: str, eos: str | None):
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_str(definition)
        # The library raises plain Exception, with the place in the JSON.
        except Exception as error:
            raise UserError(f"not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        names = _EOS_NAMES if eos is None else (eos,)
        self._eos = next((name for name in names if name in vocab), None)
        if self._eos is None:
            raise UserError(
                f"the vocabulary has no token {' or '.join(names)} to end a document;"
                ' name one in tokenizer_config.json beside it: {"eos_token": "..."}'
            )
        self._definition = definition
        self.eos: int = vocab[self._eos]
        self.vocab_size: int = max(vocab.values()) + 1  # ids may have gaps
        self.fingerprint: str = hashlib.sha256(
            f"{self.eos}\n{definition}".encode()
        ).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The fast one leaves out offsets, which nothing here needs.
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._tokenizer.decode(list(map(int, ids)))

    def save(self, path: str | Path) -> None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos}
        write_text(path, self._definition)
        write_text(
            Path(path).with_name("tokenizer_config.json"), json.dumps(config) + "\n"
        )


def _read(path: Path) -> str:
    try:
        # As bytes: a tokenizer may hold "\r", which text mode would change.
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}") from None
