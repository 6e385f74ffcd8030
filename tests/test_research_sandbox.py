"""Generated code: contained, or refused."""

import os
import socket
import subprocess
import sys
import time

import pytest

from jaxlab.errors import UserError
from jaxlab.research import sandbox
from jaxlab.research.sandbox import Limits, run
from jaxlab.research.study import _allow_code
from tests.research_toy import toy_parts

REFUSED = sandbox.check()
confined = pytest.mark.skipif(bool(REFUSED), reason=f"no sandbox here: {REFUSED}")


@confined
def test_a_program_does_its_work(tmp_path):
    ran = run("import json, math; open('a', 'w').write('b'); print(math.pi)", tmp_path)
    assert (ran.code, ran.output, ran.timed_out) == (0, "3.141592653589793\n", False)
    assert (tmp_path / "a").read_text() == "b"
    assert run("raise SystemExit(3)", tmp_path).code == 3
    assert "ZeroDivisionError" in run("1 / 0", tmp_path).output


@confined
def test_hostile_programs_are_contained(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret")
    for name, text in sandbox.hostile(outside).items():
        ran = run(text, inside)
        assert (ran.code, ran.output) == (0, ""), name
    assert [p.name for p in outside.iterdir()] == ["secret"]


@confined
def test_the_walls_are_what_contains_them(tmp_path):
    """The same programs get through where nothing confines them."""
    (tmp_path / "secret").write_text("secret")
    for name in ("reads outside", "lists outside", "reads /etc/passwd"):
        program = sandbox.hostile(tmp_path)[name]
        free = subprocess.run([sys.executable, "-c", program], capture_output=True)
        assert free.stdout == b"breached\n", name


@confined
def test_no_secret_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-0123456789")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = run(
            "import os, socket\n"
            "print(sorted(os.environ))\n"
            f"socket.create_connection(('127.0.0.1', {port}), 3)",
            tmp_path,
        )
    assert "A_KEY" not in ran.output and ran.code == 1 and "Error" in ran.output


@confined
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os, time\ntry:\n    os.fork() and os.fork() and time.sleep(60)\n"
        "except OSError:\n    os._exit(7)",
        "import signal, time\n[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]\n"
        "time.sleep(60)",
    ],
)
def test_time_is_bounded(tmp_path, code):
    start = time.monotonic()
    ran = run(code, tmp_path, Limits(wall=2.0, cpu=30))
    assert time.monotonic() - start < 30 and ran.code != 0
    while left := [p for p in os.listdir("/proc") if str(tmp_path) in _command(p)]:
        assert time.monotonic() - start < 40, left
        time.sleep(0.05)


@confined
def test_threads_are_allowed_and_processes_are_not(tmp_path):
    program = (
        "import threading, os, sys\n"
        "thread = threading.Thread(target=print, args=('thread',))\n"
        "thread.start(); thread.join()\n"
        "for call in (os.fork, lambda: os.posix_spawn('/bin/true', ['true'], {}),\n"
        "             lambda: os.unshare(os.CLONE_NEWUSER) if hasattr(os, 'unshare')\n"
        "             else os.fork()):\n"
        "    try:\n"
        "        call()\n"
        "        print('started')\n"
        "    except OSError as error:\n"
        "        print(error.errno)\n"
    )
    assert run(program, tmp_path).output.split() == ["thread", "1", "1", "1"]


@confined
def test_memory_and_files_are_bounded(tmp_path):
    small = Limits(memory=512 * 2**20, file=2**20, output=1000)
    assert "MemoryError" in run("x = bytearray(2**30)", tmp_path, small).output
    run("f = open('big', 'wb')\nwhile True: f.write(bytes(2**16))", tmp_path, small)
    assert (tmp_path / "big").stat().st_size <= 2**20
    assert len(run("print('x' * 10**6)", tmp_path, small).output) <= 1000


@confined
def test_a_program_is_not_written_through_a_link(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "victim").write_text("whole")
    (inside / sandbox.PROGRAM).symlink_to(tmp_path / "victim")
    assert run("print(1)", inside).output == "1\n"
    assert (tmp_path / "victim").read_text() == "whole"


def test_it_is_refused_where_it_cannot_be_confined(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    sandbox.check.cache_clear()
    try:
        with pytest.raises(UserError, match="the kernel has no Landlock"):
            run("print(1)", tmp_path)
        with pytest.raises(UserError, match="--allow-code is refused here"):
            _allow_code(toy_parts())
    finally:
        sandbox.check.cache_clear()


def test_no_agent_runs_code_unless_allowed():
    from jaxlab.research.agents import AGENTS

    assert not any("run_code" in spec.tools for spec in AGENTS)


def _command(pid):
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""
