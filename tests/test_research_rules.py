"""The rule policy: what it can read, what it does next, and whole studies by it."""

import json
import threading
import time

import pytest

from jaxlab.research import experiments, next_plan, plans, questions, verify
from jaxlab.research.types import Budget, BudgetSpent, NeedsHuman, ToolError
from tests.research_study import TRAINER, study, write_config

pytestmark = pytest.mark.requires("typst", "pypdfium2", "matplotlib", "pydantic_ai")


def read(tmp_path, question, **options):
    a, b = write_config(tmp_path, "gpt_a"), write_config(tmp_path, "gpt_b", level=1.9)
    with study(tmp_path / "ws", question, configs=[a, b], **options) as context:
        return questions.read(context)


@pytest.mark.parametrize(
    "question",
    [
        "Does gpt_b match gpt_a?",
        "does b beat a on pydocs?",
        "Is gpt_b better than gpt_a?",
        "Does b with level=1.8 match a at equal tokens within 0.02?",
        "compare b and a",
        "Compare gpt_b, gpt_a at steps=2",
    ],
)
def test_comparisons_in_words(tmp_path, question):
    if "pydocs" in question:  # the trainer in miniature has no corpus to choose
        with pytest.raises(ToolError, match="no single field 'data.corpus'"):
            read(tmp_path, question)
        return
    found = read(tmp_path, question)
    assert found["kind"] == "compare" and found["metric"] == "eval/loss"
    names = [a["name"] for a in found["arms"]]
    assert names[0].startswith("gpt_b") and names[1] == found["reference"] == "gpt_a"
    assert found["min_effect"] == (0.02 if "within" in question else None)
    overrides = [a["overrides"] for a in found["arms"]]
    if "level=1.8" in question:
        assert overrides == [{"level": 1.8}, {}]
    if "at steps" in question:
        assert overrides == [{"steps": 2}, {"steps": 2}]


@pytest.mark.parametrize(
    ("question", "options", "kind", "values"),
    [
        ("sweep noise over 0.1, 0.2, 0.4 of gpt_a", {}, "sweep", [0.1, 0.2, 0.4]),
        ("scale steps over 2, 4, 8 of gpt_a", {}, "scale", [2, 4, 8]),
        ("?", {"sweep": ["noise=0.1,0.2"], "compare": ["gpt_a"]}, "sweep", [0.1, 0.2]),
        ("?", {"scale": "steps=2,4", "config": "gpt_a"}, "scale", [2, 4]),
    ],
)
def test_sweeps_and_scaling(tmp_path, question, options, kind, values):
    found = read(tmp_path, question, **options)
    assert found["kind"] == kind and list(found["factors"].values()) == values


def test_ablations(tmp_path):
    found = read(tmp_path, "ablate noise=0, shared=0 of gpt_a with steps=2")
    assert [a["name"] for a in found["arms"]] == ["full", "noise=0", "shared=0"]
    assert found["reference"] == "full"
    assert found["arms"][1]["overrides"] == {"steps": 2, "noise": 0}


@pytest.mark.parametrize(
    ("question", "options", "missing"),
    [
        ("What is the meaning of life?", {}, "cannot read"),
        ("Does llama beat gpt_a?", {}, "'llama' names no config"),
        ("Does gpt match gpt_a?", {}, "'gpt' names several configs"),
        ("compare gpt_a", {}, "compared with"),
        ("compare gpt_a and gpt_b", {"metric": "odd/thing"}, "lower or a higher"),
        ("sweep colour over 1, 2 of gpt_a", {}, "no single field 'colour'"),
        ("sweep noise over 1 of gpt_a", {}, "which values"),
        ("?", {"sweep": ["noise=1,2"]}, "needs the config"),
    ],
)
def test_what_it_cannot_read_it_asks_for(tmp_path, question, options, missing):
    with pytest.raises(ToolError, match=missing):
        read(tmp_path, question, **options)
    with study(tmp_path / "again", question, **options) as context:
        with pytest.raises(NeedsHuman, match="Forms that"):
            questions.read_question(context)


def steps(context):
    """Makes plan after plan, as the experiment agent does; says which."""
    made = []
    while True:
        told = next_plan.follow_up(context, register_plan=True)
        value = told if isinstance(told, dict) else told.value
        if value["next"] == "none":
            return made, value["why"]
        n = value["plan_number"]
        made.append(context.workspace.read_json(f"plans/{n}.json"))
        experiments.run_plan(context, n)


def test_a_comparison_has_a_pilot_and_the_size_its_power_needs(tmp_path):
    a, b = write_config(tmp_path, "a"), write_config(tmp_path, "b", level=1.9)
    options = {"configs": [a, b], "compare": [b, a], "min_effect": 0.1}
    with study(tmp_path / "ws", **options) as context:
        (pilot, main), why = steps(context)
    assert pilot["stage"] == "pilot" and not pilot["comparisons"]
    assert main["power"] >= 0.9 and main["alpha"] == 0.05
    assert not set(main["seeds"]) & set(pilot["seeds"])
    assert "no rule fires" in why


def test_a_sweep_whose_best_is_at_its_edge_is_extended_once(tmp_path):
    a = write_config(tmp_path, "a")
    options = {"configs": [a], "compare": [a], "sweep": ["level=1.0,2.0"], "seeds": 4}
    with study(tmp_path / "ws", min_effect=0.1, **options) as context:
        (_, main, later), why = steps(context)
    assert later["stage"] == "follow-up" and len(later["arms"]) == 2
    assert main["alpha"] + later["alpha"] == pytest.approx(0.05)
    assert "one follow-up" in why


def test_the_budget_limits_the_seeds_and_says_so(tmp_path):
    a, b = write_config(tmp_path, "a"), write_config(tmp_path, "b", level=1.999)
    options = {"configs": [a, b], "compare": [b, a], "min_effect": 0.001}
    budget = {"budget": {"runs": 14}}
    with study(tmp_path / "ws", settings=budget, **options) as context:
        (_, main), _ = steps(context)
        assert len(main["seeds"]) == 4 and main["power"] < 0.9
    small = {"budget": {"runs": 5}}
    with study(tmp_path / "small", settings=small, **options) as context:
        with pytest.raises(BudgetSpent, match="raise --budget"):
            steps(context)
        assert not any(e.kind == "run_start" for e in context.events())


@pytest.mark.parametrize(
    ("request_", "arms"),
    [
        ("m1: also try level=1.5", ["b", "a", "level=1.5"]),
        ("m1: drop nothing", "no arm 'nothing'"),
        ("m1: make me a sandwich", "does not understand"),
    ],
)
def test_requests_amend_the_plan(tmp_path, request_, arms):
    a, b = write_config(tmp_path, "a"), write_config(tmp_path, "b", level=1.9)
    options = {"configs": [a, b], "compare": [b, a], "min_effect": 0.1}
    with study(tmp_path / "ws", **options) as context:
        next_plan.follow_up(context, register_plan=True)
        told = next_plan.follow_up(context, request=request_, register_plan=True)
        if isinstance(arms, str):
            assert isinstance(told, dict) and arms in told["why"]
        else:
            plan = plans.read_plan(context.workspace, told.value["plan_number"])
            assert [x["name"] for x in plan["arms"]] == arms and plan["amends"] == 1
            kinds = [e.kind for e in context.events()]
            assert kinds[-1] == "amendment"


def options_of(tmp_path, **fields):
    a = write_config(tmp_path, "a", **fields)
    b = write_config(tmp_path, "b", level=1.9, **fields)
    options = {"configs": [a, b], "compare": [b, a], "trainer": str(TRAINER)}
    return options | {"parallel": 2, "min_effect": 0.05, "seeds": 4}


def test_a_study_from_question_to_verified_paper(tmp_path):
    from jaxlab.research import study as studies
    from jaxlab.research.driver import Settings

    options = options_of(tmp_path)
    settings = Settings(budget=Budget(runs=30))
    ws = tmp_path / "ws"
    quiet = {"say": lambda line: None}
    ending = studies.run(
        "Does b beat a?", ws, options=options, settings=settings, **quiet
    )
    assert ending.code == 0, ending
    report = verify.verify(ws)
    assert report.findings == ()
    # A second study takes the runs of the first by reference and makes none anew.
    again = studies.run(
        "Does b beat a?", tmp_path / "ws2", options=options, past=(str(ws),), **quiet
    )
    assert again.code == 0
    lines = (tmp_path / "ws2/journal.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert "run_start" not in kinds
    ledgers = [(x / "facts/ledger.json").read_text() for x in (ws, tmp_path / "ws2")]
    assert ledgers[0] == ledgers[1]


def test_a_message_while_it_runs_changes_the_plan(tmp_path):
    from jaxlab.research import study as studies

    options = options_of(tmp_path, seconds=1.0)
    ws = tmp_path / "ws"

    def send():
        for _ in range(600):
            if list(ws.glob("runs/*/process.json")):
                studies.say(ws, "also try level=1.5")
                return
            time.sleep(0.05)

    thread = threading.Thread(target=send)
    thread.start()
    ending = studies.run("Does b beat a?", ws, options=options, say=lambda line: None)
    thread.join()
    assert ending.code == 0, ending
    events = [json.loads(x) for x in (ws / "journal.jsonl").read_text().splitlines()]
    amended = [e for e in events if e["kind"] == "amendment"]
    assert amended and "also try level=1.5" in amended[0]["data"]["why"]
    assert any(e["kind"] == "ack" for e in events)
    assert verify.verify(ws).ok


def test_an_unreadable_question_asks_a_person(tmp_path):
    from jaxlab.research import study as studies

    ending = studies.run("Why?", tmp_path / "ws", say=lambda line: None)
    assert ending.code == 5 and "cannot read" in ending.why
    assert not (tmp_path / "ws/paper/paper.pdf").exists()
