"""Plans, fixed before their runs; what a run is, and its id.

An agent gives a declarative plan, never code: configs of the checkout (or ones that
the person named) and fields to change. The id of a run is a hash of all that its
numbers depend on, so the same run is never made twice, by whichever session.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlab.research import analysis, stats
from jaxlab.research.journal import Event, canonical, digest
from jaxlab.research.tool import Context, Result, tool
from jaxlab.research.types import Arm, Comparison, Plan, Ref, ToolError
from jaxlab.research.workspace import Workspace

PACKAGE = Path(__file__).resolve().parents[1]


def _checkout() -> Path:
    """Where scripts/ and configs/ are: around the package, or where one stands.

    `pip install .` puts the package elsewhere.
    """
    around = PACKAGE.parent
    return around if (around / "scripts/train.py").is_file() else Path.cwd()


CHECKOUT = _checkout()
LIMITS = {"wall": 6 * 3600.0, "cpu": 48 * 3600.0, "memory": 64e9, "disk": 20e9}
ENVIRONMENT = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|PYTHONPATH|VIRTUAL_ENV|LD_LIBRARY_PATH"
    r"|OMP_NUM_THREADS|(JAX|XLA|JAXLAB|CUDA|NVIDIA|TPU)_\w+"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
# What a plan may not change: where a run writes, what it talks to, what it reads.
FORBIDDEN = re.compile(
    r"out|seed|store|engine|ray_address|profile|init(\..*)?|distributed(\..*)?"
    r"|health(\..*)?|data\.cache|data\.threads"
)
NAME = re.compile(r"[A-Za-z0-9][\w.=+-]{0,80}", re.ASCII)
MOST = {"steps": 10**7, "batch": 2**16, "length": 2**20, "accumulate": 2**12}


# ------------------------------------------------------------- fingerprints


def code_fingerprint(trainer: Path) -> str:
    """Hash of the code that a run's numbers depend on.

    The trainer, the framework's source but this package, and the versions of Python
    and of the libraries that compute.
    """
    sha = hashlib.sha256(trainer.read_bytes())
    if trainer.is_relative_to(CHECKOUT):
        for path in sorted(PACKAGE.rglob("*.py")):
            name = str(path.relative_to(PACKAGE.parent))
            if not name.startswith("jaxlab/research/"):
                sha.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    sha.update(
        canonical([platform.python_version(), platform.machine(), _versions()]).encode()
    )
    sha.update(os.environ.get("JAX_PLATFORMS", "").encode())
    return sha.hexdigest()


@functools.cache
def _versions() -> dict[str, str]:
    libraries = {"jax", "jaxlib", "flax", "optax", "numpy", "grain", "tokenizers"}
    return {
        d.name.lower(): d.version
        for d in importlib.metadata.distributions()
        if d.name and d.name.lower() in libraries
    }


def run_id(spec: dict[str, Any]) -> str:
    """Id of a run: SHA-256 of its config, code and data, 16 hexadecimal digits."""
    return digest({k: spec[k] for k in ("config", "code_hash", "data")})[:16]


def environment() -> dict[str, str]:
    """The variables that a run gets: an allow-list, and none that looks like a key."""
    return {
        name: value
        for name, value in os.environ.items()
        if ENVIRONMENT.fullmatch(name) and not SECRET.search(name)
    }


# -------------------------------------------------------------------- specs


def trainer_of(options: dict[str, Any]) -> Path:
    """The script that trains; the person may name another with the same options."""
    return Path(options.get("trainer") or CHECKOUT / "scripts/train.py").resolve()


def described(arm: Arm, context: Context) -> dict[str, Any]:
    """What the training script makes of an arm: `config` and version of the `data`.

    Raises:
        ToolError: a config or field that a plan may not use, or what the script says.
    """
    options = context.options
    config = _config_path(arm.config, context)
    command = [sys.executable, str(trainer_of(options)), str(config)]
    for name, value in arm.overrides.items():
        if not re.fullmatch(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*", name):
            raise ToolError(f"arm {arm.name}: {name!r} is no name of a field")
        if FORBIDDEN.fullmatch(name):
            raise ToolError(f"arm {arm.name}: a plan may not set {name}")
        if not isinstance(value, str | int | float | bool) or _is_path(name, value):
            raise ToolError(f"arm {arm.name}: a plan may not set {name} to {value!r}")
        command += _option(name, value)
    done = subprocess.run(
        [*command, "--dry-run"],
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    if done.returncode != 0:
        raise ToolError(f"arm {arm.name}: {done.stderr.strip()[-600:]}")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    config = found["config"]
    if "seed" not in config:
        raise ToolError(f"arm {arm.name}: {arm.config} has no seed to vary")
    for name, most in MOST.items():
        if name in config and not 0 < config[name] <= most:
            raise ToolError(f"arm {arm.name}: {name} {config[name]}, at most {most}")
    config.pop("out", None)
    return found


def _config_path(name: str, context: Context) -> Path:
    """A config that a plan may run: it is Python, so only ones that a person chose."""
    named = {
        str((CHECKOUT / str(path)).resolve())
        for path in context.options.get("configs", ())
    }
    path = (CHECKOUT / name).resolve()
    if str(path) in named or (
        path.parent == CHECKOUT / "configs" and path.suffix == ".py" and path.is_file()
    ):
        return path
    have = ", ".join(p.name for p in shipped_configs())
    raise ToolError(f"no config {name!r}: give configs/NAME.py, one of {have}")


def shipped_configs() -> list[Path]:
    """The configs of the checkout, by name.

    Raises:
        ToolError: there are none, as this is no checkout.
    """
    found = sorted((CHECKOUT / "configs").glob("*.py"))
    if not found:
        raise ToolError(
            f"there are no configs in {CHECKOUT}: start this in a checkout of jaxlab"
        )
    return found


def _option(name: str, value: Any) -> list[str]:
    """A field as the command line has it; tyro has --a.b and --a.no-b for truth."""
    if isinstance(value, bool):
        parents, _, leaf = name.rpartition(".")
        leaf = leaf if value else f"no-{leaf}"
        return [f"--{parents}.{leaf}" if parents else f"--{leaf}"]
    return [f"--{name}", str(value)]


def _is_path(name: str, value: Any) -> bool:
    """Whether a text would make a run read a file of its choice."""
    return isinstance(value, str) and (
        "/" in value or ".." in value or value.startswith(("~", "-"))
    )


def specs(plan: dict[str, Any]) -> Iterator[tuple[int, str, str]]:
    """Yields (number of the seed, arm, run id) of a registered plan, seed by seed."""
    for i, _ in enumerate(plan["seeds"]):
        for arm in plan["arms"]:
            yield i, arm["name"], plan["runs"][arm["name"]][i]


# -------------------------------------------------------------------- plans


def register(context: Context, plan: Plan, why: str | None = None) -> Result:
    """Fixes a plan: writes plans/<n>.json and its hash to the journal.

    A plan equal to a registered one gets that one's number.

    Raises:
        ToolError: what is wrong with it.
    """
    check(plan)
    found = {arm.name: described(arm, context) for arm in plan.arms}
    trainer = trainer_of(context.options)
    code = code_fingerprint(trainer)
    shared = {"code_hash": code, "trainer": str(trainer)}
    body: dict[str, Any] = dataclasses.asdict(plan) | shared
    body |= {"resolved": found, "runs": {}}
    for arm, what in found.items():
        ids = []
        for seed in plan.seeds:
            config = what["config"] | {"seed": seed}
            ids.append(
                run_id({"config": config, "data": what["data"], "code_hash": code})
            )
        body["runs"][arm] = ids
    same = {canonical(w["config"]): arm for arm, w in found.items()}
    if len(same) < len(found):
        twin = min(set(found) - set(same.values()))
        raise ToolError(
            f"arm {twin} is equal to another arm; comparing an arm with itself shows "
            "nothing"
        )
    body = json.loads(canonical(body))
    events = [e for e in context.events() if e.kind in ("plan", "amendment")]
    for event in events:
        if context.workspace.read_json(f"plans/{event.data['n']}.json") == body:
            return _registered(context, event.data["n"])
    n = len(events) + 1
    ref = context.workspace.write_json(f"plans/{n}.json", body)
    extra = {} if why is None else {"why": why, "amends": plan.amends}
    context.record(
        "plan" if why is None else "amendment", n=n, sha256=ref.sha256, **extra
    )
    return _registered(context, n)


def _registered(context: Context, n: int) -> Result:
    plan = context.workspace.read_json(f"plans/{n}.json")
    ref = context.workspace.ref(f"plans/{n}.json", f"plan {n}")
    wanted = [run for _, _, run in specs(plan)]
    have = [r for r in wanted if context.workspace.exists(f"runs/{r}/result.json")]
    value = {"plan": n, "runs": len(set(wanted)), "finished": len(set(have))}
    return Result(value, (ref,))


def check(plan: Plan) -> None:
    """Refuses a plan that could not answer its question.

    Raises:
        ToolError: what is wrong with it.
    """
    names = [arm.name for arm in plan.arms]
    tests = [c.name for c in plan.comparisons]
    if len(set(names)) < len(names) or not names:
        raise ToolError("a plan needs arms, each with a name of its own")
    for n in (*names, *tests):
        if not NAME.fullmatch(n):
            raise ToolError(f"{n!r} is no name: letters, digits and . = + - _ only")
    if any("_vs_" in n for n in names):
        raise ToolError("a name of an arm has _vs_, which comparisons have")
    if len(set(tests)) < len(tests):
        raise ToolError("two comparisons have one name")
    if len(set(plan.seeds)) < len(plan.seeds) or len(plan.seeds) < 2:
        raise ToolError("a plan needs two seeds or more, no two alike")
    looks = list(plan.looks)
    if looks != sorted(set(looks)) or not looks or looks[-1] != len(plan.seeds):
        raise ToolError(
            "looks are increasing numbers of seeds; the last is all of them"
        )
    if not 0 < plan.alpha < 0.5:
        raise ToolError(f"alpha {plan.alpha} is no level of a test")
    for name, value in plan.limits.items():
        if name not in LIMITS or not 0 < value <= LIMITS[name]:
            raise ToolError(
                f"limit {name} {value}: there are wall, cpu, memory and disk"
            )
    if (plan.stage == "pilot") == bool(plan.comparisons):
        raise ToolError("a pilot tests nothing; any other plan names its comparisons")
    for c in plan.comparisons:
        a, versus, b = c.name.partition("_vs_")
        if versus and c.weights != {a: 1, b: -1}:
            raise ToolError(f"comparison {c.name}: the weights are not {a} minus {b}")
        missing = sorted(set(c.weights) - set(names))
        if missing or not any(c.weights.values()):
            raise ToolError(
                f"comparison {c.name}: no arm {', '.join(missing) or 'at all'}"
            )
        if abs(sum(c.weights.values())) > 1e-9 * sum(map(abs, c.weights.values())):
            raise ToolError(f"comparison {c.name}: the weights do not add up to zero")
    if plan.comparisons:
        level = stats.look_levels(looks, plan.alpha)[-1] / len(plan.comparisons)
        if stats.smallest_p(looks[-1], plan.test) > level:
            raise ToolError(
                f"{looks[-1]} seeds can never reach p {level:.4f} by {plan.test}, so "
                "this plan could not show a difference; give more seeds"
            )


@tool("idempotent")
def propose_plan(
    context: Context,
    metric: str,
    direction: Literal["lower", "higher"],
    arms: list[dict[str, Any]],
    seeds: list[int],
    comparisons: list[dict[str, Any]] | None = None,
    looks: list[int] | None = None,
    alpha: float = 0.05,
    test: Literal["t", "sign-flip"] = "t",
    min_effect: float = 0.0,
    power: float | None = None,
    stage: Literal["pilot", "confirmatory", "follow-up"] = "confirmatory",
    factors: dict[str, float | str] | None = None,
    limits: dict[str, float] | None = None,
    based_on: list[str] | None = None,
) -> Result:
    """Registers a plan before its runs: arms {name, config, overrides}, seeds, looks.

    Comparisons are {name, weights by arm, scale linear or log}. Nothing of it can be
    changed later but by amend_plan.
    """
    question = str(context.events()[0].data["question"])
    refs = tuple(context.workspace.ref(path) for path in based_on or ())
    plan = Plan(
        question=question,
        metric=metric,
        direction=direction,
        arms=tuple(_made(Arm, a, "arm") for a in arms),
        comparisons=tuple(
            _made(Comparison, c, "comparison") for c in comparisons or ()
        ),
        seeds=tuple(seeds),
        looks=tuple(looks or [len(seeds)]),
        alpha=alpha,
        test=test,
        min_effect=min_effect,
        power=power,
        stage=stage,
        factors=factors or {},
        limits=limits or {},
        based_on=refs,
    )
    check(plan)
    spent = _alpha_left(context, plan)
    if plan.comparisons and plan.alpha > spent + 1e-12:
        raise ToolError(
            f"alpha {plan.alpha} is more than the {spent:.4f} that earlier plans of "
            "this question have left"
        )
    return register(context, plan)


@tool("idempotent")
def amend_plan(
    context: Context, plan: int, why: str, changes: dict[str, Any]
) -> Result:
    """Replaces a plan by one with other fields, and says why in the journal.

    Levels of looks that were taken already are spent: the new alpha is what is left.
    """
    old = read_plan(context.workspace, plan)
    allowed = {
        "arms",
        "comparisons",
        "seeds",
        "looks",
        "factors",
        "limits",
        "min_effect",
    }
    if set(changes) - allowed or not why.strip():
        raise ToolError(f"an amendment needs a reason, and changes {sorted(allowed)}")
    fields: dict[str, Any] = {f.name: old[f.name] for f in dataclasses.fields(Plan)}
    fields |= changes
    fields["arms"] = tuple(_made(Arm, a, "arm") for a in fields["arms"])
    fields["comparisons"] = tuple(
        _made(Comparison, c, "comparison") for c in fields["comparisons"]
    )
    fields["based_on"] = tuple(_made(Ref, r, "reference") for r in fields["based_on"])
    for name in ("seeds", "looks"):
        fields[name] = tuple(fields[name])
    taken = analysis.looks_taken(context.workspace, old)
    levels = stats.look_levels(old["looks"], old["alpha"])
    fields["alpha"] = old["alpha"] - sum(levels[: len(taken)])
    if fields["alpha"] <= 1e-6 and fields["comparisons"]:
        raise ToolError(f"plan {plan} is over; register a new one")
    fields["amends"] = plan
    return register(context, Plan(**fields), why)


def _alpha_left(context: Context, new: Plan) -> float:
    """Alpha of the question less what its other plans spend.

    A plan spends its alpha, or, once replaced, that of the looks it took. One whose
    comparisons all are unstable makes no claim, and spends none.
    """
    total = float(context.options.get("alpha", 0.05))
    kinds = ("plan", "amendment")
    numbers = [e.data["n"] for e in context.events() if e.kind in kinds]
    plans = {n: read_plan(context.workspace, n) for n in numbers}
    replaced = {plan["amends"] for plan in plans.values()}
    mine = canonical(dataclasses.asdict(new))
    for n, plan in plans.items():
        same = canonical({k: plan.get(k) for k in dataclasses.asdict(new)}) == mine
        if plan["question"] != new.question or same or not plan["comparisons"]:
            continue
        found = analysis.verdicts(context.workspace, plan).values()
        if n in replaced:
            taken = len(analysis.looks_taken(context.workspace, plan))
            total -= sum(stats.look_levels(plan["looks"], plan["alpha"])[:taken])
        elif not found or any(v.found != "unstable" for v in found):
            total -= plan["alpha"]
    return total


def registered(events: Sequence[Event]) -> dict[int, Event]:
    """The event of every plan and amendment, by the plan's number."""
    kinds = ("plan", "amendment")
    return {event.data["n"]: event for event in events if event.kind in kinds}


def in_force(
    workspace: Workspace, events: Sequence[Event]
) -> dict[int, dict[str, Any]]:
    """Plans of the study's question that no amendment has replaced, by number."""
    question = events[0].data["question"] if events else ""
    known = registered(events)
    replaced = {e.data.get("amends") for e in known.values()}
    bodies = {n: read_plan(workspace, n) for n in known if n not in replaced}
    return {n: p for n, p in bodies.items() if p["question"] == question}


def _made(cls: Callable[..., Any], fields: Any, what: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore
    if not isinstance(fields, dict) or set(fields) - known:
        raise ToolError(f"{what} {fields!r}: the fields are {', '.join(sorted(known))}")
    if cls is Comparison and isinstance(fields.get("weights"), dict):
        weights = {k: float(w) for k, w in fields["weights"].items()}
        fields = fields | {"weights": weights}
    try:
        return cls(**fields)
    except TypeError as error:
        raise ToolError(f"{what} {fields!r}: {error}") from None


def read_plan(workspace: Workspace, n: int) -> dict[str, Any]:
    """A registered plan: the fields of `Plan`, resolved configs, run ids by arm.

    Raises:
        ToolError: there is none of that number.
    """
    if not workspace.exists(f"plans/{n}.json"):
        raise ToolError(f"there is no plan {n}")
    return workspace.read_json(f"plans/{n}.json")


TOOLS = (propose_plan, amend_plan)
