"""Agents, tools and rules of a study: the ones here, and those of installed packages.

A package adds its own by an entry point of the group `jaxlab.research` that names a
function `register(parts)`:

    @tool("pure")
    def label_noise(context, run: str) -> dict:
        "Estimates the label noise of a run's data."
        ...

    def register(parts):
        parts.tool(label_noise)
        parts.agent(AgentSpec("auditor", "Checks data before claims.",
                              "Audit each run.", tools=("read", "label_noise")))
        parts.rule("auditor", lambda view: view.finish() if view.results else
                   view.call("label_noise", run=view.refs("run")[-1].id))

An installed package is trusted as this one is; what its agents may call is not wider
than what their specs say.
"""

import dataclasses
import importlib
import importlib.metadata

from jaxlab.errors import UserError
from jaxlab.research import agents
from jaxlab.research.policy import Rule
from jaxlab.research.tool import Tool
from jaxlab.research.types import AgentSpec

GROUP = "jaxlab.research"
MODULES = (
    "notes",
    "questions",
    "next_plan",
    "plans",
    "experiments",
    "facts",
    "figures",
    "paper",
    "gates",
)


@dataclasses.dataclass
class Parts:
    """What a study is made of; changed by `register` functions only."""

    agents: dict[str, AgentSpec] = dataclasses.field(default_factory=dict)
    tools: dict[str, Tool] = dataclasses.field(default_factory=dict)
    rules: dict[str, Rule] = dataclasses.field(default_factory=dict)

    def agent(self, spec: AgentSpec) -> None:
        """Adds an agent, or takes the place of the one of that name."""
        self.agents[spec.name] = spec

    def tool(self, *tools: Tool) -> None:
        """Adds tools, or takes the place of those of the same names."""
        self.tools |= {tool.name: tool for tool in tools}

    def rule(self, agent: str, rule: Rule) -> None:
        """Says what the rule policy does as an agent."""
        self.rules[agent] = rule

    def remove(self, agent: str) -> None:
        """Takes an agent out."""
        self.agents.pop(agent, None)


def builtin_parts() -> Parts:
    """The agents, tools and rules of this package."""
    from jaxlab.research import rules

    parts = Parts()
    for spec in agents.AGENTS:
        parts.agent(spec)
    for name in MODULES:
        parts.tool(*importlib.import_module(f"jaxlab.research.{name}").TOOLS)
    for name, rule in rules.RULES.items():
        parts.rule(name, rule)
    return parts


def load_parts(parts: Parts | None = None) -> Parts:
    """Those, or the given ones, and what installed packages add, in order of names.

    Raises:
        UserError: a package's entry point fails, or its agent names a tool that is not
            there.
    """
    parts = builtin_parts() if parts is None else parts
    known = set(parts.agents)
    points = importlib.metadata.entry_points(group=GROUP)
    for point in sorted(points, key=lambda p: p.name):
        try:
            point.load()(parts)
        except Exception as error:
            raise UserError(
                f"the entry point {point.name} = {point.value} of the group {GROUP} "
                f"fails ({type(error).__name__}: {error}); mend it or uninstall it"
            ) from error
    for spec in parts.agents.values():
        missing = sorted({*spec.tools} - {*parts.tools, "delegate", "finish"})
        if missing and spec.name not in known:
            raise UserError(
                f"agent {spec.name!r} names tools that are not there: "
                f"{', '.join(missing)}; there are {', '.join(sorted(parts.tools))}"
            )
    return parts
