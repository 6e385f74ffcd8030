"""A small study with real processes: three agents, runs of a tenth of a second.

What the driver promises is the same whatever is studied, so its tests do not train.
Run as a program it drives a study:

    python -m tests.research_toy WORKSPACE NAMES
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from jaxlab.research import process
from jaxlab.research.notes import TOOLS
from jaxlab.research.parts import Parts
from jaxlab.research.policy import make_policy
from jaxlab.research.study import resume, run
from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import AgentSpec, GateResult

JOB = """
import json, os, sys, time
name, seconds = sys.argv[1], float(sys.argv[2])
with open("starts", "a") as f:
    f.write("start\\n")
until = time.time() + seconds
while time.time() < until and not os.path.exists("go"):
    time.sleep(min(seconds, 0.02))
value = sum(map(ord, name)) / 100
with open("result.json.new", "w") as f:
    json.dump({"status": "done", "value": value}, f)
os.replace("result.json.new", "result.json")
"""


@tool("idempotent")
def train(context: Context, names: list[str], seconds: float = 0.05) -> Result:
    """Trains models by these names, one process each; a person may interrupt."""
    ws = context.workspace
    for name in names:
        if not ws.exists(f"runs/{name}/result.json") and not waited(
            context, name, seconds
        ):
            done = [n for n in names if ws.exists(f"runs/{n}/result.json")]
            return Result({"done": done, "why": "a message waits"})
        ended = {e.data["run"] for e in context.events() if e.kind == "run_end"}
        if ws.exists(f"runs/{name}/result.json") and name not in ended:
            context.record("run_end", run=name, status="done")
    refs = tuple(ws.run_ref(name) for name in names)
    return Result({"done": names}, refs)


def waited(context, name, seconds):
    """Starts a run, or takes it up, and waits; False: a message came first."""
    ws, job = context.workspace, None
    if ws.exists(f"runs/{name}/process.json"):
        job = process.Process(**ws.read_json(f"runs/{name}/process.json"))
    if job is None or not process.alive(job):
        context.start_run(name)
        folder = ws.root / "runs" / name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-IS", "-c", JOB, name, str(seconds)]
        env = {"PATH": os.environ["PATH"]}
        job = process.launch(command, folder / "log", folder, env)
        ws.write_json(f"runs/{name}/process.json", job)
    while process.alive(job):
        if context.poll():
            return False
        time.sleep(0.01)
    return True


@tool("idempotent")
def measure(context: Context) -> Result:
    """Makes facts from the finished runs."""
    ws = context.workspace
    names = sorted(
        p.split("/")[1] for p in ws.files("runs") if p.endswith("/result.json")
    )
    facts = [
        {"id": n, "value": ws.read_json(f"runs/{n}/result.json")["value"]}
        for n in names
    ]
    ref = ws.write_json("facts/ledger.json", {"facts": facts})
    context.record("fact", facts=names)
    return Result({"facts": names}, (ref,))


@tool("pure")
def flood(context: Context, n: int) -> str:
    """Returns 50 kB of text."""
    return f"flood {n} " + "lorem ipsum dolor sit amet " * 1900


@tool("once")
def roll(context: Context) -> int:
    """Does something that cannot be done twice."""
    path = context.workspace.root / "notes/rolled"
    path.write_text(path.read_text() + "x" if path.exists() else "x")
    if context.options.get("crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    return 4


@tool("pure")
def broken(context: Context) -> None:
    """Fails."""
    raise ZeroDivisionError("a defect")


@tool("pure")
def forge(context: Context) -> None:
    """Tries to write the driver's events."""
    context.record("reply", session="s0")


def names_asked(view):
    names = re.findall(r"\b[a-e]\d?\b", view.task.partition(":")[2])
    for said in view.said:
        names += re.findall(r"also (\w+)", said.text)
    return list(dict.fromkeys(names))


def manager(view):
    asked = names_asked(view)
    trained = [d for d in view.done if d.args.get("agent") == "trainer"]
    known = set(re.findall(r"\w+", trained[-1].args["task"])) if trained else set()
    extra = any(n not in known for n in asked)
    if not trained or trained[-1].status != "ok" or extra:
        found = re.search(r" \d+ seconds", view.task)
        task = f"train: {' '.join(asked)}{found[0] if found else ''}"
        return view.call("delegate", agent="trainer", task=task)
    if not any(d.args.get("agent") == "measurer" for d in view.done):
        return view.call(
            "delegate", agent="measurer", task="measure", refs=trained[-1].refs
        )
    for agent in view.agents:  # whoever was added is asked as well
        if agent in ("trainer", "measurer"):
            continue
        if not any(d.args.get("agent") == agent for d in view.done):
            return view.call(
                "delegate", agent=agent, task="look", refs=trained[-1].refs
            )
    return view.finish("measured", [r for d in view.done for r in d.refs][-1:])


def trainer(view):
    asked = names_asked(view)
    last = view.last("train")
    whole = last and last.status == "ok" and len(last.data["done"]) == len(asked)
    if whole and last.args["names"] == asked:
        return view.finish("trained " + " ".join(asked), last.refs)
    seconds = re.search(r"(\d+) seconds", view.task)
    return view.call(
        "train", names=asked, seconds=float(seconds[1]) if seconds else 0.05
    )


def measurer(view):
    last = view.last("measure")
    if last:
        return view.finish("measured", last.refs)
    return view.call("measure")


def toy_parts():
    parts = Parts()
    parts.tool(*TOOLS, train, measure, flood, roll, broken, forge)
    every = tuple(t.name for t in TOOLS)
    parts.agent(
        AgentSpec("manager", "leads", "Lead.", ("delegate", *every, "flood", "roll"))
    )
    parts.agent(AgentSpec("trainer", "trains", "Train.", ("train", "broken", "forge")))
    parts.agent(AgentSpec("measurer", "measures", "Measure.", ("measure",)))
    for name, rule in (
        ("manager", manager),
        ("trainer", trainer),
        ("measurer", measurer),
    ):
        parts.rule(name, rule)
    return parts


def toy_gates(ws, events):
    """Facts are those that the finished runs give."""
    findings = []
    facts = {f["id"]: f["value"] for f in ws.facts()}
    done = [e.data["run"] for e in events if e.kind == "run_end"]
    for name in done:
        value = ws.read_json(f"runs/{name}/result.json")["value"]
        if facts.get(name) != value:
            findings.append(f"fact {name} is {facts.get(name)}, not {value}")
    if not done:
        findings.append("there is no run")
    return [GateResult("G3", not findings, tuple(findings))]


POLICY = make_policy(toy_parts().rules)


def drive(folder, names="a b c", **options):
    """A study of the toy in this process; returns its ending."""
    options = {"parts": toy_parts(), "gates": toy_gates, "say": quiet} | options
    if Path(folder, "journal.jsonl").exists():
        return resume(folder, **options)
    return run(f"train: {names}", folder, **options)


def quiet(line):
    """Says nothing."""


def fact_values(folder):
    return json.loads(Path(folder, "facts/ledger.json").read_text())


def starts(folder):
    """How often each run's process started."""
    return {
        path.parent.name: len(path.read_text().splitlines())
        for path in Path(folder, "runs").glob("*/starts")
    }


def apart(folder, names, kill=0, after=False, crash=False):
    """Drives, and dies by SIGKILL at fsync number `kill`, before or after it."""
    count = 0

    def fsync(handle):
        nonlocal count
        count += 1
        if count == kill and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        os.fsync(handle)
        if count == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    options = {"fsync": fsync}
    if crash:
        options["options"] = {"crash": True}
        options["parts"] = toy_parts()
        options["parts"].rule("manager", lambda view: view.call("roll"))
    sys.exit(drive(folder, names, **options).code)


if __name__ == "__main__":
    apart(*sys.argv[1:])
