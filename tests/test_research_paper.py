"""Runs, facts, papers: a study made once by the tools, then edited in many ways."""

import json
import math
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlab.research import (
    analysis,
    document,
    experiments,
    facts,
    figures,
    gates,
    library,
    paper,
    pdf,
    plans,
    process,
    verify,
)
from jaxlab.research.types import Interrupted, ToolError
from tests.research_mutations import mutations, rehash
from tests.research_study import study, write_config

pytestmark = pytest.mark.requires("typst", "pypdfium2", "matplotlib", "scipy")


SHARED = {"steps": 3, "shared": 0.05, "noise": 0.01, "seconds": 0.0}


def propose(context, a, b, seeds=(1, 2, 3, 4), shared=(), **more):
    arms = [{"name": "b", "config": b}, {"name": "a", "config": a}]
    arms = [arm | {"overrides": dict(shared)} for arm in arms]
    arms[0]["overrides"] |= {"salt": "b"} if shared else {}
    plan = {
        "metric": "eval/loss",
        "direction": "lower",
        "arms": arms,
        "comparisons": [{"name": "b_vs_a", "weights": {"b": 1, "a": -1}}],
        "seeds": list(seeds),
    }
    return plans.propose_plan(context, **plan | more).value


def write_paper(context):
    facts.compute_facts(context)
    figures.make_figures(context)
    for query in ("student", "holm", "landemets"):
        library.cite(context, query)
    refs = [*facts.compute_facts(context).refs]
    for section in ("title", "abstract", "method", "results", "runs", "limits"):
        made = paper.draft_section(context, section, place=True)
        assert made.value["findings"] == []
    refs += paper.compile_paper(context).refs
    gates.record_review(context, dict.fromkeys(gates.REVIEW, True), [])
    refs += figures.make_figures(context).refs
    context.record("tool_end", refs=[r.json() for r in refs])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished study: its folder."""
    folder = tmp_path_factory.mktemp("made")
    a, b = write_config(folder, "a"), write_config(folder, "b", level=1.9, diverge=0)
    with study(folder / "ws", configs=[a, b]) as context:
        propose(context, a, b, shared=SHARED.items(), min_effect=0.05)
        experiments.run_plan(context, 1)
        write_paper(context)
    return folder / "ws"


def test_settings_that_arms_share_are_rows_and_not_columns(made):
    """Side by side a dozen would run into each other."""
    with study(made) as context:
        sections = paper.load(context.workspace)["sections"]
    blocks = [block for section in sections for block in section["blocks"]]
    tables = {block["table"]: block for block in blocks if "table" in block}
    assert tables["settings-p1"]["header"] == ["arm", "{fact:p1.field.salt}"]
    assert len(tables["shared-p1"]["rows"]) == len(SHARED)


@pytest.mark.parametrize(
    ("said", "edited"),
    [
        ('"noise": 0.01', '"noise": 0.02'),
        ('"vocab": 7', '"vocab": 7, "width": 1'),
        ('"crash": 0', '"crash": null'),
    ],
)
def test_a_run_of_another_config_is_found(made, tmp_path, said, edited):
    shutil.copytree(made, tmp_path / "ws")
    path = next((tmp_path / "ws/runs").glob("*/config.json"))
    assert said in path.read_text()
    path.write_text(path.read_text().replace(said, edited))
    with study(tmp_path / "ws") as context:
        found = list(gates.method_true(context.workspace, context.events()))
    assert found == [f"run {path.parent.name} did not train what plan 1 says"]


def test_a_whole_study_verifies(made):
    report = verify.verify(made)
    assert report.findings == ()
    kinds = report.json()["numbers"]
    assert kinds["fact"] > 30 and "none" not in kinds
    assert report.runs == 8


def test_facts_are_those_of_the_metrics_by_code_of_our_own(made):
    """Reads nothing but plan, metrics and PDF, with NumPy and regular expressions."""
    import scipy.stats

    plan = json.loads((made / "plans/1.json").read_text())
    finals = {}
    for arm, runs in plan["runs"].items():
        logs = [(made / "runs" / r / "metrics.jsonl").read_text() for r in runs]
        rows = [json.loads(log.splitlines()[-1]) for log in logs]
        finals[arm] = np.array([row["eval/loss"] for row in rows])
    d = finals["b"] - finals["a"]
    p = scipy.stats.ttest_rel(finals["b"], finals["a"]).pvalue
    text = "".join(c.text for c in pdf.read((made / "paper/paper.pdf").read_bytes()))
    mean = f"{d.mean():+.3g}".replace("-", "−")
    shown = "<0.001" if p < 0.001 else f"{p:.3f}"
    assert f"meandifference{mean}," in text
    assert f"correctedp{shown}" in text
    for arm in "ab":
        assert f"{finals[arm].mean():.4f}" in text
        assert f"{finals[arm].std(ddof=1):.2g}" in text


@pytest.mark.parametrize("seed", range(20))
def test_every_edit_is_found(made, tmp_path, seed):
    """Single edits; with `rehash` also where the journal is rewritten to match."""
    draw = random.Random(seed)
    folder = tmp_path / "ws"
    shutil.copytree(made, folder)
    kind, what = mutations(folder, draw)
    hidden = kind in ("fact", "pdf", "metrics", "source") and seed % 2 == 0
    if hidden:
        rehash(folder)
    report = verify.verify(folder)
    assert not report.ok, f"{kind}: {what} was not found"
    if hidden:
        assert any(f[0] == "G" for f in report.findings)


def test_both_writers_show_the_same_spans(made):
    from jaxlab.research import typeset
    from jaxlab.research.workspace import open_workspace

    ws = open_workspace(made)
    text, ledger = paper.load(ws), facts.ledger(ws)
    one = typeset.typst(text, ledger, "x")
    other = typeset.latex(text, ledger, "x")
    assert one.spans == other.spans
    ids = re.findall(r"\\jlfact\{\\detokenize\{([^}]*)\}", other.text)
    assert ids == [i for kind, i, _ in one.spans if kind == "fact"]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles_with_the_same_facts(made):
    from jaxlab.research import typeset
    from jaxlab.research.workspace import open_workspace

    ws = open_workspace(made)
    body, order = paper.compile_latex(ws)
    spans = typeset.typst(paper.load(ws), facts.ledger(ws), "x").spans
    assert body.startswith(b"%PDF")
    assert order == [i for kind, i, _ in spans if kind == "fact"]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("It reached 73.4.", "'7' is typed"),
        ("It took ½ of it.", "'½' is typed"),
        ("It took ٣ of it.", "'٣' is typed"),
        ("It is twice as slow.", "number word 'twice'"),
        ("See {fact:p9.no}.", "there is no fact p9.no"),
        ("As {cite:smith2020} said.", "not in the stored bibliography"),
        ("b is better than a.", "'better' is said without a {claim"),
        ("b is worse, {fact:p1.arm.b}: {claim:1/b_vs_a}.", "'worse' is said, but"),
        ("a is better, {fact:p1.arm.a}: {claim:1/b_vs_a}.", "'better' is said, but"),
        ("They are equivalent: {claim:1/b_vs_a}.", "'equivalent' is said, but"),
        ("A \u200bhidden letter.", "invisible character"),
        ("A {stray} brace.", "stray brace"),
        ("See {figure:none}.", "there is no figure 'none'"),
    ],
)
def test_what_a_text_may_not_say(made, text, finding):
    from jaxlab.research.workspace import open_workspace

    ledger = facts.ledger(open_workspace(made))
    found = document.lint({"title": "t", "abstract": text, "sections": []}, ledger)
    assert any(finding in f for f in found), found


def test_what_a_text_may_say(made):
    from jaxlab.research.workspace import open_workspace

    ledger = facts.ledger(open_workspace(made))
    text = "{fact:p1.arm.b} is better: {claim:1/b_vs_a}. The mean is {fact:p1.mean.b}."
    assert document.lint({"title": "t", "abstract": text, "sections": []}, ledger) == []


def test_links_in_the_paper_folder_are_refused(made, tmp_path):
    folder = tmp_path / "ws"
    shutil.copytree(made, folder)
    (folder / "figures/arms-p1.svg").unlink()
    (folder / "figures/arms-p1.svg").symlink_to("/etc/passwd")
    report = verify.verify(folder)
    assert any("symbolic link" in f or "is a link" in f for f in report.findings)


def test_bibliography_commands_and_unknown_entries_are_left_out():
    text = (
        "@article{good, title={On {\\'e}tale things}}\n"
        "@article{bad, title={\\input{/etc/passwd}}}\n@comment{x, y}\n"
        "@book{open, title={"
    )
    assert [e.key for e in library.parse(text)] == ["good"]


def test_failed_runs_are_kept_and_counted(tmp_path):
    a = write_config(tmp_path, "a", crash=1)
    b = write_config(tmp_path, "b", diverge=2)
    with study(tmp_path / "ws", configs=[a, b]) as context:
        propose(context, a, b)
        told = experiments.run_plan(context, 1).value
        assert told["runs"] == {"failed": 4, "done": 2, "diverged": 2}
        assert told["found"] == {"b_vs_a": "unstable"}
        facts.compute_facts(context)
        shown = facts.list_facts(context)
        assert shown["p1.runs.a.failed"] == "4" and shown["p1.runs.b.diverged"] == "2"
        run = context.workspace.read_json("plans/1.json")["runs"]["a"][0]
        assert "crashed as asked" in analysis.outcome(context.workspace, run)["reason"]


@pytest.mark.parametrize(
    ("limits", "fields", "status"),
    [
        ({"wall": 0.5}, {"seconds": 30}, "timeout"),
        ({"memory": 1e6}, {"seconds": 3}, "failed"),
        ({"disk": 100.0}, {"seconds": 3}, "failed"),
    ],
)
def test_limits_end_a_run(tmp_path, limits, fields, status):
    a, b = write_config(tmp_path, "a", **fields), write_config(tmp_path, "b")
    with study(tmp_path / "ws", configs=[a, b]) as context:
        propose(context, a, b, seeds=(1, 2), limits=limits)
        begin = time.monotonic()
        told = experiments.run_plan(context, 1).value
        assert told["runs"][status] >= 2
        assert time.monotonic() - begin < 60


def test_no_run_is_made_twice(tmp_path):
    a, b = write_config(tmp_path, "a"), write_config(tmp_path, "b", level=1.9)
    with study(tmp_path / "ws", configs=[a, b]) as context:
        propose(context, a, b, seeds=(1, 2), alpha=0.04)
        experiments.run_plan(context, 1)
        assert propose(context, a, b, seeds=(1, 2), alpha=0.04)["plan"] == 1
        again = propose(context, a, b, seeds=(1, 2, 3), stage="follow-up", alpha=0.01)
        assert again == {"plan": 2, "runs": 6, "finished": 4}
        experiments.run_plan(context, 2)
        starts = [e.data["run"] for e in context.events() if e.kind == "run_start"]
        assert len(starts) == len(set(starts)) == 6
        with pytest.raises(ToolError, match="have left"):
            propose(context, a, b, seeds=(1, 2, 3, 4), alpha=0.01)


def test_a_run_outlives_its_driver_and_is_found_again(tmp_path):
    a = write_config(tmp_path, "a", seconds=3)
    b = write_config(tmp_path, "b", level=1.9, seconds=3)
    polls = iter(range(100))

    class Killed(BaseException):
        pass

    def die():
        if next(polls) > 5:
            raise Killed

    options = {"configs": [a, b]}
    with pytest.raises(Killed), study(tmp_path / "ws", poll=die, **options) as context:
        propose(context, a, b, seeds=(1, 2))
        experiments.run_plan(context, 1)
    with study(tmp_path / "ws", **options) as context:
        experiments.run_plan(context, 1)
        starts = [e.data["run"] for e in context.events() if e.kind == "run_start"]
        assert len(starts) == 4 and len(set(starts)) == 4
        ends = [e for e in context.events() if e.kind == "run_end"]
        assert {e.data["status"] for e in ends} == {"done"}


def test_a_dead_worker_takes_its_trainer_along_and_is_started_again(tmp_path):
    a = write_config(tmp_path, "a", seconds=2)
    b = write_config(tmp_path, "b")
    killed = []

    def kill_one():
        for path in (tmp_path / "ws/runs").glob("*/process.json"):
            found = json.loads(path.read_text())
            spec = json.loads((path.parent / "spec.json").read_text())
            if not killed and spec["config"]["seconds"] and "pid" in found:
                os.kill(found["pid"], signal.SIGKILL)
                killed.append(process.Process(**found))
        return False

    with study(tmp_path / "ws", poll=kill_one, configs=[a, b]) as context:
        propose(context, a, b, seeds=(1, 2))
        told = experiments.run_plan(context, 1).value
        assert killed and told["runs"] == {"done": 4}
        starts = [e.data["run"] for e in context.events() if e.kind == "run_start"]
        assert len(starts) == 5 and len(set(starts)) == 4


def test_an_interrupt_ends_the_processes_and_leaves_a_result(tmp_path):
    a = write_config(tmp_path, "a", seconds=60)
    b = write_config(tmp_path, "b", level=1.9, seconds=60)
    begin = []

    def interrupt():
        if list((tmp_path / "ws/runs").glob("*/process.json")):
            begin.append(time.monotonic())
            raise Interrupted

    with study(tmp_path / "ws", poll=interrupt, configs=[a, b]) as context:
        propose(context, a, b, seeds=(1, 2))
        with pytest.raises(Interrupted):
            experiments.run_plan(context, 1)
        assert time.monotonic() - begin[0] < 20
        ends = [e.data["status"] for e in context.events() if e.kind == "run_end"]
        assert ends and set(ends) == {"cancelled"}
        where = experiments.Local()
        folders = (tmp_path / "ws/runs").iterdir()
        assert not any(where.running(folder) for folder in folders)


def test_secrets_of_the_environment_do_not_reach_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("JAX_TOKEN", "secret")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = plans.environment()
    assert "JAX_PLATFORMS" in found and "PATH" in found
    assert not {"OPENAI_API_KEY", "JAX_TOKEN"} & set(found)


@pytest.mark.parametrize(
    ("arm", "complaint"),
    [
        ({"config": "/etc/passwd"}, "no config"),
        ({"config": "../evil.py"}, "no config"),
        ({"overrides": {"out": "/tmp/x"}}, "may not set out"),
        ({"overrides": {"data.cache": "x"}}, "may not set data.cache"),
        ({"overrides": {"salt": "/etc/passwd"}}, "may not set salt"),
        ({"overrides": {"--level": 1}}, "no name of a field"),
        ({"overrides": {"level; rm": 1}}, "no name of a field"),
        ({"overrides": {"nosuch": 1}}, "no field nosuch"),
        ({"overrides": {"steps": 10**9}}, "at most"),
    ],
)
def test_hostile_arms_are_refused(tmp_path, arm, complaint):
    a = write_config(tmp_path, "a")
    with study(tmp_path / "ws", configs=[a]) as context:
        arms = [{"name": "x", "config": a} | arm, {"name": "y", "config": a}]
        with pytest.raises(ToolError, match=complaint):
            plans.propose_plan(
                context,
                metric="eval/loss",
                direction="lower",
                arms=arms,
                seeds=[1, 2],
                comparisons=[{"name": "x_vs_y", "weights": {"x": 1, "y": -1}}],
            )
        assert [e.kind for e in context.events()] == ["study"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seeds": [1, 1]}, "two seeds"),
        ({"looks": [2, 3]}, "looks are"),
        ({"alpha": 0.9}, "no level"),
        ({"alpha": 0.06}, "have left"),
        ({"test": "sign-flip"}, "could not show a difference"),
        ({"limits": {"wall": -1.0}}, "limit wall"),
        ({"comparisons": []}, "names its comparisons"),
        ({"comparisons": [{"name": "a_vs_b", "weights": {"b": 1, "a": -1}}]}, "minus"),
        ({"comparisons": [{"name": "c", "weights": {"b": 1}}]}, "add up to zero"),
    ],
)
def test_plans_that_cannot_answer_are_refused(tmp_path, change, complaint):
    a, b = write_config(tmp_path, "a"), write_config(tmp_path, "b", level=1.9)
    with study(tmp_path / "ws", configs=[a, b]) as context:
        with pytest.raises(ToolError, match=complaint):
            propose(context, a, b, **change)


def test_an_amendment_has_the_alpha_that_is_left(tmp_path):
    a, b = write_config(tmp_path, "a"), write_config(tmp_path, "b", level=1.9)
    with study(tmp_path / "ws", configs=[a, b]) as context:
        propose(context, a, b, seeds=(1, 2, 3, 4), looks=[2, 4])
        changes = {"seeds": [1, 2, 3, 4, 5], "looks": [2, 5]}
        plans.amend_plan(context, plan=1, why="more seeds", changes=changes)
        before = context.workspace.read_json("plans/2.json")
        assert before["alpha"] == 0.05 and before["amends"] == 1
        experiments.run_plan(context, 2)
        changes = {"seeds": [1, 2, 3, 4, 5, 6], "looks": [6]}
        if analysis.looks_taken(context.workspace, before) == [0]:
            made = plans.amend_plan(context, plan=2, why="again", changes=changes)
            assert made.value["plan"] == 3
        with pytest.raises(ToolError, match="needs a reason"):
            plans.amend_plan(context, plan=2, why=" ", changes={})


def test_run_ids_depend_on_config_code_and_data():
    spec = {"config": {"lr": 1.0}, "code_hash": "c", "data": "d"}
    ids = {
        plans.run_id(spec),
        plans.run_id(spec | {"config": {"lr": 2.0}}),
        plans.run_id(spec | {"code_hash": "e"}),
        plans.run_id(spec | {"data": "f"}),
    }
    assert len(ids) == 4 and all(re.fullmatch("[0-9a-f]{16}", i) for i in ids)
    assert plans.run_id(dict(reversed(spec.items()))) == plans.run_id(spec)


def test_positions_tell_numbers_apart():
    """The same digits count only where their span stands."""
    span = pdf.Span("fact", "a", (1, 100.0, 50.0), (1, 100.0, 70.0))
    inside = [pdf.Char(1, 100.0, 50.0 + 5 * i, c) for i, c in enumerate("3.1")]
    outside = [pdf.Char(1, 120.0, 50.0 + 5 * i, c) for i, c in enumerate("3.1")]
    found = pdf.numbers([*inside, *outside], [span])
    assert [(n.text, n.kind) for n in found] == [("3.1", "fact"), ("3.1", "")]
    assert pdf.difference(inside, inside) is None
    moved = [inside[0]._replace(text="8"), *inside[1:]]
    assert "8.1" in (pdf.difference(moved, inside) or "")
    assert not math.isnan(span.end[1])


def test_a_workspace_path_is_needed(tmp_path):
    from jaxlab.errors import UserError

    with pytest.raises(UserError, match="no workspace"):
        verify.verify(Path(tmp_path))
