"""Limits that no model can talk its way past: pure functions of the state."""

import dataclasses
import re

from jaxlab.errors import ConfigError
from jaxlab.research.journal import canonical
from jaxlab.research.state import Call, Outcome, Reply, Session, Usage
from jaxlab.research.types import Budget

REPEATS = 3
"""times that a call may be made with the same result"""
FRUITLESS = 5
"""calls in a row that were refused or failed, after which an agent is stuck"""
ROUNDS = 2
"""refused finishes without any progress between, after which the gates have failed"""


UNITS = {
    "wall": {"s": 1, "m": 60, "h": 3600, "d": 86400},
    "tokens": {"k": 10**3, "m": 10**6},
    "disk": {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12},
}


def parse_budget(text: str) -> Budget:
    """A budget from `runs=12,wall=30m,tokens=500k,usd=2,disk=4g`.

    Raises:
        ConfigError: an unknown name or unit, or no number.
    """
    fields = {f.name: f for f in dataclasses.fields(Budget)}
    values: dict[str, int | float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, amount = item.partition("=")
        if name not in fields:
            raise ConfigError(
                f"--budget {item!r}: limits are {', '.join(fields)}, "
                "as in runs=12,wall=30m"
            )
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)([a-z]?)", amount.strip().lower())
        units = UNITS.get(name, {})
        if not found or (found[2] and found[2] not in units):
            known = f" and a unit of {', '.join(units)}" if units else ""
            raise ConfigError(f"--budget {item!r}: give a number{known}")
        value = float(found[1]) * units.get(found[2], 1)
        values[name] = value if name in ("usd", "wall") else int(value)
    return Budget(**values)  # pyright: ignore[reportArgumentType]


def spent(usage: Usage, disk: int, budget: Budget) -> str | None:
    """Which limit is reached, in words; None: none."""
    tokens = usage.tokens_in + usage.tokens_out
    for name, have, limit in (
        ("tokens", tokens, budget.tokens),
        ("usd", usage.usd, budget.usd),
        ("wall", usage.wall, budget.wall),
        ("disk", disk, budget.disk),
        ("turns", usage.requests, budget.turns),
    ):
        if limit is not None and have >= limit:
            return f"{name}: {have:.6g} of {limit:.6g}"
    return None


def stuck(session: Session, last_progress: int) -> str | None:
    """Why an agent gets nowhere, in words; None: it may go on.

    Args:
        session: its session.
        last_progress: number of the last event that changed more than the transcript.
    """
    entries = session.entries[session.forgiven :]
    ends = [e for e in entries if isinstance(e, Outcome)]
    refused = [e for e in ends if e.call.tool == "finish" and e.event > last_progress]
    if len(refused) > ROUNDS:
        return f"asked to finish {len(refused)} times without mending anything"
    replies = [e for e in entries if isinstance(e, Reply)][-REPEATS:]
    if len(replies) == REPEATS and not any(r.calls for r in replies):
        return f"called no tool in {REPEATS} turns"
    tail = ends[-FRUITLESS:]
    if len(tail) == FRUITLESS and all(e.status in ("error", "refused") for e in tail):
        return f"{FRUITLESS} calls in a row failed or were refused"
    return None


def silent(session: Session) -> bool:
    """Whether the last turn called nothing, with nothing said since."""
    last = session.entries[-1] if session.entries else None
    return isinstance(last, Reply) and not last.calls


def repeats(session: Session, call: Call) -> int:
    """How often this call ended with one same result, counted from the last time."""
    same = [
        e
        for e in session.entries
        if isinstance(e, Outcome)
        and (e.call.tool, e.call.args) == (call.tool, call.args)
        and e.status != "refused"
    ]
    count = 0
    for outcome in reversed(same):
        if canonical(outcome.result) != canonical(same[-1].result):
            break
        count += 1
    return count
