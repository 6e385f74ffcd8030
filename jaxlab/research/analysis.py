"""From the files of a plan's runs to its verdicts: pure functions of the workspace."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlab.research import stats
from jaxlab.research.workspace import Workspace

NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
FINAL = ("done", "failed", "diverged", "timeout")


def outcome(workspace: Workspace, run: str) -> dict[str, Any] | None:
    """A run's `result.json`; None while it has none."""
    path = f"runs/{run}/result.json"
    return workspace.read_json(path) if workspace.exists(path) else None


def final(workspace: Workspace, run: str, metric: str) -> float | None:
    """Last value of a metric in a run's `metrics.jsonl`; None if it has none."""
    value = None
    for row in rows(workspace, run):
        if metric in row:
            value = row[metric]
    return value


def rows(workspace: Workspace, run: str) -> list[dict[str, Any]]:
    """Whole rows of a run's `metrics.jsonl`, also while it is being written."""
    path = f"runs/{run}/metrics.jsonl"
    if not workspace.exists(path):
        return []
    *lines, _ = workspace.read_text(path).split("\n")
    found = [json.loads(line) for line in lines]
    return [{k: NAMED.get(v, v) for k, v in row.items()} for row in found]


def status(workspace: Workspace, plan: Mapping[str, Any], run: str) -> str:
    """How a run stands with the plan: "planned" and "no metric" beside the usual."""
    result = outcome(workspace, run)
    if result is None:
        return "planned"
    if result["status"] != "done":
        return result["status"]
    value = final(workspace, run, plan["metric"])
    if value is None:
        return "no metric"
    return "done" if math.isfinite(value) else "diverged"


def statuses(workspace: Workspace, plan: Mapping[str, Any]) -> dict[str, list[str]]:
    """Status of every run that the plan names, by arm, in the order of its seeds."""
    return {
        arm: [status(workspace, plan, run) for run in runs]
        for arm, runs in plan["runs"].items()
    }


def values(workspace: Workspace, plan: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The metric of every arm, float64[seeds]; NaN where a run did not end well."""
    table = {}
    for arm, runs in plan["runs"].items():
        good = [
            final(workspace, run, plan["metric"])
            if status(workspace, plan, run) == "done"
            else math.nan
            for run in runs
        ]
        table[arm] = np.array(good, np.float64)
    return table


def seeds_complete(workspace: Workspace, plan: Mapping[str, Any]) -> int:
    """Seeds, counted from the first, of which every arm's run has ended for good."""
    ended = [
        [(outcome(workspace, run) or {}).get("status") in FINAL for run in runs]
        for runs in plan["runs"].values()
    ]
    return next(
        (i for i, row in enumerate(zip(*ended, strict=True)) if not all(row)),
        len(plan["seeds"]),
    )


def looks_taken(workspace: Workspace, plan: Mapping[str, Any]) -> list[int]:
    """Looks, by number, whose runs have all ended."""
    have = seeds_complete(workspace, plan)
    return [k for k, n in enumerate(plan["looks"]) if n <= have]


def differences(workspace: Workspace, plan: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Of every comparison, float64[seeds]; NaN where a run did not end well."""
    table = values(workspace, plan)
    found = {}
    for c in plan["comparisons"]:
        arms = {arm: table[arm] for arm in c["weights"]}
        if c["scale"] == "log":
            with np.errstate(invalid="ignore", divide="ignore"):
                arms = {arm: np.log(v) for arm, v in arms.items()}
        d = stats.contrast(arms, c["weights"])
        found[c["name"]] = np.where(np.isfinite(d), d, math.nan)
    return found


def verdicts(workspace: Workspace, plan: Mapping[str, Any]) -> dict[str, stats.Verdict]:
    """What the plan's looks say so far; empty before the first and in a pilot.

    Later runs than those of the look that settled all, which another plan may have
    made, change nothing.
    """
    taken = looks_taken(workspace, plan)
    if not taken or not plan["comparisons"]:
        return {}
    seen = plan["looks"][taken[-1]]
    went = statuses(workspace, plan)
    unstable = [
        c["name"]
        for c in plan["comparisons"]
        if any("diverged" in went[arm][:seen] for arm in c["weights"])
    ]
    scales = {c["scale"] for c in plan["comparisons"]}
    margin = plan["min_effect"] if scales == {"linear"} else 0.0
    return stats.decide(
        differences(workspace, plan),
        plan["looks"],
        plan["alpha"],
        margin,
        plan["test"],
        taken,
        unstable,
    )


def better(plan: Mapping[str, Any], verdict: stats.Verdict) -> bool | None:
    """Whether the positive side of a comparison is better; None: no difference."""
    if verdict.found not in ("higher", "lower"):
        return None
    return verdict.found == plan["direction"]


def summary(workspace: Workspace, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's state as plain JSON, for agents and people."""
    counts: dict[str, dict[str, int]] = {}
    for arm, went in statuses(workspace, plan).items():
        counts[arm] = {s: went.count(s) for s in sorted(set(went))}
    found = {
        name: {k: _plain(v) for k, v in dataclasses.asdict(verdict).items()}
        for name, verdict in verdicts(workspace, plan).items()
    }
    taken = len(looks_taken(workspace, plan))
    over = taken == len(plan["looks"]) or stats.settled(
        verdicts(workspace, plan).values()
    )
    return {
        "stage": plan["stage"],
        "runs": counts,
        "looks_taken": taken,
        "over": over,
        "verdicts": found,
    }


def brief(workspace: Workspace, plan: Mapping[str, Any]) -> dict[str, Any]:
    """`summary` in a few words: runs by status over all arms, and what was found."""
    told = summary(workspace, plan)
    counts: dict[str, int] = {}
    for arm in told["runs"].values():
        for name, count in arm.items():
            counts[name] = counts.get(name, 0) + count
    found = {name: v["found"] for name, v in told["verdicts"].items()}
    return {
        "stage": plan["stage"],
        "over": told["over"],
        "runs": counts,
        "found": found,
    }


def _plain(value: Any) -> Any:
    """Numbers that JSON has; the others as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
