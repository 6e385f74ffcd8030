"""What the journal amounts to: a fold over its events, and nothing else.

The driver keeps no truth of its own; it appends an event and folds it in, so a study
that was killed stands where its journal stands.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from jaxlab.research.journal import Event
from jaxlab.research.types import Ref


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call that a model made."""

    id: str
    """session.turn.number, given by the driver"""
    tool: str
    args: dict[str, Any] | None
    """None: what the model sent is no JSON object"""
    sent: str = ""
    """what it sent, where that is no JSON object"""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A model's turn."""

    turn: int
    message: dict[str, Any]
    """pydantic-ai's ModelResponse as JSON"""
    calls: tuple[Call, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a tool call ended."""

    call: Call
    status: str
    """ok, error, refused, interrupted, unknown"""
    result: Any
    """plain JSON; where it is long {"blob": sha256, "head": its beginning}"""
    refs: tuple[Ref, ...]
    event: int


@dataclasses.dataclass(frozen=True)
class Remark:
    """A message in between: from a person or from the driver."""

    origin: str
    """human or driver"""
    id: str
    text: str


Entry = Reply | Outcome | Remark
PROGRESS = ("plan", "amendment", "run_end", "fact", "figure", "section", "paper")


@dataclasses.dataclass
class Session:
    """One agent's work on one task."""

    id: str
    agent: str
    task: str
    refs: tuple[Ref, ...]
    call: str | None
    """call that delegated it"""
    before: tuple[Remark, ...]
    """people's messages from before it began"""
    entries: list[Entry] = dataclasses.field(default_factory=list)
    turns: int = 0
    status: str | None = None
    """None: open"""
    summary: str = ""
    result: tuple[Ref, ...] = ()
    unanswered: list[str] = dataclasses.field(default_factory=list)
    """people's messages that no turn has followed yet"""
    cut: int = 0
    """entries before this one are told by the digest only"""
    offload: frozenset[str] = frozenset()
    """calls of which only the head of the result and of the arguments is shown"""
    forgiven: int = 0
    """entries from before the study was resumed after its gates had failed"""
    history: Ref | None = None
    """file with every reference and call, once something was cut"""

    def pending(self) -> list[Call]:
        """Calls of the last turn that have no outcome yet."""
        done = {e.call.id for e in self.entries if isinstance(e, Outcome)}
        last = next((e for e in reversed(self.entries) if isinstance(e, Reply)), None)
        return [c for c in last.calls if c.id not in done] if last else []


@dataclasses.dataclass
class Usage:
    """What was spent."""

    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0
    requests: int = 0
    wall: float = 0.0
    """seconds, all sessions of driving"""
    delegations: int = 0


@dataclasses.dataclass
class Study:
    """The state of a study."""

    question: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sessions: dict[str, Session] = dataclasses.field(default_factory=dict)
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    messages: set[str] = dataclasses.field(default_factory=set)
    """ids of all messages from people that were taken in"""
    runs: dict[str, str] = dataclasses.field(default_factory=dict)
    """status by run; "running" until its end"""
    plan: dict[str, Any] | None = None
    """data of the last plan or amendment event"""
    findings: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """what each gate found when it last ran"""
    notes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    refs: dict[str, Ref] = dataclasses.field(default_factory=dict)
    """every reference that a tool gave, by kind and id"""
    started: dict[str, int] = dataclasses.field(default_factory=dict)
    """event of the last tool_start by call"""
    usage: Usage = dataclasses.field(default_factory=Usage)
    verdicts: dict[str, bool] = dataclasses.field(default_factory=dict)
    """approvals and denials by what was asked for"""
    asked: list[str] = dataclasses.field(default_factory=list)
    ratio: float | None = None
    """smallest number of characters a token that the server's counts have shown"""
    characters: int = 0
    """of the last request"""
    finished: dict[str, Any] | None = None
    last_progress: int = 0
    """number of the last event that changed something beyond talk"""
    _began: float = 0.0
    _wall_before: float = 0.0

    def apply(self, event: Event) -> None:
        """Folds an event in."""
        data, kind = event.data, event.kind
        if kind in ("study", "resume"):
            self._wall_before, self._began = self.usage.wall, event.t
        self.usage.wall = self.wall(event.t)
        handler = getattr(self, f"_on_{kind}", None)
        if handler is not None:
            handler(event, data)
        if kind in PROGRESS:
            self.last_progress = event.i

    def _on_study(self, event: Event, data: dict[str, Any]) -> None:
        self.question, self.options = data["question"], data["options"]

    def _on_resume(self, event: Event, data: dict[str, Any]) -> None:
        if "settings" in data:  # a larger budget, say: tools read it, too
            self.options = {**self.options, "settings": data["settings"]}
        if self.finished is not None and self.finished["status"] == "gates":
            for session in self.sessions.values():
                session.forgiven = len(session.entries)
        self.finished = None

    def _on_agent_start(self, event: Event, data: dict[str, Any]) -> None:
        self.sessions[data["session"]] = Session(
            data["session"],
            data["agent"],
            data["task"],
            tuple(Ref(**r) for r in data["refs"]),
            data["call"],
            tuple(self.remarks),
        )
        self.usage.delegations += data["call"] is not None

    def _on_agent_end(self, event: Event, data: dict[str, Any]) -> None:
        session = self.sessions[data["session"]]
        session.status, session.summary = data["status"], data["summary"]
        session.result = tuple(Ref(**r) for r in data["refs"])

    def _on_reply(self, event: Event, data: dict[str, Any]) -> None:
        session = self.sessions[data["session"]]
        calls = tuple(calls_of(data["message"]))
        session.entries.append(Reply(data["turn"], data["message"], calls))
        session.turns += 1
        session.unanswered = []
        usage = data["usage"]
        self.usage.tokens_in += usage["input"]
        self.usage.tokens_out += usage["output"]
        self.usage.usd += usage["usd"]
        if usage["input"] and self.characters:
            ratio = self.characters / usage["input"]
            self.ratio = ratio if self.ratio is None else min(self.ratio, ratio)

    def _on_request(self, event: Event, data: dict[str, Any]) -> None:
        self.usage.requests += 1
        self.characters = data["characters"]

    def _on_tool_start(self, event: Event, data: dict[str, Any]) -> None:
        self.started[data["call"]] = event.i

    def _on_tool_end(self, event: Event, data: dict[str, Any]) -> None:
        session = self.sessions[data["session"]]
        call = next(c for c in session.pending() if c.id == data["call"])
        refs = tuple(Ref(**r) for r in data["refs"])
        session.entries.append(
            Outcome(call, data["status"], data["result"], refs, event.i)
        )
        for ref in refs:
            self.refs[f"{ref.kind}:{ref.id}"] = ref

    def _on_remark(self, event: Event, data: dict[str, Any]) -> None:
        remark = Remark("driver", str(event.i), data["text"])
        self.sessions[data["session"]].entries.append(remark)

    def _on_human(self, event: Event, data: dict[str, Any]) -> None:
        self.messages.add(data["message"])
        command, text = data["command"], data["text"]
        if command in ("approve", "deny"):
            self.verdicts[data["target"]] = command == "approve"
        if not text:
            return
        remark = Remark("human", data["message"], text)
        self.remarks.append(remark)
        for session in self.sessions.values():
            if session.status is None:
                session.entries.append(remark)
                session.unanswered.append(data["message"])

    def _on_approval_request(self, event: Event, data: dict[str, Any]) -> None:
        self.asked.append(data["target"])

    def _on_plan(self, event: Event, data: dict[str, Any]) -> None:
        self.plan = data

    _on_amendment = _on_plan

    def _on_run_start(self, event: Event, data: dict[str, Any]) -> None:
        self.runs[data["run"]] = "running"

    def _on_run_end(self, event: Event, data: dict[str, Any]) -> None:
        self.runs[data["run"]] = data["status"]

    def _on_gate(self, event: Event, data: dict[str, Any]) -> None:
        self.findings[data["gate"]] = [] if data["ok"] else data["findings"]

    def _on_note(self, event: Event, data: dict[str, Any]) -> None:
        self.notes.append(data)

    def _on_compact(self, event: Event, data: dict[str, Any]) -> None:
        session = self.sessions[data["session"]]
        session.cut, session.offload = data["cut"], frozenset(data["offload"])
        session.history = Ref(**data["history"])

    def _on_finish(self, event: Event, data: dict[str, Any]) -> None:
        self.finished = data

    def wall(self, now: float) -> float:
        """Seconds of driving until now, all sessions together."""
        return self._wall_before + max(now - self._began, 0.0)

    def active(self) -> Session | None:
        """The open session that began last: who is at work."""
        open_ = [s for s in self.sessions.values() if s.status is None]
        return open_[-1] if open_ else None


def fold(events: Iterable[Event]) -> Study:
    """The state after some events."""
    study = Study()
    for event in events:
        study.apply(event)
    return study


def called(call: Call) -> str:
    """A call in a few words."""
    args = call.args or {}
    told = ", ".join(f"{k}={str(v)[:40]}" for k, v in list(args.items())[:3])
    return f"{call.tool}({told})"


def calls_of(message: dict[str, Any]) -> Iterable[Call]:
    """The tool calls of a ModelResponse in JSON."""
    for part in message["parts"]:
        if part["part_kind"] != "tool-call":
            continue
        args = part.get("args")
        sent = args if isinstance(args, str) else json.dumps(args)
        if isinstance(args, str):
            try:
                args = json.loads(args or "{}")
            except ValueError:
                args = None
        args = {} if args is None and sent in ("null", "") else args
        good = isinstance(args, dict)
        yield Call(
            part["tool_call_id"],
            part["tool_name"],
            args if good else None,
            "" if good else sent,
        )
