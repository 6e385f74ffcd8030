"""What a model is shown of a session, and how that is kept below its window.

The transcript is rendered from the journal's state at every turn. When it grows past
`THRESHOLD` of the window it is compacted to `TARGET`: first the long results of tools
are reduced to their head and a reference, then old turns become lines of a digest.
Instructions, the task, all messages from people, the plan, open findings, the last
exchanges and every reference stay; there is no model in it, so nothing is made up.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxlab.research.state import Entry, Outcome, Remark, Reply, Session, Study
from jaxlab.research.tool import Tool
from jaxlab.research.types import AgentSpec, NeedsHuman, Ref

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage
    from pydantic_ai.tools import ToolDefinition

THRESHOLD, TARGET = 0.75, 0.5
LONG = 2_000
"""characters above which a result or an argument may be reduced to its head"""
HEAD = 400
KEEP = 3
"""last exchanges that stay as they are"""
TOLD = 0.2
"""of the window that a digest's calls may take; earlier ones are in a file"""
DIGEST = "Digest of earlier turns: "
FIRST_RATIO = 2.0
"""characters a token, before the server has said how many it counted"""

Blob = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Window:
    """How much a model takes in."""

    tokens: int
    ratio: float = FIRST_RATIO
    """characters a token; the smallest that the server has shown"""
    answer: int = 2048
    """tokens kept free for the answer"""

    def limit(self, share: float) -> int:
        """Characters of a request at a share of the window."""
        return int(max(self.tokens - self.answer, 1) * share * self.ratio)


def system_prompt(spec: AgentSpec, others: Sequence[AgentSpec] = ()) -> str:
    """An agent's instructions; a delegating agent's name the others."""
    lines = [f"You are the agent {spec.name!r} of a research group.", spec.instructions]
    if others:
        lines.append("Agents that you can delegate to:")
        lines += [f"- {other.name}: {other.purpose}" for other in others]
    return "\n".join(lines)


def task_prompt(session: Session) -> str:
    """The first message: the task, its references, what people said before."""
    lines = [f"Task: {session.task}"]
    if session.refs:
        lines.append("References: " + json.dumps([ref.json() for ref in session.refs]))
    lines += [human_text(remark) for remark in session.before]
    return "\n\n".join(lines)


def human_text(remark: Remark) -> str:
    """A person's message as the model reads it."""
    return f"Message {remark.id} from a person: {remark.text}"


def messages(
    session: Session,
    instructions: str,
    blob: Blob,
    digest: str | None = None,
) -> list["ModelMessage"]:
    """The transcript as pydantic-ai's messages; a pure function of the state.

    Args:
        session: whose turn it is.
        instructions: the system prompt.
        blob: reads a long result by its hash.
        digest: what stands for the entries before `session.cut`.
    """
    from pydantic_ai.messages import (
        ModelMessagesTypeAdapter,
        ModelRequest,
        SystemPromptPart,
        ToolReturnPart,
        UserPromptPart,
    )

    first: list[Any] = [
        SystemPromptPart(instructions),
        UserPromptPart(task_prompt(session)),
    ]
    for entry in session.entries[: session.cut]:
        if isinstance(entry, Remark) and entry.origin == "human":
            first.append(UserPromptPart(human_text(entry)))
    if digest is not None:
        first.append(UserPromptPart(digest))
    made: list[Any] = []
    parts: list[Any] = first
    remarks: list[Any] = []
    for entry in session.entries[session.cut :]:
        if isinstance(entry, Reply):
            made.append(ModelRequest(parts + remarks))
            parts, remarks = [], []
            message = _shown(entry, session.offload)
            made += ModelMessagesTypeAdapter.validate_python([message])
        elif isinstance(entry, Outcome):
            text = outcome_text(entry, blob, entry.call.id in session.offload)
            parts.append(ToolReturnPart(entry.call.tool, text, entry.call.id))
        elif entry.origin == "human":
            remarks.append(UserPromptPart(human_text(entry)))
        else:
            remarks.append(UserPromptPart(f"The driver says: {entry.text}"))
    if not parts + remarks:
        remarks = [UserPromptPart("The driver says: go on with a tool, or finish.")]
    made.append(ModelRequest(parts + remarks))
    return made


def outcome_text(outcome: Outcome, blob: Blob, short: bool) -> str:
    """A tool's result as data: JSON with where it came from."""
    result = outcome.result
    if isinstance(result, dict) and set(result) == {"blob", "head"}:
        if short:
            note = f"shortened; all of it: read blobs/{result['blob']}"
            result = {"head": result["head"][:HEAD], "note": note}
        else:
            result = json.loads(blob(result["blob"]))
    return json.dumps(
        {
            "tool": outcome.call.tool,
            "status": outcome.status,
            "data": result,
            "refs": [ref.json() for ref in outcome.refs],
        },
        ensure_ascii=False,
    )


def _shown(reply: Reply, offload: frozenset[str]) -> dict[str, Any]:
    """A reply's message, with the long arguments of offloaded calls cut."""
    if not any(call.id in offload for call in reply.calls):
        return reply.message
    parts = []
    for part in reply.message["parts"]:
        if part["part_kind"] == "tool-call" and part["tool_call_id"] in offload:
            args = part["args"]
            args = json.loads(args) if isinstance(args, str) and _json(args) else args
            part = part | {"args": _cut(args)}
        elif part["part_kind"] == "text":
            part = part | {"content": _cut(part["content"])}
        parts.append(part)
    return reply.message | {"parts": parts}


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > HEAD:
        return value[:HEAD] + " ... (shortened)"
    if isinstance(value, dict):
        return {k: _cut(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_cut(v) for v in value[:20]]
    return value


def _json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def characters(sent: Sequence["ModelMessage"], tools: Sequence[Any]) -> int:
    """Characters of a request, with what the format adds around each part."""
    from pydantic_ai.messages import ModelRequest

    total = 0
    for tool in tools:
        total += len(tool.name) + len(tool.description or "") + 60
        total += len(json.dumps(tool.parameters_json_schema))
    for message in sent:
        for part in message.parts:
            total += 80
            for name in ("content", "args", "tool_name", "tool_call_id"):
                value = getattr(part, name, None)
                if value is not None:
                    text = value if isinstance(value, str) else json.dumps(value)
                    # what is JSON in JSON is quoted once more on the wire
                    total += len(json.dumps(text, ensure_ascii=False))
        total += 20 * isinstance(message, ModelRequest)
    return total


def digest(
    session: Session, study: Study, cut: int, file: Ref | None, room: int
) -> str:
    """What stands for the first `cut` entries: calls, failures, plan, findings, refs.

    JSON, so that a program can read it as well as a model; the calls in it, newest
    first to go in, take `room` characters at most.
    """
    old = session.entries[:cut]
    lines = [_line(e) for e in old if isinstance(e, Outcome)]
    shown = 0
    for line in reversed(lines):
        room -= len(json.dumps(json.dumps(line)))
        if room < 0:
            break
        shown += 1
    said = [e for e in old if isinstance(e, Remark) and e.origin == "driver"]
    questions = [n["text"] for n in study.notes if n.get("type") == "question"]
    told = {
        "digest_of": cut,
        "earlier_calls": len(lines) - shown,
        "calls": lines[len(lines) - shown :],
        "driver": [remark.text[:HEAD] for remark in said[-2:]],
        "plan": study.plan,
        "open_findings": {g: f[:5] for g, f in study.findings.items() if f},
        "open_questions": [text[:HEAD] for text in questions[-5:]],
        "all_references": file.json() if file else None,
    }
    return DIGEST + json.dumps(told, ensure_ascii=False)


def _line(outcome: Outcome) -> dict[str, Any]:
    """A call in short."""
    args = json.dumps(_cut(outcome.call.args), ensure_ascii=False)
    result = outcome.result
    if isinstance(result, dict) and set(result) == {"blob", "head"}:
        result = {"head": result["head"][:80], "blob": result["blob"]}
    text = json.dumps(result, ensure_ascii=False)
    return {
        "tool": outcome.call.tool,
        "args": outcome.call.args if len(args) < 200 else args[:200],
        "status": outcome.status,
        "data": result if len(text) < 300 else text[:160],
        "refs": [f"{r.kind}:{r.id}" for r in outcome.refs[:6]],
    }


def all_references(session: Session, study: Study) -> dict[str, Any]:
    """What the file behind a digest holds: every reference and every call."""
    return {
        "refs": [ref.json() for ref in study.refs.values()],
        "calls": [_line(e) for e in session.entries if isinstance(e, Outcome)],
    }


@dataclasses.dataclass(frozen=True)
class Compaction:
    """What a compact event says."""

    cut: int
    offload: frozenset[str]


def compactions(session: Session) -> list[Compaction]:
    """Ever harder ways to shorten a session, mildest first.

    Exchanges are cut at replies, so calls and their results stay together.
    """
    starts = [
        i
        for i, e in enumerate(session.entries)
        if isinstance(e, Reply) and i >= session.cut
    ]
    kept = starts[-KEEP:]
    cut = kept[0] if kept else session.cut
    ids = _calls(session.entries)
    late = _calls(session.entries[cut:])
    early = frozenset(ids - late)
    everything = frozenset(ids)
    ways = [
        Compaction(session.cut, session.offload | early),
        Compaction(cut, session.offload | early),
        Compaction(cut, everything),
    ]
    ways += [Compaction(start, everything) for start in kept[1:]]
    return ways


def _calls(entries: Sequence[Entry]) -> set[str]:
    return {c.id for e in entries if isinstance(e, Reply) for c in e.calls}


def fit(
    session: Session,
    size: Callable[[Compaction], int],
    window: Window,
) -> Compaction | None:
    """The mildest compaction that is needed; None: none is.

    Args:
        session: what to shorten.
        size: characters of the request under a compaction.
        window: the model's.

    Raises:
        NeedsHuman: even the hardest leaves more than the window takes.
    """
    now = Compaction(session.cut, session.offload)
    if size(now) <= window.limit(THRESHOLD):
        return None
    ways = compactions(session)
    for way in ways:
        if way != now and size(way) <= window.limit(TARGET):
            return way
    smallest = min(ways, key=size)
    if size(smallest) <= window.limit(THRESHOLD) or size(smallest) <= window.limit(1.0):
        return smallest if smallest != now else None
    need = int(size(smallest) / window.ratio)
    raise NeedsHuman(
        f"what agent {session.agent} must be shown (task, messages from people, plan, "
        f"references) takes about {need} tokens, more than the model's window of "
        f"{window.tokens}; resume with a larger --window or model"
    )


def render(
    session: Session,
    study: Study,
    way: Compaction,
    instructions: str,
    blob: Blob,
    window: Window,
) -> list["ModelMessage"]:
    """The transcript under a compaction."""
    trial = dataclasses.replace(session, cut=way.cut, offload=way.offload)
    room, told = window.limit(TOLD), None
    if way.cut:
        told = digest(trial, study, way.cut, trial.history, room)
    return messages(trial, instructions, blob, told)


def offered(names: Sequence[str], tools: Mapping[str, Tool]) -> list["ToolDefinition"]:
    """What a model is told of some tools."""
    from pydantic_ai.tools import ToolDefinition

    return [
        ToolDefinition(
            name=name,
            description=tools[name].purpose,
            parameters_json_schema=tools[name].schema,
        )
        for name in names
        if name in tools
    ]
