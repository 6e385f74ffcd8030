"""A real PostgreSQL server for a test, in a folder of its own, as an ordinary user."""

import contextlib
import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote


def programs() -> Path | None:
    """Folder of the newest server's programs; None: none is installed."""
    found = glob.glob("/usr/lib/postgresql/*/bin/initdb")  # Debian's are not on PATH
    if found:
        return Path(max(found, key=lambda p: int(p.split("/")[4]))).parent
    there = shutil.which("initdb")
    return Path(there).parent if there else None


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Starts one that listens at a socket in its folder alone; gives its address.

    PostgreSQL refuses to run as root: then the user is Debian's `postgres`, or nobody.
    """
    where = programs()
    assert where is not None
    user = pwd.getpwuid(os.getuid())
    if user.pw_uid == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # socket paths are short
    os.chown(folder, user.pw_uid, user.pw_gid)
    identity = {} if os.getuid() else {"user": user.pw_uid, "group": user.pw_gid}

    def call(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(where / program), *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            **({**identity, "extra_groups": []} if identity else {}),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    data = str(folder / "data")
    try:
        call("initdb", "-D", data, "-A", "trust", "-U", "test", "-N", "-E", "UTF8")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        call("pg_ctl", "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://test@/postgres?host={quote(str(folder), safe='')}"
        finally:
            call("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
