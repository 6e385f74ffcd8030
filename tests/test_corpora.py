"""Corpora by name and by path, and what is wrong with bad ones."""

import gzip
import json
import os
import re
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxlab import corpora
from jaxlab.corpora import Document, corpus_version, documents
from jaxlab.errors import UserError


def write(path, content="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(corpus, **options):
    return list(documents(str(corpus), **options))


def error(corpus, **options):
    with pytest.raises(UserError) as caught:
        read(corpus, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------ by name


def test_stdlib_is_the_interpreters_own_source_without_tests():
    found = read("stdlib")
    names = [document.name for document in found]
    assert names == sorted(set(names))
    assert {"argparse.py", "asyncio/tasks.py", "unittest/case.py"} <= set(names)
    assert not any(re.search("(^|/)(test|tests|site-packages)/", n) for n in names)
    with open(os.__file__, encoding="utf-8", newline="") as file:
        assert dict(found)["os.py"] == file.read()
    assert sum(len(document.text) for document in found) > 5e6
    assert re.fullmatch(r"\w+ 3\.\d+\.\d+\S*", corpus_version("stdlib"))


@pytest.fixture
def share(tmp_path, monkeypatch):
    """The place of documentation packages, with none installed."""
    monkeypatch.setattr(corpora, "DEBIAN_DOCS", tmp_path / "share")
    return tmp_path / "share"


def test_missing_packages_say_how_to_install_them(share):
    assert error("pydocs").endswith("run: sudo apt install python3-doc")
    assert error("linuxdocs").endswith("run: sudo apt install linux-doc")


def test_pydocs_reads_the_newest_package(share):
    for version in "3.9", "3.13":
        sources = share / f"python{version}/html/_sources"
        write(sources / "library/os.rst.txt", f"os of {version}")
        write(sources / "_static/logo.svg", "<svg/>")
        package = share / f"python{version}-doc"
        package.mkdir()
        (package / "html").symlink_to(f"../python{version}/html")
        write(
            package / "changelog.Debian.gz",
            f"python{version} ({version}.2-6+deb) stable; urgency=low\n\n  * Fix.\n",
        )
    write(share / "python3-other-doc/html/_sources/a.rst.txt", "no")
    assert read("pydocs") == [Document("library/os.rst.txt", "os of 3.13")]
    assert corpus_version("pydocs") == "python3.13-doc 3.13.2-6+deb"


def test_linuxdocs_leaves_translations_out(share):
    root = share / "linux-doc-6.1/Documentation"
    write(root / "mm/slab.rst.gz", "slabs")
    write(root / "short.rst", "short")
    write(root / "Kconfig.txt.gz", "no")
    write(root / "translations/it_IT/short.rst", "no")
    assert read("linuxdocs") == [
        Document("mm/slab.rst.gz", "slabs"),
        Document("short.rst", "short"),
    ]
    first = corpus_version("linuxdocs")  # no changelog: the files say
    write(root / "short.rst", "longer")
    assert first.startswith("linux-doc-6.1 ") and corpus_version("linuxdocs") != first


def test_a_package_without_files_is_an_error(share):
    (share / "linux-doc-6.1/Documentation").mkdir(parents=True)
    assert "the corpus linuxdocs is empty" in error("linuxdocs")


# ------------------------------------------------------------------ by path


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    write(tmp_path / "b.md", "b")
    write(tmp_path / "a/z.TXT", "z")
    write(tmp_path / "a/packed.rst.gz", "packed")
    write(tmp_path / "a.py", "a")
    write(tmp_path / "image.png", b"\x89PNG")
    write(tmp_path / ".git/notes.txt", "no")
    write(tmp_path / ".hidden.txt", "no")
    assert read(tmp_path) == [
        Document("a.py", "a"),
        Document("a/packed.rst.gz", "packed"),
        Document("a/z.TXT", "z"),
        Document("b.md", "b"),
    ]


def test_a_glob_takes_any_suffix_and_names_from_the_common_folder(tmp_path):
    write(tmp_path / "x/1/LICENSE", "one")
    write(tmp_path / "x/2/deep/LICENSE", "two")
    write(tmp_path / "y/LICENSE", "no")
    (tmp_path / "x/LICENSE").mkdir()
    found = read(tmp_path / "x/**/LICENSE")
    assert found == [Document("1/LICENSE", "one"), Document("2/deep/LICENSE", "two")]


def test_one_file_is_read_as_it_is(tmp_path):
    text = "Zürich\r\n\n 東京 \x00"
    assert read(write(tmp_path / "notes", text)) == [Document("notes", text)]
    marked = write(tmp_path / "marked.txt", b"\xef\xbb\xbf" + text.encode())
    assert read(marked)[0].text == text
    odd = write(tmp_path / "data[1].txt", "brackets")  # also a glob, without a match
    assert read(odd)[0].text == "brackets"


def test_names_do_not_depend_on_where_the_corpus_lies(tmp_path):
    write(tmp_path / "here/a/b.txt")
    before = read(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert read(tmp_path / "there") == before


def test_the_version_of_a_path_follows_its_files(tmp_path):
    one = write(tmp_path / "one.txt")
    first = corpus_version(str(tmp_path))
    assert corpus_version(str(tmp_path)) == first
    os.utime(one, ns=(0, 0))
    second = corpus_version(str(tmp_path))
    two = write(tmp_path / "two.txt")
    third = corpus_version(str(tmp_path))
    two.unlink()
    assert len({first, second, third}) == 3
    assert corpus_version(str(tmp_path)) == second


def test_jsonl_has_a_document_a_line(tmp_path):
    lines = [
        {"text": "one\n"},
        {"text": None},
        {"text": "", "id": 3},
        {"text": "zwölf"},
    ]
    content = "\n\n".join(json.dumps(line) for line in lines)
    expected = [("{}:1", "one\n"), ("{}:7", "zwölf")]
    for name in "rows.jsonl", "rows.jsonl.gz":
        found = read(write(tmp_path / name, content))
        assert found == [(key.format(name), text) for key, text in expected]
    write(tmp_path / "field.jsonl", '{"body": "here"}\n')
    assert read(tmp_path / "field.jsonl", text_field="body")[0].text == "here"


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"body": "x", "id": 1}', 'no field "text" among body, id; .*--text-field'),
        ('{"text": 12}', "line 2: the text is not a string but 12"),
        (r'{"text": "\ud800"}', "line 2: the text is not valid Unicode"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 27:"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, reason):
    first = b'{"text": "on\xc3\xa9"}\n'
    line = line.encode() if isinstance(line, str) else line
    file = write(tmp_path / "rows.jsonl", first + line)
    message = error(file)
    assert message.startswith(str(file)) and re.search(reason, message)


def test_parquet_has_a_document_a_row(tmp_path):
    texts = [f"text {i}" if i % 3 else None for i in range(3000)]
    expected = [(f"a.parquet:{i + 1}", t) for i, t in enumerate(texts) if t]
    strings = pyarrow.array(texts)
    for column in strings, strings.cast("large_string"), strings.dictionary_encode():
        table = pyarrow.table({"text": column, "id": range(len(texts))})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
        assert read(tmp_path / "a.parquet") == expected


def test_parquet_errors_name_the_file(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), file)
    assert f'{file}: no column "text" among body, n' in error(file)
    assert f"{file}, row 1: the text is not a string but 1" in error(
        file, text_field="n"
    )
    file.write_bytes(file.read_bytes()[:-9])
    assert f"{file} is not a sound Parquet file" in error(file, text_field="body")


# --------------------------------------------------------------- bad corpora


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    write(tmp_path / "a.txt", "fine")
    bad = write(tmp_path / "b.txt", "Zürich".encode("latin-1"))
    assert error(tmp_path).startswith(f"{bad} is not UTF-8 at byte 1: convert it")
    packed = write(tmp_path / "c.txt.gz", b"abc\xff")
    assert error(packed).startswith(f"{packed} is not UTF-8 at byte 3")


def test_a_missing_corpus_is_noticed_before_reading(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        documents(str(tmp_path / "missing*"))
    with pytest.raises(UserError, match='no corpus "wiki".* stdlib, pydocs, linuxdocs'):
        corpus_version("wiki")


def test_an_empty_corpus_is_an_error(tmp_path):
    write(tmp_path / "image.png")
    assert f"no text files in the folder {tmp_path}" in error(tmp_path)
    empty = write(tmp_path / "empty.txt", "")
    assert error(empty) == f'the corpus "{empty}" is empty: its files hold no text'
    rows = write(tmp_path / "rows.jsonl", '\n{"text": ""}\n')
    assert "its files hold no text" in error(rows)


def test_a_damaged_gzip_file_is_named(tmp_path):
    whole = gzip.compress(os.urandom(1000).hex().encode())
    for content in whole[:-200], b"not gzip", whole[:200] + b"\xff" * 100 + whole[300:]:
        bad = tmp_path / "bad.txt.gz"
        bad.write_bytes(content)
        assert str(bad) in error(bad)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert "gone.txt: No such file" in error(tmp_path)
    assert "File name too long" in error("x" * 5000)


def test_a_folder_that_cannot_be_listed_is_named():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        write(Path(root, "a.txt"))
        Path(root, "sealed").mkdir(mode=0)
        try:
            if user == 0:  # who may list anything
                os.seteuid(65534)
            assert f"cannot read {root}/sealed: Permission denied" in error(root)
        finally:
            os.seteuid(user)
