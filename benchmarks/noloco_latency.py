"""What random message times cost an all-reduce, and a pair: a model, no network.

    python benchmarks/noloco_latency.py > latency.json

The latency model of the NoLoCo paper (arXiv 2506.10911, section 5.4 and figure 5).

`ratio`: a message takes a random time, log-normal with a given coefficient of
variation. A tree all-reduce goes up log2 n levels, each node waiting for the later of
two messages, and down as many, a message to each node. A pair does one such level, up
and down. How many times longer is the tree?

`blocking`: messages take no time, and an inner step takes a random one. DiLoCo waits
for the slowest of all replicas in every outer round, NoLoCo for the slower of two.
How many times longer do all rounds take?

Both leave out what a message's size costs; benchmarks/noloco_links.py measures that.
"""

import dataclasses
import json
import math
import sys

import numpy as np

from jaxlab.cli import parse_options, run_main

MEAN_STEP, VAR_STEP = 1.0, 0.5  # of the logarithm of an inner step's time (paper)


@dataclasses.dataclass(frozen=True)
class Options:
    """The latency model of NoLoCo and of an all-reduce, as JSON."""

    replicas: tuple[int, ...] = (4, 16, 64, 256, 1024)
    """numbers of replicas, powers of 2"""
    cv: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 2.5)
    """standard deviation of a message's time over its mean"""
    trials: int = 2000
    """trees drawn for each number"""
    blocking_replicas: tuple[int, ...] = (16, 64, 256, 1024)
    """numbers of replicas of the blocking model"""
    inner_steps: tuple[int, ...] = (10, 50, 100)
    """inner steps of an outer round"""
    outer_rounds: int = 100
    """outer rounds of a run"""
    runs: int = 10
    """runs of the blocking model; the mean ratio is reported"""
    seed: int = 0
    """of all draws"""


def sigma_of(cv: float) -> float:
    """Sigma of the log-normal distribution with this coefficient of variation."""
    return math.sqrt(math.log1p(cv * cv))


def tree_seconds(
    replicas: int, sigma: float, trials: int, rng: np.random.Generator
) -> np.ndarray:
    """Times of all-reduces over binary trees, float64[trials], of unit median.

    Up: a node is ready when both of its children are and their messages are there.
    Down: the same tree the other way round, from a root that is ready at the end.
    """
    ready = np.zeros((trials, replicas))
    while ready.shape[1] > 1:
        sent = ready + rng.lognormal(0.0, sigma, ready.shape)
        ready = np.maximum(sent[:, ::2], sent[:, 1::2])
    while ready.shape[1] < replicas:
        ready = np.repeat(ready, 2, axis=1)
        ready = ready + rng.lognormal(0.0, sigma, ready.shape)
    return ready.max(axis=1)


def pair_seconds(sigma: float) -> float:
    """Expected time of a pair's exchange there and back, in the same unit.

    2 E max(t1, t2), which the log-normal distribution has in closed form.
    """
    return 2 * (1 + math.erf(sigma / 2)) * math.exp(sigma**2 / 2)


def ratio(replicas: int, cv: float, trials: int, rng: np.random.Generator) -> float:
    """Mean time of a tree all-reduce over that of a pair.

    Args:
        replicas: a power of 2.
        cv: coefficient of variation of a message's time.
        trials: trees to draw.
        rng: draws them.
    """
    if replicas < 2 or replicas & (replicas - 1):
        raise ValueError(f"replicas is {replicas}; a binary tree needs a power of 2")
    sigma = sigma_of(cv)
    return float(tree_seconds(replicas, sigma, trials, rng).mean()) / pair_seconds(
        sigma
    )


def blocking(
    replicas: int, inner_steps: int, outer_rounds: int, rng: np.random.Generator
) -> float:
    """Time of a run that waits for all in every round, over one that waits in pairs.

    Both see the same inner steps. The pairs' run is over with its last replica.

    Args:
        replicas: an even number.
        inner_steps: inner steps of a round.
        outer_rounds: rounds.
        rng: draws steps and pairs.
    """
    all_wait, ready = 0.0, np.zeros(replicas)
    for _ in range(outer_rounds):
        steps = rng.lognormal(MEAN_STEP, math.sqrt(VAR_STEP), (inner_steps, replicas))
        work = steps.sum(axis=0)
        all_wait += work.max()
        ready = ready + work
        pair = rng.permutation(replicas).reshape(2, -1)
        ready[pair] = ready[pair].max(axis=0)
    return float(all_wait / ready.max())


def measure(options: Options) -> dict:
    """Both tables."""
    rng = np.random.default_rng(options.seed)
    messages = [
        {"replicas": n, "cv": cv, "ratio": ratio(n, cv, options.trials, rng)}
        for cv in options.cv
        for n in options.replicas
    ]
    waits = []
    for n in options.blocking_replicas:
        for inner in options.inner_steps:
            runs = [
                blocking(n, inner, options.outer_rounds, rng)
                for _ in range(options.runs)
            ]
            waits.append(
                {
                    "replicas": n,
                    "inner_steps": inner,
                    "ratio": float(np.mean(runs)),
                    "spread": [min(runs), max(runs)],
                }
            )
        print(f"blocking, {n} replicas: done", file=sys.stderr)
    return {
        "benchmark": "noloco_latency",
        "options": dataclasses.asdict(options),
        "tree_all_reduce_over_pair": messages,
        "waiting_for_all_over_waiting_in_pairs": waits,
    }


def main(arguments: list[str]) -> None:
    """Computes and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/noloco_latency.py")
    print(json.dumps(measure(options), indent=1))


if __name__ == "__main__":
    run_main(main)
