"""What the rule policy does as each agent: from what it sees to its next call.

It leads a study from the question to a reviewed paper. All that needs arithmetic or
judgement of numbers is in tools (`next_plan`, `analysis`, `drafts`, `gates`), so these
rules only choose which comes next.
"""

from typing import Any

from jaxlab.research import drafts, gates
from jaxlab.research.policy import Done, Rule, Step, View

# Words of a person's message that ask for another plan; see `next_plan.follow_up`.
ASKS = ("also", "try", "add", "drop")


def manager(view: View) -> Step:
    """Delegates: ideas, experiments, facts, text, proofs, review; then finishes."""
    if view.last("read_question") is None:
        return view.call("read_question")
    handled = " ".join(_told(d) for d in view.done if d.tool == "delegate")
    noted = " ".join(str(d.args) for d in view.done if d.tool == "note")
    for said in view.said:
        if said.id in handled or said.id in noted:
            continue
        if _asks(said.text) and _went(view, "experiment"):
            return _delegate(view, "experiment", f"Message {said.id}: {said.text}")
        if not _asks(said.text):
            text = f"Message {said.id} from a person is not understood by the rule "
            text += f"policy, and is recorded: {said.text[:300]}"
            return view.call("note", text=text, type="question")
    known = {agent for agent, _ in TASKS}
    others = [(agent, OTHERS) for agent in view.agents if agent not in known]
    for agent, task in (*TASKS[:2], *others, *TASKS[2:]):
        if not _went(view, agent, since=_last_experiment(view)):
            return _delegate(view, agent, task)
    refused = [d for d in view.done if d.tool == "finish"]
    again = [d for d in view.done if d.tool == "delegate"][-1]
    if len(refused) == 1 and view.done[-1] is refused[0]:
        return _delegate(view, "curator", AGAIN)
    if len(refused) == 1 and again.args["task"] == AGAIN:
        order = ("curator", "writer", "proofreader", "reviewer")
        if again.args["agent"] != order[-1]:
            return _delegate(view, order[order.index(again.args["agent"]) + 1], AGAIN)
    return view.finish("The paper is compiled and reviewed.", _papers(view))


TASKS = (
    ("ideation", "Say what is known of the question and what is to be compared."),
    ("experiment", "Register the plans that the question needs, and make their runs."),
    ("curator", "Compute the facts of all plans and draw their figures."),
    ("writer", "Write the paper from the facts and compile it."),
    ("proofreader", "Read the compiled paper once more."),
    ("reviewer", "Review the paper against its evidence."),
)
OTHERS = "Do your part with these runs, before the paper is written."
AGAIN = "Do your part again: the gates have findings."


def ideation(view: View) -> Step:
    """Says what is known, and what the question compares."""
    if view.last("past_findings") is None:
        return view.call("past_findings")
    if (proposed := view.last("follow_up")) is None:
        return view.call("follow_up")
    past = view.last("past_findings")
    known = len(past.data) if past and isinstance(past.data, list) else 0
    why = proposed.data.get("why", "") if isinstance(proposed.data, dict) else ""
    return view.finish(f"{known} earlier findings are known. Next: {why}"[:1000])


def experiment(view: View) -> Step:
    """Plans and runs until no rule calls for more; takes in what people ask."""
    last = view.done[-1] if view.done else None
    if (request := _request(view)) is not None:
        return view.call("follow_up", request=request, register_plan=True)
    if last is None:
        return view.call("follow_up", register_plan=True)
    data: dict[str, Any] = last.data if isinstance(last.data, dict) else {}
    if last.tool == "follow_up":
        asked = last.args.get("request")
        if last.status == "ok" and data.get("next") == "run":
            tried = view.last("run_plan", plan=data["plan_number"])
            if tried is None or tried.status != "error":
                return view.call("run_plan", plan=data["plan_number"])
            why = f"The runs cannot be made: {tried.data}"
            return view.finish(f"{why}. {_handled(view)}"[:1100])
        why = str(data.get("why", last.data))
        if asked:
            text = f"Cannot be done by the rule policy: {asked} ({why})"
            return view.call("note", text=text[:1500], type="question")
        if (kept := _finding(view)) is not None:
            return kept
        refs = [*_papers(view), *view.refs("run")[-8:]]
        return view.finish(f"{why}. {_handled(view)}"[:1100], refs)
    if last.tool == "note" and _over(view):
        refs = [*_papers(view), *view.refs("run")[-8:]]
        return view.finish(f"The plans are over. {_handled(view)}"[:1100], refs)
    if last.tool == "run_plan" and data.get("waiting"):
        return view.call("run_plan", plan=last.args["plan"])
    return view.call("follow_up", register_plan=True)


def _finding(view: View) -> Step | None:
    """Keeps what the last plan found for later studies, unless it is kept already."""
    ran = view.last("run_plan")
    found = ran.data.get("found") if ran and isinstance(ran.data, dict) else None
    if not ran or not found:
        return None
    plan = f"plans/{ran.args['plan']}.json"
    if any(d.tool == "note" and plan in d.args.get("refs", ()) for d in view.done):
        return None
    told = ", ".join(f"{name}: {what}" for name, what in found.items())
    negative = not {"higher", "lower"} & set(found.values())
    return view.call(
        "note",
        text=f"Plan {ran.args['plan']} found {told}."[:1900],
        type="negative" if negative else "finding",
        refs=[plan],
    )


def _over(view: View) -> bool:
    """Whether the last question for a plan was answered with none, and that noted."""
    asked = view.last("follow_up")
    data = asked.data if asked and isinstance(asked.data, dict) else {}
    wished = asked is not None and asked.args.get("request")
    return data.get("next") == "none" and not wished and _finding(view) is None


def curator(view: View) -> Step:
    """Facts and figures."""
    if (made := view.last("compute_facts")) is None:
        return view.call("compute_facts")
    if made.status != "ok":
        return view.finish(f"There are no facts: {made.data}"[:1000])
    if view.last("make_figures") is None:
        return view.call("make_figures")
    return view.finish(
        "The facts are computed and the figures drawn.", view.refs("file")
    )


def writer(view: View) -> Step:
    """Citations, sections, PDF."""
    for query in drafts.CITED:
        if view.last("cite", query=query) is None:
            return view.call("cite", query=query)
    for section in drafts.SECTIONS:
        if view.last("draft_section", section=section) is None:
            return view.call("draft_section", section=section, place=True)
    return _compiled(view)


def proofreader(view: View) -> Step:
    """Compiles once more; the templates' language needs no mending."""
    return _compiled(view)


def reviewer(view: View) -> Step:
    """Reviews by the gates: what they find is a blocker."""
    if (checked := view.last("check_gates")) is None:
        return view.call("check_gates")
    if view.last("record_review") is None:
        found = (
            checked.data
            if isinstance(checked.data, dict)
            else {"gates": [str(checked.data)]}
        )
        found = {k: v for k, v in found.items() if v != "ok" and k != "G10"}
        blockers = [
            f"{k}: {what}"[:300] for k, v in found.items() for what in list(v)[:2]
        ]
        return view.call(
            "record_review",
            checklist={item: not blockers for item in gates.REVIEW},
            blockers=blockers[:8],
            comments="Checked by rules: the gates, and nothing that they cannot see.",
        )
    return view.finish("Reviewed by rules.", view.refs("file"))


def _compiled(view: View) -> Step:
    made = view.last("compile_paper")
    if made is None:
        return view.call("compile_paper")
    if made.status != "ok":
        return view.finish(f"The paper does not compile: {made.data}"[:1100])
    return view.finish("The paper is compiled.", _papers(view))


def _delegate(view: View, agent: str, task: str) -> Step:
    files = [r for r in view.refs("file") if r.sha256][-4:]
    refs = [vars(r) for r in (*files, *view.refs("run")[-4:])]
    refs = [{k: v for k, v in r.items() if v is not None} for r in refs]
    return view.call("delegate", agent=agent, task=task, refs=refs)


def _went(view: View, agent: str, since: int = 0) -> bool:
    """Whether an agent was delegated to; who comes after experiments, since those."""
    if agent in ("ideation", "experiment"):
        since = 0
    return any(
        d.tool == "delegate" and d.args.get("agent") == agent for d in view.done[since:]
    )


def _last_experiment(view: View) -> int:
    calls = [i for i, d in enumerate(view.done) if d.args.get("agent") == "experiment"]
    return calls[-1] if calls else 0


def _told(done: Done) -> str:
    summary = done.data.get("summary", "") if isinstance(done.data, dict) else ""
    return f"{done.args.get('task', '')} {summary}"


def _asks(text: str) -> bool:
    return any(word in text.lower().split() for word in ASKS)


def _request(view: View) -> str | None:
    """A person's wish that was not dealt with yet, with the id of its message."""
    asked = " ".join(str(d.args.get("request", "")) for d in view.done)
    wishes = [f"{s.id}: {s.text}" for s in view.said if _asks(s.text)]
    if view.task.startswith("Message "):
        wishes.insert(0, view.task.removeprefix("Message "))
    for wish in wishes:
        if wish.split(":")[0] not in asked:
            return wish
    return None


def _handled(view: View) -> str:
    ids = [
        str(d.args["request"]).split(":")[0] for d in view.done if d.args.get("request")
    ]
    return f"Messages dealt with: {', '.join(ids)}." if ids else ""


def _papers(view: View) -> list[Any]:
    wanted = ("paper/paper.pdf", "paper/paper.json", "facts/ledger.json")
    return [r for r in view.refs("file") if r.id in wanted or r.id.startswith("plans/")]


RULES: dict[str, Rule] = {
    "manager": manager,
    "ideation": ideation,
    "experiment": experiment,
    "curator": curator,
    "writer": writer,
    "proofreader": proofreader,
    "reviewer": reviewer,
}
