"""What the transformation needs of JAX's insides: jax 0.10.2 to 0.12.0.1."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
from jax._src import source_info_util
from jax.extend import core, linear_util

JAXPRS = (core.Jaxpr, core.ClosedJaxpr)
"""one class in jax 0.12"""


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    """A jaxpr, closed or not, and its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def trace(fn: Callable[..., Any], args: Any, like: Any) -> Any:
    """The jaxpr of fn at the types of args, closed if `like` is."""
    closed = jax.make_jaxpr(fn)(*args)
    if isinstance(closed, type(like)):
        return closed
    inner, consts = opened(closed)
    assert not consts, "a body without constants got some"
    return inner


@contextlib.contextmanager
def at(eqn: Any):
    """Binds as where the equation stood: its name stack, traceback and settings."""
    info = source_info_util
    names = info.current_name_stack() + eqn.source_info.name_stack
    traceback = eqn.source_info.traceback
    with info.user_context(traceback, name_stack=names), eqn.ctx.manager:
        yield


def bind(eqn: Any, args: list[Any], params: dict[str, Any]) -> list[Any]:
    """What an equation computes, with these parameters in place of its own."""
    params = eqn.primitive.get_bind_params(params)
    found = eqn.primitive.bind(*args, **params)
    return list(found) if eqn.primitive.multiple_results else [found]


def bind_changed(
    eqn: Any,
    args: list[Any],
    change: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> list[Any]:
    """What a function with derivatives of its own computes, each of these changed."""

    @linear_util.transformation2
    def changed(f, *args):
        return change(f)(*args)

    params = eqn.primitive.get_bind_params(eqn.params)
    params["subfuns"] = tuple(changed(f) for f in params["subfuns"])
    return list(eqn.primitive.bind(*args, **params))


def where(eqn: Any) -> str:
    """File, line and function that made an equation; below this folder from here."""
    text = source_info_util.summarize(eqn.source_info)
    return text.removeprefix(os.path.join(os.getcwd(), ""))
