"""The supervisor: from the agents' reports to a diagnosis, an action, a new generation.

One loop, `Supervisor.run`. Detection and policy are pure and elsewhere (`detect`,
`sequential`, `matrix`, `steer`); here are the messages, the clock and the files. What a
successor needs is in `job.json`: a supervisor that is killed and started again takes
the running workers over.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.errors import UserError
from jaxlab.files import write_text
from jaxlab.health import look, matrix, plan, reports, sequential, steer
from jaxlab.health.detect import (
    Board,
    DetectConfig,
    Diagnosis,
    Kind,
    Phase,
    Window,
    detect_stall,
    few,
)
from jaxlab.health.journal import Downtime, Goodput, Journal
from jaxlab.health.roster import HEARD, Roster
from jaxlab.health.steer import Action, Job, Slot, SteerConfig
from jaxlab.health.worker import SMALLER

CURVES = 5.0
"""seconds of steps that make one point of the curves"""
AHEAD = 1.0
"""seconds until the step from which ranks look, so that all are told in time"""
LONG = 2.0
"""seconds of steps that are looked at, as far as `look.STEPS` allow"""
REST = 60.0
"""seconds without another look after one that found nobody to blame"""
SETTLE = 0.5
"""seconds that a rank which ended with an error waits for one that caused it"""
TAKEOVER = 5.0
"""seconds in which agents that are there find a new supervisor"""
FEWER = 2
"""how many sizes below its own a job compiles for ahead"""
ANSWER = 60.0
"""seconds for the answer to a request"""


class Asked(NamedTuple):
    """A request that has not been answered."""

    number: int
    kind: str
    until: float
    early: bool = False
    """before there is a suspicion"""


class Supervisor:
    """The state of the loop; made once a job."""

    def __init__(
        self,
        command: Sequence[str],
        roster: Roster,
        folder: Path,
        journal: Journal,
        *,
        steering: SteerConfig | None = None,
        detecting: DetectConfig | None = None,
        words: Callable[[int], Sequence[str]] = lambda processes: (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describes the job; nothing starts before `run`.

        Args:
            command: of every worker.
            roster: of the agents.
            folder: `job.json` is kept there.
            journal: takes events.
            steering: what to do about diagnoses.
            detecting: limits of the detectors.
            words: what the command has besides, for a number of processes.
            clock: seconds.
        """
        self._command, self._roster, self._journal = list(command), roster, journal
        self._saved = folder / "job.json"
        self._steering = steering or SteerConfig()
        self._detecting = detecting or DetectConfig()
        self._words, self._clock = words, clock
        self._job = Job(())
        self._number = int(time.time())  # of requests, above an earlier supervisor's
        self._waiting, self._patience = math.inf, 60.0
        self._goodput = Goodput(clock())
        self._fault: tuple[float, float, float] | None = None
        self._last = ""
        self._fresh()

    def _fresh(self) -> None:
        """Forgets what was learned of a generation."""
        n = max(len(self._job.members), 1)
        self._baseline = sequential.init_baseline(self._detecting)
        self._slow = sequential.init_slow(n, self._detecting)
        self._healthy: look.Times | None = None
        self._blind = self._resigned = False
        self._ended: tuple[float, tuple[int, ...]] | None = None
        self._asked: Asked | None = None
        self._early: Diagnosis | None = None
        self._rest_early = self._rest = -math.inf
        self._windowed, self._told = 0.0, -math.inf
        self._unwritten: list[Window] = []
        self._written = self._clock()

    # ---------------------------------------------------------------- the loop

    def run(self, hosts: Mapping[str, int], gather: float = 60.0) -> int:
        """Runs the job to its end.

        Args:
            hosts: name to number of processes.
            gather: seconds to wait for agents, at the start and where too few are left.

        Returns:
            the exit code for the shell: 0 done, 1 given up.

        Raises:
            UserError: no agent came, or too few for the job.
        """
        self._patience = gather
        try:
            self._begin(hosts)
            while True:
                self._roster.receive(0.05)
                code = self._turn(self._clock())
                if code is not None:
                    return code
        finally:
            self._roster.bye()

    def _begin(self, hosts: Mapping[str, int]) -> None:
        """Takes over what an earlier supervisor has left running, or starts the job."""
        grace = TAKEOVER if self._saved.exists() else 0.0
        there = self._roster.gather(list(hosts), self._patience, grace)
        if not there:
            raise UserError(
                f"no agent came within {self._patience:g} s: are the hosts right?"
            )
        if self._saved.exists():
            job = steer.from_json(json.loads(self._saved.read_text()))
            if self._roster.adopt(job.generation, job.members):
                self._job = job
                self._fresh()
                text = f"took over generation {job.generation}"
                self._journal.event("takeover", text=text)
                return
        slots = tuple(Slot(host, i) for host in there for i in range(hosts[host]))
        members = steer.next_members(Job(slots), (), self._clock(), self._steering)
        if not members:
            raise UserError(
                f"{len(slots)} processes are fewer than the job can run with"
            )
        self._job = Job(members, slots[len(members) :])
        self._launch()

    def _launch(self) -> None:
        """Starts a generation on the job's members."""
        members, number = self._job.members, self._job.generation
        self._fresh()
        words = list(self._words(len(members)))
        variables = {SMALLER: json.dumps(self._smaller())}
        self._roster.start(number, members, [*self._command, *words], variables)
        write_text(self._saved, json.dumps(steer.to_json(self._job)))
        n, where = len(members), ", ".join(map(str, members))
        text = f"generation {number}: {n} process{'es' * (n > 1)} on {where}"
        text += f", with {' '.join(words)}" * bool(words)
        self._journal.event("start", self._goodput.step, text)

    def _smaller(self) -> dict[int, list[str]]:
        """The next sizes that evictions would leave, with what is added for them."""
        n = len(self._job.members)
        allowed = self._steering.sizes or range(1, n)
        sizes = sorted(m for m in allowed if max(self._steering.least, 1) <= m < n)
        return {m: list(self._words(m)) for m in sizes[-FEWER:]}

    # --------------------------------------------------------------- one round

    def _turn(self, now: float) -> int | None:
        """Diagnoses and acts; the exit code when the job is over."""
        codes = self._roster.codes()
        if codes and all(code == 0 for code in codes):
            self._journal.event("done", self._goodput.step, "all processes are done")
            return 0
        hopeless = self._hopeless()
        if hopeless:
            self._journal.event("give_up", self._goodput.step, hopeless)
            return 1
        board, silent = self._roster.board(), self._silent()
        board = board._replace(alive=self._alive(board.alive, now))
        if now - self._told >= 1.0:
            self._told = now
            self._status(board, now)
            self._roster.ping()
        if self._asked and now > self._asked.until:
            self._journal.event("unanswered", text=f"no {self._asked.kind} came")
            self._asked = None
        if silent and self._too_few(now):
            self._waiting = min(self._waiting, now)
            if now - self._waiting < self._patience:
                return None  # their agents may come back
        self._waiting = math.inf
        diagnosis = silent or detect_stall(board, now, self._baseline, self._detecting)
        if diagnosis.kind == Kind.HEALTHY:
            answered = self._answered()
            if answered is None:
                if now - self._windowed < 0.25:
                    return None
                self._windowed = now
                answered = self._paced(now)
                if answered is None or (self._asked and not self._asked.early):
                    return None  # the answer to what was asked says more
                named = answered.ranks or answered.links
                if answered.kind in steer.SLOW and not named and now < self._rest:
                    return None  # that was looked at
            diagnosis = answered
        return self._act(diagnosis, board, now)

    def _hopeless(self) -> str:
        """Why another start would end like this one; "" if it might not."""
        for rank, row in sorted(self._roster.rows.items()):
            code = row.get("code")
            early = self._goodput.step == 0 and row.get("phase", 0) == Phase.STARTING
            if code == 2 or (code == 1 and early):
                log = f"g{self._job.generation}-r{rank}.log"
                return f"rank {rank} ended with exit code {code}: see {log}"
        return ""

    def _alive(self, alive: np.ndarray, now: float) -> np.ndarray:
        """bool[n]: which ranks count as dead a moment later, when others may have told.

        If it is not sure who died first, it is who was heard of first.
        """
        rows = self._roster.rows
        codes = {rank: row["code"] for rank, row in rows.items() if row.get("code")}
        if not codes or alive.all():
            return alive
        began, dead = self._ended = self._ended or (now, tuple(codes))
        sure = reports.died_first(codes)
        if not sure and now - began < SETTLE:
            dead = ()
        return ~np.isin(np.arange(len(alive)), sure or dead)

    def _silent(self) -> Diagnosis | None:
        """Ranks of which no agent tells anything."""
        ranks = self._roster.silent()
        self._job = self._job._replace(absent=self._roster.absent)
        text = f"no report of rank {few(ranks)} for {HEARD:g} s"
        return Diagnosis(Kind.CRASH, ranks, (), "rank", text, 1.0) if ranks else None

    def _too_few(self, now: float) -> bool:
        left = steer.next_members(self._job, (), now, self._steering)
        return len(left) < max(self._steering.least, 1)

    def _paced(self, now: float) -> Diagnosis | None:
        """What the sequential test says of the steps since; None: there are none."""
        window = reports.take_window(self._roster.logs)
        if window is None:
            return None
        if self._fault is not None:
            self._recovered(now)
        self._goodput = self._goodput.advanced(window)
        self._unwritten.append(window)
        if now - self._written >= CURVES:
            columns = zip(*self._unwritten, strict=True)
            joined = Window(*map(np.concatenate, columns))
            self._journal.window(joined, self._goodput, now)
            self._unwritten, self._written = [], now
        self._slow, diagnosis = sequential.update_slow(
            self._slow, window, self._baseline, self._detecting
        )
        self._baseline = sequential.update_baseline(self._baseline, window, diagnosis)
        ready = self._baseline.center is not None
        alone = len(self._job.members) == 1
        if ready and self._healthy is None and not (alone or self._blind):
            self._ask("learn", now)
        self._look_early(diagnosis, now)
        return diagnosis

    def _look_early(self, diagnosis: Diagnosis, now: float) -> None:
        """Has ranks look once evidence is half way, so that an alarm can name them.

        What the look finds is kept for the alarm, and forgotten if none comes.
        """
        if diagnosis.kind != Kind.HEALTHY or self._healthy is None:
            return
        if diagnosis.confidence >= 0.5:
            self._early, self._rest = None, -math.inf
        elif self._asked is None and now > self._rest_early:
            self._rest_early = now + REST
            self._ask("profile", now, early=True)

    def _act(self, diagnosis: Diagnosis, board: Board, now: float) -> int | None:
        """What the policy says about a diagnosis."""
        if diagnosis.kind in (Kind.HEALTHY, Kind.UNKNOWN) and not self._job.suspicion:
            return None
        if self._resigned and diagnosis.kind == Kind.COMM_SLOW:
            return None
        suspected = self._job.suspicion
        self._job, action = steer.decide(
            self._job,
            diagnosis,
            now,
            self._goodput.step,
            self._slowdown(),
            self._steering,
        )
        if diagnosis.kind not in (Kind.HEALTHY, Kind.UNKNOWN):
            self._last = str(diagnosis)
            if suspected is None or suspected[0][:3] != diagnosis[:3]:
                self._journal.event(
                    "diagnosis",
                    self._goodput.step,
                    str(diagnosis),
                    kind=diagnosis.kind,
                    ranks=diagnosis.ranks,
                    links=diagnosis.links,
                )
        if action.kind == "continue":
            return None
        if action.kind in ("profile", "probe"):
            if diagnosis.kind == Kind.COMM_HANG:
                return self._act(self._probe_hosts(diagnosis), board, now)
            found, self._early = self._early, None
            if found is not None:
                self._journal.event("looked", self._goodput.step, str(found))
                return self._act(found, board, now)
            self._ask(action.kind, now)
            return None
        if action.kind == "give_up":
            self._journal.event("give_up", self._goodput.step, action.reason)
            return 1
        self._restart(action, board, now)
        return None

    def _slowdown(self) -> float:
        """Duration of a step now over the healthy one."""
        healthy = self._baseline.step
        excess = float(np.max(self._slow.excess, initial=0.0))
        return 1 + excess / healthy if healthy > 0 else 1.0

    def _restart(self, action: Action, board: Board, now: float) -> None:
        """Kills what is left of a generation and starts the next one."""
        assert self._job.suspicion is not None
        suspected = self._job.suspicion[1]
        if action.kind == "reorder":
            action = action._replace(members=self._reordered(action))
            if action.members == self._job.members:
                self._resigned = True
                text = f"no order avoids it: {action.reason}"
                self._journal.event("resigned", self._goodput.step, text)
                return
        moved = float(board.progress.max())
        gone = ", ".join(map(str, action.evict))
        how = f"without {gone}" if gone else "in the same places"
        self._journal.event(action.kind, self._goodput.step, f"{how}: {action.reason}")
        self._roster.stop()
        self._fault = (max(suspected - moved, 0.0), suspected, self._clock())
        self._job = steer.restarted(self._job, action, now, self._goodput.step)
        self._launch()

    def _recovered(self, now: float) -> None:
        """Books the downtime of a restart once there is a step again."""
        assert self._fault is not None
        detection, suspected, killed = self._fault
        spent = Downtime(0.0, detection, killed - suspected, now - killed)
        self._goodput = self._goodput._replace(
            downtime=self._goodput.downtime.plus(spent)
        )
        self._fault = None
        parts = ", ".join(f"{k} {v:.2f} s" for k, v in spent._asdict().items() if v)
        self._journal.event(
            "recovered",
            self._goodput.step,
            f"generation {self._job.generation} steps on: {parts}",
            **spent._asdict(),
        )

    # ----------------------------------------------------------- closer looks

    def _ask(self, kind: str, now: float, early: bool = False) -> None:
        """Asks all ranks to look, from a step on that lies ahead of all."""
        if self._asked is not None:
            self._asked = self._asked._replace(early=self._asked.early and early)
            return
        rows = self._roster.rows.values()
        step = max((row.get("step", 0) for row in rows), default=0)
        pace = self._baseline.step if self._baseline.step > 0 else 1.0
        pace *= self._slowdown()
        ahead = 2 + math.ceil(AHEAD / pace)
        steps = min(max(math.ceil(LONG / pace) + 1, 3), look.STEPS)
        until = now + ANSWER + (ahead + steps) * pace
        self._number += 1
        self._asked = Asked(self._number, kind, until, early)
        self._roster.request(self._number, kind, step + ahead, steps)

    def _answered(self) -> Diagnosis | None:
        """What the ranks have found when they looked; None: nothing new."""
        while self._roster.answers:
            body = self._roster.answers.pop(0)
            try:
                found = self._looked(body)
            except (KeyError, TypeError, ValueError) as error:
                self._journal.event("refused", text=f"looked: {error!r}")
                continue
            if found is not None:
                return found
        return None

    def _looked(self, body: Mapping[str, Any]) -> Diagnosis | None:
        if self._asked is None or int(body["id"]) != self._asked.number:
            return None
        kind, early, self._asked = self._asked.kind, self._asked.early, None
        if "failed" in body:
            self._blind = True
            self._journal.event("blind", text=f"no profile: {body['failed']}")
            return None
        if kind == "probe":
            return self._links(body)
        times = look.read(body)
        if kind == "learn" or self._healthy is None:
            self._healthy = times
            text = f"knows a healthy step, {1e3 * self._baseline.step:.3g} ms"
            self._journal.event("learned", self._goodput.step, text)
            return None
        found = look.compare(self._healthy, times)
        if found.kind == Kind.COMM_SLOW and "delay" in body:
            links = self._links(body)
            found = links._replace(evidence=f"{found.evidence}; {links.evidence}")
        if early:
            self._early = found if found.ranks or found.links else None
            return None
        self._journal.event("looked", self._goodput.step, str(found))
        if not (found.ranks or found.links):
            self._rest = self._clock() + REST
        return found

    def _links(self, body: Mapping[str, Any]) -> Diagnosis:
        """What a probe says of them."""
        self._delay = reports.read_delays(body["delay"])
        self._journal.matrix(self._goodput.step, self._delay)
        return matrix.classify_matrix(self._delay)

    def _probe_hosts(self, diagnosis: Diagnosis) -> Diagnosis:
        """Which links carry nothing, by the agents' own connections."""
        delay = self._roster.probe()
        self._journal.matrix(self._goodput.step, delay)
        found = matrix.classify_hang(delay)
        return found if found.kind == Kind.COMM_HANG else diagnosis

    def _reordered(self, action: Action) -> tuple[Slot, ...]:
        """The members in an order whose ring avoids slow links."""
        order = plan.plan_order(self._delay)
        return tuple(action.members[i] for i in order)

    # ---------------------------------------------------------------- to people

    def _status(self, board: Board, now: float) -> None:
        pids = {rank: row.get("pid") for rank, row in self._roster.rows.items()}
        self._journal.status(self._job, board, pids, self._goodput, self._last, now)
