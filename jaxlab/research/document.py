"""The manuscript: one document for all writers, in which no number can be typed.

`paper/paper.json` is {title, abstract, sections: [{title, blocks}]}. A block is
{text}, {items}, {table, caption, header, rows} or {figure, caption}. Texts are plain
but for

    {fact:ID}            the value of a fact
    {claim:PLAN/NAME}    what the tests of a comparison allow to be said, in full
    {cite:KEY}           an entry of the local bibliography
    {figure:ID} {table:ID}   references

`lint` refuses digits and number words, and comparative words in a sentence without a
claim that bears them out; it knows words, not meaning, so it is a net and no proof.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlab.research import facts
from jaxlab.research.types import ToolError

Document = dict[str, Any]
Facts = Mapping[str, Mapping[str, Any]]

_MARK = re.compile(r"\{(fact|claim|cite|figure|table):([^{}]*)\}")
_NUMBERS = re.compile(
    r"\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty"
    r"|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundreds?|thousands?|millions?"
    r"|billions?|dozens?|twice|thrice|doubl\w*|tripl\w*|quadrupl\w*|half|halv\w*"
    r"|thirds?|quarters?|percent|zero)\b",
    re.IGNORECASE,
)
_GOOD = (
    r"better|best|improv\w*|outperform\w*|superior\w*|beats?|surpass\w*|wins?|gains?"
)
_BAD = r"worse|worst|degrad\w*|underperform\w*|inferior\w*|loses?|hurts?|harms?"
_OTHER = (
    r"faster|slower|higher|lower|larger|smaller|reduc\w*|increas\w*|decreas\w*|exceed\w*"
    r"|differ(s|ed|ent|ence|ences)?|significan\w*|effective\w*|robust\w*|helps?"
)
_EQUAL = r"match(es|ed)?|equivalen\w*|equals?|comparable|same|identical\w*|on par"
_NONE = re.compile(r"\bno detectable difference\b", re.IGNORECASE)
_WORDS = {
    name: re.compile(rf"\b({words})\b", re.IGNORECASE)
    for name, words in (
        ("better", _GOOD),
        ("worse", _BAD),
        ("differs", _OTHER),
        ("equivalent", _EQUAL),
    )
}


class Inline(NamedTuple):
    """A piece of a text."""

    kind: str
    """text, fact, claim, cite, figure or table"""
    value: str
    """the words, or the id"""


def parse(text: str) -> list[Inline]:
    """The pieces of a text.

    Raises:
        ToolError: a brace that belongs to none of the forms.
    """
    pieces, at = [], 0
    for match in _MARK.finditer(text):
        if match.start() > at:
            pieces.append(Inline("text", text[at : match.start()]))
        pieces.append(Inline(match[1], match[2].strip()))
        at = match.end()
    if at < len(text):
        pieces.append(Inline("text", text[at:]))
    for piece in pieces:
        if piece.kind == "text" and re.search(r"[{}]", piece.value):
            raise ToolError(f"a stray brace in {piece.value.strip()[:60]!r}")
    return pieces


def claim(value: str, ledger: Facts) -> list[Inline]:
    """What the tests of a comparison allow to be said: text and facts.

    Args:
        value: PLAN/NAME.
        ledger: facts by id.

    Raises:
        ToolError: facts of the comparison are missing.
    """
    plan, verdict, arms = _claimed(value, ledger)
    f = {p: Inline("fact", verdict[p]) for p in verdict}
    metric = Inline("fact", _need(ledger, f"p{plan}.plan.metric"))
    found = ledger[verdict["found"]]["value"]
    numbers = [
        Inline("text", ": mean difference "),
        f["mean"],
        Inline("text", ", "),
        f["level"],
        Inline("text", " interval "),
        f["low"],
        Inline("text", " to "),
        f["high"],
        Inline("text", ", "),
        f["n"],
        Inline("text", " pairs, corrected p "),
        f["p_adjusted"],
    ]
    if arms is None:
        lead = {
            "higher": "the slope is positive",
            "lower": "the slope is negative",
            "unstable": "the slope cannot be judged, since runs diverged",
        }.get(found, "no detectable difference from a slope of nought")
        return [metric, Inline("text", f": {lead}"), *numbers]
    a, b = (Inline("fact", _need(ledger, f"p{plan}.arm.{arm}")) for arm in arms)
    if found in ("higher", "lower"):
        good = found == ledger[_need(ledger, f"p{plan}.plan.direction")]["value"]
        lead = [
            a,
            Inline("text", f" has a {found} "),
            metric,
            Inline("text", " than "),
            b,
        ]
        lead.append(Inline("text", f", which is {'better' if good else 'worse'}"))
    elif found == "equivalent":
        margin = Inline("fact", _need(ledger, f"p{plan}.plan.min_effect"))
        lead = [a, Inline("text", " and "), b, Inline("text", " are equivalent in ")]
        lead += [metric, Inline("text", " within "), margin, Inline("text", " (p ")]
        lead += [f["p_equivalence"], Inline("text", ")")]
    elif found == "unstable":
        lead = [a, Inline("text", " and "), b]
        lead.append(Inline("text", " cannot be compared, since runs diverged"))
    else:
        lead = [Inline("text", "no detectable difference between "), a]
        lead += [Inline("text", " and "), b, Inline("text", " in "), metric]
    return [*lead, *numbers]


def _claimed(
    value: str, ledger: Facts
) -> tuple[int, dict[str, str], tuple[str, str] | None]:
    number, _, name = value.partition("/")
    if not number.isdigit():
        raise ToolError(f"{{claim:{value}}} is not PLAN/NAME")
    plan = int(number)
    parts = (
        "found",
        "mean",
        "low",
        "high",
        "level",
        "n",
        "p_adjusted",
        "p_equivalence",
    )
    verdict = {
        part: _need(ledger, facts.fact_id(plan, "verdict", comparison=name, part=part))
        for part in parts
    }
    a, versus, b = name.partition("_vs_")
    return plan, verdict, (a, b) if versus else None


def _need(ledger: Facts, fact: str) -> str:
    if fact not in ledger:
        raise ToolError(f"there is no fact {fact}; compute the plan's facts first")
    return fact


def expand(text: str, ledger: Facts) -> list[Inline]:
    """The pieces of a text, claims written out as text and facts.

    Raises:
        ToolError: a stray brace, or a fact that does not exist.
    """
    pieces: list[Inline] = []
    for piece in parse(text):
        if piece.kind == "claim":
            pieces += claim(piece.value, ledger)
        else:
            if piece.kind == "fact":
                _need(ledger, piece.value)
            pieces.append(piece)
    return pieces


def texts(document: Document) -> Iterator[tuple[str, str]]:
    """Yields (place, text) of everything written in a document."""
    yield "title", document["title"]
    yield "abstract", document["abstract"]
    for i, section in enumerate(document["sections"]):
        yield f"sections[{i}].title", section["title"]
        for j, block in enumerate(section["blocks"]):
            place = f"sections[{i}].blocks[{j}]"
            if "text" in block:
                yield f"{place}.text", block["text"]
            for k, item in enumerate(block.get("items", ())):
                yield f"{place}.items[{k}]", item
            if "caption" in block:
                yield f"{place}.caption", block["caption"]
            for k, row in enumerate([block.get("header", []), *block.get("rows", [])]):
                for m, cell in enumerate(row):
                    yield f"{place}.rows[{k}][{m}]", cell


def check_shape(document: Any) -> None:
    """Refuses what is no document, naming the place.

    Raises:
        ToolError: it is not of the form that the module's description gives.
    """
    if not isinstance(document, dict) or set(document) != {
        "title",
        "abstract",
        "sections",
    }:
        raise ToolError("a document has title, abstract and sections")
    for i, section in enumerate(document["sections"]):
        if not isinstance(section, dict) or set(section) != {"title", "blocks"}:
            raise ToolError(f"sections[{i}] has title and blocks")
        for j, block in enumerate(section["blocks"]):
            if not isinstance(block, dict) or frozenset(block) not in _BLOCKS:
                raise ToolError(
                    f"sections[{i}].blocks[{j}] is none of {{text}}, {{items}}, "
                    "{table, caption, header, rows} and {figure, caption}"
                )
            if any(len(row) != len(block["header"]) for row in block.get("rows", ())):
                raise ToolError(f"sections[{i}].blocks[{j}]: a row of another length")
            for name in (block.get("figure"), block.get("table")):
                if name is not None and not re.fullmatch(
                    r"[a-z][a-z0-9_-]*", str(name)
                ):
                    raise ToolError(f"sections[{i}].blocks[{j}]: no name {name!r}")
    if not all(isinstance(text, str) for _, text in texts(document)):
        raise ToolError("a text of the document is no string")


_BLOCKS = {
    frozenset(["text"]),
    frozenset(["items"]),
    frozenset(["table", "caption", "header", "rows"]),
    frozenset(["figure", "caption"]),
}


def lint(document: Document, ledger: Facts, keys: Sequence[str] = ()) -> list[str]:
    """What is wrong with the text of a document, a line each.

    Args:
        document: of the right shape.
        ledger: facts by id.
        keys: entries of the bibliography whose source is stored.
    """
    findings = []
    labels = {
        b[k]
        for s in document["sections"]
        for b in s["blocks"]
        for k in b
        if k in ("figure", "table")
    }
    for place, text in texts(document):
        try:
            pieces = parse(text)
            expand(text, ledger)
        except ToolError as error:
            findings.append(f"{place}: {error}")
            continue
        for kind, value in pieces:
            if kind == "text":
                findings += [f"{place}: {what}" for what in _literals(value)]
            elif kind == "cite" and value not in keys:
                findings.append(f"{place}: {value!r} is not in the stored bibliography")
            elif kind in ("figure", "table") and value not in labels:
                findings.append(f"{place}: there is no {kind} {value!r}")
        findings += [f"{place}: {what}" for what in _claims(text, ledger)]
    return findings


def _literals(text: str) -> Iterator[str]:
    """Numbers that are typed: every script's digits, and words."""
    plain = unicodedata.normalize("NFKC", text)
    if found := [c for c in text + plain if c.isnumeric()]:
        yield f"the number {found[0]!r} is typed in {text.strip()[:60]!r}; use a fact"
    if found := _NUMBERS.search(plain):
        yield f"the number word {found[0]!r} is typed; use a fact"
    if hidden := [c for c in text if unicodedata.category(c) in ("Cf", "Cc", "Co")]:
        yield f"the invisible character {hidden[0]!r}"


def _claims(text: str, ledger: Facts) -> Iterator[str]:
    """Comparative words that no claim in their sentence bears out."""
    for sentence in re.split(r"(?<=[.!?;])\s+(?![^{}]*\})", text):
        plain = _MARK.sub(" ", sentence)
        used = {
            name: m[0] for name, words in _WORDS.items() if (m := words.search(plain))
        }
        if _NONE.search(plain) and set(used) <= {"differs"}:
            used = {"none": "no detectable difference"}
        bound = [m[2] for m in _MARK.finditer(sentence) if m[1] == "claim"]
        if used and not bound:
            yield f"{next(iter(used.values()))!r} is said without a {{claim:...}}"
        for value in bound if used else ():
            try:
                plan, verdict, arms = _claimed(value, ledger)
            except ToolError:
                continue  # said already
            said = _says(ledger, plan, ledger[verdict["found"]]["value"])
            subject = re.search(rf"\{{fact:p{plan}\.arm\.([^{{}}]*)\}}", sentence)
            if arms and subject and subject[1] == arms[1]:
                said = {"better": "worse", "worse": "better"}.get(said, said)
            wrong = (
                set(used)
                - {said}
                - ({"differs"} if said in ("better", "worse") else set())
            )
            if wrong:
                word = used[next(iter(wrong))]
                yield f"{word!r} is said, but {{claim:{value}}} is {said!r}"
            elif used.keys() & {"better", "worse"} and arms and not subject:
                yield f"name the arm that is meant, as {{fact:p{plan}.arm.NAME}}"


def _says(ledger: Facts, plan: int, found: str) -> str:
    if found in ("higher", "lower"):
        direction = ledger.get(f"p{plan}.plan.direction", {}).get("value")
        return "better" if found == direction else "worse"
    return {"equivalent": "equivalent"}.get(found, "none")
