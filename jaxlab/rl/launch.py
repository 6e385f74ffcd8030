"""Starts the processes of a run and keeps them alive until it has ended."""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlab import config, metrics
from jaxlab.errors import ConfigError, UserError
from jaxlab.files import locked_folder, write_text
from jaxlab.rl import upkeep, wire
from jaxlab.rl.cluster import HostSpec, host_main, make_env
from jaxlab.rl.config import RLRun, complete, validate
from jaxlab.rl.hub import Hub
from jaxlab.rl.page import serve
from jaxlab.rl.processes import DEATHS, USER_ERROR, Engine, Local
from jaxlab.rl.report import Report, describe, rows, strip, table
from jaxlab.rl.service import WorkerSpec, worker_main
from jaxlab.rl.store import Store
from jaxlab.rl.trainer import LearnerSpec, learner_main
from jaxlab.rl.trajectory import Trajectory

Say = Callable[[str], None]
PICTURES = 30.0
"""seconds between pictures of an episode in TensorBoard"""


class Mains(NamedTuple):
    """What the processes of a run do."""

    host: Callable[[HostSpec], None] = host_main
    worker: Callable[[WorkerSpec], None] = worker_main
    learner: Callable[[LearnerSpec], None] = learner_main


MAINS = Mains()
print_line = functools.partial(print, flush=True)


def train(
    run: RLRun,
    say: Say = print_line,
    watch: Callable[[Hub, Any], None] | None = None,
    mains: Mains = MAINS,
) -> None:
    """Trains a policy to `run.steps` updates, or to a signal; resumes by itself.

    Args:
        run: what to do; see `jaxlab.rl.config.RLRun`.
        say: takes the lines for the user.
        watch: called now and then with the hub and the engine, for what looks on.
        mains: of the processes; others are for measuring.

    Raises:
        UserError: bad configuration or run folder, or a part that cannot run.
    """
    from jaxlab.signals import stop_requests

    run = complete(run)
    validate(run)
    space = probe(run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked_folder(run.out))
        out = Path(run.out)
        write_record(run, out)
        with Store(out, run.store) as store:
            upkeep.sweep(store)
        asked = stack.enter_context(stop_requests())
        engine = open_engine(run)
        keys = wire.new_keys(engine.address)
        hub = Hub(run, stack.enter_context(wire.listen(keys)))
        hub.keeper.thread.start()
        # Other processes may have another working directory.
        absolute = dataclasses.replace(run, out=str(out.absolute()))
        add_parts(engine, absolute, keys._replace(master_secret=""), space, mains)
        loop = Loop(run, hub, engine, say)
        site = None if run.page is None else stack.enter_context(serve(run))
        if site is not None:
            say(f"page: {site.address}")
        try:
            with loop.shown():
                while not hub.finished and not asked:
                    loop.turn()
                    if site is not None:
                        site.turn(hub)
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


def open_engine(run: RLRun) -> Engine:
    """What starts the processes.

    Raises:
        UserError: Ray is missing, or its cluster cannot be reached.
    """
    if run.engine == "local":
        return Local()
    from jaxlab.rl.cluster_ray import Ray

    return Ray(run)


def add_parts(
    engine: Engine, run: RLRun, keys: wire.Keys, space: Any, mains: Mains
) -> None:
    """Tells an engine what is to be alive."""
    for index in range(run.envs.hosts):
        name = f"host{index}"
        spool = str(Path(run.out) / "spool" / name)
        engine.add(name, mains.host, HostSpec(name, keys, run.envs, spool))
    for index in range(run.rollout.workers):
        name = f"worker{index}"
        spec = WorkerSpec(name, index, keys, run, space)
        engine.add(name, mains.worker, spec)
    engine.add("learner", mains.learner, LearnerSpec("learner", keys, run, space))


class Loop:
    """The main process: messages, processes, figures.

    Args:
        run: what is run.
        hub: that has its channel.
        engine: that has its parts.
        say: takes the lines for the user.
    """

    def __init__(self, run: RLRun, hub: Hub, engine: Engine, say: Say) -> None:
        self.run, self.hub, self.engine, self.say = run, hub, engine, say
        self.report, self.step = Report(run), 0
        self._writer: Any = None
        self._live: Any = None
        self._polled = self._drawn = self._pictured = 0.0
        self._newest: Trajectory | None = None

    def turn(self) -> None:
        """What is to be done for a moment."""
        self.hub.step(0.02)
        now = time.monotonic()
        if now - self._polled > 0.1:
            self._polled = now
            for name in self.engine.poll():
                self._died(name)
            self._check_environments()
        stored, self.hub.stored = self.hub.stored, []
        self.report.stored_trajectories(stored)
        if stored:
            self._newest = stored[-1]
        lines, self.hub.lines = self.hub.lines, []
        for line in lines:
            self.say(line)
        news, self.hub.news = self.hub.news, []
        for body in news:
            self._told(body)
        if self._live is not None and now - self._drawn > 0.5:
            self._drawn = now
            self._live.update(table(rows(self.hub, self.report, self.step)))

    def _died(self, name: str) -> None:
        process = self.engine.processes[name]
        code, deaths = process.code, len(process.deaths)
        if name == "learner" and code == 0:
            return  # it has said that it is done
        self.hub.gone(name)
        if code == USER_ERROR:
            raise UserError(f"{name} cannot go on, for the reason above")
        # A signal is somebody else's doing; an exit is the part's own.
        if deaths >= DEATHS and code is not None and code > 0 and name[:4] != "host":
            raise UserError(
                f"{name} has died {DEATHS} times in a minute (exit code {code}; see "
                "above); what is stored is kept: the same command goes on from there"
            )
        self.say(f"{name} ended with {code}; it is started again")

    def _check_environments(self) -> None:
        """Raises UserError if environments only die."""
        if self.hub.deaths > 10 * self.run.envs.hosts * self.run.envs.slots:
            raise UserError(
                f"environments of {self.run.envs.id} died {self.hub.deaths} times and "
                f"finished no rollout meanwhile; the last: {self.hub.last_death}"
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
        now = time.monotonic()
        if self._newest is not None and now - self._pictured > PICTURES:
            self._pictured = now
            self._writer.image(self.step, "rl/episode", strip(self._newest))
            self._writer.text(self.step, "rl/episode", describe(self._newest))
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
        self.engine.stop(60.0)  # a checkpoint may take a while
        with contextlib.suppress(Exception):
            self.hub.step(0.05)  # what was handed in last
        self.hub.keeper.inbox.put(("stop", None))
        self.hub.keeper.thread.join(20.0)
        if self._writer is not None:
            self._writer.close()
