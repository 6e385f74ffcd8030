"""Tokenizers: exact round trips, files, and streams of text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jaxlab.errors import ConfigError, UserError
from jaxlab.tokens import (
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    stream_decoder,
    train_bpe,
)

ROOT = Path(__file__).parents[1]
TEXTS = ["the quick brown fox", "the lazy dog und der schnelle Fuchs €", "the\tthe\n"]
BPE = train_bpe(TEXTS * 3, 300)
BOTH = pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer(), BPE], ids=["bytes", "bpe"]
)
quick = settings(deadline=None, max_examples=100)


# ------------------------------------------------------------- text and back


@BOTH
@given(
    text=st.text()
    | st.lists(st.sampled_from(["the ", "<eos>", "€", "\n"])).map("".join)
)
@quick
def test_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos not in ids  # also where the text spells it
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()


@BOTH
def test_a_batch_is_its_texts(tokenizer):
    batch = tokenizer.encode_batch([*TEXTS, ""])
    assert [ids.tolist() for ids in batch] == [
        tokenizer.encode(text).tolist() for text in [*TEXTS, ""]
    ]
    assert all(ids.dtype == np.int32 for ids in batch)


@BOTH
def test_decoding_leaves_out_what_is_no_text(tokenizer):
    ids = [tokenizer.eos, *tokenizer.encode("fox"), 5000, tokenizer.eos]
    assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids)) == "fox"
    assert tokenizer.decode([]) == ""


def test_bytes_are_the_utf8_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert isinstance(tokenizer, Tokenizer)


# ------------------------------------------------------------------- training


def test_bpe_learns_the_frequent_words():
    assert BPE.vocab_size <= 300 and isinstance(BPE, Tokenizer)
    assert len(BPE.encode("the")) == 1 < len(BPE.encode("xqz"))


def test_bpe_has_at_most_the_vocabulary_asked_for():
    assert train_bpe(TEXTS, 260).vocab_size == 260
    assert train_bpe(["ab"], 5000).vocab_size == 258  # nothing else to merge
    assert train_bpe(iter(()), 257).vocab_size == 257
    with pytest.raises(ConfigError, match="of 256 is too small"):
        train_bpe(TEXTS, 256)


def test_bpe_training_is_the_same_in_every_process():
    program = (
        "import argparse, inspect; from jaxlab.tokens import train_bpe;"
        "text = inspect.getsource(argparse).splitlines();"
        "print(train_bpe(text, 600).fingerprint)"
    )
    prints = set()
    for seed, threads in ("1", "1"), ("2", "2"):
        environment = {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        prints.add(result.stdout)
    assert len(prints) == 1 and len(prints.pop().strip()) == 64


def test_an_error_in_the_texts_reaches_the_caller():
    def texts():
        yield "fine"
        raise UserError("a.txt is not UTF-8")

    with pytest.raises(UserError, match="a.txt is not UTF-8"):
        train_bpe(texts(), 300)


# ---------------------------------------------------------------------- files


@BOTH
def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in tmp_path, tmp_path / "tokenizer.json", str(tmp_path):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.eos, loaded.vocab_size) == (tokenizer.eos, tokenizer.vocab_size)
        assert loaded.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()


def test_fingerprints_tell_tokenizers_apart():
    others = [byte_tokenizer(), BPE, train_bpe(TEXTS, 280), train_bpe(TEXTS[:1], 280)]
    assert len({tokenizer.fingerprint for tokenizer in others}) == 4
    assert BPE.fingerprint == train_bpe(iter(TEXTS * 3), 300).fingerprint


def foreign(path, specials=("<s>", "<|im_end|>", "</s>"), config=None):
    """A tokenizer.json as found on the hub: limits, padding and a template."""
    vocab = {s: i for i, s in enumerate(specials)}
    vocab |= {w: i + 10 for i, w in enumerate(["[UNK]", "hello", "world"])}
    made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(specials))
    if specials:
        made.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
        )
    made.enable_truncation(4)
    made.enable_padding(length=8)
    made.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_foreign_tokenizer_adds_and_cuts_nothing(tmp_path):
    tokenizer = load_tokenizer(foreign(tmp_path))
    ids = tokenizer.encode("hello world " * 3)
    assert ids.tolist() == [11, 12] * 3
    assert tokenizer.encode("hello").tolist() == [11]
    assert tokenizer.vocab_size == 13  # the ids have a gap
    assert tokenizer.eos == 2


@pytest.mark.parametrize(
    "eos", ["<|im_end|>", {"content": "<|im_end|>", "special": True}]
)
def test_the_config_beside_a_tokenizer_names_its_eos(tmp_path, eos):
    named = load_tokenizer(foreign(tmp_path, config={"eos_token": eos, "x": 1}))
    assert named.eos == 1
    copy = tmp_path / "copy"
    copy.mkdir()
    named.save(copy / "tokenizer.json")
    assert load_tokenizer(copy).eos == 1
    assert load_tokenizer(copy).fingerprint == named.fingerprint
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    assert load_tokenizer(tmp_path).fingerprint != named.fingerprint


@pytest.mark.requires("transformers")
def test_transformers_opens_a_saved_tokenizer(tmp_path):
    import transformers

    BPE.save(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == BPE.eos
    assert theirs.encode(TEXTS[1]) == BPE.encode(TEXTS[1]).tolist()


def test_bad_tokenizer_files_are_named(tmp_path):
    def error(path=tmp_path):
        with pytest.raises(UserError) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    file, config = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    assert error() == f"cannot read the tokenizer {file}: No such file or directory"
    for content in b"{}", b'{"model": ', b"text":
        file.write_bytes(content)
        assert error().startswith(f"{file}: not a tokenizer.json:")
    file.write_bytes(b"\xff")
    assert error(file) == f"{file} is not UTF-8 at byte 0"
    foreign(tmp_path, specials=["<s>"])
    assert "has no token <eos> or </s> or" in error()
    foreign(tmp_path, config={"eos_token": "<gone>"})
    assert f"{file}: the vocabulary has no token <gone>" in error()
    for content in "[]", "{":
        config.write_text(content)
        assert error().startswith(f"{config} is not a JSON object")


# -------------------------------------------------------------------- streams


def stream(tokenizer, ids):
    push = stream_decoder(tokenizer)
    return [push(i) for i in ids]


@BOTH
@given(text=st.text(st.sampled_from("aé€😀 \nthe"), max_size=30))
@quick
def test_a_stream_shows_whole_characters_at_once(tokenizer, text):
    ids = tokenizer.encode(text)
    parts = stream(tokenizer, ids)
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    # Nothing waits longer than its own character takes.
    for end in range(len(ids) + 1):
        shown = "".join(parts[:end])
        assert tokenizer.decode(ids[:end]).rstrip("\ufffd") == shown


@BOTH
@given(data=st.data())
@quick
def test_a_stream_of_any_ids_is_their_text(tokenizer, data):
    # From the bytes that make characters, and those that break them.
    pool = [tokenizer.eos, *tokenizer.encode("€😀é a")]
    if tokenizer is not BPE:
        pool += [0xFF, 0xC0, 0x80, 0xF0]
    ids = data.draw(st.lists(st.sampled_from(pool), max_size=30))
    whole = tokenizer.decode(ids)
    shown = "".join(stream(tokenizer, ids))
    assert whole.startswith(shown) and whole[len(shown) :].strip("\ufffd") == ""
    assert len(whole) - len(shown) <= 3


def test_a_stream_keeps_the_spaces_that_a_decoder_drops_at_the_start(tmp_path):
    """As in Llama 2: words carry their space, the first one loses it."""
    pieces = ["</s>", "▁the", "▁fox", "es", "<0xE2>", "<0x82>", "<0xAC>"]
    made = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True)
    )
    made.normalizer = normalizers.Prepend("▁")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert stream(tokenizer, [1, 2, 3, 1, 4, 5, 6, 2]) == [
        "the",
        " fox",
        "es",
        " the",
        "",
        "",
        "€",
        " fox",
    ]
