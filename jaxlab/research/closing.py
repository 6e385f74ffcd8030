"""What a study does when its budget is spent: a report of what there is, by templates.

No model is asked and no run started; the tools are called one after another, and the
first that fails ends it, since what follows builds on it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlab.research.tool import Context, Tool
from jaxlab.research.types import BudgetSpent, Stopped, ToolError

SECTIONS = ("title", "abstract", "method", "results", "follow-up", "runs", "limits")
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("compute_facts", {}),
    ("make_figures", {}),
    *(("draft_section", {"section": name, "place": True}) for name in SECTIONS),
    ("compile_paper", {}),
)


def partial_report(tools: Mapping[str, Tool], context: Context) -> list[dict[str, Any]]:
    """Calls the tools of a report; returns how each ended.

    Args:
        tools: by name; without them there is no report.
        context: of the driver; its limits are not asked again, its runs are spent.
    """

    def no_run(run: str, **data: Any) -> Any:
        raise BudgetSpent("a report starts no run")

    context = dataclasses.replace(context, poll=lambda: False, start_run=no_run)
    told = []
    for name, args in STEPS:
        if name not in tools:
            break
        try:
            tools[name].fn(context, **args)
        except (ToolError, Stopped) as error:
            told.append({"tool": name, **args, "error": str(error)[:300]})
            break
        told.append({"tool": name, **args})
    return told
