"""Facts: what a paper may state, each a pure function of plans and runs.

An agent names an operation and what to apply it to, never a value. The value is
computed here from `plans/`, `metrics.jsonl` and `result.json`, and again by
`recompute` whenever a paper is checked.

| op | selector | value |
| --- | --- | --- |
| question | | the question that the plan answers |
| plan | field | of the plan; seeds, looks, arms, comparisons: how many |
| arm | arm | its name |
| setting | arm, field | of the arm's config, by dotted name |
| field | field | name of a field of a config, which may have digits |
| runs | arm?, status? | number of runs |
| mean, sd | arm | of the metric over finished seeds (sd: with n - 1) |
| value | arm, seed | the metric of one run |
| spread | arms: [a, b] | standard deviation of the difference, for a pilot |
| verdict | comparison, part | see `stats.Verdict`; also level, boot_low, boot_high |
| cost | part | seconds, cpu_seconds or longest, over the plan's runs |
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxlab.research import analysis, plans, stats
from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import Fact, ToolError
from jaxlab.research.workspace import Workspace

LEDGER = "facts/ledger.json"
FORMAT = re.compile(r"\+?\.\d[feg%]|d|s|p")
Value = float | int | str
_PARTS = (
    "found",
    "look",
    "n",
    "mean",
    "low",
    "high",
    "p",
    "p_adjusted",
    "p_equivalence",
)


# --------------------------------------------------------------- operations


def _question(_: Workspace, plan: Mapping[str, Any]) -> Value:
    return plan["question"]


def _plan(_: Workspace, plan: Mapping[str, Any], field: str) -> Value:
    if field in ("seeds", "looks", "arms", "comparisons"):
        return len(plan[field])
    value = plan.get(field)
    if not isinstance(value, str | int | float):
        raise ToolError(f"a plan states no {field!r}")
    return value


def _arm(_: Workspace, plan: Mapping[str, Any], arm: str) -> Value:
    _runs_of(plan, arm)
    return arm


def _setting(_: Workspace, plan: Mapping[str, Any], arm: str, field: str) -> Value:
    _runs_of(plan, arm)
    value = plan["resolved"][arm]["config"]
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ToolError(f"the config of arm {arm} has no {field!r}")
        value = value[part]
    if isinstance(value, dict):
        value = value.get("type", "")
    return str(value) if value is None or isinstance(value, bool | list) else value


def _field(_: Workspace, plan: Mapping[str, Any], field: str) -> Value:
    if not any(field in arm["overrides"] for arm in plan["arms"]):
        raise ToolError(f"no arm changes {field!r}")
    return field


def _runs(
    workspace: Workspace,
    plan: Mapping[str, Any],
    arm: str | None = None,
    status: str | None = None,
) -> Value:
    table = analysis.statuses(workspace, plan)
    if arm is not None:
        _runs_of(plan, arm)
    went = [s for a, all_ in table.items() if arm in (None, a) for s in all_]
    return len(went) if status is None else went.count(status)


def _finite(workspace: Workspace, plan: Mapping[str, Any], arm: str) -> np.ndarray:
    _runs_of(plan, arm)
    values = analysis.values(workspace, plan)[arm]
    values = values[np.isfinite(values)]
    if len(values) < 2:
        raise ToolError(f"arm {arm} has fewer than two finished runs")
    return values


def _mean(workspace: Workspace, plan: Mapping[str, Any], arm: str) -> Value:
    return float(_finite(workspace, plan, arm).mean())


def _sd(workspace: Workspace, plan: Mapping[str, Any], arm: str) -> Value:
    return float(_finite(workspace, plan, arm).std(ddof=1))


def _value(workspace: Workspace, plan: Mapping[str, Any], arm: str, seed: int) -> Value:
    runs = _runs_of(plan, arm)
    if seed not in plan["seeds"]:
        raise ToolError(f"the plan has no seed {seed}")
    run = runs[plan["seeds"].index(seed)]
    found = analysis.final(workspace, run, plan["metric"])
    if found is None:
        raise ToolError(f"run {run} has no {plan['metric']}")
    return found if math.isfinite(found) else str(found)


def _spread(workspace: Workspace, plan: Mapping[str, Any], arms: list[str]) -> Value:
    values = analysis.values(workspace, plan)
    d = values[arms[0]] - values[arms[1]]
    d = d[np.isfinite(d)]
    if len(d) < 2:
        raise ToolError("fewer than two pairs ended well")
    return float(d.std(ddof=1))


def _verdict(
    workspace: Workspace, plan: Mapping[str, Any], comparison: str, part: str
) -> Value:
    found = analysis.verdicts(workspace, plan)
    if comparison not in found:
        raise ToolError(f"the plan has no finished comparison {comparison!r}")
    verdict = found[comparison]
    if part in _PARTS:
        value = getattr(verdict, part)
        return value + 1 if part == "look" else value
    level = stats.look_levels(plan["looks"], plan["alpha"])[verdict.look]
    level = 1 - level / len(plan["comparisons"])
    if part == "level":
        return level
    if part in ("boot_low", "boot_high"):
        d = analysis.differences(workspace, plan)[comparison]
        d = d[: plan["looks"][verdict.look]]
        ends = stats.bootstrap_interval(d[np.isfinite(d)], level)
        return ends[part == "boot_high"]
    raise ToolError(f"a verdict has no part {part!r}: {', '.join(_PARTS)}, level")


def _cost(workspace: Workspace, plan: Mapping[str, Any], part: str) -> Value:
    runs = {run for runs in plan["runs"].values() for run in runs}
    results = [r for run in runs if (r := analysis.outcome(workspace, run))]
    if part == "longest":
        return max((r["seconds"] for r in results), default=0.0)
    if part not in ("seconds", "cpu_seconds"):
        raise ToolError("costs are seconds, cpu_seconds and longest")
    return math.fsum(r[part] for r in results)


def _runs_of(plan: Mapping[str, Any], arm: str) -> list[str]:
    if arm not in plan["runs"]:
        raise ToolError(f"the plan has no arm {arm!r}")
    return plan["runs"][arm]


_OPS: dict[str, tuple[Callable[..., Value], str]] = {
    "question": (_question, "s"),
    "plan": (_plan, ".4g"),
    "arm": (_arm, "s"),
    "setting": (_setting, ".4g"),
    "field": (_field, "s"),
    "runs": (_runs, "d"),
    "mean": (_mean, ".4f"),
    "sd": (_sd, ".2g"),
    "value": (_value, ".4f"),
    "spread": (_spread, ".2g"),
    "verdict": (_verdict, "+.3g"),
    "cost": (_cost, ".3g"),
}


# ------------------------------------------------------------------- facts


def fact_id(plan: int, op: str, **selector: Any) -> str:
    """The id of a fact: p1.verdict.b_vs_a.mean, for instance."""
    words = [f"p{plan}", op, *map(str, _flat(selector.values()))]
    return re.sub(r"[^\w.=+-]", "_", ".".join(words), flags=re.ASCII)


def _flat(values: Any) -> list[Any]:
    return [x for v in values for x in (v if isinstance(v, list) else [v])]


def compute(
    workspace: Workspace,
    plan: int,
    op: str,
    selector: dict[str, Any],
    fmt: str | None = None,
) -> Fact:
    """Computes a fact.

    Raises:
        ToolError: an unknown operation, a selector that it has not, or no data.
    """
    if op not in _OPS:
        raise ToolError(f"no operation {op!r}; there are {', '.join(_OPS)}")
    body = plans.read_plan(workspace, plan)
    try:
        value = _OPS[op][0](workspace, body, **selector)
    except TypeError as error:
        raise ToolError(f"{op}: {error}") from None
    if isinstance(value, float) and not math.isfinite(value):
        value = str(value)
    fmt = fmt or _format(op, selector, value)
    if not FORMAT.fullmatch(fmt) or (isinstance(value, str) and fmt != "s"):
        raise ToolError(f"format {fmt!r} is none for {value!r}")
    arms = _flat([selector.get("arm") or selector.get("arms") or []])
    runs = [r for arm in arms or body["runs"] for r in body["runs"].get(arm, [])]
    if op in ("question", "plan", "arm", "setting", "field"):
        runs = []
    unit = "s" if op == "cost" else None
    inputs = (f"plan:{plan}", *dict.fromkeys(runs))
    return Fact(fact_id(plan, op, **selector), value, unit, op, inputs, selector, fmt)


def _format(op: str, selector: dict[str, Any], value: Value) -> str:
    if isinstance(value, str):
        return "s"
    part = selector.get("part", "")
    if part.startswith("p") and op == "verdict":
        return "p"
    if part == "level":
        return ".1%"
    return ".6g" if isinstance(value, int) else _OPS[op][1]


def recompute(workspace: Workspace, fact: Mapping[str, Any]) -> str | None:
    """Checks a ledger's entry against the files; None where it holds.

    Returns:
        what is wrong with it, in one line.
    """
    try:
        plan = int(str(fact["inputs"][0]).removeprefix("plan:"))
        made = compute(workspace, plan, fact["op"], fact["selector"], fact["fmt"])
        again = dataclasses.asdict(made) | {"inputs": list(made.inputs)}
    except (
        ToolError,
        KeyError,
        IndexError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        return f"fact {fact.get('id')}: cannot be computed: {error}"
    for name, value in again.items():
        if not _same(fact.get(name), value):
            return (
                f"fact {fact['id']}: {name} is {fact.get(name)!r}, computed {value!r}"
            )
    return None if set(fact) == set(again) else f"fact {fact['id']}: other fields"


def _same(a: Any, b: Any) -> bool:
    if type(a) is float and type(b) is float:
        return math.isclose(a, b, rel_tol=1e-9)  # other versions of numpy and scipy
    return type(a) is type(b) and a == b


def text(fact: Mapping[str, Any]) -> str:
    """A fact's value as papers show it, with a true minus sign."""
    value, fmt = fact["value"], fact["fmt"]
    if fmt == "s":
        return str(value)
    if fmt == "p":
        return "<0.001" if value < 0.001 else f"{value:.3f}"
    return format(value, fmt).replace("-", "−")


def standard(workspace: Workspace, plan: int) -> list[tuple[str, dict[str, Any]]]:
    """The operations that every paper about a plan needs, as far as its runs go."""
    body = plans.read_plan(workspace, plan)
    found: list[tuple[str, dict[str, Any]]] = [("question", {})]
    fields = "stage metric direction arms comparisons seeds looks alpha test correction"
    found += [("plan", {"field": f}) for f in (*fields.split(), "min_effect")]
    if body["power"] is not None:
        found.append(("plan", {"field": "power"}))
    varied = list(dict.fromkeys(k for a in body["arms"] for k in a["overrides"]))
    found += [("field", {"field": f}) for f in varied]
    found += [("runs", {}), *(("runs", {"status": s}) for s in STATUSES)]
    done = analysis.statuses(workspace, body)
    for arm, went in done.items():
        found += [("arm", {"arm": arm}), ("runs", {"arm": arm})]
        found += [("runs", {"arm": arm, "status": s}) for s in STATUSES]
        if went.count("done") > 1:
            found += [("mean", {"arm": arm}), ("sd", {"arm": arm})]
        config = body["resolved"][arm]["config"]
        usual = [f for f in ("steps", "batch", "length") if f in config]
        usual = [f for f in usual if f not in varied]
        found += [("setting", {"arm": arm, "field": f}) for f in [*usual, *varied]]
    for comparison in analysis.verdicts(workspace, body):
        parts = (*_PARTS, "level", "boot_low", "boot_high")
        found += [("verdict", {"comparison": comparison, "part": p}) for p in parts]
    arms = [arm["name"] for arm in body["arms"]]
    if body["stage"] == "pilot":
        good = [a for a in arms if done[a].count("done") > 1]
        found += [
            ("spread", {"arms": [arm, arms[0]]}) for arm in good if arm != arms[0]
        ]
    found += [("cost", {"part": part}) for part in ("seconds", "cpu_seconds")]
    return found


STATUSES = (
    "done",
    "failed",
    "diverged",
    "timeout",
    "cancelled",
    "planned",
    "no metric",
)


def ledger(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """The facts of the workspace, by id."""
    return {fact["id"]: fact for fact in workspace.facts()}


@tool("idempotent")
def compute_facts(
    context: Context,
    plan: int | None = None,
    facts: list[dict[str, Any]] | None = None,
) -> Result:
    """Computes facts into the ledger: all the usual ones, or those named of a plan.

    Without a plan: of all plans. Each of `facts` is {op, selector, fmt}; values are
    computed, never given.
    """
    workspace = context.workspace
    known = plans.registered(context.events())
    if facts and plan is None:
        raise ToolError("which plan are these facts of?")
    made: dict[str, Any] = {}
    skipped = 0
    for n in known if plan is None else (plan,):
        wanted = [
            (f.get("op", ""), f.get("selector", {}), f.get("fmt")) for f in facts or ()
        ]
        wanted = wanted or [(op, s, None) for op, s in standard(workspace, n)]
        for op, selector, fmt in wanted:
            try:
                fact = compute(workspace, n, op, selector, fmt)
                made[fact.id] = dataclasses.asdict(fact)
            except ToolError:
                if facts:
                    raise
                skipped += 1
    all_ = ledger(workspace) | made
    ref = workspace.write_json(LEDGER, {"facts": [all_[k] for k in sorted(all_)]})
    context.record("fact", plan=plan, count=len(made), sha256=ref.sha256)
    value: dict[str, Any] = {"computed": len(made), "skipped": skipped}
    if facts:
        value["facts"] = {k: text(f) for k, f in made.items()}
    return Result(value, (ref,))


@tool("pure")
def list_facts(context: Context, plan: int | None = None) -> dict[str, str]:
    """The ledger: ids and how each value reads."""
    found = ledger(context.workspace)
    prefix = "p" if plan is None else f"p{plan}."
    return {k: text(f) for k, f in found.items() if k.startswith(prefix)}


TOOLS = (compute_facts, list_facts)
