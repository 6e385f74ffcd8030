"""False and missed claims of the research part's whole decision rule.

Studies from question to verdict: pilot, sample size from its variance, looks, Holm's
correction, follow-up where a rule fires. The tools are those of a real study; a run is
a draw from a normal distribution, made in this process, in place of a training script.

    null       compare two arms that differ in nothing but their noise
    sweep      four values that differ in nothing: three comparisons, and a follow-up
               whenever the best looks to be at the edge, which is half of the time
    planted    two arms whose difference is the smallest effect that matters, in numbers
               that the pilot says give a power of 0.9

python benchmarks/research_errors.py --studies 200
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxlab.research import analysis, experiments, next_plan, plans, worker  # noqa: E402
from tests.research_study import FIELDS, study, write_config  # noqa: E402

NOISE, EFFECT = 0.01, 0.02


class Inline:
    """Runs that end at once: the last loss is level + shared noise + own noise."""

    def start(self, folder: Path) -> None:
        """See `experiments.Executor`."""
        spec = json.loads((folder / "spec.json").read_text())
        config = spec["config"]
        own = np.random.default_rng([config["study"], config["seed"], config["arm"]])
        common = np.random.default_rng([config["study"], config["seed"]])
        loss = config["level"] + 0.05 * common.normal() + NOISE * own.normal()
        row = {"step": config["steps"], "eval/loss": loss}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        worker.write(folder, spec, time.time(), "done", "", 0, 0, 0.0)

    def running(self, folder: Path) -> bool:
        """See `experiments.Executor`."""
        return False

    def end(self, folder: Path) -> None:
        """See `experiments.Executor`."""


def described(arm: Any, context: Any) -> dict[str, Any]:
    """What the training script would say of an arm."""
    fields = {"study": context.options["study"], "arm": 0, "level": 2.0, "steps": 3}
    return {"config": {"seed": 0, **fields, **arm.overrides}, "data": "none"}


def one(kind: str, number: int, folder: Path) -> dict[str, Any]:
    """Makes a study; says what it claims."""
    config = write_config(folder, "base")
    options: dict[str, Any] = {
        "configs": [config],
        "config": config,
        "study": number,
        "min_effect": EFFECT,
    }
    if kind == "sweep":
        options["sweep"] = "arm=1,2,3,4"
        question = "Which?"
    else:
        level = 2.0 + (EFFECT if kind == "planted" else 0.0)
        question = f"does {config} with arm=1 match {config} with arm=2, level={level}?"
    with study(folder / "ws", question, **options) as context:
        runs = 0
        while (made := next_plan.follow_up(context, register_plan=True)) is not None:
            value = made.value if hasattr(made, "value") else made
            if value["next"] == "none":
                break
            experiments.run_plan(context, value["plan_number"])
        found, sizes, powers, stages = [], [], [], []
        for n, plan in plans.in_force(context.workspace, context.events()).items():
            verdicts = analysis.verdicts(context.workspace, plan)
            found += [v.found for v in verdicts.values()]
            runs += (
                sum(e.kind == "run_start" for e in context.events()) if n == 1 else 0
            )
            stages.append(plan["stage"])
            if plan["stage"] == "confirmatory":
                sizes.append(len(plan["seeds"]))
                powers.append(plan["power"])
    return {
        "found": found,
        "runs": runs,
        "size": sizes[0],
        "power": powers[0],
        "stages": stages,
    }


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, p = 1.96, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return round(middle - half, 4), round(middle + half, 4)


def campaign(kind: str, studies: int) -> dict[str, Any]:
    """Makes many studies of a kind."""
    told = []
    with (
        mock.patch.object(experiments, "executor", lambda options: Inline()),
        mock.patch.object(plans, "described", described),
        mock.patch.object(plans, "code_fingerprint", lambda trainer: "fixed"),
        mock.patch.object(experiments, "POLL", 0.0),
    ):
        for number in range(studies):
            with tempfile.TemporaryDirectory() as name:
                told.append(one(kind, number, Path(name)))
    claims = sum(any(f in ("higher", "lower") for f in t["found"]) for t in told)
    every = [f for t in told for f in t["found"]]
    return {
        "studies": studies,
        "with a claim of difference": claims,
        "share": claims / studies,
        "interval": wilson(claims, studies),
        "found": {f: every.count(f) for f in sorted(set(every))},
        "seeds, median": float(np.median([t["size"] for t in told])),
        "power stated, mean": float(np.mean([t["power"] for t in told])),
        "runs, median": float(np.median([t["runs"] for t in told])),
        "with a follow-up": sum("follow-up" in t["stages"] for t in told),
    }


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["null", "sweep", "planted"])
    given = parser.parse_args()
    start = time.perf_counter()
    result = {kind: campaign(kind, given.studies) for kind in given.kinds}
    about = {"alpha": 0.05, "noise": NOISE, "effect": EFFECT, "fields": len(FIELDS)}
    about |= {"python": platform.python_version(), "numpy": np.__version__}
    about["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(about | result, indent=1))


if __name__ == "__main__":
    main()
