"""Runs of a plan: processes that outlive the driver, within the machine's limits.

The looks of a plan are taken here and not by an agent, which sees no result before its
look is complete. A run that is in the workspace is never made again; one whose driver
died is found again by its process (pid and start time) or by its `result.json`.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxlab.research import analysis, cluster, plans, process, stats, worker
from jaxlab.research.journal import digest
from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import Stopped, ToolError
from jaxlab.research.workspace import Workspace

POLL = 0.05  # seconds between looks at the processes


@runtime_checkable
class Executor(Protocol):
    """Where runs happen: on this machine, or on a cluster with the same files."""

    def start(self, folder: Path) -> None:
        """Starts the worker of a run folder that has its `spec.json`."""
        ...

    def running(self, folder: Path) -> bool:
        """Whether it has a worker, started by this driver or by an earlier one."""
        ...

    def end(self, folder: Path) -> None:
        """Ends the worker and all that it started."""
        ...


class Local:
    """Workers on this machine, each in a session of its own."""

    def __init__(self) -> None:
        self._started: dict[Path, process.Process] = {}

    def start(self, folder: Path) -> None:
        """See `Executor`."""
        command = [sys.executable, "-I", "-S", worker.__file__, str(folder)]
        self._started[folder] = process.launch(
            command, folder / "worker.log", folder, plans.environment()
        )

    def running(self, folder: Path) -> bool:
        """See `Executor`."""
        return any(process.alive(p) for p in self._processes(folder))

    def end(self, folder: Path) -> None:
        """See `Executor`."""
        for p in self._processes(folder):
            if process.alive(p):
                process.end_group(p)

    def _processes(self, folder: Path) -> list[process.Process]:
        found = [self._started[folder]] if folder in self._started else []
        path = folder / "process.json"  # the worker's own, which a new driver has alone
        if path.exists():
            found.append(process.Process(**json.loads(path.read_text())))
        return found


def executor(options: dict[str, Any]) -> Executor:
    """The executor that the options ask for: "local" (default) or "ray"."""
    if options.get("executor", "local") == "ray":
        return cluster.Ray(options)
    return Local()


def parallel(options: dict[str, Any]) -> int:
    """Runs at a time: as the person said, else one for every two cores."""
    return int(options.get("parallel") or max(1, (os.cpu_count() or 1) // 2))


@tool("idempotent")
def run_plan(context: Context, plan: int) -> Result:
    """Makes the runs of a plan, look by look, and gives the verdicts of its looks.

    Returns early where a person's message waits; call it again to go on.
    """
    body = plans.read_plan(context.workspace, plan)
    done = True
    for k, n in enumerate(body["looks"]):
        wanted = [(i, arm, run) for i, arm, run in plans.specs(body) if i < n]
        done = run_all(context, plan, body, wanted)
        if not done:
            break
        verdicts = analysis.verdicts(context.workspace, body)
        _record_look(context, plan, k, verdicts)
        if stats.settled(verdicts.values()):
            break
    value = {"plan": plan} | analysis.brief(context.workspace, body)
    if not done:
        value["waiting"] = "a message from a person waits; then call run_plan again"
    ended = [
        r for _, _, r in plans.specs(body) if analysis.outcome(context.workspace, r)
    ]
    refs = [context.workspace.run_ref(r) for r in dict.fromkeys(ended)]
    return Result(value, tuple(refs))


def run_all(
    context: Context,
    number: int,
    plan: dict[str, Any],
    wanted: Sequence[tuple[int, str, str]],
) -> bool:
    """Makes the runs that are wanted and not there yet.

    Args:
        context: the tool's.
        number: of the plan.
        plan: as `plans.read_plan` gives it.
        wanted: (number of the seed, arm, run id) of each.

    Returns:
        False where a message waits and runs go on meanwhile.
    """
    where, most = executor(context.options), parallel(context.options)
    left = list({run: (i, arm, run) for i, arm, run in wanted}.values())
    active: list[tuple[int, str, str]] = []
    try:
        while True:
            for item in list(left):
                folder = context.workspace.root / "runs" / item[2]
                if _ended(context, item):
                    left.remove(item)
                elif where.running(folder):
                    active.append(item)
                    left.remove(item)
                elif len(active) < most:
                    _start(context, where, number, plan, item)
                    active.append(item)
                    left.remove(item)
            for item in list(active):
                folder = context.workspace.root / "runs" / item[2]
                if _ended(context, item):
                    active.remove(item)
                elif not where.running(folder) and not _ended(context, item):
                    active.remove(item)  # its worker died: start it again
                    _lost(context, item)
                    left.append(item)
            if not left and not active:
                return True
            if context.poll():
                return False
            time.sleep(POLL)
    except Stopped:
        for _, _, run in active:
            _cancel(context, where, run)
        raise


def _start(
    context: Context,
    where: Executor,
    number: int,
    plan: dict[str, Any],
    item: tuple[int, str, str],
) -> None:
    i, arm, run = item
    what, workspace = plan["resolved"][arm], context.workspace
    config = what["config"] | {"seed": plan["seeds"][i]}
    folder = workspace.root / "runs" / run
    spec = {
        "run_id": run,
        "spec_hash": digest({"config": config, "data": what["data"]}),
        "code_hash": plan["code_hash"],
        "config": config,
        "data": what["data"],
        "command": [sys.executable, plan["trainer"], str(folder / "run.json")],
        "cwd": str(plans.CHECKOUT),
        "limits": plans.LIMITS | plan["limits"],
        "keep_checkpoints": bool(context.options.get("keep_checkpoints")),
        "env": {"host": platform.node(), "python": platform.python_version()},
    }
    if plans.code_fingerprint(Path(plan["trainer"])) != plan["code_hash"]:
        raise ToolError(
            "the code, a library or JAX_PLATFORMS has changed since plan "
            f"{number} was registered, so its runs would not be those that were "
            "planned; amend the plan, and all of them are made anew"
        )
    for name in ("result.json", "process.json"):  # of a cancelled attempt
        if workspace.exists(f"runs/{run}/{name}"):
            (folder / name).rename(folder / f"{name}.{time.time_ns()}")
    workspace.write_json(f"runs/{run}/run.json", config)
    workspace.write_json(f"runs/{run}/spec.json", spec)
    context.start_run(run, plan=number, arm=arm, seed=plan["seeds"][i])
    where.start(folder)


def _ended(context: Context, item: tuple[int, str, str]) -> bool:
    """Whether a run has its final result, which is then in the journal as well."""
    result = analysis.outcome(context.workspace, item[2])
    if result is None or result["status"] not in analysis.FINAL:
        return False
    _record_end(context, item[2], result)
    return True


def _record_end(context: Context, run: str, result: dict[str, Any]) -> None:
    ref = context.workspace.run_ref(run)
    for event in reversed(context.events()):
        same = event.data.get("run") == run and event.kind == "run_end"
        if same and event.data.get("sha256") == ref.sha256:
            return
    context.record(
        "run_end",
        run=run,
        status=result["status"],
        reason=result["reason"],
        seconds=result["seconds"],
        sha256=ref.sha256,
        metrics_sha256=result["metrics_sha256"],
    )


def _lost(context: Context, item: tuple[int, str, str]) -> None:
    """A worker that ended without a word: three times is a failure of the run."""
    run = item[2]
    starts = [
        e
        for e in context.events()
        if e.kind == "run_start" and e.data.get("run") == run
    ]
    if len(starts) >= 3:
        _write_result(context.workspace, run, "failed", "its worker died three times")


def _cancel(context: Context, where: Executor, run: str) -> None:
    where.end(context.workspace.root / "runs" / run)
    if analysis.outcome(context.workspace, run) is None:
        _write_result(context.workspace, run, "cancelled", "ended by the driver")
    result = analysis.outcome(context.workspace, run)
    assert result is not None
    _record_end(context, run, result)


def _write_result(workspace: Workspace, run: str, status: str, reason: str) -> None:
    folder = workspace.root / "runs" / run
    spec = workspace.read_json(f"runs/{run}/spec.json")
    now = time.time()
    worker.write(folder, spec, now, status, reason, -1, 0, 0.0)


def _record_look(
    context: Context, plan: int, k: int, verdicts: dict[str, stats.Verdict]
) -> None:
    for event in context.events():
        if event.kind == "look" and (event.data["plan"], event.data["look"]) == (
            plan,
            k,
        ):
            return
    found = {name: v.found for name, v in verdicts.items()}
    context.record("look", plan=plan, look=k, found=found)


@tool("pure")
def run_status(context: Context, plan: int | None = None) -> dict[str, Any]:
    """How the plans stand: runs by status, looks taken, verdicts, live metrics."""
    numbers = [e.data["n"] for e in context.events() if e.kind in ("plan", "amendment")]
    if plan is not None:
        numbers = [n for n in numbers if n == plan]
    where, found = executor(context.options), {}
    for n in numbers:
        body = plans.read_plan(context.workspace, n)
        live = {}
        for i, arm, run in plans.specs(body):
            folder = context.workspace.root / "runs" / run
            if analysis.outcome(context.workspace, run) is None and where.running(
                folder
            ):
                rows = analysis.rows(context.workspace, run)
                live[run] = {"arm": arm, "seed": body["seeds"][i]} | (rows or [{}])[-1]
        found[str(n)] = analysis.summary(context.workspace, body) | {"running": live}
    return {"plans": found}


@tool("pure")
def run_log(context: Context, run: str, lines: int = 40) -> str:
    """The end of a run's output."""
    path = f"runs/{run}/stdout.log"
    return "\n".join(context.workspace.read_text(path).splitlines()[-lines:])


@tool("idempotent")
def cancel_runs(context: Context, runs: list[str]) -> dict[str, Any]:
    """Ends running runs; they stay in the plan, as cancelled."""
    where, ended = executor(context.options), []
    for run in runs:
        folder = context.workspace.resolve(f"runs/{run}")
        if where.running(folder):
            _cancel(context, where, run)
            ended.append(run)
    return {"cancelled": ended}


TOOLS = (run_plan, run_status, run_log, cancel_runs)
