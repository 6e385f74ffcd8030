"""What a compiler makes of one training step, for chips that are not here.

python scripts/overlap_report.py configs/gpt_1b.py --mesh.tensor 8 --target cuda:h100:8

Config and fields are those of scripts/train.py. The step (forward, backward, optimizer)
is compiled ahead of time for the target, with the collectives of the tensor axis one
after the other with the matmuls (`plain`), and hidden behind them as
`--parallel.overlap` says (ring, where the run has it off). Nothing is run. Windows in
the body of a loop, as of scan over the layers, count once. Needs the extra `peers`.
"""

import collections
import dataclasses
import inspect
import json
import math
import os
import re
import time
from typing import Any, NamedTuple

from jaxlab import config
from jaxlab.cli import parse_options, run_main
from jaxlab.errors import ConfigError, UserError

PROG = "scripts/overlap_report.py"
# Nothing is run, so the plugins need not look for devices, lock them or miss them.
QUIET = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# TPU compilers refuse what does not fit; for GPUs it is left to us to say.
GPU_BYTES = 80 * 2**30


@dataclasses.dataclass(frozen=True)
class Options(config.Run):
    """The schedule of a training step, compiled for chips that are not here."""

    target: str = "tpu:v5e:2x4"
    """tpu:v5e:2x4, tpu:v5p:2x2x2, tpu:v6e:2x4, cuda:h100:8 or the like"""
    json: bool = False
    """print JSON, not a table"""


class Left(NamedTuple):
    """A collective behind which nothing is scheduled, and why."""

    name: str
    """of the compiled program's instruction"""
    kind: str
    synchronous: bool
    where: str
    """functions, file and line"""
    beside_product: bool
    """whether there is a product that it could have hidden behind"""
    reason: str


def parse(arguments: list[str]) -> Options:
    """Config file and edits of its fields, as scripts/train.py takes them.

    Raises:
        ConfigError: bad usage, in one line.
    """
    base, edits = config.Run(), list(arguments)
    if edits and not edits[0].startswith("-"):
        base = config.load(edits.pop(0))
    elif not set(edits) & {"-h", "--help"}:
        raise ConfigError(f"usage: {PROG} CONFIG [--target TARGET] [--field value ...]")
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    return parse_options(Options, edits, f"{PROG} CONFIG", default=Options(**fields))


def open_mesh(target: str, shape: config.MeshShape) -> Any:
    """The mesh over all devices of a target, -1 filled in.

    Raises:
        ConfigError: no such target, or a mesh that is not of its size.
        UserError: the compiler is not installed, or refuses the target.
    """
    from jaxlab import overlap

    count = math.prod(int(n) for n in re.findall(r"\d+", target.split(":")[-1]))
    try:
        overlap.target_mesh(target, {"devices": count})
        shape = config.resolve_mesh(shape, count)
        return overlap.target_mesh(target, dataclasses.asdict(shape))
    except ValueError as error:
        raise ConfigError(f"--target: {error}") from error
    except RuntimeError as error:
        raise UserError(str(error)) from error


def vocabulary(run: config.Run) -> int:
    """Size of the run's tokenizer, of which one yet to be trained is not made.

    Raises:
        UserError: no such tokenizer.
    """
    from jaxlab import tokens

    name = run.data.tokenizer
    if to_train := re.fullmatch(r"bpe:(\d+)", name):
        return int(to_train[1])
    known = name == "bytes"
    found = tokens.byte_tokenizer() if known else tokens.load_tokenizer(name)
    return found.vocab_size


def abstract_batch(made: Any) -> Any:
    """Shapes and shardings of the batch of one step."""
    import jax
    import numpy as np

    from jaxlab.data import Batch
    from jaxlab.mesh import batch_sharding

    run = made.run
    shape = run.accumulate, run.batch // run.accumulate, run.length
    sharding = batch_sharding(made.mesh)
    numbers, weights = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for dtype in (np.int32, np.float32)
    )
    segments: Any = numbers if run.data.isolate_documents else None
    fields: Any = numbers, numbers, weights, segments
    return Batch(*fields)


def compile_step(run: config.Run, how: str, mesh: Any, target: str) -> dict[str, Any]:
    """Compiles the step of a run with `parallel.overlap` = how, and reads its schedule.

    Raises:
        ConfigError: the run and the mesh do not go together.
        UserError: the compiler refuses, as where the memory does not suffice.
    """
    import jax

    from jaxlab import overlap, program

    parallel: Any = config.Parallel(how)  # pyright: ignore[reportArgumentType]
    run = dataclasses.replace(run, parallel=parallel)
    made = program.build(run, vocabulary(run), mesh=mesh)
    config.validate(made.run, config.MeshShape(**mesh.shape))
    avals = made.abstract, abstract_batch(made)
    start = time.monotonic()
    with jax.set_mesh(mesh):
        try:
            # The step has the options with which the trainer compiles it.
            compiled = overlap.aot_compile(made.step, avals, target, options={})
        except jax.errors.JaxRuntimeError as error:
            lines = str(error).splitlines()
            mend = "; raise --accumulate" if "RESOURCE_EXHAUSTED" in lines[0] else ""
            raise UserError(f"{how} for {target}: {lines[0]}{mend}") from error
        seconds = time.monotonic() - start
        sites = overlap.explain(
            inspect.unwrap(made.step),  # no jit with compiler options inside another
            *avals,
            policy=overlap.Policy(mode="plain"),
            log=lambda text: None,
        ).sites
        forward = made.overlap_report() if made.overlap_report else None
    report, memory = overlap.schedule_report(compiled), compiled.memory_analysis()
    left = left_over(report, compiled.as_text(), sites)
    return {
        "asynchronous": report.n_async,
        "covered": report.n_covered,
        "synchronous": dict(collections.Counter(k for _, k in report.synchronous)),
        "products": report.n_dots,
        "product_cycles": report.dot_cycles,
        "cycles": report.cycles,
        "temporary_bytes": report.temporary_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "compile_seconds": round(seconds, 1),
        "exposed": sum(x.beside_product for x in left),
        "left": [x._asdict() for x in left],
        "sites": None if forward is None else len(forward.sites),
        "sites_overlapped": None if forward is None else len(forward.rewritten),
        "explain": None if forward is None else str(forward),
    }


def left_over(report: Any, text: str, sites: Any) -> list[Left]:
    """The collectives with no product beside them, with the reasons.

    Args:
        report: of `schedule_report`.
        text: the compiled program.
        sites: `explain`'s of the whole step, backward too.
    """
    frames, made = stacks(text), instructions(text)
    open_windows = {w.name: w.kind for w in report.windows if not w.dots}
    found = []
    for name, kind in [*open_windows.items(), *report.synchronous]:
        line = made.get(name, "")
        frame = re.search(r"stack_frame_id=(\d+)", line)
        stack = frames.get(int(frame[1]), []) if frame else []
        shape = re.match(r"\(*(\w+\[[\d,]*\])", line)
        where = shape[1] if shape else ""
        beside = kind == "collective-permute"
        if beside:
            reasons = ["a step of a ring that nothing is scheduled beside"]
        elif stack:
            at = [
                s
                for s in sites
                if f"/{stack[0][1]}:" in f"/{s.where}" and s.what.startswith(kind)
            ]
            beside = any(s.form != "alone" for s in at)
            primitive = re.search(r'op_name="[^"]*?(\w+)"', line)
            plain = "it has a product beside it, and is left plain"
            reasons = [plain if s.form == "plain" else s.reason for s in at]
            if primitive and not at:
                reasons = [f"no ring does a {primitive[1]}"]
        else:
            reasons = ["several in one, merged by the compiler"]
        if stack:
            where += " " + " <- ".join(f for f, _ in stack[:3]) + f" ({stack[0][1]})"
        else:
            sources = sorted(set(makers(name, made, frames)))
            where += f" from {', '.join(sources) or 'the partitioner'}"
        reason = " or ".join(dict.fromkeys(reasons)) or "no source line"
        synchronous = name not in open_windows
        found.append(Left(name, kind, synchronous, where, beside, reason))
    return found


def instructions(text: str) -> dict[str, str]:
    """What follows the name of each instruction of a compiled program."""
    return dict(re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$", text, re.M))


def makers(name: str, made: dict[str, str], frames: Any) -> list[str]:
    """Functions that compute an instruction's operands, as far back as it has none."""
    found, seen, todo = [], set(), [name]
    while todo:
        here = todo.pop()
        if here in seen or here not in made:
            continue
        seen.add(here)
        frame = re.search(r"stack_frame_id=(\d+)", made[here])
        stack = frames.get(int(frame[1]), []) if frame else []
        if stack:
            found.append(stack[0][0])
        else:
            operands = re.search(r" [\w-]+\((.*?)\)", made[here])
            todo += re.findall(r"%([\w.-]+)", operands[1]) if operands else []
    return found


def stacks(text: str) -> dict[int, list[tuple[str, str]]]:
    """(function, file:line) of the callers of each stack frame, innermost first."""

    def table(title: str) -> dict[int, str]:
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.M)
        rows = found[1].splitlines() if found else []
        return {int(n): rest for n, _, rest in (row.partition(" ") for row in rows)}

    files, functions = table("FileNames"), table("FunctionNames")

    def place(row: str) -> tuple[str, str]:
        numbers = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", row)}
        file = files[numbers["file_name_id"]].strip('"').rsplit("/", 1)[-1]
        function = functions[numbers["function_name_id"]].strip('"')
        return function.rsplit(">.", 1)[-1], f"{file}:{numbers['line']}"

    places = {n: place(row) for n, row in table("FileLocations").items()}
    parents = {}
    for n, row in table("StackFrames").items():
        numbers = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", row)}
        # XLA prints a parent's number plus one; 1 is none.
        parents[n] = numbers["file_location_id"], numbers["parent_frame_id"] - 1

    def stack(n: int) -> list[tuple[str, str]]:
        found = []
        while n in parents:
            location, n = parents[n]
            found.append(places[location])
        return found

    return {n: stack(n) for n in parents}


ROWS = {
    "asynchronous": "asynchronous collectives",
    "covered": "  with a product in between",
    "synchronous": "synchronous collectives",
    "exposed": "beside a product, not hidden",
    "products": "products",
    "product_cycles": "estimated cycles of products",
    "cycles": "  of all but communication",
    "temporary_bytes": "temporary memory, MiB",
    "argument_bytes": "arguments, MiB",
    "compile_seconds": "compiled in, s",
}


def table(forms: dict[str, dict[str, Any]]) -> list[str]:
    """Lines with a column for each form."""

    def show(key: str, value: Any) -> str:
        if value is None:
            return "-"
        if key.endswith("_bytes"):
            return f"{value / 2**20:,.1f}"
        return f"{value:,}"

    shown = {
        title: [form[key] for form in forms.values()] for key, title in ROWS.items()
    }
    lines = [f"{'':32}" + "".join(f"{name:>16}" for name in forms)]
    for key, title in ROWS.items():
        values = shown[title]
        if key == "synchronous":
            lines.append(_row(title, [f"{sum(v.values())}" for v in values]))
            for kind in sorted({kind for v in values for kind in v}):
                counts = [f"{v.get(kind, 0)}" for v in values]
                lines.append(_row(f"  {kind}", counts))
            continue
        lines.append(_row(title, [show(key, value) for value in values]))
    return lines


def _row(title: str, values: list[str]) -> str:
    return f"{title:32}" + "".join(f"{value:>16}" for value in values)


def describe(found: dict[str, Any]) -> str:
    """What `main` found, to read."""
    lines = [
        f"one training step for {found['target']}, mesh {found['mesh']}: "
        f"{found['micro_batches']} x {found['rows']} x {found['length']} tokens",
        *table(found["forms"]),
    ]
    for name, form in found["forms"].items():
        if form["explain"]:
            lines += ["", f"{name}, the model's forward pass: {form['explain']}"]
    for name, form in list(found["forms"].items())[1:]:
        lines += ["", f"{name}, not behind a product:" + (not form["left"]) * " none"]
        for x in map(lambda fields: Left(**fields), form["left"]):
            how = "synchronous" if x.synchronous else "uncovered"
            lines.append(f"  {how} {x.kind} {x.name}: {x.reason}")
            lines.append(f"      {x.where}")
    return "\n".join([*lines, *found["notes"]])


def main(arguments: list[str]) -> None:
    """Compiles the step twice and prints the table."""
    options = parse(arguments)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from jaxlab import program

    target, run = options.target, program.adopt_init(options)
    mesh = open_mesh(target, run.mesh)
    if mesh.shape["tensor"] == 1:
        raise ConfigError(
            "mesh.tensor is 1, so there is nothing to overlap: give --mesh.tensor"
        )
    how = run.parallel.overlap
    how = "ring" if how in ("off", "plain") else how
    forms = {form: compile_step(run, form, mesh, target) for form in ("plain", how)}
    notes = []
    if not forms[how]["sites_overlapped"]:
        notes.append(f"{how} overlaps nothing here; try --parallel.overlap ring")
    peak = max(f["argument_bytes"] + f["temporary_bytes"] for f in forms.values())
    if target.startswith("cuda:h100") and peak > GPU_BYTES:
        notes.append(
            f"{peak / 2**30:.1f} GiB do not fit into a device's 80, and the scheduler "
            "gives up overlap to save memory: raise --accumulate"
        )
    found = {
        "target": target,
        "mesh": " x ".join(f"{k} {v}" for k, v in mesh.shape.items() if v > 1),
        "micro_batches": run.accumulate,
        "rows": run.batch // run.accumulate,
        "length": run.length,
        "forms": forms,
        "notes": notes,
    }
    print(json.dumps(found, indent=1) if options.json else describe(found))


if __name__ == "__main__":
    run_main(main)
