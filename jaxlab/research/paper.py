"""The paper's folder: sections are set, sources made, the PDF compiled.

Nothing is compiled while the text has a finding, so no PDF ever shows a typed number,
an unknown citation or a claim that its test does not bear out.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError
from jaxlab.research import document, drafts, facts, library, pdf, plans, typeset
from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import ToolError
from jaxlab.research.workspace import Workspace

SOURCE = "paper/paper.json"
BUILD = "paper/build.json"


def load(workspace: Workspace) -> document.Document:
    """The manuscript.

    Raises:
        ToolError: there is none, or it is none.
    """
    made = workspace.read_json(SOURCE)
    document.check_shape(made)
    return made


def findings(workspace: Workspace) -> list[str]:
    """What is wrong with the manuscript's text; see `document.lint`."""
    keys = list(library.stored(workspace))
    return document.lint(load(workspace), facts.ledger(workspace), keys)


def no_links(workspace: Workspace) -> None:
    """Refuses links in the folders that a compiler reads, which it would follow.

    Raises:
        ToolError: there is one.
    """
    for folder in ("paper", "figures"):
        for path in (workspace.root / folder, *(workspace.root / folder).rglob("*")):
            if path.is_symlink():
                name = path.relative_to(workspace.root)
                raise ToolError(f"{name} is a symbolic link; remove it")


def sources(workspace: Workspace, footer: str) -> dict[str, str]:
    """Every file that a compiler reads, by name below `paper`.

    Raises:
        ToolError: a fact, figure or entry is missing.
    """
    made, ledger = load(workspace), facts.ledger(workspace)
    keys = typeset.cited(document.texts(made), ledger)
    return {
        "main.typ": typeset.typst(made, ledger, footer, bool(keys)).text,
        "main.tex": typeset.latex(made, ledger, footer, bool(keys)).text,
        "refs.bib": library.bibtex(workspace, keys),
    }


def compile_typst(workspace: Workspace) -> tuple[bytes, list[pdf.Span]]:
    """The PDF of `paper/main.typ`, and where its spans stand.

    The same source gives the same bytes with one version of typst; only files of the
    workspace and typst's own fonts are used.

    Raises:
        ToolError: what typst says.
    """
    try:
        import typst
    except ImportError:
        raise UserError(
            'papers need the extra: pip install "jaxlab[research]"'
        ) from None
    no_links(workspace)
    root = str(workspace.root)
    compiler = typst.Compiler(root=root, ignore_system_fonts=True)
    main, made = str(workspace.root / "paper/main.typ"), b""
    try:
        made = compiler.compile(main, timestamp=0)
        assert isinstance(made, bytes)
        where = json.loads(compiler.query("<spans>", field="value", one=True))
    except typst.TypstError as error:
        raise ToolError(f"typst: {error}") from None
    return made, pdf.spans(where)


def compile_latex(workspace: Workspace) -> tuple[bytes, list[str]]:
    """The PDF of `paper/main.tex` and the ids of its facts in order, by pdflatex.

    It runs in a copy, without shell and confined to its folder.

    Raises:
        ToolError: what TeX says.
    """
    no_links(workspace)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "paper"
        shutil.copytree(workspace.root / "paper", folder)
        shutil.copytree(workspace.root / "figures", Path(name) / "figures")
        env = {"PATH": os.environ.get("PATH", ""), "HOME": name}
        env |= {"openin_any": "r", "openout_any": "p"}
        tex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error"]
        tex += ["-no-shell-escape", "main.tex"]
        steps = [tex, ["bibtex", "main"], tex, tex]
        if not (folder / "refs.bib").read_text().strip():
            steps = [tex, tex]
        for step in steps:
            done = subprocess.run(
                step, cwd=folder, env=env, capture_output=True, text=True, timeout=120
            )
            if done.returncode and step[0] == "pdflatex":
                lines = [r for r in done.stdout.splitlines() if r.startswith("!")]
                raise ToolError(
                    f"pdflatex: {' '.join(lines[:3]) or done.stdout[-300:]}"
                )
        order = (folder / "main.facts").read_text().split()
        return (folder / "main.pdf").read_bytes(), order


def footer_of(options: dict[str, Any]) -> str:
    """What every page says of who wrote it."""
    rule = str(options.get("model", "rule")) == "rule"
    return typeset.RULE_BASED if rule else typeset.OTHER


@tool("idempotent")
def draft_section(
    context: Context, section: str, plan: int | None = None, place: bool = False
) -> dict[str, Any] | Result:
    """Drafts a section from the facts of a plan, to be set by set_section.

    There are title, abstract, method, results, follow-up, runs and limits. Without a
    plan: of the question's main one. `place` sets it at once.
    """
    found = plans.in_force(context.workspace, context.events())
    main = drafts.main_plan(found) if plan is None else plan
    made = drafts.draft(context.workspace, section, main, found)
    if place and made["blocks"]:
        return put(context, made["title"], made["blocks"])
    return {"findings": [], "empty": True} if place else made


@tool("idempotent")
def set_section(context: Context, title: str, blocks: list[dict[str, Any]]) -> Result:
    """Adds a section, or replaces the one of that title; Title and Abstract are texts.

    Blocks: {text}, {items}, {table, caption, header, rows}, {figure, caption}. Numbers
    only as {fact:ID}; comparisons as {claim:PLAN/NAME}; citations as {cite:KEY}. No
    blocks: removes it.
    """
    return put(context, title, blocks)


def put(context: Context, title: str, blocks: list[dict[str, Any]]) -> Result:
    """See `set_section`."""
    workspace = context.workspace
    made: dict[str, Any] = {"title": "", "abstract": "", "sections": []}
    if workspace.exists(SOURCE):
        made = load(workspace)
    if title in ("Title", "Abstract"):
        if len(blocks) != 1 or set(blocks[0]) != {"text"}:
            raise ToolError(f"{title} is one block of text")
        made[title.lower()] = blocks[0]["text"]
    else:
        old = [s["title"] for s in made["sections"]]
        section = {"title": title, "blocks": blocks}
        if title in old and blocks:
            made["sections"][old.index(title)] = section
        elif blocks:
            made["sections"].append(section)
        else:
            made["sections"] = [s for s in made["sections"] if s["title"] != title]
    document.check_shape(made)
    ledger, keys = facts.ledger(workspace), list(library.stored(workspace))
    found = document.lint(made, ledger, keys)
    return Result({"findings": found[:10]}, (workspace.write_json(SOURCE, made),))


@tool("idempotent")
def compile_paper(context: Context) -> Result:
    """Checks the text and compiles it: paper.pdf, and LaTeX source (PDF where TeX is).

    The result says what was found; nothing is compiled before that is mended.
    """
    workspace = context.workspace
    found = findings(workspace)
    if found:
        raise ToolError("\n".join(found[:20]))
    footer = footer_of(context.options)
    refs = []
    for name, text in sources(workspace, footer).items():
        refs.append(workspace.write_text(f"paper/{name}", text))
    made, spans = compile_typst(workspace)
    chars = pdf.read(made)
    numbers = pdf.numbers(chars, spans)
    untraced = [n for n in numbers if not n.kind]
    if untraced:
        raise ToolError(f"the number {untraced[0].text!r} of the PDF has no source")
    refs.append(workspace.write_bytes("paper/paper.pdf", made))
    build = {
        "footer": footer,
        "versions": versions(),
        "pages": max((c.page for c in chars), default=0),
        "numbers": len(numbers),
        "facts": sum(n.kind == "fact" for n in numbers),
    }
    refs.append(workspace.write_json(BUILD, build))
    value = build | {"latex": "no TeX here"}
    if shutil.which("pdflatex"):
        value["latex"] = "compiled"
        try:
            body, _ = compile_latex(workspace)
            refs.append(workspace.write_bytes("paper/latex.pdf", body))
        except (ToolError, subprocess.TimeoutExpired) as error:
            value["latex"] = f"failed: {error}"
    return Result(value, tuple(refs))


def versions() -> dict[str, str]:
    """Of what makes and reads the PDF."""
    import importlib.metadata

    found = {}
    for name in ("typst", "matplotlib", "pypdfium2"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


TOOLS = (draft_section, set_section, library.cite, compile_paper)
