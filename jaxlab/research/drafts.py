"""Drafts of a paper's sections: templates around facts, with no judgement in them."""

from typing import Any

from jaxlab.research import analysis, facts
from jaxlab.research.types import ToolError
from jaxlab.research.workspace import Workspace

METHODS = ("student1908", "holm1979", "landemets1983")


Plans = dict[int, dict[str, Any]]
Made = tuple[str, list[dict[str, Any]]]
SECTIONS = ("title", "abstract", "method", "results", "follow-up", "runs", "limits")
CITED = ("student", "holm", "landemets")
"""to be cited before a text is compiled that is drafted here"""


def main_plan(found: Plans) -> int:
    """The plan that a paper is about: the first that tests something.

    Raises:
        ToolError: there is none.
    """
    tested = [n for n, plan in found.items() if plan["comparisons"]]
    if not tested:
        raise ToolError("no plan of this question tests anything yet")
    return next((n for n in tested if found[n]["stage"] != "follow-up"), tested[0])


def draft(
    workspace: Workspace, section: str, plan: int, found: Plans
) -> dict[str, Any]:
    """A section's title and blocks, for `paper.set_section`; none if it has no matter.

    Args:
        workspace: holds the facts of the plans.
        section: one of `SECTIONS`.
        plan: number of the plan that the paper is about.
        found: plans in force of the question, by number.

    Raises:
        ToolError: no such section, or facts are missing.
    """
    if section not in SECTIONS:
        raise ToolError(f"no section {section!r}; there are {', '.join(SECTIONS)}")
    ledger = facts.ledger(workspace)
    if f"p{plan}.question" not in ledger or plan not in found:
        raise ToolError(f"compute the facts of plan {plan} first")
    body = found[plan]
    later = [n for n in found if n > plan and found[n]["comparisons"]]
    if section == "title":
        made: Made = "Title", [{"text": f"{{fact:p{plan}.question}}"}]
    elif section == "abstract":
        made = _abstract(found, plan, later)
    elif section == "method":
        made = _method(body, plan, ledger)
    elif section == "results":
        made = _results(workspace, body, plan, ledger)
    elif section == "follow-up":
        blocks = []
        for n in later:
            text = "A rule called for another plan, registered after the results above."
            blocks += [{"text": text}, *_method(found[n], n, ledger)[1]]
            blocks += _results(workspace, found[n], n, ledger)[1]
        made = "Follow-up", blocks
    elif section == "runs":
        made = _runs(ledger, found)
    else:
        made = _limits({n: found[n] for n in (plan, *later)}, ledger)
    return {"title": made[0], "blocks": made[1]}


def _abstract(found: Plans, n: int, later: list[int]) -> Made:
    claims = [
        f"{{claim:{m}/{c['name']}}}."
        for m in (n, *later)
        for c in found[m]["comparisons"]
    ]
    text = (
        f"We asked: {{fact:p{n}.question}} We planned {{fact:p{n}.runs}} runs of "
        f"{{fact:p{n}.plan.arms}} arms before any was made; "
        f"{{fact:p{n}.runs.done}} ended well. {' '.join(claims)}"
    )
    return "Abstract", [{"text": text}]


def _method(plan: dict[str, Any], n: int, ledger: Any) -> Made:
    arms = ", ".join(f"{{fact:p{n}.arm.{a['name']}}}" for a in plan["arms"])
    text = (
        f"The arms are {arms}. Each was trained with {{fact:p{n}.plan.seeds}} seeds at "
        "most, and runs of one seed are paired: they share the order of the data. The "
        f"metric is the last {{fact:p{n}.plan.metric}} of a run; "
        f"{{fact:p{n}.plan.direction}} is the aim."
    )
    blocks: list[dict[str, Any]] = [{"text": text}]
    varied = list(dict.fromkeys(k for a in plan["arms"] for k in a["overrides"]))
    fixed = ("steps", "batch", "length")
    fixed = [f for f in fixed if f not in varied and _has(ledger, n, plan, f)]
    names = {f: f"{{fact:{facts.fact_id(n, 'field', field=f)}}}" for f in varied}
    names = {f: f for f in fixed} | names
    # Few fields differ, and many may be shared: those would not fit side by side.
    shared = [f for f in names if _shared(ledger, n, plan, f)]
    own = [f for f in names if f not in shared]
    if own:
        rows = []
        for arm in plan["arms"]:
            cells = [_setting(ledger, n, arm["name"], f) for f in own]
            rows.append([f"{{fact:p{n}.arm.{arm['name']}}}", *cells])
        blocks.append(
            {
                "table": f"settings-p{n}",
                "caption": "Settings of each arm.",
                "header": ["arm", *(names[f] for f in own)],
                "rows": rows,
            }
        )
    if shared:
        first = plan["arms"][0]["name"]
        blocks.append(
            {
                "table": f"shared-p{n}",
                "caption": "Settings that all arms share; all others are in the plan.",
                "header": ["setting", "value"],
                "rows": [[names[f], _setting(ledger, n, first, f)] for f in shared],
            }
        )
    if plan["comparisons"]:
        f = f"{{fact:p{n}.plan."
        text = (
            f"The arms of each seed are compared by a paired {f}test}} test "
            f"{{cite:student1908}}, at {f}looks}} looks fixed beforehand "
            f"{{cite:landemets1983}}, with {f}correction}} correction over the "
            f"{f}comparisons}} comparisons {{cite:holm1979}}. The chance of any false "
            f"claim is {f}alpha}} at most."
        )
        if plan["min_effect"]:
            text += (
                f" The smallest effect that matters is {{fact:p{n}.plan.min_effect}}."
            )
        if plan["power"] is not None:
            text += (
                f" From the pilot, the power to find it is {{fact:p{n}.plan.power}}."
            )
        blocks.append({"text": text})
    return "Method", blocks


def _results(workspace: Workspace, plan: dict[str, Any], n: int, ledger: Any) -> Made:
    blocks: list[dict[str, Any]] = [
        {"items": [f"{{claim:{n}/{c['name']}}}." for c in plan["comparisons"]]}
    ]
    rows = []
    for arm in plan["arms"]:
        name = arm["name"]
        cells = [f"{{fact:p{n}.arm.{name}}}"]
        for op in ("mean", "sd"):
            key = f"p{n}.{op}.{name}"
            cells.append(f"{{fact:{key}}}" if key in ledger else "not known")
        cells.append(f"{{fact:p{n}.runs.{name}.done}}")
        rows.append(cells)
    blocks.append(
        {
            "table": f"arms-p{n}",
            "caption": f"The last {{fact:p{n}.plan.metric}} of runs that ended well.",
            "header": ["arm", "mean", "standard deviation", "runs"],
            "rows": rows,
        }
    )
    found = analysis.verdicts(workspace, plan)
    if found:
        rows = []
        for name in found:
            parts = ("mean", "low", "high", "boot_low", "boot_high", "p", "p_adjusted")
            key = f"p{n}.verdict.{name}"
            rows.append([_pair(n, name), *(f"{{fact:{key}.{p}}}" for p in parts)])
        level = f"{{fact:p{n}.verdict.{next(iter(found))}.level}}"
        blocks.append(
            {
                "table": f"tests-p{n}",
                "caption": f"Comparisons, {level} intervals by Student and by "
                "bootstrap, and p before and after correction.",
                "header": ["comparison", "mean", "low", "high", "low (boot.)"]
                + ["high (boot.)", "p", "corrected p"],
                "rows": rows,
            }
        )
    captions = {
        "curves": "The metric by step: mean and range over the seeds.",
        "arms": "The last metric of every run; bars are means.",
        "effects": "Mean of each comparison and its interval.",
    }
    for kind, caption in captions.items():
        if workspace.exists(f"figures/{kind}-p{n}.svg"):
            blocks.append({"figure": f"{kind}-p{n}", "caption": caption})
    return "Results", blocks


def _runs(ledger: Any, found: Plans) -> Made:
    """Every plan of the question, with all that became of its runs."""
    rows = []
    for m in found:
        if f"p{m}.runs" in ledger:
            ids = [f"p{m}.runs.{s.replace(' ', '_')}" for s in facts.STATUSES]
            ids = [f"p{m}.plan.stage", f"p{m}.runs", *ids, f"p{m}.cost.seconds"]
            rows.append([f"{{fact:{i}}}" for i in ids])
    blocks = [
        {
            "table": "runs",
            "caption": "All planned runs and what became of them; the last column is "
            "their time together, in seconds.",
            "header": ["plan", "planned", *facts.STATUSES[:-2], "not run", "no metric"]
            + ["time"],
            "rows": rows,
        }
    ]
    text = (
        "No run is left out. A comparison uses the pairs of seeds whose runs all "
        "ended well; an arm that diverged is not judged by what is left of it. Runs "
        "that were not run were not needed, since an earlier look settled all, or the "
        "budget was spent."
    )
    return "Runs", [{"text": text}, *blocks]


def _limits(found: Plans, ledger: Any) -> Made:
    items = [
        "The result holds for these configs, this data and this length of training; "
        "nothing was tried beyond them.",
        "The text was put together from templates by a rule-based driver. It has no "
        "ideas of its own, and did not search the literature.",
    ]
    verdicts = [
        ledger.get(f"p{n}.verdict.{c['name']}.found", {}).get("value")
        for n, plan in found.items()
        for c in plan["comparisons"]
    ]
    if "undecided" in verdicts:
        items.append(
            "Where nothing was detected, an effect within the interval is still "
            "possible."
        )
    return "Limits", [{"items": items}]


def _pair(n: int, name: str) -> str:
    a, versus, b = name.partition("_vs_")
    if not versus:
        return "slope"
    return f"{{fact:p{n}.arm.{a}}} − {{fact:p{n}.arm.{b}}}"


def _has(ledger: Any, n: int, plan: dict[str, Any], field: str) -> bool:
    key = f"p{n}.setting.{plan['arms'][0]['name']}.{field}"
    return key in ledger


def _shared(ledger: Any, n: int, plan: dict[str, Any], field: str) -> bool:
    """Whether all arms have the same value of a field."""
    keys = [
        facts.fact_id(n, "setting", arm=arm["name"], field=field)
        for arm in plan["arms"]
    ]
    values = [ledger[key]["value"] if key in ledger else None for key in keys]
    return all(key in ledger for key in keys) and values == values[:1] * len(values)


def _setting(ledger: Any, n: int, arm: str, field: str) -> str:
    key = facts.fact_id(n, "setting", arm=arm, field=field)
    return f"{{fact:{key}}}" if key in ledger else "as in the config"
