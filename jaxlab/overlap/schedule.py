"""What the compiler scheduled, proven without the accelerator.

`aot_compile` compiles for TPUs by libtpu and for NVIDIA GPUs by the CUDA PJRT plugin,
on a machine that has neither. `schedule_report` reads the scheduled HLO: which
collectives are asynchronous, and whether a matrix product runs between their start and
done.

That is permission to overlap. Whether the product takes as long as the wire is for a
model of the hardware, or a measurement.
"""

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
_KINDS = "|".join(COLLECTIVES)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_DONE = re.compile(rf" (?:(?:{_KINDS})|async)-done\((.*?)\)")
_DOT = re.compile(r" (?:dot|convolution)\(|custom_call_target=\"__(?:cublas|triton)")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?%?([\w.-]+)")


class Window(NamedTuple):
    """An asynchronous collective, from its start to its done."""

    name: str
    """of the starting instruction"""
    kind: str
    """one of `COLLECTIVES`"""
    dots: tuple[str, ...]
    """instructions with a matrix product that are scheduled in between"""


class Report(NamedTuple):
    """The schedule of one compiled program; printable."""

    windows: tuple[Window, ...]
    """asynchronous collectives, in the order of their starts"""
    synchronous: tuple[tuple[str, str], ...]
    """(name, kind) of the collectives that nothing can overlap"""
    n_dots: int
    """instructions with a matrix product"""
    dot_cycles: int | None
    """XLA's estimate for those; None where the target has none"""
    cycles: int | None
    """XLA's estimate for all instructions, communication left out"""
    temporary_bytes: int | None
    """peak of temporary memory; None for a text"""

    @property
    def n_async(self) -> int:
        """Asynchronous collectives."""
        return len(self.windows)

    @property
    def n_covered(self) -> int:
        """Of those, how many have a product in between."""
        return sum(bool(w.dots) for w in self.windows)

    @property
    def uncovered(self) -> tuple[str, ...]:
        """Names of the asynchronous collectives that hide behind nothing."""
        return tuple(w.name for w in self.windows if not w.dots)

    def __str__(self) -> str:
        lines = [
            f"{self.n_covered} of {self.n_async} asynchronous collectives have a "
            f"product in between; {len(self.synchronous)} are synchronous; "
            f"{self.n_dots} products"
        ]
        if self.cycles is not None and self.dot_cycles is not None:
            lines.append(
                f"estimated cycles: {self.dot_cycles:,} in products, "
                f"{self.cycles:,} in all, communication left out"
            )
        if self.temporary_bytes is not None:
            lines.append(f"temporary memory: {self.temporary_bytes / 2**20:.1f} MiB")
        lines += [f"uncovered: {name}" for name in self.uncovered]
        lines += [f"synchronous: {name} ({kind})" for name, kind in self.synchronous]
        return "\n".join(lines)


def schedule_report(compiled: Any) -> Report:
    """Reads the schedule of a compiled program.

    Args:
        compiled: of `jax.jit(f).lower(...).compile()` or `aot_compile`, or its text.

    Raises:
        ValueError: the module is not scheduled, so that its order says nothing.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    if "is_scheduled=true" not in text:
        raise ValueError(
            "this module is not scheduled: give schedule_report a compiled program, "
            "not a lowered one"
        )
    bodies, entry = _bodies(text)
    windows: list[Window] = []
    synchronous: list[tuple[str, str]] = []
    products: list[int] = []
    cycles: list[int] = []
    for body in _scheduled(bodies, entry):
        pending: dict[str, tuple[str, list[str]]] = {}
        for name, rest in body:
            kind = _started(rest, bodies)
            if kind is not None:
                pending[name] = (kind, [])
                continue
            done = _DONE.search(rest)
            if done is not None:
                opened = re.findall(r"[\w.-]+", done[1])[-1]
                if opened in pending:
                    kind, dots = pending.pop(opened)
                    windows.append(Window(opened, kind, tuple(dots)))
                continue
            plain = re.search(rf" ({_KINDS})\(", rest)
            if plain is not None:
                synchronous.append((name, plain[1]))
            estimate = re.search(r'"estimated_cycles":"(\d+)"', rest)
            cycles += [int(estimate[1])] if estimate else []
            if _multiplies(rest, bodies):
                products.append(int(estimate[1]) if estimate else 0)
                for _, dots in pending.values():
                    dots.append(name)
    memory = None if isinstance(compiled, str) else compiled.memory_analysis()
    return Report(
        tuple(windows),
        tuple(synchronous),
        len(products),
        sum(products) if cycles else None,
        sum(cycles) if cycles else None,
        memory.temp_size_in_bytes if memory is not None else None,
    )


Body = list[tuple[str, str]]


def _bodies(text: str) -> tuple[dict[str, Body], str]:
    """Instructions (name, the rest) of each computation, and the entry's name."""
    bodies: dict[str, Body] = {}
    entry, body = "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line)
        if head:
            body = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            body.append((found[1], found[2]))
    return bodies, entry


def _scheduled(bodies: dict[str, Body], entry: str) -> list[Body]:
    """The entry and the bodies of its loops and branches: those have an order."""
    seen, todo = [], [entry]
    while todo:
        name = todo.pop(0)
        if name in seen or name not in bodies:
            continue
        seen.append(name)
        for _, rest in bodies[name]:
            if re.search(r" (?:while|conditional|call)\(", rest):
                called = re.findall(
                    r"(?:body|to_apply|true_computation|false_computation)=%?([\w.-]+)",
                    rest,
                )
                several = re.search(r"branch_computations=\{([^}]*)\}", rest)
                if several:
                    called += [n.strip(" %") for n in several[1].split(",")]
                todo += called
    return [bodies[name] for name in seen]


def _started(rest: str, bodies: dict[str, Body]) -> str | None:
    """The kind of collective that this instruction starts, if it does."""
    plain = re.search(rf" ({_KINDS})-start\(", rest)
    if plain:
        return plain[1]
    if " async-start(" in rest:  # a collective wrapped in a computation
        for name in _CALLED.findall(rest):
            for _, inner in bodies.get(name, []):
                kind = re.search(rf" ({_KINDS})\(", inner)
                if kind:
                    return kind[1]
    return None


def _multiplies(rest: str, bodies: dict[str, Body]) -> bool:
    """Whether an instruction is a matrix product, or a fusion that holds one."""
    if _DOT.search(rest):
        return True
    if " fusion(" not in rest and " custom-call(" not in rest:
        return False
    return any(
        _multiplies(inner, bodies)
        for name in _CALLED.findall(rest)
        for _, inner in bodies.get(name, [])
    )


# --------------------------------------------------------- compiling ahead of time

# NVIDIA H100 SXM5 80 GB, from NVIDIA's data sheet and the limits of compute capability
# 9.0 in the CUDA programming guide.
_H100 = {
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "memory_bandwidth": 3_352_320_000_000,
    "device_memory_size": 80 * 2**30,
    "l2_cache_size": 50 * 2**20,
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "shared_memory_per_block": 48 * 2**10,
    "shared_memory_per_block_optin": 227 * 2**10,
    "shared_memory_per_core": 228 * 2**10,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "device_address_bits": 64,
}


def target_mesh(target: str, axes: dict[str, int]) -> Mesh:
    """A mesh of devices that are not here, to give shapes their shardings.

    Args:
        target: "tpu:v5e:2x4" (topology as libtpu names it; needs libtpu) or
            "cuda:h100:8" (devices joined by NVLink; needs the CUDA PJRT plugin).
        axes: name to size; they multiply to the number of devices.

    Raises:
        ValueError: no such target, or the axes do not multiply to its devices.
        RuntimeError: the compiler is not installed; the message names the extra.
    """
    devices = _devices(target)
    if int(np.prod(list(axes.values()))) != len(devices):
        raise ValueError(f"axes {axes} do not multiply to {len(devices)} of {target}")
    grid = np.array(devices).reshape(tuple(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


def _devices(target: str) -> Any:
    from jax.experimental import topologies

    platform, _, rest = target.partition(":")
    kind, _, shape = rest.partition(":")
    if platform == "tpu" and shape:
        options: dict[str, Any] = {"topology_name": rest}
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
    elif platform == "cuda" and kind == "h100" and shape.isdigit():
        options = {
            "topology_name": kind,
            "topology": f"1x1x{shape}",
            "target_config": _gpu_description(_H100),
        }
    else:
        raise ValueError(
            f"no target {target!r}: choose tpu:<kind>:<topology> such as tpu:v5e:2x4, "
            "or cuda:h100:<devices>"
        )
    try:
        found = topologies.get_topology_desc(platform=platform, **options)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"cannot compile for {target}: {reason} (the extra jaxlab[peers] has "
            "libtpu and the CUDA plugin)"
        ) from error
    return found.devices


def _gpu_description(facts: dict[str, Any]) -> str:
    """XLA's GpuTargetConfig in protobuf text form."""
    rows = "".join(f"  {name}: {value}\n" for name, value in facts.items())
    return (
        f"gpu_device_info {{\n{rows}"
        "  cuda_compute_capability {\n    major: 9\n"
        "    feature_extension: ACCELERATED_FEATURES\n  }\n"
        '  device_vendor: "NVIDIA Corporation"\n'
        '  name: "NVIDIA H100 80GB HBM3"\n'
        '  driver_version: "13.0.0"\n  runtime_version: "12.8.0"\n'
        '  compile_time_toolkit_version: "12.8.0"\n  dnn_version: "9.10.0"\n'
        "  device_interconnect_info { active_links: 18 }\n}\n"
        'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }\n'
        'device_description_str: "NVIDIA H100 80GB HBM3"\n'
    )


def compiler_options(target: str) -> dict[str, Any]:
    """Options with which a ring stays a ring on this target.

    On GPU the pass that merges products sharing an operand would undo it, and the
    scheduler that hides latency is off by default. The gradient of a gather passes
    round its sum and its input at once, of which one alone is allowed by default.
    """
    if target.startswith("cuda"):
        return {
            "xla_disable_hlo_passes": "dot-merger",
            "xla_gpu_enable_latency_hiding_scheduler": True,
            "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
        }
    return {}


def aot_compile(
    fn: Callable[..., Any],
    avals: tuple[Any, ...],
    target: str,
    *,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compiles for a machine that is not here.

    Args:
        fn: to be jitted, or jitted.
        avals: `jax.ShapeDtypeStruct`s with shardings over `target_mesh(target, ...)`.
        target: see `target_mesh`.
        options: of the compiler; None: `compiler_options(target)`. On a GPU target
            autotuning is off besides, since it would need the device.

    Returns:
        the compiled program, for `schedule_report`; it cannot run here.
    """
    options = dict(compiler_options(target) if options is None else options)
    if target.startswith("cuda"):
        options.setdefault("xla_gpu_autotune_level", 0)
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    return jitted.lower(*avals).compile(compiler_options=options or None)
