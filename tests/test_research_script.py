"""scripts/research.py as a person meets it: messages, exit codes, one-line errors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlab.research.study import say
from tests.research_toy import drive

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.requires("pydantic_ai")


def research(*arguments):
    return subprocess.run(
        [sys.executable, "scripts/research.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nonsense"], "no command 'nonsense'"),
        (["run", "--workspace", "x"], "give a question, or --compare"),
        (["run", "q", "--budget", "run=3"], "limits are usd"),
        (["run", "q", "--autonomy", "none"], "none of full, approve-plan"),
        (["run", "q", "--option", "parallel"], "give name=value"),
        (["run", "q", "--modle", "rule"], "perhaps you meant --model"),
        (["run", "q", "--model", "gpt"], "PROVIDER:NAME"),
        (["run", "q", "--model", "openai:x", "--base-url", "http://10.1.1.1/v1"],
         "--allow-remote"),
        (["say", "ws"], "say takes a WORKSPACE TEXT"),
        (["approve", "ws"], "approve takes a WORKSPACE TARGET"),
        (["status"], "give one workspace"),
    ],
)  # fmt: skip
def test_bad_usage_is_told_in_a_line(tmp_path, arguments, words):
    if arguments[0] == "run" and "--workspace" not in arguments:
        arguments = [*arguments, "--workspace", str(tmp_path / "ws")]
    ran = research(*arguments)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("error: ") and words in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "ws/journal.jsonl").exists()


def test_an_installed_package_takes_the_configs_of_the_checkout(tmp_path):
    """`pip install .` puts it elsewhere, and scripts/ and configs/ stay."""
    installed = tmp_path / "site"
    shutil.copytree(ROOT / "jaxlab", installed / "jaxlab")

    def asked(folder, workspace):
        question = "does gpt_tiny beat nonsense?"
        return subprocess.run(
            [sys.executable, ROOT / "scripts/research.py", "run", question,
             "--workspace", workspace],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    ran = asked(ROOT, tmp_path / "here")
    assert ran.returncode == 5 and "'nonsense' names no config" in ran.stderr
    assert "gpt_noloco" in ran.stderr
    ran = asked(tmp_path, tmp_path / "there")
    assert ran.returncode == 5 and "start this in a checkout of jaxlab" in ran.stderr


@pytest.mark.parametrize("command", ["status", "cost", "log", "resume", "say"])
def test_no_study(tmp_path, command):
    ran = research(command, tmp_path, *(["hello"] if command == "say" else []))
    assert ran.returncode == 1 and ran.stderr.startswith("error: ")


def test_a_study_from_outside(tmp_path):
    folder = tmp_path / "ws"
    assert drive(folder, "a").code == 0
    say(folder, "also b")
    told = research("status", folder)
    assert told.returncode == 0
    for words in ("train: a", "ended, ", "runs: 1 done", "messages not read yet: 1"):
        assert words in told.stdout
    assert '"requests": 7' in research("cost", folder).stdout
    assert "gate G3 passed" in research("log", folder, "--lines", "99").stdout
    sent = research("interrupt", folder, "try", "again")
    assert (
        sent.returncode == 0 and "it is read when the study is resumed" in sent.stdout
    )
    assert len([*(folder / "inbox/new").iterdir()]) == 2
