"""What agents report, checked and on the supervisor's clock."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from signal import SIGABRT
from typing import Any

import numpy as np

from jaxlab.health.detect import Board, Phase, RankSample, Window, align

UNHEARD = 64
"""steps that others have told of, and a rank not, when it counts as absent"""


@dataclass
class Agent:
    """What is known of a host."""

    sender: bytes
    """where messages go; another after each connection"""
    instance: str
    """tells an agent from a later one on the same host"""
    slots: int
    address: str
    probe: int
    """port of its listener"""
    port: int
    """that is free for JAX's coordinator"""
    running: list[tuple[int, int]]
    """generation and rank of its workers, when it said hello"""
    heard: float
    """when it last reported"""


def _whole(value: Any) -> int:
    """A whole number that fits into an array of them."""
    if not isinstance(value, int) or abs(value) >= 2**53:
        raise ValueError(f"no count: a {type(value).__name__}")
    return int(value)


def _real(value: Any) -> float:
    """A number, neither infinite nor NaN."""
    if not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(f"no finite number of seconds: a {type(value).__name__}")
    return float(value)


def read_hello(sender: bytes, body: Mapping[str, Any], now: float) -> Agent:
    """An agent that presents itself.

    Raises:
        KeyError, TypeError, ValueError: the message is not as it should be.
    """
    return Agent(
        sender,
        str(body["instance"]),
        _whole(body["slots"]),
        str(body["address"]),
        _whole(body["probe"]),
        _whole(body["port"]),
        [(_whole(g), _whole(rank)) for g, rank in body["running"]],
        now,
    )


def read_row(
    row: Mapping[str, Any], now: float
) -> tuple[dict[str, Any], list[RankSample]]:
    """A worker's line of a report.

    Args:
        row: of the agent; ages in seconds.
        now: of the clock that the result's times are on.

    Raises:
        KeyError, TypeError, ValueError: the line is not as it should be.
    """
    code = row["code"]
    kept: dict[str, Any] = {
        "code": None if code is None else _whole(code),
        "stopped": bool(row["stopped"]),
        "pid": _whole(row["pid"]),
        "told": now,
    }
    if "heartbeat" not in row:
        return kept, []
    kept |= {name: now - _real(row[name]) for name in ("heartbeat", "progress")}
    names = ("enter_seq", "exit_seq", "phase", "step")
    kept |= {name: _whole(row[name]) for name in names}
    Phase(kept["phase"])
    samples = []
    for step, start, enter, leave, phase, paused in row["samples"]:
        times = _real(start), _real(enter), _real(leave)
        numbers = _whole(phase), _real(paused)
        samples.append(RankSample(_whole(step), *times, *numbers))
    return kept, samples


def take_window(logs: dict[int, list[RankSample]]) -> Window | None:
    """The steps that all ranks have told of, which it takes out of the logs.

    Reports come rank by rank, so of the newest step some have not told yet. Without the
    wait they would count as absent from it.

    Args:
        logs: by rank; it is changed.

    Returns:
        None where there is no such step.
    """
    most = max(map(len, logs.values()), default=0)
    if not most or (most < UNHEARD and not all(logs.values())):
        return None
    window = align(logs)
    assert window.number is not None
    if not len(window.number):
        return None
    newest = int(window.number[-1])
    for rank, log in logs.items():
        logs[rank] = [sample for sample in log if sample.step > newest]
    return window


def board_of(
    rows: Mapping[int, Mapping[str, Any]], n: int, began: float, now: float
) -> Board:
    """The newest line of each of n ranks as arrays.

    A rank is as old as it was when the agent last told: a report that is late does not
    make a process frozen.

    Args:
        rows: by rank, of `read_row`; a rank that is missing has not reported yet.
        n: ranks.
        began: when this generation was started.
        now: of the same clock.
    """
    lines = [rows.get(rank, {}) for rank in range(n)]
    late = np.array([now - line.get("told", now) for line in lines])

    def column(name: str, default: Any, kind: type = float) -> np.ndarray:
        return np.array([line.get(name, default) for line in lines], kind)

    codes = [line.get("code") for line in lines]
    phase = column("phase", Phase.STARTING, int)
    return Board(
        alive=np.array([code is None for code in codes]),
        stopped=column("stopped", False, bool),
        heartbeat=column("heartbeat", np.nan) + late,
        progress=column("progress", began) + late,
        enter_seq=column("enter_seq", 0, int),
        exit_seq=column("exit_seq", 0, int),
        phase=np.where([code == 0 for code in codes], Phase.DONE, phase),
        step=column("step", -1, int),
    )


def died_first(codes: Mapping[int, int]) -> tuple[int, ...]:
    """Ranks of which it is sure that they did not end because another had.

    A signal ended them, and not one that JAX raises. A rank whose peer is gone follows
    soon: its collective fails (exit code above 0), or JAX aborts it. Reports of several
    hosts come in any order.

    Args:
        codes: by rank, not 0.
    """
    own = (rank for rank, code in codes.items() if code < 0 and code != -SIGABRT)
    return tuple(sorted(own))


def untold(rows: Mapping[int, Mapping[str, Any]], n: int, since: float) -> list[int]:
    """Ranks that no report has mentioned since then."""
    return [r for r in range(n) if rows.get(r, {}).get("told", -math.inf) < since]


def read_delays(cells: Any) -> np.ndarray:
    """Seconds of links, float64 [n] or [n, n].

    In JSON None is what was not measured, and "inf" what did not answer.

    Raises:
        TypeError, ValueError: these are no such numbers.
    """

    def number(cell: Any, depth: int = 0) -> Any:
        if isinstance(cell, list) and depth < 2:
            return [number(c, depth + 1) for c in cell]
        if cell is None or cell == "inf":
            return math.nan if cell is None else math.inf
        return _real(cell)

    return np.array(number(cells), float)


def told_delays(delay: np.ndarray) -> list[Any]:
    """The other way: JSON, which has neither NaN nor infinity."""

    def told(cell: Any) -> Any:
        if isinstance(cell, list):
            return [told(c) for c in cell]
        return None if math.isnan(cell) else "inf" if math.isinf(cell) else cell

    return told(np.asarray(delay, float).tolist())
