"""The policy learns from nothing: what it reaches, and when.

    python benchmarks/rl_learning.py > rl_learning.json
    python benchmarks/rl_learning.py --config configs/gui_miniwob.py --envs 4

Behaviour cloning on the expert's episodes, then DART, one process in lockstep: the
learning alone, without what `scripts/train.py configs/gui_pix.py` adds. Episodes of
evaluation have seeds from 1000000 on, training never. Each stage is evaluated with the
likeliest action, `shuffled` with instructions of other goals on the same screens (who
does not read succeeds as often with these), `random` with fresh weights, sampled.
Seconds are of this process: `cpu` of all its threads, and wall.
"""

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.common.learning import evaluate, log, make, show, versions
from benchmarks.common.lockstep import train
from jaxlab.cli import parse_options, run_main
from jaxlab.config import load
from jaxlab.program import use_compilation_cache
from jaxlab.rl.config import RLRun
from jaxlab.rl.envs.pix_tasks import TASKS
from jaxlab.rl.learner import build, clone


@dataclass(frozen=True)
class Options:
    """Learning from nothing, as JSON."""

    config: str = "configs/gui_pix.py"
    """the run"""
    updates: int | None = None
    """of DART; None: as many as the config says"""
    cloning: int | None = None
    """updates of behaviour cloning; None: as many as the config says"""
    held_out: int = 200
    """episodes of evaluation, of each task"""
    every: int = 20
    """updates between evaluations of the curve, of a quarter of the episodes"""
    envs: int = 32
    """environments that act together"""
    steps: int = 256
    """of a batch"""
    seed: int = 0
    """of all"""


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """Those of all threads of the process, and of the clock on the wall."""
        return {
            "cpu_s": round(time.process_time() - self.cpu, 1),
            "wall_s": round(time.perf_counter() - self.wall, 1),
        }


def learn(run: RLRun, options: Options) -> dict[str, Any]:
    """Trains, and evaluates on the way."""
    clock = Clock()
    tasks = run.envs.tasks
    envs = make(run, options.envs)
    policy = run.policy.build(envs[0].observation_space)
    params = policy.init(jax.random.key(run.seed))
    act = jax.jit(policy.act)
    curve: list[dict[str, Any]] = []

    def look(stage: str, update: int, params: Any, episodes: int, **more: Any) -> None:
        nonlocal clock
        spent = clock.read()
        found = evaluate(policy, act, params, envs, tasks, episodes)
        line = {"stage": stage, "update": update, **spent, "success": found, **more}
        curve.append(line)
        rates = {task: one["success"] for task, one in found.items()}
        log(f"{stage} {update}: {rates} {spent}")
        clock.cpu += time.process_time() - clock.cpu - spent["cpu_s"]
        clock.wall += time.perf_counter() - clock.wall - spent["wall_s"]

    shown = show(policy, run)
    ceiling = float(np.mean([one.reward for one in shown]))
    chance = evaluate(policy, act, params, envs, tasks, options.held_out, temperature=1)
    log(f"{len(shown)} demonstrations, success {ceiling:.3f}; random {chance}")

    update, figures = 0, {}
    clock = Clock()
    for last, figures in clone(run.cloning, policy, params, shown, run.seed):
        params, update = last, update + 1
        if update % (10 * options.every) == 0 and update < run.cloning.updates:
            loss = round(float(figures["loss"]), 4)
            look("cloning", update, params, options.held_out // 4, loss=loss)
    look("cloning", update, params, options.held_out)
    cloned = curve[-1]["success"]

    learner = build(run, policy)
    state, actions = learner.init(params), 0
    rounds = train(run, policy, learner, state, envs, options.steps, shown)
    for number in range(1, run.steps + 1):
        state, figures, actions = next(rounds)
        names = ("sampled_success", "loss", "kl", "entropy", "injected", "batch_steps")
        told = {k: round(figures[k], 4) for k in names if k in figures}
        if number % options.every == 0 and number < run.steps:
            look(
                "dart",
                number,
                state.params,
                options.held_out // 4,
                actions=actions,
                **told,
            )
    look("dart", run.steps, state.params, options.held_out, actions=actions)
    shuffled = evaluate(
        policy, act, state.params, envs, tasks, options.held_out, shuffled=True
    )
    return {
        "random": chance,
        "oracle": ceiling,
        "demonstrations": len(shown),
        "cloned": cloned,
        "final": curve[-1]["success"],
        "shuffled": shuffled,
        # Of Pix: who reads succeeds as often as goals coincide.
        "shuffled_expected": {
            task: round(1 / TASKS[task].goals, 4) for task in tasks if task in TASKS
        },
        "learning": {k: curve[-1][k] for k in ("cpu_s", "wall_s", "actions")},
        "curve": curve,
    }


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/rl_learning.py")
    use_compilation_cache()
    run: RLRun = load(options.config)
    cloning = run.cloning
    if options.cloning is not None:
        cloning = dataclasses.replace(cloning, updates=options.cloning)
    steps = run.steps if options.updates is None else options.updates
    run = dataclasses.replace(run, seed=options.seed, steps=steps, cloning=cloning)
    load_before, clock = os.getloadavg()[0], Clock()
    result = learn(run, options)
    json.dump(
        {
            "benchmark": "rl_learning",
            "machine": {"cores": os.cpu_count(), "load": load_before},
            "versions": versions(),
            "seed": options.seed,
            "held_out": options.held_out,
            "total": clock.read(),
            **result,
        },
        sys.stdout,
        indent=2,
    )
    print()


if __name__ == "__main__":
    run_main(main)
