"""The errors of scripts/supervise.py: one line each, and nothing left running."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.cli import run_main

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/supervise.py"
RUN = ["python", "scripts/train.py", "configs/gpt_tiny.py"]


@pytest.fixture
def supervise(tmp_path, monkeypatch, capsys):
    """Calls the script in an empty folder: exit code, output, and the error lines."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    place = importlib.util.spec_from_file_location("script", SCRIPT)
    assert place and place.loader
    script = importlib.util.module_from_spec(place)
    monkeypatch.setitem(sys.modules, "script", script)
    place.loader.exec_module(script)

    def call(*words):
        with pytest.raises(SystemExit) as end:
            run_main(script.main, words)
        output, errors = capsys.readouterr()
        return end.value.code or 0, output, errors.splitlines()

    return call


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--local", "2"], 2, "give the command of a worker after --"),
        (["--local", "2", "--"], 2, "give the command of a worker after --"),
        (["--", "true"], 2, "give one of --local N, --hosts FILE and"),
        (
            ["--local", "2", "--hosts", "h", "--", "true"],
            2,
            "give one of --local N, --hosts",
        ),
        (["--local", "0", "--", "true"], 2, "--local is 0, and must be at least 1"),
        (["--hosts", "none.txt", "--", "true"], 1, "cannot read none.txt: No such"),
        (["--hosts", ".", "--", "true"], 1, "cannot read .: Is a directory"),
        (["--hosts", "empty.txt", "--", "true"], 1, "empty.txt names no host"),
        (["--locl", "2", "--", "true"], 2, "perhaps you meant --local"),
        # 16 rows on three processes.
        (["--local", "3", "--", *RUN], 2, "16 is not a multiple of"),
        (["--local", "2", "--", *RUN, "--steps", "x"], 2, "--steps"),
        (["--local", "2", "--", *RUN[:2], "configs/no.py"], 2, "configs/no.py"),
        (["--local", "2", "--hook", "a 'b", "--", "true"], 2, "--hook"),
        (["--local", "2", "--address", "192.0.2.1", "--", "true"], 1, "192.0.2.1"),
        (["agent", "--host", "a"], 2, "--keys"),
        (["agent", "--host", "a", "--keys", "no.key"], 1, "no key file no.key"),
        (["status"], 2, "status takes one folder"),
        (["status", "a", "b"], 2, "status takes one folder"),
        (["status", "none"], 1, "there is no none/status.json"),
    ],
)
def test_an_error_is_one_line(supervise, tmp_path, words, code, part):
    (tmp_path / "empty.txt").write_text("# nobody\n\n")
    found, output, errors = supervise(*words)
    assert (found, output) == (code, "")
    assert len(errors) == 1 and errors[0].startswith("error: ") and part in errors[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"time": "now"})])
def test_a_status_that_is_none_is_one_line(supervise, tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    code, output, errors = supervise("status", str(tmp_path))
    assert (code, output, len(errors)) == (1, "", 1)
    assert "status.json" in errors[0]


def test_help_names_every_option():
    command = [sys.executable, str(SCRIPT), "--help"]
    output = subprocess.check_output(command, text=True, timeout=120, cwd=ROOT)
    names = "local hosts ray nproc launch health address port sizes least gather"
    names += " patience hook metrics"
    assert all(f"--{name}" in output for name in names.split())


def test_a_host_without_an_agent_is_named(supervise, tmp_path):
    (tmp_path / "hosts.txt").write_text("far 127.0.0.1  # nobody starts its agent\n")
    none = ["--launch", "", "--gather", "0.2", "--health", "h"]
    code, output, errors = supervise("--hosts", "hosts.txt", *none, "--", "true")
    assert code == 1 and "no agent on far" in output
    assert errors == ["error: no agent came within 0.2 s: are the hosts right?"]
    keys = [tmp_path / "h" / f"{name}.key" for name in ("master", "agent")]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in keys)
    assert json.loads(keys[1].read_text())["master_secret"] == ""


def test_a_folder_has_one_supervisor(supervise, tmp_path):
    import fcntl

    (tmp_path / "h").mkdir()
    with open(tmp_path / "h" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, errors = supervise("--local", "1", "--health", "h", "--", "true")
    assert code == 1 and len(errors) == 1 and "another process" in errors[0]
