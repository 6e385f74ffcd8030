"""The local bibliography: what a paper may cite.

`library/` of the workspace holds BibTeX files (any name, `.bib`) and for each entry
that may be cited its stored source, `library/KEY.pdf` (or .txt, .md, .html): the text
itself or notes of what was read. jaxlab brings entries, with notes, for the methods
that it uses itself. Nothing is looked up anywhere else.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import ToolError
from jaxlab.research.workspace import Workspace

SHIPPED = Path(__file__).with_name("library")
SOURCES = (".pdf", ".txt", ".md", ".html")
KEY = re.compile(r"[A-Za-z][\w.+-]{0,60}", re.ASCII)
# Accents and escaped signs: all that a bibliography needs of TeX.
_COMMAND = re.compile(
    r"""\\(?!["'`^~=.&%$#_{}\-]|(?:[cvHuk]|ss|oe?|OE?|aa|AA|ae|AE|l|L|i|j)\b)"""
)


class Entry(NamedTuple):
    """An entry of a bibliography."""

    key: str
    bibtex: str
    title: str


def parse(text: str) -> Iterator[Entry]:
    """Yields the entries of a BibTeX file; what is none is passed over.

    An entry with TeX commands other than accents is left out, since TeX would run
    them.
    """
    for match in re.finditer(r"@(\w+)\s*\{\s*([^\s,{}]+)\s*,", text):
        depth, at = 1, match.end()
        while at < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        body = text[match.start() : at]
        if depth or not KEY.fullmatch(match[2]) or _COMMAND.search(body):
            continue
        if match[1].lower() in ("comment", "string", "preamble"):
            continue
        title = re.search(
            r"\btitle\s*=\s*[{\"](.+?)[}\"]\s*,?\s*\n", body + "\n", re.DOTALL
        )
        words = re.sub(r"[{}]|\s+", " ", title[1]).split() if title else []
        yield Entry(match[2], body, " ".join(words))


def stored(workspace: Workspace) -> dict[str, Entry]:
    """The workspace's entries whose source is stored, by key."""
    names = [f for f in workspace.files("library") if f.count("/") == 1]
    entries = [
        entry
        for name in names
        if name.endswith(".bib")
        for entry in parse(workspace.read_text(name))
    ]
    sources = {Path(n).stem for n in names if Path(n).suffix in SOURCES}
    return {entry.key: entry for entry in entries if entry.key in sources}


def shipped() -> dict[str, Entry]:
    """The entries that jaxlab brings, by key."""
    return {e.key: e for e in parse((SHIPPED / "jaxlab.bib").read_text())}


def bibtex(workspace: Workspace, keys: list[str]) -> str:
    """The BibTeX file of a paper that cites `keys`, in that order.

    Raises:
        ToolError: a key is not stored.
    """
    have = stored(workspace)
    missing = [key for key in keys if key not in have]
    if missing:
        raise ToolError(f"{missing[0]!r} is not in the stored bibliography")
    return "".join(f"{have[key].bibtex}\n\n" for key in keys)


@tool("idempotent")
def cite(context: Context, query: str) -> Result:
    """Searches the local bibliography and gives keys to cite; nothing else is known.

    What jaxlab brings is stored in the workspace when it is found.
    """
    workspace = context.workspace
    words = [w for w in re.findall(r"\w+", query.lower()) if len(w) > 2]

    def fits(entry: Entry) -> bool:
        text = f"{entry.key} {entry.bibtex}".lower()
        return bool(words) and all(word in text for word in words)

    refs = []
    for key, entry in shipped().items():
        if fits(entry) and key not in stored(workspace):
            note = (SHIPPED / f"{key}.md").read_text()
            refs.append(workspace.write_text(f"library/{key}.md", note))
            refs.append(workspace.write_text(f"library/{key}.bib", entry.bibtex + "\n"))
    found = {k: e.title for k, e in stored(workspace).items() if fits(e)}
    return Result({"entries": found}, tuple(refs))
