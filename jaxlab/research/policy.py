"""A policy by rules: a pure function from a transcript to the next call.

It has no state, so resuming, replaying and asking it over HTTP give the same study. A
rule is a function `rule(view) -> Step` of one agent; which ones there are is in
`jaxlab.research.rules`. It has no ideas and no prose beyond templates.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxlab.research.context import DIGEST

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelResponse
    from pydantic_ai.models.function import AgentInfo

AGENT = re.compile(r"You are the agent '([^']+)'")
TASK = re.compile(r"Task: (.*?)(?:\n\nReferences: |\n\nMessage |\Z)", re.DOTALL)
REFERENCES = re.compile(r"\n\nReferences: (\[.*?\])(?:\n\n|\Z)", re.DOTALL)
SAID = re.compile(r"Message (\S+) from a person: (.*?)(?=\n\nMessage |\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Done:
    """A call that was made, with its outcome."""

    tool: str
    args: dict[str, Any]
    status: str
    data: Any
    refs: tuple[dict[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Said:
    """A person's message."""

    id: str
    text: str
    after: int
    """calls that were made before it"""


@dataclasses.dataclass(frozen=True)
class Step:
    """What the rule does next."""

    tool: str
    args: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class View:
    """What a rule sees: the transcript, read."""

    agent: str
    task: str
    given: tuple[dict[str, Any], ...]
    """references of the task"""
    tools: tuple[str, ...]
    agents: dict[str, str]
    """purposes of those that can be delegated to"""
    done: tuple[Done, ...]
    said: tuple[Said, ...]

    def call(self, tool: str, **args: Any) -> Step:
        """The step that calls a tool."""
        return Step(tool, args)

    def finish(self, summary: str = "done", refs: Sequence[Any] = ()) -> Step:
        """The step that ends the task."""
        rows = [r if isinstance(r, dict) else dataclasses.asdict(r) for r in refs]
        return Step("finish", {"summary": summary, "refs": rows})

    def last(self, tool: str, **args: Any) -> Done | None:
        """The last call of a tool, with these arguments among its own."""
        for done in reversed(self.done):
            if done.tool == tool and all(
                done.args.get(k) == v for k, v in args.items()
            ):
                return done
        return None

    @property
    def results(self) -> tuple[Done, ...]:
        """Calls that went well."""
        return tuple(d for d in self.done if d.status == "ok")

    def refs(self, kind: str) -> list["Pointer"]:
        """References of a kind: the task's, then those that calls brought."""
        rows = [*self.given, *(r for d in self.done for r in d.refs)]
        return [
            Pointer(kind, row["id"], row.get("sha256"), row.get("summary"))
            for row in {(r["kind"], r["id"]): r for r in rows}.values()
            if row["kind"] == kind
        ]


@dataclasses.dataclass(frozen=True)
class Pointer:
    """A reference as a rule reads it."""

    kind: str
    id: str
    sha256: str | None
    summary: str | None


Rule = Callable[[View], Step]


def make_policy(
    rules: Mapping[str, Rule],
) -> "Callable[[list[ModelMessage], AgentInfo], ModelResponse]":
    """The function for pydantic-ai's FunctionModel."""

    def policy(messages: Any, info: Any) -> Any:
        from pydantic_ai.messages import ModelResponse, ToolCallPart

        view = read_transcript(messages, [t.name for t in info.function_tools])
        rule = rules.get(view.agent, _no_rule)
        step = rule(view)
        return ModelResponse([ToolCallPart(step.tool, step.args, f"c{len(view.done)}")])

    return policy


def _no_rule(view: View) -> Step:
    return view.finish(f"the rule policy has no rule for the agent {view.agent}")


def read_transcript(messages: Sequence[Any], tools: Sequence[str]) -> View:
    """Reads a transcript as `jaxlab.research.context` writes it."""
    agent, task, given, agents = "", "", [], {}
    done: list[Done] = []
    said: dict[str, Said] = {}
    calls: dict[str, tuple[str, dict[str, Any]]] = {}
    for message in messages:
        for part in message.parts:
            kind = part.part_kind
            if kind == "system-prompt":
                found = AGENT.search(part.content)
                agent = found[1] if found else ""
                agents = dict(re.findall(r"^- (\S+): (.*)$", part.content, re.M))
            elif kind == "user-prompt":
                text = part.content
                if text.startswith("Task: "):
                    found = TASK.match(text)
                    task = found[1] if found else ""
                    listed = REFERENCES.search(text)
                    given = json.loads(listed[1]) if listed else []
                    text = text[len("Task: ") + len(task) :]
                if text.startswith(DIGEST):
                    done += _digested(json.loads(text[len(DIGEST) :]))
                elif not text.startswith("The driver says"):
                    for id, words in SAID.findall(text):
                        said.setdefault(id, Said(id, words.strip(), len(done)))
            elif kind == "tool-call":
                args = part.args_as_dict()
                calls[part.tool_call_id] = (part.tool_name, args)
            elif kind == "tool-return":
                name, args = calls[part.tool_call_id]
                row = _object(part.content)
                refs = tuple(row.get("refs", ()))
                done.append(Done(name, args, row["status"], row.get("data"), refs))
    return View(
        agent,
        task,
        tuple(given),
        tuple(tools),
        agents,
        tuple(done),
        tuple(said.values()),
    )


def _object(content: Any) -> dict[str, Any]:
    row = json.loads(content) if isinstance(content, str) else content
    return row if isinstance(row, dict) else {"status": "error", "data": row}


def _digested(told: dict[str, Any]) -> list[Done]:
    found = []
    for row in told["calls"]:
        args = row["args"] if isinstance(row["args"], dict) else {}
        refs = tuple(
            {"kind": r.partition(":")[0], "id": r.partition(":")[2]}
            for r in row["refs"]
        )
        found.append(Done(row["tool"], args, row["status"], row["data"], refs))
    return found
