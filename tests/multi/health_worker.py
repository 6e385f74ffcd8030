"""A small data-parallel job for the supervisor's tests.

python health_worker.py FOLDER STEPS

Each rank logs its step to FOLDER/steps; a file FOLDER/stuck-R holds rank R's host up.
"""

import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.config import Distributed, MeshShape
from jaxlab.health.worker import monitor
from jaxlab.mesh import placed, start_processes


def main(folder: Path, steps: int) -> None:
    with monitor() as health:
        heartbeat, job = os.environ.get("HEARTBEAT"), placed(Distributed())
        if heartbeat:  # as a job without a supervisor would choose it
            where = job.coordinator, job.processes, job.index
            seconds = int(heartbeat)
            jax.distributed.initialize(*where, heartbeat_timeout_seconds=seconds)
        else:
            start_processes(job, MeshShape())
        rank, n = jax.process_index(), jax.process_count()
        mesh = jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,))
        spread = NamedSharding(mesh, P("data"))

        def local(w, x):
            for _ in range(4):
                x = jnp.tanh(x @ w)
            mean = jax.lax.pmean(x.mean(), "data")
            return w * 0.999, mean

        step_fn = health.wrap(
            jax.jit(
                jax.shard_map(
                    local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P())
                )
            )
        )
        w = jnp.eye(128)
        x = jax.make_array_from_callback(
            (32 * n, 128), spread, lambda index: np.ones((32 * n, 128))[index]
        )
        last = None
        for step in range(1, steps + 1):
            health.step(step)
            if (folder / f"stuck-{rank}").exists():
                time.sleep(3600)
            w, mean = step_fn(w, x)
            if last is not None:
                last.block_until_ready()
            last = mean
            time.sleep(0.01)
            if rank == 0:
                generation = os.environ.get("JAX_NUM_PROCESSES", "1")
                with open(folder / "steps", "a") as file:
                    file.write(f"{generation} {step}\n")
        jax.block_until_ready(last)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
