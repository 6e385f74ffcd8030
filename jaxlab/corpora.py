"""Documents of a corpus, found by name or by path, with no network.

A corpus is one of

- `stdlib`: the `.py` files of the running interpreter's own library, without its
  tests and its tables of character codes;
- `pydocs`, `linuxdocs`: the reStructuredText of the Python and the Linux
  manuals, as Debian and Ubuntu package them;
- a folder (its text files, by suffix), a glob (every match) or one file.
  `.jsonl` and `.parquet` files hold one document a row, any other file is one
  document of UTF-8 text. Each but Parquet may be gzipped (`.gz`).

Documents come in the order of their files' names, so that the same corpus gives
the same stream everywhere. A document's name is its path below the corpus, with
`:line` (`.jsonl`) or `:row` (`.parquet`), counted from 1, after it; it stays the
same when the corpus moves to another folder. Documents without text are left out.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

from jaxlab.errors import UserError

NAMED = ("stdlib", "pydocs", "linuxdocs")
TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .org .tex .html .htm .xml .csv .tsv .py .pyi .c .h .cc .cpp"
    " .hpp .cu .java .js .ts .go .rs .jl .r .rb .lua .sh .sql .css".split()
)
"""What is read from a folder, besides `.jsonl` and `.parquet`."""

DEBIAN_DOCS = Path("/usr/share/doc")


class Document(NamedTuple):
    """One text of a corpus."""

    name: str
    text: str


class _Corpus(NamedTuple):
    version: str
    root: Path  # names are relative to it
    files: list[Path]


def documents(corpus: str, text_field: str = "text") -> Iterator[Document]:
    """Reads a corpus, one document at a time.

    Args:
        corpus: a name or a path, see the module's description. A name wins over a
            folder that is called the same (write `./stdlib` for the folder).
        text_field: the field of a `.jsonl` object, or the column of a `.parquet`
            file, that holds the text.

    Returns:
        An iterator over the documents.

    Raises:
        UserError: the corpus is missing or empty, or a file of it is unreadable,
            damaged, not UTF-8 (with the offset of the byte) or without such a
            field. A missing corpus is noticed at once, the rest while reading.
    """
    return _read_all(corpus, _find(corpus), text_field)


def corpus_version(corpus: str) -> str:
    """Says which state of a corpus `documents` reads.

    Returns:
        The interpreter or the package with its version; for paths a digest of the
        files' names, sizes and times of change.

    Raises:
        UserError: the corpus is missing.
    """
    return _find(corpus).version


def _find(corpus: str) -> _Corpus:
    if corpus == "stdlib":
        return _stdlib()
    if corpus == "pydocs":
        return _packaged(corpus, "python3.*-doc/html/_sources", apt="python3-doc")
    if corpus == "linuxdocs":
        return _packaged(corpus, "linux-doc*/Documentation", apt="linux-doc")
    path = Path(corpus).expanduser()
    with _reading(path):
        root, files = _search(corpus, path)
    return _Corpus(_digest(root, files), root, files)


def _search(corpus: str, path: Path) -> tuple[Path, list[Path]]:
    """The files of a corpus given by path, and the folder of their names."""
    if path.is_dir():
        files = [file for file in _walk(path) if _is_text(file)]
        if not files:
            raise UserError(
                f"no text files in the folder {corpus}: it is searched for .jsonl,"
                f" .parquet, {', '.join(sorted(TEXT_SUFFIXES))}; a glob such as"
                f" '{corpus}/**/*' takes any"
            )
        return path, files
    if path.exists():
        return path.parent, [path]
    matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
    files = [match for match in matches if match.is_file()]
    if not files:
        raise UserError(
            f'no corpus "{corpus}": no such file or folder, no match as a glob,'
            f" and none of {', '.join(NAMED)}"
        )
    return Path(os.path.commonpath([file.parent for file in files])), files


def _stdlib() -> _Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    # Packages that users install, tests, and (encodings) tables of character codes.
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = [
        file
        for file in _walk(root, skip)
        if file.suffix == ".py"
        # Written by the build: not the same on two machines with one version.
        and not file.name.startswith("_sysconfigdata")
        and not file.parent.name.startswith("config-")
    ]
    if not files:
        raise UserError(f"the corpus stdlib is empty: no Python source below {root}")
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return _Corpus(version, root, files)


def _packaged(corpus: str, pattern: str, apt: str) -> _Corpus:
    """The .rst files of a documentation package, of the newest version installed."""
    roots = [root for root in DEBIAN_DOCS.glob(pattern) if root.is_dir()]
    if not roots:
        raise UserError(
            f"the corpus {corpus} is not installed; run: sudo apt install {apt}"
        )
    root = max(roots, key=lambda root: [int(n) for n in re.findall(r"\d+", str(root))])
    files = [
        file
        for file in _walk(root, {"translations"})
        if re.search(r"\.rst(\.txt)?(\.gz)?$", file.name)
    ]
    if not files:
        raise UserError(f"the corpus {corpus} is empty: no .rst files below {root}")
    package = root.relative_to(DEBIAN_DOCS).parts[0]
    version = _package_version(package) or _digest(root, files)
    return _Corpus(f"{package} {version}", root, files)


def _package_version(package: str) -> str | None:
    """Version at the head of a package's changelog: `linux (6.1.192-2) stable; ...`."""
    changelog = DEBIAN_DOCS / package / "changelog.Debian.gz"
    if not changelog.exists():
        return None
    with _reading(changelog), gzip.open(changelog, "rt", encoding="utf-8") as file:
        match = re.search(r"\((\S+)\)", file.readline())
    return match and match[1]


def _walk(root: Path, skip: Set[str] = frozenset()) -> list[Path]:
    """The files below a folder in the order of their names, hidden ones left out."""

    def stop(error: OSError) -> None:  # by default, what cannot be read is skipped
        raise error

    found = []
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
        found += [Path(folder, file) for file in files if not file.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _is_text(file: Path) -> bool:
    return _suffix(file) in TEXT_SUFFIXES | {".jsonl", ".parquet"}


def _suffix(file: Path) -> str:
    """The suffix that says the format: `.txt` for `a.txt` and for `a.txt.gz`."""
    return Path(file.stem if file.suffix == ".gz" else file).suffix.lower()


def _digest(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with _reading(file):
            status = file.stat()
        name = file.relative_to(root).as_posix()
        digest.update(os.fsencode(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return digest.hexdigest()[:16]


def _read_all(corpus: str, found: _Corpus, text_field: str) -> Iterator[Document]:
    empty = True
    for file in found.files:
        name = file.relative_to(found.root).as_posix()
        for document in _read(file, name, text_field):
            if document.text:
                empty = False
                yield document
    if empty:
        raise UserError(f'the corpus "{corpus}" is empty: its files hold no text')


def _read(file: Path, name: str, text_field: str) -> Iterator[Document]:
    with _reading(file):
        if _suffix(file) == ".parquet":
            yield from _read_parquet(file, name, text_field)
        elif _suffix(file) == ".jsonl":
            yield from _read_jsonl(file, name, text_field)
        else:
            with _open(file) as stream:
                text = _decode(stream.read(), file)
            yield Document(name, text)


def _read_jsonl(file: Path, name: str, text_field: str) -> Iterator[Document]:
    offset = 0
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            text = _decode(line, file, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise UserError(f"{file}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: not a JSON object")
            if text_field not in row:
                raise UserError(
                    f'{file}, line {number}: no field "{text_field}" among'
                    f" {', '.join(row)}; name the text's with --text-field"
                )
            yield Document(
                f"{name}:{number}", _text(row[text_field], f"{file}, line {number}")
            )


def _read_parquet(file: Path, name: str, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise UserError(
                    f'{file}: no column "{text_field}" among {", ".join(columns)};'
                    " name the text's with --text-field"
                )
            number = 0
            for rows in table.iter_batches(batch_size=1024, columns=[text_field]):
                for row in rows.column(0):
                    number += 1
                    text = _text(row.as_py(), f"{file}, row {number}")
                    yield Document(f"{name}:{number}", text)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a sound Parquet file: {error}") from None


def _text(value: object, where: str) -> str:
    """Checks a row's text; a missing one (null) is an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: the text is not a string but {value!r:.40}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a UTF-16 pair: "\ud800"
        raise UserError(f"{where}: the text is not valid Unicode") from None
    return value


def _open(file: Path):
    return gzip.open(file) if file.suffix == ".gz" else open(file, "rb")


def _decode(data: bytes, file: Path, offset: int = 0) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 at byte {offset + error.start}: convert it"
            " (iconv -t utf-8) or leave it out"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns a file that cannot be read or unpacked into the user's error."""
    try:
        yield
    except OSError as error:
        culprit = error.filename or file
        raise UserError(f"cannot read {culprit}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{file} is not sound gzip: {error}") from None
