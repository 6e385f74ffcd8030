"""Studies from outside: run, resume, say, replay, status.

from jaxlab import research
ending = research.run("Does A beat B?", "studies/a")
"""

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlab.errors import ConfigError, UserError
from jaxlab.research import human, notes
from jaxlab.research.driver import Driver, Ending, Gates, Settings
from jaxlab.research.journal import locked, open_journal, read_journal
from jaxlab.research.model import ModelOptions, check_options, opened, secrets_of
from jaxlab.research.parts import Parts, load_parts
from jaxlab.research.policy import make_policy
from jaxlab.research.state import fold
from jaxlab.research.types import Budget, plain
from jaxlab.research.workspace import Workspace, open_workspace

Say = Callable[[str], Any]


def run(
    question: str,
    workspace: str | Path,
    *,
    model: ModelOptions = ModelOptions(),  # noqa: B008
    settings: Settings = Settings(),  # noqa: B008
    options: Mapping[str, Any] | None = None,
    past: tuple[str, ...] = (),
    parts: Parts | None = None,
    gates: Gates | None = None,
    say: Say = print,
    fsync: Callable[[int], None] = os.fsync,
) -> Ending:
    """Starts a study in a new workspace and drives it to an end.

    Args:
        question: what is asked, or a task for the manager.
        workspace: folder, made here.
        model: where turns come from.
        settings: budget and autonomy.
        options: what tools read, such as compare, sweep, metric, parallel.
        past: workspaces of earlier studies, whose notes and runs carry over.
        parts: agents, tools and rules; None: those that are installed.
        gates: verdicts that the manager's `finish` needs; None: those of
            `jaxlab.research.gates`.
        say: takes lines for the user.
        fsync: makes the journal durable (tests crash there).

    Raises:
        UserError: the workspace holds a study, or an option is wrong.
    """
    if Path(workspace, "journal.jsonl").exists():
        raise UserError(
            f"{workspace} holds a study already; go on with it by `research.py resume "
            f"{workspace}`, or choose another --workspace"
        )
    if not question.strip():
        raise ConfigError("the question is empty")
    _check(model, settings.budget)
    every = {
        **(options or {}),
        "model": model.model,
        "ask": plain(model),
        "settings": plain(settings),
        "past": [notes.summary_of(folder) for folder in past],
    }
    ws = open_workspace(workspace, make=True, secrets=_secrets(model))
    every["taken_over"] = notes.adopt(ws, every["past"])
    return _drive(ws, question, every, model, settings, parts, gates, say, fsync)


def resume(
    workspace: str | Path,
    *,
    model: ModelOptions | None = None,
    settings: Settings | None = None,
    parts: Parts | None = None,
    gates: Gates | None = None,
    say: Say = print,
    fsync: Callable[[int], None] = os.fsync,
) -> Ending:
    """Goes on with a study from its journal; finished experiments are not repeated.

    `model` and `settings` take the place of what the study was started with, such as a
    larger budget; the rest is as in `run`.

    Raises:
        UserError: no study is there, its journal was edited, or another process
            drives it.
    """
    ws = open_workspace(workspace)
    options = fold(read_journal(ws.root / "journal.jsonl")).options
    ask = model or made(ModelOptions, options["ask"])
    keep = settings or made(Settings, options["settings"])
    _check(ask, keep.budget)
    ws = dataclasses.replace(ws, secrets=_secrets(ask))
    return _drive(ws, "", options, ask, keep, parts, gates, say, fsync)


def replay(
    recorded: str | Path,
    into: str | Path,
    *,
    order: bool = False,
    parts: Parts | None = None,
    gates: Gates | None = None,
    say: Say = print,
) -> Ending:
    """Makes a study again from the turns in another's journal; runs run anew.

    Raises:
        UserError: as `run`.
        ReplayMiss: strict, and something was asked that the journal has no answer to.
    """
    study = fold(read_journal(Path(recorded) / "journal.jsonl"))
    ask = made(ModelOptions, study.options["ask"])
    ask = dataclasses.replace(
        ask, model=f"replay:{recorded}", replay="order" if order else "strict"
    )
    kept = {
        k: v
        for k, v in study.options.items()
        if k not in ("ask", "settings", "past", "taken_over", "model")
    }
    settings = made(Settings, study.options["settings"])
    past = tuple(p["study"] for p in study.options["past"])
    return run(
        study.question,
        into,
        model=ask,
        settings=settings,
        options=kept,
        past=past,
        parts=parts,
        gates=gates,
        say=say,
    )


def say(
    workspace: str | Path,
    text: str,
    *,
    command: human.Command = "say",
    target: str = "",
) -> str:
    """Sends a message to a study, whether it is being driven or not; returns its id."""
    return human.send(open_workspace(workspace), command, text, target)


def status(workspace: str | Path, lines: int = 12) -> dict[str, Any]:
    """What a study is at, from its journal, whoever drives it."""
    ws = open_workspace(workspace)
    events = read_journal(ws.root / "journal.jsonl")
    study = fold(events)
    driven = locked(ws.root / "journal.jsonl")
    active = study.active()
    usage = study.usage
    counts: dict[str, int] = {}
    for state in study.runs.values():
        counts[state] = counts.get(state, 0) + 1
    finished = study.finished
    state = "running" if driven else "ended" if finished else "dead"
    return {
        "question": study.question,
        "state": state,
        "ending": finished,
        "active": active and {"agent": active.agent, "task": active.task},
        "events": len(events),
        "age": time.time() - events[-1].t if events else None,
        "runs": counts,
        "plan": study.plan,
        "findings": {g: f for g, f in study.findings.items() if f},
        "waits_for": [t for t in study.asked if t not in study.verdicts],
        "messages": {
            "taken": len(study.messages),
            "waiting": len(human.waiting(ws)),
        },
        "usage": {
            "tokens_in": usage.tokens_in,
            "tokens_out": usage.tokens_out,
            "usd": usage.usd,
            "requests": usage.requests,
            "delegations": usage.delegations,
            "wall": study.wall(time.time()) if driven else usage.wall,
            "disk": ws.size(),
        },
        "last": [line for e in events[-8 * lines :] if (line := told(e))][-lines:],
    }


def told(event: Any) -> str | None:
    """An event in a line; None: it is of no interest to people."""
    data = event.data
    match event.kind:
        case "agent_start":
            return f"{data['agent']} begins: {data['task'][:100]}"
        case "agent_end":
            return f"{event.agent} {data['status']}: {data['summary'][:100]}"
        case "tool_end":
            return f"{event.agent}: {data['tool']} {data['status']}"
        case "human":
            text = " ".join((data["command"], data["target"], data["text"])).strip()
            return f"{data.get('sender') or 'a person'}: {text}"
        case "ack":
            return data["decision"]
        case "run_start":
            return f"run {data['run']} starts"
        case "run_end":
            return f"run {data['run']} {data['status']}"
        case "gate":
            return f"gate {data['gate']} {'passed' if data['ok'] else 'failed'}"
        case "model_error":
            return f"the model failed: {data['text'][:100]}"
        case "approval_request":
            return f"waits for approval of {data['target']}: {data['what']}"
        case "finish":
            return f"ended ({data['status']}): {data['why'][:200]}"
    return None


def made(cls: type, row: Mapping[str, Any]) -> Any:
    """A dataclass from its JSON; fields that this version does not know are dropped."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {k: v for k, v in row.items() if k in fields}
    if cls is Settings and "budget" in values:
        values["budget"] = made(Budget, values["budget"])
    if values.get("price") is not None:
        values["price"] = tuple(values["price"])
    return cls(**values)


def _drive(
    ws: Workspace,
    question: str,
    options: dict[str, Any],
    model: ModelOptions,
    settings: Settings,
    parts: Parts | None,
    gates: Gates | None,
    say: Say,
    fsync: Callable[[int], None],
) -> Ending:
    parts = parts or load_parts()
    if options.get("allow_code"):
        _allow_code(parts)
    judge = gates or importlib.import_module("jaxlab.research.gates").run_gates
    journal_path = ws.root / "journal.jsonl"
    with open_journal(journal_path, clean=ws.clean, fsync=fsync) as journal:
        policy = make_policy(parts.rules)
        with opened(model, policy, journal.events) as backend:
            driver = Driver(
                ws, journal, parts.agents, parts.tools, backend, judge, settings, say
            )
            return driver.drive(question, options)


def _allow_code(parts: Parts) -> None:
    """Gives the experiment agent a tool for generated code, if it can be confined.

    Raises:
        UserError: it cannot; there is no weaker mode.
    """
    from jaxlab.research import sandbox

    if why := sandbox.check():
        raise UserError(f"--allow-code is refused here: {why}")
    parts.tool(sandbox.run_code)
    spec = parts.agents["experiment"]
    parts.agent(dataclasses.replace(spec, tools=(*spec.tools, "run_code")))


def _secrets(model: ModelOptions) -> tuple[str, ...]:
    key = os.environ.get(model.key_env, "")
    return tuple({*secrets_of(os.environ), *([key] if len(key) >= 8 else [])})


def _check(model: ModelOptions, budget: Budget) -> None:
    """Refuses what cannot work; a budget of money needs a price."""
    check_options(model)
    free = model.model == "rule" or model.model.startswith("replay:")
    if budget.usd is None or model.price is not None or free:
        return
    if model.base_url is not None:
        raise ConfigError(
            "--budget usd=... needs --price IN OUT (USD for a million tokens) with a "
            "server of your own"
        )
