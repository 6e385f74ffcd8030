"""Hot snapshots: the state every few seconds, so that a fault costs seconds of work.

Checkpoints (`jaxlab.checkpoint`) are for keeping; these are only for a start after a
fault. Each process writes a part of the state in the background, and nobody waits for
the disk:

    snapshots/<step>-<process>of<processes>.snapshot
    LOCAL/<name of the run>-<its id>/<step>-<process>of<processes>-<start>.snapshot

Which process writes which shard follows from the sharding: copies of a shard are
written once, so that each of n processes writes about an n-th. In the folder that all
processes share, the steps are those that a power of two divides, the largest one that
fits into the seconds between two snapshots at the pace of this process; so processes
whose clocks disagree still write the same steps, or every other one of them.

On the hosts' own disks a lost host takes its files along. There every piece is written
in two places (`jaxlab.peer_copies`), which takes all processes at once: they agree on
the steps. The files tell which start of the run wrote them, as a host that comes back
may still have old ones.

A file is there whole or not at all, and its header lists the shards in it: leaf, range
in the global array, SHA-256. A restore takes the newest step whose shards cover every
leaf and are sound, on any mesh and number of processes.
"""

import collections
import contextlib
import functools
import json
import math
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlab import peer_copies
from jaxlab.checkpoint import compare, first_line, from_process_0, leaf_types
from jaxlab.errors import UserError
from jaxlab.files import write_text
from jaxlab.peer_copies import gathered
from jaxlab.shards import Header, placed, whole_of, write

PART = re.compile(r"(\d+)-(\d+)of(\d+)(?:-([0-9a-f]+))?\.snapshot")
PACE = 32
"""steps over which the pace is measured"""

Log = Callable[[str], Any]


class Key(NamedTuple):
    """What the files of one snapshot have in common."""

    step: int
    processes: int
    start: str
    """of the run, which wrote them; "" in a folder that all processes share"""


@dataclass
class Snapshots:
    """An open folder of snapshots; a context manager that waits for the last one.

    Attributes:
        folder: of the files.
        seconds: between two snapshots, at most; 0: none are written.
        log: takes one line when a snapshot cannot be written.
        checkpoints: their folder.
        start: names the files; "" in a folder that all processes share.
        domain: which folder each process sees, see `peer_copies.domains`.
        clock: seconds.
        times: when the last steps were done.
        following: on local disks, the step of the next one.
        work: the snapshot that is to be written.
        busy: the thread has one under way.
        thread: writes; None before the first one.
        parts: what this process writes; None before the first one.
        permuted: sends what peers write, see `peer_copies.permuted`.
    """

    folder: Path
    seconds: float
    log: Log = print
    checkpoints: Path = Path()
    start: str = ""
    domain: tuple[int, ...] = (0,)
    clock: Callable[[], float] = time.monotonic
    times: collections.deque = field(
        default_factory=functools.partial(collections.deque, maxlen=PACE + 1)
    )
    following: int = 0
    work: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    busy: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    parts: peer_copies.Plan | None = None
    permuted: Callable[..., list[Any]] | None = None

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def leads(self) -> bool:
        """Whether this process clears up in its folder."""
        return self.domain[jax.process_index()] == jax.process_index()

    def due(self, step: int) -> bool:
        """Whether to save after this step; to be asked once after each."""
        if self.seconds <= 0:
            return False
        self.times.append(self.clock())
        if len(self.times) < 3:
            return False  # the first ones compile
        if self.start:
            return step >= self.following
        every = interval(self._pace(), self.seconds)
        return step % every == 0 and not self.busy.is_set()

    def _pace(self) -> float:
        """Seconds a step."""
        if len(self.times) < 2:
            return 0.0
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    def save(self, step: int, state: Any, description: dict[str, Any]) -> None:
        """Takes the state to the host and returns; a thread writes it.

        The state may be donated once this returns. It waits for the state to be
        computed and, on an accelerator, for the copy of this process's part. On local
        disks every process has to call it, and nothing is saved while one of them is
        still busy with the last one.

        Args:
            step: how many optimizer steps the state has seen.
            state: pytree of `jax.Array`, sharded anyhow.
            description: JSON, see `checkpoint.save`.
        """
        if self.start and not self._agreed(step):
            return
        flat = jax.tree.leaves(state)
        if self.parts is None:
            self._prepare(flat)
        assert self.parts is not None
        shards = [
            (leaf, cut, flat[leaf].addressable_shards[place].data)
            for leaf, cut, place in self.parts.own
        ]
        if self.permuted is not None:
            sent = self.permuted(*(flat[leaf] for leaf in self.parts.moved))
            moved = dict(zip(self.parts.moved, sent, strict=True))
            shards += [
                (leaf, cut, moved[leaf].addressable_shards[place].data)
                for leaf, cut, place in self.parts.copies
            ]
        for _, _, data in shards:
            data.copy_to_host_async()
        # On CPU no copy but a view: a step that donates the array gets new memory.
        host = [(leaf, cut, np.asarray(data)) for leaf, cut, data in shards]
        head = Header(description, leaf_types(state), ())
        name = f"{step}-{jax.process_index()}of{jax.process_count()}"
        if self.start:
            name += f"-{self.start}"
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        self.busy.set()
        self.work.put((self.folder / f"{name}.snapshot", head, host))

    def _agreed(self, step: int) -> bool:
        """Whether no process is busy; sets when the next one is due, for all alike."""
        mine = json.dumps([self._pace(), self.busy.is_set()])
        paces, busy = zip(*map(json.loads, gathered(mine)), strict=True)
        self.following = step + interval(max(paces), self.seconds)
        return not any(busy)

    def _prepare(self, flat: list[jax.Array]) -> None:
        """Finds what this process writes, and compiles what sends to the peers."""
        self.parts = peer_copies.plan(flat, jax.process_index(), self.domain)
        if self.parts.moved:
            leaves = [flat[leaf] for leaf in self.parts.moved]
            self.permuted = peer_copies.permuted(leaves, self.domain)
        if self.parts.alone:
            self.log(
                f"snapshots: {self.parts.alone} arrays have no copy at a peer, as one "
                "host has more than half of the devices; losing it costs the work "
                "since the last checkpoint"
            )

    def _run(self) -> None:
        for path, head, host in iter(self.work.get, None):
            try:
                write(path, head, host)
                if self.leads:
                    self._prune()
            except OSError as error:
                self.log(
                    f"snapshot {path} was not written: {error.strerror}; the training "
                    "goes on, and a fault would cost more work"
                )
            finally:
                self.busy.clear()

    def _prune(self, keep: int = 2) -> None:
        """Drops what is older than the newest ones that are whole, as far as is seen.

        One begins on local disks when all have written the last one: so of two that
        are whole here, one is whole everywhere.
        """
        here = self.domain.count(self.domain[jax.process_index()])
        whole = sorted(
            key.step
            for key, names in _by_key(_names(self.folder)).items()
            if key.start == self.start
            and len(names) == (here if self.start else key.processes)
        )
        if len(whole) > keep:
            _drop(self.folder, lambda step: step < whole[-keep])

    def wait(self) -> None:
        """Blocks until the snapshot under way is written."""
        while self.busy.is_set():
            time.sleep(0.01)

    def close(self) -> None:
        """Waits for the snapshot under way; drops those that a checkpoint follows."""
        if self.thread is not None:
            self.work.put(None)
            self.thread.join()
            self.thread = None
        if self.seconds > 0 and self.leads:
            saved = [int(p.name) for p in self.checkpoints.glob("*") if _is_step(p)]
            with contextlib.suppress(OSError):
                _drop(self.folder, lambda step: step <= max(saved, default=-1))


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.is_dir()


def interval(pace: float, seconds: float) -> int:
    """Steps between snapshots: a power of two, so that all ranks' steps nest.

    Args:
        pace: seconds a step.
        seconds: between two snapshots, at most; a step may take longer.
    """
    return 2 ** max(math.floor(math.log2(max(seconds, 1e-9) / max(pace, 1e-9))), 0)


# ------------------------------------------------------------------------ opening


def open_snapshots(
    folder: str | Path, seconds: float, log: Log = print, *, local: str = ""
) -> Snapshots:
    """Opens the snapshots beside the checkpoints of a run.

    Args:
        folder: shared by all processes; made when it is needed. Its parent holds the
            checkpoints, see `Snapshots.close`.
        seconds: between two snapshots, at most; 0 writes none, but those of an
            earlier start are found.
        log: takes lines for the user.
        local: a folder on each host's own disk, where they lie instead, with copies at
            a peer; `~` and environment variables in it are filled in. "": `folder`.

    Raises:
        UserError: the folder cannot be made or written, or a variable is not set.
    """
    folder = Path(folder)
    if not local:
        if jax.process_index() == 0 and (seconds > 0 or folder.is_dir()):
            _make(folder)
        alike = (0,) * jax.process_count()
        return Snapshots(folder, seconds, log, folder.parent, domain=alike)
    start, run = from_process_0(lambda: [secrets.token_hex(4), _identity(folder)])
    own, fault = folder, ""
    try:
        own = Path(_filled_in(local)) / run
        _make(own)
        peer_copies.mark(own, start)
    except UserError as error:
        fault = str(error)
    except OSError as error:
        fault = f"cannot write the snapshots in {own}: {error.strerror}"
    faults = [text for text in gathered(fault) if text]
    if faults:  # for all processes, or the others would wait for ever
        raise UserError(faults[0])
    domain = peer_copies.domains(own, start)
    return Snapshots(own, seconds, log, folder.parent, start, domain)


def _make(folder: Path) -> None:
    """Makes a folder, if it is not there, and clears it of what was cut off."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.part"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the snapshots in {folder}: {error.strerror}"
        ) from error


def _filled_in(path: str) -> str:
    filled = os.path.expanduser(os.path.expandvars(path))
    if "$" in filled:
        raise UserError(
            f"checkpoint.snapshot_folder is {path!r}, and that variable is not set in "
            f"process {jax.process_index()}"
        )
    return filled


def _identity(folder: Path) -> str:
    """The run's name on local disks: a run begun anew does not find the old files."""
    path = folder / "id"
    _make(folder)
    try:
        known = path.read_text() if path.exists() else ""
        if not re.fullmatch(r"[0-9a-f]{8}", known):  # it becomes a part of a path
            known = secrets.token_hex(4)
            write_text(path, known)
        return f"{folder.resolve().parents[1].name}-{known}"
    except OSError as error:
        raise UserError(f"cannot use {path}: {error.strerror}") from error


# ------------------------------------------------------------------------ reading


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.snapshot")]


def _by_key(names: Iterable[str]) -> dict[Key, list[str]]:
    """Names of files by the snapshot that they belong to, newest first."""
    found: dict[Key, list[str]] = {}
    for name in sorted(names):
        match = PART.fullmatch(name)
        if match:
            key = Key(int(match[1]), int(match[3]), match[4] or "")
            found.setdefault(key, []).append(name)
    return dict(sorted(found.items(), reverse=True))


def _drop(folder: Path, which: Callable[[int], bool]) -> None:
    for key, names in _by_key(_names(folder)).items():
        if which(key.step):
            for name in names:
                (folder / name).unlink(missing_ok=True)


def _clear(snapshots: Snapshots, which: Callable[[int], bool]) -> None:
    """Drops some from every folder, before any process can write anew."""
    if snapshots.leads:
        _drop(snapshots.folder, which)
    multihost_utils.sync_global_devices("snapshots are cleared")


def newest(
    snapshots: Snapshots, after: int = -1, log: Log = print
) -> tuple[int, int, dict[str, Any]] | None:
    """The newest snapshot that has all its shards, if it is newer than a step.

    On local disks, its files are brought to every folder.

    Args:
        snapshots: from `open_snapshots`.
        after: older ones are of no use.
        log: takes one line for each that is damaged, on process 0.

    Returns:
        its step, number of processes and description; the same for all processes.
    """
    found = _newest(snapshots, after, log)
    return None if found is None else (found[0].step, found[0].processes, found[2])


def _newest(
    snapshots: Snapshots, after: int, log: Log
) -> tuple[Key, list[Path], dict[str, Any]] | None:
    """The same, with its files."""
    for key, parts in _candidates(snapshots, after):
        finished = len(parts) == key.processes
        if snapshots.start:
            peer_copies.bring(snapshots.folder, parts, snapshots.domain)
        paths = [snapshots.folder / name for name in parts]
        fault, description = from_process_0(functools.partial(_description, paths))
        if not fault:
            return key, paths, description
        if finished:
            log(f"snapshot {key.step} is damaged: {fault}; an older state is taken")
            _clear(snapshots, key.step.__eq__)
    return None


def _candidates(snapshots: Snapshots, after: int) -> list[tuple[Key, list[str]]]:
    """Snapshots that may be whole, newest first, the same for all processes."""
    mine = _names(snapshots.folder)
    if snapshots.start:
        told = [json.loads(text) for text in gathered(json.dumps(mine))]
        found = _by_key(set().union(*told))
        return [(key, parts) for key, parts in found.items() if key.step > after]
    whole = from_process_0(
        lambda: [
            key
            for key, parts in _by_key(mine).items()
            if key.step > after and len(parts) == key.processes
        ]
    )
    return [
        (key := Key(*row), [f"{key.step}-{i}of{key.processes}.snapshot"
                            for i in range(key.processes)])
        for row in whole
    ]  # fmt: skip


def _description(paths: list[Path]) -> tuple[str, dict[str, Any]]:
    """What is wrong with the files, or the description in them."""
    try:
        return "", whole_of(paths).description
    except ValueError as error:
        return str(error), {}


def restore(
    snapshots: Snapshots,
    abstract_state: Any,
    *,
    description: dict[str, Any],
    after: int = -1,
    log: Log = print,
) -> tuple[Any, int] | None:
    """The newest sound snapshot, bit for bit, placed as `abstract_state` says.

    Damaged ones are named, and dropped: what is newer than the state from which the
    training goes on must not be mixed with what it will write.

    Args:
        snapshots: from `open_snapshots`.
        abstract_state: pytree of `jax.ShapeDtypeStruct` with shardings, on any mesh.
        description: its "model" must be the snapshot's.
        after: step of a checkpoint; only a newer snapshot will do.
        log: takes one line about what is used or damaged, on process 0.

    Returns:
        The state and its step, or None.

    Raises:
        UserError: the snapshot is of another model, or its arrays are others.
    """
    while found := _newest(snapshots, after, log):
        (step, count, _), paths, _ = found
        state, fault = None, ""
        try:
            whole = whole_of(paths)
            shown = snapshots.folder / f"{step}-*"
            ours = json.loads(json.dumps(description))
            saved = whole.description.get("model")
            compare(saved, ours.get("model"), "model", shown)
            compare(whole.leaves, leaf_types(abstract_state), "state", shown)
            state = placed(whole, leaf_types(abstract_state), abstract_state)
        except (OSError, ValueError) as error:
            fault = str(error) if isinstance(error, ValueError) else first_line(error)
        faults = [text for text in gathered(fault) if text]
        if not faults:
            log(f"snapshot {step} of {count} process(es) is newer than checkpoints")
            _clear(snapshots, lambda other, step=step: other > step)
            return state, step
        log(f"snapshot {step} is damaged: {faults[0]}; an older state is taken")
        _clear(snapshots, lambda other, step=step: other >= step)
    _clear(snapshots, lambda other: other > after)
    return None
