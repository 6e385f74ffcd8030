"""What the trajectory store tells: for the coordinator, for TensorBoard, for a page."""

from jaxlab.rl.database import Database
from jaxlab.rl.tables import TaskStats, Version


def latest(database: Database) -> Version | None:
    """The newest weights."""
    rows = database.query(
        "SELECT version, step, path, sha256 FROM checkpoint"
        " ORDER BY version DESC LIMIT 1"
    )
    return Version(*rows[0]) if rows else None


def task_stats(database: Database, task: str, window: int = 64) -> TaskStats:
    """The newest rollouts of a task, for `curation.success_rate`."""
    rows = database.query(
        "SELECT reward, cap_truncated FROM trajectory WHERE task = ?"
        " ORDER BY rollout DESC LIMIT ?",
        *(task, window),
    )[::-1]
    longest = database.query("SELECT longest FROM task WHERE task = ?", task)
    return TaskStats(
        [row[0] for row in rows],
        [bool(row[1]) for row in rows],
        longest[0][0] if longest else None,
    )


def group_counts(database: Database) -> dict[str, int]:
    """Groups by state."""
    return dict(database.query("SELECT state, COUNT(*) FROM grouping GROUP BY state"))


def pending(database: Database) -> list[tuple[str, str, int, int]]:
    """Task, state, groups and rollouts of all that is not yet trained or dropped."""
    return database.query(
        "SELECT task, state, COUNT(*), SUM(size) FROM grouping"
        " WHERE state IN ('OPEN', 'READY', 'LEASED') GROUP BY task, state"
    )


def groups_begun(database: Database) -> dict[str, int]:
    """Groups of each task, in whatever state."""
    return dict(database.query("SELECT task, COUNT(*) FROM grouping GROUP BY task"))


def paused(database: Database) -> set[str]:
    """Tasks that a person has paused."""
    return {row[0] for row in database.query("SELECT task FROM task WHERE paused = 1")}


def largest_lag(database: Database) -> int | None:
    """Versions by which the oldest step that was trained was behind; None: no step."""
    rows = database.query(
        "SELECT MAX(lease.version - step.version) FROM lease"
        " JOIN grouping ON grouping.lease = lease.id"
        " JOIN trajectory ON trajectory.grouping = grouping.id AND trajectory.stale = 0"
        " JOIN step ON step.rollout = trajectory.rollout"
    )
    return rows[0][0]
