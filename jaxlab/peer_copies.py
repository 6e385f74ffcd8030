"""Snapshots on each host's own disk: what lies where, and copies at a peer.

Processes that see the same folder are a domain: what is in it, they lose together. A
snapshot on local disks has every piece in two domains: where a piece of the state is
held by devices of two domains anyway, both write it; any other is sent, by one
permutation over the devices' own links, to a device of another domain. Before a start
all folders get the files of the newest snapshot that only others have.

`gathered`, `domains`, `bring` and what `permuted` makes are collective: every process
of the job has to call them.
"""

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlab.shards import Range, to_range

CHUNK = 2**26
"""bytes of a file that go round at once"""


class Plan(NamedTuple):
    """What a process writes of a state: leaf, range in it, and place of the shard."""

    own: tuple[tuple[int, Range, int], ...]
    """place among the leaf's addressable shards"""
    copies: tuple[tuple[int, Range, int], ...]
    """place among those of the leaf once it is permuted"""
    moved: tuple[int, ...]
    """leaves that are permuted, the same on every process"""
    alone: int
    """leaves of which a piece lies in one domain only, for want of a peer"""


def gathered(text: str) -> list[str]:
    """The text of each process, on all of them."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(data.size)))
    # Few sizes, as each is compiled for.
    padded = np.zeros(_power_of_two(int(sizes.max())), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        row[:size].tobytes().decode(errors="replace")
        for row, size in zip(rows, sizes.ravel(), strict=True)
    ]


def mark(folder: Path, token: str) -> None:
    """Leaves a mark of this process in its folder; raises OSError if it cannot."""
    (folder / f"{token}-{jax.process_index()}.here").touch()


def domains(folder: Path, token: str) -> tuple[int, ...]:
    """Which folder each process sees: the first process that sees the same one.

    Args:
        folder: of the same name on every host, its own or shared, in which every
            process has left its `mark` before any calls this.
        token: the same on every process, and fresh.
    """
    seen = [
        int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{token}-*.here")
    ]
    told = tuple(int(text) for text in gathered(str(min(seen))))
    (folder / f"{token}-{jax.process_index()}.here").unlink()
    return told


def neighbours(owners: Sequence[int]) -> list[tuple[int, int]] | None:
    """A permutation that takes every device's data to another domain.

    Args:
        owners: domain of each device.

    Returns:
        pairs of positions, from and to; None where a domain has more than half of
        the devices.
    """
    order = sorted(range(len(owners)), key=lambda i: (owners[i], i))
    by = max(Counter(owners).values())
    if 2 * by > len(order):
        return None
    return [(i, order[(at + by) % len(order)]) for at, i in enumerate(order)]


def plan(flat: Sequence[jax.Array], process: int, domain: Sequence[int]) -> Plan:
    """What a process has to write: each range of each leaf once, or in two domains.

    Where several processes hold a range, it goes to the one with the fewest bytes so
    far; all processes find the same, by the shardings alone.

    Args:
        flat: the leaves.
        process: which one.
        domain: of each process; one for all of them: no copies.
    """
    load = Counter[int]()
    copied = len(set(domain)) > 1
    mesh, to = _mesh_of(flat), {}
    if copied and mesh is not None:
        devices = list(mesh.devices.flat)
        pairs = neighbours([domain[d.process_index] for d in devices])
        to = {devices[i]: devices[j] for i, j in pairs or ()}
    own, copies, moved, alone = [], [], set(), set()

    def take(processes: Iterable[int], size: int) -> int:
        writer = min(processes, key=lambda p: (load[p], p))
        load[writer] += size
        return writer

    for leaf, x in enumerate(flat):
        places = {shard.device: at for at, shard in enumerate(x.addressable_shards)}
        here = getattr(x.sharding, "mesh", None) == mesh
        for cut, holders in _holders(x).items():
            size = math.prod(b - a for a, b in cut) * x.dtype.itemsize
            first = take(holders, size)
            writers = [first]
            if copied:
                apart = [p for p in holders if domain[p] != domain[first]]
                peer = to.get(holders[first]) if here else None
                if apart:
                    writers.append(take(apart, size))
                elif peer is None:
                    alone.add(leaf)
                else:
                    moved.add(leaf)
                    if take([peer.process_index], size) == process:
                        copies.append((leaf, cut, places[peer]))
            own += [(leaf, cut, places[holders[p]]) for p in writers if p == process]
    return Plan(tuple(own), tuple(copies), tuple(sorted(moved)), len(alone))


def _holders(x: jax.Array) -> dict[Range, dict[int, Any]]:
    """The processes that hold each range of an array, and the device of each."""
    found: dict[Range, dict[int, Any]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        cut = to_range(index, x.shape)
        found.setdefault(cut, {}).setdefault(device.process_index, device)
    return dict(sorted(found.items()))


def _mesh_of(flat: Sequence[Any]) -> Any:
    """The mesh that the leaves are on; None if they are on none."""
    for x in flat:
        if isinstance(x.sharding, jax.sharding.NamedSharding):
            return x.sharding.mesh
    return None


def permuted(flat: Sequence[Any], domain: Sequence[int]) -> Callable[..., list[Any]]:
    """A compiled function: each device's shards of these leaves at its neighbour.

    What it returns has the shardings of what it is given, but as global arrays they
    mean nothing: see `Plan.copies`.
    """
    mesh = flat[0].sharding.mesh
    pairs = neighbours([domain[d.process_index] for d in mesh.devices.flat])
    specs = [x.sharding.spec for x in flat]

    def shift(*shards: jax.Array) -> list[jax.Array]:
        return [jax.lax.ppermute(x, mesh.axis_names, pairs) for x in shards]

    return jax.jit(
        jax.shard_map(
            shift, mesh=mesh, in_specs=tuple(specs), out_specs=specs, check_vma=False
        )
    )


def bring(folder: Path, names: Sequence[str], domain: Sequence[int]) -> None:
    """Every folder gets the files that only others have.

    A file that cannot be read or written is left out; who reads the snapshot finds
    what is missing or damaged.

    Args:
        folder: of this process.
        names: of files in it, the same on every process.
        domain: of each process.
    """
    me = jax.process_index()
    mine = [_size(folder / name) for name in names]
    told = [json.loads(text) for text in gathered(json.dumps(mine))]
    for at, name in enumerate(names):
        sizes = [row[at] for row in told]
        if min(sizes) < 0 <= max(sizes):
            receives = mine[at] < 0 and me == domain[me]
            _broadcast(folder / name, max(sizes), sizes.index(max(sizes)), receives)
    multihost_utils.sync_global_devices("snapshots are brought")


def _broadcast(path: Path, size: int, source: int, receives: bool) -> None:
    """A file of one process to all that receive it.

    Whatever a disk does, every process has to take part to the end: what could not be
    read is sent as zeros, which the sums of the shards show.
    """
    part, sends = path.with_suffix(".part"), jax.process_index() == source
    chunk = min(CHUNK, _power_of_two(size))
    with contextlib.ExitStack() as stack:
        read = written = None
        with contextlib.suppress(OSError):
            if sends:
                read = stack.enter_context(open(path, "rb"))
            if receives:
                written = stack.enter_context(open(part, "wb"))
        for offset in range(0, size, chunk):
            block = np.zeros(chunk, np.uint8)
            if read is not None:
                with contextlib.suppress(OSError):
                    data = np.frombuffer(read.read(chunk), np.uint8)
                    block[: data.size] = data
            block = np.asarray(multihost_utils.broadcast_one_to_all(block, sends))
            if written is not None:
                try:
                    written.write(block[: size - offset].data)
                except OSError:  # a full disk: the file stays a part
                    written = None
    if written is not None:
        os.replace(part, path)


def _size(path: Path) -> int:
    """Bytes of a file; -1 if there is none that can be read."""
    if not os.access(path, os.R_OK):
        return -1
    return path.stat().st_size


def _power_of_two(size: int) -> int:
    return 2 ** max(size - 1, 0).bit_length()
