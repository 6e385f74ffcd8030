"""Runs a training command on several processes and hosts, and keeps it running.

python scripts/supervise.py --local 4 -- python scripts/train.py configs/gpt_tiny.py
python scripts/supervise.py --hosts hosts.txt --nproc 4 -- python scripts/train.py ...
python scripts/supervise.py --ray 2 --nproc 4 -- python scripts/train.py ...
python scripts/supervise.py status runs/gpt_tiny/health    # what it knows right now
python scripts/supervise.py agent --keys FILE --host NAME  # on a host, by a launcher
"""

import contextlib
import dataclasses
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxlab.cli import parse_options, run_main
from jaxlab.errors import ConfigError, UserError

PROG = "scripts/supervise.py"
Sizes = tuple[int, ...]
Words = Callable[[int], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options before `--`; the command of a worker comes after it."""

    local: int | None = None
    """processes on this machine"""
    hosts: str | None = None
    """file of hosts, one a line: name, and its address if that is another"""
    ray: int | None = None
    """hosts to ask a Ray cluster for; needs the extra cluster"""
    ray_address: str = "auto"
    """the cluster: auto: that of this machine; local: a new one, here"""
    ray_gpus: float = 0.0
    """GPUs for each process on Ray"""
    nproc: int = 1
    """processes on each of the hosts"""
    launch: str = "ssh {host}"
    """command that starts an agent on a host; none: something else starts them"""
    health: str | None = None
    """folder for events, logs and keys; default: health in the run's folder"""
    address: str = "127.0.0.1"
    """address of this machine that the hosts reach"""
    port: int = 0
    """port for the agents; 0: one that is free"""
    sizes: tuple[int, ...] | None = None
    """numbers of processes to run with; default: those that the run's mesh allows"""
    least: int = 1
    """processes below which to give up"""
    gather: float = 60.0
    """seconds to wait for the agents"""
    patience: float = 30.0
    """seconds without a supervisor before an agent kills its workers"""
    hook: str = ""
    """what to tell of diagnoses, restarts and the end, as JSON: a command, on its
    standard input, or http://..., by POST"""
    metrics: int | None = None
    """port of this machine (127.0.0.1) where Prometheus may ask; needs the extra
    metrics"""


@dataclasses.dataclass(frozen=True)
class AgentOptions:
    """The agent of one host."""

    keys: str
    """the agents' key file"""
    host: str
    """name of this host in the job"""
    slots: int = 1
    """processes that may run here"""
    folder: str = "health"
    """for the workers' output"""
    address: str = "127.0.0.1"
    """address of this host that the others reach"""
    patience: float = 30.0
    """seconds without a supervisor before the workers are killed"""


def main(arguments: list[str]) -> None:
    """Parses the command line and supervises, serves or shows."""
    if arguments[:1] == ["agent"]:
        _agent(parse_options(AgentOptions, arguments[1:], PROG))
    elif arguments[:1] == ["status"]:
        _show_status(arguments[1:])
    else:
        cut = arguments.index("--") if "--" in arguments else len(arguments)
        options = parse_options(Options, arguments[:cut], PROG)
        sys.exit(_supervise(options, arguments[cut + 1 :]))


def _agent(options: AgentOptions) -> None:
    from jaxlab.health.agent import run_agent
    from jaxlab.health.channel import read_keys

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor's to deal with
    run_agent(
        read_keys(options.keys),
        options.host,
        options.slots,
        Path(options.folder),
        address=options.address,
        patience=options.patience,
    )


def _show_status(arguments: Sequence[str]) -> None:
    import json

    from jaxlab.health.journal import table

    if len(arguments) != 1:
        raise ConfigError("status takes one folder, such as runs/gpt_tiny/health")
    path = Path(arguments[0]) / "status.json"
    try:
        print(table(json.loads(path.read_text()), time.time()))
    except FileNotFoundError:
        raise UserError(f"there is no {path}: is this a health folder?") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a status of this version: {error!r}") from None


def _supervise(options: Options, command: list[str]) -> int:
    from jaxlab import metrics
    from jaxlab.files import locked_folder
    from jaxlab.health import channel, prometheus
    from jaxlab.health.hook import hook
    from jaxlab.health.journal import Journal
    from jaxlab.health.roster import Roster
    from jaxlab.health.steer import SteerConfig
    from jaxlab.health.supervise import Supervisor

    if not command:
        raise ConfigError("give the command of a worker after --")
    given = [x for x in (options.local, options.hosts, options.ray) if x is not None]
    if len(given) != 1:
        raise ConfigError("give one of --local N, --hosts FILE and --ray N")
    counts = {"local": options.local, "ray": options.ray, "nproc": options.nproc}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"--{name} is {count}, and must be at least 1")
    hosts = _hosts(options)
    processes = sum(count for count, _ in hosts.values())
    out, sizes, words = _run(command, processes)
    folder = Path(options.health or out / "health")
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked_folder(folder))
        keys = _keys(folder, options)
        # An earlier supervisor's curves stay, whatever step it had come to.
        write = stack.enter_context(metrics.open_writer(folder, sys.maxsize >> 32))
        say = partial(print, flush=True)
        tell = stack.enter_context(hook(options.hook, say))
        journal = Journal(folder, write, say, tell=tell)
        stack.callback(journal.close)
        if options.metrics is not None:
            at = stack.enter_context(prometheus.serve(folder, options.metrics))
            say(f"metrics at http://{at[0]}:{at[1]}/metrics")
        master = stack.enter_context(channel.listen(keys))
        if options.ray is None:
            agents = _agents(hosts, folder, options)
        else:
            from jaxlab.health import on_ray

            agents = on_ray.agents(
                channel.read_keys(folder / "agent.key"),
                {name: count for name, (count, _) in hosts.items()},
                folder.resolve(),
                address=options.ray_address,
                gpus=options.ray_gpus,
                patience=options.patience,
            )
        start_agent = stack.enter_context(agents)
        show = partial(print, end="", flush=True)
        roster = Roster(master, journal, start_agent=start_agent, show=show)
        supervisor = Supervisor(
            command,
            roster,
            folder,
            journal,
            steering=SteerConfig(sizes=options.sizes or sizes, least=options.least),
            words=words,
        )
        stack.enter_context(_interruptible())
        return supervisor.run(
            {name: count for name, (count, _) in hosts.items()}, options.gather
        )


def _hosts(options: Options) -> dict[str, tuple[int, str]]:
    """Name of each host to its number of processes and its address."""
    if options.local is not None:
        return {"local": (options.local, "127.0.0.1")}
    if options.ray is not None:
        return {f"ray{i}": (options.nproc, "") for i in range(options.ray)}
    path = Path(options.hosts or "")
    try:
        lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    found = {line[0]: (options.nproc, line[-1]) for line in lines if line}
    if not found:
        raise UserError(f"{path} names no host")
    return found


def _run(command: Sequence[str], processes: int) -> tuple[Path, Sizes | None, Words]:
    """What a number of processes means for the run.

    Returns:
        The run's folder, the numbers of processes that its mesh allows, and what the
        command has besides for such a number. Of commands other than
        `scripts/train.py` nothing is known.
    """
    script = next((i for i, w in enumerate(command) if w.endswith("train.py")), None)
    if script is None:
        return Path("runs/supervised"), None, lambda count: ()
    from jaxlab import config, fewer

    run = config.parse(list(command[script + 1 :]), "scripts/train.py")
    meshes = fewer.meshes(run, processes)

    def words(count: int) -> list[str]:
        if count not in meshes:
            return []
        return fewer.same_batch(run, meshes[processes], meshes[count])

    return Path(run.out), tuple(meshes), words


def _keys(folder: Path, options: Options):
    """The job's keys: those of an earlier supervisor, whose agents may be there."""
    from jaxlab.health import channel

    path, port = folder / "master.key", options.port
    before = channel.read_keys(path) if path.exists() else None
    if before is not None:
        port = port or int(before.address.rpartition(":")[2])
        keys = before._replace(address=f"tcp://{options.address}:{port}")
        if keys != before:  # this machine has another address than that one had
            _write_keys(folder, keys)
        return keys
    try:
        with socket.create_server((options.address, port)) as server:
            port = server.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen at {options.address}:{port}: {error}; is --address one of "
            "this machine's?"
        ) from error
    keys = channel.new_keys(f"tcp://{options.address}:{port}")
    _write_keys(folder, keys)
    return keys


def _write_keys(folder: Path, keys: Any) -> None:
    from jaxlab.health import channel

    channel.write_keys(folder / "master.key", keys)
    channel.write_keys(folder / "agent.key", keys._replace(master_secret=""))


@contextlib.contextmanager
def _agents(
    hosts: Mapping[str, tuple[int, str]], folder: Path, options: Options
) -> Iterator[Callable[[str], None]]:
    """What starts the agent of a host; agents end when told, or by themselves."""
    started = []
    script = str(Path(__file__).resolve())

    def start(name: str) -> None:
        count, address = hosts[name]
        words = ["agent", "--keys", str((folder / "agent.key").resolve())]
        words += ["--host", name, "--slots", str(count), "--address", address]
        words += ["--folder", str(folder.resolve())]
        words += ["--patience", str(options.patience)]
        if options.local is not None:
            command = [sys.executable, script, *words]
        elif options.launch:
            prefix = [w.format(host=name) for w in shlex.split(options.launch)]
            command = [*prefix, sys.executable, script, *words]
        else:
            return
        started.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        )

    yield start
    until = time.monotonic() + 10
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(until - time.monotonic(), 0.1))
        if process.poll() is None:
            process.kill()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the job as SIGINT does: agents are told, workers killed."""

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    run_main(main)
