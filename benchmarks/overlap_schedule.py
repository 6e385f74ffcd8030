"""Which collectives the compilers for TPU and GPU hide behind products, without a chip.

python benchmarks/overlap_schedule.py > schedule.json     # 40 minutes; extra peers

An MLP under shard_map, its rows and its hidden dimension cut over 8 devices: with an
all-gather before and a reduce-scatter after (`plain`), with the rings of
`jaxlab.overlap` (`ring`, and `both` ways round; after it the chunks, if not one), and
with the ring of many tutorials, which has no barriers (`textbook`). `gradient` is that
of all three arrays, where `saved` keeps the gathered input for it; products and sums
are in bfloat16, or with `float32` in that; `large` has twice both widths. Each is
compiled ahead of time by a process of its own; nothing is run. See docs/overlap.md.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import UserError

TPU, GPU = "tpu:v5e:2x4", "cuda:h100:8"
TPUS = (TPU, "tpu:v5p:2x2x2", "tpu:v6e:2x4")
RING = {"tpu": "ring-2", "cuda": "ring"}
"""the recommended form"""
FORMS = ("plain", "ring", "ring-2", "both", "both-2")
CASES = [
    *(
        (t, f"{f}{g}", "recommended")
        for t in TPUS
        for g in ("", "-gradient")
        for f in FORMS
    ),
    *(
        (t, f"{f}{g}-large", "recommended")
        for t in TPUS
        for g in ("", "-gradient")
        for f in ("plain", "ring", "ring-2")
    ),
    *(
        (TPU, f"{f}-gradient", "recommended")
        for f in ("ring-2-saved", "plain-float32", "ring-float32", "ring-2-float32")
    ),
    *(
        (GPU, f"{f}{g}", o)
        for f in ("plain", "ring", "ring-2")
        for g in ("", "-gradient")
        for o in ("recommended", "default")
    ),
    (GPU, "textbook", "default"),
]


@dataclasses.dataclass(frozen=True)
class Options:
    """Asynchronous collectives and the products beside them, as JSON."""

    rows: int = 8192
    """rows of the input"""
    width: int = 4096
    """width of the input"""
    hidden: int = 14336
    """width of the hidden layer"""
    only: str = ""
    """of the cases those alone whose target and form begin so: "tpu:v5e:2x4 ring-2"
    """


def compile_case(target: str, form: str, flags: str, sizes: list[int]) -> dict:
    """Compiles one form for 8 devices; runs in a process of its own."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxlab import overlap

    rows, width, hidden = sizes
    form, *rest = form.split("-")
    if "large" in rest:
        width, hidden = 2 * width, 2 * hidden
    dtype = jnp.float32 if "float32" in rest else None
    mesh = overlap.target_mesh(target, {"t": 8})

    def activate(y):
        return jax.nn.gelu(y).astype(jnp.bfloat16)

    def plain(x, up, down):
        x = lax.all_gather(x, "t", axis=0, tiled=True)
        h = activate(jnp.matmul(x, up, preferred_element_type=dtype))
        y = jnp.matmul(h, down, preferred_element_type=dtype)
        return lax.psum_scatter(y, "t", scatter_dimension=0, tiled=True)

    def ring(x, up, down):
        how: Any = {"chunks": 2 if "2" in rest else 1, "preferred_element_type": dtype}
        how |= {"bidirectional": form == "both"}
        keep = {"save_gathered": "saved" in rest}
        h = overlap.all_gather_matmul(x, up, "t", epilogue=activate, **how, **keep)
        return overlap.matmul_reduce_scatter(h, down, "t", **how)

    def textbook(x, up, down):
        me, each = lax.axis_index("t"), x.shape[0]
        h = jnp.zeros((8 * each, up.shape[1]), x.dtype)
        h = lax.pcast(h, "t", to="varying")
        for s in range(8):
            block = (me + s) % 8 * each
            h = lax.dynamic_update_slice_in_dim(h, x @ up, block, 0)
            if s < 7:
                x = lax.ppermute(x, "t", [((i + 1) % 8, i) for i in range(8)])
        y = jax.nn.gelu(h) @ down
        return lax.psum_scatter(y, "t", scatter_dimension=0, tiled=True)

    body = {"plain": plain, "ring": ring, "both": ring, "textbook": textbook}[form]
    specs = (P("t"), P(None, "t"), P("t"))
    f: Any = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("t"))
    if "gradient" in rest:
        forward = f

        def total(*arrays):
            return jnp.sum(forward(*arrays).astype(jnp.float32) ** 2)

        f = jax.grad(total, argnums=(0, 1, 2))
    shapes = ((rows, width), (width, hidden), (hidden, width))
    avals = tuple(
        jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, p))
        for s, p in zip(shapes, specs, strict=True)
    )
    options = {} if flags == "default" else None
    compiled = overlap.aot_compile(f, avals, target, options=options)
    report = overlap.schedule_report(compiled)
    return {
        "asynchronous": report.n_async,
        "covered": report.n_covered,
        "uncovered": report.uncovered,
        "synchronous": [kind for _, kind in report.synchronous],
        "products": report.n_dots,
        "product_cycles": report.dot_cycles,
        "cycles": report.cycles,
        "temporary_bytes": report.temporary_bytes,
        "jax": jax.__version__,
    }


def run_case(target: str, form: str, flags: str, options: Options) -> dict[str, Any]:
    """Compiles one case in a new process.

    Raises:
        UserError: the compiler is missing or refuses.
    """
    sizes = json.dumps([options.rows, options.width, options.hidden])
    worker = subprocess.run(
        [sys.executable, __file__, "--worker", target, form, flags, sizes],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if worker.returncode:
        last = (worker.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{form} for {target} was not compiled: {last}")
    case = {"target": target, "form": form, "options": flags}
    return case | json.loads(worker.stdout.splitlines()[-1])


def main(arguments: list[str]) -> None:
    """Compiles all cases and prints JSON."""
    if arguments[:1] == ["--worker"]:
        target, form, flags, sizes = arguments[1:]
        print(json.dumps(compile_case(target, form, flags, json.loads(sizes))))
        return
    options = parse_options(Options, arguments, "benchmarks/overlap_schedule.py")
    results = []
    for case in CASES:
        if not " ".join(case).startswith(options.only):
            continue
        results.append(run_case(*case, options))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    report = {"sizes": dataclasses.asdict(options), "cases": results}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_main(main)
