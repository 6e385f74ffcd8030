"""Does a mesh that is planned around a slow link make an all-reduce faster?

    python benchmarks/health_plan.py > plan.json      # 3 minutes, as root
    python benchmarks/health_plan.py --quick

Linux only. Processes of one `jax.distributed` job on CPU (gloo), each in a network
namespace, with a link of its own between each two (common/hosts.py). In each case the
delays are measured (`ppermute_probe`) and read (`classify_matrix`), and `plan_order`
makes an order from them. Then a psum is timed on three meshes of the same devices: in
the default order, in the planned one, and in the worst that there is by the measured
delays. Rounds are interleaved; [median, least, most] of the slowest process's seconds.

Cases: all links alike; one link slow both ways; one host whose links are all slow,
which no order avoids.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import platform
import socket
import sys
import tempfile
import time
from typing import Any

import numpy as np
from common.hosts import Hosts, full_mesh
from common.namespaces import START_SECONDS, Job, address, stop_on_signals, summary

from jaxlab.cli import parse_options, run_main


@dataclasses.dataclass(frozen=True)
class Options:
    """Time of an all-reduce over planned and other orders, as JSON."""

    processes: int = 4
    """hosts, one process each"""
    rate: int = 400
    """Mbit/s of a link"""
    slow_rate: int = 40
    """Mbit/s of a slow one"""
    mebibytes: int = 2
    """size of the all-reduce"""
    rounds: int = 12
    """interleaved rounds"""
    quick: bool = False
    """two rounds"""


def work(index: int, processes: int) -> None:
    """One process of the job: answers each line of stdin with a line of JSON."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    socket.sethostname(address(index))  # gloo listens where it leads
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(
        f"{address(0)}:7700",
        processes,
        index,
        initialization_timeout=START_SECONDS,
        cluster_detection_method="deactivate",
        local_device_ids=[0],
    )
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxlab.health.look import one_device_each
    from jaxlab.health.probe import ppermute_probe

    devices = one_device_each().devices

    @functools.cache
    def program(order: tuple[int, ...], mebibytes: int):
        mesh = Mesh(devices[list(order)], ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, P("data"))
        local = np.ones((1, mebibytes * 2**18), np.float32)
        x = jax.make_array_from_process_local_data(sharding, local)
        total = jax.jit(
            jax.shard_map(
                lambda x: jax.lax.psum(x, "data"),
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P(),
            )
        )
        return total, x

    def answer(what: str, at: float = 0.0, **order: Any) -> dict[str, Any]:
        if what == "probe":
            return {"delay": ppermute_probe(one_device_each()).tolist()}
        total, x = program(tuple(order["order"]), order["mebibytes"])
        time.sleep(max(0.0, at - time.monotonic()))
        y = jax.block_until_ready(total(x))
        seconds = time.monotonic() - at
        return {"seconds": seconds, "right": bool((np.asarray(y) == processes).all())}

    print(json.dumps({"jax": jax.__version__}), file=replies)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies)
    os._exit(0)  # the others may be gone, and a farewell would wait for them


def measure_case(
    job: Job, hosts: Hosts, slow: list[tuple[int, int]], options: Options
) -> dict[str, Any]:
    """One state of the network: what was found, planned, and gained."""
    from jaxlab.health.matrix import classify_matrix
    from jaxlab.health.plan import plan_order, ring_cost

    for link in slow:
        hosts.slow(link, options.slow_rate)
    delay = np.array(job.ask(what="probe")[0]["delay"])
    planned = tuple(plan_order(delay))
    # The ring is what counts: it may begin anywhere.
    orders = [(0, *rest) for rest in itertools.permutations(range(1, len(delay)))]
    worst = max(orders, key=lambda order: tuple(ring_cost(delay, order)))
    arms = {"default": tuple(range(len(delay))), "planned": planned, "worst": worst}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-1, 2 if options.quick else options.rounds):
        for name, order in arms.items():
            start = time.monotonic() + 0.05
            told = dict(order=order, mebibytes=options.mebibytes, at=start)
            ran = job.ask(what="psum", **told)
            assert all(answer["right"] for answer in ran)
            if turn >= 0:  # the first one compiles
                seconds[name].append(max(answer["seconds"] for answer in ran))
    for link in slow:
        hosts.restore(link)
    found = classify_matrix(delay)
    return {
        "slow": slow,
        "delay_ms": np.round(delay * 1e3, 3).tolist(),
        "diagnosis": str(found),
        "orders": arms,
        "ring_ms": {k: round(1e3 * ring_cost(delay, o)[0], 3) for k, o in arms.items()},
        "seconds": {name: summary(values) for name, values in seconds.items()},
    }


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if arguments[:1] == ["--process"]:
        work(*map(int, arguments[1:]))
        return
    options = parse_options(Options, arguments, "benchmarks/health_plan.py")
    stop_on_signals()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(tempfile.TemporaryFile())
        hosts = stack.enter_context(full_mesh(options.processes, options.rate))
        job = Job(list(hosts.names), __file__, log)
        stack.callback(job.close)
        versions = job.answers(START_SECONDS)[0]
        node = [link for link in hosts.links() if 2 in link]
        cases = {"healthy": [], "slow link": [(1, 2), (2, 1)], "slow host": node}
        found = {k: measure_case(job, hosts, v, options) for k, v in cases.items()}
    report = {
        "benchmark": "health_plan",
        "options": dataclasses.asdict(options),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        **versions,
        "cases": found,
    }
    print(json.dumps(report, indent=1, default=list))


if __name__ == "__main__":
    run_main(main)
