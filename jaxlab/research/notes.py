"""Tools that read the workspace and write notes; what is known carries over."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlab.research.journal import Event, read_journal
from jaxlab.research.state import fold
from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import Ref, ToolError
from jaxlab.research.workspace import Workspace

LONGEST = 16_000
PAST = "notes/past_findings.md"
RECORD = (
    "spec.json",
    "run.json",
    "config.json",
    "versions.json",
    "metrics.jsonl",
    "stdout.log",
    "result.json",
)


@tool("pure")
def list_files(context: Context, under: str = "") -> list[str]:
    """Lists the files of the workspace, or of a folder in it."""
    names = context.workspace.files(under)
    return [name for name in names if not name.startswith(("blobs/", "inbox/"))][:500]


@tool("pure")
def read(context: Context, path: str, offset: int = 0, length: int = 1800) -> Result:
    """Reads `length` characters (16000 at most) of a file of the workspace."""
    text = context.workspace.read_text(path)
    piece = text[max(offset, 0) :][: max(min(length, LONGEST), 1)]
    value = {"path": path, "characters": len(text), "offset": offset, "text": piece}
    return Result(value, (context.workspace.ref(path),))


@tool("idempotent")
def write(context: Context, name: str, text: str) -> Result:
    """Writes a file of your own folder, such as "ideas.md"; others read it by path."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", name):
        raise ToolError(f"{name!r} is no file name; letters, digits, . _ - are allowed")
    path = f"agents/{context.agent}/{name}"
    return Result({"path": path}, (context.workspace.write_text(path, text),))


@tool("idempotent")
def note(
    context: Context,
    text: str,
    type: Literal["finding", "negative", "question"] = "finding",
    refs: list[str] = [],  # noqa: B006
) -> dict[str, Any]:
    """Keeps a finding, a negative result or an open question for later studies.

    `refs` are paths, run ids or fact ids that it rests on.
    """
    id = hashlib.sha256(json.dumps([type, text]).encode()).hexdigest()[:12]
    known = [e.data["id"] for e in context.events() if e.kind == "note"]
    if id not in known:
        context.record("note", id=id, type=type, text=text[:2000], refs=refs)
        context.workspace.write_text(PAST, as_text(context.events()))
    return {"id": id}


@tool("pure")
def past_findings(context: Context, about: str = "") -> list[dict[str, Any]]:
    """Findings, negative results and open questions, of this study and of earlier ones.

    `about` keeps those that share a word with it.
    """
    found = [
        {"study": "this one", **e.data} for e in context.events() if e.kind == "note"
    ]
    for study in context.options.get("past", []):
        found += study["notes"]
    words = _words(about)
    return [n for n in found if not words or words & _words(json.dumps(n))][:50]


TOOLS = (list_files, read, write, note, past_findings)


def as_text(events: Sequence[Event]) -> str:
    """The notes of a journal as Markdown, made anew from it each time."""
    titles = {
        "finding": "Findings",
        "negative": "Negative results",
        "question": "Open questions",
    }
    lines = ["# What this study keeps", ""]
    for type, title in titles.items():
        rows = [e.data for e in events if e.kind == "note" and e.data["type"] == type]
        lines += [f"## {title}", ""] if rows else []
        for row in rows:
            rests = f" ({', '.join(row['refs'])})" if row["refs"] else ""
            lines.append(f"- {row['text']}{rests}")
        lines += [""] if rows else []
    return "\n".join(lines)


def summary_of(root: str | Path) -> dict[str, Any]:
    """What another study left: its question, how it ended, notes, finished runs.

    Its journal is only read. Runs are told with the hash of their result, so that a
    later study can take them over by reference.

    Raises:
        JournalError: it is no study, or was edited.
    """
    folder = Path(root).resolve()
    study = fold(read_journal(folder / "journal.jsonl"))
    ws = Workspace(folder)
    done = [r for r, status in study.runs.items() if status == "done"]
    runs: list[Ref] = []
    for run in done:
        if ws.exists(f"runs/{run}/result.json"):
            runs.append(ws.run_ref(run))
    return {
        "study": str(folder),
        "question": study.question,
        "ended": (study.finished or {}).get("code"),
        "notes": [{"study": str(folder), **n} for n in study.notes],
        "runs": [ref.json() for ref in runs],
    }


def adopt(ws: Workspace, past: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Takes finished runs of earlier studies over, so that they are not made again.

    A run is known by the hash of its spec, code and data, so it is the same run here;
    its record is copied and must be what the earlier study ended with.

    Args:
        ws: the new workspace.
        past: what `summary_of` told of the earlier ones.

    Returns:
        references of what was taken over, with the study.
    """
    taken = []
    for study in past:
        old = Workspace(Path(study["study"]))
        for row in study["runs"]:
            run, ref = row["id"], Ref(**row)
            if ws.exists(f"runs/{run}/result.json"):
                continue
            old.check(ref)
            for name in RECORD:  # the result last: it is what makes a run finished
                path = f"runs/{run}/{name}"
                if old.exists(path):
                    ws.write_bytes(path, old.read_bytes(path))
            taken.append({**row, "study": study["study"]})
    return taken


def _words(text: str) -> set[str]:
    return {w for w in re.findall(r"[a-z0-9_]{3,}", text.lower())}
