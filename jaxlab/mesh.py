"""Devices, processes and where each array lies.

A mesh has four axes: `replica` (copies that may drift apart), `data` (copies in
step), `fsdp` (shards of state and batch) and `tensor` (shards of heads, MLP and
vocabulary). Arrays name their dimensions ("embed", "mlp", ...), and `RULES` says
which mesh axis a name is cut along; the partitioner does the rest.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlab.config import Distributed, MeshShape, resolve_mesh
from jaxlab.errors import ConfigError, UserError

AXES = ("replica", "data", "fsdp", "tensor")
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Name of a dimension -> mesh axes; names that are not here stay whole."""


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes of an array whose dimensions have these names."""
    return PartitionSpec(*(RULES.get(name) if name else None for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the partitioner to lay out x by its dimensions' names.

    Does nothing outside `jax.set_mesh`, and leaves alone the axes that an
    enclosing `shard_map` handles by hand.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    if not automatic:
        return x

    def keep(axes):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        return tuple(axis for axis in axes if axis in automatic) or None

    spec = PartitionSpec(*map(keep, partition_spec(names)))
    return jax.lax.with_sharding_constraint(x, spec)


def placed(config: Distributed) -> Distributed:
    """What the config leaves open, from the environment.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, as
    `scripts/supervise.py` and other launchers set them.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if config != Distributed() or not all(name in os.environ for name in names):
        return config
    address, processes, index = (os.environ[name] for name in names)
    return Distributed(address, int(processes), int(index))


def start_processes(config: Distributed, shape: MeshShape) -> None:
    """Joins the processes of the job, before anything touches a device.

    The CPU backend is made to show as many devices as the mesh wants.

    With an explicit coordinator that is used; otherwise `jax.distributed` finds
    the job by itself where the environment shows one of several processes
    (SLURM, Open MPI, TPU pods, Kubernetes jobs). A single process does nothing.

    Raises:
        ConfigError: some but not all of coordinator, processes and index are given.
        UserError: the coordinator does not answer.
    """
    use_cpu_devices(shape, config.processes or 1)
    explicit = (config.coordinator, config.processes, config.index)
    if any(x is not None for x in explicit) and any(x is None for x in explicit):
        raise ConfigError("distributed.coordinator, .processes and .index go together")
    try:
        if config.coordinator is not None:
            jax.distributed.initialize(*explicit)
        elif several_processes():
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            "cannot join the job's processes at "
            f"{config.coordinator or 'the detected address'}: {reason}"
        ) from error


def several_processes() -> bool:
    """Whether the environment shows a job of more than one process."""
    if os.environ.get("JAX_NUM_PROCESSES") == "1":
        return False  # the last one of a supervised job, whatever its launcher says
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    several = any(int(os.environ.get(name) or 1) > 1 for name in counts)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    indexed = "JOB_COMPLETION_INDEX" in os.environ  # Kubernetes indexed job
    return several or "," in hosts or indexed


def use_cpu_devices(shape: MeshShape, processes: int = 1) -> None:
    """Lets the CPU backend show as many devices as the mesh asks for.

    Changes nothing for accelerators, nor where XLA_FLAGS sets a number.
    Must come before the first use of a device.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    sizes = (shape.replica, shape.data, shape.fsdp, shape.tensor)
    wanted = int(np.prod([max(size, 1) for size in sizes])) // processes
    if wanted > max(jax.config.jax_num_cpu_devices, 1):  # pyright: ignore
        jax.config.update("jax_num_cpu_devices", wanted)


def make_mesh(
    shape: MeshShape,
    delay: np.ndarray | None = None,
    devices: Sequence[Any] | None = None,
) -> jax.sharding.Mesh:
    """The mesh over all devices of the job.

    Args:
        shape: sizes of its axes.
        delay: seconds [process, process] (`jaxlab.health.ppermute_probe`), the same in
            all of them: the axes' rings avoid slow links. None: JAX's own order.
        devices: other ones.

    Raises:
        ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = resolve_mesh(shape, len(devices))
    sizes = (shape.replica, shape.data, shape.fsdp, shape.tensor)
    if delay is not None:
        from jaxlab.health.plan import plan_mesh

        return plan_mesh(devices, delay, sizes, AXES)
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def link_delays() -> np.ndarray:
    """Seconds [process, process] that the links between the processes take.

    All processes call it together; see `jaxlab.health.ppermute_probe`.
    """
    from jaxlab.health.look import one_device_each
    from jaxlab.health.probe import ppermute_probe

    return ppermute_probe(one_device_each())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of arrays [microbatch, row, time]: rows are cut, the rest is whole."""
    return NamedSharding(mesh, partition_spec((None, "batch", None)))


def local_rows(mesh: jax.sharding.Mesh, rows: int) -> np.ndarray:
    """Row numbers (of `rows` in a micro-batch) that this process's devices hold."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((1, rows, 1))
    held = [np.arange(rows)[index[1]] for index in indices.values() if index]
    return np.unique(np.concatenate(held))


def put_batch(mesh: jax.sharding.Mesh, batch: Any, rows: int, local: np.ndarray) -> Any:
    """Makes global arrays [microbatch, rows, time] of this process's rows.

    Args:
        mesh: the job's mesh.
        batch: pytree of NumPy arrays [microbatch, len(local), time].
        rows: rows of a micro-batch over all processes.
        local: which of them `batch` holds (`local_rows`).
    """
    sharding = batch_sharding(mesh)
    place = {int(row): i for i, row in enumerate(local)}

    def put(x):
        def part(index):
            start, stop, _ = index[1].indices(rows)
            return x[:, place[start] : place[start] + stop - start]

        return jax.make_array_from_callback(
            (x.shape[0], rows, x.shape[2]), sharding, part
        )

    return jax.tree.map(put, batch)
