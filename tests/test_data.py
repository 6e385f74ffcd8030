"""Token files, and batches as a pure function of (seed, step, rows)."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxlab import data, encode
from jaxlab.corpora import Document, documents
from jaxlab.data import eval_batches, open_tokens, prefetch, prepare, train_batches
from jaxlab.errors import ConfigError, UserError

ROOT = Path(__file__).parents[1]
quick = settings(deadline=None, max_examples=40)


@pytest.fixture
def corpus(tmp_path):
    """A folder of 30 documents of different lengths."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"document {i} says é\n" * (1 + i % 7))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def texts_of(tokens, side):
    """The documents of a split, read back from its tokens."""
    ids = getattr(tokens, side)
    ends = np.flatnonzero(ids == tokens.tokenizer.eos)
    assert ends.size == 0 or ends[-1] == len(ids) - 1
    parts = np.split(ids, ends + 1)[:-1]
    return [tokens.tokenizer.decode(part) for part in parts]


def run(*arguments, **options):
    """Another Python process, in which jaxlab can be imported."""
    options = {"capture_output": True, "text": True, "cwd": ROOT} | options
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, **options)


# ---------------------------------------------------------------- token files


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_token_files_hold_every_document_once(corpus, cache, tokenizer):
    folder = prepare(str(corpus), tokenizer, eval_fraction=0.3, cache=cache)
    tokens = open_tokens(folder)
    train, held_out = texts_of(tokens, "train"), texts_of(tokens, "eval")
    split = encode.plan_split(documents(str(corpus)), 0.3)
    expected = {True: [], False: []}
    for name, text in documents(str(corpus)):
        expected[encode.name_hash(name) < split.cutoff].append(text)
    assert (train, held_out) == (expected[False], expected[True])
    assert len(train) > len(held_out) > 1
    assert tokens.meta["documents"] == {"train": len(train), "eval": len(held_out)}
    assert tokens.meta["tokens"] == {
        "train": len(tokens.train),
        "eval": len(tokens.eval),
    }
    assert tokens.meta["split"] == "document"
    assert tokens.train.dtype == np.uint16


def test_token_files_are_mapped_not_read(corpus, cache):
    tokens = open_tokens(prepare(str(corpus), cache=cache))
    assert isinstance(tokens.train.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens.train[0] = 1


def test_a_prepared_corpus_is_not_encoded_again(corpus, cache):
    folder = prepare(str(corpus), cache=cache)
    before = (folder / "train.bin").stat()
    assert prepare(str(corpus) + "/", cache=cache) == folder
    assert (folder / "train.bin").stat() == before
    assert folder.parent == cache and folder.name.startswith("corpus-bytes-")
    assert not [p for p in cache.iterdir() if ".tmp" in p.name]


def test_whatever_changes_the_tokens_changes_the_folder(corpus, cache):
    def made(**options):
        return prepare(str(corpus), **({"cache": cache} | options))

    folders = [made(), made(eval_fraction=0.5), made(tokenizer="bpe:280")]
    folders.append(made(tokenizer=str(folders[-1] / "tokenizer.json")))
    (corpus / "00.txt").write_text("changed")
    folders.append(made())
    assert len(set(folders)) == 5


def test_the_cache_lies_where_the_environment_says(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLAB_CACHE", str(tmp_path / "elsewhere"))
    assert prepare(str(corpus)).parent == tmp_path / "elsewhere"
    monkeypatch.delenv("JAXLAB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare(str(corpus)).parent == tmp_path / ".cache/jaxlab"


names = st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=40, unique=True)


@given(names=names, fraction=st.floats(0.001, 0.999))
@quick
def test_both_sides_of_a_split_have_a_document(names, fraction):
    split = encode.plan_split((Document(name, "text") for name in names), fraction)
    assert split.documents == len(names) and split.characters == 4 * len(names)
    below = [encode.name_hash(name) < split.cutoff for name in names]
    assert any(below) and not all(below)
    # The cutoff moves only where one side would be empty.
    plain = [encode.name_hash(name) < round(fraction * 2**64) for name in names]
    if any(plain) and not all(plain):
        assert below == plain
    else:
        assert sum(a != b for a, b in zip(below, plain, strict=True)) == 1


def test_the_hash_of_a_name_is_the_documented_one():
    # First 8 bytes of `printf os.py | sha256sum`.
    assert f"{encode.name_hash('os.py'):016x}" == "d9d7c69c64b6688c"
    shares = [encode.name_hash(f"{i}.txt") / 2**64 for i in range(4000)]
    assert np.mean(np.array(shares) < 0.1) == pytest.approx(0.1, abs=0.02)


def test_a_single_document_is_split_by_position(tmp_path, cache):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {i}\n" for i in range(1000)))
    text = book.read_text()
    tokens = open_tokens(prepare(str(book), eval_fraction=0.1, cache=cache))
    (head,), (tail,) = texts_of(tokens, "train"), texts_of(tokens, "eval")
    assert head + tail == text and len(tail) == round(0.1 * len(text))
    assert tokens.meta["split"] == "position"


@pytest.mark.parametrize("text", ["ab", "a"])
def test_a_tiny_document_can_be_prepared(tmp_path, cache, text):
    (tmp_path / "tiny.txt").write_text(text)
    tokens = open_tokens(prepare(str(tmp_path / "tiny.txt"), cache=cache))
    assert "".join(texts_of(tokens, "train") + texts_of(tokens, "eval")) == text


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_long_documents_are_encoded_in_pieces(corpus, cache, tokenizer, monkeypatch):
    lines = "".join(f"line {i}\n" for i in range(200))
    (corpus / "lines.txt").write_text(lines)
    (corpus / "unbroken.txt").write_text("é" * 1000)
    monkeypatch.setattr(encode, "_PIECE", 64)
    monkeypatch.setattr(encode, "_BATCH", 300)
    tokens = open_tokens(prepare(str(corpus), tokenizer, cache=cache))
    assert sorted(texts_of(tokens, "train") + texts_of(tokens, "eval")) == sorted(
        text for _, text in documents(str(corpus))
    )
    cuts = list(encode._cut("train", lines, 0, len(lines)))
    assert all(piece.text.endswith("\n") and len(piece.text) <= 64 for piece in cuts)
    assert [piece.last for piece in cuts] == [False] * (len(cuts) - 1) + [True]


def test_a_tokenizer_does_not_learn_from_held_out_text(tmp_path, cache):
    found = sorted((f"{i}.txt" for i in range(9)), key=encode.name_hash)
    for name in found:
        word = "zebra" if name == found[0] else "horse"
        (tmp_path / name).write_text(f"a {word} is a {word}\n" * 50)
    folder = prepare(str(tmp_path / "*.txt"), "bpe:300", cache=cache)
    tokenizer = open_tokens(folder).tokenizer
    assert len(tokenizer.encode(" horse")) == 1
    assert len(tokenizer.encode(" zebra")) > 3


def test_large_corpora_train_a_tokenizer_on_a_sample(corpus, cache, monkeypatch):
    whole = open_tokens(prepare(str(corpus), "bpe:400", cache=cache))
    monkeypatch.setattr(encode, "_BPE_CHARACTERS", 200)
    some = open_tokens(prepare(str(corpus), "bpe:400", cache=cache / "sample"))
    assert some.tokenizer.fingerprint != whole.tokenizer.fingerprint
    assert texts_of(some, "train") == texts_of(whole, "train")


def test_a_large_vocabulary_needs_32_bits(corpus, cache, tmp_path):
    vocab = {f"w{i}": i for i in range(70_000)} | {"document": 70_000, "</s>": 70_001}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    tokens = open_tokens(prepare(str(corpus), str(tmp_path), cache=cache))
    assert tokens.train.dtype == np.uint32
    assert {70_000, 70_001} <= set(tokens.train.tolist())


def test_rows_of_jsonl_and_parquet_are_documents(tmp_path, cache):
    import pyarrow.parquet

    texts = [f"row {i}" for i in range(50)]
    table = pyarrow.table({"body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    lines = "\n".join(json.dumps({"body": text}) for text in texts)
    (tmp_path / "rows.jsonl").write_text(lines)
    for name in "rows.jsonl", "rows.parquet":
        path = str(tmp_path / name)
        with pytest.raises(UserError, match='no (field|column) "text"'):
            prepare(path, cache=cache)
        folder = prepare(path, text_field="body", eval_fraction=0.2, cache=cache)
        tokens = open_tokens(folder)
        train, held_out = texts_of(tokens, "train"), texts_of(tokens, "eval")
        assert sorted(train + held_out) == sorted(texts)
        assert 1 < len(held_out) < 25


def test_two_processes_prepare_the_same_files_once(corpus, cache):
    program = "import sys; from jaxlab import data; print(data.prepare(*sys.argv[1:3], cache=sys.argv[3]))"  # noqa: E501
    command = [sys.executable, "-c", program, str(corpus), "bpe:280", str(cache)]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (folder,) = printed
    assert [p for p in cache.iterdir() if p.is_dir()] == [Path(folder.strip())]
    open_tokens(folder.strip())


def test_what_a_killed_process_left_behind_is_removed(corpus, cache):
    folder = prepare(str(corpus), cache=cache)
    left = folder.with_name(f".{folder.name}.tmpabc")
    folder.rename(left)
    (left / "meta.json").unlink()
    assert prepare(str(corpus), cache=cache) == folder
    assert not left.exists()
    open_tokens(folder)


# ------------------------------------------------------------------ bad input


def test_a_bad_corpus_leaves_nothing_behind(corpus, cache):
    (corpus / "99.txt").write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="99.txt is not UTF-8 at byte 3"):
        prepare(str(corpus), "bpe:300", cache=cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"eval_fraction": 0.0}, "the eval fraction is 0.0; it must be between"),
        ({"eval_fraction": 1.0}, "the eval fraction is 1.0; it must be between"),
        ({"tokenizer": "byte"}, 'no tokenizer "byte": write bytes, bpe:4096'),
        ({"tokenizer": "bpe:4k"}, 'no tokenizer "bpe:4k"'),
        ({"tokenizer": "bpe:10"}, "vocabulary of 10 is too small"),
    ],
)
def test_bad_options_are_configuration_errors(corpus, cache, options, reason):
    with pytest.raises(ConfigError, match=reason):
        prepare(str(corpus), cache=cache, **options)


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write token files into .*/file/cache"):
        prepare(str(corpus), cache=tmp_path / "file/cache")


def test_a_full_disk_leaves_nothing_behind(corpus, cache):
    program = (
        "import resource, sys; from jaxlab import cli, data;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500));"
        "cli.run_main(lambda a: data.prepare(a[0], cache=a[1]))"
    )
    result = run("-c", program, corpus, cache)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot write token files into {cache}:")
    assert len(result.stderr.splitlines()) == 1
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("train.bin", lambda d: d[:-2], "train.bin has [0-9]+ bytes instead of"),
        ("eval.bin", lambda d: b"\x01" + d[1:], "eval.bin is damaged, its SHA-256"),
        ("meta.json", lambda d: d[:-9], "meta.json is damaged"),
        ("meta.json", lambda d: b"{}", "meta.json is damaged"),
        ("meta.json", lambda d: b"[]", "meta.json is damaged"),
        ("meta.json", lambda d: d.replace(b'format": 1', b'format": 0'), "another ver"),
    ],
)
def test_damaged_token_files_are_named(corpus, cache, name, change, reason):
    folder = prepare(str(corpus), cache=cache)
    damage(folder, name, change)
    with pytest.raises(UserError, match=reason) as caught:
        open_tokens(folder)
    assert "delete the folder and prepare the corpus again" in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["train.bin", "meta.json", "tokenizer.json"])
def test_missing_token_files_are_named(corpus, cache, name):
    folder = prepare(str(corpus), cache=cache)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"cannot read .*{name}: No such file"):
        open_tokens(folder)


def test_a_tokenizer_of_other_token_files_is_refused(corpus, cache):
    folder = prepare(str(corpus), "bpe:300", cache=cache)
    other = prepare(str(corpus), "bpe:290", cache=cache)
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    with pytest.raises(
        UserError, match="tokenizer.json is not the tokenizer that made"
    ):
        open_tokens(folder)


def test_large_files_are_hashed_on_demand(corpus, cache, monkeypatch):
    monkeypatch.setattr(data, "_HASHED_BYTES", 10)
    folder = prepare(str(corpus), cache=cache)
    damage(folder, "train.bin", lambda d: b"\x01" + d[1:])
    open_tokens(folder)
    with pytest.raises(UserError, match="train.bin is damaged"):
        open_tokens(folder, verify=True)


# -------------------------------------------------------------------- training


def counting(n):
    """Tokens that say where they are."""
    return np.arange(n, dtype=np.uint32)


def equal(one, two):
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
        for a, b in zip(one, two, strict=True)
    )


def sequences(batch, length):
    """Which sequences a batch of counting tokens holds, in order."""
    return (batch.inputs_abt[..., 0] // length).ravel().tolist()


def test_a_batch_holds_sequences_and_their_next_tokens():
    batch = train_batches(counting(1000), length=7, batch=6, seed=0, accumulate=2)[4]
    assert batch.inputs_abt.shape == batch.mask_abt.shape == (2, 3, 7)
    assert batch.inputs_abt.dtype == batch.targets_abt.dtype == np.int32
    assert batch.mask_abt.dtype == np.float32 and (batch.mask_abt == 1).all()
    assert batch.segments_abt is None
    assert (batch.inputs_abt[..., 0] % 7 == 0).all()
    assert (np.diff(batch.inputs_abt, axis=-1) == 1).all()
    assert np.array_equal(batch.targets_abt, batch.inputs_abt + 1)


@given(
    n=st.integers(2, 120),
    length=st.integers(1, 9),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    first=st.integers(0, 3),
)
@quick
def test_an_epoch_has_every_sequence_once(n, length, batch, seed, first):
    count = (n - 1) // length
    assume(count)
    dataset = train_batches(counting(n), length=length, batch=batch, seed=seed)
    start, end = first * count, (first + 2) * count  # two epochs of the stream
    steps = range(start // batch, -(-end // batch))
    stream = [s for step in steps for s in sequences(dataset[step], length)]
    stream = stream[start - steps[0] * batch :]
    assert (
        sorted(stream[:count]) == sorted(stream[count : 2 * count]) == [*range(count)]
    )


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = set()
    for seed in range(8):
        dataset = train_batches(counting(401), length=4, batch=100, seed=seed)
        orders |= {tuple(sequences(dataset[epoch], 4)) for epoch in range(8)}
    assert len(orders) == 64
    assert tuple(range(100)) not in orders


def test_the_order_is_the_one_of_earlier_versions():
    """A change would make a resumed run see other data than an uninterrupted one."""
    dataset = train_batches(counting(801), length=8, batch=5, seed=17)
    assert sequences(dataset[0], 8) == [30, 90, 23, 51, 56]
    assert sequences(dataset[123_456], 8) == [94, 38, 31, 98, 69]


@given(
    hosts=st.integers(1, 4),
    rows_each=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    step=st.integers(0, 10**9),
    seed=st.integers(0, 100),
)
@quick
def test_hosts_and_accumulation_share_one_global_batch(
    hosts, rows_each, accumulate, step, seed
):
    tokens = np.random.default_rng(0).integers(0, 9, 501).astype(np.uint16)
    columns = hosts * rows_each
    options = {"length": 10, "batch": columns * accumulate, "seed": seed, "eos": 3}
    flat = train_batches(tokens, **options)[step]
    options["accumulate"] = accumulate
    whole = train_batches(tokens, **options)[step]
    assert whole.inputs_abt.shape == (accumulate, columns, 10)
    for array, one in zip(whole, flat, strict=True):
        assert np.array_equal(array.reshape(one.shape), one)
    # Rows of a host, in any order, that it may also name in another one.
    order = np.random.default_rng(seed).permutation(columns)
    for rows in np.split(order, hosts):
        mine = train_batches(tokens, **options, rows=rows)[step]
        assert equal(mine, data.Batch(*(array[:, rows] for array in whole)))


def test_a_step_does_not_depend_on_those_before():
    tokens = counting(5000)
    options = {"length": 16, "batch": 8, "seed": 5}
    one, other = train_batches(tokens, **options), train_batches(tokens, **options)
    backwards = [one[step] for step in reversed(range(80))][::-1]
    for step, batch in enumerate(backwards):
        assert equal(batch, other[step])
    assert len(one) > 10**15


def test_documents_are_isolated():
    eos = 9
    rng = np.random.default_rng(0)
    tokens = rng.choice([1, 2, eos], 401).astype(np.uint16)
    dataset = train_batches(tokens, length=20, batch=10, seed=0, accumulate=2, eos=eos)
    for step in range(4):
        batch = dataset[step]
        rows = zip(*(array.reshape(10, 20) for array in batch), strict=True)
        for inputs, targets, mask, segments in rows:
            document = 1
            for position in range(20):
                assert segments[position] == document
                # The target of an eos belongs to the next document.
                assert mask[position] == (inputs[position] != eos)
                document += inputs[position] == eos
            assert targets[:-1].tolist() == inputs[1:].tolist()


def test_a_sequence_longer_than_the_corpus_names_both():
    with pytest.raises(UserError, match="sequence of 64 tokens .* has 64 tokens"):
        train_batches(counting(64), length=64, batch=1, seed=0)
    assert train_batches(counting(65), length=64, batch=3, seed=0)[0].mask_abt.all()
    with pytest.raises(UserError, match="which has 0 tokens"):
        train_batches(counting(0), length=8, batch=1, seed=0)


def test_a_batch_that_does_not_divide_names_both():
    with pytest.raises(ConfigError, match="batch of 8 does not divide into 3"):
        train_batches(counting(65), length=4, batch=8, seed=0, accumulate=3)


# ------------------------------------------------------------------ evaluation


@given(n=st.integers(2, 200), length=st.integers(1, 12), batch=st.integers(1, 9))
@quick
def test_evaluation_sees_every_target_once(n, length, batch):
    dataset = eval_batches(counting(n), length=length, batch=batch)
    batches = list(dataset)
    assert len(batches) == len(dataset) == -(-(n - 1) // (length * batch))
    targets = []
    for one in batches:
        assert one.inputs_abt.shape == (1, batch, length)
        inside = one.mask_abt == 1
        assert (one.mask_abt[~inside] == 0).all()
        assert np.array_equal(one.targets_abt[inside], one.inputs_abt[inside] + 1)
        targets += one.targets_abt[inside].tolist()
    assert targets == list(range(1, n))


def test_evaluation_can_be_limited_and_shared():
    options = {"length": 5, "batch": 4, "eos": 3}
    tokens = np.random.default_rng(0).integers(0, 9, 107).astype(np.uint16)
    whole = eval_batches(tokens, **options)
    assert len(whole) == 6
    assert len(eval_batches(tokens, **options, limit=2)) == 2
    assert len(eval_batches(tokens, **options, limit=9)) == 6
    for rows in [0, 3], [2], np.array([1]):
        mine = eval_batches(tokens, **options, rows=rows)
        assert len(mine) == 6
        for index in range(6):
            expected = data.Batch(*(array[:, rows] for array in whole[index]))
            assert equal(mine[index], expected)
    # 106 targets: the last batch has one whole sequence, one target, and padding.
    last = whole[5]
    assert (last.segments_abt[0, :1] > 0).all() and (
        last.segments_abt[0, 2:] == 0
    ).all()
    assert last.segments_abt[0, 1].tolist() == [1, 0, 0, 0, 0]
    assert not last.mask_abt[0, 1, 1:].any() and not last.mask_abt[0, 2:].any()


@pytest.mark.parametrize("n", [0, 1])
def test_nothing_to_evaluate_on_is_an_error(n):
    with pytest.raises(UserError, match=f"held-out text has {n} tokens, too few"):
        eval_batches(counting(n), length=4, batch=2)


# -------------------------------------------------------------------- prefetch


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_prefetch_reads_the_steps_in_order_and_ends(threads):
    dataset = train_batches(counting(4000), length=16, batch=8, seed=1, eos=3)
    with prefetch(dataset, 1000, threads=threads) as batches:
        for step, batch in enumerate(itertools.islice(batches, 30), 1000):
            assert equal(batch, dataset[step])
        assert len(readers()) <= threads
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers()


def test_prefetch_ends_with_the_dataset():
    dataset = eval_batches(counting(100), length=5, batch=3)
    with prefetch(dataset) as batches:
        found = list(batches)
    assert len(found) == len(dataset) == 7
    assert all(equal(batch, dataset[i]) for i, batch in enumerate(found))


def test_prefetch_passes_errors_on():
    broken = np.zeros(100, np.uint16)
    dataset = train_batches(broken, length=5, batch=3, seed=-1)
    with pytest.raises(ValueError), prefetch(dataset) as batches:
        next(batches)


def test_a_process_that_forgets_its_prefetch_still_ends():
    program = (
        "import numpy as np; from jaxlab import data;"
        "d = data.train_batches(np.arange(99), length=5, batch=3, seed=0);"
        "reading = data.prefetch(d, 5); batches = reading.__enter__();"
        "print(next(batches).inputs_abt.shape)"
    )
    result = run("-W", "error", "-c", program, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "(1, 3, 5)\n", "")


# ---------------------------------------------------------------------- script


def test_the_script_prepares_and_reports(corpus, cache):
    command = ["scripts/prepare_data.py", corpus, "--cache", cache, "--verify"]
    result = run(*command, "--eval-fraction", "0.3")
    assert (result.returncode, result.stderr) == (0, "")
    folder, train, held_out, vocabulary = result.stdout.splitlines()
    tokens = open_tokens(folder)
    assert train == f"train: {len(tokens.train):,} tokens in 22 documents"
    assert held_out == f"eval: {len(tokens.eval):,} tokens in 8 documents"
    assert vocabulary == "vocabulary: 257"


@pytest.mark.parametrize(
    "arguments, code, reason",
    [
        (["missing"], 1, 'no corpus "missing"'),
        (["stdlib", "--tokeniser", "bytes"], 2, "perhaps you meant --tokenizer"),
        (["stdlib", "--eval-fraction", "2"], 2, "the eval fraction is 2.0"),
        ([], 2, "CORPUS"),
    ],
)
def test_the_script_fails_in_one_line(cache, arguments, code, reason):
    result = run("scripts/prepare_data.py", *arguments, "--cache", cache)
    assert (result.returncode, result.stdout) == (code, "")
    assert len(result.stderr.splitlines()) == 1 and reason in result.stderr
