"""What the parts of a study hand each other: plain data, JSON in files.

Kinds of events in the journal, by who writes them:

| kind | data |
| --- | --- |
| study | schema, question, options |
| agent_start | session, agent, task, refs, call (of the delegating tool) |
| agent_end | session, status, summary, refs |
| request, reply | session, turn / session, turn, message, usage |
| tool_start, tool_end | session, call, tool, args / and status, result, refs |
| human, ack | message, text, command / message, decision |
| plan, amendment | n, sha256 (of plans/<n>.json) / and why, message |
| run_start, run_end | run, ... / run, status, ... |
| fact, gate, note | written by tools with `Context.record` (jaxlab.research.tool) |
| compact | session, through which turn, digest |
| resume, finish | pid / code, status, why |
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxlab.errors import UserError


class ToolError(Exception):
    """A tool could not do what was asked; its text goes to the model as the result."""


class Stopped(Exception):
    """Ends what goes on, from outside: a tool lets it through."""


class Interrupted(Stopped):
    """A person interrupts or stops: end what runs, and let it through."""


class StoppedByPerson(Stopped):
    """A person, or a signal, ends this session of driving."""


class BudgetSpent(Stopped):
    """A limit of the study is reached; let it through."""


class GatesFailed(Stopped):
    """The study cannot pass its gates."""


class NeedsHuman(UserError):
    """Nothing more can be done without a person."""

    exit_code = 5


RefKind = Literal["file", "run", "fact", "event"]


@dataclasses.dataclass(frozen=True)
class Ref:
    """Points to something in the workspace; what agents pass instead of contents."""

    kind: RefKind
    id: str
    """a path inside the workspace, a run's id, a fact's id, an event's number"""
    sha256: str | None = None
    """of the file's bytes (of `result.json` for a run)"""
    summary: str = ""
    """one line"""

    def json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things compared: a config and what is changed in it."""

    name: str
    config: str
    """path of a configs/*.py"""
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    """fields by dotted name, as on the command line"""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is tested: a weighted sum over the arms, for each seed."""

    name: str
    weights: dict[str, float]
    """of each arm that takes part; {"a": 1, "b": -1} is a minus b"""
    scale: Literal["linear", "log"] = "linear"
    """log: the weights are for the logarithms, as in the slope of a power law"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be run and how it will be judged, fixed before the runs."""

    question: str
    metric: str
    """a tag of metrics.jsonl; its last value in a run counts"""
    direction: Literal["lower", "higher"]
    """which is better"""
    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    """none in a pilot, which tests nothing"""
    seeds: tuple[int, ...]
    looks: tuple[int, ...]
    """numbers of seeds at which the tests are made"""
    alpha: float = 0.05
    """chance of any false claim of difference"""
    correction: Literal["holm"] = "holm"
    test: Literal["t", "sign-flip"] = "t"
    min_effect: float = 0.0
    """smallest difference of the metric that matters; 0: not stated"""
    power: float | None = None
    """chance to find it, as planned from the pilot"""
    stage: Literal["pilot", "confirmatory", "follow-up"] = "confirmatory"
    factors: dict[str, Any] = dataclasses.field(default_factory=dict)
    """value of the varied field by arm"""
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    """of each run: wall and cpu in seconds, memory and disk in bytes"""
    based_on: tuple[Ref, ...] = ()
    """earlier findings and runs that this builds on"""
    amends: int | None = None
    """number of the plan that this one takes the place of"""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as its `result.json` tells it."""

    run_id: str
    spec_hash: str
    code_hash: str
    status: Literal["done", "failed", "diverged", "timeout", "cancelled"]
    metrics: str
    """path of metrics.jsonl in the workspace"""
    started: float
    ended: float
    rc: int
    env: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Fact:
    """A value and how it follows from files: what a paper may state."""

    id: str
    value: float | int | str
    unit: str | None
    op: str
    """name of a pure function in a closed table"""
    inputs: tuple[str, ...]
    """run ids or fact ids"""
    selector: dict[str, Any]
    fmt: str


@dataclasses.dataclass(frozen=True)
class GateResult:
    """Verdict of a gate; `findings` say what must be mended."""

    gate: str
    ok: bool
    findings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class AgentSpec:
    """An agent: data, not a class."""

    name: str
    purpose: str
    """what the manager reads to choose it"""
    instructions: str
    """its system prompt"""
    tools: tuple[str, ...]
    """the only ones that it can call; every agent has `finish` beside them"""
    max_turns: int = 40
    model: str | None = None
    """None: the study's model"""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits that the driver keeps; None: no limit."""

    usd: float | None = None
    tokens: int | None = None
    wall: float | None = None
    """seconds of driving, over all sessions of the study"""
    runs: int | None = None
    disk: int | None = None
    """bytes of the workspace"""
    turns: int = 400
    """of all agents"""
    delegations: int = 12


def plain(value: Any) -> Any:
    """A value of these types as plain JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value
