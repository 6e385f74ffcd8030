"""What a study does when its budget is spent: a report of what there is, by templates.

No model is asked and no run started; the tools are called one after another, and the
first that fails ends it, since what follows builds on it. The abstract says that the
report is partial, for nobody reviews it. Agents may refer to the files that it writes
as they were, so a study that goes on takes it back first.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxlab.research import drafts, paper
from jaxlab.research.tool import Context, Result, Tool
from jaxlab.research.types import BudgetSpent, Ref, Stopped, ToolError
from jaxlab.research.workspace import Workspace

PARTIAL = (
    "This report is partial: the budget was spent before the study was over, and "
    "nobody has reviewed it."
)


WRITTEN = ("facts", "figures", "paper")
"""folders that a report writes"""
BEFORE = "before.json"
"""their files before it: path to the name of a blob"""


def _keep(workspace: Workspace) -> None:
    kept = {}
    for path in _written(workspace):
        body = workspace.read_bytes(path)
        kept[path] = hashlib.sha256(body).hexdigest()
        workspace.write_bytes(f"blobs/{kept[path]}", body)
    workspace.write_json(BEFORE, kept)


def _written(workspace: Workspace) -> list[str]:
    return [path for folder in WRITTEN for path in workspace.files(folder)]


def take_back(workspace: Workspace) -> None:
    """Undoes what a report has written, also one that was cut off; if there is one."""
    if not workspace.exists(BEFORE):
        return
    kept = workspace.read_json(BEFORE)
    for path in set(_written(workspace)) - set(kept):
        workspace.remove(path)
    for path, sha in kept.items():
        if workspace.ref(path).sha256 != sha:
            workspace.write_bytes(path, workspace.read_bytes(f"blobs/{sha}"))
    workspace.remove(BEFORE)


def _marked(context: Context) -> dict[str, Any]:
    text = f"{PARTIAL} {paper.load(context.workspace)['abstract']}"
    return {"title": "Abstract", "blocks": [{"text": text}]}


STEPS: tuple[tuple[str, dict[str, Any] | Callable[[Context], dict[str, Any]]], ...] = (
    ("compute_facts", {}),
    ("make_figures", {}),
    *(("cite", {"query": name}) for name in drafts.CITED),
    *(("draft_section", {"section": name, "place": True}) for name in drafts.SECTIONS),
    ("set_section", _marked),
    ("compile_paper", {}),
)


def partial_report(
    tools: Mapping[str, Tool], context: Context
) -> dict[str, list[dict[str, Any]]]:
    """Calls the tools of a report; returns how each ended, and what they wrote.

    Args:
        tools: by name; without them there is no report.
        context: of the driver; its limits are not asked again, its runs are spent.
    """

    def no_run(run: str, **data: Any) -> Any:
        raise BudgetSpent("a report starts no run")

    if not context.workspace.exists(BEFORE):
        _keep(context.workspace)
    context = dataclasses.replace(context, poll=lambda: False, start_run=no_run)
    told: list[dict[str, Any]] = []
    refs: dict[str, Ref] = {}
    for name, given in STEPS:
        if name not in tools:
            break
        args = given(context) if callable(given) else given
        try:
            made = tools[name].fn(context, **args)
        except (ToolError, Stopped) as error:
            told.append({"tool": name, **args, "error": str(error)[:300]})
            break
        told.append({"tool": name, **args})
        if isinstance(made, Result):
            refs |= {ref.id: ref for ref in made.refs}
    return {"steps": told, "refs": [ref.json() for ref in refs.values()]}
