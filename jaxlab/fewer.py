"""What a run does with fewer processes than it began with: the same, more slowly."""

import contextlib
import dataclasses
import math

from jaxlab import config
from jaxlab.errors import ConfigError


def meshes(run: config.Run, processes: int) -> dict[int, config.MeshShape]:
    """The resolved mesh of each number of processes that the run can go on with.

    Args:
        run: as written.
        processes: at most. Each has one device, or as many as a mesh without a -1
            leaves it, as on CPU.

    Raises:
        ConfigError: it cannot start with so many.
    """
    sizes = dataclasses.astuple(run.mesh)
    wanted = math.prod(sizes) if min(sizes) > 0 else 0

    def resolved(count: int) -> config.MeshShape:
        several = wanted and wanted % count == 0
        mesh = config.resolve_mesh(run.mesh, wanted if several else count)
        config.check_rows(run, mesh)
        return mesh

    found = {processes: resolved(processes)}
    for count in range(1, processes):
        with contextlib.suppress(ConfigError):
            found[count] = resolved(count)
    return dict(sorted(found.items()))


def same_batch(
    run: config.Run, before: config.MeshShape, now: config.MeshShape
) -> list[str]:
    """Options with which a smaller mesh does the same batch in the same memory.

    The batch is over all devices, so with fewer of them each has more rows. As many
    micro-batches as it takes keep them at what they were.

    Args:
        run: as it was on the first mesh.
        before: the resolved mesh that it was made for.
        now: the resolved mesh that is left; see `check_rows`.

    Returns:
        words of a command line; none where nothing has to change.
    """
    first, shards = (m.replica * m.data * m.fsdp for m in (before, now))
    rows = run.batch // run.accumulate // first
    for accumulate in range(run.accumulate, run.batch + 1, run.accumulate):
        left = run.batch // accumulate
        if run.batch % accumulate or left % shards or left // shards > rows:
            continue
        if accumulate == run.accumulate:
            return []
        words = ["--accumulate", str(accumulate)]
        batches = run.evaluate.batches * (accumulate // run.accumulate)
        return words + ["--evaluate.batches", str(batches)] * bool(batches)
    return []
