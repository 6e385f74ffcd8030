"""Figures, drawn from the files of runs; the data stand beside each as CSV.

A figure is named by its kind and its plan, and is a pure function of them: whoever
checks a paper makes the table again and draws it again.
"""

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlab.errors import UserError
from jaxlab.research import analysis, facts, plans
from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import ToolError
from jaxlab.research.workspace import Workspace

Table = tuple[list[str], list[list[Any]]]
NAME = re.compile(r"(curves|arms|effects)-p(\d+)")


def table(workspace: Workspace, figure: str) -> Table:
    """Header and rows of a figure's data.

    Args:
        workspace: holds the plan and its runs.
        figure: curves-p1 (the metric by step: mean and range over the seeds), arms-p1
            (the final metric of every run) or effects-p1 (differences, intervals).

    Raises:
        ToolError: no such figure, or no data for it.
    """
    match = NAME.fullmatch(figure)
    if match is None:
        raise ToolError(f"no figure {figure!r}: curves-pN, arms-pN or effects-pN")
    n = int(match[2])
    plan = plans.read_plan(workspace, n)
    made = {"curves": _curves, "arms": _arms, "effects": _effects}[match[1]]
    header, rows = made(workspace, plan, n)
    if not rows:
        raise ToolError(f"figure {figure} has no data yet")
    return header, rows


def _curves(workspace: Workspace, plan: dict[str, Any], _: int) -> Table:
    rows: list[list[Any]] = []
    for arm, runs in plan["runs"].items():
        by_step: dict[int, list[float]] = {}
        for run in runs:
            if analysis.outcome(workspace, run) is None:
                continue
            for row in analysis.rows(workspace, run):
                value = row.get(plan["metric"])
                if value is not None and math.isfinite(value):
                    by_step.setdefault(row["step"], []).append(value)
        for step, values in sorted(by_step.items()):
            ends = min(values), max(values)
            rows.append([arm, step, len(values), float(np.mean(values)), *ends])
    return ["arm", "step", "runs", "mean", "lowest", "highest"], rows


def _arms(workspace: Workspace, plan: dict[str, Any], _: int) -> Table:
    rows: list[list[Any]] = []
    for arm, values in analysis.values(workspace, plan).items():
        for seed, value in zip(plan["seeds"], values, strict=True):
            if math.isfinite(value):
                rows.append([arm, seed, float(value)])
    return ["arm", "seed", plan["metric"]], rows


def _effects(workspace: Workspace, plan: dict[str, Any], n: int) -> Table:
    rows: list[list[Any]] = []
    for name, verdict in analysis.verdicts(workspace, plan).items():
        if math.isfinite(verdict.low) and math.isfinite(verdict.mean):
            fact = facts.fact_id(n, "verdict", comparison=name, part="mean")
            ends = verdict.low, verdict.high
            rows.append([name, fact, verdict.mean, *ends, verdict.p_adjusted])
    return ["comparison", "fact", "mean", "low", "high", "p_adjusted"], rows


def to_csv(data: Table) -> str:
    """A table as CSV; numbers in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(data[0])
    writer.writerows(data[1])
    return out.getvalue()


def draw(figure: str, data: Table, metric: str, form: str) -> bytes:
    """Draws a figure; the same bytes each time with the same matplotlib.

    Args:
        figure: its name, which says its kind.
        data: as `table` gives it.
        metric: label of the axis.
        form: svg or pdf.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            'figures need the extra: pip install "jaxlab[research]"'
        ) from None
    style: Any = {"svg.hashsalt": "jaxlab", "svg.fonttype": "path", "font.size": 9}
    kind, rows = figure.partition("-")[0], data[1]
    with matplotlib.rc_context(style):
        names = list(dict.fromkeys(row[0] for row in rows))
        height = 2.9 if kind == "curves" else 1.0 + 0.35 * len(names)
        page = Figure(figsize=(5.2, height), layout="constrained")
        axes: Any = page.subplots()
        if kind == "curves":
            _draw_curves(axes, rows, names)
            axes.set(xlabel="step", ylabel=metric)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(frameon=False, loc="upper right")
        elif kind == "arms":
            for i, name in enumerate(names):
                values = [row[2] for row in rows if row[0] == name]
                axes.plot(values, [i] * len(values), "o", alpha=0.5, color=f"C{i}")
                axes.plot([np.mean(values)], [i], "|", ms=18, color=f"C{i}")
            axes.set_yticks(range(len(names)), names)
            axes.set(xlabel=metric, ylim=(-0.6, len(names) - 0.4))
        else:
            means = [row[2] for row in rows]
            spans = [[r[2] - r[3] for r in rows], [r[4] - r[2] for r in rows]]
            axes.errorbar(means, range(len(rows)), xerr=spans, fmt="o", capsize=3)
            axes.axvline(0, color="0.6", lw=0.8)
            axes.set_yticks(range(len(names)), names)
            axes.set(xlabel=f"difference of {metric}", ylim=(-0.6, len(names) - 0.4))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        out = io.BytesIO()
        stamp = {"Date": None} if form == "svg" else {"CreationDate": None}
        page.savefig(out, format=form, metadata=stamp)
    return out.getvalue()


def _draw_curves(axes: Any, rows: Sequence[Any], names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        mine = [row for row in rows if row[0] == name]
        steps = [row[1] for row in mine]
        low, high = [row[4] for row in mine], [row[5] for row in mine]
        axes.fill_between(steps, low, high, alpha=0.2, lw=0, color=f"C{i}")
        axes.plot(steps, [row[3] for row in mine], color=f"C{i}", label=name)


def recheck(workspace: Workspace, figure: str) -> list[str]:
    """What is wrong with a figure's files, compared with its runs; a line each."""
    import matplotlib

    findings = []
    try:
        data = table(workspace, figure)
        about = workspace.read_json(f"figures/{figure}.json")
        if to_csv(data) != workspace.read_bytes(f"figures/{figure}.csv").decode():
            findings.append(f"figure {figure}: its CSV is not what its runs give")
        if about != _about(data, figure, about.get("metric"), about.get("matplotlib")):
            findings.append(f"figure {figure}: its description was changed")
        if about.get("matplotlib") == matplotlib.__version__:
            for form in ("svg", "pdf"):
                drawn = draw(figure, data, about["metric"], form)
                if workspace.read_bytes(f"figures/{figure}.{form}") != drawn:
                    findings.append(
                        f"figure {figure}.{form}: drawn from its data it differs"
                    )
    except (ToolError, KeyError, AttributeError, UnicodeDecodeError) as error:
        findings.append(f"figure {figure}: {error}")
    return findings


def _about(data: Table, figure: str, metric: Any, version: Any) -> dict[str, Any]:
    about = {"figure": figure, "columns": data[0], "rows": len(data[1])}
    return about | {"metric": metric, "matplotlib": version}


@tool("idempotent")
def make_figures(
    context: Context, plan: int | None = None, figures: list[str] | None = None
) -> Result:
    """Draws figures: curves, arms and effects of a plan or of all, or those named."""
    import matplotlib

    workspace = context.workspace
    known = plans.in_force(workspace, context.events())
    numbers = (
        [n for n, p in known.items() if p["comparisons"]] if plan is None else [plan]
    )
    usual = [f"{kind}-p{n}" for n in numbers for kind in ("curves", "arms", "effects")]
    made, refs = [], []
    for name in figures or usual:
        try:
            data = table(workspace, name)
        except ToolError:
            if figures:
                raise
            continue
        metric = plans.read_plan(workspace, int(name.rpartition("-p")[2]))["metric"]
        about = _about(data, name, metric, matplotlib.__version__)
        refs.append(workspace.write_text(f"figures/{name}.csv", to_csv(data)))
        for form in ("svg", "pdf"):
            drawn = draw(name, data, metric, form)
            refs.append(workspace.write_bytes(f"figures/{name}.{form}", drawn))
        refs.append(workspace.write_json(f"figures/{name}.json", about))
        made.append(name)
    return Result({"figures": made}, tuple(refs))


TOOLS = (make_figures,)
