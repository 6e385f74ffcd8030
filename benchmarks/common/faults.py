"""Faults on purpose, of a job on hosts that are network namespaces (`common.hosts`)."""

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.hosts import Hosts, Link

SLOW_MBIT = 50.0
QUOTA = 0.1
"""of one processor, of a throttled rank"""


class Victim(NamedTuple):
    """What a diagnosis has to name."""

    ranks: tuple[int, ...] = ()
    links: tuple[Link, ...] = ()


class Scene(NamedTuple):
    """The job at the moment of an injection; ranks are those of its generation."""

    hosts: Hosts
    place: tuple[int, ...]
    """by rank, its host"""
    pids: tuple[int, ...]
    used: tuple[Link, ...]
    """ranks between which the ring sends"""


def draw(fault: str, scene: Scene, chance: random.Random) -> Victim:
    """Whom a fault is to hit."""
    if fault == "clean":
        return Victim()
    if fault == "kill_first":
        return Victim((0,))
    if fault in ("slow_link", "slow_link_both", "cut"):
        link = scene.used[chance.randrange(len(scene.used))]
        both = fault != "slow_link"
        return Victim((), tuple(sorted({link, link[::-1]})) if both else (link,))
    return Victim((chance.randrange(len(scene.pids)),))


@contextlib.contextmanager
def injected(
    fault: str,
    scene: Scene,
    victim: Victim,
    mbit: float = SLOW_MBIT,
    quota: float = QUOTA,
) -> Iterator[None]:
    """The fault, until the end of the block: of a link, or of a processor."""
    hosts, place = scene.hosts, scene.place
    links = [(place[i], place[j]) for i, j in victim.links]
    with contextlib.ExitStack() as stack:
        if fault in ("slow_out", "slow_in"):
            mine = place[victim.ranks[0]]
            end = 0 if fault == "slow_out" else 1
            links = [link for link in hosts.links() if link[end] == mine]
        if fault == "cut":
            stack.callback(hosts.join, links[0])
            hosts.cut(links[0])
        elif links:
            for link in links:
                stack.callback(hosts.restore, link)
                hosts.slow(link, mbit)
        elif fault == "throttle":
            stack.enter_context(throttled(scene.pids[victim.ranks[0]], quota))
        elif victim.ranks:
            number = {"stop": signal.SIGSTOP, "stuck": signal.SIGUSR1}
            pid = scene.pids[victim.ranks[0]]
            os.kill(pid, number.get(fault, signal.SIGKILL))
            if fault == "stop":
                stack.callback(_signal, pid, signal.SIGCONT)
        yield


@contextlib.contextmanager
def throttled(pid: int, quota: float) -> Iterator[None]:
    """Gives a process no more than that of one processor."""
    group = Path("/sys/fs/cgroup/cpu") / f"jaxlab-{os.getpid()}"
    period = 50_000  # microseconds
    try:
        group.mkdir(exist_ok=True)
        (group / "cpu.cfs_period_us").write_text(str(period))
        (group / "cpu.cfs_quota_us").write_text(str(int(quota * period)))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        with _stuttering(pid, period * 1e-6, quota):
            yield
        return
    try:
        yield
    finally:
        for task in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (group.parent / "cgroup.procs").write_text(task)
        for _ in range(20):  # a process that was killed leaves it a little later
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.05)


@contextlib.contextmanager
def _stuttering(pid: int, period: float, quota: float) -> Iterator[None]:
    over = threading.Event()

    def stutter() -> None:
        while not over.wait(quota * period):
            _signal(pid, signal.SIGSTOP)
            time.sleep((1 - quota) * period)
            _signal(pid, signal.SIGCONT)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def ring(hosts: Hosts, place: Sequence[int]) -> tuple[Link, ...]:
    """Ranks between which the job sends, as the interfaces count in half a second."""
    before = hosts.sent()
    time.sleep(0.5)
    rate = {link: sent - before[link] for link, sent in hosts.sent().items()}
    return tuple(
        (i, j)
        for i, j in itertools.permutations(range(len(place)), 2)
        if rate[place[i], place[j]] > 0.25 * max(rate.values())
    )
