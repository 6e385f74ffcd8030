"""Starts the processes of a run and keeps them alive until it has ended."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxlab import config, metrics
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import locked_folder, write_text
from jaxlab.rl import wire
from jaxlab.rl.cluster import HostSpec, host_main, make_env
from jaxlab.rl.config import RLRun, validate
from jaxlab.rl.hub import Hub
from jaxlab.rl.processes import DEATHS, Local
from jaxlab.rl.report import Report, rows, strip, table
from jaxlab.rl.service import WorkerSpec, worker_main
from jaxlab.rl.store import Store
from jaxlab.rl.trainer import LearnerSpec, learner_main

Say = Callable[[str], None]


def train(
    run: RLRun, say: Say = print, watch: Callable[[Hub, Any], None] | None = None
) -> None:
    """Trains a policy to `run.steps` updates, or to a signal; resumes by itself.

    Args:
        run: what to do; see `jaxlab.rl.config.RLRun`.
        say: takes the lines for the user.
        watch: called now and then with the hub and the engine, for what looks on.

    Raises:
        UserError: bad configuration or run folder, or a part that cannot run.
    """
    from jaxlab.signals import stop_requests

    validate(run)
    space = probe(run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked_folder(run.out))
        out = Path(run.out)
        write_record(run, out)
        store = Store(out, run.store)
        store.sweep()
        store.close()
        asked = stack.enter_context(stop_requests())
        keys = wire.new_keys()
        hub = Hub(run, stack.enter_context(wire.listen(keys)))
        hub.keeper.thread.start()
        engine = Local()
        add_parts(engine, run, keys._replace(master_secret=""), space)
        loop = Loop(run, hub, engine, say)
        try:
            with loop.shown():
                while not hub.finished and not asked:
                    loop.turn()
                    if watch is not None:
                        watch(hub, engine)
            if asked:
                say(
                    f"stopped by {asked[0]} after update {loop.step}; the same command "
                    "goes on from there"
                )
        finally:
            loop.close()


def probe(run: RLRun) -> Any:
    """The environments' observation space, after each task has been begun once.

    Raises:
        ConfigError: there is no such environment or task.
    """
    import gymnasium

    try:
        env = make_env(run.envs)
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigError(f"envs.id {run.envs.id}: {error}") from error
    try:
        for task in run.envs.tasks:
            env.reset(seed=0, options={"task": task})
    except ValueError as error:
        raise ConfigError(f"envs.tasks: {error}") from error
    finally:
        env.close()
    return env.observation_space


def write_record(run: RLRun, out: Path) -> None:
    """Files from which the run can be repeated."""
    from jaxlab.record import versions

    config.save(run, out / "config.json")
    write_text(out / "versions.json", json.dumps(versions(), indent=1) + "\n")


def add_parts(engine: Any, run: RLRun, keys: wire.Keys, space: Any) -> None:
    """Tells an engine what is to be alive."""
    for index in range(run.envs.hosts):
        name = f"host{index}"
        spool = str(Path(run.out) / "spool" / name)
        engine.add(name, host_main, HostSpec(name, keys, run.envs, spool))
    for index in range(run.rollout.workers):
        name = f"worker{index}"
        engine.add(name, worker_main, WorkerSpec(name, index, keys, run, space))
    engine.add("learner", learner_main, LearnerSpec("learner", keys, run, space))


class Loop:
    """The main process: messages, processes, figures.

    Args:
        run: what is run.
        hub: that has its channel.
        engine: that has its parts.
        say: takes the lines for the user.
    """

    def __init__(self, run: RLRun, hub: Hub, engine: Local, say: Say) -> None:
        self.run, self.hub, self.engine, self.say = run, hub, engine, say
        self.report, self.step = Report(run), 0
        self._writer: Any = None
        self._live: Any = None
        self._polled = self._drawn = 0.0

    def turn(self) -> None:
        """What is to be done for a moment."""
        self.hub.step(0.02)
        now = time.monotonic()
        if now - self._polled > 0.1:
            self._polled = now
            for name in self.engine.poll():
                self._died(name)
        stored, self.hub.stored = self.hub.stored, []
        self.report.stored_trajectories(stored)
        if stored and self._writer is not None:
            self._last_seen = stored[-1]
        news, self.hub.news = self.hub.news, []
        for body in news:
            self._told(body)
        if self._live is not None and now - self._drawn > 0.5:
            self._drawn = now
            self._live.update(table(rows(self.hub, self.report, self.step)))

    def _died(self, name: str) -> None:
        process = self.engine.processes[name]
        if name == "learner" and process.code == 0 and self.hub.finished:
            return
        self.hub.gone(name)
        self.say(f"{name} ended with {process.code}; it is started again")
        if len(process.deaths) >= DEATHS and not name.startswith("host"):
            raise UserError(
                f"{name} has died {DEATHS} times in a minute (last exit code "
                f"{process.code}; its messages are above); what is stored is kept, "
                "and the same command goes on from there"
            )

    def _told(self, body: dict[str, Any]) -> None:
        """News of the learner: it has begun, or made an update."""
        self.step = body["step"]
        if body.get("resumed"):
            if self._writer is not None:
                self._writer.close()
            resumed = body["step"] or None
            self._writer = metrics.open_writer(self.run.out, resumed)
            return
        self.report.trained(body["figures"])
        if self.step % self.run.log_every and self.step != self.run.steps:
            return
        values = {f"rl/{name}": value for name, value in body["metrics"].items()}
        values |= {f"rl/{name}": value for name, value in body["figures"].items()}
        values |= self.report.scalars(self.hub)
        self._writer.scalars(self.step, values)
        if self._live is None:
            self.say(
                f"update {self.step}/{self.run.steps}: success "
                f"{values.get('rl/success', 0):.3f}, reward {values['rl/reward']:.3f}, "
                f"lag {values['rl/lag_mean']:.2f}, "
                f"{values['rl/actions_per_minute']:.0f} actions/min, environments "
                f"{100 * values['rl/env_utilisation']:.0f} % busy"
            )

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """With a live table, on a terminal."""
        if not sys.stdout.isatty():
            yield
            return
        from rich.live import Live

        with Live(refresh_per_second=2) as self._live:
            yield
        self._live = None

    def close(self) -> None:
        """Ends all processes, in order: those that act first."""
        self.hub.stop()
        self.engine.stop(10.0)
        with contextlib.suppress(Exception):
            self.hub.step(0.05)  # what was handed in last
        self.hub.keeper.inbox.put(("stop", None))
        self.hub.keeper.thread.join(20.0)
        if self._writer is not None:
            self._writer.close()
