"""Tools: plain functions that agents call, declared with a decorator.

@tool("pure")
def label_noise(context, run: str) -> dict:
"Estimates the label noise of a run's data."
return context.workspace.read_json(f"runs/{run}/noise.json")
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

from jaxlab.research.journal import Event
from jaxlab.research.types import Ref, ToolError
from jaxlab.research.workspace import Workspace


@dataclasses.dataclass(frozen=True)
class Result:
    """What a tool gives back when it has references to pass on."""

    value: Any
    """plain JSON"""
    refs: tuple[Ref, ...] = ()


@dataclasses.dataclass(frozen=True)
class Context:
    """What a tool may touch: its first argument."""

    workspace: Workspace
    agent: str
    call: str
    """id of this call; the same when a resumed study makes it again"""
    options: dict[str, Any]
    """of the study: model, compare, sweep, metric, parallel, past, ..."""
    record: Callable[..., Event]
    """record(kind, **data): writes an event to the journal"""
    events: Callable[[], Sequence[Event]]
    """all events so far"""
    start_run: Callable[..., Event]
    """start_run(run_id, **data): writes `run_start`, before the process is launched;
    raises BudgetSpent where no run is left"""
    poll: Callable[[], bool]
    """to be called a few times a second by a tool that waits: True where a person's
    message waits (return soon with what there is); raises Interrupted, BudgetSpent"""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that agents can call: `fn(context, **arguments)`."""

    fn: Callable[..., Any]
    name: str
    purpose: str
    kind: Literal["pure", "idempotent", "once"]
    """what a study resumed in the middle of a call does. pure: calls it again;
    idempotent: likewise, and the function knows by a key of its own (such as the run's
    content hash) what is done already; once: reports the outcome as unknown"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.fn(*args, **kwargs)

    @cached_property
    def arguments(self) -> Any:
        """A pydantic model of the arguments, from the signature."""
        from pydantic import ConfigDict, create_model

        fields: dict[str, Any] = {}
        parameters = list(inspect.signature(self.fn, eval_str=True).parameters.values())
        for p in parameters[1:]:
            default = ... if p.default is p.empty else p.default
            fields[p.name] = (p.annotation, default)
        return create_model(
            self.name, __config__=ConfigDict(extra="forbid", strict=False), **fields
        )

    @cached_property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        return self.arguments.model_json_schema()

    def validate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the right types, defaults filled in.

        Raises:
            ToolError: what is wrong with them.
        """
        from pydantic import ValidationError

        try:
            made = self.arguments.model_validate(arguments)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ToolError(f"{self.name}: {where}: {first['msg']}") from None
        return {name: getattr(made, name) for name in type(made).model_fields}


def tool(
    kind: Literal["pure", "idempotent", "once"] = "pure", name: str | None = None
) -> Callable[[Callable[..., Any]], Tool]:
    """Declares a tool; see `Tool`. The docstring's first paragraph is its purpose.

    The function takes a `Context` and JSON-typed arguments, and returns plain JSON or
    a `Result`; a `ToolError` is an answer as well.
    """

    def declare(fn: Callable[..., Any]) -> Tool:
        purpose = " ".join((inspect.getdoc(fn) or "").split("\n\n")[0].split())
        return Tool(fn, name or fn.__name__, purpose, kind)

    return declare
