"""Runs generated code where it can do no harm, or not at all.

Landlock (Linux 5.13 and later, no privilege needed) lets the program read the
interpreter and its own folder, and write in that folder only; a new network namespace
has no links; a seccomp filter allows threads and no further process; limits bound time,
memory, files and their size; the environment is empty but for a path. Where the kernel
lacks any of this, code is refused: there is no weaker mode.

`check` proves the walls by running hostile programs against them; `run` does that
before the first program of a process.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError
from jaxlab.research.tool import Context, tool

# Numbers of the system calls and of linux/landlock.h, the same on x86-64 and aarch64.
CREATE, ADD_RULE, RESTRICT = 444, 445, 446
READ = (1 << 2) | (1 << 3)  # read a file, list a folder
EXECUTE = 1 << 0
# Rights on files by version of the interface: 13 at first, then linking across folders,
# truncation, device controls.
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
TCP = 3  # bind and connect, from version 4
SCOPES = 3  # signals and abstract sockets of processes outside, from version 6
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
DEATH_SIGNAL, SECCOMP, NO_NEW_PRIVS = 1, 22, 38
CLONE3 = 435
# By machine: the number of the architecture, of clone, and of fork, vfork, unshare,
# setns and ptrace.
CALLS = {
    "x86_64": (0xC000003E, 56, (57, 58, 272, 308, 101)),
    "aarch64": (0xC00000B7, 220, (97, 268, 117)),
}
PROGRAM = "program.py"


class SandboxError(UserError):
    """Code cannot be confined here, so it is not run."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one program."""

    wall: float = 60.0
    """seconds"""
    cpu: int = 60
    """seconds"""
    memory: int = 2 * 2**30
    """bytes of address space"""
    file: int = 64 * 2**20
    """bytes of any file"""
    files: int = 64
    """open at once"""
    output: int = 200_000
    """bytes of output that are kept"""


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a program ended."""

    code: int
    """exit code; above 128: by a signal; negative: ended from outside"""
    output: str
    timed_out: bool


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("yes", ctypes.c_uint8),
        ("no", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [
        ("length", ctypes.c_uint16),
        ("filter", ctypes.POINTER(_Instruction)),
    ]


class _Ruleset(ctypes.Structure):
    _fields_ = [
        ("fs", ctypes.c_uint64),
        ("net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def landlock_version() -> int:
    """Version of the kernel's Landlock; 0: it has none."""
    version = ctypes.CDLL(None, use_errno=True).syscall(CREATE, None, 0, 1)
    return max(version, 0)


def confine(folder: str, readable: Sequence[str]) -> None:
    """Confines this process for good; called in a child, before its program starts.

    Args:
        folder: may be read and written.
        readable: folders and files that may be read and executed.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(*arguments: object) -> int:
        result = libc.syscall(*arguments)
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return result

    version = landlock_version()
    if version < 1:
        raise OSError("the kernel has no Landlock")
    if libc.unshare(NEWUSER | NEWPID | NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"no namespaces: {os.strerror(error)}")
    rights = RIGHTS[max(v for v in RIGHTS if v <= version)]
    rules = _Ruleset(rights, TCP if version >= 4 else 0, SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    handle = call(CREATE, ctypes.byref(rules), ctypes.c_size_t(size), 0)
    for path, allowed in [(folder, rights & ~EXECUTE)] + [
        (path, READ | EXECUTE) for path in readable
    ]:
        try:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            allowed &= (1 << 2) | EXECUTE
        rule = _PathRule(allowed, parent)
        call(ADD_RULE, handle, 1, ctypes.byref(rule), 0)
        os.close(parent)
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError("no_new_privs is refused")
    call(RESTRICT, handle, 0)
    os.close(handle)


def forbid_processes() -> None:
    """Lets this process start threads but no other process, by a seccomp filter.

    RLIMIT_NPROC does not bind root, and a program that forks without end is felt by
    the whole machine long before its time is up.

    Raises:
        OSError: the kernel refuses, or the machine is neither x86-64 nor aarch64.
    """
    try:
        architecture, clone, denied = CALLS[os.uname().machine]
    except KeyError:
        raise OSError(f"no filter for {os.uname().machine}") from None
    load, equal, above, has, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, no, unknown = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
    rows = [(load, 4), (equal, architecture, "kill"), (load, 0)]
    rows += [(above, 0x40000000, "no"), (equal, CLONE3, "unknown")]
    rows += [(equal, number, "no") for number in denied]
    rows += [(equal, clone, "threads"), (give, allow)]
    rows += [(load, 16), (has, 0x10000, "thread"), (give, no), (give, allow)]
    rows += [(give, unknown), (give, kill)]
    last = len(rows) - 1
    where = {"kill": last, "unknown": last - 1, "no": last - 3, "thread": last - 2}
    where["threads"] = last - 5
    made = []
    for i, (code, k, *to) in enumerate(rows):
        jump = where[to[0]] - i - 1 if to else 0
        yes, other = (0, jump) if to == ["kill"] else (jump, 0)
        made.append(_Instruction(code, yes, other, k))
    filter = (_Instruction * len(made))(*made)
    program = _Program(len(made), filter)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(SECCOMP, 2, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses a seccomp filter")


def run(
    code: str,
    folder: Path,
    limits: Limits = Limits(),  # noqa: B008
    poll: Callable[[], object] = lambda: None,
) -> Ran:
    """Runs a Python program that nobody has read, confined to a folder.

    Args:
        code: the program; it sees the standard library and site-packages.
        folder: where it runs; all it can write.
        limits: of time, memory and files.
        poll: called ten times a second; may raise to end the program.

    Raises:
        SandboxError: this system cannot confine it, or the walls do not hold.
    """
    if why := check():
        raise SandboxError(f"generated code is refused here: {why}")
    return _run(code, folder, limits, poll)


@functools.cache
def check() -> str | None:
    """Why code cannot be confined here; None: hostile programs were contained."""
    if landlock_version() < 1:
        return "the kernel has no Landlock (Linux 5.13 or later has)"
    with tempfile.TemporaryDirectory() as box:
        inside, outside = Path(box, "in"), Path(box, "out")
        inside.mkdir()
        outside.mkdir()
        (outside / "secret").write_text("secret")
        quick = Limits(wall=20.0, cpu=10)
        good = _run("open('mine', 'w').write('x'); print('fine')", inside, quick)
        if good.code != 0 or "fine" not in good.output:
            return f"a harmless program fails ({good.output.strip()[-200:]})"
        for name, text in hostile(outside).items():
            if "breached" in _run(text, inside, quick).output:
                return f"a program got through: {name}"
        if sorted(p.name for p in outside.iterdir()) != ["secret"]:
            return "a program wrote outside of its folder"
    return None


def hostile(outside: Path) -> dict[str, str]:
    """Programs that print `breached` where the walls do not hold."""
    tries = {
        "reads outside": f"open({str(outside / 'secret')!r}).read()",
        "lists outside": f"import os; os.listdir({str(outside)!r})",
        "writes outside": f"open({str(outside / 'new')!r}, 'w')",
        "climbs": "open('../out/secret').read()",
        "follows a link": f"import os; os.symlink({str(outside)!r}, 'l'); "
        "open('l/secret').read()",
        "reads /etc/passwd": "open('/etc/passwd').read()",
        "reads its parent": "import os; "
        "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
        "connects": "import socket; socket.create_connection(('127.0.0.1', 22), 2)",
        "sends": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
        ".sendto(b'x', ('127.0.0.1', 53))",
        "raises limits": "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (-1, -1))",
        "forks": "import os; os.fork()",
        "starts a program": "import subprocess; subprocess.run(['/bin/true'])",
        "kills": f"import os; os.kill({os.getpid()}, 0)",
    }
    return {
        name: f"try:\n    {text}\nexcept BaseException:\n    pass\n"
        "else:\n    print('breached')\n"
        for name, text in tries.items()
    }


def _run(
    code: str,
    folder: Path,
    limits: Limits,
    poll: Callable[[], object] = lambda: None,
) -> Ran:
    folder = folder.resolve()
    (folder / PROGRAM).unlink(missing_ok=True)  # it may have been made a link
    (folder / PROGRAM).write_text(code)
    # The child confines itself and only then becomes the program.
    readable = [sys.base_prefix, sys.prefix, sysconfig.get_paths()["purelib"]]
    readable += ["/lib", "/lib64", "/usr/lib", "/dev/null", "/dev/urandom"]
    wall = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from jaxlab.research import sandbox; "
        "sandbox.become(sys.argv[2], sys.argv[3], sys.argv[4:])"
    )
    here = str(Path(__file__).parent.parent.parent)
    bounds = ",".join(
        str(n) for n in (limits.cpu, limits.memory, limits.file, limits.files)
    )
    start = [sys.executable, "-IS", "-c", wall, here, str(folder), bounds, *readable]
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(
            start,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "TMPDIR": str(folder)},
            start_new_session=True,
        )
        timed_out = False
        try:
            until = time.monotonic() + limits.wall
            while child.poll() is None:
                poll()
                if time.monotonic() > until:
                    timed_out = True
                    break
                time.sleep(0.02)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        out.seek(0)
        text = out.read(limits.output).decode("utf-8", "replace")
    return Ran(child.returncode, text, timed_out)


def become(folder: str, bounds: str, readable: Sequence[str]) -> None:
    """In the child: confines itself and becomes the program, in namespaces of its own.

    This process stays as the parent of the program, which is the first of its pid
    namespace and dies with it, as does all that it started.
    """
    cpu, memory, file, files = map(int, bounds.split(","))
    for which, most in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(which, (most, most))
    confine(folder, readable)
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        forbid_processes()
        os.execv(sys.executable, [sys.executable, "-I", f"{folder}/{PROGRAM}"])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


@tool("once")
def run_code(context: Context, code: str) -> dict[str, Any]:
    """Runs a Python program in a sandbox, in your own folder `code`; no network.

    Its files there are `agents/<you>/code/...`; it reads no other file of the study.
    """
    folder = context.workspace.resolve(f"agents/{context.agent}/code")
    folder.mkdir(parents=True, exist_ok=True)
    ran = run(code, folder, poll=context.poll)
    return {"exit": ran.code, "timed_out": ran.timed_out, "output": ran.output}
