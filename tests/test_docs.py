"""What the documentation shows is run: nobody should copy a line that fails.

The ```python blocks of a page run in order as one program, in a folder that has
the repository's scripts and configs and nothing else. A block that cannot run here
carries a title, which the reader sees (```python title="on 8 GPUs"), or is text.
Commands are not run, but what they name must exist.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")
TIMEOUT = 600  # seconds; long examples belong in scripts/


def blocks(text: str) -> list[tuple[str, int, str]]:
    """Returns the fenced blocks as (info string, number of its first line, code)."""
    found, start, info, indent = [], None, "", ""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence and start is None:
            start, info, indent = number + 1, fence["info"].strip(), fence["indent"]
        elif fence and not fence["info"].strip():
            code = [row.removeprefix(indent) for row in lines[start:number]]
            found.append((info, start + 1, "\n".join(code)))
            start = None
    assert start is None, f"the block of line {start} does not end"
    return found


def program(text: str) -> str:
    """Joins a page's python blocks, each line keeping its number in the page."""
    rows = [""] * len(text.splitlines())
    for info, first, code in blocks(text):
        if info == "python":
            lines = code.splitlines()
            rows[first - 1 : first - 1 + len(lines)] = lines
    return "\n".join(rows)


def commands(text: str) -> list[tuple[int, str]]:
    """Returns (line number, command) of a page's bash blocks, continuations joined."""
    found = []
    for info, first, code in blocks(text):
        if info.split()[:1] == ["bash"]:
            joined = code.replace("\\\n", " ")
            found += [(first, line.strip()) for line in joined.splitlines()]
    return found


def complaint(command: str, targets: set[str], root: Path) -> str | None:
    """Says what a command of the documentation names that does not exist."""
    words = command.split("#")[0].split()
    if words[:1] == ["make"]:
        goals = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
        missing = [goal for goal in goals if goal not in targets]
        return f"no target {missing[0]} in the Makefile" if missing else None
    if words[:1] == ["python"]:
        own = ("scripts/", "configs/", "benchmarks/", "tests/")
        paths = [w for w in words[1:] if w.startswith(own)]
        missing = [path for path in paths if not (root / path).exists()]
        return f"{missing[0]} does not exist" if missing else None
    return None


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_reads_a_page():
    page = """
```python
x = 1
```
```python title="on 8 GPUs"
fail()
```
- in a list
  ```python
  if x:
      y = x
  ```
```bash
make train ARGS=--steps=1  # fast
python scripts/train.py \\
  configs/no.py
```
"""
    assert program(page).splitlines()[2] == "x = 1"
    assert program(page).splitlines()[9:11] == ["if x:", "    y = x"]
    assert "fail" not in program(page)
    make, train = [command for _, command in commands(page)]
    assert complaint(make, {"train"}, ROOT) is None
    assert complaint(make, {"test"}, ROOT) == "no target train in the Makefile"
    assert complaint(train.replace("scripts/train.py", ""), set(), ROOT) == (
        "configs/no.py does not exist"
    )
    with pytest.raises(AssertionError, match="does not end"):
        blocks("```python\nx = 1\n")


@pytest.mark.parametrize(
    "page", [p for p in PAGES if program(p.read_text()).strip()], ids=name
)
def test_examples_run(page, tmp_path):
    for folder in ("scripts", "configs", "docs"):
        if (ROOT / folder).exists():
            (tmp_path / folder).symlink_to(ROOT / folder)
    source = tmp_path / page.name
    source.write_text(program(page.read_text()))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [sys.executable, str(source)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert run.returncode == 0, f"an example of {name(page)} fails:\n{run.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    complaints = [
        f"{name(page)}, bash block of line {first}: {problem}"
        for first, command in commands(page.read_text())
        if (problem := complaint(command, targets, ROOT))
    ]
    assert not complaints, "\n".join(complaints)
