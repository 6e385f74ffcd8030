"""How long a collective matmul takes in each form, predicted from shapes and a chip.

A model, not a measurement: data-sheet rates, no contention between the wire and the
product for memory, no congestion. It is there to choose, and to refuse to overlap
where that would lose.

The forms are those of `jaxlab.overlap.matmul`; every one of the `size` devices does
the same, so one device's time is everybody's. With m = rows / size:

    product(m)  2 up(m) up(k) up(n) / peak, where up() rounds up to multiples of `tile`,
                or if longer (m k + k n + m n) itemsize / memory_rate
    step        `lanes` products of m / lanes rows, a launch for each and its transfers
    wire        a block's bytes / link_rate + a latency for each of its transfers; half
                of the bytes go each way round if bidirectional, and `both_ways`
    sum         of the block that arrived and the product: two reads and a write, at
                the memory's rate
    plain       product(rows) + (size - 1) wires of whole blocks + 2 launches
    gather      step + (size - 1) max(step, wire), with one lane for each direction
    scatter     2 half + (2 size - 2) max(half, wire / 2) if `chunks` is even: half of
                the lanes travel while products add what has arrived of the others;
                step + (size - 1) (max(step, wire) + sum) if it is odd
    reduce      scatter, and a plain all-gather of the result

A second lane of a gather also costs cutting a block. Derivatives of weights are part of
each step where they are summed there (`jaxlab.overlap.ring.SUMS`); else what arrives is
copied into its place, and a product comes after. The windows are those of the schedules
that libtpu makes for v5e: the slices of a product are read and written by itself, and
every block of a step has arrived before the next step begins.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxlab.overlap.ring import SUMS

Kind = Literal["gather", "scatter", "reduce"]
Mode = Literal["plain", "ring", "bidirectional"]

Form = tuple[Mode, int]
"""A mode and its chunks."""

FORMS: tuple[Form, ...] = (
    ("ring", 1),
    ("ring", 2),
    ("bidirectional", 1),
    ("bidirectional", 2),
)
"""The rings that `choose` tries. More chunks than two bring nothing in the model."""

MARGIN = 0.05
"""A ring must be predicted faster than plain by this part of plain's time: the model
is not good to less, and plain is the simpler program."""


@dataclass(frozen=True)
class Hardware:
    """One chip and its links in a ring, as far as the model knows them."""

    name: str
    """for messages"""
    peak: float
    """dense bfloat16 FLOP/s of one chip"""
    memory_rate: float
    """bytes/s of its main memory, reads and writes together"""
    link_rate: float
    """bytes/s to one neighbour in the ring"""
    latency: float
    """seconds before the first byte of a transfer"""
    both_ways: bool
    """both neighbours can be sent to at once, at `link_rate` each"""
    launch: float
    """seconds that one more product or collective costs"""
    tile: int
    """rows and columns of a product are rounded up to multiples of this"""
    overlaps: bool = True
    """a transfer runs beside a product; XLA on CPU runs one after the other"""
    copy_rate: float | None = None
    """bytes/s of an addition or a copy, reads and writes together; None:
    `memory_rate`"""
    forms: tuple[Form, ...] = FORMS
    """rings that its compiler schedules well, the only ones that `choose` takes"""


# Rates: Google Cloud's pages on TPU v5e, v5p and v6e. The interconnect is given there
# in Gbit/s of all links of a chip, one way: 1600 over 4, 4800 over 6 and 3200 over 4
# links (older versions of the v6e page say 3584, and 1640 GB/s of memory). A ring of
# the tensor axis has a link to either neighbour. Tiles: the sides of the matrix units.
# Latencies are assumptions, good to a factor of two. Launches: half of what libtpu
# estimates a block's product to take longer than its share of the whole one, in
# benchmarks/overlap_schedule.py: 2.5 to 2.9 us on v5e, 3.7 to 6.8 on v5p, 0 to 1.5 on
# v6e. Forms: both ways round products take 1.33 (forward) and 1.70 (gradient) times the
# cycles of the plain ones on v5p, and 1.67 on v6e, in the same table.
_ONE_WAY = FORMS[:2]
V5E = Hardware("TPU v5e", 197e12, 819e9, 50e9, 1e-6, True, 1.4e-6, 128)
V5P = Hardware(
    "TPU v5p", 459e12, 2765e9, 100e9, 1e-6, True, 2.6e-6, 128, forms=_ONE_WAY
)
V6E = Hardware(
    "TPU v6e", 918e12, 1600e9, 100e9, 1e-6, True, 0.7e-6, 256, forms=_ONE_WAY
)
# Rates: NVIDIA's data sheet of the H100 SXM. NVLink's 900 GB/s count both directions.
# All of a chip's links lead to the switch, so that two neighbours share the 450 GB/s
# and the other way round brings nothing. The latency is that of a send by NCCL. One
# chunk alone is covered throughout with XLA's default options as well.
ON_GPU = FORMS[:1]
H100 = Hardware("H100 SXM", 989e12, 3350e9, 450e9, 5e-6, False, 3e-6, 128, forms=ON_GPU)

HARDWARE = {"v5e": V5E, "v5p": V5P, "v6e": V6E, "h100": H100}
"""What is known, by short name."""

_KINDS = {
    "tpu v5 lite": V5E,
    "tpu v5e": V5E,
    "tpu v5": V5P,
    "tpu v5p": V5P,
    "tpu v6 lite": V6E,
    "tpu v6e": V6E,
    "nvidia h100 80gb hbm3": H100,  # other H100s have other memory and links
}


def find(device_kind: str) -> Hardware | None:
    """The hardware that a `jax.Device.device_kind` names; None: `measure` it."""
    return _KINDS.get(device_kind.strip().lower())


class Choice(NamedTuple):
    """The form that is predicted to be fastest."""

    mode: Mode
    chunks: int
    """1 for plain"""
    seconds: float
    """predicted, of the form chosen"""
    plain_seconds: float
    """predicted, of the plain form"""


class Shape(TypedDict):
    """A collective matmul on hardware: keyword arguments of `predict` and others."""

    rows: int
    """of the whole operand, gathered or still to be scattered"""
    k: int
    """contracted size on a device"""
    n: int
    """columns on a device, of all weights that share the operand"""
    size: int
    """devices in the ring"""
    itemsize: int
    """bytes of an element of what travels; the operands are taken to be as wide"""
    hardware: Hardware
    """the chips"""


def predict(
    kind: Kind,
    *,
    mode: Mode,
    chunks: int = 1,
    save_gathered: bool = False,
    **shape: Unpack[Shape],
) -> float:
    """Seconds that one collective matmul takes; the formulas are the module's.

    Args:
        kind: "gather" is `all_gather_matmul`, "scatter" `matmul_reduce_scatter` and
            "reduce" `matmul_all_reduce`.
        mode: the form; "bidirectional" has twice as many lanes as "ring".
        chunks: lanes in one direction; 1 if plain.
        save_gathered: a gather's ring keeps what it gathers, as the plain form does.
        shape: see `Shape`.

    Raises:
        ValueError: the rows do not divide among devices x lanes, or `chunks` does not
            go with the mode.
    """
    beside = _Beside()
    if save_gathered and kind == "gather":
        beside = _Beside(work=_copies(shape["k"], shape))
    return _seconds(kind, mode, chunks, beside, shape)


def predict_backward(
    kind: Kind,
    *,
    mode: Mode,
    chunks: int = 1,
    save_gathered: bool = False,
    **shape: Unpack[Shape],
) -> float:
    """Seconds of the derivatives by x and w of one collective matmul.

    A gather's is a scatter ring for dx, beside which x is gathered once more unless it
    was kept; a scatter's a gather ring; a reduce's has no communication.

    Args:
        kind: that of the forward pass, for which all that follows is meant as well;
            see `predict`.
        mode: the form.
        chunks: lanes in one direction.
        save_gathered: the forward pass kept what it gathered.
        shape: see `Shape`.

    Raises:
        ValueError: see `predict`.
    """
    rows, k, n, size = (shape[name] for name in ("rows", "k", "n", "size"))
    itemsize, hardware = shape["itemsize"], shape["hardware"]
    turned: Shape = {**shape, "k": n, "n": k}
    weights = _product(k, rows, n, itemsize, hardware) + hardware.launch
    if kind == "reduce":
        return _product(rows, n, k, itemsize, hardware) + hardware.launch + weights
    dual: Kind = "scatter" if kind == "gather" else "gather"
    beside = _Beside()
    if mode != "plain" and size > 1 and not (kind == "gather" and save_gathered):
        ways = 2 if mode == "bidirectional" else 1
        work = _copies(k if kind == "gather" else n, shape)
        if 4 * k * n <= SUMS:
            part = -(-rows // size // ways)
            work = ways * (_product(k, part, n, itemsize, hardware) + hardware.launch)
            weights = 0.0
        beside = _Beside(work, k if kind == "gather" else 0)
    return _seconds(dual, mode, chunks, beside, turned) + weights


def choose(
    kind: Kind,
    *,
    margin: float = MARGIN,
    backward: bool = False,
    save_gathered: bool = False,
    **shape: Unpack[Shape],
) -> Choice:
    """The form predicted to be fastest; plain unless a ring is, by a margin.

    Of the rings only those of `Hardware.forms` are tried.

    A form that wins forward can lose backward, where a gather's ring carries twice the
    bytes of the plain form, which kept what it gathered.

    Args:
        kind: see `predict`.
        margin: part of plain's time that a ring must save.
        backward: the function will be differentiated: the seconds are those of both
            passes, which have the same form.
        save_gathered: of `all_gather_matmul`; counts where there is a backward pass.
        shape: see `Shape`; for the hardware `find` and `measure`.
    """
    saved = save_gathered and backward

    def seconds(mode: Mode, chunks: int) -> float:
        form: dict[str, Any] = dict(mode=mode, chunks=chunks, save_gathered=saved)
        total = predict(kind, **form, **shape)
        return total + (predict_backward(kind, **form, **shape) if backward else 0.0)

    rows, size = shape["rows"], shape["size"]
    plain = seconds("plain", 1)
    best = Choice("plain", 1, plain, plain)
    if size == 1 or not shape["hardware"].overlaps:
        return best
    limit = (1 - margin) * plain
    for mode, chunks in shape["hardware"].forms:
        if rows % (size * chunks * (2 if mode == "bidirectional" else 1)):
            continue
        found = seconds(mode, chunks)
        if found < min(limit, best.seconds):
            best = Choice(mode, chunks, found, plain)
    return best


class _Beside(NamedTuple):
    """What is done in each step of a ring besides its own."""

    work: float = 0.0
    """seconds"""
    columns: int = 0
    """of an array that is gathered beside a scatter, the other way round"""


def _copies(columns: int, shape: Shape) -> float:
    """Seconds of a read and a write of so many columns of a block."""
    hardware = shape["hardware"]
    rate = hardware.copy_rate or hardware.memory_rate
    return 2 * columns * shape["rows"] / shape["size"] * shape["itemsize"] / rate


def _seconds(
    kind: Kind, mode: Mode, chunks: int, beside: _Beside, shape: Shape
) -> float:
    if chunks < 1 or (mode == "plain" and chunks != 1):
        raise ValueError(f"{chunks} chunks of mode {mode!r}: at least 1, plain just 1")
    rows, k, n, size = (shape[name] for name in ("rows", "k", "n", "size"))
    itemsize, hardware = shape["itemsize"], shape["hardware"]
    columns = k if kind == "gather" else n
    block = rows / size * columns * itemsize
    gather = (size - 1) * _plain_wire(block, hardware) + hardware.launch
    if mode == "plain" or size == 1:
        product = _product(rows, k, n, itemsize, hardware) + hardware.launch
        collectives = 0 if size == 1 else 2 if kind == "reduce" else 1
        return product + collectives * gather
    ways = 2 if mode == "bidirectional" else 1
    lanes = chunks * ways
    if rows % (size * lanes):
        raise ValueError(
            f"{rows} rows do not divide among {size} devices x {lanes} lanes"
        )
    lanes = ways if kind == "gather" else lanes
    step = lanes * _product(rows // size // lanes, k, n, itemsize, hardware)
    step += (2 * lanes + (ways if beside.columns else 0)) * hardware.launch
    step += beside.work
    extra = rows / size * beside.columns * itemsize
    wire = _ring_wire(block, extra, lanes, ways, hardware)
    once = gather if kind == "reduce" else 0.0
    if kind == "gather":
        once += _copies(k, shape) if ways == 2 else 0.0  # cut
    apart = kind != "gather" and chunks % 2 == 0
    addition = 0.0 if kind == "gather" or apart else 1.5 * _copies(n, shape)
    if not hardware.overlaps:
        return once + size * step + (size - 1) * (wire + addition)
    if apart:
        return once + step + (size - 1) * max(step, wire)
    return once + step + (size - 1) * (max(step, wire) + addition)


def _product(m: int, k: int, n: int, itemsize: int, hardware: Hardware) -> float:
    """Seconds of [m, k] @ [k, n]: what the matrix unit or the memory needs."""

    def up(size: int) -> int:
        return -(-size // hardware.tile) * hardware.tile

    moved = (m * k + k * n + m * n) * itemsize
    return max(2 * up(m) * up(k) * up(n) / hardware.peak, moved / hardware.memory_rate)


def _plain_wire(block: float, hardware: Hardware) -> float:
    """Seconds of a step of XLA's own collective, which uses all there is."""
    ways = 2 if hardware.both_ways else 1
    return block / (ways * hardware.link_rate) + hardware.latency


def _ring_wire(
    block: float, beside: float, lanes: int, ways: int, hardware: Hardware
) -> float:
    """Seconds of a step of the ring: `lanes` transfers of `block` bytes in all.

    `beside`, if any, makes a transfer for each direction, against that of the block.
    """
    if ways == 2:
        each_way = ((block + beside) / 2, lanes // 2 + bool(beside))
        other = each_way
    else:
        each_way, other = (block, lanes), (beside, int(bool(beside)))
    seconds = [
        carried / hardware.link_rate + transfers * hardware.latency
        for carried, transfers in (each_way, other)
    ]
    return max(seconds) if hardware.both_ways else sum(seconds)


# ------------------------------------------------------------- unknown hardware


def measure(devices: Any = None) -> Hardware:
    """Hardware as measured on the devices that are here, in a few seconds.

    All devices work at once, as they will. Each number is the median of five timings:
    of a product, an addition, small and large permutes in one and in both directions,
    and chains of small products.

    Args:
        devices: sequence of the `jax.Device`s of the ring; None: all.

    Raises:
        ValueError: there are no devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("no devices to measure")
    cpu = devices[0].platform == "cpu"
    mesh = Mesh(np.array(devices), ("ring",), axis_types=(AxisType.Auto,))
    count = len(devices)

    def timed(body: Callable[..., Any], repeats: int, *shape: int) -> float:
        """Median seconds of one of `repeats` calls in a program, on every device."""
        spec = PartitionSpec("ring")
        many = jax.jit(
            jax.shard_map(
                lambda x: lax.fori_loop(0, repeats, lambda _, y: body(y), x),
                mesh=mesh,
                in_specs=spec,
                out_specs=spec,
            )
        )
        dtype = jnp.float32 if cpu else jnp.bfloat16
        x = jax.device_put(
            jnp.zeros((count * shape[0], *shape[1:]), dtype),
            jax.NamedSharding(mesh, spec),
        )
        jax.block_until_ready(many(x))
        found = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(many(x))
            found.append(time.perf_counter() - start)
        return statistics.median(found) / repeats

    def permute(x: jax.Array, shift: int) -> jax.Array:
        pairs = [(i, (i + shift) % count) for i in range(count)]
        return lax.ppermute(x, "ring", pairs)

    def both(x: jax.Array) -> jax.Array:
        halves = jnp.split(x, 2)
        return jnp.concatenate([permute(halves[0], 1), permute(halves[1], -1)])

    tile = 16 if cpu else 128
    side = 384 if cpu else 8192
    words = 2**20 if cpu else 2**27
    itemsize = 4 if cpu else 2
    product = timed(lambda x: x @ x, 4, side, side)
    addition = timed(lambda x: x + 1, 4, words)
    small = timed(lambda x: permute(x, 1), 8, 256)
    large = timed(lambda x: permute(x, 1), 4, words)
    large_both = timed(both, 4, words)
    launch = timed(lambda x: x @ x, 64, tile, tile)
    return Hardware(
        name=f"{devices[0].device_kind} (measured)",
        peak=2 * side**3 / product,
        memory_rate=2 * words * itemsize / addition,
        link_rate=words * itemsize / max(large - small, large / 2),
        latency=small,
        both_ways=count > 2 and large_both < 0.75 * large,
        launch=launch,
        tile=tile,
        overlaps=not cpu,
        forms=ON_GPU if devices[0].platform == "gpu" else FORMS,
    )
