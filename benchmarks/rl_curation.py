"""What each piece of DART's curation is worth, at equal environment steps.

python benchmarks/rl_curation.py > rl_curation.json

Every arm starts from the same weakly cloned policy, acts as often, and is evaluated on
the same held-out episodes, with as many seeds as asked for:

- `all`, and without one piece each: `-rollouts` (dynamic rollout number), `-length`
  (dynamic length), `-experience` (pool), `-entropy` (step selection), `-importance`
  (truncated importance sampling);
- `none`, and with one piece more each: `+rollouts`, `+length`, ...; the last is `all`;
- a policy that acts with other weights than those trained, with the importance weights
  (`/tis`), without them (`/no`) and with them not truncated (`/is`): `int8` (weights
  rounded to 8 bits), `lag2` and `lag8` (as old as a decoupled run's may be);
- `hard` and `hard-experience`: a task that the policy never solves at the start, with
  and without the pool.

What an arm's figures differ by from `all` is in `minus_all`, paired by seed. With three
seeds only large differences mean anything: the spread is printed beside them.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.learning import evaluate, log, make, show, versions
from benchmarks.common.lockstep import train
from jaxlab.cli import parse_options, run_main
from jaxlab.config import load
from jaxlab.program import use_compilation_cache
from jaxlab.rl.config import Cloning, Curation, RLRun
from jaxlab.rl.learner import build, clone

PIECES: dict[str, dict[str, Any]] = {
    "rollouts": {"dynamic_rollouts": False},
    "length": {"dynamic_length": False},
    "experience": {"experience": False},
    "entropy": {"entropy_quantile": 0.0},
    "importance": {"importance_cap": None},
}
"""what switches each off"""


@dataclass(frozen=True)
class Options:
    """The value of curation, as JSON."""

    config: str = "configs/gui_pix.py"
    """the run that the arms are variants of"""
    seeds: int = 3
    """runs of each arm"""
    actions: int = 12000
    """of all environments, in each run"""
    cloning: int = 300
    """updates of the policy that all start from"""
    hard: str = "slider"
    """the task of the arms `hard`; the policy at the start has not seen it"""
    held_out: int = 100
    """episodes of evaluation, of each task"""
    envs: int = 32
    """environments that act together"""
    steps: int = 256
    """of a batch"""
    arms: str = ""
    """names, with commas between them; empty: all"""


@dataclass(frozen=True)
class Arm:
    """A variant of the run."""

    curation: Curation
    acting: Callable[[], Callable[[Any], Any]] | None = None
    """makes what turns the learner's weights into those that act"""
    hard: bool = False


def without(*pieces: str) -> Curation:
    """All of curation but these pieces."""
    off: dict[str, Any] = {}
    for piece in pieces:
        off |= PIECES[piece]
    return dataclasses.replace(Curation(), **off)


def int8() -> Callable[[Any], Any]:
    """Weights as an 8-bit copy has them: 255 steps over the range of each array."""

    @jax.jit
    def rounded(params: Any) -> Any:
        def one(x: Any) -> Any:
            scale = jnp.maximum(jnp.abs(x).max(), 1e-12) / 127
            return jnp.round(x / scale) * scale

        return jax.tree.map(one, params)

    return rounded


def lag(versions: int) -> Callable[[], Callable[[Any], Any]]:
    """Weights from so many updates ago."""

    def made() -> Callable[[Any], Any]:
        past: deque[Any] = deque(maxlen=versions + 1)

        def old(params: Any) -> Any:
            past.append(jax.tree.map(np.asarray, params))
            return past[0]

        return old

    return made


def arms() -> dict[str, Arm]:
    """All of them, by name."""
    names = list(PIECES)
    found = {"all": Arm(Curation()), "none": Arm(without(*names))}
    found |= {f"-{name}": Arm(without(name)) for name in names}
    for place, name in enumerate(names[:-1]):
        found[f"+{name}"] = Arm(without(*names[place + 1 :]))
    untruncated = dataclasses.replace(Curation(), importance_cap=float("inf"))
    ways = {"tis": Curation(), "no": without("importance"), "is": untruncated}
    mismatches = {"int8": int8, "lag2": lag(2), "lag8": lag(8)}
    for mismatch, acting in mismatches.items():
        for way, curation in ways.items():
            found[f"{mismatch}/{way}"] = Arm(curation, acting)
    found["hard"] = Arm(Curation(), hard=True)
    found["hard-experience"] = Arm(without("experience"), hard=True)
    return found


def measure(run: RLRun, arm: Arm, start: Any, options: Options, policy: Any, act: Any):
    """Trains one arm with one seed; its row of the table."""
    envs = make(run, options.envs)
    share = dataclasses.replace(run, cloning=Cloning(episodes=16 * len(run.envs.tasks)))
    shown = show(policy, share)
    learner = build(run, policy)
    state, cpu = learner.init(start), time.process_time()
    acting = None if arm.acting is None else arm.acting()
    rounds = train(run, policy, learner, state, envs, options.steps, shown, acting)
    sampled, figures, actions, updates = [], {}, 0, 0
    while actions < options.actions:
        state, figures, actions = next(rounds)
        sampled.append(figures["sampled_success"])
        updates += "loss" in figures
    found = evaluate(policy, act, state.params, envs, run.envs.tasks, options.held_out)
    kept = ("weight", "truncated", "mismatch", "kl", "entropy", "grad_norm")
    return {
        "success": float(np.mean([one["success"] for one in found.values()])),
        "by_task": {task: one["success"] for task, one in found.items()},
        "sampled_first": round(float(np.mean(sampled[:3])), 4),
        "sampled_mean": round(float(np.mean(sampled)), 4),
        "actions": actions,
        "updates": updates,
        "cpu_s": round(time.process_time() - cpu, 1),
        "last": {name: round(figures[name], 5) for name in kept if name in figures},
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, deviation of the sample, and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    rounded = [round(value, 4) for value in values]
    return {
        "mean": round(statistics.fmean(values), 4),
        "sd": None if deviation is None else round(deviation, 4),
        "values": rounded,
    }


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/rl_curation.py")
    use_compilation_cache()
    base: RLRun = load(options.config)
    known = arms()
    chosen = options.arms.split(",") if options.arms else list(known)
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise ValueError(f"no arm {unknown[0]!r}; there are {', '.join(known)}")
    updates = Cloning(
        options.cloning,
        base.cloning.batch,
        base.cloning.episodes,
        base.cloning.optimizer,
    )
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        run = dataclasses.replace(base, seed=seed, cloning=updates)
        policy = run.policy.build(make(run, 1)[0].observation_space)
        act = jax.jit(policy.act)
        params = policy.init(jax.random.key(seed))
        for last, _ in clone(updates, policy, params, show(policy, run), seed):
            params = last
        for name in chosen:
            arm, own = known[name], dataclasses.replace(run, steps=1000)
            if arm.hard:
                tasks = dataclasses.replace(run.envs, tasks=(options.hard,))
                own = dataclasses.replace(own, envs=tasks)
            own = dataclasses.replace(own, curation=arm.curation)
            row = measure(own, arm, params, options, policy, act)
            rows.append({"arm": name, "seed": seed, **row})
            log(f"{name} seed {seed}: {row['success']:.3f} {row['last']}")
    by_arm = {n: [r["success"] for r in rows if r["arm"] == n] for n in chosen}
    summary = {name: spread(values) for name, values in by_arm.items()}
    for name in chosen:
        if "all" in by_arm and not known[name].hard:
            pairs = zip(by_arm[name], by_arm["all"], strict=True)
            summary[name]["minus_all"] = spread([a - b for a, b in pairs])
    json.dump(
        {
            "benchmark": "rl_curation",
            "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0]},
            "versions": versions(),
            "options": dataclasses.asdict(options),
            "summary": summary,
            "rows": rows,
        },
        sys.stdout,
        indent=2,
    )
    print()


if __name__ == "__main__":
    run_main(main)
