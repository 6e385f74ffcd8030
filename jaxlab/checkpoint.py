"""Checkpoints on orbax: asynchronous, atomic, verified on the way back.

A save takes a snapshot of the state and returns; writing goes on in the background,
in `<step>.orbax-checkpoint-tmp`. When all is written, and before that folder is
renamed to `<step>`, a manifest with the sha256 of every file is put into it. So a
checkpoint is there with its manifest or not at all, and a restore can tell sound
ones from damaged ones; orbax alone returns wrong numbers after a flipped bit.

    <step>/state/           the arrays (orbax StandardSave)
    <step>/description/     JSON: the caller's description, metrics, list of leaves
    <step>/manifest.json    see jaxlab/manifest.py

Damaged checkpoints are moved to `damaged/`, never deleted, and a folder that holds
nothing else is refused rather than treated as new.

With many processes all of them call these functions, in the same order. Process 0
hashes, decides and renames; the others follow its decision.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import os
import re
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from jaxlab import manifest
from jaxlab.errors import ConfigError, UserError

BEST_METRIC = "eval/loss"
_TEMPORARY = ".orbax-checkpoint-tmp"
# Orbax writes these after the manifest; a restore does not read them.
_UNLISTED = ("_CHECKPOINT_METADATA", "commit_success.txt")

Log = Callable[[str], Any]


class CheckpointError(UserError):
    """There are checkpoints, and none of them can be used."""


@dataclasses.dataclass
class Checkpoints:
    """An open checkpoint folder; a context manager that closes itself.

    Attributes:
        folder: as the caller wrote it, for messages.
        root: the same, absolute.
        read_only: nothing in the folder is written, moved or removed.
        keep: which checkpoints stay.
        orbax: the `orbax.checkpoint.CheckpointManager`.
        damaged: steps that were found damaged and could not be moved away.
        writing: step of the last save that was started, or -1.
    """

    folder: Path
    root: Path
    read_only: bool
    keep: "Keep"
    orbax: Any = None
    damaged: set[int] = dataclasses.field(default_factory=set)
    writing: int = -1

    def wait(self) -> None:
        """Blocks until the save under way is on disk; raises UserError if it failed."""
        try:
            self.orbax.wait_until_finished()
        except Exception as error:
            _raise_failed_save(self, error)

    def close(self) -> None:
        """Waits for the save under way, as `wait` does, and frees the threads."""
        try:
            self.wait()
        finally:
            self.orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclasses.dataclass
class Keep:
    """Orbax preservation policy: the newest `last` and the `best` by loss.

    Orbax's own BestN has its metrics read when a folder is opened, where a damaged
    file stops everything, and it sorts NaN anywhere.

    Attributes:
        last: how many of the newest stay.
        best: how many with the lowest loss stay besides.
        losses: `eval/loss` of the steps that have a finite one.
    """

    last: int
    best: int
    losses: dict[int, float] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Any, *, context: Any = None) -> list[bool]:
        """One answer for each checkpoint (`.step`), as orbax wants it."""
        steps = sorted(c.step for c in checkpoints)
        scored = [s for s in steps if s in self.losses]
        ranked = sorted(scored, key=lambda s: (self.losses[s], -s))
        keep = {*steps[-self.last :], *ranked[: self.best]}
        return [c.step in keep for c in checkpoints]


def open_checkpoints(
    folder: str | Path,
    *,
    keep_last: int = 2,
    keep_best: int = 1,
    read_only: bool = False,
) -> Checkpoints:
    """Opens a checkpoint folder, makes it if need be, clears what a kill left.

    Args:
        folder: a local or shared POSIX folder that holds nothing else.
        keep_last: how many of the newest checkpoints stay, at least 1.
        keep_best: how many with the lowest finite `eval/loss` stay besides.
        read_only: for a reader, perhaps beside a training that writes here: nothing
            is moved or removed, and nothing can be saved.

    Raises:
        ConfigError: `keep_last` or `keep_best` is too small.
        UserError: the folder cannot be made or written to.
    """
    if keep_last < 1 or keep_best < 0:
        raise ConfigError(
            f"keep_last is {keep_last} and keep_best is {keep_best}, "
            "but at least 1 and 0 are needed"
        )
    folder = Path(folder)
    if not read_only:
        from_process_0(functools.partial(_prepare, folder))
    keep = Keep(keep_last, keep_best)
    manager = Checkpoints(folder, folder.absolute(), read_only, keep)
    _connect(manager)
    keep.losses.update(from_process_0(functools.partial(_read_losses, manager)))
    return manager


def _connect(manager: Checkpoints) -> None:
    """Gives the folder a new orbax manager."""
    import orbax.checkpoint as ocp

    def write_manifest() -> None:
        # Orbax calls this on process 0 when the files of all processes are there,
        # just before the rename that makes the checkpoint visible.
        manifest.write(manager.root / f"{manager.writing}{_TEMPORARY}", _UNLISTED)

    # What orbax logs it also raises. (Orbax is imported: absl has made its logger.)
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_orbax)
    manager.orbax = ocp.CheckpointManager(
        manager.root,
        options=ocp.CheckpointManagerOptions(
            create=False,
            save_root_metadata=False,
            preservation_policy=manager.keep,
            async_options=ocp.AsyncOptions(post_finalization_callback=write_manifest),
        ),
    )


def steps(manager: Checkpoints) -> list[int]:
    """Steps that have a checkpoint, ascending, with the one being written."""
    return sorted(set(manager.orbax.all_steps()) - manager.damaged)


def newest_description(manager: Checkpoints) -> dict[str, Any]:
    """What the newest readable checkpoint says of itself; {} if there is none."""

    def read() -> dict[str, Any]:
        for step in reversed(steps(manager)):
            with contextlib.suppress(OSError, ValueError):
                return _read_description(manager.root / str(step))["description"]
        return {}

    return from_process_0(read)


def save(
    manager: Checkpoints,
    step: int,
    state: Any,
    description: dict[str, Any],
    metrics: Mapping[str, float] | None = None,
    force: bool = False,
) -> bool:
    """Starts an asynchronous save; the state may be donated once this returns.

    Waits first for a save that is still under way. If that one failed, its error is
    raised here and nothing is saved; the next call starts afresh.

    Args:
        manager: from `open_checkpoints`.
        step: how many optimizer steps the state has seen.
        state: pytree of `jax.Array`, sharded anyhow.
        description: JSON; `restore` compares its "model".
        metrics: among them `eval/loss`, which says which checkpoints are best.
        force: save also when a later step has a checkpoint.

    Returns:
        Whether a save was started: not if this step has a checkpoint or, without
        `force`, if a later one has.

    Raises:
        UserError: this or the last save failed, for instance because the disk is
            full. The earlier checkpoints are untouched.
    """
    import orbax.checkpoint as ocp

    manager.wait()
    present = steps(manager)
    if step in present or (present and step < present[-1] and not force):
        return False
    if jax.process_index() == 0:
        _clear_temporary(manager.root)  # threads of a failed save may end late
    metrics = {tag: float(value) for tag, value in (metrics or {}).items()}
    record = {
        "description": description,
        # NaN is no JSON; a loss that is not finite is never among the best.
        "metrics": {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()},
        "leaves": leaf_types(state),
    }
    manager.writing = step
    if math.isfinite(metrics.get(BEST_METRIC, math.nan)):
        manager.keep.losses[step] = metrics[BEST_METRIC]
    try:
        manager.orbax.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                description=ocp.args.JsonSave(record),
            ),
            force=True,
        )
    except Exception as error:
        _raise_failed_save(manager, error)
    return True


def restore(
    manager: Checkpoints,
    abstract_state: Any,
    *,
    description: dict[str, Any],
    log: Log = print,
) -> tuple[Any, int] | None:
    """The newest sound checkpoint, bit for bit, placed as `abstract_state` says.

    Args:
        manager: from `open_checkpoints`.
        abstract_state: pytree of `jax.ShapeDtypeStruct` or arrays with the wanted
            shardings, on any mesh; without a sharding, on the first device.
        description: its "model" must be the checkpoint's.
        log: takes one line for each damaged or unverified checkpoint, on process 0.

    Returns:
        The state and its step, or None if there never was a checkpoint here.

    Raises:
        UserError: the checkpoint is of another model, or its arrays are others.
        CheckpointError: there were checkpoints and none is sound.
    """
    import orbax.checkpoint as ocp

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    manager.wait()
    target = jax.tree.map(placed, abstract_state)
    choose = functools.partial(_choose, manager, target, description, log)
    while choice := from_process_0(choose):
        step, verified = choice
        manager.orbax.reload()  # damaged ones may have been moved away
        failure, restored = None, None
        try:
            restored = manager.orbax.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )["state"]
        except Exception as error:
            failure = error
        if _on_all_processes(failure is None):
            return restored, step
        reason = first_line(failure)
        if verified:  # every byte is as it was written: an older one would fail too
            raise CheckpointError(
                f"checkpoint {manager.folder / str(step)} is undamaged but could not "
                f"be restored: {reason}"
            ) from failure
        from_process_0(functools.partial(_set_aside, manager, step, reason, log))
    return None


def _choose(
    manager: Checkpoints, target: Any, description: dict[str, Any], log: Log
) -> tuple[int, bool] | None:
    """The newest step worth restoring, and whether its manifest vouches for it."""
    for step in reversed(steps(manager)):
        root, shown = manager.root / str(step), manager.folder / str(step)
        verified = (root / manifest.NAME).exists()
        fault = manifest.fault(root) if verified else None
        record = {}
        if fault is None:
            try:
                record = _read_description(root)
            except (OSError, ValueError) as error:
                fault = f"description is unreadable ({first_line(error)})"
        if fault is not None:
            _set_aside(manager, step, fault, log)
            continue
        ours = json.loads(json.dumps(description))
        compare(record["description"].get("model"), ours.get("model"), "model", shown)
        compare(record["leaves"], leaf_types(target), "state", shown)
        if not verified:
            log(f"checkpoint {shown} has no {manifest.NAME}: used unverified")
        return step, verified
    kept = len(list((manager.root / "damaged").glob("*")))
    if kept or manager.damaged:
        raise CheckpointError(
            f"none of the checkpoints in {manager.folder} is sound (see "
            f"{manager.folder / 'damaged'}): put a good copy back, or remove "
            f"{manager.folder} to start from scratch"
        )
    return None


def _set_aside(manager: Checkpoints, step: int, fault: str, log: Log) -> None:
    """Names a damaged checkpoint and moves it out of orbax's sight."""
    fate = "skipped"
    if manager.read_only:
        manager.damaged.add(step)
    else:
        kept = manager.root / "damaged"
        kept.mkdir(exist_ok=True)
        number = len(list(kept.glob(f"{step}*")))
        name = f"{step}-{number + 1}" if number else f"{step}"
        (manager.root / str(step)).rename(kept / name)
        manager.keep.losses.pop(step, None)
        manager.orbax.reload()
        fate = f"moved to {manager.folder / kept.name / name}"
    log(f"checkpoint {manager.folder / str(step)} is damaged: {fault}; {fate}")


def compare(saved: Any, wanted: Any, field: str, where: Path) -> None:
    """Raises UserError that names the first field in which two JSON values differ."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in [*wanted, *(key for key in saved if key not in wanted)]:
            there, here = saved.get(key, "absent"), wanted.get(key, "absent")
            compare(there, here, f"{field}.{key}", where)
    elif saved != wanted:
        raise UserError(
            f"{field} is {wanted} here but {saved} in the checkpoint {where}; "
            "use the configuration of that run, or another run folder"
        )


def leaf_types(state: Any) -> dict[str, str]:
    """Path and "dtype[shape]" of each array, in order: orbax would cast in silence."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{x.dtype}[{','.join(map(str, x.shape))}]"
        )
        for path, x in flat
    }


def _read_description(folder: Path) -> dict[str, Any]:
    with open(folder / "description" / "metadata", encoding="utf-8") as file:
        record = json.load(file)
    for key in ("description", "metrics", "leaves"):
        if not isinstance(record, dict) or not isinstance(record.get(key), dict):
            raise ValueError(f"no {key} in it")
    return record


def _read_losses(manager: Checkpoints) -> list[tuple[int, float]]:
    losses = []
    for step in steps(manager):
        try:
            loss = _read_description(manager.root / str(step))["metrics"][BEST_METRIC]
        except (OSError, ValueError, KeyError):
            continue  # damaged, and restore will say so; or saved without a loss
        if isinstance(loss, float):  # not finite: a string
            losses.append((step, loss))
    return losses


def _prepare(folder: Path) -> None:
    """Makes the folder and removes the temporary folders of killed saves."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _clear_temporary(folder)
    except OSError as error:
        raise UserError(
            f"cannot write the checkpoint folder {folder}: {error.strerror}"
        ) from error


def _clear_temporary(folder: Path) -> None:
    for leftover in folder.glob(f"*{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def _raise_failed_save(manager: Checkpoints, error: Exception) -> NoReturn:
    """Clears away what a failed save left and says what the user can do."""
    # A failed orbax manager can hold a second error of the same save for the next
    # one, and has forgotten the steps that it would have deleted.
    with contextlib.suppress(Exception):
        manager.orbax.close()
    if jax.process_index() == 0:
        _clear_temporary(manager.root)
    manager.keep.losses.pop(manager.writing, None)
    _connect(manager)
    full = re.search("no space left|quota exceeded", str(error), re.IGNORECASE)
    if not (full or isinstance(error, OSError) or "os_error_code" in str(error)):
        raise error
    reason = "no space left; free some" if full else first_line(error)
    raise UserError(
        f"checkpoint {manager.writing} was not written to {manager.folder}: {reason} "
        "(the earlier checkpoints there are whole)"
    ) from error


def first_line(error: BaseException | None) -> str:
    """Class and first line of an error, short enough for a message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def _not_orbax(record: logging.LogRecord) -> bool:
    """False for what orbax logs, or asyncio logs about a task of orbax."""
    trace = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
    files = [record.pathname, *(frame.filename for frame in trace)]
    return not any(f"{os.sep}orbax{os.sep}" in name for name in files)


def from_process_0(decide: Callable[[], Any]) -> Any:
    """Runs decide on process 0; its JSON result or UserError is every process's."""
    if jax.process_count() == 1:
        return decide()
    from jax.experimental import multihost_utils

    message: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            message = {"value": decide()}
        except UserError as error:
            message = {"error": str(error)[:3000], "kind": type(error).__name__}
    data = np.zeros(16384, np.uint8)  # all processes must know the size
    text = np.frombuffer(json.dumps(message, ensure_ascii=False).encode(), np.uint8)
    data[: len(text)] = text
    data = np.asarray(multihost_utils.broadcast_one_to_all(data))
    message = json.loads(data.tobytes().rstrip(b"\0"))
    if "error" in message:
        wrong = message["kind"] == CheckpointError.__name__
        raise (CheckpointError if wrong else UserError)(message["error"])
    return message["value"]


def _on_all_processes(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))
