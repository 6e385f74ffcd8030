"""Atomic writes and the lock of a run folder."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxlab.errors import UserError


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole file or nothing: a temporary one beside it, then a rename."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes, sync: bool = True) -> None:
    """The same for bytes; without `sync` a power cut may lose the file."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked_folder(folder: str | Path) -> Iterator[Path]:
    """Makes a run folder and holds its lock, so that one process writes there.

    Raises:
        UserError: the folder cannot be written, or another process holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")  # noqa: SIM115 (closed below)
    except OSError as error:
        reason = error.strerror
        raise UserError(
            f"cannot write the run folder {folder}: {reason}; choose another with --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(
                f"another process ({lock.read().strip() or 'unknown'}) "
                f"trains in {folder}; wait for it or choose another "
                "--out"
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(f"pid {os.getpid()}")
        lock.flush()
        yield folder
