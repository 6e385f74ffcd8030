"""Random edits of a finished study, one at a time, as a careless or a lying hand makes.

Kinds: source (paper.json, main.typ, main.tex), pdf (a digit in the text of paper.pdf),
metrics (a digit of metrics.jsonl), outcome (a digit of a plan's metric there), fact (a
field of the ledger), figure, result, plan, journal.
"""

import hashlib
import json
import re
from pathlib import Path

from jaxlab.research.journal import Event, canonical, digest

KINDS = (
    *("source", "pdf", "metrics", "outcome", "fact"),
    *("figure", "result", "plan", "journal"),
)


def mutations(folder: Path, draw, kind: str | None = None) -> tuple[str, str]:
    """Makes one edit.

    Returns:
        its kind and what was changed.
    """
    kind = kind or draw.choice(KINDS)
    if kind == "pdf":
        return kind, edit_pdf(folder, draw)
    if kind == "fact":
        return kind, edit_fact(folder, draw)
    if kind == "outcome":
        return kind, edit_outcome(folder, draw)
    paths = {
        "source": ["paper/paper.json", "paper/main.typ", "paper/main.tex"],
        "metrics": sorted(folder.glob("runs/*/metrics.jsonl")),
        "figure": sorted(
            [*folder.glob("figures/*.csv"), *folder.glob("figures/*.svg")]
        ),
        "result": sorted(folder.glob("runs/*/result.json")),
        "plan": sorted(folder.glob("plans/*.json")),
        "journal": ["journal.jsonl"],
    }[kind]
    path = folder / draw.choice(paths)
    return kind, f"{path.relative_to(folder)}: {edit_text(path, draw)}"


def edit_text(path: Path, draw) -> str:
    """Replaces a digit of a text file by another one, or types one where none is."""
    text = path.read_text()
    spots = [m.start() for m in re.finditer(r"\d", text)]
    if path.name == "paper.json" and draw.random() < 0.5:
        spots = []  # type a number into a sentence instead
    if spots:
        at = draw.choice(spots)
        new = draw.choice([d for d in "0123456789" if d != text[at]])
        changed = text[:at] + new + text[at + 1 :]
        what = f"{text[max(0, at - 20) : at + 8]!r}: {text[at]} -> {new}"
    else:
        places = [m.end() for m in re.finditer(r"[a-z]\. ", text)]
        at = draw.choice(places)
        number = f"{draw.uniform(0, 100):.2f} "
        changed, what = text[:at] + number + text[at:], f"typed {number!r}"
    path.write_text(changed)
    return what


def edit_outcome(folder: Path, draw) -> str:
    """Changes a digit of the metric of a plan in the last row of a run that has it."""
    plan = json.loads(draw.choice(sorted(folder.glob("plans/*.json"))).read_text())
    planned = {run for runs in plan["runs"].values() for run in runs}
    every = sorted(folder.glob("runs/*/metrics.jsonl"))
    path = draw.choice([path for path in every if path.parent.name in planned])
    text, name = path.read_text(), json.dumps(plan["metric"]) + ": "
    start = text.rindex(name) + len(name)
    digits = [m.start() for m in re.finditer(r"\d", text[start : start + 12])]
    at = start + draw.choice(digits)
    new = draw.choice([d for d in "0123456789" if d != text[at]])
    path.write_text(text[:at] + new + text[at + 1 :])
    return f"{path.parent.name}: {text[start : start + 12]}, at {at - start}: {new}"


def edit_fact(folder: Path, draw) -> str:
    """Changes a fact's value, unit, format, inputs, selector or operation."""
    path = folder / "facts/ledger.json"
    body = json.loads(path.read_text())
    fact = draw.choice(body["facts"])
    field = draw.choice(
        ["value", "value", "value", "unit", "fmt", "inputs", "selector"]
    )
    old = fact[field]
    if field == "value" and isinstance(old, str):
        fact["value"] = old + "x"
    elif field == "value":
        fact["value"] = old + draw.choice([1, -1]) * draw.choice([1, 10])
    elif field == "unit":
        fact["unit"] = "nats"
    elif field == "fmt":
        fact["fmt"] = ".1f" if old != ".1f" else ".2f"
    elif field == "inputs":
        fact["inputs"] = [*old, "0" * 16]
    else:
        fact["selector"] = {**old, "arm": "nobody"}
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    return f"{fact['id']}.{field}: {old!r} -> {fact[field]!r}"


def edit_pdf(folder: Path, draw) -> str:
    """Shows another digit in the PDF: its text object is set anew, in its place."""
    import ctypes

    import pypdfium2
    from pypdfium2 import raw

    path = folder / "paper/paper.pdf"
    document = pypdfium2.PdfDocument(path.read_bytes())
    choices = []
    for index in range(len(document)):
        page = document[index]
        text = page.get_textpage()
        for i in range(text.count_chars()):
            letter = chr(raw.FPDFText_GetUnicode(text, i))
            if letter.isdigit():
                choices.append((index, i, letter))
    index, i, letter = draw.choice(choices)
    page = document[index]
    text = page.get_textpage()
    x, y = ctypes.c_double(), ctypes.c_double()
    raw.FPDFText_GetCharOrigin(text, i, x, y)
    size = raw.FPDFText_GetFontSize(text, i)
    left, bottom, right, top = text.get_charbox(i)
    cover = raw.FPDFPageObj_CreateNewRect(
        left - 0.2, bottom - 0.2, right - left + 0.4, top - bottom + 0.4
    )
    raw.FPDFPageObj_SetFillColor(cover, 255, 255, 255, 255)
    raw.FPDFPath_SetDrawMode(cover, raw.FPDF_FILLMODE_ALTERNATE, False)
    raw.FPDFPage_InsertObject(page, cover)
    new = draw.choice([d for d in "0123456789" if d != letter])
    font = raw.FPDFText_LoadStandardFont(document, b"Times-Roman")
    made = raw.FPDFPageObj_CreateTextObj(document, font, size)
    words = (new + "\0").encode("utf-16-le")
    raw.FPDFText_SetText(
        made, ctypes.cast(ctypes.create_string_buffer(words), raw.FPDF_WIDESTRING)
    )
    raw.FPDFPageObj_Transform(made, 1, 0, 0, 1, x.value, y.value)
    raw.FPDFPage_InsertObject(page, made)
    raw.FPDFPage_GenerateContent(page)
    document.save(str(path))
    return f"page {index + 1}: {letter} -> {new}"


def rehash(folder: Path) -> None:
    """Rewrites results and journal, so that every hash fits the files as they are."""
    for result in folder.glob("runs/*/result.json"):
        body = json.loads(result.read_text())
        metrics = (result.parent / "metrics.jsonl").read_bytes()
        body["metrics_sha256"] = hashlib.sha256(metrics).hexdigest()
        result.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    lines, prev = [], ""
    for line in (folder / "journal.jsonl").read_text().splitlines():
        row = json.loads(line)
        data = row["data"]
        for ref in data.get("refs", []):
            if not isinstance(ref, dict):  # of a note: a path
                continue
            if ref.get("kind") == "file" and (folder / ref["id"]).exists():
                ref["sha256"] = sha(folder / ref["id"])
        if row["kind"] == "run_end":
            base = folder / "runs" / data["run"]
            data["sha256"] = sha(base / "result.json")
            data["metrics_sha256"] = sha(base / "metrics.jsonl")
        row["prev"] = prev
        row.pop("hash")
        prev = digest(row)
        lines.append(canonical({**row, "hash": prev}))
    (folder / "journal.jsonl").write_text("\n".join(lines) + "\n")
    assert Event(**json.loads(lines[-1]))


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
