"""What keeps a run folder in order: blobs that nobody needs any more."""

from jaxlab.rl.store import Store


def sweep(store: Store) -> int:
    """Removes blobs that no row speaks of, as a kill leaves them; their number.

    For a coordinator that starts: nothing else may be writing.
    """
    known = {
        row[0]
        for table in ("trajectory", "experience")
        for row in store.database.query(f"SELECT path FROM {table}")
    }
    gone = 0
    for path in (store.folder / "blobs").rglob("*"):
        if path.is_file() and str(path.relative_to(store.folder)) not in known:
            path.unlink()
            gone += 1
    return gone


def prune(store: Store, keep: int, most: int = 500) -> int:
    """Removes blobs of trajectories that are done with; their rows stay.

    Args:
        store: of the run.
        keep: newest rollouts whose blobs stay, to be replayed; those in the
            experience pool stay, too.
        most: blobs to remove now.

    Returns:
        how many were removed.
    """
    with store.database.transaction() as t:
        rows = t.all(
            "SELECT rollout, path FROM trajectory JOIN grouping"
            " ON grouping.id = trajectory.grouping WHERE path IS NOT NULL"
            " AND rollout <= (SELECT MAX(rollout) FROM trajectory) - ?"
            " AND grouping.state IN ('USED', 'STALE', 'REJECTED')"
            " AND path NOT IN (SELECT path FROM experience)"
            " ORDER BY rollout LIMIT ?",
            *(keep, most),
        )
        t.many(
            "UPDATE trajectory SET path = NULL WHERE rollout = ?",
            [row[:1] for row in rows],
        )
    for _, path in rows:
        (store.folder / path).unlink(missing_ok=True)
    return len(rows)
