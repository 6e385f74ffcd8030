"""An agent and a tool from a package of its own, installed as a wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxlab.research.journal import read_journal

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.requires("pydantic_ai")


def plugin_source():
    """The example of docs/research.md, which is what users copy."""
    page = (ROOT / "docs/research.md").read_text()
    return page.partition("```python\n")[2].partition("```")[0]


def build_wheel(folder, source):
    path = folder / "auditor-1.0-py3-none-any.whl"
    info = "auditor-1.0.dist-info"
    files = {
        "auditor.py": source,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: auditor\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[jaxlab.research]\nauditor = auditor:register\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def installed(tmp_path, source):
    """A folder with the package, put there by pip; the environment that sees it."""
    folder = tmp_path / "site"
    wheel = build_wheel(tmp_path, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--target", str(folder), str(wheel)], check=True, capture_output=True
    )
    paths = [str(folder), str(ROOT)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def python(env, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_agent_from_a_wheel_takes_part(tmp_path):
    source = plugin_source()
    assert len(source.splitlines()) < 30
    env = installed(tmp_path, source)
    listed = python(env, "scripts/research.py", "agents")
    assert "auditor: Checks the data before claims are made." in listed.stdout
    assert "tools: read, label_noise" in listed.stdout
    program = (
        "import sys\n"
        "from jaxlab.research.parts import load_parts\n"
        "from tests.research_toy import drive, toy_parts\n"
        "sys.exit(drive(sys.argv[1], parts=load_parts(toy_parts())).code)\n"
    )
    ran = python(env, "-c", program, tmp_path / "ws")
    assert ran.returncode == 0, ran.stderr
    events = read_journal(tmp_path / "ws/journal.jsonl")
    ends = [e for e in events if e.kind == "tool_end" and e.agent == "auditor"]
    assert [e.data["tool"] for e in ends] == ["label_noise", "finish"]
    assert ends[0].data["result"] == {"status": "done", "value": 0.99}
    # and without the package there is no trace of it
    assert (
        "auditor"
        not in python(dict(os.environ), "scripts/research.py", "agents").stdout
    )


@pytest.mark.requires("typst", "pypdfium2", "matplotlib")
def test_it_takes_part_in_a_study_by_the_rules(tmp_path):
    """Question to verified paper by the built-in manager, who finds it there."""
    env = installed(tmp_path, plugin_source())
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.test_research_study import asked, verified\n"
        "code = asked(Path(sys.argv[1])).code\n"
        "verified(Path(sys.argv[1]) / 'ws'); sys.exit(code)\n"
    )
    ran = python(env, "-c", program, tmp_path)
    assert ran.returncode == 0, ran.stderr
    events = read_journal(tmp_path / "ws/journal.jsonl")
    agents = [e.data["agent"] for e in events if e.kind == "agent_start"]
    assert agents.index("experiment") < agents.index("auditor") < agents.index("writer")
    ends = [e for e in events if e.kind == "tool_end" and e.agent == "auditor"]
    assert [e.data["tool"] for e in ends] == ["label_noise", "finish"]
    # It has read what the last run that it was given has found.
    assert ends[0].data["result"]["metrics"], ends[0].data["result"]


@pytest.mark.parametrize(
    "source, words",
    [
        (
            "def register(parts): raise ValueError('broken')",
            "fails (ValueError: broken)",
        ),
        ("", "fails (AttributeError"),
        (
            "from jaxlab.research import AgentSpec\n"
            "def register(parts):\n"
            "    parts.agent(AgentSpec('x', 'p', 'i', ('no_tool',)))",
            "agent 'x' names tools that are not there: no_tool",
        ),
    ],
)
def test_a_package_that_is_wrong_is_named(tmp_path, source, words):
    ran = python(installed(tmp_path, source), "scripts/research.py", "agents")
    assert ran.returncode == 1 and ran.stderr.startswith("error: ")
    assert words in ran.stderr
