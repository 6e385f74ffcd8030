"""What the compiled step sends, and what it costs to compile, by number of replicas.

python benchmarks/noloco_program.py > program.json

Each case is compiled by a process of its own, for as many forced CPU devices as it has
replicas. Bytes are read from the compiled HLO: operands of the collectives of one
exchange, on one device. `steps_on_wire` is how many messages follow each other: 1 for a
permute, 2 log2(N) for an all-reduce by a tree, 2 (N - 1) for one by a ring, whose
traffic is `ring_bytes`. The model is two layers; its sizes do not matter for shares.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import UserError

CASES: dict[str, dict[str, Any] | None] = {
    "dp": None,
    "diloco": dict(pairing="all", gamma=0.0),
    "noloco": {},
    "noloco pair": dict(exchange="pair"),
    "noloco bf16": dict(wire_dtype="bfloat16"),
    "noloco pair bf16": dict(exchange="pair", wire_dtype="bfloat16"),
    "noloco int8": dict(wire_dtype="int8"),
    "noloco groups of 4": dict(group_size=4),
    "noloco host-dispatched": dict(row=True),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Bytes of an exchange and cost of compilation, as JSON."""

    replicas: tuple[int, ...] = (8, 16, 64, 256)
    """numbers of replicas"""
    cases: tuple[str, ...] = tuple(CASES)
    """which forms; see the file"""
    width: int = 64
    """of the two matrices [width, 4 width] and [4 width, width]"""
    inner_steps: int = 50
    """H, for bytes per step"""


def compile_case(name: str, replicas: int, width: int) -> dict[str, Any]:
    """Compiles one step; runs in a process with that many devices."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", replicas)
    jax.config.update("jax_enable_compilation_cache", False)
    import jax.numpy as jnp
    import optax
    from jax.sharding import AxisType, PartitionSpec

    from jaxlab import optim
    from jaxlab.optim.audit import collectives

    own, every = PartitionSpec("replica"), PartitionSpec()
    mesh = jax.make_mesh((replicas,), ("replica",), axis_types=(AxisType.Auto,))
    params = {"a": jnp.ones((width, 4 * width)), "b": jnp.ones((4 * width, width))}
    batch = jnp.ones((replicas, 2, width))
    hyper = CASES[name]

    def loss(params, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ params["a"]) @ params["b"]))

    if hyper is None:
        tx = optax.sgd(0.1)

        def step(params, batch):
            mine = jax.lax.pcast(params, "replica", to="varying")
            grads = jax.lax.pmean(jax.grad(loss)(mine, batch[0]), "replica")
            updates, _ = tx.update(grads, tx.init(params))
            return optax.apply_updates(params, updates)

        arguments, specs, out = (params, batch), (every, own), every
    else:
        hyper = {"axis_size": replicas, "inner_steps": 50} | hyper
        by_host = hyper.pop("row", False)
        tx = optim.noloco(
            optax.sgd(0.1), **hyper | ({"inner_steps": None} if by_host else {})
        )
        state = optim.replicate(tx.init(params), replicas)
        axes, state_specs = optim.replica_axes(state), optim.replica_specs(state)
        row = optim.partners("round_robin", replicas, 0, 0) if by_host else None

        def one(params, state, x):
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            params = optax.apply_updates(params, updates)
            if by_host:
                return optim.outer_step(params, state, row=row, **hyper)
            return params, state

        step = jax.vmap(one, in_axes=(0, axes, 0), out_axes=(0, axes))
        arguments = (optim.replicate(params, replicas), state, batch)
        specs, out = (own, state_specs, own), (own, state_specs)
    begin = time.perf_counter()
    lowered = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=out)
    ).lower(*arguments)
    lowered_after = time.perf_counter() - begin
    begin = time.perf_counter()
    text = lowered.compile().as_text() or ""
    found = collectives(text)
    by_branch: dict[str, int] = {}
    for c in found:
        by_branch[c.computation] = by_branch.get(c.computation, 0) + c.bytes
    stages = 2 if "groups of 4" in name else 1
    return {
        "case": name,
        "replicas": replicas,
        "kinds": sorted({c.kind for c in found}),
        "conditional": all(c.conditional for c in found),
        "collectives": len(found),
        "payload_bytes": stages * max(by_branch.values()),
        "lower_seconds": lowered_after,
        "compile_seconds": time.perf_counter() - begin,
        "hlo_bytes": len(text),
        "parameter_bytes": 4 * 8 * width * width,
        "jax": jax.__version__,
    }


def complete(result: dict[str, Any], every: int) -> dict[str, Any]:
    """Adds what follows from the collectives."""
    n, payload = result["replicas"], result["payload_bytes"]
    reduces = result["kinds"] == ["all-reduce"]
    traffic = 2 * (n - 1) / n * payload if reduces else payload
    steps = {"tree": 2 * math.ceil(math.log2(n)), "ring": 2 * (n - 1)}
    stages = 2 if "groups of 4" in result["case"] else 1
    return result | {
        "ring_bytes" if reduces else "sent_bytes": traffic,
        "bytes_per_step": traffic / (1 if result["case"] == "dp" else every),
        "of_parameters": traffic / result["parameter_bytes"],
        "steps_on_wire": steps if reduces else stages,
    }


def main(arguments: list[str]) -> None:
    """Compiles all cases, each in a process of its own, and prints JSON."""
    if arguments[:1] == ["--worker"]:
        name, replicas, width = arguments[1:]
        print(json.dumps(compile_case(name, int(replicas), int(width))))
        return
    options = parse_options(Options, arguments, "benchmarks/noloco_program.py")
    results = []
    for replicas in options.replicas:
        for case in options.cases:
            worker = subprocess.run(
                [sys.executable, __file__, "--worker", case]
                + [str(replicas), str(options.width)],
                capture_output=True,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            if worker.returncode:
                raise UserError(f"{case} failed: {worker.stderr.strip()[-300:]}")
            result = complete(json.loads(worker.stdout), options.inner_steps)
            results.append(result)
            print(json.dumps(result), file=sys.stderr, flush=True)
    report = {"options": dataclasses.asdict(options), "cases": results}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
