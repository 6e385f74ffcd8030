"""Who waits in the collectives of an unmodified program, from a few profiled steps.

The time that a device spends in a collective is its wait for the last one to arrive
and the communication itself. The last one waits least: in each collective the least
time of all devices is taken as communication, and what others spend beyond it as
waiting. So a rank that is slow, for whatever reason and in whatever mesh, shows as the
one with the least wait, though all steps take equally long. (C4, arXiv:2406.04594,
reads the same from its collective library.)

`jax.profiler` writes what XLA ran. On CPU (jax 0.10.2 to 0.12.0.1) that is the plane
`/host:CPU`, one line per thread, and the events of operations carry `hlo_op`,
`hlo_module`, `run_id` and `device_ordinal`, the id of the device. On GPU and TPU there
is a plane `/device:GPU:0` or `/device:TPU:0` for each local device, with lines
`XLA Modules` and `XLA Ops` (TPU) or one for each stream, whose kernels carry `hlo_op`
and `hlo_module` (GPU). That is read off XLA's sources and was not tried on either.

Runs are matched between processes by their order, counted from the last: ids of runs
differ, and clocks are never compared.
"""

import bisect
import contextlib
import re
import tempfile
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxlab.health.detect import Window

# Instructions are named after HLO's operations or, from a shard_map, JAX's.
_NAME = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|collective-permute|collective-broadcast"
    r"|(ragged-)?all-to-all|psum|pmax|pmin|ppermute|psum-scatter)"
    r"(-invariant)?(-start|-done)?(\.\d+)*"
)
_DEVICE = re.compile(r"/device:\w+:(\d+)")
_DEFINITION = re.compile(r"%?([\w.-]+) = (?:\([^=]*\)|\S+) ([\w-]+)\(")


class Run(NamedTuple):
    """One run of a module on one device: seconds of collectives, and its end."""

    end: float
    seconds: dict[str, float]


class CollectiveTimes(NamedTuple):
    """Seconds of the last T steps on n devices, in K collectives; all float64.

    `step`: from the end of one run to the end of the next. `total`: in collectives.
    `wait`: of it, beyond the device that was there shortest. `local`: outside of
    collectives, on the device or on its host; 0 where collectives overlap so much
    that they sum to more than the step. `by_op` is in the order of `ops`.
    """

    step: np.ndarray  # [T, n]
    total: np.ndarray  # [T, n]
    wait: np.ndarray  # [T, n]
    local: np.ndarray  # [T, n]
    pure_comm: np.ndarray  # [T]
    by_op: np.ndarray  # [T, n, K]
    ops: tuple[str, ...]
    devices: np.ndarray  # [n], ids
    processes: np.ndarray  # [n], which process each device is of

    def window(self, first: int = 0) -> Window:
        """As the detectors take it, with a rank for each column.

        There `wait` is all of the time in collectives, as in a window from boards.

        Args:
          first: number of the first step.
        """
        return Window(
            local=self.local,
            wait=self.total,
            pure_comm=self.pure_comm,
            step=np.median(self.step, axis=1),
            number=np.arange(first, first + len(self.step)),
        )

    def per_process(self) -> "CollectiveTimes":
        """One column a process: that of its device which waited least in all."""
        least = [
            min(np.flatnonzero(self.processes == p), key=self.wait.sum(axis=0).item)
            for p in np.unique(self.processes)
        ]
        columns = {
            name: getattr(self, name)[:, least]
            for name in ("step", "total", "wait", "local", "by_op")
        }
        own = {n: getattr(self, n)[least] for n in ("devices", "processes")}
        return self._replace(**columns, **own)


def is_collective(name: str) -> bool:
    """Whether an instruction's name, or its text, is that of a collective.

    A name like `all-reduce-start.3` or `psum.1`; text like
    `%x = f32[8] all-reduce(...)`, which profiles of TPU have.
    """
    defined = _DEFINITION.match(name)
    word = defined[2] if defined else name.lstrip("%")
    return _NAME.fullmatch(word.replace("_", "-")) is not None


def collectives(hlo: str) -> frozenset[str]:
    """The names of all collectives in a program's text, `compiled.as_text()`."""
    return frozenset(m[1] for m in _DEFINITION.finditer(hlo) if is_collective(m[2]))


def _stats(thing: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        # The iterator's type has no module, which Python 3.12 mentions.
        warnings.simplefilter("ignore", DeprecationWarning)
        return dict(thing.stats)


def _of_host(plane: Any) -> Iterator[tuple[int, str, Any, str, float, float]]:
    """Device, module, run, operation, begin and end of all that ran on CPU devices."""
    for line in plane.lines:
        for event in line.events:
            stats = _stats(event)
            if "hlo_op" in stats and "device_ordinal" in stats:
                where = (stats["device_ordinal"], stats["hlo_module"], stats["run_id"])
                yield *where, stats["hlo_op"], event.start_ns, event.end_ns


def _of_device(
    plane: Any, device: int
) -> Iterator[tuple[int, str, Any, str, float, float]]:
    """The same of one accelerator."""
    lines = {line.name: line for line in plane.lines}
    streams = [line for name, line in lines.items() if name.startswith("Stream")]
    events = []
    for line in streams or [lines[name] for name in lines if name == "XLA Ops"]:
        for event in line.events:
            stats = _stats(event)
            if streams and "hlo_op" not in stats:
                continue  # a copy or a kernel of no operation
            name = stats.get("hlo_op", event.name).rpartition("::")[2]
            events.append((event.start_ns, event.end_ns, name, stats.get("hlo_module")))
    events.sort(key=lambda event: event[0])
    if "XLA Modules" in lines:
        spans = sorted(
            (event.start_ns, event.end_ns, event.name.partition("(")[0])
            for event in lines["XLA Modules"].events
        )
    else:
        spans = sorted(
            span
            for module in {event[3] for event in events if event[3]}
            for span in _spans([e[:3] for e in events if e[3] == module], module)
        )
    for begin, end, name, module in events:
        # The last span that has begun; those of different modules do not overlap.
        at = bisect.bisect(spans, begin, key=lambda span: span[0]) - 1
        if at >= 0 and begin < spans[at][1]:  # or cut off by the profile's beginning
            yield device, module or spans[at][2], spans[at][0], name, begin, end


def _spans(
    events: list[tuple[float, float, str]], module: str
) -> list[tuple[float, float, str]]:
    """The runs of a module where the profile does not say them.

    What runs least often runs once a run, unlike what is in a loop; the first such
    operation begins a run.
    """
    often = Counter(name for _, _, name in events)
    runs = min(often.values())
    first = next(name for _, _, name in events if often[name] == runs)
    begins = [begin for begin, _, name in events if name == first]
    begins[0] = events[0][0]
    ends = [*begins[1:], max(end for _, end, _ in events)]
    return [(a, b, module) for a, b in zip(begins, ends, strict=True)]


def read_runs(data: Any, hlo: str | None = None) -> dict[str, dict[int, list[Run]]]:
    """The runs in a profile, by module and id of the device, in their order.

    Args:
      data: the `jax.profiler.ProfileData` of one process.
      hlo: the optimised program's text; with it collectives are known whatever they
        are called. None: by their usual names.
    """
    known = None if hlo is None else collectives(hlo)
    local = sorted(jax.local_devices(), key=lambda d: d.local_hardware_id or 0)
    runs: dict[tuple, list] = {}
    for plane in data.planes:
        found = _DEVICE.fullmatch(plane.name)
        if plane.name == "/host:CPU":
            events = _of_host(plane)
        elif found and int(found[1]) < len(local):
            events = _of_device(plane, local[int(found[1])].id)
        else:
            continue
        for device, module, run, name, begin, end in events:
            entry = runs.setdefault(
                (module, device, run), [begin, end, defaultdict(float)]
            )
            entry[0], entry[1] = min(entry[0], begin), max(entry[1], end)
            short = name.partition(" ")[0].lstrip("%")
            if is_collective(name) if known is None else short in known:
                entry[2][short] += (end - begin) * 1e-9
    modules: dict[str, dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for (module, device, _), entry in sorted(runs.items(), key=lambda r: r[1][0]):
        modules[module][device].append(Run(entry[1] * 1e-9, dict(entry[2])))
    return modules


def collective_times(
    data: Any, *, module: str | None = None, hlo: str | None = None
) -> CollectiveTimes:
    """What a profile of each process says, gathered from all of them.

    Every process calls it, with its own profile of the same steps; all steps had
    ended when the profile did.

    Args:
      data: the `jax.profiler.ProfileData` of this process.
      module: name of the program, `jit_` and the function's; None: that which spent
        most time in collectives.
      hlo: see `read_runs`.

    Raises:
      ValueError: no collective, fewer than two runs, or profiles of other programs.
    """
    modules = read_runs(data, hlo)

    def spent(name: str) -> float:
        runs = [run for of in modules[name].values() for run in of]
        return sum((sum(run.seconds.values()) for run in runs), start=0.0)

    busiest = max(modules, key=spent, default="")
    own = modules.get(module if module is not None else busiest, {})
    names = sorted({op for runs in own.values() for run in runs for op in run.seconds})
    steps = min((len(runs) for runs in own.values()), default=0) - 1
    seen = zlib.crc32(" ".join(names).encode()) & 0x7FFFFFFF
    # Together also where it fails, so that no process waits for another for ever.
    facts = _gather(np.array([max(steps, 0), len(own), len(names), seen], np.int32))
    if (facts[:, 0] < 1).any() or not facts[:, 1:3].all():
        raise ValueError(
            f"process {int(np.argmin(facts[:, :3].min(axis=1)))} profiled no two runs "
            f"of {module or 'a program'} with collectives; "
            f"here: {', '.join(sorted(modules)) or 'nothing'}"
        )
    if (facts[:, 1:] != facts[0, 1:]).any():
        raise ValueError(
            "the processes profiled different programs, or have different numbers of "
            f"devices: name one module; here {busiest} with {', '.join(names)}"
        )
    steps, ids = int(facts[:, 0].min()), sorted(own)
    took = np.zeros((steps, len(ids), len(names) + 1), np.float32)
    for column, device in enumerate(ids):
        last = own[device][-steps - 1 :]
        for t, (before, run) in enumerate(zip(last, last[1:], strict=False)):
            spent_by = [run.seconds.get(name, 0.0) for name in names]
            took[t, column] = [run.end - before.end, *spent_by]
    every = _gather(took).astype(np.float64)
    devices = _gather(np.array(ids, np.int32))
    by_process = np.concatenate(list(every), axis=1)
    processes = np.repeat(np.arange(len(devices)), devices.shape[1])
    return _summed(by_process, tuple(names), devices.ravel(), processes)


def _gather(x: np.ndarray) -> np.ndarray:
    """[process, ...]: what each process has."""
    if jax.process_count() == 1:
        return x[None]
    return np.asarray(multihost_utils.process_allgather(x))


def _summed(
    took: np.ndarray, ops: tuple[str, ...], devices: np.ndarray, processes: np.ndarray
) -> CollectiveTimes:
    step, by_op = took[:, :, 0], took[:, :, 1:]
    least = by_op.min(axis=1, keepdims=True)
    total = by_op.sum(axis=2)
    return CollectiveTimes(
        step=step,
        total=total,
        wait=(by_op - least).sum(axis=2),
        local=np.maximum(step - total, 0.0),
        pure_comm=least.sum(axis=2)[:, 0],
        by_op=by_op,
        ops=ops,
        devices=devices,
        processes=processes,
    )


@contextlib.contextmanager
def profiled() -> Iterator[list[Any]]:
    """Profiles a block; afterwards the list has the profile of this process.

    What the block started has to end in it.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 1, 0
    options.enable_hlo_proto = False
    found: list[Any] = []
    # A folder of its own: processes of one host would overwrite each other's.
    with tempfile.TemporaryDirectory(prefix="jaxlab-profile-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield found
        for file in sorted(Path(folder).rglob("*.xplane.pb")):
            found.append(jax.profiler.ProfileData.from_file(str(file)))


def sample_profile(
    run_step: Callable[[], Any],
    steps: int = 5,
    *,
    module: str | None = None,
    hlo: str | None = None,
) -> CollectiveTimes:
    """Profiles some steps of a program as it is, in all processes together.

    Every process calls it at the same step. The program need not be split, or know
    of this; it must have been compiled, and earlier steps may still be running.

    Args:
      run_step: dispatches one step and returns some array of it (or a tree of them).
        It is called `steps + 1` times: the first run only says when the second began.
      steps: T.
      module: see `collective_times`.
      hlo: see `read_runs`.

    Raises:
      ValueError: as `collective_times`, or no steps.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps, not at least 1")
    with profiled() as found:
        out = None
        for _ in range(steps + 1):
            out = run_step()
        jax.block_until_ready(out)
    times = collective_times(found[0], module=module, hlo=hlo)
    kept = {n: getattr(times, n)[-steps:] for n in ("step", "total", "wait", "local")}
    kept |= {"pure_comm": times.pure_comm[-steps:], "by_op": times.by_op[-steps:]}
    return times._replace(**kept)
