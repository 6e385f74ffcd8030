"""The Pallas TPU kernels of `jaxlab.overlap.pallas`, and the choice of their tiles.

Only tiles are in VMEM; arrays stay where XLA has put them, HBM unless they are small.
The grid is (step of the ring, rows, columns, inner), the last one fastest. The scatter
starts with the block that has farthest to travel. Rows, columns and an inner dimension
that fill no whole tile are padded with zeros around the kernel, which costs a copy of
that array.

A kernel of a ring relies on three things:
- no device sends before its neighbours have entered the kernel: they meet first;
- what a copy reads is not overwritten before it has left: `_wait_sent`;
- where it lands nothing is still unread. The gather has a place for every block. The
  scatter has two for each tile, and a semaphore that counts the tiles that have been
  taken out: `_wait_room`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Columns of a hardware tile, and rows of the weights."""

ANY = pl.BlockSpec(memory_space=pl.ANY)
"""Stays where it is, and the kernel copies from it and to it."""

SEMAPHORES = 256
"""Most that track arrivals; TPU v5e has 512 in all. More tiles share them."""

SCOPED_VMEM = 16 * 2**20
"""Bytes of VMEM that the compiler gives to a kernel that does not ask for more."""


class Plan(NamedTuple):
    """The static arguments of a kernel."""

    axes: tuple[str, ...]  # of the mesh
    place: int  # of the ring's axis among them
    size: int
    tiles: Any  # rows, inner, columns; None: `_tiles`
    result: Any
    precision: Any
    collective_id: int
    interpret: Any

    @property
    def axis_name(self) -> str:
        """Mesh axis of the ring."""
        return self.axes[self.place]

    @property
    def dual(self) -> "Plan":
        """The plan of the derivative for x: columns and inner change places."""
        tiles = self.tiles and (self.tiles[0], self.tiles[2], self.tiles[1])
        return self._replace(tiles=tiles)

    def fitted(self, rows: int, k: int, n: int, dtype: Any):
        """The plan with its tiles, and the grid, for a block of so many rows."""
        sizes = dtype.itemsize, self.result.itemsize
        tm, tk, tn = tiles = self.tiles or _tiles(rows, k, n, *sizes)
        grid = self.size, pl.cdiv(rows, tm), pl.cdiv(n, tn), pl.cdiv(k, tk)
        return self._replace(tiles=tiles), grid

    def neighbour(self, me_ref: Any, shift: int) -> dict[str, Any]:
        """Mesh coordinates of the device that is `shift` further along the ring."""
        coordinates = {axis: me_ref[i] for i, axis in enumerate(self.axes)}
        there = lax.rem(me_ref[self.place] + shift + self.size, self.size)
        return coordinates | {self.axis_name: there}

    def dot(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """The product, summed in float32."""
        return jnp.dot(
            x, w, precision=self.precision, preferred_element_type=jnp.float32
        )


# ------------------------------------------------- what keeps a ring in order


def _meet(plan: Plan, me_ref: Any) -> None:
    """Waits until both neighbours are here too: only then are their buffers ours."""
    barrier = pltpu.get_barrier_semaphore()
    for shift in (-1, 1):
        pl.semaphore_signal(barrier, 1, device_id=plan.neighbour(me_ref, shift))
    pl.semaphore_wait(barrier, 2)


def _wait_arrival(ref: Any, semaphore: Any) -> None:
    """The tracker: all bytes of `ref`, which a DMA semaphore counts, are written."""
    pltpu.make_async_copy(ref, ref, semaphore).wait()


def _wait_sent(ref: Any, semaphore: Any) -> None:
    """`ref` has been read by the copy out of it."""
    pltpu.make_async_copy(ref, ref, semaphore).wait()


def _wait_room(semaphore: Any) -> None:
    """The neighbour has taken out what lies where the next tile will land."""
    pl.semaphore_wait(semaphore, 1)


def _multiply(plan: Plan, grid: Any, k: Any, sum_ref: Any, x: Any, w: Any) -> None:
    """Adds to the sum over the inner dimension, or is all of it."""
    if grid[-1] == 1:
        sum_ref[...] = plan.dot(x, w)
        return

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += plan.dot(x, w)


# -------------------------------------------------------- multiply and scatter


def _scatter_kernel(plan, grid, me_ref, x_ref, w_ref, y_ref, inbox_ref, *scratch):
    """One product of tiles; after a tile's last one, its sum goes on to i + 1.

    At step s device i adds to the sum that is on its way to device i - s - 1. Between
    arrival and addition lies a copy from HBM to VMEM; asking for the arrival before the
    tile's last product, not after it, hides that copy.
    """
    sum_ref, taken_ref, stage_ref, take_sem, leave_sems, arrive_sems, room_sem = scratch
    s, i, j, k = (pl.program_id(d) for d in range(4))
    (_, rows, columns, inner), last = grid, plan.size - 1
    share = pl.cdiv(2 * rows * columns, SEMAPHORES)
    tile = i * columns + j
    number = s * rows * columns + tile
    here, there, slot = lax.rem(s, 2), lax.rem(s + 1, 2), lax.rem(number, 2)
    take = pltpu.make_async_copy(inbox_ref.at[here, tile], taken_ref, take_sem)
    pl.when(number + k == 0)(lambda: _meet(plan, me_ref))

    @pl.when((k == inner - 1) & (s > 0))
    def _():
        @pl.when(lax.rem(tile, share) == 0)
        def _():
            @pl.loop(tile, jnp.minimum(tile + share, rows * columns))
            def _(each):
                arrive = arrive_sems.at[here, lax.div(tile, share)]
                _wait_arrival(inbox_ref.at[here, each], arrive)

        take.start()

    _multiply(plan, grid, k, sum_ref, x_ref[...], w_ref[...])

    @pl.when(k == inner - 1)
    def _():
        stage, leave = stage_ref.at[slot], leave_sems.at[slot]
        pl.when(number >= 2)(lambda: _wait_sent(stage, leave))

        @pl.when(s == 0)
        def _():
            stage[...] = sum_ref[...].astype(stage.dtype)

        @pl.when(s > 0)
        def _():
            take.wait()
            total = sum_ref[...] + taken_ref[...].astype(jnp.float32)
            stage[...] = total.astype(stage.dtype)

        @pl.when((s > 0) & (s + 2 <= last))  # more will land in the same place
        def _():
            pl.semaphore_signal(room_sem, 1, device_id=plan.neighbour(me_ref, -1))

        pl.when((s >= 2) & (s < last))(lambda: _wait_room(room_sem))

        @pl.when(s < last)
        def _():
            to, right = inbox_ref.at[there, tile], plan.neighbour(me_ref, 1)
            arrive = arrive_sems.at[there, lax.div(tile, share)]
            pltpu.make_async_remote_copy(stage, to, leave, arrive, right).start()

        @pl.when(s == last)
        def _():
            tm, _, tn = plan.tiles
            mine = y_ref.at[pl.ds(i * tm, tm), pl.ds(j * tn, tn)]
            pltpu.make_async_copy(stage, mine, leave).start()

        @pl.when(number == plan.size * rows * columns - 1)
        def _():
            for each in range(2):
                _wait_sent(stage_ref.at[each], leave_sems.at[each])


def scatter(plan: Plan, x: jax.Array, w: jax.Array) -> jax.Array:
    """[m, k] and [k, n] to [m / N, n]."""
    each, (k, n) = x.shape[0] // plan.size, w.shape
    plan, grid = plan.fitted(each, k, n, x.dtype)
    (_, rows, columns, inner), (tm, tk, tn) = grid, plan.tiles
    x = _pad(x.reshape(plan.size, each, k), (plan.size, rows * tm, inner * tk))

    def block_of_x(s, i, j, k, me):
        return lax.rem(me[plan.place] - s - 1 + 2 * plan.size, plan.size) * rows + i, k

    outs = [((rows * tm, columns * tn), plan.result)]
    outs += [((2, rows * columns, tm, tn), plan.result)]
    share = pl.cdiv(2 * rows * columns, SEMAPHORES)
    scratch = [
        pltpu.VMEM((tm, tn), plan.result),
        pltpu.VMEM((2, tm, tn), plan.result),
        pltpu.SemaphoreType.DMA,
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2, pl.cdiv(rows * columns, share))),
        pltpu.SemaphoreType.REGULAR,
    ]
    specs = [pl.BlockSpec((tm, tk), block_of_x), ANY, ANY]
    x = x.reshape(-1, inner * tk)
    return _call(plan, grid, _scatter_kernel, x, w, outs, specs, scratch)[0][:each, :n]


# --------------------------------------------------------- gather and multiply


def _gather_kernel(plan, grid, me_ref, x_ref, w_ref, y_ref, whole_ref, *scratch):
    """One product of tiles, while the next tile of x comes from HBM.

    At step s device i multiplies the block of device i + s. Once the rows of a tile
    have arrived they go on to device i - 1, and only then into the product.
    """
    sum_ref, tile_ref, load_sems, leave_sem, arrive_sems = scratch
    me, last = me_ref[plan.place], plan.size - 1
    s, i, j, k = (pl.program_id(d) for d in range(4))
    _, rows, columns, inner = grid
    share = pl.cdiv(plan.size * rows, SEMAPHORES)
    tm, tk, _ = plan.tiles
    number = ((s * rows + i) * columns + j) * inner + k
    slot = lax.rem(number, 2)

    def rows_of(s, i):
        return whole_ref.at[lax.rem(me + s, plan.size), pl.ds(i * tm, tm)]

    def load(s, i, k, slot):
        tile = rows_of(s, i).at[:, pl.ds(k * tk, tk)]
        return pltpu.make_async_copy(tile, tile_ref.at[slot], load_sems.at[slot])

    def receive(s, i):
        """All rows that share a semaphore, as soon as the first ones are wanted."""
        arrive, group = lax.div(i, share), (i, jnp.minimum(i + share, rows))

        @pl.loop(*group)
        def _(each):
            _wait_arrival(rows_of(s, each), arrive_sems.at[s, arrive])

        @pl.when(s < last)
        def _():
            there, left = arrive_sems.at[s + 1, arrive], plan.neighbour(me_ref, -1)

            @pl.loop(*group)
            def _(each):
                here = rows_of(s, each)
                pltpu.make_async_remote_copy(here, here, leave_sem, there, left).start()

    @pl.when(number == 0)
    def _():
        @pl.loop(0, rows)
        def _(i):  # the device's own block arrives from within
            own = x_ref.at[pl.ds(i * tm, tm)]
            arrive = arrive_sems.at[0, lax.div(i, share)]
            pltpu.make_async_copy(own, rows_of(0, i), arrive).start()

        _meet(plan, me_ref)
        receive(0, 0)
        load(0, 0, 0, 0).start()

    same = (k + 1 < inner) | (j + 1 < columns)
    next_i = jnp.where(same, i, lax.rem(i + 1, rows))
    next_s = jnp.where(same | (i + 1 < rows), s, s + 1)

    @pl.when(next_s <= last)
    def _():
        @pl.when(jnp.logical_not(same) & (lax.rem(next_i, share) == 0))
        def _():
            receive(next_s, next_i)

        load(next_s, next_i, lax.rem(k + 1, inner), 1 - slot).start()

    load(s, i, k, slot).wait()
    _multiply(plan, grid, k, sum_ref, tile_ref[slot], w_ref[...])

    @pl.when(k == inner - 1)
    def _():
        y_ref[...] = sum_ref[...].astype(y_ref.dtype)

    @pl.when(next_s > last)
    def _():
        @pl.loop(0, last * rows)
        def _(_):
            _wait_sent(rows_of(0, 0), leave_sem)


def gather(plan: Plan, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[m, k] and [k, n] to [N m, n], and x gathered."""
    each, (k, n) = x.shape[0], w.shape
    plan, grid = plan.fitted(each, k, n, x.dtype)
    (_, rows, columns, inner), (tm, tk, tn) = grid, plan.tiles

    def block_of_y(s, i, j, k, me):
        return lax.rem(me[plan.place] + s, plan.size) * rows + i, j

    outs = [((plan.size * rows * tm, columns * tn), plan.result)]
    outs += [((plan.size, rows * tm, inner * tk), x.dtype)]
    share = pl.cdiv(plan.size * rows, SEMAPHORES)
    scratch = [
        pltpu.VMEM((2, tm, tk), x.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA,
        pltpu.SemaphoreType.DMA((plan.size, pl.cdiv(rows, share))),
    ]
    specs = [ANY, pl.BlockSpec((tm, tn), block_of_y), ANY]
    x = _pad(x, (rows * tm, inner * tk))
    y, whole = _call(plan, grid, _gather_kernel, x, w, outs, specs, scratch)
    y = y.reshape(plan.size, rows * tm, -1)[:, :each, :n]
    return y.reshape(-1, n), whole[:, :each, :k].reshape(-1, k)


# ------------------------------------------------------------ calls and tiles


def _call(plan: Plan, grid, kernel, x, w, outs, specs, scratch):
    """The kernel on padded x and w; `specs` are those of x and of the results."""
    (tm, tk, tn), (_, _, columns, inner) = plan.tiles, grid
    w = _pad(w, (inner * tk, columns * tn))
    w_spec = pl.BlockSpec((tk, tn), lambda s, i, j, k, me: (k, j))
    # All coordinates: Pallas cannot add those that are missing where shard_map checks
    # what varies over the mesh (JAX 0.10.2: "Unimplemented primitive ... pvary").
    me = jnp.stack([lax.axis_index(axis) for axis in plan.axes])
    vary = jax.typeof(x).manual_axis_type
    given, products = x.dtype.itemsize, math.prod(grid)
    # Inputs in twos, three results, the sum and what the compiler puts beside them.
    vmem = 3 * given * tk * (tm + tn) + tm * tn * (16 + 3 * plan.result.itemsize)
    return pl.pallas_call(
        functools.partial(kernel, plan, grid),
        [jax.ShapeDtypeStruct(*out, manual_axis_type=vary) for out in outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[specs[0], w_spec],
            out_specs=specs[1:],
            scratch_shapes=[pltpu.VMEM((tm, tn), jnp.float32), *scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            collective_id=plan.collective_id,
            vmem_limit_bytes=max(SCOPED_VMEM, vmem * 9 // 8),
        ),
        cost_estimate=pl.CostEstimate(
            2 * products * tm * tk * tn, 0, products * tk * (tm + tn) * given
        ),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(me, x, w)


def _pad(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros after the last element of each dimension; x itself if none are needed."""
    if x.shape == shape:
        return x
    return jnp.pad(x, [(0, to - size) for size, to in zip(x.shape, shape, strict=True)])


def _tiles(rows: int, k: int, n: int, given: int, result: int) -> tuple[int, int, int]:
    """Tiles so large that products, not copies, take the time.

    A tile of 512 x 1024 results does 340 operations for each byte from HBM in bfloat16;
    of TPUs up to v5p none can do more than 250 while a byte comes. A sum that is ready
    after one product is cheaper than one that is added to (TPU v5e, as libtpu estimates
    it: a tenth to a fifth of the cycles), so the inner dimension is cut as little as
    VMEM allows: TPUs before v5 have 16 MiB, later ones 64 or more.
    """
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    small = device is not None and device.device_kind in ("TPU v2", "TPU v3", "TPU v4")
    tk = _tile(k, (2048 if small else 8192) // given, LANES)
    unit = 32 // min(given, result)
    return _tile(rows, 256 if small else 512, unit), tk, _tile(n, 1024, LANES)


def _tile(size: int, most: int, unit: int) -> int:
    """Few tiles, little padding: each costs what it holds and half a unit more."""

    def cost(units: int) -> float:
        tiles = pl.cdiv(size, units * unit)
        padded = tiles * units * unit > size  # and then the whole array is copied
        return tiles * (units + 0.5) * (1.15 if padded else 1.0)

    return unit * min(range(1, most // unit + 1), key=cost)
