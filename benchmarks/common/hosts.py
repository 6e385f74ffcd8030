"""Hosts as network namespaces with a link of its own between each two of them.

Linux, as root. A veth pair joins each two hosts, and a route of one address goes
through it: so every link has a queue at either end, and each direction can be slowed
or the whole be cut without the others noticing. One more namespace, the head, is
joined to each host by a link of its own that no data takes. Nothing of the machine's
network is touched, and what was made is removed at the end.
"""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.namespaces import address, shape, tool

Link = tuple[int, int]  # from one host to another
HEAD = "10.78.0.254"
"""address of the head, which hosts reach by links of their own"""


class Hosts(NamedTuple):
    """Names of the namespaces, and what their links carry in health."""

    head: str
    names: tuple[str, ...]
    mbit: float
    """of each link and direction; 0: as fast as the machine"""

    def links(self) -> list[Link]:
        """All of them, each direction for itself."""
        return list(itertools.permutations(range(len(self.names)), 2))

    def slow(self, link: Link, mbit: float) -> None:
        """Limits one direction of a link."""
        shape(self.names[link[0]], _device(link[1]), mbit)

    def restore(self, link: Link) -> None:
        """Undoes `slow`."""
        shape(self.names[link[0]], _device(link[1]), self.mbit)

    def cut(self, link: Link) -> None:
        """Takes the link down, in both directions."""
        name = self.names[link[0]]
        tool("ip", "-n", name, "link", "set", _device(link[1]), "down")

    def join(self, link: Link) -> None:
        """Undoes `cut`."""
        tool("ip", "-n", self.names[link[0]], "link", "set", _device(link[1]), "up")
        for source, destination in (link, link[::-1]):
            self._route(source, destination)  # which went with the link

    def _route(self, source: int, destination: int) -> None:
        device = ("dev", _device(destination), "src", address(source))
        route = ("route", "replace", f"{address(destination)}/32")
        tool("ip", "-n", self.names[source], *route, *device)

    def sent(self) -> dict[Link, int]:
        """Bytes that each direction of each link has carried."""
        found = {}
        for i, name in enumerate(self.names):
            shown = subprocess.run(
                ["ip", "netns", "exec", name, "cat", "/proc/net/dev"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for line in shown.splitlines():
                device, _, counts = line.strip().partition(":")
                if device.startswith("to"):
                    found[i, int(device[2:])] = int(counts.split()[8])
        return found


def _device(other: int) -> str:
    """Of a host, the end of its link to another."""
    return f"to{other}"


@contextlib.contextmanager
def full_mesh(count: int, mbit: float = 0.0) -> Iterator[Hosts]:
    """Makes so many hosts and the head; all of it goes at the end.

    Raises:
        UserError: not root, no iproute2, or a kernel without veth or tbf.
    """
    head, *names = (f"jaxlab-{os.getpid()}-{i}" for i in ("head", *range(count)))
    hosts = Hosts(head, tuple(names), mbit)
    with contextlib.ExitStack() as stack:
        for name in (head, *names):
            stack.callback(_remove, name)
            tool("ip", "netns", "add", name)
            tool("ip", "-n", name, "link", "set", "lo", "up")
        _address(head, "lo", HEAD)
        for i, name in enumerate(names):
            # Gloo listens where the machine's own name leads.
            known = f"127.0.0.1 localhost\n{address(i)} {socket.gethostname()}\n"
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(known)
            _address(name, "lo", address(i))
            _pair(head, f"host{i}", name, "head")
            _reach(head, f"host{i}", control(i), HEAD)
            _address(name, "lo", control(i))
            _reach(name, "head", HEAD, control(i))
        for i, j in itertools.combinations(range(count), 2):
            _pair(names[i], _device(j), names[j], _device(i))
        for i, j in hosts.links():
            hosts._route(i, j)
            hosts.restore((i, j))
        yield hosts


def control(index: int) -> str:
    """Address of a host on its link to the head."""
    return f"10.78.0.{index + 1}"


def _address(name: str, device: str, at: str) -> None:
    tool("ip", "-n", name, "addr", "add", f"{at}/32", "dev", device)


def _reach(name: str, device: str, there: str, here: str) -> None:
    route = ("route", "add", f"{there}/32", "dev", device, "src", here)
    tool("ip", "-n", name, *route)


def _pair(name: str, device: str, other: str, peer: str) -> None:
    ends = ("type", "veth", "peer", "name", peer, "netns", other)
    tool("ip", "-n", name, "link", "add", device, *ends)
    tool("ip", "-n", name, "link", "set", device, "up")
    tool("ip", "-n", other, "link", "set", peer, "up")


def _remove(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # no ip: said already
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
