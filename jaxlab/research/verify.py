"""Checks a whole workspace anew: its journal, its files, and everything in the paper.

`verify` trusts nothing that an agent or a tool wrote. Hashes in the journal show that
a file was changed at all; the gates compute every fact, figure and page again, and so
find what was changed even where the journal was rewritten with it.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError
from jaxlab.research import facts, gates, paper, pdf
from jaxlab.research.journal import Event, JournalError, read_journal
from jaxlab.research.types import GateResult
from jaxlab.research.workspace import Workspace, open_workspace


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found."""

    findings: tuple[str, ...]
    """a line each, with the gate that it belongs to; none: all holds"""
    numbers: tuple[pdf.Number, ...] = ()
    """every number of the PDF with its source"""
    facts: int = 0
    """facts computed again"""
    runs: int = 0
    """runs whose files were checked"""

    @property
    def ok(self) -> bool:
        """Whether all holds."""
        return not self.findings

    def json(self) -> dict[str, Any]:
        """Plain JSON."""
        kinds = [n.kind or "none" for n in self.numbers]
        return {
            "ok": self.ok,
            "findings": list(self.findings),
            "facts": self.facts,
            "runs": self.runs,
            "numbers": {k: kinds.count(k) for k in sorted(set(kinds))},
        }


class VerifyError(UserError):
    """A workspace does not hold what it says."""

    exit_code = 4


def verify(root: str | Path) -> Report:
    """Computes everything in a workspace again; writes nothing.

    Args:
        root: the workspace's folder; no process needs to have stopped driving it.

    Raises:
        UserError: it is no workspace.
    """
    workspace = open_workspace(root)
    try:
        events = read_journal(workspace.root / "journal.jsonl")
    except JournalError as error:
        return Report((f"journal: {error}",))
    found = [f"journal: {what}" for what in _files(workspace, events)]
    results = gates.run_gates(workspace, events)
    found += [f"{r.gate}: {what}" for r in results for what in r.findings]
    return Report(
        tuple(dict.fromkeys(found)),
        tuple(_numbers(workspace, results)),
        len(_or_none(workspace)),
        len(list((workspace.root / "runs").glob("*/result.json"))),
    )


def _files(workspace: Workspace, events: Sequence[Event]) -> Iterator[str]:
    """Files whose bytes are not those that the journal last spoke of."""
    last: dict[str, str | None] = {}
    before = last
    for event in events:
        if event.kind == "closing":
            last = {**(before := last)}
        elif event.kind == "resume":
            last = before  # the report was taken back
        for ref in event.data.get("refs", ()):
            if (
                isinstance(ref, dict)
                and ref.get("kind") == "file"
                and event.kind in ("tool_end", "closing")
            ):
                last[ref["id"]] = ref.get("sha256")
    for path, sha in last.items():
        if sha is None or path.startswith(("notes/", "inbox/", "outbox/")):
            continue
        if not workspace.exists(path):
            yield f"{path} is gone"
        elif workspace.ref(path).sha256 != sha:
            yield f"{path} was changed since it was written"


def _numbers(workspace: Workspace, results: Sequence[GateResult]) -> list[pdf.Number]:
    if not next(r.ok for r in results if r.gate == "G4"):
        return []
    _, spans = paper.compile_typst(workspace)
    return pdf.numbers(pdf.read(workspace.read_bytes("paper/paper.pdf")), spans)


def _or_none(workspace: Workspace) -> dict[str, Any]:
    try:
        return facts.ledger(workspace)
    except gates.BROKEN:
        return {}
