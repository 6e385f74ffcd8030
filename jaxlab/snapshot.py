"""Hot snapshots: the state every few seconds, so that a fault costs seconds of work.

Checkpoints (`jaxlab.checkpoint`) are for keeping; these are only for a start after a
fault. Each process writes a part of the state in the background, into the folder that
the processes share, and nobody waits for anybody:

    snapshots/<step>-<process>of<processes>.snapshot

Which process writes which shard follows from the sharding: copies of a shard are
written once, so that each of n processes writes about an n-th. The steps are those that
a power of two divides, the largest one that fits into the seconds between two snapshots
at the pace of this process; so processes whose clocks disagree still write the same
steps, or every other one of them.

A file is there whole or not at all, and its header lists the shards in it: leaf, range
in the global array, SHA-256. A restore takes the newest step whose shards cover every
leaf and are sound, on any mesh and number of processes. The file system is the peer
copy: where the folder is shared, as that of the checkpoints has to be, what a lost
host has written is there for the others.
"""

import collections
import contextlib
import functools
import json
import math
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab.checkpoint import compare, first_line, from_process_0, leaf_types
from jaxlab.errors import UserError
from jaxlab.shards import (
    Header,
    Range,
    Whole,
    assembled,
    read_shard,
    to_range,
    whole_of,
    write,
)

PART = re.compile(r"(\d+)-(\d+)of(\d+)\.snapshot")
PACE = 32
"""steps over which the pace is measured"""

Log = Callable[[str], Any]


@dataclass
class Snapshots:
    """An open folder of snapshots; a context manager that waits for the last one.

    Attributes:
        folder: of the files.
        seconds: between two snapshots, at most; 0: none are written.
        log: takes one line when a snapshot cannot be written.
        clock: seconds.
        times: when the last steps were done.
        work: the snapshot that is to be written.
        busy: the thread has one under way.
        thread: writes; None before the first one.
        parts: what this process writes, see `plan`.
    """

    folder: Path
    seconds: float
    log: Log = print
    clock: Callable[[], float] = time.monotonic
    times: collections.deque = field(
        default_factory=functools.partial(collections.deque, maxlen=PACE + 1)
    )
    work: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    busy: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    parts: list[tuple[int, Range, int]] | None = None

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """Whether to save after this step; to be asked once after each."""
        if self.seconds <= 0:
            return False
        self.times.append(self.clock())
        if len(self.times) < 3:
            return False  # the first ones compile
        pace = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        return step % interval(pace, self.seconds) == 0 and not self.busy.is_set()

    def save(self, step: int, state: Any, description: dict[str, Any]) -> None:
        """Takes the state to the host and returns; a thread writes it.

        The state may be donated once this returns. It waits for the state to be
        computed and, on an accelerator, for the copy of this process's part.

        Args:
            step: how many optimizer steps the state has seen.
            state: pytree of `jax.Array`, sharded anyhow.
            description: JSON, see `checkpoint.save`.
        """
        if self.parts is None:
            self.parts = plan(state, jax.process_index())
        flat = jax.tree.leaves(state)
        pieces = [
            (leaf, cut, flat[leaf].addressable_shards[place].data)
            for leaf, cut, place in self.parts
        ]
        for _, _, data in pieces:
            data.copy_to_host_async()
        # On CPU no copy but a view: a step that donates the array gets new memory.
        host = [(i, cut, np.asarray(data)) for i, cut, data in pieces]
        head = Header(description, leaf_types(state), ())
        name = f"{step}-{jax.process_index()}of{jax.process_count()}.snapshot"
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        self.busy.set()
        self.work.put((self.folder / name, head, host))

    def _run(self) -> None:
        for path, head, host in iter(self.work.get, None):
            try:
                write(path, head, host)
                if jax.process_index() == 0:
                    _prune(self.folder)
            except OSError as error:
                self.log(
                    f"snapshot {path} was not written: {error.strerror}; the training "
                    "goes on, and a fault would cost more work"
                )
            finally:
                self.busy.clear()

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
        if self.seconds > 0 and jax.process_index() == 0:
            saved = [int(p.name) for p in self.folder.parent.glob("*") if _is_step(p)]
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


def open_snapshots(folder: str | Path, seconds: float, log: Log = print) -> Snapshots:
    """Opens the snapshots beside the checkpoints of a run.

    Args:
        folder: shared by all processes; made when it is needed. Its parent holds the
            checkpoints, see `Snapshots.close`.
        seconds: between two snapshots, at most; 0 writes none, but those of an
            earlier start are found.
        log: takes lines for the user.

    Raises:
        UserError: the folder cannot be made or written.
    """
    folder = Path(folder)
    if jax.process_index() == 0 and (seconds > 0 or folder.is_dir()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.part"):
                leftover.unlink()
        except OSError as error:
            raise UserError(
                f"cannot write the snapshots in {folder}: {error.strerror}"
            ) from error
    return Snapshots(folder, seconds, log)


# ------------------------------------------------------------------------ writing


def plan(state: Any, process: int) -> list[tuple[int, Range, int]]:
    """What a process has to write: each range of each leaf once in the job.

    Where several processes hold a range, it goes to the one with the fewest bytes so
    far; all processes find the same, by the shardings alone.

    Returns:
        number of the leaf, range, and place among the leaf's addressable shards.
    """
    load: dict[int, int] = collections.Counter()
    mine = []
    for number, x in enumerate(jax.tree.leaves(state)):
        holders: dict[Range, set[int]] = {}
        for device, index in x.sharding.devices_indices_map(x.shape).items():
            cut = to_range(index, x.shape)
            holders.setdefault(cut, set()).add(device.process_index)
        places = {
            to_range(shard.index, x.shape): place
            for place, shard in enumerate(x.addressable_shards)
        }
        for cut in sorted(holders):
            writer = min(holders[cut], key=lambda p: (load[p], p))
            load[writer] += math.prod(b - a for a, b in cut) * x.dtype.itemsize
            if writer == process:
                mine.append((number, cut, places[cut]))
    return mine


# ------------------------------------------------------------------------ reading


def _parts(folder: Path) -> dict[tuple[int, int], list[Path]]:
    """Files by step and number of processes, of those snapshots that have all."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(folder.glob("*.snapshot")):
        match = PART.fullmatch(path.name)
        if match:
            step, _, count = map(int, match.groups())
            found.setdefault((step, count), []).append(path)
    return {key: paths for key, paths in found.items() if len(paths) == key[1]}


def _prune(folder: Path, keep: int = 2) -> None:
    """Drops what is older than the newest whole ones."""
    whole = sorted({step for step, _ in _parts(folder)})
    if len(whole) > keep:
        _drop(folder, lambda step: step < whole[-keep])


def _drop(folder: Path, which: Callable[[int], bool]) -> None:
    for path in folder.glob("*.snapshot"):
        match = PART.fullmatch(path.name)
        if match and which(int(match[1])):
            path.unlink(missing_ok=True)


def newest(
    snapshots: Snapshots, after: int = -1, log: Log = print
) -> tuple[int, int, dict[str, Any]] | None:
    """The newest snapshot that has all its shards, if it is newer than a step.

    Args:
        snapshots: from `open_snapshots`.
        after: older ones are of no use.
        log: takes one line for each that is damaged, on process 0.

    Returns:
        its step, number of processes and description; the same for all processes.
    """

    def look() -> list[Any] | None:
        if not snapshots.folder.is_dir():
            return None
        for (step, count), paths in sorted(_parts(snapshots.folder).items())[::-1]:
            if step <= after:
                break
            try:
                return [step, count, whole_of(paths).description]
            except ValueError as error:
                log(f"snapshot {step} is damaged: {error}; an older state is taken")
                _drop(snapshots.folder, step.__eq__)
        return None

    found = from_process_0(look)
    return None if found is None else (found[0], found[1], found[2])


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
    while found := newest(snapshots, after, log):
        step, count, _ = found
        paths = _parts(snapshots.folder).get((step, count), [])
        state, fault = None, ""
        try:
            whole = whole_of(paths) if paths else None
            if whole is None:
                raise ValueError("its files cannot be seen by every process")
            shown = snapshots.folder / f"{step}-*"
            ours = json.loads(json.dumps(description))
            saved = whole.description.get("model")
            compare(saved, ours.get("model"), "model", shown)
            compare(whole.leaves, leaf_types(abstract_state), "state", shown)
            state = _placed(whole, abstract_state)
        except (OSError, ValueError) as error:
            fault = str(error) if isinstance(error, ValueError) else first_line(error)
        faults = [text for text in _gathered(fault) if text]
        if not faults:
            log(f"snapshot {step} of {count} process(es) is newer than checkpoints")
            _forget(snapshots, step)
            return state, step
        log(f"snapshot {step} is damaged: {faults[0]}; an older state is taken")
        _forget(snapshots, step - 1)
    _forget(snapshots, after)
    return None


def _forget(snapshots: Snapshots, step: int) -> None:
    """Drops what is newer than a step, before any process can write anew."""

    def drop() -> None:
        if snapshots.folder.is_dir():
            _drop(snapshots.folder, lambda other: other > step)

    from_process_0(drop)


def _placed(whole: Whole, abstract_state: Any) -> Any:
    """The state on the mesh; this process reads what its devices hold.

    Raises:
        OSError, ValueError: a file cannot be read, or a shard is damaged.
    """
    flat, tree = jax.tree.flatten(abstract_state)
    numbers = {name: number for number, name in enumerate(whole.leaves)}
    arrays = []
    for name, x in zip(leaf_types(abstract_state), flat, strict=True):
        pieces = whole.pieces[numbers[name]]
        read = functools.cache(functools.partial(read_shard, name, x.dtype))
        parts: dict[Range, np.ndarray] = {}
        for index in x.sharding.addressable_devices_indices_map(x.shape).values():
            assert index is not None
            cut = to_range(index, x.shape)
            if cut not in parts:
                parts[cut] = assembled(pieces, cut, x.dtype, read)

        def part(index: Any, parts: Any = parts, shape: Any = x.shape) -> np.ndarray:
            return parts[to_range(index, shape)]

        array = jax.make_array_from_callback(x.shape, x.sharding, part, dtype=x.dtype)
        arrays.append(array)
    return jax.tree.unflatten(tree, arrays)


def _gathered(text: str, size: int = 1024) -> list[str]:
    """The text of each process, cut off after some bytes."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    data = np.zeros(size, np.uint8)
    short = text.encode()[:size]
    data[: len(short)] = np.frombuffer(short, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(data))
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
