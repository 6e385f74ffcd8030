"""A research group of agents that drives this framework from outside (freephdlabor).

It starts the framework's scripts and reads their files, nothing more. Importing this
is cheap: what is asked for by name brings its module.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlab.research.tool import Context, Result, Tool, tool
from jaxlab.research.types import AgentSpec, Budget, Ref, ToolError

if TYPE_CHECKING:
    from jaxlab.research.driver import Ending, Settings
    from jaxlab.research.model import ModelOptions
    from jaxlab.research.study import replay, resume, run, say, status

_LATER = {
    "Ending": "driver",
    "ModelOptions": "model",
    "Settings": "driver",
    "replay": "study",
    "resume": "study",
    "run": "study",
    "say": "study",
    "status": "study",
}

__all__ = [
    "AgentSpec",
    "Budget",
    "Context",
    "Ending",
    "ModelOptions",
    "Ref",
    "Result",
    "Settings",
    "Tool",
    "ToolError",
    "replay",
    "resume",
    "run",
    "say",
    "status",
    "tool",
]


def __getattr__(name: str) -> Any:
    """Imports the module of a name when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
