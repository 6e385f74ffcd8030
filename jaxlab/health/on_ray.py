"""Agents that a Ray cluster hosts; needs the extra `cluster`.

Each agent is a task of its own, that Ray places where there is room, on different nodes
as far as it can. Ray starts it and nothing else: the supervisor's channel, its restarts
and its limits are as ever, and Ray retries nothing.
"""

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError
from jaxlab.health.channel import Keys

END = 15.0
"""seconds for the agents to end by themselves"""


@contextlib.contextmanager
def agents(
    keys: Keys,
    hosts: Mapping[str, int],
    folder: Path,
    *,
    address: str = "auto",
    gpus: float = 0.0,
    patience: float = 30.0,
) -> Iterator[Callable[[str], None]]:
    """A function that starts the agent of a host, or starts it again.

    The agents' keys travel as an argument of the task: who may use the cluster can read
    them. jaxlab and `folder` must be at the same paths on all nodes.

    Args:
        keys: the agents'.
        hosts: name to number of processes, for each of which one CPU is asked for.
        folder: for the workers' output.
        address: of the cluster; "auto": the one that runs here; "local": a new one on
            this machine, for the time of the block.
        gpus: of each process.
        patience: see `agent.run_agent`.

    Raises:
        UserError: the extra is not installed, or there is no cluster.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "--ray needs the extra cluster: pip install 'jaxlab[cluster]'"
        ) from None
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    alone: dict[str, Any] = {}
    if address == "local":
        alone = {"include_dashboard": False, "num_cpus": sum(hosts.values())}
    try:
        _reach(address)
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": variables},
            **alone,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"there is no Ray cluster at {address} ({_first(error)}); start one by "
            "`ray start --head`, or use --ray-address local"
        ) from error
    started: dict[str, Any] = {}

    def start(host: str) -> None:
        if host in started:
            with contextlib.suppress(Exception):  # it may have ended by itself
                ray.cancel(started[host], force=True)
        task = ray.remote(_serve).options(
            name=f"jaxlab agent {host}",
            num_cpus=hosts[host],
            num_gpus=gpus * hosts[host],
            max_retries=0,
            scheduling_strategy="SPREAD",
        )
        work = keys._asdict(), host, hosts[host], str(folder), patience
        started[host] = task.remote(*work)

    try:
        yield start
    finally:
        left = [*started.values()]
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=END)
        for task in left:
            ray.cancel(task, force=True)
        ray.shutdown()


def _serve(
    keys: Mapping[str, str], host: str, slots: int, folder: str, patience: float
) -> None:
    """The task: an agent on the node where it runs."""
    import ray.util  # pyright: ignore[reportMissingImports]

    from jaxlab.health.agent import run_agent

    address = ray.util.get_node_ip_address()
    print(f"agent {host} at {address}", file=sys.stderr)
    run_agent(
        Keys(**keys), host, slots, Path(folder), address=address, patience=patience
    )


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray would try for ten minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
