"""A manifest of a folder: size and sha256 of every file, to find damage later."""

import hashlib
import json
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "manifest.json"


def write(folder: Path, leave_out: Collection[str] = ()) -> None:
    """Hashes all files below a folder, brings them to the disk, and lists them.

    On one thread, since it runs beside a training.

    Args:
        folder: gets `manifest.json`.
        leave_out: paths relative to the folder that may change later.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in leave_out:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[name] = {"size": file.tell(), "sha256": digest}
                os.fsync(file.fileno())
    with open(folder / NAME, "w", encoding="utf-8") as file:
        json.dump({"version": 1, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def fault(folder: Path) -> str | None:
    """What differs from the manifest, with the name of the file; None if nothing."""
    try:
        with open(folder / NAME, encoding="utf-8") as file:
            files = json.load(file)["files"]
        listed = [(name, f["size"], f["sha256"]) for name, f in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} is unreadable"

    def fault_of(entry: tuple[str, int, str]) -> str | None:
        name, size, digest = entry
        try:
            with open(folder / name, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    return f"{name} has {found} bytes instead of {size}"
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"the sha256 of {name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next(filter(None, pool.map(fault_of, listed)), None)
