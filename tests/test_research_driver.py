"""The driver: what a study does, whatever its model says and whenever it dies."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxlab.errors import ConfigError, UserError
from jaxlab.research.driver import Settings
from jaxlab.research.journal import JournalError, read_journal
from jaxlab.research.limits import parse_budget
from jaxlab.research.model import ModelOptions, ReplayMiss
from jaxlab.research.policy import Step
from jaxlab.research.state import fold
from jaxlab.research.study import replay, resume, run, say, status
from jaxlab.research.tool import tool
from jaxlab.research.types import AgentSpec, Budget, BudgetSpent, GateResult
from jaxlab.research.workspace import open_workspace
from tests.research_toy import (
    apart,
    drive,
    fact_values,
    quiet,
    starts,
    toy_gates,
    toy_parts,
)

pytestmark = pytest.mark.requires("pydantic_ai")


def events_of(folder):
    return read_journal(Path(folder) / "journal.jsonl")


def kinds(folder):
    return [e.kind for e in events_of(folder)]


def toy_gates_pass(folder):
    return all(r.ok for r in toy_gates(open_workspace(folder), events_of(folder)))


def driven(rule, folder, **options):
    """A study whose manager follows another rule."""
    parts = toy_parts()
    parts.rule("manager", rule)
    return drive(folder, parts=parts, **options)


def test_a_study_from_question_to_finish(tmp_path):
    ending = drive(tmp_path / "ws")
    assert (ending.code, ending.status) == (0, "done")
    assert [f["id"] for f in fact_values(tmp_path / "ws")["facts"]] == ["a", "b", "c"]
    study = fold(events_of(tmp_path / "ws"))
    assert [s.agent for s in study.sessions.values()] == [
        "manager",
        "trainer",
        "measurer",
    ]
    # the measurer was given references, with hashes, and nothing of the transcript
    measurer = study.sessions["s2"]
    assert [r.kind for r in measurer.refs] == ["run"] * 3
    assert all(r.sha256 for r in measurer.refs)
    assert study.usage.delegations == 2 and study.finished["code"] == 0
    told = status(tmp_path / "ws")
    assert told["state"] == "ended" and told["runs"] == {"done": 3}
    with pytest.raises(UserError, match="holds a study already"):
        run("again", tmp_path / "ws", parts=toy_parts(), gates=toy_gates)


def test_finished_studies_say_so_again(tmp_path):
    drive(tmp_path / "ws")
    count = len(events_of(tmp_path / "ws"))
    assert drive(tmp_path / "ws").code == 0
    assert starts(tmp_path / "ws") == {"a": 1, "b": 1, "c": 1}
    assert [e.kind for e in events_of(tmp_path / "ws")[count:]] == ["resume", "finish"]


def test_replay_gives_the_same_kinds_of_events(tmp_path):
    drive(tmp_path / "a")
    parts = {"parts": toy_parts(), "gates": toy_gates, "say": quiet}
    assert replay(tmp_path / "a", tmp_path / "b", **parts).code == 0
    assert kinds(tmp_path / "a") == kinds(tmp_path / "b")
    assert fact_values(tmp_path / "a") == fact_values(tmp_path / "b")


def test_replay_of_another_question(tmp_path):
    drive(tmp_path / "a")
    parts = toy_parts()
    spec = parts.agents["manager"]
    parts.agent(dataclasses.replace(spec, instructions="Lead otherwise."))
    options = {"parts": parts, "gates": toy_gates, "say": quiet}
    with pytest.raises(ReplayMiss, match="no answer left to request"):
        replay(tmp_path / "a", tmp_path / "b", **options)
    assert replay(tmp_path / "a", tmp_path / "c", order=True, **options).code == 0
    assert fact_values(tmp_path / "a") == fact_values(tmp_path / "c")


# ------------------------------------------------------------------ dying


def drive_apart(folder, *, names="a b", **options):
    """Drives in a process of its own, which may be killed; its exit code.

    It is forked from a server that has imported everything once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.research_toy", "pydantic_ai.direct"])
    child = context.Process(target=apart, args=(str(folder), names), kwargs=options)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def test_killed_at_every_kind_of_event(tmp_path):
    """SIGKILL before or after the fsync of one event of each kind, then resumed."""
    whole = tmp_path / "whole"
    assert drive(whole, "a b").code == 0
    first = {}
    for event in events_of(whole):
        first.setdefault(event.kind, event.i + 1)
    assert len(first) >= 10
    for kind, number in first.items():
        for after in (False, True):
            folder = tmp_path / f"{kind}-{after}"
            dead = drive_apart(folder, kill=number, after=after)
            assert dead == -signal.SIGKILL, kind
            assert drive(folder, "a b").code == 0, kind
            assert fact_values(folder) == fact_values(whole), kind
            ended = [e.data["run"] for e in events_of(folder) if e.kind == "run_end"]
            assert sorted(ended) == ["a", "b"], kind
            # a process that outlived the driver is taken up again, not repeated
            assert all(n <= 1 for n in starts(folder).values()), kind


def test_killed_again_and_again(tmp_path):
    folder = tmp_path / "ws"
    for _ in range(40):
        if drive_apart(folder, names="a b c", kill=6) == 0:
            break
    drive(tmp_path / "whole")
    assert fact_values(folder) == fact_values(tmp_path / "whole")
    assert starts(folder) == {"a": 1, "b": 1, "c": 1}


def test_a_call_that_cannot_be_made_twice(tmp_path):
    def rule(view):
        last = view.last("roll")
        if last is None:
            return view.call("roll")
        return view.finish(f"rolled: {last.status}")

    parts = toy_parts()
    parts.rule("manager", rule)
    folder = tmp_path / "ws"
    assert drive_apart(folder, crash=True) == -signal.SIGKILL
    passing = lambda ws, events: [GateResult("G0", True)]  # noqa: E731
    ending = drive(folder, parts=parts, gates=passing)
    assert (ending.code, ending.why) == (0, "rolled: unknown")
    assert (folder / "notes/rolled").read_text() == "x"


def test_an_edited_journal_is_not_driven(tmp_path):
    drive(tmp_path / "ws")
    path = tmp_path / "ws/journal.jsonl"
    path.write_text(path.read_text().replace("train: a b c", "train: a b d", 1))
    with pytest.raises(JournalError, match="event 0 was changed"):
        drive(tmp_path / "ws")


def test_two_drivers(tmp_path):
    folder = tmp_path / "ws"
    thread = threading.Thread(target=drive, args=(folder, "a 2 seconds"))
    thread.start()
    wait_for(folder, "run_start")
    with pytest.raises(JournalError, match="another process drives"):
        resume(folder, parts=toy_parts(), gates=toy_gates)
    say(folder, "", command="stop")
    thread.join(120)


# ------------------------------------------------------------------ people


def wait_for(folder, kind, count=1):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if (Path(folder) / "journal.jsonl").exists():
            found = [e for e in events_of(folder) if e.kind == kind]
            if len(found) >= count:
                return found[count - 1]
        time.sleep(0.02)
    raise AssertionError(f"no {kind} in {kinds(folder)}")


def in_background(folder, names, **options):
    box = {}

    def work():
        box["ending"] = drive(folder, names, **options)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, box


def test_a_message_changes_what_runs(tmp_path):
    folder = tmp_path / "ws"
    thread, box = in_background(folder, "a b 1 seconds")
    wait_for(folder, "run_start")
    id = say(folder, "also d")
    thread.join(120)
    assert box["ending"].code == 0
    assert sorted(starts(folder)) == ["a", "b", "d"]
    events = events_of(folder)
    ack = next(e for e in events if e.kind == "ack" and e.data["message"] == id)
    run_d = next(e for e in events if e.kind == "run_start" and e.data["run"] == "d")
    assert ack.i < run_d.i and "train(" in ack.data["decision"]
    answer = json.loads((folder / f"outbox/{id}.json").read_text())
    assert answer["answers"][0].startswith("trainer read it and decided")
    assert starts(folder) == {"a": 1, "b": 1, "d": 1}


def test_an_interrupt_ends_the_running_processes(tmp_path):
    folder = tmp_path / "ws"
    thread, box = in_background(folder, "a 60 seconds")
    wait_for(folder, "run_start")
    until = time.monotonic() + 20
    while not (folder / "runs/a/starts").exists() and time.monotonic() < until:
        time.sleep(0.01)
    pid = json.loads((folder / "runs/a/process.json").read_text())["pid"]
    os.kill(pid, 0)
    start = time.monotonic()
    say(folder, "", command="interrupt")
    while Path(f"/proc/{pid}").exists() and time.monotonic() - start < 10:
        time.sleep(0.01)
    assert time.monotonic() - start < 2
    say(folder, "", command="stop")
    thread.join(120)
    assert (box["ending"].code, box["ending"].status) == (3, "stopped")
    assert "interrupted" in [
        e.data["status"] for e in events_of(folder) if e.kind == "tool_end"
    ]


def test_messages_to_a_dead_driver_are_honoured(tmp_path):
    folder = tmp_path / "ws"
    assert drive_apart(folder, kill=8) == -signal.SIGKILL
    say(folder, "also e")
    assert status(folder)["messages"]["waiting"] == 1
    assert status(folder)["state"] == "dead"
    assert drive(folder, "a b").code == 0
    assert sorted(starts(folder)) == ["a", "b", "e"]


def test_pause_and_resume(tmp_path):
    folder = tmp_path / "ws"
    thread, box = in_background(folder, "a b c")
    wait_for(folder, "agent_start")
    say(folder, "", command="pause")
    event = wait_for(folder, "human")
    time.sleep(0.5)
    assert events_of(folder)[-1].i == event.i
    say(folder, "", command="resume")
    thread.join(120)
    assert box["ending"].code == 0


def test_signals_stop_in_order(tmp_path):
    folder = tmp_path / "ws"
    command = [sys.executable, "-m", "tests.research_toy", str(folder), "a 60 seconds"]
    child = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    wait_for(folder, "run_start")
    time.sleep(0.2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(120) == 3
    assert kinds(folder)[-1] == "finish"
    say(folder, "never mind")
    assert status(folder)["state"] == "ended"


@pytest.mark.parametrize("autonomy", ["approve-plan", "approve-each"])
def test_approval(tmp_path, autonomy):
    folder = tmp_path / "ws"
    settings = Settings(autonomy=autonomy, patience=0.2)
    ending = drive(folder, "a", settings=settings)
    if autonomy == "approve-plan":  # the toy has no plan to approve
        assert ending.code == 0
        return
    assert ending.code == 5 and "research.py approve s0.0.0" in ending.why
    say(folder, "", command="approve", target="s0.0.0")
    settings = dataclasses.replace(settings, patience=60.0)
    thread, box = in_background(folder, "a", settings=settings)
    wait_for(folder, "approval_request", 2)
    say(folder, "", command="deny", target="s1.0.0")
    say(folder, "not this way", command="stop")
    thread.join(120)
    assert box["ending"].code == 3 and starts(folder) == {}


def test_what_is_no_message_is_set_aside(tmp_path):
    folder = tmp_path / "ws"
    drive_apart(folder, kill=4)
    new = folder / "inbox/new"
    (new / "x.json").write_text("{")
    (new / "y.json").write_text('{"id": "y", "command": "rm -rf"}')
    (new / "z.json").write_text('{"id": "other", "command": "say", "text": "also e"}')
    (new / "l.json").symlink_to("/etc/passwd")
    (new / "big.json").write_text('"' + "x" * 300_000 + '"')
    (new / ".hidden").write_text("being written")
    assert drive(folder, "a b").code == 0
    assert sorted(starts(folder)) == ["a", "b"]
    assert [p.name for p in new.iterdir()] == [".hidden"]
    assert len([*(folder / "inbox/cur").glob("bad-*")]) == 5


# ------------------------------------------------------------------ limits


def test_finish_is_a_request(tmp_path):
    ending = driven(lambda view: view.finish("all proven"), tmp_path / "ws")
    assert (ending.code, ending.status) == (4, "gates")
    assert "there is no run" in ending.why
    study = fold(events_of(tmp_path / "ws"))
    assert study.usage.requests == 3


def test_a_reference_must_exist(tmp_path):
    def rule(view):
        sha = "0" * 64
        refs = [{"kind": "file", "id": "notes/none.md", "sha256": sha}]
        return view.call(
            "delegate", agent="trainer", task=str(len(view.done)), refs=refs
        )

    assert driven(rule, tmp_path / "ws").code == 4
    study = fold(events_of(tmp_path / "ws"))
    assert study.usage.delegations == 0


@pytest.mark.parametrize(
    "step, words",
    [
        (Step("no_such_tool", {}), "you have no tool 'no_such_tool'"),
        (Step("train", {"names": ["a"]}), "you have no tool 'train'"),  # another's
        (Step("delegate", {"agent": "manager", "task": "x"}), "no agent 'manager'"),
        (Step("delegate", {"agent": "trainer"}), "delegate: task: Field required"),
        (Step("read", {"path": "../../etc/passwd"}), "no path inside"),
    ],
)
def test_calls_that_are_not_allowed(tmp_path, step, words):
    ending = driven(lambda view: step, tmp_path / "ws")
    assert ending.code == 4
    ends = [e.data for e in events_of(tmp_path / "ws") if e.kind == "tool_end"]
    assert len(ends) == 5 and words in ends[0]["result"]
    assert not starts(tmp_path / "ws")


def test_a_loop_is_refused(tmp_path):
    ending = driven(lambda view: view.call("list_files"), tmp_path / "ws")
    ends = [e.data for e in events_of(tmp_path / "ws") if e.kind == "tool_end"]
    states = [e["status"] for e in ends]
    assert ending.code == 4 and states == ["ok"] * 3 + ["refused"] * 5


def test_a_delegate_that_is_stuck_hands_back(tmp_path):
    parts = toy_parts()
    parts.rule("trainer", lambda view: view.call("broken"))
    parts.rule(
        "manager",
        lambda view: (
            view.finish("x")
            if view.done
            else view.call("delegate", agent="trainer", task="t")
        ),
    )
    assert drive(tmp_path / "ws", parts=parts).code == 4
    end = next(e for e in events_of(tmp_path / "ws") if e.kind == "agent_end")
    assert end.data["status"] == "stuck"
    first = next(e for e in events_of(tmp_path / "ws") if e.kind == "tool_end")
    assert "ZeroDivisionError: a defect" in first.data["result"]


def test_a_tool_cannot_write_the_drivers_events(tmp_path):
    parts = toy_parts()
    parts.rule(
        "trainer",
        lambda view: (
            view.finish(str(view.done[0].data)) if view.done else view.call("forge")
        ),
    )
    drive(tmp_path / "ws", parts=parts, settings=Settings(Budget(delegations=1)))
    end = next(e for e in events_of(tmp_path / "ws") if e.kind == "agent_end")
    assert end.data["summary"] == "events of kind 'reply' are the driver's"


@pytest.mark.parametrize(
    "budget, words",
    [
        (Budget(runs=2), "runs: 2 of 2"),
        (Budget(turns=3), "turns: 3 of 3"),
        (Budget(tokens=400), "tokens: with the next request"),
        (Budget(disk=2000), "disk: "),
        (Budget(wall=0.2), "wall: "),
    ],
)
def test_budgets(tmp_path, budget, words):
    folder = tmp_path / "ws"
    names = "a b c d 2 seconds" if budget.wall else "a b c d"
    ending = drive(folder, names, settings=Settings(budget))
    assert (ending.code, ending.status) == (3, "budget") and words in ending.why
    assert len(starts(folder)) <= (budget.runs or 4)
    study = fold(events_of(folder))
    assert study.usage.tokens_in + study.usage.tokens_out <= 400 or not budget.tokens
    # with more of it, the study goes on where it was
    ending = drive(folder, settings=Settings(Budget()))
    assert ending.code == 0 and set(starts(folder)) == {"a", "b", "c", "d"}


def test_a_spent_budget_leaves_a_report(tmp_path):
    parts = toy_parts()

    @tool("idempotent")
    def compute_facts(context) -> None:
        """Facts of what there is."""
        assert not context.poll()
        with pytest.raises(BudgetSpent):
            context.start_run("z")
        parts.tools["measure"].fn(context)

    parts.tool(compute_facts)
    settings = Settings(Budget(runs=2))
    ending = drive(tmp_path / "ws", "a b c", parts=parts, settings=settings)
    assert ending.code == 3
    done = {f["id"] for f in fact_values(tmp_path / "ws")["facts"]}
    assert done == {"a", "b"} and toy_gates_pass(tmp_path / "ws")
    closing = next(e for e in events_of(tmp_path / "ws") if e.kind == "closing")
    assert closing.data["steps"] == [{"tool": "compute_facts"}]


def test_delegations_are_counted(tmp_path):
    ending = drive(tmp_path / "ws", settings=Settings(Budget(delegations=1)))
    assert ending.code == 4
    errors = [
        e.data["result"]
        for e in events_of(tmp_path / "ws")
        if e.kind == "tool_end" and e.data["status"] == "error"
    ]
    assert "all 1 delegations are used" in errors[0]


def test_a_study_whose_gates_failed_gets_another_try_when_resumed(tmp_path):
    def never(ws, events):
        return [GateResult("G9", False, ("a person mends this",))]

    assert drive(tmp_path / "ws", gates=never).code == 4
    assert drive(tmp_path / "ws", gates=never).code == 4
    assert drive(tmp_path / "ws").code == 0


def test_the_turns_of_an_agent_are_counted(tmp_path):
    parts = toy_parts()
    parts.agent(dataclasses.replace(parts.agents["manager"], max_turns=2))
    ending = drive(tmp_path / "ws", parts=parts)
    assert ending.code == 3 and "all 2 of manager are used" in ending.why


def test_budgets_are_read():
    budget = parse_budget("usd=2,tokens=500k,wall=1.5h,runs=60,disk=4g")
    assert budget == Budget(2.0, 500_000, 5400.0, 60, 4 * 10**9)
    assert parse_budget("") == Budget()
    for text, words in (
        ("run=3", "limits are usd, tokens"),
        ("wall=3x", "a unit of s, m, h, d"),
        ("usd=two", "give a number"),
        ("runs=-1", "give a number"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_budget(text)


def test_money_needs_a_price(tmp_path):
    model = ModelOptions("openai:x", "http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match="--price"):
        drive(tmp_path / "ws", model=model, settings=Settings(Budget(usd=1.0)))


# ------------------------------------------------------------------ agents


def test_agents_are_added_changed_and_removed(tmp_path):
    parts = toy_parts()
    parts.agent(AgentSpec("auditor", "audits", "Audit.", ("read",)))
    parts.rule(
        "auditor",
        lambda view: (
            view.finish("audited")
            if view.results
            else view.call("read", path=f"runs/{view.refs('run')[-1].id}/result.json")
        ),
    )
    assert drive(tmp_path / "a", parts=parts).code == 0
    study = fold(events_of(tmp_path / "a"))
    assert [s.summary for s in study.sessions.values()][-1] == "audited"
    parts.remove("auditor")
    assert drive(tmp_path / "b", parts=parts).code == 0
    assert len(fold(events_of(tmp_path / "b")).sessions) == 3
