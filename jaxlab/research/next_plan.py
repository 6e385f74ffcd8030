"""What a study runs next: the sizes and rules that are fixed beforehand.

A pilot for the variance between seeds; then as many seeds as the power asks for, as
far as the budget goes, with looks, on seeds that the pilot did not have; then what a
rule calls for, once. The chance of a false claim is shared out among a question's
plans, so it holds for all of them together.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.research import analysis, plans, stats
from jaxlab.research.questions import (
    Missing,
    clean,
    config_of,
    field_of,
    fields_of,
    pairs,
    read,
    setting_name,
)
from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import BudgetSpent

PILOT = 3  # seeds of a pilot
POWER = 0.9
MAIN = 0.8  # share of alpha for the first plan of a sweep; the rest is its follow-up's


@tool("idempotent")
def follow_up(
    context: Context, request: str = "", register_plan: bool = False
) -> dict[str, Any] | Result:
    """What to run next, from the question and the plans so far: arguments of a plan.

    First a pilot for the variance, then runs as many as its power asks for, then what
    a rule calls for: a sweep whose best is at its edge is extended, a comparison whose
    arms diverged is made again at a third of the learning rate. `request`: a person's
    "also try FIELD=VALUE", "also compare CONFIG" or "drop ARM", answered by an
    amendment; so is code that has changed while a plan's runs are made, and all of
    them are made anew. `register_plan` registers it at once.
    """
    try:
        made = proposal(context, request)
    except Missing as error:
        return {"next": "none", "why": str(error)}
    if not register_plan or made["next"] in ("none", "run"):
        return made
    if made["next"] == "amend":
        plan, changes = made["plan_number"], made["changes"]
        done = plans.amend_plan(context, plan=plan, why=made["why"], changes=changes)
    else:
        done = plans.propose_plan(context, **made["plan"])
    value = {"next": "run", "why": made["why"], "plan_number": done.value["plan"]}
    return Result(value | {"stage": made["next"]}, done.refs)


def proposal(context: Context, request: str = "") -> dict[str, Any]:
    """See `follow_up`.

    Raises:
        Missing: the question or the request cannot be read, or too little is left for
            a follow-up.
        BudgetSpent: too little is left for the test that was asked for.
    """
    wanted = read(context)
    plan = _latest(context)
    if request:
        return _amended(context, wanted, plan, request)
    if plan is None:
        return _pilot(context, wanted)
    n, body = plan
    if not analysis.summary(context.workspace, body)["over"]:
        if plans.code_fingerprint(Path(body["trainer"])) != body["code_hash"]:
            why = f"the code or its versions have changed since plan {n} was registered"
            return {"next": "amend", "plan_number": n, "why": why, "changes": {}}
        return {"next": "run", "plan_number": n, "why": f"plan {n} is not over"}
    if body["stage"] == "pilot":
        return _confirmatory(context, wanted, n, body)
    return _after(context, wanted, n, body)


def _latest(context: Context) -> tuple[int, dict[str, Any]] | None:
    kinds = ("plan", "amendment")
    numbers = [e.data["n"] for e in context.events() if e.kind in kinds]
    if not numbers:
        return None
    return numbers[-1], plans.read_plan(context.workspace, numbers[-1])


def _pilot(context: Context, wanted: dict[str, Any]) -> dict[str, Any]:
    seeds = [1000 + i for i in range(int(context.options.get("pilot", PILOT)))]
    if (left := _runs_left(context)) is not None:
        least = len(wanted["arms"]) * (len(seeds) + 3)
        if left < least:
            raise BudgetSpent(
                f"{left} runs are left, and a pilot and three seeds of "
                f"{len(wanted['arms'])} arms take {least}; raise --budget runs=..."
            )
    return {
        "next": "pilot",
        "why": "the variance between seeds is not known yet",
        "plan": _common(wanted)
        | {"arms": wanted["arms"], "seeds": seeds, "stage": "pilot"},
    }


def _common(wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "metric": wanted["metric"],
        "direction": wanted["direction"],
        "factors": wanted["factors"],
    }


def _confirmatory(
    context: Context, wanted: dict[str, Any], n: int, pilot: dict[str, Any]
) -> dict[str, Any]:
    values = analysis.values(context.workspace, pilot)
    good = {arm: v for arm, v in values.items() if np.isfinite(v).sum() > 1}
    arms = [a for a in pilot["arms"] if a["name"] in good]  # as people amended it
    wanted = wanted | {"factors": pilot["factors"]}
    if len(arms) < 2:
        return _diverged(context, wanted, n, pilot)
    best = _best(good, wanted["direction"])
    reference = wanted["reference"] if wanted["reference"] in good else best
    alpha = wanted["alpha"] * (MAIN if wanted["kind"] == "sweep" else 1.0)
    if wanted["kind"] == "scale":
        factors = {a["name"]: wanted["factors"][a["name"]] for a in arms}
        weights = stats.trend_weights(factors)
        comparisons = [{"name": "slope", "weights": weights, "scale": "log"}]
        effect, deviations = 0.0, []
    else:
        comparisons = _against(reference, [a["name"] for a in arms])
        effect = wanted["min_effect"] or _percent(good[reference])
        deviations = [
            d[np.isfinite(d)]
            for a in good
            if a != reference
            for d in [good[a] - good[reference]]
        ]
    sd = max((stats.sd_bound(d) for d in deviations if len(d) > 1), default=math.inf)
    level = stats.look_levels([1, 2], alpha)[-1] / max(1, len(comparisons))
    try:
        most = _most_seeds(context, len(arms), pilot)
    except Missing as short:  # a pilot alone answers nothing
        raise BudgetSpent(str(short)) from None
    need = (
        stats.sample_size(effect, sd, level, POWER, most) if math.isfinite(sd) else None
    )
    size = need or most
    if wanted["kind"] == "scale":
        size = min(most, 6)
    looks = [size] if size < 6 else [-(-size // 2), size]
    reached = (
        stats.power(size, effect, sd, level) if math.isfinite(sd) and effect else None
    )
    why = f"plan {n} was the pilot; {size} seeds"
    if need is None and effect:
        why += " are all that the budget allows, fewer than the power asks for"
    plan = _common(wanted) | {
        "arms": arms,
        "comparisons": comparisons,
        "seeds": list(range(1, size + 1)),
        "looks": looks,
        "alpha": alpha,
        "min_effect": effect,
        "power": reached,
        "stage": "confirmatory",
        "based_on": [f"plans/{n}.json"],
    }
    return {"next": "confirmatory", "why": why, "plan": plan}


def _against(reference: str, names: list[str]) -> list[dict[str, Any]]:
    return [
        {"name": f"{name}_vs_{reference}", "weights": {name: 1, reference: -1}}
        for name in names
        if name != reference
    ]


def _percent(values: np.ndarray) -> float:
    """A hundredth of the mean, to one digit: what matters where nothing is said."""
    mean = abs(float(np.nanmean(values)))
    return float(f"{mean / 100:.0e}") if mean else 0.0


def _best(values: Mapping[str, np.ndarray], direction: str) -> str:
    sign = 1 if direction == "lower" else -1
    return min(values, key=lambda arm: sign * float(np.nanmean(values[arm])))


def _runs_left(context: Context) -> int | None:
    """Runs of the budget that are left; None: it has no limit."""
    budget = context.options.get("settings", {}).get("budget", {}).get("runs")
    if budget is None:
        return None
    begun = {e.data["run"] for e in context.events() if e.kind == "run_start"}
    return int(budget) - len(begun)


def _most_seeds(context: Context, arms: int, pilot: dict[str, Any]) -> int:
    """Seeds that budget and time allow, at most what options say (20)."""
    most = int(context.options.get("seeds", 20))
    if (left := _runs_left(context)) is not None:
        most = min(most, left // arms)
    wall = context.options.get("settings", {}).get("budget", {}).get("wall")
    results = [
        analysis.outcome(context.workspace, run)
        for runs in pilot["runs"].values()
        for run in runs
    ]
    took = [r["seconds"] for r in results if r and r["status"] == "done"]
    if wall is not None and took:
        used = context.events()[-1].t - context.events()[0].t
        at_once = int(context.options.get("parallel", 1))
        left = max(0.0, 0.8 * wall - used) * at_once
        most = min(most, int(left / (max(took) * arms)))
    if most < 3:
        raise Missing(
            f"the budget leaves {most} seeds of {arms} arms, and a test takes three or "
            "more; raise --budget"
        )
    return most


def _after(
    context: Context, wanted: dict[str, Any], n: int, body: dict[str, Any]
) -> dict[str, Any]:
    """The rules after a plan's verdicts."""
    found = analysis.verdicts(context.workspace, body)
    if body["stage"] == "follow-up":
        return {"next": "none", "why": "one follow-up is the most that a question gets"}
    if found and all(v.found == "unstable" for v in found.values()):
        return _diverged(context, wanted, n, body)
    if wanted["kind"] != "sweep":
        return {"next": "none", "why": f"plan {n} has its verdicts, and no rule fires"}
    values = analysis.values(context.workspace, body)
    best = _best(
        {a: v for a, v in values.items() if np.isfinite(v).any()}, wanted["direction"]
    )
    factors = body["factors"]
    numbers = sorted(v for v in factors.values() if isinstance(v, int | float))
    if len(numbers) < 2 or factors[best] not in (numbers[0], numbers[-1]):
        return {"next": "none", "why": "the best value is within the sweep"}
    field = next(
        k for k, v in _arm(body, best)["overrides"].items() if v == factors[best]
    )
    edge, inner = (
        (numbers[0], numbers[1]) if factors[best] == numbers[0] else numbers[:-3:-1]
    )
    new: Any = edge * edge / inner
    new = max(1, round(new)) if isinstance(edge, int) else float(f"{new:.2g}")
    if new in numbers:
        return {"next": "none", "why": "the sweep cannot be extended by a whole number"}
    arm = dict(_arm(body, best))
    arm |= {
        "name": setting_name(field, new),
        "overrides": arm["overrides"] | {field: new},
    }
    seeds = min(len(body["seeds"]), _most_seeds(context, 1, body))
    return {
        "next": "follow-up",
        "why": f"{best} is at the edge of the sweep",
        "plan": _common(wanted)
        | {
            "arms": [_arm(body, best), arm],
            "factors": {best: factors[best], arm["name"]: new},
            "comparisons": _against(best, [arm["name"], best]),
            "seeds": body["seeds"][:seeds],
            "looks": [seeds],
            "alpha": wanted["alpha"] * (1 - MAIN),
            "min_effect": body["min_effect"],
            "stage": "follow-up",
            "based_on": [f"plans/{n}.json"],
        },
    }


def _diverged(
    context: Context, wanted: dict[str, Any], n: int, body: dict[str, Any]
) -> dict[str, Any]:
    """All of it diverged: again, with every arm at a third of its learning rate."""
    if body["stage"] == "follow-up" or any(
        "diverged" in e.data.get("why", "")
        for e in context.events()
        if e.kind == "note"
    ):
        return {"next": "none", "why": "it diverged at a lower learning rate as well"}
    arms = []
    for arm in body["arms"]:
        fields = fields_of(arm["config"], context) | arm["overrides"]
        rates = [k for k in fields if k.split(".")[-1] == "lr" and fields[k]]
        if not rates:
            return {
                "next": "none",
                "why": "too few runs ended well to compare anything",
            }
        lower = {k: float(f"{fields[k] / 3:.2g}") for k in rates}
        arms.append(arm | {"overrides": arm["overrides"] | lower})
    seeds = min(max(len(body["seeds"]), 6), _most_seeds(context, len(arms), body))
    names = [a["name"] for a in arms]
    reference = wanted["reference"] or names[0]
    return {
        "next": "follow-up",
        "why": f"the arms of plan {n} diverged; a third of their learning rate",
        "plan": _common(wanted)
        | {
            "arms": arms,
            "comparisons": _against(reference, names),
            "seeds": list(range(1, seeds + 1)),
            "looks": [seeds],
            "alpha": wanted["alpha"],
            "min_effect": wanted["min_effect"] or 0.0,
            "stage": "follow-up",
            "based_on": [f"plans/{n}.json"],
        },
    }


def _arm(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next(a for a in body["arms"] if a["name"] == name)


def _amended(
    context: Context,
    wanted: dict[str, Any],
    plan: tuple[int, dict[str, Any]] | None,
    request: str,
) -> dict[str, Any]:
    """A person's request as an amendment of the plan in force."""
    if plan is None:
        raise Missing("there is no plan yet to amend")
    n, body = plan
    arms, factors = list(body["arms"]), dict(body["factors"])
    settings = dict(pairs(request))
    if match := re.search(r"\bdrop\s+(\S+)", request, re.IGNORECASE):
        arms = [a for a in arms if a["name"] != match[1].strip(".,")]
        if len(arms) == len(body["arms"]):
            raise Missing(f"plan {n} has no arm {match[1]!r}")
    elif re.search(r"\b(also|try|add)\b", request, re.IGNORECASE) and settings:
        base = arms[-1] if wanted["reference"] is None else _arm(body, arms[0]["name"])
        fields = fields_of(base["config"], context)
        full = {field_of(k, fields, base["config"]): v for k, v in settings.items()}
        name = clean("+".join(setting_name(k, v) for k, v in full.items()))
        arms.append(base | {"name": name, "overrides": base["overrides"] | full})
        if factors and len(full) == 1:
            factors[name] = next(iter(full.values()))
    elif match := re.search(r"\balso compare\s+(\S+)", request, re.IGNORECASE):
        config = config_of(match[1].strip(".,"), context)
        arms.append(
            {
                "name": clean(config.rpartition("/")[2].removesuffix(".py")),
                "config": config,
                "overrides": {},
            }
        )
    else:
        raise Missing(
            f"the rule policy does not understand {request[:80]!r}; it knows 'also try "
            "FIELD=VALUE', 'also compare CONFIG' and 'drop ARM'"
        )
    names = [a["name"] for a in arms]
    if len(set(names)) < len(names) or len(names) < 2:
        raise Missing("that leaves two arms of one name, or fewer than two")
    changes: dict[str, Any] = {"arms": arms, "factors": factors}
    if body["comparisons"]:
        reference = next(c["name"].partition("_vs_")[2] for c in body["comparisons"])
        changes["comparisons"] = _against(
            reference if reference in names else names[0], names
        )
    return {"next": "amend", "plan_number": n, "why": request, "changes": changes}


TOOLS = (follow_up,)
