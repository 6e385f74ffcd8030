"""Reads a PDF's characters where they stand, and maps its numbers to their sources."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxlab.research.types import ToolError

NEAR = 1.0  # pt; typst's positions and the PDF's agree to a hundredth of that


class Char(NamedTuple):
    """A character of a page, by the origin of its glyph, in pt from the top left."""

    page: int
    y: float
    x: float
    text: str


class Span(NamedTuple):
    """A part of the text whose source is known."""

    kind: str
    """fact; or structural: cite, label, reference, page, bibliography"""
    id: str
    start: tuple[int, float, float]
    """page, y, x"""
    end: tuple[int, float, float]


class Number(NamedTuple):
    """A number in a PDF's text, with its source; kind "" where it has none."""

    page: int
    y: float
    x: float
    text: str
    kind: str
    id: str


def read(pdf: bytes) -> list[Char]:
    """The visible characters of all pages, in the order of the text.

    Raises:
        ToolError: it is no PDF that can be read.
    """
    import ctypes

    import pypdfium2
    from pypdfium2 import raw

    found = []
    try:
        document = pypdfium2.PdfDocument(pdf)
        for number, page in enumerate(document, 1):
            height, text = page.get_height(), page.get_textpage()
            x, y = ctypes.c_double(), ctypes.c_double()
            for i in range(text.count_chars()):
                code = raw.FPDFText_GetUnicode(text, i)
                letter = chr(code) if 0 <= code <= 0x10FFFF else "\ufffd"
                if letter.isspace() or raw.FPDFText_IsGenerated(text, i) == 1:
                    continue
                raw.FPDFText_GetCharOrigin(text, i, x, y)
                found.append(Char(number, height - y.value, x.value, letter))
            text.close()
            page.close()
        document.close()
    except (pypdfium2.PdfiumError, ValueError) as error:
        raise ToolError(f"the PDF cannot be read: {error}") from None
    return found


def spans(queried: Sequence[Any]) -> list[Span]:
    """Spans from what typst says of the marks: [[kind, id, start|end], position]."""
    found, open_ = [], []
    for (kind, name, which), where in queried:
        at = (int(where["page"]), _pt(where["y"]), _pt(where["x"]))
        if which == "start":
            open_.append((kind, name, at))
        else:
            i = max(i for i, o in enumerate(open_) if o[:2] == (kind, name))
            found.append(Span(kind, name, open_.pop(i)[2], at))
    return found


def _pt(length: str) -> float:
    return float(length.removesuffix("pt"))


def inside(span: Span, char: Char) -> bool:
    """Whether a character stands between the marks of a span, in reading order."""
    (p0, y0, x0), (p1, y1, x1) = span.start, span.end
    page, y, x = char.page, char.y, char.x
    on_first = page == p0 and abs(y - y0) <= NEAR
    on_last = page == p1 and abs(y - y1) <= NEAR
    after = x >= x0 - NEAR / 4 if on_first else (page, y) > (p0, y0)
    before = x < x1 - NEAR / 4 if on_last else (page, y) < (p1, y1)
    return after and before


def shown(span: Span, chars: Sequence[Char]) -> str:
    """The text of a span as the PDF shows it, without spaces."""
    return "".join(c.text for c in chars if inside(span, c))


def numbers(chars: Sequence[Char], known: Sequence[Span]) -> list[Number]:
    """Every number of the text with the span that it stands in."""
    by_page: dict[int, list[Span]] = {}
    for span in known:
        for page in range(span.start[0], span.end[0] + 1):
            by_page.setdefault(page, []).append(span)

    def source(char: Char) -> Span | None:
        """The span of a character; another one wins over the bibliography."""
        found = [s for s in by_page.get(char.page, ()) if inside(s, char)]
        return min(found, key=lambda s: s.kind == "bibliography", default=None)

    made: list[Number] = []
    last: tuple[Char, Span | None] | None = None
    for char in chars:
        if not (char.text.isnumeric() or (last and char.text in ".,")):
            last = None
            continue
        span = source(char)
        if last and last[1] is span and _beside(last[0], char):
            made[-1] = made[-1]._replace(text=made[-1].text + char.text)
        elif char.text.isnumeric():
            kind, name = (span.kind, span.id) if span else ("", "")
            made.append(Number(char.page, char.y, char.x, char.text, kind, name))
        else:
            last = None
            continue
        last = char, span
    return [n._replace(text=n.text.rstrip(".,")) for n in made]


def _beside(a: Char, b: Char) -> bool:
    return a.page == b.page and abs(a.y - b.y) < NEAR and 0 <= b.x - a.x < 12


def difference(a: Sequence[Char], b: Sequence[Char]) -> str | None:
    """Where two texts first differ in letter or place; None: nowhere."""
    order_a, order_b = sorted(a), sorted(b)
    for i, (one, other) in enumerate(zip(order_a, order_b, strict=False)):
        away = max(abs(one.x - other.x), abs(one.y - other.y))
        if (one.page, one.text) != (other.page, other.text) or away > NEAR / 4:
            texts = f"{_around(order_a, i)!r} instead of {_around(order_b, i)!r}"
            return f"page {one.page}, {one.y:.0f} pt from the top: {texts}"
    if len(a) != len(b):
        return f"{len(a)} characters instead of {len(b)}"
    return None


def _around(chars: Sequence[Char], i: int) -> str:
    low = max(0, i - 8)
    return "".join(c.text for c in chars[low : i + 12])
