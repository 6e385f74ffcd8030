"""What a run shows of itself: TensorBoard, lines, and a live table."""

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.rl.cluster import STATES
from jaxlab.rl.config import RLRun
from jaxlab.rl.hub import Hub
from jaxlab.rl.trajectory import Trajectory


class Report:
    """Turns totals into figures of the time since the last ones.

    Args:
        run: what is run.
    """

    def __init__(self, run: RLRun) -> None:
        self.run = run
        self.rewards = {task: deque(maxlen=64) for task in run.envs.tasks}
        self.lengths: deque[int] = deque(maxlen=256)
        self.capped: deque[bool] = deque(maxlen=256)
        self.stored = self.consumed = self.injected = 0
        self._last: dict[str, float] = {}
        self._at = time.monotonic()

    def stored_trajectories(self, trajectories: Iterable[Trajectory]) -> None:
        """Counts what has newly been stored."""
        for one in trajectories:
            self.stored += 1
            self.lengths.append(one.length)
            self.capped.append(one.cap_truncated)
            if not one.cap_truncated or one.reward > 0:
                self.rewards.setdefault(one.task, deque(maxlen=64)).append(one.reward)

    def trained(self, figures: Mapping[str, float]) -> None:
        """Counts what an update has used."""
        self.injected += int(figures["injected"])
        self.consumed += int(figures["trajectories"] - figures["injected"])

    def success(self) -> dict[str, float]:
        """Mean reward of each task's newest rollouts."""
        return {t: sum(r) / len(r) for t, r in self.rewards.items() if r}

    def scalars(self, hub: Hub) -> dict[str, float]:
        """Figures since the last call, by TensorBoard's names."""
        totals = {**hub.utilisation()}
        hosts, workers = hub.hosts.total(), hub.workers.total()
        totals |= {"steps": hosts.get("steps", 0.0), "rollouts": float(self.stored)}
        totals |= {f"worker_{k}": v for k, v in workers.items()}
        now = time.monotonic()
        seconds, self._at = max(now - self._at, 1e-9), now
        since = {k: max(v - self._last.get(k, 0.0), 0.0) for k, v in totals.items()}
        self._last = totals
        spent = max(sum(since[state] for state in STATES), 1e-9)
        values = {f"rl/env_{state}": since[state] / spent for state in STATES}
        batches = max(since.get("worker_batches", 0.0), 1.0)
        values |= {
            "rl/env_utilisation": (since["busy"] + since["reset"]) / spent,
            "rl/worker_utilisation": since.get("worker_busy", 0.0)
            / (seconds * self.run.rollout.workers),
            "rl/worker_batch": since.get("worker_rows", 0.0) / batches,
            "rl/actions_per_minute": 60 * since["steps"] / seconds,
            "rl/trajectories_per_minute": 60 * since["rollouts"] / seconds,
            "rl/consumed_share": self.consumed / max(self.stored, 1),
            "rl/injected_share": self.injected / max(self.consumed + self.injected, 1),
        }
        if self.lengths:
            values["rl/length"] = sum(self.lengths) / len(self.lengths)
            values["rl/cap_truncated"] = sum(self.capped) / len(self.capped)
        success = self.success()
        values |= {f"rl/success/{task}": rate for task, rate in success.items()}
        if success:
            values["rl/success"] = sum(success.values()) / len(success)
        return values


def strip(trajectory: Trajectory, most: int = 8) -> np.ndarray:
    """An episode as one image: what was seen, left to right; uint8 [h, w, 3].

    The last frame is after the last action; of a long episode the first `most`.
    """
    frames = [*trajectory.images[:most], trajectory.final]
    gap = np.full((frames[0].shape[0], 2, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (frame, gap)]
    return np.concatenate(parts[:-1], axis=1)


def describe(trajectory: Trajectory) -> str:
    """An episode's task, instruction, tokens, and what came of it, as Markdown."""
    one = trajectory
    actions = [" ".join(map(str, row[row >= 0])) for row in one.tokens]
    listed = "\n".join(f"{t + 1}. `{action}`" for t, action in enumerate(actions))
    return (
        f"{one.task}, seed {one.seed}: {one.text}\n\n{listed}\n\n"
        f"reward {one.reward:.2f}, versions {one.version.min()} to {one.version.max()}"
    )


def table(rows: Sequence[tuple[str, str]]) -> Any:
    """A table for `rich.live`."""
    from rich.table import Table

    made = Table.grid(padding=(0, 2))
    for name, value in rows:
        made.add_row(f"[bold]{name}[/bold]", value)
    return made


def rows(hub: Hub, report: Report, step: int) -> list[tuple[str, str]]:
    """What the live table says."""
    run, slots = report.run, hub.slots.values()
    working = sum(slot.ticket is not None for slot in slots)
    serving = hub.router.serving()
    versions = sorted(w.version for w in hub.router.workers.values())
    success = [f"{task} {rate:.2f}" for task, rate in report.success().items()]
    return [
        ("update", f"{step} of {run.steps}, version {hub.version}"),
        ("success", ", ".join(success) or "-"),
        ("rollouts", f"{report.stored} stored, {report.consumed} trained"),
        ("environments", f"{working} of {run.envs.hosts * run.envs.slots} at work"),
        ("workers", f"{serving} of {run.rollout.workers} serve, versions {versions}"),
    ]
