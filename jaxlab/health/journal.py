"""What the supervisor writes down: events, TensorBoard, goodput, the status file.

`events.jsonl` has one JSON object a line: `time` (seconds since 1970), `event`, and
what belongs to it. `status.json` is replaced about once a second and is what
`scripts/supervise.py status` shows.
"""

import collections
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO, runtime_checkable

import numpy as np

from jaxlab.files import write_text
from jaxlab.health.detect import Board, Phase, Window
from jaxlab.health.steer import Job

TIMES = ("local", "wait")
"""of a rank's step, in `Window` and in the status"""
RECENT = 6
"""events that the status shows"""


@runtime_checkable
class Writer(Protocol):
    """Where curves go: `jaxlab.metrics.Writer`, or nothing."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a step."""

    def text(self, step: int, tag: str, text: str) -> None:
        """A text."""

    def image(self, step: int, tag: str, pixels_hwc: np.ndarray) -> None:
        """A picture."""


class Downtime(NamedTuple):
    """Seconds in which the job did not advance; the rows of C4's table 3."""

    lost_work: float = 0.0
    """steps that were done twice"""
    detection: float = 0.0
    """from the last progress to the diagnosis"""
    isolation: float = 0.0
    """confirmation, probes, and the end of the old processes"""
    reinit: float = 0.0
    """from there to the first step of the new ones"""

    def plus(self, other: "Downtime") -> "Downtime":
        """The sum, row by row."""
        return Downtime(*(a + b for a, b in zip(self, other, strict=True)))


class Goodput(NamedTuple):
    """How much of the time made the model better."""

    began: float
    """of the first step, or of the job"""
    useful: float = 0.0
    """seconds of steps that were done for the first time"""
    step: int = 0
    """the furthest that was done"""
    downtime: Downtime = Downtime()

    def advanced(self, window: Window) -> "Goodput":
        """With the steps of a window, of which those done before are lost work."""
        if window.number is None or not len(window.number):
            return self
        fresh = window.number > self.step
        lost = Downtime(lost_work=float(window.step[~fresh].sum()))
        return self._replace(
            useful=self.useful + float(window.step[fresh].sum()),
            step=max(self.step, int(window.number.max())),
            downtime=self.downtime.plus(lost),
        )

    def share(self, now: float) -> float:
        """Useful time over all time."""
        return self.useful / max(now - self.began, 1e-9)


class Journal:
    """The files of a job's `health` folder."""

    def __init__(
        self,
        folder: Path,
        write: Writer | None,
        say: Callable[[str], Any],
        wall: Callable[[], float] = time.time,
        tell: Callable[[Mapping[str, Any]], Any] = lambda event: None,
    ) -> None:
        """Opens the files; what is there stays.

        Args:
            folder: of the files; made if it is not there.
            write: takes curves.
            say: takes lines for people.
            wall: seconds since 1970.
            tell: takes each event.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._events: TextIO = open(folder / "events.jsonl", "a", encoding="utf-8")
        self._status = folder / "status.json"
        self._write, self._say, self._wall, self._tell = write, say, wall, tell
        self._recent: collections.deque[str] = collections.deque(maxlen=RECENT)
        self._times: list[dict[str, float]] = []

    def event(self, event: str, step: int = 0, text: str = "", **rest: Any) -> None:
        """Writes an event; with a text, shows it to people as well."""
        row = {"time": self._wall(), "event": event, "step": step, "text": text, **rest}
        self._events.write(json.dumps(row) + "\n")
        self._events.flush()
        self._tell(row)
        if text:
            clock = time.strftime("%H:%M:%S", time.localtime(row["time"]))
            self._recent.append(f"{clock} [{event}] {text}")
            self._say(self._recent[-1])
            if self._write:
                self._write.text(step, f"health/{event}", text)

    def window(self, window: Window, goodput: Goodput, now: float) -> None:
        """Curves of some steps: means over them."""
        if window.number is None or not len(window.number):
            return
        n = window.local.shape[1]
        self._times = [
            {name: _mean(getattr(window, name), r) for name in TIMES} for r in range(n)
        ]
        if self._write is None:
            return
        values = {
            "health/step_time": float(window.step.mean()),
            "health/pure_comm": float(window.pure_comm.mean()),
            "health/goodput": goodput.share(now),
        }
        values |= {f"health/local/rank_{r}": _mean(window.local, r) for r in range(n)}
        values |= {f"health/wait/rank_{r}": _mean(window.wait, r) for r in range(n)}
        down = goodput.downtime._asdict()
        values |= {f"health/downtime/{name}": down[name] for name in down}
        self._write.scalars(int(window.number[-1]), values)

    def matrix(self, step: int, delay: np.ndarray) -> None:
        """A delay matrix: the file's numbers, and a heat map."""
        finite = [
            [x if np.isfinite(x) else None for x in row] for row in delay.tolist()
        ]
        self.event("delay", step, seconds=finite)
        if self._write is not None:
            self._write.image(step, "health/delay", heat(delay))

    def status(
        self,
        job: Job,
        board: Board,
        pids: Mapping[int, int | None],
        goodput: Goodput,
        last: str,
        now: float,
    ) -> None:
        """Replaces the status file; `last` is the last diagnosis."""
        ranks = [
            {
                "rank": rank,
                "slot": str(slot),
                "phase": int(board.phase[rank]),
                "step": int(board.step[rank]),
                "progress": float(now - board.progress[rank]),
                "pid": pids.get(rank),
            }
            for rank, slot in enumerate(job.members)
        ]
        if len(self._times) == len(ranks):
            for row, times in zip(ranks, self._times, strict=True):
                row |= {k: x for k, x in times.items() if math.isfinite(x)}
        rows = {
            "time": self._wall(),
            "state": "suspicious" if job.suspicion else "running",
            "generation": job.generation,
            "step": goodput.step,
            "goodput": goodput.share(now),
            "downtime": goodput.downtime._asdict(),
            "ranks": ranks,
            "spares": [*map(str, job.spares)],
            "evicted": [str(slot) for slot, _ in job.evicted],
            "last": last,
            "recent": [*self._recent],
        }
        write_text(self._status, json.dumps(rows))

    def close(self) -> None:
        """Closes the file of events."""
        self._events.close()


def _mean(table: np.ndarray, rank: int) -> float:
    column = table[:, rank]
    good = column[np.isfinite(column)]
    return float(good.mean()) if len(good) else float("nan")


def heat(delay: np.ndarray, cell: int = 16) -> np.ndarray:
    """A picture of a matrix of seconds, uint8 [n cell, n cell, 3].

    Dark to bright is fast to slow on a logarithmic scale; grey was not measured, red
    did not answer. Rows are sources.
    """
    finite = delay[np.isfinite(delay) & (delay > 0)]
    low, high = (finite.min(), finite.max()) if len(finite) else (1.0, 1.0)
    span = max(np.log(high / low), np.log(4.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        level = np.clip(np.log(delay / low) / span, 0, 1)
    level = np.where(np.isfinite(level), level, 0.0)
    colours = np.stack([level, level**2 * 0.9, 0.25 + 0.25 * level], -1)
    colours[np.isnan(delay)] = 0.5
    colours[np.isposinf(delay)] = (1.0, 0.0, 0.0)
    pixels = (255 * colours).round().astype(np.uint8)
    cell = max(1, min(cell, 1024 // max(len(delay), 1)))
    return pixels.repeat(cell, 0).repeat(cell, 1)


def table(status: Mapping[str, Any], now: float) -> str:
    """The status file for a terminal."""
    age = now - status["time"]
    head = (
        f"{status['state']}, generation {status['generation']}, step {status['step']}, "
        f"goodput {status['goodput']:.1%}, {age:.0f} s ago"
    )
    lines = [
        head,
        f"{'rank':>4}  {'slot':16} {'pid':>8} {'phase':11} {'step':>8} "
        f"{'arrives':>9} {'inside':>9}  last progress",
    ]
    for row in status["ranks"]:
        phase = Phase(row["phase"]).name.lower()
        own, waits = (
            f"{1e3 * row[name]:.3g} ms" if name in row else "" for name in TIMES
        )
        lines.append(
            f"{row['rank']:>4}  {row['slot']:16} {row['pid'] or '':>8} {phase:11} "
            f"{row['step']:>8} {own:>9} {waits:>9}  {row['progress']:.1f} s ago"
        )
    spare: Sequence[str] = status["spares"]
    lines.append(f"spares {', '.join(spare) or 'none'}")
    lines.append(f"evicted {', '.join(status['evicted']) or 'none'}")
    down = ", ".join(f"{k} {v:.1f} s" for k, v in status["downtime"].items())
    lines.append(f"downtime: {down}")
    lines += [f"  {line}" for line in status["recent"]]
    return "\n".join(lines)
