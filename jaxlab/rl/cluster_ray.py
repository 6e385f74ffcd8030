"""The same processes on the hosts of a Ray cluster (extra `cluster`).

Ray places and starts them, one actor each, and tells when one has died; what they say
to each other goes over the same encrypted channel as on one host. The run folder must
be on a file system that all hosts share.
"""

import os
from collections.abc import Callable
from typing import Any

from jaxlab.errors import UserError
from jaxlab.rl.config import RLRun
from jaxlab.rl.processes import Engine, Process


class Part:
    """A Ray actor that is one part of the run."""

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def main(self, main: Callable[[Any], None], spec: Any) -> None:
        """Runs the part until it ends."""
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        main(spec)


class Ray(Engine):
    """Starts parts as actors.

    Args:
        run: its `ray_address`; without one, a cluster of this host alone is started.

    Raises:
        UserError: Ray is missing, or the cluster cannot be reached.
    """

    def __init__(self, run: RLRun) -> None:
        super().__init__()
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                "--engine ray needs Ray: pip install 'jaxlab[cluster]'"
            ) from None
        self._ray: Any = ray
        parts = run.envs.hosts + run.rollout.workers + 1
        own: dict[str, Any] = {"num_cpus": parts, "include_dashboard": False}
        if run.ray_address is not None:
            own = {"address": run.ray_address}
        try:
            ray.init(log_to_driver=True, ignore_reinit_error=True, **own)
        except Exception as error:  # of many types; a node that is slow has none
            where = run.ray_address or "this host"
            raise UserError(f"no Ray cluster at {where}: {error}") from error
        if run.ray_address is not None:
            self.address = ray.util.get_node_ip_address()
        self._owned = run.ray_address is None
        # Two threads: it tells its process id while it runs its part.
        self._actor = self._ray.remote(max_restarts=0, max_concurrency=2)(Part)

    def start(self, process: Process) -> Any:
        """An actor with a CPU of its own; the learner takes a GPU if there is one."""
        gpus = self._ray.cluster_resources().get("GPU", 0)
        wanted = 1 if process.name == "learner" and gpus else 0
        actor = self._actor.options(num_cpus=1, num_gpus=wanted).remote()
        return actor, actor.main.remote(process.main, process.spec)

    def code(self, handle: Any) -> int | None:
        """0 if it ended by itself, 1 if its process is gone or it raised."""
        _, done = handle
        ready, _ = self._ray.wait([done], timeout=0)
        if not ready:
            return None
        try:
            self._ray.get(done)
        except Exception as error:  # the actor's own, or that it is gone
            print(f"{type(error).__name__}: {error}", flush=True)
            return 1
        return 0

    def kill(self, handle: Any) -> None:
        """Ends an actor at once."""
        self._ray.kill(handle[0])

    def handle_pid(self, handle: Any) -> int | None:
        """Of the actor's process."""
        return self._ray.get(handle[0].pid.remote(), timeout=30)

    def stop(self, seconds: float) -> None:
        """Ends all actors, and the cluster if this process has started it."""
        super().stop(seconds)
        if self._owned:
            self._ray.shutdown()
