"""Two writers of one document: typst, which makes the PDF, and LaTeX.

Both walk the same pieces, so they show the same facts in the same order. Everything
that a number can come from is a span with a kind (fact, or structural: label, cite,
page, reference) and an id; typst tells where on the page each span begins and ends.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxlab.research import facts
from jaxlab.research.document import Document, Facts, Inline, expand

RULE_BASED = "Written by a rule-based driver, not by a person or a language model."
OTHER = (
    "Written by a language model's agents; every number is recomputed from its runs."
)

_TYPST = """\
#let mark(..what) = box(width: 0pt)[#metadata(what.pos())<span>]
#let long(kind, id, body) = mark(kind, id, "start") + body + mark(kind, id, "end")
#let span(kind, id, body) = box(long(kind, id, body))
#set document(title: TITLE, date: none)
#set page(paper: "a4", margin: 2.5cm, footer: context {
  set text(8pt)
  [#FOOTER #h(1fr)]
  span("page", "", counter(page).display("1"))
})
#set text(font: "Libertinus Serif", size: 10.5pt, lang: "en", hyphenate: false)
#set par(justify: false)
#show heading: set block(above: 1.4em, below: 0.8em)
#show table: set text(8.5pt)
"""

_LATEX = r"""\documentclass[a4paper]{article}
\usepackage[utf8]{inputenc}
\usepackage[T1]{fontenc}
\usepackage[margin=2.5cm]{geometry}
\usepackage{graphicx}
\newwrite\factsfile
\immediate\openout\factsfile=\jobname.facts
\newcommand{\jlfact}[2]{\immediate\write\factsfile{#1}#2}
\setlength{\emergencystretch}{3em}
"""


class Source(NamedTuple):
    """A manuscript in a writer's language."""

    text: str
    spans: list[tuple[str, str, str]]
    """(kind, id, text) of each span of the body, in order"""


# -------------------------------------------------------------------- typst


def typst(
    document: Document, ledger: Facts, footer: str, bibliography: bool = True
) -> Source:
    """The document as a typst source, to be compiled in the folder `paper`."""
    spans: list[tuple[str, str, str]] = []
    numbers = _numbers(document)

    def inline(piece: Inline) -> str:
        if piece.kind == "text":
            return f"#{_string(piece.value)}"
        kind, text = _shown(piece, ledger, numbers)
        spans.append((kind, piece.value, text))
        if piece.kind == "cite":
            key = _string(piece.value)
            return f'#span("cite", {key}, cite(label({key})))'
        form = "long" if len(text) > 30 else "span"
        return f"#{form}({_string(kind)}, {_string(piece.value)}, {_string(text)})"

    def line(text: str) -> str:
        return "".join(map(inline, expand(text, ledger)))

    def cell(text: str) -> str:
        return f"[{line(text)}]"

    def caption(word: str, name: str, text: str) -> str:
        label = str(numbers[word.lower(), name])
        spans.append(("label", name, label))
        head = f'{word} #span("label", {_string(name)}, {_string(label)}): '
        return f"#align(center, text(9pt)[{head}{line(text)}])"

    rows = [
        _TYPST.replace("TITLE", _string("paper")).replace("FOOTER", _string(footer))
    ]
    rows.append(
        f'#align(center, text(16pt, weight: "bold")[{line(document["title"])}])'
    )
    rows.append(f"#pad(x: 1.2cm)[*Abstract.* {line(document['abstract'])}]")
    for section in document["sections"]:
        rows.append(f"#heading(level: 1)[{line(section['title'])}]")
        for block in section["blocks"]:
            if "text" in block:
                rows.append(line(block["text"]))
            elif "items" in block:
                rows.append("\n".join(f"- {line(item)}" for item in block["items"]))
            elif "table" in block:
                head = ", ".join(f"strong{cell(c)}" for c in block["header"])
                body = [", ".join(map(cell, row)) for row in block["rows"]]
                count = len(block["header"])
                columns = f"columns: {count}, stroke: none, inset: 4pt"
                rows.append(
                    f"#align(center, table({columns}, table.hline(), "
                    f"table.header({head}), table.hline(),\n"
                    + "".join(f"{row},\n" for row in body)
                    + "table.hline()))"
                )
                rows.append(caption("Table", block["table"], block["caption"]))
            else:
                path = _string(f"../figures/{block['figure']}.svg")
                rows.append(f"#align(center, image({path}, width: 80%))")
                rows.append(caption("Figure", block["figure"], block["caption"]))
    if bibliography:
        rows.append('#mark("bibliography", "", "start")')
        rows.append('#bibliography("refs.bib", title: "References", style: "ieee")')
        rows.append('#mark("bibliography", "", "end")')
    rows.append(
        "#context [#metadata(query(<span>).map(m => (m.value, "
        "m.location().position())))<spans>]"
    )
    return Source("\n\n".join(rows) + "\n", spans)


def _string(text: str) -> str:
    """A typst string: nothing in it is markup."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


# -------------------------------------------------------------------- latex


def latex(
    document: Document, ledger: Facts, footer: str, bibliography: bool = True
) -> Source:
    """The document as a LaTeX source, to be compiled in the folder `paper`."""
    spans: list[tuple[str, str, str]] = []
    numbers = _numbers(document)

    def inline(piece: Inline) -> str:
        if piece.kind == "text":
            return _tex(piece.value)
        kind, text = _shown(piece, ledger, numbers)
        spans.append((kind, piece.value, text))
        if piece.kind == "cite":
            return f"\\cite{{{piece.value}}}"
        if kind == "fact":
            return f"\\jlfact{{{_detokenized(piece.value)}}}{{{_tex(text)}}}"
        return _tex(text)

    def line(text: str) -> str:
        return "".join(map(inline, expand(text, ledger)))

    def caption(word: str, name: str, text: str) -> str:
        label = str(numbers[word.lower(), name])
        spans.append(("label", name, label))
        return f"\\par\\smallskip\\small {word} {label}: {line(text)}"

    rows = [_LATEX + "\\begin{document}"]
    rows.append(
        f"\\begin{{center}}\\Large\\bfseries {line(document['title'])}\\end{{center}}"
    )
    rows.append(f"\\begin{{abstract}}{line(document['abstract'])}\\end{{abstract}}")
    for section in document["sections"]:
        rows.append(f"\\section*{{{line(section['title'])}}}")
        for block in section["blocks"]:
            if "text" in block:
                rows.append(line(block["text"]))
            elif "items" in block:
                items = "\n".join(f"\\item {line(item)}" for item in block["items"])
                rows.append(f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}")
            elif "table" in block:
                head = " & ".join(f"\\textbf{{{line(c)}}}" for c in block["header"])
                body = [" & ".join(map(line, row)) for row in block["rows"]]
                middle = "".join(f"{row} \\\\\n" for row in body)
                columns = "l" * len(block["header"])
                under = caption("Table", block["table"], block["caption"])
                rows.append(
                    f"\\begin{{center}}\\begin{{tabular}}{{{columns}}}"
                    f"\\hline\n{head} \\\\\\hline\n{middle}\\hline\\end{{tabular}}"
                    f"{under}\\end{{center}}"
                )
            else:
                under = caption("Figure", block["figure"], block["caption"])
                rows.append(
                    "\\begin{center}\\includegraphics[width=0.8\\linewidth]"
                    f"{{../figures/{block['figure']}.pdf}}{under}\\end{{center}}"
                )
    if bibliography:
        rows.append("\\bibliographystyle{plain}\n\\bibliography{refs}")
    rows.append(f"\\par\\medskip\\noindent\\footnotesize {_tex(footer)}")
    rows.append("\\end{document}")
    return Source("\n\n".join(rows) + "\n", spans)


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "\n": " ",
} | {c: "\\" + c for c in "&%$#_{}"}


def _tex(text: str) -> str:
    """Text that LaTeX takes as it is; letters it has not become "?"."""
    plain = "".join(_SPECIAL.get(c, c) for c in text)
    return plain.encode("latin-1", "replace").decode("latin-1")


def _detokenized(name: str) -> str:
    return f"\\detokenize{{{name}}}"


# ------------------------------------------------------------------- shared


def _numbers(document: Document) -> dict[tuple[str, str], int]:
    """Numbers of the figures and tables, by kind and name, in order of appearance."""
    found: dict[tuple[str, str], int] = {}
    for section in document["sections"]:
        for block in section["blocks"]:
            for kind in ("figure", "table"):
                if kind in block:
                    known = sum(k == kind for k, _ in found)
                    found.setdefault((kind, block[kind]), known + 1)
    return found


def _shown(
    piece: Inline, ledger: Facts, numbers: Mapping[tuple[str, str], int]
) -> tuple[str, str]:
    """Kind of span and text of a piece that is no plain text."""
    if piece.kind == "fact":
        return "fact", facts.text(ledger[piece.value])
    if piece.kind == "cite":
        return "cite", ""
    return "reference", f"{piece.kind.capitalize()} {numbers[piece.kind, piece.value]}"


def cited(document_texts: Iterable[tuple[str, str]], ledger: Facts) -> list[str]:
    """Keys of what a document cites, in order, each once."""
    pieces = (p for _, text in document_texts for p in expand(text, ledger))
    return list(dict.fromkeys(p.value for p in pieces if p.kind == "cite"))
