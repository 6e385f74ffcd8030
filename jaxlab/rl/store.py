"""The trajectory store: who did which rollout, what came of it, and who learnt from it.

    rollout     QUEUED -> RUNNING -> DONE | FAILED      (died: QUEUED again)
    group       OPEN -> READY -> LEASED -> TRAINED -> USED
                              -> STALE | REJECTED       OPEN -> FAILED
    checkpoint  PUBLISHED, and from when on its state is saved for a restart

A group is ready when all its rollouts have ended. A learner leases groups, trains
them and publishes the new weights (TRAINED). When the state that has learnt from them
is saved, one transaction says so and makes them USED. A learner that dies in between
goes on from the last saved state, and all that it had learnt from since is READY again:
the model that comes out has seen each trajectory at most once.

A trajectory's blob is on disk, synced, before its row is written; blobs without a row
are swept away at the start. Versions are integers, stamped on every step; they never
repeat, not even when a learner starts again from an older state.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlab.rl.database import Transaction, connect
from jaxlab.rl.tables import (
    TABLES,
    Choice,
    Lease,
    Member,
    Stored,
    Ticket,
)
from jaxlab.rl.trajectory import Trajectory, decode, encode, read_blob, write_blob

Choose = Callable[[int, str, Sequence[float], Callable[[], list[Stored]]], Choice]


class Store:
    """The store of a run, for one thread; any number may be open, in any process.

    A context manager that closes it.

    Args:
        folder: the run's; gets `store.db` and `blobs/`.
        address: postgresql://..., or None for SQLite.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        folder: str | Path,
        address: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self._clock = Path(folder), clock
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.database = connect(
            address or self.folder / "store.db", schema_name(folder), TABLES
        )

    def close(self) -> None:
        """Closes the connection."""
        self.database.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------- rollouts

    def add_group(
        self,
        task: str,
        seed: int | Sequence[int],
        caps: Sequence[tuple[int, bool]],
        version: int,
    ) -> list[Ticket]:
        """Queues the rollouts of a group, one for each (cap, is probe).

        Args:
            task: of all of them.
            seed: of all of them, or one for each.
            caps: steps at most, and whether this rollout is a probe.
            version: that is newest now.
        """
        seeds = [seed] * len(caps) if isinstance(seed, int) else list(seed)
        with self.database.transaction() as t:
            t.run("INSERT INTO task (task) VALUES (?) ON CONFLICT DO NOTHING", task)
            t.run("UPDATE task SET target = ? WHERE task = ?", len(caps), task)
            [(group,)] = t.all(
                "INSERT INTO grouping (task, seed, size, open, state, version, created)"
                " VALUES (?, ?, ?, ?, 'OPEN', ?, ?) RETURNING id",
                *(task, seeds[0], len(caps), len(caps), version, self._clock()),
            )
            tickets = []
            for (cap, probe), own in zip(caps, seeds, strict=True):
                [(rollout,)] = t.all(
                    "INSERT INTO rollout (grouping, task, seed, cap, probe, state)"
                    " VALUES (?, ?, ?, ?, ?, 'QUEUED') RETURNING id",
                    *(group, task, own, cap, int(probe)),
                )
                tickets.append(Ticket(rollout, group, task, own, cap, probe))
        return tickets

    def queued(self) -> list[Ticket]:
        """Rollouts that wait, oldest first."""
        rows = self.database.query(
            "SELECT id, grouping, task, seed, cap, probe FROM rollout"
            " WHERE state = 'QUEUED' ORDER BY id"
        )
        return [Ticket(*row)._replace(probe=bool(row[5])) for row in rows]

    def start(self, rollout: int, slot: str) -> None:
        """Notes that an environment has begun a rollout."""
        with self.database.transaction() as t:
            t.run(
                "UPDATE rollout SET state = 'RUNNING', slot = ?, started = ?,"
                " attempts = attempts + 1 WHERE id = ? AND state = 'QUEUED'",
                *(slot, self._clock(), rollout),
            )

    def put(self, trajectory: Trajectory, experience: int | None = None) -> bool:
        """Stores a finished rollout, once, however often it is handed in.

        Args:
            trajectory: whose rollout is in the store.
            experience: successes of a task to keep in the pool; None: a success does
                not go there.

        Returns:
            Whether it was new.
        """
        path, sha256 = self.write(encode(trajectory), trajectory.id)
        return self.record(trajectory, path, sha256, experience)

    def write(self, blob: bytes, rollout: int) -> tuple[str, str]:
        """The first half of `put`: the blob on disk; its path and sha256."""
        stem = f"blobs/{rollout // 1000:05d}/{rollout}"
        return write_blob(self.folder, stem, blob)

    def record(
        self, trajectory: Trajectory, path: str, sha256: str, experience: int | None
    ) -> bool:
        """The second half of `put`: its rows."""
        one, rollout = trajectory, trajectory.id
        steps = [
            (rollout, t, int(one.version[t]), int(one.worker[t]), int(chosen.sum()))
            + (float(one.logp[t][chosen].sum()), float(one.entropy[t][chosen].mean()))
            for t, chosen in enumerate(one.mask)
        ]
        with self.database.transaction() as t:
            taken = t.all(
                "UPDATE rollout SET state = 'DONE', finished = ? WHERE id = ?"
                " AND state NOT IN ('DONE', 'FAILED') RETURNING grouping",
                *(self._clock(), rollout),
            )
            if taken:
                [(group,)] = taken
                t.run(
                    "INSERT INTO trajectory (rollout, grouping, task, seed, reward,"
                    " steps, v_min, v_max, cap_truncated, probe, path, sha256, created)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    *(rollout, group, one.task, one.seed, one.reward, one.length),
                    *(int(one.version.min()), int(one.version.max())),
                    *(int(one.cap_truncated), int(one.probe), path, sha256),
                    self._clock(),
                )
                t.many("INSERT INTO step VALUES (?, ?, ?, ?, ?, ?, ?)", steps)
                self._end_of_rollout(t, group)
                if one.reward > 0:
                    self._remember(t, one, path, sha256, experience)
                return True
            known = t.all("SELECT path FROM trajectory WHERE path = ?", path)
        if not known:
            (self.folder / path).unlink(missing_ok=True)
        return False

    def fail(self, rollout: int, error: str, attempts: int) -> bool:
        """A rollout died with its environment: it is queued again, or given up.

        Args:
            rollout: that was running.
            error: why it died.
            attempts: how often it may be begun.

        Returns:
            Whether it is queued again. One that has a trajectory stays as it is.
        """
        with self.database.transaction() as t:
            found = t.all(
                "UPDATE rollout SET error = ?, state = CASE WHEN attempts < ?"
                " THEN 'QUEUED' ELSE 'FAILED' END WHERE id = ? AND state = 'RUNNING'"
                " RETURNING grouping, state",
                *(error[:500], attempts, rollout),
            )
            if found and found[0][1] == "FAILED":
                self._end_of_rollout(t, found[0][0])
            self._note(t, "rollout_died", {"rollout": rollout, "error": error[:500]})
            return bool(found) and found[0][1] == "QUEUED"

    def requeue(self) -> list[int]:
        """Queues what was running when the last coordinator died; for a new one."""
        with self.database.transaction() as t:
            rows = t.all(
                "UPDATE rollout SET state = 'QUEUED' WHERE state = 'RUNNING'"
                " RETURNING id"
            )
        return [row[0] for row in rows]

    def _end_of_rollout(self, t: Transaction, group: int) -> None:
        t.run(
            "UPDATE grouping SET open = open - 1 WHERE id = ? AND state = 'OPEN'", group
        )
        t.run(
            "UPDATE grouping SET state = CASE WHEN EXISTS (SELECT 1 FROM trajectory"
            " WHERE grouping = ?) THEN 'READY' ELSE 'FAILED' END"
            " WHERE id = ? AND state = 'OPEN' AND open = 0",
            *(group, group),
        )

    # -------------------------------------------------------------- learner

    def lease(
        self,
        count: int,
        version: int,
        max_lag: int,
        choose: Choose,
        *,
        consumer: str,
        seconds: float = 60.0,
        smallest: int = 2,
        least: int | None = None,
    ) -> Lease | None:
        """Takes groups to train, oldest first; all `count` of them, or none.

        Args:
            count: groups wanted.
            version: that the learner holds; steps older than `version - max_lag`
                make their trajectory stale.
            max_lag: versions.
            choose: says of a group, by its id, task and rewards (and, when it asks for
                them, the task's stored successes), whether it is worth training.
            consumer: the learner's name.
            seconds: until the lease expires unless renewed.
            smallest: trajectories that a group needs.
            least: groups that will do where `count` are not there; None: no fewer.
        """
        with self.database.transaction() as t:
            self._expire(t)
            ready = t.all(
                "SELECT id, task FROM grouping WHERE state = 'READY' ORDER BY id"
                + t.skip_locked
            )
            chosen: list[tuple[int, list[Member], Stored | None]] = []
            for group, task in ready:
                t.run(
                    "UPDATE trajectory SET stale = 1 WHERE grouping = ? AND v_min < ?",
                    *(group, version - max_lag),
                )
                members = [
                    Member(*row)
                    for row in t.all(
                        "SELECT rollout, reward, steps, path, sha256 FROM trajectory"
                        " WHERE grouping = ? AND stale = 0 ORDER BY rollout",
                        group,
                    )
                ]
                state = "STALE"
                if len(members) >= smallest:
                    rewards = [member.reward for member in members]
                    choice = choose(
                        group, task, rewards, lambda task=task: _pool(t, task)
                    )
                    if choice.keep:
                        chosen.append((group, members, choice.inject))
                        if len(chosen) == count:
                            break
                        continue
                    state = "REJECTED"
                t.run("UPDATE grouping SET state = ? WHERE id = ?", state, group)
            if len(chosen) < (count if least is None else least):
                return None
            [(lease,)] = t.all(
                "INSERT INTO lease (consumer, version, expires, state, created)"
                " VALUES (?, ?, ?, 'LEASED', ?) RETURNING id",
                *(consumer, version, self._clock() + seconds, self._clock()),
            )
            for group, _, extra in chosen:
                t.run(
                    "UPDATE grouping SET state = 'LEASED', lease = ? WHERE id = ?",
                    *(lease, group),
                )
                if extra is not None:
                    t.run(
                        "INSERT INTO injection VALUES (?, ?, ?)", lease, group, extra.id
                    )
                    t.run(
                        "UPDATE experience SET injected = injected + 1 WHERE id = ?",
                        extra.id,
                    )
        return Lease(
            lease, tuple((*m, *([] if x is None else [x])) for _, m, x in chosen)
        )

    def publish(
        self, version: int, step: int, path: str, sha256: str, lease: int | None = None
    ) -> None:
        """Makes weights known whose file is on disk, with what they have learnt from.

        Raises:
            KeyError: the lease is no longer held, so its groups may be another's.
        """
        with self.database.transaction() as t:
            if lease is not None:
                held = t.run(
                    "UPDATE lease SET state = 'TRAINED' WHERE id = ?"
                    " AND state = 'LEASED'",
                    lease,
                )
                if not held:
                    raise KeyError(f"lease {lease} has expired")
                t.run("UPDATE grouping SET state = 'TRAINED' WHERE lease = ?", lease)
            t.run(
                "INSERT INTO checkpoint (version, step, path, sha256, created)"
                " VALUES (?, ?, ?, ?, ?)",
                *(version, step, path, sha256, self._clock()),
            )

    def acknowledge(self, version: int, consumer: str) -> int:
        """The state behind a version is saved: what it has learnt from is used up.

        Returns:
            Groups that are now USED, in the transaction that marks the checkpoint.
        """
        with self.database.transaction() as t:
            t.run("UPDATE checkpoint SET saved = 1 WHERE version = ?", version)
            leases = "(SELECT id FROM lease WHERE consumer = ? AND state = 'TRAINED'"
            leases += " AND version < ?)"
            used = t.run(
                f"UPDATE grouping SET state = 'USED' WHERE lease IN {leases}",
                *(consumer, version),
            )
            t.run(
                "UPDATE lease SET state = 'USED' WHERE consumer = ?"
                " AND state = 'TRAINED' AND version < ?",
                *(consumer, version),
            )
            return used

    def renew(self, consumer: str, seconds: float = 60.0) -> None:
        """Puts off the end of a learner's leases."""
        with self.database.transaction() as t:
            t.run(
                "UPDATE lease SET expires = ? WHERE consumer = ?"
                " AND state IN ('LEASED', 'TRAINED')",
                *(self._clock() + seconds, consumer),
            )

    def release(self, consumer: str) -> int:
        """Gives back all that a learner holds or has not saved; groups given back."""
        with self.database.transaction() as t:
            return _release(t, "consumer = ?", consumer)

    def expire(self) -> int:
        """Gives back what is held by learners that did not renew; groups."""
        with self.database.transaction() as t:
            return self._expire(t)

    def _expire(self, t: Transaction) -> int:
        return _release(t, "expires < ?", self._clock())

    # ---------------------------------------------------- blobs and experience

    def load(self, entry: Member | Stored) -> Trajectory:
        """The trajectory of an entry.

        Raises:
            ValueError: its blob is not the one that was stored.
            FileNotFoundError: it is gone.
        """
        return decode(read_blob(self.folder / entry.path, entry.sha256))

    def add_experience(self, trajectory: Trajectory, per_task: int = 16) -> bool:
        """Puts a success into the pool: a demonstration, or one of another run.

        Args:
            trajectory: with a reward above 0.
            per_task: successes to keep of a task, as `curation.pool_add` chooses.

        Returns:
            Whether it was new.

        Raises:
            ValueError: it is no success.
        """
        if not trajectory.reward > 0:
            raise ValueError(f"a reward of {trajectory.reward} is no success")
        blob = encode(trajectory)
        stem = f"blobs/experience/{trajectory.source}"
        path, sha256 = write_blob(self.folder, stem, blob)
        with self.database.transaction() as t:
            task = trajectory.task
            t.run("INSERT INTO task (task) VALUES (?) ON CONFLICT DO NOTHING", task)
            return self._remember(t, trajectory, path, sha256, per_task)

    def experience(self, task: str) -> list[Stored]:
        """The pool of a task, in the order added."""
        with self.database.transaction() as t:
            return _pool(t, task)

    def _remember(
        self, t: Transaction, one: Trajectory, path: str, sha256: str, keep: int | None
    ) -> bool:
        t.run(
            "UPDATE task SET longest = ? WHERE task = ?"
            " AND (longest IS NULL OR longest < ?)",
            *(one.length, one.task, one.length),
        )
        if keep is None:
            return False
        new = t.run(
            "INSERT INTO experience (task, source, version, steps, path, sha256,"
            " created) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            *(one.task, one.source, int(one.version.min()), one.length, path, sha256),
            self._clock(),
        )
        # As curation.pool_add: the policy renews its own successes, oldest first.
        t.run(
            "DELETE FROM experience WHERE id IN (SELECT id FROM experience"
            " WHERE task = ? ORDER BY CASE WHEN source = 'self' THEN 1 ELSE 0 END,"
            " version DESC, id DESC LIMIT 1000000 OFFSET ?)",
            *(one.task, keep),
        )
        return bool(new)

    # ------------------------------------------------------ tasks and events

    def pause(self, task: str, paused: bool = True) -> None:
        """Pauses a task, or lets it go on: no rollout of it begins."""
        with self.database.transaction() as t:
            t.run("INSERT INTO task (task) VALUES (?) ON CONFLICT DO NOTHING", task)
            t.run("UPDATE task SET paused = ? WHERE task = ?", int(paused), task)

    def note(self, kind: str, **body: Any) -> None:
        """Adds an event."""
        with self.database.transaction() as t:
            self._note(t, kind, body)

    def _note(self, t: Transaction, kind: str, body: Mapping[str, Any]) -> None:
        text = json.dumps(body)
        t.run(
            "INSERT INTO event (at, kind, body) VALUES (?, ?, ?)",
            *(self._clock(), kind, text),
        )


def _pool(t: Transaction, task: str) -> list[Stored]:
    return [
        Stored(*row)
        for row in t.all(
            "SELECT id, task, source, version, injected, steps, path, sha256"
            " FROM experience WHERE task = ? ORDER BY id",
            task,
        )
    ]


def _release(t: Transaction, which: str, value: Any) -> int:
    leases = f"(SELECT id FROM lease WHERE state IN ('LEASED', 'TRAINED') AND {which})"
    back = t.run(
        f"UPDATE grouping SET state = 'READY', lease = NULL WHERE lease IN {leases}",
        value,
    )
    t.run(
        "UPDATE lease SET state = 'RELEASED' WHERE state IN ('LEASED', 'TRAINED')"
        f" AND {which}",
        value,
    )
    return back


def schema_name(folder: str | Path) -> str:
    """The run's schema in PostgreSQL: its folder's name, and a hash of its path."""
    path = Path(folder).absolute()
    word = re.sub(r"[^a-z0-9]+", "_", path.name.lower())[:30].strip("_")
    return f"rl_{word}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
