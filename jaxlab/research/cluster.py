"""Runs on a Ray cluster whose machines see the workspace under the same path.

Each run is a detached actor named after it, so it outlives the driver and a resumed
one finds it by name. The actor starts the same worker as on this machine.
"""

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError
from jaxlab.research import plans, worker


class Ray:
    """An `experiments.Executor`; needs the extra `cluster`."""

    def __init__(self, options: dict[str, Any]) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError:
            raise UserError(
                'executor "ray" needs the extra: pip install "jaxlab[cluster]"'
            ) from None
        ray = self._ray
        self._needs = {
            "num_cpus": float(options.get("run_cpus", 1)),
            "num_gpus": float(options.get("run_gpus", 0)),
        }
        if not ray.is_initialized():
            ray.init(
                address=options.get("ray_address"),
                namespace="jaxlab.research",
                include_dashboard=False,
                log_to_driver=False,
            )

    def start(self, folder: Path) -> None:
        """See `experiments.Executor`."""
        actor = self._ray.remote(_Run).options(
            name=folder.name, lifetime="detached", max_concurrency=2, **self._needs
        )
        command = [sys.executable, "-I", "-S", worker.__file__, str(folder)]
        actor.remote().run.remote(command, plans.environment())

    def running(self, folder: Path) -> bool:
        """See `experiments.Executor`."""
        with contextlib.suppress(ValueError):
            self._ray.get_actor(folder.name)
            return not (folder / "result.json").exists()
        return False

    def end(self, folder: Path) -> None:
        """See `experiments.Executor`."""
        with contextlib.suppress(ValueError, self._ray.exceptions.RayError):
            actor = self._ray.get_actor(folder.name)
            self._ray.get(actor.end.remote(), timeout=worker.GRACE + 5)


class _Run:
    """The actor: one worker process, and then nothing more."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def run(self, command: list[str], env: dict[str, str]) -> None:
        """Runs the worker to its end, and ends the actor."""
        self._process = subprocess.Popen(command, env=env, start_new_session=True)
        self._process.wait()
        ray: Any = importlib.import_module("ray")
        ray.actor.exit_actor()

    def end(self) -> None:
        """Ends the worker, which ends its trainer."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, 15)
            self._process.wait(worker.GRACE + 2)
