r"""A research group of agents that answers a question with this framework's runs.

python scripts/research.py run "Does A beat B?" --workspace studies/a \\
    --compare configs/a.py configs/b.py --metric eval/loss --budget runs=12,wall=30m
python scripts/research.py resume studies/a          # after a crash, a stop, a limit
python scripts/research.py say studies/a "also try lr=3e-4"
python scripts/research.py interrupt|pause|resume|stop studies/a ["why"]
python scripts/research.py approve|deny studies/a TARGET
python scripts/research.py status|cost|log studies/a
python scripts/research.py verify studies/a          # recomputes everything
python scripts/research.py replay studies/a --into studies/a2
python scripts/research.py serve studies/a           # web page
python scripts/research.py agents                    # who there is

Exit codes of run, resume and replay: 0 the gates passed, 3 stopped by a limit or a
person, 4 the gates failed, 5 a person is needed; of verify: 0 or 4. Otherwise 1 and 2
as everywhere.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import ConfigError

PROG = "scripts/research.py"
Workspace = Annotated[str, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class Driving:
    """What run and resume share; of resume, what is not given stays as it was."""

    model: str | None = None
    """rule (the default), replay:WORKSPACE, or PROVIDER:NAME such as openai:qwen3"""
    base_url: str | None = None
    """OpenAI-compatible server, such as http://127.0.0.1:8000/v1"""
    key_env: str | None = None
    """environment variable with the server's key; default OPENAI_API_KEY"""
    allow_remote: bool | None = None
    """let the study's texts leave this machine"""
    window: int | None = None
    """tokens that the model takes in"""
    timeout: float | None = None
    """seconds for a request"""
    price: tuple[float, float] | None = None
    """USD for a million tokens in and out"""
    budget: str | None = None
    """such as runs=12,wall=30m,tokens=500k,usd=2,disk=4g,turns=400,delegations=12"""
    autonomy: str | None = None
    """full (the default), approve-plan, approve-each"""
    patience: float | None = None
    """seconds to wait for an approval"""


@dataclasses.dataclass(frozen=True)
class Run(Driving):
    """A new study."""

    question: Annotated[str, tyro.conf.Positional] = ""
    """what is asked; may be left out with --compare or --sweep"""
    workspace: str = "studies/study"
    """folder of the study, made by this"""
    past: tuple[str, ...] = ()
    """workspaces of earlier studies to build on"""
    compare: tuple[str, ...] = ()
    """configs to compare"""
    sweep: tuple[str, ...] = ()
    """field=value,value,... to vary, of the first config of --compare"""
    metric: str | None = None
    """tag that is judged, such as eval/loss"""
    option: tuple[str, ...] = ()
    """further name=value (JSON) for tools, such as parallel=2 or seeds=6"""
    allow_code: bool = False
    """let the experiment agent run Python in a sandbox; refused where there is none"""
    serve: bool = False
    """show the web page meanwhile"""


@dataclasses.dataclass(frozen=True)
class Resume(Driving):
    """A study that was begun."""

    workspace: Workspace = ""


@dataclasses.dataclass(frozen=True)
class Replay:
    """A study made again from another's turns."""

    workspace: Workspace
    into: str
    """folder of the new study"""
    order: bool = False
    """take the turns in their order, whatever is asked"""


@dataclasses.dataclass(frozen=True)
class Serve:
    """The web page of a study."""

    workspace: Workspace
    port: int = 0
    """0: one that is free"""


@dataclasses.dataclass(frozen=True)
class Log:
    """The last events."""

    workspace: Workspace
    lines: int = 40
    follow: bool = False
    """go on as they come"""


def main(arguments: list[str]) -> None:
    """Does what the first word says."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(__doc__)
    elif command == "run":
        _run(parse_options(Run, rest, f"{PROG} run"))
    elif command in ("say", "interrupt", "pause", "stop", "approve", "deny"):
        _say(command, rest)
    elif command == "resume" and _is_driven(rest):
        _say(command, rest)
    elif command == "resume":
        _resume(parse_options(Resume, rest, f"{PROG} resume"))
    elif command == "replay":
        _replay(parse_options(Replay, rest, f"{PROG} replay"))
    elif command == "serve":
        _serve(parse_options(Serve, rest, f"{PROG} serve"))
    elif command == "log":
        _log(parse_options(Log, rest, f"{PROG} log"))
    elif command in ("status", "cost", "verify"):
        {"status": _status, "cost": _cost, "verify": _verify}[command](_one(rest))
    elif command == "agents":
        _agents()
    else:
        raise ConfigError(f"there is no command {command!r}; see {PROG} --help")


def _run(given: Run) -> None:
    from jaxlab.research import study

    options = _options(given)
    question = given.question or _question(options)
    model, settings = _driving(given, {}, {})
    if given.serve:
        _beside(given.workspace)
    ending = study.run(
        question,
        given.workspace,
        model=model,
        settings=settings,
        options=options,
        past=given.past,
        say=_print,
    )
    _end(ending, given.workspace)


def _resume(given: Resume) -> None:
    from jaxlab.research import study
    from jaxlab.research.journal import read_journal
    from jaxlab.research.state import fold

    if not given.workspace:
        raise ConfigError("resume takes a workspace, such as studies/h25")
    before = fold(read_journal(Path(given.workspace) / "journal.jsonl")).options
    model, settings = _driving(given, before["ask"], before["settings"])
    ending = study.resume(given.workspace, model=model, settings=settings, say=_print)
    _end(ending, given.workspace)


def _replay(given: Replay) -> None:
    from jaxlab.research import study

    ending = study.replay(given.workspace, given.into, order=given.order, say=_print)
    _end(ending, given.into)


def _driving(given: Driving, ask: dict[str, Any], kept: dict[str, Any]) -> tuple:
    """Model options and settings: what is given over what was kept."""
    from jaxlab.research.driver import Settings
    from jaxlab.research.limits import parse_budget
    from jaxlab.research.model import ModelOptions
    from jaxlab.research.study import made

    new = {k: v for k, v in vars(given).items() if v is not None}
    model = made(ModelOptions, {**ask, **new})
    settings = made(
        Settings, {**kept, **{k: v for k, v in new.items() if k != "budget"}}
    )
    if given.budget is not None:
        settings = dataclasses.replace(settings, budget=parse_budget(given.budget))
    if settings.autonomy not in ("full", "approve-plan", "approve-each"):
        raise ConfigError(
            f"--autonomy {settings.autonomy!r} is none of full, approve-plan, "
            "approve-each"
        )
    return model, settings


def _options(given: Run) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in ("compare", "sweep", "metric"):
        if value := getattr(given, name):
            options[name] = list(value) if isinstance(value, tuple) else value
    if given.allow_code:
        options["allow_code"] = True
    for item in given.option:
        name, found, value = item.partition("=")
        if not found:
            raise ConfigError(f"--option {item!r}: give name=value")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _question(options: dict[str, Any]) -> str:
    if "compare" not in options and "sweep" not in options:
        raise ConfigError(
            "give a question, or --compare CONFIG CONFIG, or --sweep FIELD=VALUE,VALUE"
        )
    words = [f"compare {' and '.join(options.get('compare', []))}".strip()]
    words += [f"sweep {s}" for s in options.get("sweep", [])]
    return "; ".join(words)


def _say(command: Any, rest: Sequence[str]) -> None:
    from jaxlab.research import study

    aimed = command in ("approve", "deny")
    if not rest or (aimed and len(rest) < 2) or (command == "say" and len(rest) < 2):
        needs = " TARGET" if aimed else " TEXT" if command == "say" else ""
        raise ConfigError(f"{command} takes a WORKSPACE{needs}")
    target = rest[1] if aimed else ""
    text = " ".join(rest[2 if aimed else 1 :])
    id = study.say(rest[0], text, command=command, target=target)
    driven = study.status(rest[0])["state"] == "running"
    print(f"sent {id}" + ("" if driven else "; it is read when the study is resumed"))


def _is_driven(rest: Sequence[str]) -> bool:
    from jaxlab.research.journal import locked

    return bool(rest) and locked(Path(rest[0]) / "journal.jsonl")


def _status(workspace: str) -> None:
    from jaxlab.research import study

    told = study.status(workspace)
    active, usage = told["active"], told["usage"]
    print(told["question"])
    line = f"{told['state']}, {told['events']} events, last {told['age']:.0f} s ago"
    if told["state"] == "running" and active:
        line += f"; at work: {active['agent']} ({active['task'][:80]})"
    print(line)
    if told["ending"] and told["state"] != "running":
        ending = told["ending"]
        print(f"ended with {ending['code']} ({ending['status']}): {ending['why']}")
    runs = ", ".join(f"{n} {state}" for state, n in told["runs"].items())
    print(f"runs: {runs or 'none'}")
    for gate, findings in told["findings"].items():
        print(f"gate {gate}: {'; '.join(findings[:3])}")
    for target in told["waits_for"]:
        print(f"waits for: {PROG} approve {workspace} {target}")
    if told["messages"]["waiting"]:
        print(f"messages not read yet: {told['messages']['waiting']}")
    print(_usage(usage))
    print("\n".join(told["last"]))


def _cost(workspace: str) -> None:
    from jaxlab.research import study

    print(json.dumps(study.status(workspace)["usage"], indent=1))


def _usage(usage: dict[str, Any]) -> str:
    return (
        f"spent: {usage['tokens_in'] + usage['tokens_out']} tokens, "
        f"{usage['usd']:.4f} USD, {usage['wall']:.0f} s, {usage['requests']} requests, "
        f"{usage['disk'] / 1e6:.1f} MB"
    )


def _verify(workspace: str) -> None:
    from jaxlab.research.verify import verify

    report = verify(workspace)
    if not report.ok:
        print("\n".join(report.findings), file=sys.stderr)
        sys.exit(4)
    told = f"{report.facts} facts, {len(report.numbers)} numbers, {report.runs} runs"
    print(f"everything was computed again and agrees: {told}")


def _agents() -> None:
    from jaxlab.research.parts import load_parts

    parts = load_parts()
    for spec in parts.agents.values():
        print(f"{spec.name}: {spec.purpose}")
        print(f"    tools: {', '.join(spec.tools)}")
        if spec.name not in parts.rules:
            print("    (the rule policy has no rule for it)")


def _log(given: Log) -> None:
    from jaxlab.research.journal import read_journal
    from jaxlab.research.study import told

    shown = 0
    while True:
        events = read_journal(Path(given.workspace) / "journal.jsonl")
        new = events[max(shown, 0) :]
        lines = [f"{e.i:>5} {line}" for e in new if (line := told(e))]
        print("\n".join(lines[-given.lines :] if not shown else lines), flush=True)
        shown = len(events)
        if not given.follow:
            return
        while len(read_journal(Path(given.workspace) / "journal.jsonl")) == shown:
            time.sleep(0.5)


def _serve(given: Serve) -> None:
    from jaxlab.research import page

    page.serve(given.workspace, given.port, print)


def _beside(workspace: str) -> None:
    """The web page in a process of its own, which ends with this one."""
    import atexit
    import subprocess

    Path(workspace).mkdir(parents=True, exist_ok=True)
    child = subprocess.Popen([sys.executable, __file__, "serve", workspace])
    atexit.register(child.terminate)


def _one(rest: Sequence[str]) -> str:
    if len(rest) != 1:
        raise ConfigError("give one workspace, such as studies/h25")
    return rest[0]


def _print(line: str) -> None:
    print(line, flush=True)


def _end(ending: Any, workspace: str) -> None:
    from jaxlab.research import study

    told = study.status(workspace)
    print(_usage(told["usage"]))
    paper = Path(workspace, "paper/paper.pdf")
    if ending.code == 0:
        print(f"done: {paper}" if paper.exists() else "done")
        return
    print(f"ended with {ending.code} ({ending.status}): {ending.why}", file=sys.stderr)
    sys.exit(ending.code)


if __name__ == "__main__":
    run_main(main)
