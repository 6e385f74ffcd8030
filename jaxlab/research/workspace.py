"""The folder of a study: its layout, and the only way to its files.

Paths given by agents are relative, have no `..`, and no part of them is a symbolic
link; every folder on the way is opened with O_NOFOLLOW, so none can be swapped in
between check and use.

    journal.jsonl            the truth (jaxlab.research.journal)
    plans/<n>.json           pre-registered plans and their amendments
    runs/<id>/               spec.json metrics.jsonl stdout.log process.json result.json
    facts/ledger.json        facts; figures/ paper/ reviews/ are made from them
    notes/                   past_findings.md, open questions
    agents/<name>/           what an agent wrote for itself
    blobs/<sha256>           long tool results and other bodies
    inbox/{new,cur}/ outbox/ messages from and to people
    before.json              files that a partial report has overwritten
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets as random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError
from jaxlab.research.types import Ref, ToolError, plain

FOLDERS = (
    "plans",
    "runs",
    "facts",
    "notes",
    "agents",
    "blobs",
    "figures",
    "paper",
    "reviews",
    "inbox/new",
    "inbox/cur",
    "outbox",
)
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PathError(ToolError):
    """A path that leaves the workspace, or passes through a link."""


@dataclasses.dataclass(frozen=True)
class Workspace:
    """A study's folder."""

    root: Path
    """absolute, links resolved"""
    secrets: tuple[str, ...] = ()
    """texts that must reach no file"""

    def clean(self, text: str) -> str:
        """The text without secrets, whatever form they take in JSON."""
        for secret in self.secrets:
            for form in {secret, json.dumps(secret)[1:-1]}:
                text = text.replace(form, "[redacted]")
        return text

    def resolve(self, relative: str) -> Path:
        """The path of a file inside, which need not exist.

        Raises:
            PathError: it is absolute, has `..` or NUL, or passes through a link.
        """
        parts = _parts(relative)
        path = self.root
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise PathError(f"{relative!r}: {part} is a symbolic link")
        real = os.path.realpath(path)
        if os.path.commonpath([real, self.root]) != str(self.root):
            raise PathError(f"{relative!r} leaves the workspace")
        return path

    @contextlib.contextmanager
    def _folder(self, relative: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """Descriptor of the folder that holds a path, and the path's last part."""
        *parents, name = _parts(relative)
        handle = os.open(self.root, DIRECTORY)
        try:
            for part in parents:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=handle)
                try:
                    deeper = os.open(part, DIRECTORY, dir_fd=handle)
                except FileNotFoundError:
                    raise ToolError(f"there is no {relative!r}") from None
                except OSError as error:
                    raise PathError(
                        f"{relative!r}: {part} is a link or no folder"
                    ) from error
                os.close(handle)
                handle = deeper
            yield handle, name
        finally:
            os.close(handle)

    def read_bytes(self, relative: str) -> bytes:
        """Contents of a regular file.

        Raises:
            PathError: the path is not inside, or a link.
            ToolError: there is no such file.
        """
        with self._folder(relative) as (folder, name):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                handle = os.open(name, flags, dir_fd=folder)
            except FileNotFoundError:
                raise ToolError(f"there is no {relative!r}") from None
            except OSError as error:
                raise PathError(f"{relative!r}: {error.strerror}") from error
            with os.fdopen(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise PathError(f"{relative!r} is not a file")
                return file.read()

    def read_text(self, relative: str) -> str:
        """Contents as text; what is no UTF-8 is replaced."""
        return self.read_bytes(relative).decode("utf-8", "replace")

    def read_json(self, relative: str) -> Any:
        """Contents as JSON.

        Raises:
            ToolError: it is not JSON.
        """
        try:
            return json.loads(self.read_bytes(relative))
        except ValueError as error:
            raise ToolError(f"{relative!r} is not JSON: {error}") from None

    def exists(self, relative: str) -> bool:
        """Whether there is a regular file."""
        try:
            with self._folder(relative) as (folder, name):
                mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
                return stat.S_ISREG(mode)
        except (ToolError, OSError):
            return False

    def write_bytes(self, relative: str, body: bytes) -> Ref:
        """Writes a whole file or nothing, on disk when this returns."""
        with self._folder(relative, make=True) as (folder, name):
            temporary = f".{name}.{random.token_hex(4)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(temporary, flags, 0o644, dir_fd=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(handle)
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)
                raise
        return Ref("file", relative, hashlib.sha256(body).hexdigest())

    def remove(self, relative: str) -> None:
        """Deletes a file."""
        with self._folder(relative) as (folder, name):
            os.unlink(name, dir_fd=folder)
            os.fsync(folder)

    def write_text(self, relative: str, text: str) -> Ref:
        """Likewise, without secrets."""
        return self.write_bytes(relative, self.clean(text).encode())

    def write_json(self, relative: str, value: Any) -> Ref:
        """Likewise; dataclasses become objects."""
        text = json.dumps(plain(value), indent=1, sort_keys=True, allow_nan=False)
        return self.write_text(relative, text + "\n")

    def put_blob(self, text: str, summary: str = "") -> Ref:
        """Keeps a long text under its hash."""
        body = self.clean(text).encode()
        sha = hashlib.sha256(body).hexdigest()
        if not self.exists(f"blobs/{sha}"):
            self.write_bytes(f"blobs/{sha}", body)
        return Ref("file", f"blobs/{sha}", sha, summary)

    def ref(self, relative: str, summary: str = "") -> Ref:
        """A reference to a file as it is now."""
        sha = hashlib.sha256(self.read_bytes(relative)).hexdigest()
        return Ref("file", relative, sha, summary)

    def run_ref(self, run_id: str, summary: str = "") -> Ref:
        """A reference to a finished run."""
        sha = self.ref(f"runs/{run_id}/result.json").sha256
        return Ref("run", run_id, sha, summary)

    def check(self, ref: Ref) -> None:
        """Verifies that what a reference names is there and unchanged.

        Raises:
            ToolError: it is not.
        """
        if ref.kind == "event":
            return
        if ref.kind == "fact":
            if not any(f["id"] == ref.id for f in self.facts()):
                raise ToolError(f"there is no fact {ref.id!r}")
            return
        path = ref.id if ref.kind == "file" else f"runs/{ref.id}/result.json"
        sha = self.ref(path).sha256
        if ref.sha256 is not None and sha != ref.sha256:
            raise ToolError(f"{path} changed since it was referred to (by its sha256)")

    def facts(self) -> list[dict[str, Any]]:
        """The ledger's facts as JSON objects; none where there is no ledger."""
        path = "facts/ledger.json"
        return self.read_json(path)["facts"] if self.exists(path) else []

    def files(self, under: str = "") -> list[str]:
        """Paths of the regular files below a folder, links left out, sorted."""
        start = self.resolve(under) if under else self.root
        found = []
        for folder, folders, names in os.walk(start):
            folders[:] = [f for f in folders if not Path(folder, f).is_symlink()]
            for name in names:
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink():
                    found.append(str(path.relative_to(self.root)))
        return sorted(found)

    def size(self) -> int:
        """Bytes of all files."""
        total = 0
        for name in self.files():
            with contextlib.suppress(FileNotFoundError):
                total += (self.root / name).lstat().st_size
        return total


def open_workspace(
    root: str | Path, *, make: bool = False, secrets: tuple[str, ...] = ()
) -> Workspace:
    """A study's folder; `make` creates it with its folders.

    Raises:
        UserError: there is none, or it cannot be made.
    """
    root = Path(root)
    if make:
        try:
            for name in FOLDERS:
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the workspace {root}: {error.strerror}; "
                "choose another with --workspace"
            ) from error
    elif not (root / "journal.jsonl").is_file():
        raise UserError(f"{root} is no workspace: it has no journal.jsonl")
    return Workspace(Path(os.path.realpath(root)), tuple(s for s in secrets if s))


def _parts(relative: str) -> list[str]:
    """The parts of a relative path.

    Raises:
        PathError: it is absolute or empty, or has `..` or NUL.
    """
    if "\0" in relative:
        raise PathError("a path with a NUL byte")
    if relative.startswith("/"):
        raise PathError(f"{relative!r} is absolute; paths are inside the workspace")
    parts = [part for part in relative.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise PathError(f"{relative!r} is no path inside the workspace")
    return parts
