"""The loop: the driver decides what happens, a model only proposes.

Each turn: take in messages, check the limits, compact, ask, write down the answer,
then for each call of it: check it against the agent's tools, write that it starts, run
it, write how it ended. A study that was killed anywhere goes on from its journal.
"""

import dataclasses
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

from jaxlab.research import context, human, limits, model
from jaxlab.research.closing import partial_report, take_back
from jaxlab.research.journal import Event, Journal, JournalError, canonical
from jaxlab.research.process import Process, end_group
from jaxlab.research.state import Call, Session, Study, called, fold
from jaxlab.research.tool import Context, Result, Tool, tool
from jaxlab.research.types import (
    AgentSpec,
    Budget,
    BudgetSpent,
    GateResult,
    GatesFailed,
    Interrupted,
    NeedsHuman,
    Ref,
    RefKind,
    Stopped,
    StoppedByPerson,
    ToolError,
    plain,
)
from jaxlab.research.workspace import Workspace

Gates = Callable[[Workspace, Sequence[Event]], Sequence[GateResult]]
Refs = list[dict[str, Any]]

OWN_KINDS = frozenset(
    "study resume agent_start agent_end request reply model_error interrupted "
    "tool_start tool_end remark human ack approval_request compact run_start "
    "closing finish".split()
)
"""Events that only the driver writes."""
SUMMARY = 1_200
"""characters of a summary at most"""


@dataclasses.dataclass(frozen=True)
class Ending:
    """How driving ended."""

    code: int
    """0 gates passed, 3 stopped by a limit or a person, 4 gates failed, 5 needs a
    person"""
    status: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the driver keeps to."""

    budget: Budget = Budget()
    autonomy: Literal["full", "approve-plan", "approve-each"] = "full"
    patience: float = 60.0
    """seconds to wait for an approval before exit code 5"""
    backoff: float = 0.5
    """seconds before the second try of a request; doubled each time"""


@tool("once")
def finish(context: Context, summary: str, refs: Refs = []) -> None:  # noqa: B006
    """Ends your task: a summary (1200 characters at most) and references that matter.

    The manager's ends the study if its gates pass. Run by the driver.
    """


@tool("idempotent")
def delegate(context: Context, agent: str, task: str, refs: Refs = []) -> None:  # noqa: B006
    """Gives an agent a task; it sees that and the references, nothing of your history.

    References look like {"kind": "file", "id": "plans/1.json", "sha256": ...}. Run by
    the driver.
    """


class Driver:
    """Drives one study; `drive` is all that is called from outside."""

    def __init__(
        self,
        ws: Workspace,
        journal: Journal,
        agents: Mapping[str, AgentSpec],
        tools: Mapping[str, Tool],
        backend: model.Backend,
        gates: Gates,
        settings: Settings,
        say: Callable[[str], Any],
    ) -> None:
        self.ws, self.journal, self.backend = ws, journal, backend
        self.agents, self.settings = agents, settings
        self._gates, self._say = gates, say
        run = dataclasses.replace(delegate, fn=self._delegate)
        self.tools = {**tools, "finish": finish, "delegate": run}
        self.study: Study = fold(journal.events)
        self._desk = human.Desk(ws, self.study, self._append, say, self._check_limits)
        self._weighed, self._size = 0.0, 0

    def drive(
        self, question: str, options: dict[str, Any], manager: str = "manager"
    ) -> Ending:
        """Drives to the end, a limit, or a person's stop; resumes what was begun."""
        if self.journal.events:
            kept = {"since": len(self.journal.events), "settings": self.settings}
            self._append("driver", "resume", **kept)
            take_back(self.ws)
        else:
            first = {"schema": 1, "question": question, "options": options}
            self._append("driver", "study", **first)
        try:
            with self._desk.signals_noted():
                root = self.study.sessions.get("s0")
                if root is None:
                    root = self._begin(manager, self.study.question, (), None)
                self._converse(root)
            return self._end(0, "done", root.summary)
        except BudgetSpent as stop:
            self._end_jobs()
            report = partial_report(self.tools, self._context("driver", "closing"))
            self._append("driver", "closing", **report)
            return self._end(3, "budget", str(stop))
        except StoppedByPerson as stop:
            return self._end(3, "stopped", str(stop))
        except GatesFailed as stop:
            return self._end(4, "gates", str(stop))
        except NeedsHuman as stop:
            return self._end(5, "person", str(stop))

    # ---------------------------------------------------------------- turns

    def _converse(self, session: Session) -> None:
        """Turns of one agent until its session ends."""
        spec = self.agents[session.agent]
        while session.status is None:
            self._desk.take()
            for call in session.pending():
                self._call(session, spec, call)
                self._desk.take()
            if session.status is None:
                self._check_stuck(session, spec)
            if session.status is None:
                self._check_limits(weigh=True)
                self._turn(session, spec)

    def _turn(self, session: Session, spec: AgentSpec) -> None:
        """Asks the model once, with further tries, and writes down its answer."""
        offered = context.offered((*spec.tools, "finish"), self.tools)
        wait, share, failure = self.settings.backoff, 1.0, None
        for attempt in range(self.backend.options.attempts):
            sent = self._fitted(session, spec, offered, share)
            size = context.characters(sent, offered)
            self._check_tokens(size)
            key = model.request_key(sent, offered)
            now = {"session": session.id, "turn": session.turns}
            self._append(spec.name, "request", **now, key=key, characters=size)
            try:
                turn = self.backend.ask(sent, offered, key, self._desk.poll)
            except Interrupted:
                self._append(spec.name, "interrupted", **now)
                self._end_jobs()
                return
            except model.ModelFailure as error:
                failure = error
                text = str(error)
                told = {"attempt": attempt, "text": text}
                self._append(spec.name, "model_error", **now, **told)
                self._say(f"{spec.name}: the model failed: {text}")
                if error.too_long:
                    share /= 2
                elif not error.again:
                    break
                else:
                    self._desk.sleep(wait)
                    wait *= 2
            else:
                self._answered(session, spec, turn)
                return
        raise NeedsHuman(
            f"the model {self.backend.options.model} gives no answer ({failure}); "
            "resume when it does"
        )

    def _answered(self, session: Session, spec: AgentSpec, turn: model.Turn) -> None:
        """Writes a turn down, and which messages of people it answers."""
        parts, calls = [], 0
        for part in turn.message["parts"]:
            if part["part_kind"] == "tool-call":  # a server's ids may repeat
                id = f"{session.id}.{session.turns}.{calls}"
                part, calls = part | {"tool_call_id": id}, calls + 1
            parts.append(part)
        answered = list(session.unanswered)
        self._append(
            spec.name,
            "reply",
            session=session.id,
            turn=session.turns,
            message=turn.message | {"parts": parts},
            usage={"input": turn.tokens_in, "output": turn.tokens_out, "usd": turn.usd},
        )
        told = ", ".join(map(called, session.pending())) or "no tool"
        self._say(f"{spec.name}: {told}")
        for id in answered:
            decision = f"{spec.name} read it and decided: {told}"
            data = {"message": id, "session": session.id, "decision": decision}
            self._append(spec.name, "ack", **data)
            human.put_answer(self.ws, id, decision)

    # ---------------------------------------------------------------- calls

    def _call(self, session: Session, spec: AgentSpec, call: Call) -> None:
        """Runs one call, unless it is not allowed, and writes down how it ended."""
        begun = call.id in self.study.started
        end = partial(self._outcome, session, spec, call)
        try:
            declared, args = self._allowed(spec, call)
            if limits.repeats(session, call) >= limits.REPEATS:
                return end(
                    "refused",
                    f"you made this call {limits.REPEATS} times with the same result; "
                    "do something else, or finish",
                )
            if call.tool == "finish":
                return self._finish(session, spec, call, **args)
            if not self._approved(declared, call):
                return end("refused", "a person denied this")
            if begun and declared.kind == "once":
                return end("unknown", "the driver died during this call; check it")
            start = {"session": session.id, "call": call.id}
            self._append(
                spec.name, "tool_start", **start, tool=call.tool, args=call.args
            )
            made = declared.fn(self._context(spec.name, call.id), **args)
            result = made if isinstance(made, Result) else Result(made)
            for ref in result.refs:
                self.ws.check(ref)
            end("ok", result.value, result.refs)
        except ToolError as error:
            end("error", str(error))
        except Interrupted:
            self._end_jobs()
            end("interrupted", "a person interrupted this")
        except (Stopped, JournalError, NeedsHuman, model.ReplayMiss):
            raise
        except Exception as error:  # a defect of a tool ends the call, not the study
            trace = "".join(traceback.format_exception(error)[-3:])
            end("error", f"{type(error).__name__}: {error}\n{trace}"[:1500])

    def _allowed(self, spec: AgentSpec, call: Call) -> tuple[Tool, dict[str, Any]]:
        """The tool of a call and its arguments; ToolError where there is no such."""
        if call.args is None:
            raise ToolError(f"the arguments are no JSON object: {call.sent[:200]}")
        if call.tool != "finish" and call.tool not in spec.tools:
            yours = ", ".join((*spec.tools, "finish"))
            raise ToolError(f"you have no tool {call.tool!r}; yours are {yours}")
        if call.tool not in self.tools:
            raise ToolError(f"the tool {call.tool!r} is not installed")
        declared = self.tools[call.tool]
        return declared, declared.validate(call.args)

    def _approved(self, declared: Tool, call: Call) -> bool:
        """Whether a person allows a call, where the study's autonomy asks."""
        autonomy = self.settings.autonomy
        if autonomy == "approve-each" and declared.kind != "pure":
            target = call.id
        elif autonomy == "approve-plan" and declared.name == "run_plan":
            target = f"plan-{(self.study.plan or {}).get('sha256', 'none')[:12]}"
        else:
            return True
        return self._desk.verdict(target, called(call), self.settings.patience)

    def _outcome(
        self,
        session: Session,
        spec: AgentSpec,
        call: Call,
        status: str,
        value: Any,
        refs: Sequence[Ref] = (),
    ) -> None:
        """Writes down how a call ended; a long result goes into a blob."""
        text = canonical(value := plain(value))
        if len(text) > context.LONG:
            sha = self.ws.put_blob(text).sha256
            value = {"blob": sha, "head": text[: context.HEAD]}
        self._append(
            spec.name,
            "tool_end",
            session=session.id,
            call=call.id,
            tool=call.tool,
            status=status,
            result=value,
            refs=[ref.json() for ref in refs],
        )

    def _delegate(
        self,
        context: Context,
        agent: str,
        task: str,
        refs: Refs = [],  # noqa: B006
    ) -> Result:
        """The tool `delegate`: another agent's whole session."""
        if agent not in self.agents or agent == context.agent:
            names = ", ".join(sorted(set(self.agents) - {context.agent}))
            raise ToolError(f"there is no agent {agent!r}; there are {names}")
        sessions = self.study.sessions.values()
        child = next((s for s in sessions if s.call == context.call), None)
        if child is None:
            most = self.settings.budget.delegations
            if self.study.usage.delegations >= most:
                raise ToolError(f"all {most} delegations are used; finish with that")
            child = self._begin(agent, task, self._refs(refs), context.call)
        self._converse(child)
        value = {"agent": agent, "status": child.status, "summary": child.summary}
        return Result(value, child.result)

    def _finish(
        self, session: Session, spec: AgentSpec, call: Call, summary: str, refs: Refs
    ) -> None:
        """Ends a session; that of the manager only if the gates pass."""
        given = self._refs(refs)
        failed = self._failed_gates() if session.call is None else []
        if failed:
            findings = {r.gate: list(r.findings)[:10] for r in failed}
            return self._outcome(session, spec, call, "refused", findings)
        self._outcome(session, spec, call, "ok", None, given)
        self._close(session, "done", summary[:SUMMARY], given)

    def _failed_gates(self) -> list[GateResult]:
        """Runs the gates, writes down their verdicts."""
        results = list(self._gates(self.ws, self.journal.events))
        for r in results:
            self._append("driver", "gate", gate=r.gate, ok=r.ok, findings=r.findings)
        return [r for r in results if not r.ok]

    # ---------------------------------------------------------------- limits

    def _check_stuck(self, session: Session, spec: AgentSpec) -> None:
        """Ends a session that gets nowhere; the manager's ends the study."""
        why = limits.stuck(session, self.study.last_progress)
        used = session.turns >= spec.max_turns
        if why is None and not used:
            if limits.silent(session):
                text = "call a tool, or finish; text alone does nothing"
                self._append("driver", "remark", session=session.id, text=text)
        elif session.call is not None:
            self._close(session, "stuck", why or "all its turns are used", ())
        elif why is None:
            raise BudgetSpent(f"turns: all {spec.max_turns} of {spec.name} are used")
        else:
            failed = self._failed_gates()
            found = "; ".join(f"{r.gate}: {', '.join(r.findings[:3])}" for r in failed)
            raise GatesFailed(f"the manager is stuck ({why}); {found}")

    def _check_limits(self, weigh: bool = False) -> None:
        """Raises BudgetSpent where a limit of the study is reached."""
        budget, now = self.settings.budget, time.monotonic()
        if budget.disk is not None and (weigh or now - self._weighed > 2):
            self._weighed, self._size = now, self.ws.size()
        wall = self.study.wall(self.journal.now())
        usage = dataclasses.replace(self.study.usage, wall=wall)
        why = limits.spent(usage, self._size, budget)
        if why:
            raise BudgetSpent(why)

    def _check_tokens(self, size: int) -> None:
        """Likewise where this request would pass the cap on tokens."""
        usage, cap = self.study.usage, self.settings.budget.tokens
        ahead = usage.tokens_in + usage.tokens_out + int(size / self._window().ratio)
        if cap is not None and ahead > cap:
            raise BudgetSpent(f"tokens: with the next request {ahead} of {cap}")

    def _start_run(self, agent: str, run: str, /, **data: Any) -> Event:
        most, runs = self.settings.budget.runs, self.study.runs
        if run not in runs and most is not None and len(runs) >= most:
            raise BudgetSpent(f"runs: {most} of {most}")
        return self._append(agent, "run_start", run=run, **data)

    def _append(self, agent: str, kind: str, /, **data: Any) -> Event:
        event = self.journal.append(agent, kind, **plain(data))
        self.study.apply(event)
        return event

    def _record(self, agent: str, kind: str, /, **data: Any) -> Event:
        if kind in OWN_KINDS:
            raise ToolError(f"events of kind {kind!r} are the driver's")
        return self._append(agent, kind, **data)

    def _context(self, agent: str, call: str) -> Context:
        return Context(
            self.ws,
            agent,
            call,
            self.study.options,
            partial(self._record, agent),
            lambda: self.journal.events,
            partial(self._start_run, agent),
            self._desk.poll,
        )

    def _begin(self, agent: str, task: str, refs: Sequence[Ref], call: Any) -> Session:
        name = f"s{len(self.study.sessions)}"
        data = {"session": name, "agent": agent, "task": task, "call": call}
        self._append("driver", "agent_start", **data, refs=refs)
        return self.study.sessions[name]

    def _close(
        self, session: Session, status: str, summary: str, refs: Sequence[Ref]
    ) -> None:
        data = {"session": session.id, "status": status, "summary": summary}
        self._append(session.agent, "agent_end", **data, refs=refs)

    def _end(self, code: int, status: str, why: str) -> Ending:
        self._end_jobs()
        paper = self.ws.root / "paper/paper.pdf"
        if code == 4 and paper.is_file():  # what failed its gates is no paper
            paper.rename(paper.with_name("refused.pdf"))
        self._append("driver", "finish", code=code, status=status, why=why)
        return Ending(code, status, why)

    def _refs(self, given: Refs) -> tuple[Ref, ...]:
        """References from a model, which must exist, with their hashes."""
        refs = []
        for row in given:
            try:
                ref = Ref(**{"kind": "file", **row})
                if ref.kind not in get_args(RefKind) or not isinstance(ref.id, str):
                    raise TypeError(f"kind is one of {', '.join(get_args(RefKind))}")
            except TypeError as error:
                raise ToolError(f"{row} is no reference: {error}") from None
            self.ws.check(ref)
            refs.append(ref)
        return tuple(refs)

    def _window(self) -> context.Window:
        options, ratio = self.backend.options, self.study.ratio
        return context.Window(
            options.window, ratio or context.FIRST_RATIO, options.answer
        )

    def _fitted(
        self, session: Session, spec: AgentSpec, offered: Sequence[Any], share: float
    ) -> list[Any]:
        """The transcript to send, compacted where it must be."""
        others = [a for a in self.agents.values() if a.name != spec.name]
        hub = "delegate" in spec.tools
        instructions = context.system_prompt(spec, others if hub else ())

        whole = self._window()
        window = dataclasses.replace(whole, tokens=int(whole.tokens * share))

        def read(sha: str) -> str:
            return self.ws.read_text(f"blobs/{sha}")

        def shown(way: context.Compaction) -> list[Any]:
            return context.render(session, self.study, way, instructions, read, window)

        def size(way: context.Compaction) -> int:
            return context.characters(shown(way), offered) + context.HEAD

        way = context.fit(session, size, window)
        if way is not None:
            name = f"agents/{spec.name}/history-{session.id}.json"
            every = context.all_references(session, self.study)
            self._append(
                spec.name,
                "compact",
                session=session.id,
                cut=way.cut,
                offload=sorted(way.offload),
                history=self.ws.write_json(name, every),
            )
        return shown(context.Compaction(session.cut, session.offload))

    def _end_jobs(self) -> None:
        """Ends every training process that still runs."""
        jobs = []
        for run, status in self.study.runs.items():
            path = f"runs/{run}/process.json"
            if status == "running" and self.ws.exists(path):
                row = self.ws.read_json(path)
                jobs.append(Process(row["pid"], row["started"]))
        end_group(*jobs)
