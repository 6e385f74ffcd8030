"""Compiles the Pallas kernels of `jaxlab.overlap.pallas` for TPUs that are not here.

python benchmarks/overlap_pallas.py > pallas.json          # a minute; extra peers

A product with a reduce-scatter after it and one with an all-gather before it, and their
gradients: how long compiling takes, how many kernels and how many of XLA's collectives
the program has, and the memory that it needs beside its arguments and results. Nothing
is run, and XLA does not look into a kernel: how fast it is, only a TPU can say.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import UserError

TARGETS = [
    ("tpu:v5e:2x4", {"t": 8}),
    ("tpu:v5e:2x4", {"d": 2, "t": 4}),
    ("tpu:v5p:2x2x1", {"t": 4}),
]
FORMS = ("scatter", "scatter-gradient", "gather", "gather-gradient")


@dataclasses.dataclass(frozen=True)
class Options:
    """Kernels, collectives, temporary memory and seconds of compilation, as JSON."""

    rows: int = 8192
    """rows of x, over all devices"""
    inner: int = 1792
    """a device's width of x for the reduce-scatter, x's whole one for the gather"""
    columns: int = 4096
    """width of the product for the reduce-scatter, a device's for the gather"""


def compile_case(target: str, axes: dict[str, int], sizes: list[int]) -> dict[str, Any]:
    """Compiles all forms for one target; runs in a process of its own."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxlab import overlap
    from jaxlab.overlap import pallas

    rows, inner, columns = sizes
    mesh, size = overlap.target_mesh(target, axes), axes["t"]
    d = ("d",) if "d" in axes else ()
    forms: dict[str, Any] = {
        "scatter": (
            lambda x, w: pallas.pallas_matmul_reduce_scatter(x, w, "t"),
            (P(d, "t"), P("t"), P((*d, "t"))),
            ((rows, inner * size), (inner * size, columns)),
        ),
        "gather": (
            lambda x, w: pallas.pallas_all_gather_matmul(x, w, "t"),
            (P((*d, "t")), P(None, "t"), P(d, "t")),
            ((rows, inner), (inner, columns * size)),
        ),
    }
    found = {}
    for name, (body, (x, w, y), shapes) in forms.items():
        f = jax.shard_map(body, mesh=mesh, in_specs=(x, w), out_specs=y)

        def total(*arrays, f=f):
            return jnp.sum(f(*arrays).astype(jnp.float32) ** 2)

        avals = tuple(
            jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, p))
            for s, p in zip(shapes, (x, w), strict=True)
        )
        gradient = jax.grad(total, argnums=(0, 1))
        for form, fn in ((name, f), (f"{name}-gradient", gradient)):
            begin = time.perf_counter()
            compiled = overlap.aot_compile(fn, avals, target)
            seconds = time.perf_counter() - begin
            report = overlap.schedule_report(compiled)
            found[form] = {
                "kernels": compiled.as_text().count('target="tpu_custom_call"'),
                "collectives": [k for _, k in report.synchronous]
                + [w.kind for w in report.windows],
                "temporary_bytes": report.temporary_bytes,
                "compile_seconds": round(seconds, 2),
            }
    return found


def run_case(target: str, axes: dict[str, int], options: Options) -> dict[str, Any]:
    """Compiles for one target in a new process.

    Raises:
        UserError: the compiler is missing or refuses.
    """
    sizes = json.dumps([options.rows, options.inner, options.columns])
    worker = subprocess.run(
        [sys.executable, __file__, "--worker", target, json.dumps(axes), sizes],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if worker.returncode:
        last = (worker.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the kernels for {target} were not compiled: {last}")
    return {"target": target, "axes": axes} | json.loads(worker.stdout.splitlines()[-1])


def main(arguments: list[str]) -> None:
    """Compiles for all targets and prints JSON."""
    if arguments[:1] == ["--worker"]:
        target, axes, sizes = arguments[1:]
        case = compile_case(target, json.loads(axes), json.loads(sizes))
        print(json.dumps(case))
        return
    options = parse_options(Options, arguments, "benchmarks/overlap_pallas.py")
    cases = [run_case(*target, options) for target in TARGETS]
    print(json.dumps({"sizes": dataclasses.asdict(options), "cases": cases}, indent=1))


if __name__ == "__main__":
    run_main(main)
