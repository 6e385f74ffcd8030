"""How well gossip learns: data parallel, DiLoCo, NoLoCo and no exchange at all.

python benchmarks/noloco_convergence.py > convergence.json       # 8 replicas, 3 seeds
python benchmarks/noloco_convergence.py --replicas 16 --seeds 0 1 2

All arms train the same byte-level GPT on the same tokens in the same order: each step
has `rows` sequences for each replica, and the data-parallel arm gets them all. The
replicas are simulated on one device by `jax.vmap`, which gives the numbers that they
would have on as many. H is the number of steps between exchanges.

The paper (arXiv 2506.10911) gives NoLoCo half the H of DiLoCo; here every H is an arm.
An arm's `loss` is that of the mean of the replicas' weights, `replica_loss` the mean
of their own losses, in nats per byte on held-out documents.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import config, data, optim
from jaxlab.cli import parse_options, run_main
from jaxlab.errors import ConfigError
from jaxlab.models import gpt
from jaxlab.step import mean_gradient, summed_loss

NESTEROV = dict(momentum=0.6, nesterov=True)
ALL = dict(pairing="all", gamma=0.0)
ARMS: dict[str, dict[str, Any] | None] = {
    "dp": None,  # one model, one all-reduce a step
    "local": dict(inner_steps=None),
    "diloco H25": dict(inner_steps=25, **ALL),
    "diloco H50": dict(inner_steps=50, momentum=0.3, **ALL),
    "diloco H25 nesterov": dict(inner_steps=25, **ALL, **NESTEROV),
    "diloco H44 nesterov": dict(inner_steps=44, **ALL, **NESTEROV),
    "noloco H25": dict(inner_steps=25),
    "noloco H25 gamma 0": dict(inner_steps=25, gamma=0.0, check=False),
    "noloco H25 nesterov": dict(inner_steps=25, **NESTEROV),
    "noloco H25 groups of 4": dict(inner_steps=25, gamma=1.0, group_size=4),
    "noloco H25 nesterov groups of 4": dict(inner_steps=25, group_size=4, **NESTEROV),
    "noloco H12 bf16": dict(inner_steps=12, wire_dtype="bfloat16"),
    "noloco H6 int8": dict(inner_steps=6, wire_dtype="int8", error_feedback=True),
    "noloco H12 bf16 nesterov": dict(inner_steps=12, wire_dtype="bfloat16", **NESTEROV),
    "noloco H6 int8 nesterov": dict(
        inner_steps=6, wire_dtype="int8", error_feedback=True, **NESTEROV
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Held-out loss of low-communication training on one small model, as JSON."""

    replicas: int = 8
    """replicas, simulated on one device"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of weights, data order and pairing"""
    arms: tuple[str, ...] = tuple(ARMS)
    """which arms; see the file"""
    steps: int = 1500
    """inner steps"""
    rows: int = 4
    """sequences of a replica in a step"""
    length: int = 64
    """bytes of a sequence"""
    lr: float = 4e-3
    """peak learning rate of AdamW: linear warm-up, cosine to a tenth"""
    layers: int = 2
    """blocks of the model"""
    width: int = 64
    """width of the model"""
    corpus: str = "pydocs"
    """text; see jaxlab.config.Data"""
    curves: bool = False
    """keep the losses and standard deviations along the way"""


class Setting:
    """What all arms share: model, text and inner optimizer."""

    def __init__(self, options: Options) -> None:
        tokens = data.open_tokens(data.prepare(options.corpus, "bytes"))
        shape = config.GPT(layers=options.layers, width=options.width, heads=4)
        self.options = options
        self.model = config.resolve_model(shape, tokens.tokenizer.vocab_size)
        self.apply = gpt.GPT(self.model).apply
        self.tokens = tokens
        held_out = data.eval_batches(
            tokens.eval, length=options.length, batch=128, limit=16
        )
        self.held_out = [jax.tree.map(jnp.asarray, batch) for batch in held_out]
        recipe = config.AdamW(lr=options.lr, warmup=100)
        self.rate = recipe.learning_rate(options.steps)
        self.inner = recipe.build(options.steps)

    def batches(self, seed: int, chunk: int) -> Iterator[Any]:
        """Inputs and targets [step, replica, row, time], `chunk` steps at a time."""
        o = self.options
        dataset = data.train_batches(
            self.tokens.train,
            length=o.length,
            batch=o.replicas * o.rows,
            seed=seed,
        )
        for first in range(0, o.steps, chunk):
            steps = [dataset[i] for i in range(first, min(first + chunk, o.steps))]
            shape = (len(steps), o.replicas, o.rows, o.length)
            yield jax.tree.map(lambda *x, s=shape: np.stack(x).reshape(s), *steps)

    def loss(self, params: Any) -> jax.Array:
        """Held-out loss of one model, nats per byte."""
        total = count = jnp.float32(0)
        for batch in self.held_out:
            one = jax.tree.map(lambda x: x[0], batch)
            _, (nll, number) = summed_loss(params, one, apply=self.apply, z_loss=0.0)
            total, count = total + nll, count + number
        return total / count


Arm = tuple[Any, Any, Callable[[Any, Any], Any]]


def arm_of(setting: Setting, hyper: dict[str, Any] | None, seed: int) -> Arm:
    """Parameters and state before the first step, and a step on a batch [r, b, t].

    All have the replica axis in front; the data-parallel arm has one replica that
    takes all rows.
    """
    o = setting.options
    params = gpt.init_params(setting.model, jax.random.key(seed))
    gradient = partial(mean_gradient, apply=setting.apply)
    if hyper is None:
        state = jax.tree.map(lambda x: x[None], setting.inner.init(params))

        def central(params, state, batch):
            rows = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), batch)
            mine = jax.tree.map(lambda x: x[0], (params, state))
            grads, _ = gradient(mine[0], rows)
            updates, state = setting.inner.update(grads, mine[1], mine[0])
            new = optax.apply_updates(mine[0], updates), state
            return jax.tree.map(lambda x: x[None], new)

        return optim.replicate(params, 1), state, central

    outer = dict(axis_size=o.replicas, seed=seed) | hyper
    every = outer.pop("inner_steps")
    tx = optim.noloco(setting.inner, inner_steps=None, **outer)
    state = optim.replicate(tx.init(params), o.replicas)
    axes = optim.replica_axes(state)

    def local(params, state, batch):
        grads, _ = gradient(params, jax.tree.map(lambda x: x[None], batch))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if every is None:
            return params, state
        return optim.outer_step(params, state, inner_steps=every, **outer)

    step = jax.vmap(
        local, in_axes=(0, axes, 0), out_axes=(0, axes), axis_name="replica"
    )
    return optim.replicate(params, o.replicas), state, step


def replica_std(params: Any) -> jax.Array:
    """Standard deviation between replicas, root mean square over the weights."""
    leaves = jax.tree.leaves(params)
    squares = sum(jnp.sum(jnp.var(x, axis=0)) for x in leaves)
    return jnp.sqrt(squares / sum(x[0].size for x in leaves))


def train(setting: Setting, name: str, seed: int, chunk: int = 25) -> dict[str, Any]:
    """One arm with one seed."""
    params, state, step = arm_of(setting, ARMS[name], seed)

    @partial(jax.jit, donate_argnums=(0, 1))
    def run_chunk(params, state, batches):
        def one(carry, batch):
            params, state = step(*carry, batch)
            return (params, state), replica_std(params)

        (params, state), std = jax.lax.scan(one, (params, state), batches)
        return params, state, std

    mean_loss = jax.jit(lambda p: setting.loss(optim.mean_params(p)))
    each_loss = jax.jit(lambda p: jax.lax.map(setting.loss, p))
    begin, curve, stds, done = time.perf_counter(), [], [], 0
    for batches in setting.batches(seed, chunk):
        params, state, std = run_chunk(params, state, batches)
        stds += np.asarray(std).tolist()
        done += len(std)
        if setting.options.curves and done % 100 == 0:
            curve.append([done, float(mean_loss(params))])
    peak = max(stds)
    rates = [float(setting.rate(i)) for i in range(len(stds))]
    after = slice(150, None, 25)  # past the warm-up, at one phase of the rounds
    correlation = None
    if peak > 1e-6 and done > 300:
        correlation = float(np.corrcoef(stds[after], rates[after])[0, 1])
    result = {
        "arm": name,
        "seed": seed,
        "loss": float(mean_loss(params)),
        "replica_loss": float(jnp.mean(each_loss(params))),
        "std_peak": peak,
        "std_last": stds[-1],
        "std_lr_correlation": correlation,
        "seconds": time.perf_counter() - begin,
    }
    if setting.options.curves:
        result |= {"curve": curve, "std": stds[24::25]}
    return result


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of each arm."""
    table = {}
    for arm in dict.fromkeys(r["arm"] for r in results):
        rows = [r for r in results if r["arm"] == arm]
        losses = [r["loss"] for r in rows]
        table[arm] = {
            "loss": statistics.mean(losses),
            "loss_sd": statistics.stdev(losses) if len(losses) > 1 else None,
            "replica_loss": statistics.mean(r["replica_loss"] for r in rows),
            "std_peak": statistics.mean(r["std_peak"] for r in rows),
            "std_last": statistics.mean(r["std_last"] for r in rows),
        }
    return table


def main(arguments: list[str]) -> None:
    """Trains all arms, seed by seed, and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/noloco_convergence.py")
    for arm in options.arms:
        if arm not in ARMS:
            raise ConfigError(f"no arm {arm!r}; there are: {', '.join(ARMS)}")
    setting = Setting(options)
    results = []
    for seed in options.seeds:
        for arm in options.arms:
            results.append(train(setting, arm, seed))
            shown = {k: v for k, v in results[-1].items() if k not in ("curve", "std")}
            print(json.dumps(shown), file=sys.stderr, flush=True)
    numbers = gpt.parameter_count(gpt.init_params(setting.model, jax.random.key(0)))
    report = {
        "options": dataclasses.asdict(options),
        "parameters": numbers,
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "summary": summary(results),
        "runs": results,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
