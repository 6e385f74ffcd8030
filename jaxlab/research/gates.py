"""The gates that a paper passes before a study is done: code, not opinions.

Each is a pure function of the workspace and its journal's events. A score of the
reviewer is kept as advice and decides nothing.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxlab.research import (
    analysis,
    document,
    facts,
    figures,
    library,
    paper,
    pdf,
    plans,
)
from jaxlab.research.journal import Event, digest
from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import GateResult, ToolError
from jaxlab.research.workspace import Workspace

Events = Sequence[Event]
# What a file that was edited can make go wrong while it is read.
BROKEN = (
    ToolError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    OSError,
)
REVIEW = ("claims", "tests", "failures", "method", "limits")


def run_gates(workspace: Workspace, events: Events) -> list[GateResult]:
    """The verdicts of all gates."""
    return [gate(name, workspace, events) for name in GATES]


def gate(name: str, workspace: Workspace, events: Events) -> GateResult:
    """The verdict of one gate, G1 to G10."""
    findings: list[str] = []
    try:
        for finding in GATES[name](workspace, events):
            findings.append(finding)
    except BROKEN as error:
        findings.append(f"{type(error).__name__}: {error}")
    return GateResult(name, not findings, tuple(findings))


def plan_unchanged(workspace: Workspace, events: Events) -> Iterator[str]:
    """G1: plans are those that were registered, before their runs."""
    known = plans.registered(events)
    if not known:
        yield "no plan was registered"
    for n, event in known.items():
        if workspace.ref(f"plans/{n}.json").sha256 != event.data["sha256"]:
            yield f"plans/{n}.json was changed after it was registered"
        first = [
            e.i for e in events if e.kind == "run_start" and e.data.get("plan") == n
        ]
        if first and first[0] < event.i:
            yield f"plan {n} was registered after its first run"
        if event.kind == "amendment" and not event.data.get("why"):
            yield f"plan {n} amends another and does not say why"
        yield from _ids(plans.read_plan(workspace, n), n)


def _ids(plan: dict[str, Any], n: int) -> Iterator[str]:
    """Run ids are the hashes of what the plan says."""
    for arm, what in plan["resolved"].items():
        for seed, run in zip(plan["seeds"], plan["runs"][arm], strict=True):
            spec = {"config": what["config"] | {"seed": seed}, "data": what["data"]}
            if plans.run_id(spec | {"code_hash": plan["code_hash"]}) != run:
                yield f"plan {n}: run {run} of arm {arm} is not the run planned"


def runs_accounted(workspace: Workspace, events: Events) -> Iterator[str]:
    """G2: every planned run has ended or was not needed, and the paper counts all."""
    text = workspace.read_text(paper.SOURCE) if workspace.exists(paper.SOURCE) else ""
    spent = any(e.kind == "finish" and e.data.get("status") == "budget" for e in events)
    for n, plan in plans.in_force(workspace, events).items():
        state = analysis.summary(workspace, plan)
        if not (state["over"] or spent):
            looks = f"{state['looks_taken']} of {len(plan['looks'])}"
            yield f"plan {n}: {looks} looks taken"
        for needed in ("", *_statuses(state)):
            wanted = f"p{n}.runs" + (f".{needed.replace(' ', '_')}" if needed else "")
            if f"{{fact:{wanted}}}" not in text:
                yield f"the paper does not say {{fact:{wanted}}}"
        for runs in plan["runs"].values():
            for run in runs:
                yield from _run(workspace, events, plan, run)


def _statuses(state: dict[str, Any]) -> list[str]:
    return sorted({s for counts in state["runs"].values() for s in counts})


def _run(
    workspace: Workspace, events: Events, plan: dict[str, Any], run: str
) -> Iterator[str]:
    """What is wrong with a run's files."""
    result = analysis.outcome(workspace, run)
    if result is None:
        return
    metrics = f"runs/{run}/metrics.jsonl"
    body = workspace.read_bytes(metrics) if workspace.exists(metrics) else b""
    if hashlib.sha256(body).hexdigest() != result["metrics_sha256"]:
        yield f"{metrics} was changed after the run ended"
    ends = [e for e in events if e.kind == "run_end" and e.data.get("run") == run]
    sha = workspace.ref(f"runs/{run}/result.json").sha256
    if not ends:
        yield f"run {run} has a result, but the journal has no end of it"
    elif ends[-1].data.get("sha256") != sha:
        yield f"runs/{run}/result.json was changed after the run ended"
    elif ends[-1].data.get("metrics_sha256") != result["metrics_sha256"]:
        yield f"{metrics} was changed after the run ended"
    if result["run_id"] != run or result["code_hash"] != plan["code_hash"]:
        yield f"runs/{run}/result.json belongs to another run"


def facts_hold(workspace: Workspace, _: Events) -> Iterator[str]:
    """G3: every fact, computed again, is what the ledger says."""
    entries = workspace.facts()
    if not entries:
        yield "there are no facts"
    for fact in entries:
        if wrong := facts.recompute(workspace, fact):
            yield wrong
    ids = [fact["id"] for fact in entries]
    if len(set(ids)) < len(ids):
        yield "the ledger has an id twice"


def numbers_traced(workspace: Workspace, _: Events) -> Iterator[str]:
    """G4: no number is typed; the PDF shows what the text makes, place by place."""
    for finding in paper.findings(workspace):
        if "typed" in finding or "invisible" in finding or "no fact" in finding:
            yield finding
    footer = workspace.read_json(paper.BUILD)["footer"]
    for name, text in paper.sources(workspace, footer).items():
        if workspace.read_bytes(f"paper/{name}") != text.encode():
            yield f"paper/{name} is not what the manuscript makes"
    made, spans = paper.compile_typst(workspace)
    have = workspace.read_bytes("paper/paper.pdf")
    chars = pdf.read(have)
    if wrong := pdf.difference(chars, pdf.read(made)):
        yield f"paper.pdf: {wrong}"
    elif (
        have != made
        and paper.versions() == workspace.read_json(paper.BUILD)["versions"]
    ):
        yield "paper.pdf differs from what its source makes, though not in its text"
    ledger = facts.ledger(workspace)
    for span in spans:
        if span.kind == "fact":
            want = "".join(facts.text(ledger[span.id]).split())
            if (got := pdf.shown(span, chars)) != want:
                where = f"paper.pdf, page {span.start[0]}"
                yield f"{where}: {got!r} for {span.id}, which is {want!r}"
    for number in pdf.numbers(chars, spans):
        if not number.kind:
            yield f"paper.pdf, page {number.page}: {number.text!r} has no source"


def figures_hold(workspace: Workspace, _: Events) -> Iterator[str]:
    """G5: figures are what their runs give."""
    shown = [b["figure"] for b in _blocks(workspace) if "figure" in b]
    kept = [
        f.split("/")[1][:-5] for f in workspace.files("figures") if f.endswith(".json")
    ]
    for name in dict.fromkeys([*shown, *kept]):
        yield from figures.recheck(workspace, name)


def claims_hold(workspace: Workspace, events: Events) -> Iterator[str]:
    """G6: comparative words stand with a claim that bears them out; all are told."""
    for finding in paper.findings(workspace):
        if " is said" in finding or "name the arm" in finding:
            yield finding
    text = workspace.read_text(paper.SOURCE)
    for n, plan in plans.in_force(workspace, events).items():
        for c in plan["comparisons"] if analysis.verdicts(workspace, plan) else ():
            if f"{{claim:{n}/{c['name']}}}" not in text:
                yield f"the paper does not say {{claim:{n}/{c['name']}}}"


def citations_stored(workspace: Workspace, _: Events) -> Iterator[str]:
    """G7: every citation is an entry whose source is stored here."""
    have = library.stored(workspace)
    for place, text in document.texts(paper.load(workspace)):
        for piece in document.parse(text):
            if piece.kind == "cite" and piece.value not in have:
                yield f"{place}: {piece.value!r} is not in the stored bibliography"


def _as_planned(planned: dict[str, Any], ran: dict[str, Any]) -> bool:
    """Whether a run's config is the plan's.

    What is None in the plan's `model` is the script's to fill: it depends on the data.
    """
    model, filled = (x.get("model") for x in (planned, ran))
    if isinstance(model, dict) and isinstance(filled, dict):
        kept = {k: None if model.get(k, 0) is None else v for k, v in filled.items()}
        ran = ran | {"model": kept}
    return planned == ran


def method_true(workspace: Workspace, events: Events) -> Iterator[str]:
    """G8: the configs that ran are those of the plan, which the paper's facts state."""
    for n, plan in plans.in_force(workspace, events).items():
        for i, arm, run in plans.specs(plan):
            if analysis.outcome(workspace, run) is None:
                continue
            config = plan["resolved"][arm]["config"] | {"seed": plan["seeds"][i]}
            spec = workspace.read_json(f"runs/{run}/spec.json")
            if spec["config"] != config or spec["run_id"] != run:
                yield f"runs/{run}/spec.json is not what plan {n} says"
            told = digest({"config": config, "data": plan["resolved"][arm]["data"]})
            if spec["spec_hash"] != told:
                yield f"runs/{run}/spec.json: its hash is another"
            if workspace.exists(f"runs/{run}/config.json"):
                ran = workspace.read_json(f"runs/{run}/config.json")
                if not _as_planned(
                    config, {k: v for k, v in ran.items() if k != "out"}
                ):
                    yield f"run {run} did not train what plan {n} says"


def pdf_whole(workspace: Workspace, events: Events) -> Iterator[str]:
    """G9: there is a PDF, with text, no open references, and who wrote it."""
    body = workspace.read_bytes("paper/paper.pdf")
    if not body.startswith(b"%PDF-"):
        yield "paper.pdf is no PDF"
    text = "".join(c.text for c in pdf.read(body))
    if len(text) < 500:
        yield f"paper.pdf has {len(text)} letters"
    if "??" in text or "\ufffd" in text:
        yield "paper.pdf has open references or letters without a font"
    options = events[0].data.get("options", {}) if events else {}
    footer = paper.footer_of(options)
    if workspace.read_json(paper.BUILD)["footer"] != footer:
        yield "the footer does not say who wrote the paper"
    elif footer.replace(" ", "") not in text:
        yield "paper.pdf does not say who wrote it"


def reviewed(workspace: Workspace, events: Events) -> Iterator[str]:
    """G10: the last review is of this text and has no open blocker.

    What the driver put together when the budget was spent says that it is partial, and
    needs no review until the study goes on.
    """
    last = next((e for e in reversed(events) if e.kind in ("closing", "resume")), None)
    if last is not None and last.kind == "closing":
        text, written = workspace.ref(paper.SOURCE), last.data.get("refs", ())
        if any((r["id"], r["sha256"]) == (text.id, text.sha256) for r in written):
            return
    numbers = [int(f[8:-5]) for f in workspace.files("reviews") if f[8:-5].isdigit()]
    if not numbers:
        yield "the paper was not reviewed"
        return
    review = workspace.read_json(f"reviews/{max(numbers)}.json")
    if review["paper_sha256"] != workspace.ref(paper.SOURCE).sha256:
        yield "the text was changed after its last review"
    for what in review["blockers"]:
        yield f"open blocker: {what}"
    for item in REVIEW:
        if review["checklist"].get(item) is not True:
            yield f"the review does not confirm {item!r}"


def _blocks(workspace: Workspace) -> list[dict[str, Any]]:
    return [b for s in paper.load(workspace)["sections"] for b in s["blocks"]]


GATES: dict[str, Callable[[Workspace, Events], Iterator[str]]] = {
    "G1": plan_unchanged,
    "G2": runs_accounted,
    "G3": facts_hold,
    "G4": numbers_traced,
    "G5": figures_hold,
    "G6": claims_hold,
    "G7": citations_stored,
    "G8": method_true,
    "G9": pdf_whole,
    "G10": reviewed,
}


@tool("pure")
def check_gates(context: Context) -> dict[str, Any]:
    """Runs the gates that the study has to pass, and says what they find."""
    results = run_gates(context.workspace, context.events())
    return {r.gate: list(r.findings)[:5] or "ok" for r in results}


@tool("idempotent")
def record_review(
    context: Context,
    checklist: dict[str, bool],
    blockers: list[str],
    comments: str = "",
    score: int | None = None,
) -> Result:
    """Records a review of the paper as it is; checklist: what you found to be right.

    Its items are claims, tests, failures, method and limits. A blocker names the place
    and the mend, and is open until the next review. The score (1 to 10) is advice.
    """
    unknown = sorted(set(checklist) - set(REVIEW))
    if unknown:
        raise ToolError(f"no item {unknown[0]!r}: {', '.join(REVIEW)}")
    workspace = context.workspace
    review = {
        "paper_sha256": workspace.ref(paper.SOURCE).sha256,
        "checklist": checklist,
        "blockers": blockers,
        "comments": comments,
        "score": score,
        "by": context.agent,
    }
    n = 1
    while workspace.exists(f"reviews/{n}.json"):
        if workspace.read_json(f"reviews/{n}.json") == review:
            return Result({"review": n}, (workspace.ref(f"reviews/{n}.json"),))
        n += 1
    return Result({"review": n}, (workspace.write_json(f"reviews/{n}.json", review),))


TOOLS = (check_gates, record_review)
