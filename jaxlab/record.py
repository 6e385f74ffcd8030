"""What a run tells of itself: lines at the start, and files in its folder."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab import config, metrics
from jaxlab.data import Tokens
from jaxlab.files import write_text
from jaxlab.models.gpt import parameter_count
from jaxlab.program import Program


def start_up(made: Program, tokens: Tokens, resumed: int | None) -> Iterator[str]:
    """Lines printed before the first step: devices, mesh, model, data, state."""
    run, device = made.run, jax.devices()[0]
    axes = " x ".join(f"{k} {v}" for k, v in made.mesh.shape.items() if v > 1)
    count = made.outer["axis_size"] if made.outer else 1
    numbers = parameter_count(made.abstract.params) // count
    per_step = run.batch * run.length
    epochs = run.steps * per_step / max(len(tokens.train), 1)
    yield (
        f"devices   {jax.device_count()} x {device.device_kind} ({device.platform}), "
        f"{jax.process_count()} process(es), jax {jax.__version__}"
    )
    order = [device.id for device in made.mesh.devices.flat]
    planned = f", devices in the order {order}" if run.health.plan_mesh else ""
    yield f"mesh      {axes or 'one device'}{planned}"
    yield f"model     {numbers / 1e6:.2f} M parameters, computed in {run.model.dtype}"
    if made.outer:
        every, pairing = made.outer["inner_steps"], made.outer["pairing"]
        yield f"replicas  {count}, exchanging every {every} steps ({pairing})"
    yield from _tensor(made)
    yield (
        f"data      {run.data.corpus}: {len(tokens.train):,} tokens to train on, "
        f"{len(tokens.eval):,} held out, vocabulary {tokens.tokenizer.vocab_size}"
    )
    yield (
        f"step      {run.batch} x {run.length} = {per_step:,} tokens; "
        f"{run.steps} steps are {epochs:.2f} epochs"
    )
    where = "weights of " + run.init.path if run.init.path else "fresh weights"
    yield (
        f"state     {where if resumed is None else f'restored from step {resumed}'}, "
        f"in {run.out}"
    )


def _tensor(made: Program) -> Iterator[str]:
    """What becomes of `parallel.overlap`; nothing if it is off."""
    how = made.run.parallel.overlap
    if how == "off":
        return
    if made.mesh.shape["tensor"] == 1:
        yield f"tensor    one device: parallel.overlap {how} has nothing to do"
    elif made.overlap_report is None:
        yield "tensor    collectives by hand, one after the other with the matmuls"
    else:
        yield f"tensor    collectives by hand, overlapped ({how})"
        yield str(made.overlap_report())


def write_run(made: Program, tokens: Tokens, write: metrics.Writer, start: int) -> None:
    """Files from which the run can be repeated and its model used elsewhere."""
    run = made.run
    text = json.dumps(config.to_json(run), indent=1)
    write.text(start, "config", f"```json\n{text}\n```")
    write.hparams(_flat(config.to_json(run)), ["train/loss", "eval/loss"])
    if jax.process_index() == 0:
        out = Path(run.out)
        config.save(run, out / "config.json")
        tokens.tokenizer.save(out / "tokenizer.json")
        write_text(out / "versions.json", json.dumps(versions(), indent=1) + "\n")


def versions() -> dict[str, Any]:
    """Versions of what the numbers depend on, the revision and the command."""
    names = ("jaxlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {
        d.name: d.version for d in importlib.metadata.distributions() if d.name in names
    }
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "python": platform.python_version(),
        **found,
        "revision": revision.stdout.strip() or None,
        "command": sys.argv,
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None and name != "type":
            flat[prefix + name] = value
    return flat


def step_scalars(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What the log tells of a step: means over its replicas, and those that skipped.

    `values` has float[replicas] `loss`, `grad_norm` and `param_norm` (or float[]) and
    `skipped`, a number of each replica.
    """
    means = ("loss", "grad_norm", "param_norm")
    told = {f"train/{name}": float(values[name].mean()) for name in means}
    return told | {"train/skipped": int(values["skipped"].sum())}


class Stopwatch:
    """Where the time goes, from one log line to the next.

    `with watch("data"): ...` adds to a name; `lap` gives the seconds of each name,
    and the rate of the steps in what is left after compilation, evaluation and
    checkpoints. Waiting for data counts as part of a step.
    """

    _APART = ("compile", "evaluation", "checkpoint")

    def __init__(
        self,
        made: Program,
        start: int,
        pause: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts at step `start`; `pause` is told what is no step; `clock`: seconds."""
        run = made.run
        self._tokens = run.batch * run.length
        self._flops = self._tokens * metrics.train_flops_per_token(
            run.model, run.length
        )
        device = jax.devices()[0]
        # Forced CPU devices share the cores that one is rated by.
        count = jax.process_count() if device.platform == "cpu" else made.mesh.size
        self._peak = metrics.peak_flops(device, run.model.dtype) * count
        self._clock, self._since, self._step = clock, clock(), start
        self._pause = pause
        self._spent: dict[str, float] = dict.fromkeys(("data", *self._APART), 0.0)

    @contextmanager
    def __call__(self, name: str | None) -> Iterator[None]:
        """Adds the time of a block to `name`; None: to nothing."""
        begin = self._clock()
        apart = name in ("evaluation", "checkpoint")
        with self._pause(name) if apart and name else nullcontext():
            yield
        if name is not None:
            self._spent[name] += self._clock() - begin

    def lap(self, step: int) -> dict[str, float]:
        """Scalars since the last lap: seconds, tokens/s, and MFU as a share."""
        now = self._clock()
        apart = sum(self._spent[name] for name in self._APART)
        seconds = max(now - self._since - apart, 1e-9) / max(step - self._step, 1)
        scalars = {f"time/{name}": spent for name, spent in self._spent.items()} | {
            "time/step": seconds,
            "time/tokens_per_second": self._tokens / seconds,
            "time/mfu": self._flops / seconds / self._peak,
        }
        self._since, self._step = now, step
        self._spent = dict.fromkeys(self._spent, 0.0)
        return scalars
