"""T3's system (arXiv 2401.16677) as a simulation of events, without its hardware.

A GEMM whose result is summed over a ring of devices, as in a layer cut by tensor
parallelism: first the GEMM, then a ring reduce-scatter, then a ring all-gather. T3
sends each piece of the result as soon as it is made. Five policies:

    sequential  one after the other, as today; compute units do the sums
    t3          GEMM and reduce-scatter fused: a tracker in the memory controller counts
                what is stored to a piece of the result, a full count triggers a DMA to
                the next device, and memory adds what arrives to what it holds. GEMM and
                DMA share the memory evenly
    t3_mca      the same, but the GEMM's memory requests go first (arbitration)
    ideal       GEMM and reduce-scatter of `sequential` at once, neither disturbed
    ideal_nmc   the same with T3's GEMM, and sums near memory

All devices do the same at the same time, each with another piece (T3 staggers them), so
one is simulated: when its piece has left, its neighbour's has arrived. Events are the
beginnings and ends of GEMM stages (one workgroup on each compute unit), of transfers
and of the memory traffic of both; between two events all rates are constant.

`Hardware`'s defaults are the paper's machine, as far as public summaries describe it;
the rest is marked there as an assumption. One figure of the paper chose between two
readings of the link's rate; nothing was fitted to the others.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Policy = Literal["sequential", "t3", "t3_mca", "ideal", "ideal_nmc"]


@dataclass(frozen=True)
class Hardware:
    """A device and its link to the next one in the ring."""

    compute_units: int = 80
    clock: float = 1.4e9
    """Hz"""
    flops_per_cycle: float = 1024.0
    """of one compute unit, float16; assumption: that of AMD's MI210"""
    efficiency: float = 0.62
    """of the compute units in a GEMM; assumption"""
    cache: float = 16 * 2.0**20
    """bytes of the last-level cache"""
    memory_rate: float = 1e12
    """bytes/s, reads and writes together"""
    link_rate: float = 150e9
    """bytes/s to the next device. The paper's "150 GB/s, bidirectional" is read as 150
    each way: then sums near memory speed a reduce-scatter up by 6 % on 8 devices and
    3 % on 16, where the paper has 7 and 3; with 75 it would be 3 and 2"""
    latency: float = 500e-9
    """seconds before the first byte of a transfer"""
    tile: int = 128
    """rows and columns of the result that a workgroup makes; assumption"""
    slab: int = 64
    """what a workgroup reads of the contracted dimension before it can start;
    assumption"""
    update_cost: float = 2.0
    """time of adding to a byte in memory, in times of writing it; assumption"""
    floor: float = 0.1
    """part of the memory's rate that transfers get where the GEMM goes first;
    assumption"""

    @property
    def flop_rate(self) -> float:
        """FLOP/s of a GEMM that waits for nothing."""
        return self.compute_units * self.clock * self.flops_per_cycle * self.efficiency


@dataclass(frozen=True)
class Sublayer:
    """A GEMM [m, k] @ [k, n] on each device, whose results are summed over all."""

    name: str
    m: int
    n: int
    k: int
    """on one device"""
    devices: int
    itemsize: int = 2

    @property
    def flops(self) -> float:
        """Of one device."""
        return 2.0 * self.m * self.n * self.k

    @property
    def result(self) -> float:
        """Bytes of the result."""
        return float(self.m) * self.n * self.itemsize

    @property
    def chunk(self) -> float:
        """Bytes of the result that one device owns."""
        return self.result / self.devices


class Traffic(NamedTuple):
    """Bytes that one device reads from and writes to its memory."""

    gemm_reads: float
    gemm_writes: float
    scatter_reads: float
    scatter_writes: float
    gather_reads: float
    gather_writes: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)

    @property
    def fused(self) -> float:
        """Without the all-gather."""
        return sum(self[:4])


class Result(NamedTuple):
    """What a policy takes; seconds and bytes of one device."""

    seconds: float
    """all of it"""
    gemm_seconds: float
    """until the GEMM ended"""
    scatter_seconds: float
    """of the reduce-scatter alone; if fused, of both: until the last sum was there"""
    gather_seconds: float
    """of the all-gather, which nothing overlaps"""
    traffic: Traffic
    sent: float
    """bytes over the link"""
    received: float
    events: int


# ---------------------------------------------------------------------- the machine


Tag = tuple[int, int]
"""Chunk and piece, in the order in which a device makes them."""


class _Stage(NamedTuple):
    """A part of the GEMM: first reads `fill`, then works while `memory` moves."""

    tag: Tag
    seconds: float
    fill: float
    memory: float
    result: float
    """bytes made"""


class _Transfer(NamedTuple):
    """A piece on its way, and the mirrored one that arrives meanwhile."""

    tag: Tag
    link: float
    memory: float
    """what both cost this device's memory, updates by their cost"""
    latency: float


class _Played(NamedTuple):
    """What the machine did."""

    seconds: float
    computed: float
    """when the last stage ended"""
    sent: float
    received: float
    memory: float
    """bytes moved, updates by their cost"""
    events: int


Sends = Iterable[_Transfer]
React = Callable[[Tag], Sends]


def _play(
    hardware: Hardware,
    *,
    compute_first: bool = False,
    stages: Iterable[_Stage] = (),
    sends: Sends = (),
    finished: React = lambda tag: (),
    arrived: React = lambda tag: (),
) -> _Played:
    """Runs until nothing is left to do.

    Stages run one after the other, and so do the transfers over the link. `finished`
    and `arrived` are told of the end of a stage and the arrival of a piece, and say
    what can be sent then.
    """
    waiting, queue = deque(stages), deque(sends)
    flying: list[tuple[float, Tag, float]] = []
    stage, transfer = None, None
    # What is left of a stage's fill, seconds and memory, and of a transfer.
    fill = work = reads = wire = moves = 0.0
    now = computed = sent = received = memory = 0.0
    events = 0
    while waiting or queue or flying or stage or transfer:
        if stage is None and waiting:
            stage = waiting.popleft()
            _, work, fill, reads, _ = stage
        if transfer is None and queue:
            transfer = queue.popleft()
            _, wire, moves, _ = transfer
        wanted = fill or reads  # the stage's memory traffic at the moment
        # A transfer's memory traffic keeps pace with the link, a stage's with the work.
        pace = paced = hardware.memory_rate
        if transfer is not None and wire:
            pace = min(pace, moves / wire * hardware.link_rate)
        if work and not fill:
            paced = min(paced, reads / work)
        theirs = (pace if moves else 0.0, paced if wanted else 0.0)
        share = hardware.floor if compute_first else 0.5
        slow, fast = _shares(*theirs, hardware.memory_rate, share)
        left = [flying[0][0] - now] if flying else []
        left += [wanted / fast] if wanted and fast else []
        left += [work] if work and not fill else []
        left += [wire / hardware.link_rate] if wire else []
        left += [moves / slow] if moves and slow else []
        dt = max(0.0, min(left, default=0.0))
        now += dt
        events += 1
        memory += dt * ((slow if moves else 0.0) + (fast if wanted else 0.0))
        moves = _less(moves, dt * slow)
        wire = _less(wire, dt * hardware.link_rate)
        if fill:
            fill = _less(fill, dt * fast)
        else:
            work, reads = _less(work, dt), _less(reads, dt * fast)
        if stage is not None and not (fill or work or reads):
            computed = now
            queue.extend(finished(stage.tag))
            stage = None
        if transfer is not None and not (wire or moves):
            sent += transfer.link
            heapq.heappush(
                flying, (now + transfer.latency, transfer.tag, transfer.link)
            )
            transfer = None
        while flying and flying[0][0] <= now:
            _, tag, size = heapq.heappop(flying)
            received += size
            queue.extend(arrived(tag))
    return _Played(now, computed, sent, received, memory, events)


def _shares(slow: float, fast: float, rate: float, share: float) -> tuple[float, float]:
    """Rates of transfers and GEMM, that want `slow` and `fast`: all that fits.

    Where both do not fit, the transfers are sure of `share` of the rate and the GEMM of
    the rest, and what one leaves is for the other.
    """
    if fast <= (1 - share) * rate:
        return min(slow, rate - fast), fast
    mine = min(slow, share * rate)
    return mine, min(fast, rate - mine)


def _less(amount: float, by: float) -> float:
    """The amount that is left, where next to nothing is nothing."""
    return amount - by if amount - by > 1e-9 * amount else 0.0


# ------------------------------------------------------------------------ the GEMM


def _stages(sublayer: Sublayer, hardware: Hardware, *, fused: bool) -> list[_Stage]:
    """Stages in the order of the chunks, each with its reads and writes.

    The workgroups go along the rows of the result. Each stage streams its own rows of
    the left operand and goes over the columns of the right one again; of these the
    cache keeps what fits beside the rest of the stage. T3 does not keep results in the
    cache, and sends those of the first chunk away instead of storing them.
    """
    stages: list[_Stage] = []
    seen = 0.0  # bytes of the right operand that have been read at least once
    size, tile = sublayer.itemsize, hardware.tile
    most = float(hardware.compute_units * tile * tile)  # results of a stage
    chunk = sublayer.m * sublayer.n / sublayer.devices
    left_bytes = float(sublayer.m * sublayer.k * size)
    right_bytes = float(sublayer.k * sublayer.n * size)
    for i in range(sublayer.devices):
        remaining, piece = chunk, 0
        while remaining > 1e-6 * chunk:
            area = min(most, remaining)
            part = area / (sublayer.m * sublayer.n)
            rows = left_bytes * part
            columns = min(1.0, area / (tile * sublayer.n)) * right_bytes
            beside = rows + (0.0 if fused else area * size)
            kept = min(1.0, max(0.0, hardware.cache - beside) / right_bytes)
            new = min(columns, right_bytes - seen)
            seen += new
            reads = rows + new + (columns - new) * (1.0 - kept)
            fill = reads * min(1.0, hardware.slab / sublayer.k)
            stored = area * size
            if fused:
                stored *= hardware.update_cost if i else 0.0
            seconds = sublayer.flops * part / hardware.flop_rate
            rest = reads - fill + stored
            stages.append(_Stage((i, piece), seconds, fill, rest, area * size))
            remaining -= area
            piece += 1
    return stages


def _gemm_traffic(
    sublayer: Sublayer, hardware: Hardware, *, fused: bool
) -> tuple[float, float]:
    """Bytes that a GEMM reads and writes."""
    stages = _stages(sublayer, hardware, fused=fused)
    moved = sum(s.fill + s.memory for s in stages)
    writes = sublayer.result - (sublayer.chunk if fused else 0.0)
    return moved - writes * (hardware.update_cost if fused else 1.0), writes


# ---------------------------------------------------------------- rings, and fused


def _ring(sublayer: Sublayer, hardware: Hardware, costs: list[float]) -> _Played:
    """A chunk after the other over the link, each once the last one has arrived.

    Args:
        sublayer: for the bytes of a chunk.
        hardware: the machine.
        costs: what each step moves in memory, in chunks.
    """

    def step(s: int) -> list[_Transfer]:
        if s == len(costs):
            return []
        memory = costs[s] * sublayer.chunk
        return [_Transfer((s, 0), sublayer.chunk, memory, hardware.latency)]

    return _play(hardware, sends=step(0), arrived=lambda tag: step(tag[0] + 1))


def _reduce_scatter(sublayer: Sublayer, hardware: Hardware) -> _Played:
    """By compute units: each step reads the sum so far and the own chunk, and sends.

    The last sum is made once all has arrived; the earlier ones are made as they leave.
    """
    steps = sublayer.devices - 1
    ring = _ring(sublayer, hardware, [2.0] * min(1, steps) + [3.0] * (steps - 1))
    if not steps:
        return ring
    last = _play(hardware, sends=[_Transfer((0, 0), 0.0, 3 * sublayer.chunk, 0.0)])
    return ring._replace(
        seconds=ring.seconds + last.seconds,
        memory=ring.memory + last.memory,
        events=ring.events + last.events,
    )


def _reduce_scatter_near_memory(sublayer: Sublayer, hardware: Hardware) -> _Played:
    costs = [1.0 + hardware.update_cost] * (sublayer.devices - 1)
    return _ring(sublayer, hardware, costs)


def _all_gather(sublayer: Sublayer, hardware: Hardware) -> _Played:
    return _ring(sublayer, hardware, [2.0] * (sublayer.devices - 1))


def _fused(sublayer: Sublayer, hardware: Hardware, *, compute_first: bool) -> _Played:
    """T3: the tracker counts what is stored to each piece, and triggers its DMA.

    A piece of the first chunk goes to the next device straight from the GEMM. Any other
    is complete when this device's stage and the last device's piece are both in it. The
    last chunk stays.
    """
    stages = _stages(sublayer, hardware, fused=True)
    sizes = {s.tag: s.result for s in stages}
    last = sublayer.devices - 1
    tracker: Counter[Tag] = Counter()

    def send(tag: Tag) -> list[_Transfer]:
        size = sizes[tag]
        read = size if tag[0] else 0.0
        memory = read + size * hardware.update_cost
        return [_Transfer(tag, size, memory, hardware.latency)]

    def stored(tag: Tag) -> list[_Transfer]:
        tracker[tag] += 1
        complete = tracker[tag] == (2 if tag[0] else 1)
        return send(tag) if complete and tag[0] < last else []

    return _play(
        hardware,
        compute_first=compute_first,
        stages=stages,
        finished=stored,
        arrived=lambda tag: stored((tag[0] + 1, tag[1])),
    )


def run(sublayer: Sublayer, hardware: Hardware, policy: Policy) -> Result:
    """Simulates one sublayer on one device of the ring.

    Args:
        sublayer: the GEMM and the number of devices.
        hardware: the machine.
        policy: see the module.

    Raises:
        ValueError: no such policy, or fewer than two devices.
    """
    if sublayer.devices < 2:
        raise ValueError(f"{sublayer.devices} devices are no ring")
    if policy not in ("sequential", "t3", "t3_mca", "ideal", "ideal_nmc"):
        raise ValueError(f"no policy {policy!r}")
    near_memory = policy in ("t3", "t3_mca", "ideal_nmc")
    gather = _all_gather(sublayer, hardware)
    traffic = _traffic(sublayer, hardware, policy)
    if policy in ("t3", "t3_mca"):
        both = _fused(sublayer, hardware, compute_first=policy == "t3_mca")
        return Result(
            both.seconds + gather.seconds,
            both.computed,
            both.seconds,
            gather.seconds,
            traffic,
            both.sent + gather.sent,
            both.received + gather.received,
            both.events + gather.events,
        )
    gemm = _play(hardware, stages=_stages(sublayer, hardware, fused=near_memory))
    ring = _reduce_scatter_near_memory if near_memory else _reduce_scatter
    scatter = ring(sublayer, hardware)
    together = max if policy != "sequential" else lambda a, b: a + b
    return Result(
        together(gemm.seconds, scatter.seconds) + gather.seconds,
        gemm.seconds,
        scatter.seconds,
        gather.seconds,
        traffic,
        scatter.sent + gather.sent,
        scatter.received + gather.received,
        gemm.events + scatter.events + gather.events,
    )


def _traffic(sublayer: Sublayer, hardware: Hardware, policy: Policy) -> Traffic:
    """Bytes in memory, counted.

    A ring by compute units reads 2 N - 1 chunks and writes N. Near memory N - 1 chunks
    arrive, and T3 reads only N - 2: the first goes straight from the GEMM.
    """
    count, chunk = sublayer.devices, sublayer.chunk
    fused = policy in ("t3", "t3_mca")
    near_memory = fused or policy == "ideal_nmc"
    reads, writes = _gemm_traffic(sublayer, hardware, fused=near_memory)
    if policy == "ideal_nmc":
        writes = sublayer.result
    steps = (count - 1) * chunk
    scatter = (2 * count - 1) * chunk if not near_memory else steps
    scatter -= chunk if fused else 0.0
    arriving = steps if near_memory else count * chunk
    return Traffic(reads, writes, scatter, arriving, steps, steps)
