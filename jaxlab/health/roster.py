"""The hosts of a job and the processes on them, as their agents tell of them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.health import reports
from jaxlab.health.channel import Channel, Message
from jaxlab.health.detect import Board, RankSample
from jaxlab.health.journal import Journal
from jaxlab.health.steer import Slot

HEARD = 5.0
"""seconds without a report before a host is taken for dead"""


class Roster:
    """The master's side of the channel; knows the newest of each agent and rank."""

    def __init__(
        self,
        channel: Channel,
        journal: Journal,
        *,
        start_agent: Callable[[str], Any] = lambda host: None,
        show: Callable[[str], Any] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nobody is known yet.

        Args:
            channel: the master's end.
            journal: takes what goes wrong.
            start_agent: starts the agent of a host that has none.
            show: takes what rank 0 writes.
            clock: seconds.
        """
        self._channel, self._journal, self._clock = channel, journal, clock
        self._show, self._start_agent = show, start_agent
        self.agents: dict[str, reports.Agent] = {}
        self.rows: dict[int, dict[str, Any]] = {}
        """by rank, the newest of `reports.read_row`"""
        self.logs: dict[int, list[RankSample]] = {}
        """by rank, samples that nobody has taken yet"""
        self.answers: list[dict[str, Any]] = []
        """of ranks to requests, that nobody has taken yet"""
        self.absent: frozenset[str] = frozenset()
        self._generation, self._members = -1, ()
        self._began = clock()
        self._killed: set[str] = set()
        self._delays: dict[str, np.ndarray] = {}

    # ----------------------------------------------------------- what arrives

    def receive(self, seconds: float) -> None:
        """Takes in what arrives, after waiting for it so long at most."""
        for message in self._channel.receive(seconds):
            try:
                self._take(message)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self._journal.event("refused", text=f"{message.kind}: {error!r}")

    def until(self, done: Callable[[], bool], seconds: float) -> None:
        """Takes in what arrives until something is so, or so long."""
        end = self._clock() + seconds
        while not done() and self._clock() < end:
            self.receive(0.05)

    def _take(self, message: Message) -> None:
        body, now = message.body, self._clock()
        if message.kind == "hello":
            self._greet(message, now)
            return
        senders = {agent.sender: host for host, agent in self.agents.items()}
        host = senders.get(message.sender)
        if host is None:
            self._channel.send("who", {}, message.sender)
            return
        self.agents[host].heard = now
        if message.kind == "report":
            for row in body["workers"]:
                if int(row["generation"]) == self._generation:
                    self._row(row, now)
        elif message.kind == "killed":
            self.agents[host].port = int(body["port"])
            self._killed.add(host)
        elif message.kind == "probed":
            self._delays[host] = reports.read_delays(body["delay"])
        elif message.kind == "looked":
            self.answers.append(body)
        elif message.kind == "failed":
            text = f"{host} could not {body['what']}: {body['why']}"
            self._journal.event("failed", text=text)

    def _greet(self, message: Message, now: float) -> None:
        """One agent on each host: a second one is sent away."""
        agent = reports.read_hello(message.sender, message.body, now)
        host = str(message.body["host"])
        before = self.agents.get(host)
        if before and before.instance != agent.instance and now - before.heard < HEARD:
            self._channel.send("bye", {}, message.sender)
        else:
            self.agents[host] = agent

    def _row(self, row: Mapping[str, Any], now: float) -> None:
        rank = int(row["rank"])
        if not 0 <= rank < len(self._members):
            raise ValueError(f"rank {rank}")
        kept, samples = reports.read_row(row, now)
        self.rows[rank] = {**self.rows.get(rank, {}), **kept}
        self.logs[rank] += samples
        if rank == 0 and row.get("output"):
            self._show(str(row["output"]))

    # ------------------------------------------------------------ how it stands

    def board(self) -> Board:
        """All ranks, on this clock."""
        n = len(self._members)
        return reports.board_of(self.rows, n, self._began, self._clock())

    def codes(self) -> list[int | None]:
        """Exit codes of the ranks; None: runs, or is not known of."""
        ranks = range(len(self._members))
        return [self.rows.get(rank, {}).get("code") for rank in ranks]

    def silent(self) -> tuple[int, ...]:
        """Ranks of which nobody tells; agents that have gone are started again."""
        now = self._clock()
        gone = {host for host, a in self.agents.items() if now - a.heard > HEARD}
        for host in sorted(gone - self.absent):
            self._journal.event("lost", text=f"no report from {host} for {HEARD:g} s")
            self._start_agent(host)
        self.absent = frozenset(gone)
        if now - self._began < HEARD:
            return ()
        return tuple(reports.untold(self.rows, len(self._members), now - HEARD))

    # ------------------------------------------------------------ what is sent

    def gather(self, hosts: Sequence[str], seconds: float, grace: float) -> list[str]:
        """Waits for the hosts' agents, starting those that do not come by themselves.

        Args:
            hosts: their names.
            seconds: to wait for them.
            grace: seconds before any is started.

        Returns:
            the hosts that have one.
        """
        wanted = set(hosts)
        self.until(lambda: wanted <= set(self.agents), grace)
        for host in hosts:
            if host not in self.agents:
                self._start_agent(host)
        self.until(lambda: wanted <= set(self.agents), seconds)
        missing = [host for host in hosts if host not in self.agents]
        if missing:
            self._journal.event("absent", text=f"no agent on {', '.join(missing)}")
        return [host for host in hosts if host in self.agents]

    def adopt(self, generation: int, members: Sequence[Slot]) -> bool:
        """Takes a generation for this one's if it is what the agents run."""
        running = {g for agent in self.agents.values() for g, _ in agent.running}
        if running != {generation}:
            return False
        self._begin(generation, members)
        return True

    def _begin(self, generation: int, members: Sequence[Slot]) -> None:
        self._generation, self._members = generation, tuple(members)
        self._began = self._clock()
        self.rows, self.answers = {}, []
        self.logs = {rank: [] for rank in range(len(members))}

    def start(
        self,
        generation: int,
        members: Sequence[Slot],
        command: Sequence[str],
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Starts a process on each of the slots, which then have their ranks.

        Args:
            generation: its number.
            members: by rank.
            command: of each process.
            variables: of their environment, besides those of the job.
        """
        self._begin(generation, members)
        first, n = self.agents[members[0].host], len(members)
        # A single process needs no coordinator.
        meet = {"address": f"{first.address}:{first.port}", "processes": n}
        env = {**(variables or {}), "JAX_NUM_PROCESSES": str(n)}
        if n > 1:
            env["JAX_COORDINATOR_ADDRESS"] = meet["address"]
            env["JAX_COORDINATOR_BIND_ADDRESS"] = "127.0.0.1:0"
        for host, agent in self._present():
            orders = [
                {"rank": rank, "env": _place(rank, slot, n, agent.slots)}
                for rank, slot in enumerate(members)
                if slot.host == host
            ]
            body = {
                "generation": generation,
                "command": list(command),
                "folder": str(Path.cwd()),
                "env": env,
                "workers": orders,
                "coordinator": meet if n > 1 and agent is first else {},
            }
            self._channel.send("start", body, agent.sender)

    def _present(self) -> list[tuple[str, reports.Agent]]:
        return [(h, a) for h, a in self.agents.items() if h not in self.absent]

    def stop(self) -> None:
        """Kills all workers, by SIGKILL: JAX's processes do not heed SIGTERM."""
        self._killed = set()
        for _, agent in self._present():
            body = {"generation": self._generation, "address": agent.address}
            self._channel.send("kill", body, agent.sender)
        wanted = {host for host, _ in self._present()}
        self.until(lambda: wanted <= self._killed, HEARD)

    def ping(self) -> None:
        """Tells the agents that their master lives."""
        self._to_all("ping", {})

    def request(self, number: int, kind: str, step: int, steps: int) -> None:
        """Asks all ranks to look, from a step on: see `jaxlab.health.look`."""
        body = {"id": number, "kind": kind, "step": step, "steps": steps}
        self._to_all("request", body)

    def bye(self) -> None:
        """Ends the agents, and with them the workers."""
        self._to_all("bye", {})

    def _to_all(self, kind: str, body: dict[str, Any]) -> None:
        for agent in self.agents.values():
            self._channel.send(kind, body, agent.sender)

    def probe(self, seconds: float = 1.0) -> np.ndarray:
        """Delay between the ranks' hosts, by connections of the agents' own.

        Returns:
            seconds [n, n]; inf where nobody answers, NaN within a host.
        """
        hosts = [h for h, _ in self._present() if h in {s.host for s in self._members}]
        self._delays = {}
        for host in hosts:
            others = [(h, self.agents[h]) for h in hosts]
            peers = [None if h == host else [a.address, a.probe] for h, a in others]
            body = {"peers": peers, "timeout": seconds, "id": 0}
            self._channel.send("probe", body, self.agents[host].sender)
        self.until(lambda: len(self._delays) == len(hosts), 3 * seconds)
        nobody = np.full(len(hosts), math.inf)
        table = np.array([self._delays.get(h, nobody) for h in hosts])
        place = [hosts.index(slot.host) for slot in self._members if slot.host in hosts]
        return table[np.ix_(place, place)]


def _place(rank: int, slot: Slot, n: int, slots: int) -> dict[str, str]:
    """What the environment says of one process: its rank, and which GPU is its own."""
    rows = {"JAX_PROCESS_ID": str(rank)} if n > 1 else {}
    if slots > 1:
        one = str(slot.index)
        rows |= {"JAX_LOCAL_DEVICE_IDS": one, "JAX_CUDA_VISIBLE_DEVICES": one}
    return rows
