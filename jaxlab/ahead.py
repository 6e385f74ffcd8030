"""Compiles a run's programs for fewer processes while it trains.

After a fault a job goes on with fewer processes, on a smaller mesh, and would first
have to compile for it. So a thread of each process compiles the same program over the
devices of the first processes, into the persistent cache, where the smaller job finds
it: its processes have the same numbers. Nothing of it is executed.
"""

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxlab import config, program
from jaxlab.cli import parse_options
from jaxlab.errors import ConfigError
from jaxlab.health.worker import Monitor
from jaxlab.mesh import batch_sharding, make_mesh


@contextlib.contextmanager
def compiling(made: program.Program, health: Monitor) -> Iterator[Callable[..., Any]]:
    """The program's step; its second call starts the thread, if there is one to start.

    On CPU alone: another platform's compiler may want the devices for itself. At the
    end of the block what is being compiled is waited for.

    Args:
        made: the program that runs.
        health: knows which numbers of processes the job may go on with.
    """
    sizes = health.smaller()
    if not sizes or jax.devices()[0].platform != "cpu":
        yield made.step
        return
    over, calls, threads = threading.Event(), itertools.count(1), []

    def step(state: Any, batch: Any) -> Any:
        if next(calls) == 2:  # what this job needs itself is compiled
            like = jax.tree.map(lambda x: (x.dtype, x.shape[2]), batch)
            work = (made, sizes, like, over)
            threads.append(threading.Thread(target=_run, args=work, daemon=True))
            threads[0].start()
        return made.step(state, batch)

    try:
        yield step
    finally:
        over.set()
        with health.pause("compilation"):
            for thread in threads:
                thread.join()


def _run(
    made: program.Program,
    sizes: Mapping[int, Sequence[str]],
    like: Any,
    over: threading.Event,
) -> None:
    # At the priority of the training: a thread that waited for a processor with the
    # interpreter's lock in its hand would stop the whole process, heartbeat and all.
    for count in sorted(sizes, reverse=True):
        if jax.process_index() >= count:
            continue
        try:
            for compile_one in programs(on_fewer(made.run, count, sizes[count]), like):
                if over.is_set():
                    return
                compile_one()
        except ConfigError:
            continue  # its devices are not those that are here
        except Exception as error:  # a restart will be slower: no reason to stop
            warnings.warn(f"nothing is compiled ahead: {error}", stacklevel=1)
            return


def on_fewer(run: config.Run, count: int, words: Sequence[str] = ()) -> program.Program:
    """The program as the first `count` processes alone would build it.

    Args:
        run: of all processes, with its model resolved.
        count: processes.
        words: further options of their command line.

    Raises:
        ConfigError: the run's mesh does not fit.
    """
    run = parse_options(type(run), words, "", default=run) if words else run
    devices = [d for d in jax.devices() if d.process_index < count]
    mesh = make_mesh(run.mesh, devices=devices)
    config.check_rows(run, config.MeshShape(**mesh.shape))
    return program.build(run, run.model.vocab or 0, mesh=mesh)


def programs(made: program.Program, like: Any) -> list[Callable[[], Any]]:
    """What compiles the step and the evaluation of a program.

    Args:
        made: the program.
        like: tree of a batch; of each array its dtype and the tokens of a row.
    """
    run, sharding = made.run, batch_sharding(made.mesh)

    def batch(count: int) -> Any:
        rows = run.batch // run.accumulate
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (count, rows, leaf[1]), leaf[0], sharding=sharding
            ),
            like,
            is_leaf=lambda x: type(x) is tuple,
        )

    def step() -> None:
        with jax.set_mesh(made.mesh):
            made.step.lower(made.abstract, batch(run.accumulate)).compile()

    def evaluate() -> None:
        state = made.abstract
        params = state.params if state.ema is None else state.ema
        with jax.set_mesh(made.mesh):
            if made.evaluate_each is None:
                made.evaluate.lower(params, batch(1)).compile()
            else:
                made.evaluate_each.lower(params, batch(1)).compile()

    return [step, evaluate]
