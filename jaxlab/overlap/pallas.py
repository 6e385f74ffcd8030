"""Collective matmuls as one Pallas kernel each: tracked and triggered tile by tile.

The rings of `jaxlab.overlap.matmul` hand whole blocks to the compiler. Here, on TPU, a
kernel moves the tiles of a block itself, as T3 (arXiv 2401.16677) does in hardware: a
DMA semaphore per tile tracks its arrival, and that triggers the tile's next copy. So
a link starts with the first tile rather than with the first block, and nothing depends
on how a compiler schedules.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxlab.overlap.pallas_kernels import LANES, Plan, gather, scatter
from jaxlab.overlap.ring import varying, whole_cotangent

# ----------------------------------------------------------------- derivatives


def _rows_product(plan: Plan, x: jax.Array, y: jax.Array, like: jax.Array):
    """x^T y over all rows: the derivative of the weights, in one product."""
    sums = (((0,), (0,)), ((), ()))
    dw = lax.dot_general(
        x, y, sums, precision=plan.precision, preferred_element_type=jnp.float32
    )
    return dw.astype(like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduce_scatter(plan: Plan, x, w):
    return scatter(plan, x, w)


def _reduce_scatter_backward(plan: Plan, saved, dy):
    x, w = saved
    dual = plan.dual._replace(result=x.dtype)
    dx, whole = gather(dual, dy.astype(x.dtype), w.T)
    return dx, _rows_product(plan, x, whole, w)


_reduce_scatter.defvjp(
    lambda plan, x, w: (scatter(plan, x, w), (x, w)), _reduce_scatter_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _all_gather(plan: Plan, keep: bool, save: bool, x, w):
    """The product and, if it is to be kept, the gathered x, else None."""
    return _all_gather_forward(plan, keep, save, x, w)[0]


def _all_gather_forward(plan: Plan, keep: bool, save: bool, x, w):
    y, whole = gather(plan, x, w)
    return (y, whole if keep else None), (whole if save else x, w)


def _all_gather_backward(plan: Plan, keep: bool, save: bool, saved, cotangents):
    x, w = saved
    dy, dwhole = cotangents
    dy = dy.astype(x.dtype)
    dx = scatter(plan.dual, dy, w.T)
    if keep:
        dx += lax.psum_scatter(dwhole, plan.axis_name, tiled=True)
    whole = x if save else lax.all_gather(x, plan.axis_name, tiled=True)
    return dx.astype(x.dtype), _rows_product(plan, whole, dy, w)


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_reduce(plan: Plan, x, w):
    rows = scatter(plan, x, w)
    return lax.all_gather(rows, plan.axis_name, tiled=True, to="invarying")


def _all_reduce_backward(plan: Plan, saved, dy):
    """No communication: every device has all of dy."""
    x, w = saved
    dy = whole_cotangent(dy, plan.axis_name).astype(x.dtype)
    dx = plan.dot(dy, w.T).astype(x.dtype)
    return dx, _rows_product(plan, x, dy, w)


_all_reduce.defvjp(
    lambda plan, x, w: (_all_reduce(plan, x, w), (x, w)), _all_reduce_backward
)


# -------------------------------------------------------------- what users call


def pallas_matmul_reduce_scatter(
    x: jax.Array,
    w: jax.Array,
    axis_name: str,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    tiles: tuple[int, int, int] | None = None,
    collective_id: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`psum_scatter(x @ w, axis_name, scatter_dimension=0, tiled=True)`, one kernel.

    Products are summed in float32, and so is what arrives. What travels has the dtype
    of the result: bfloat16 sums are rounded once per device on their way, unless
    `preferred_element_type` is float32, which sends twice the bytes.

    Args:
        x: [m, k], this device's columns.
        w: [k, n], this device's rows of the weights.
        axis_name: mesh axis of the ring, inside `jax.shard_map` over all axes.
        precision: of the products, as of `jnp.matmul`.
        preferred_element_type: of the result; None: that of `x @ w`.
        tiles: (rows, inner, columns) of a tile; None: up to 512 x 4096 x 1024 in
            bfloat16. Columns and inner are multiples of 128, rows of 8 (16 for
            bfloat16). More VMEM than usual is asked for where tiles need it.
        collective_id: of the barrier; kernels that run at once, or whose rings
            differ, must not share it. None: the position of `axis_name` in the mesh.
        interpret: False: for TPU; `pltpu.InterpretParams` or True: interpreted, for
            tests; None: interpreted if the mesh is not of TPUs.

    Returns:
        [m / N, n], this device's rows of the sum.

    Raises:
        ValueError: shapes or tiles that do not fit, rows that do not divide among the
            devices, or a mesh with axes that are not manual.

    Source: T3, arXiv 2401.16677.
    """
    dtypes = precision, preferred_element_type
    plan, x, w = _plan(x, w, axis_name, *dtypes, tiles, collective_id, interpret)
    _check_rows(plan, x)
    if plan.size == 1:
        return plan.dot(x, w).astype(plan.result)
    y: Any = _reduce_scatter(plan, x, w)
    return y


def pallas_matmul_all_reduce(
    x: jax.Array,
    w: jax.Array,
    axis_name: str,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    tiles: tuple[int, int, int] | None = None,
    collective_id: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`psum(x @ w, axis_name)`: `pallas_matmul_reduce_scatter`, then an all-gather.

    The all-gather is XLA's, and nothing hides it. The derivative needs neither.

    Args:
        x: [m, k], this device's columns.
        w: [k, n], this device's rows of the weights.
        axis_name: see `pallas_matmul_reduce_scatter`, also for the next five.
        precision: of the products.
        preferred_element_type: of the result.
        tiles: of the kernel.
        collective_id: of the barrier.
        interpret: how to run it.

    Returns:
        [m, n], the same on all devices.

    Raises:
        ValueError: see `pallas_matmul_reduce_scatter`.

    Source: T3, arXiv 2401.16677.
    """
    dtypes = precision, preferred_element_type
    plan, x, w = _plan(x, w, axis_name, *dtypes, tiles, collective_id, interpret)
    _check_rows(plan, x)
    if plan.size == 1:
        return lax.psum(plan.dot(x, w).astype(plan.result), axis_name)
    y: Any = _all_reduce(plan, x, w)
    return y


def pallas_all_gather_matmul(
    x: jax.Array,
    w: jax.Array,
    axis_name: str,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    tiles: tuple[int, int, int] | None = None,
    return_gathered: bool = False,
    save_gathered: bool = False,
    collective_id: int | None = None,
    interpret: Any = None,
) -> Any:
    """`all_gather(x, axis_name, axis=0, tiled=True) @ w`, one kernel.

    What travels is x as it is. Products are summed in float32.

    Args:
        x: [m, k], this device's rows.
        w: [k, n], this device's columns of the weights.
        axis_name: see `pallas_matmul_reduce_scatter`.
        precision: of the products.
        preferred_element_type: of the result; None: that of `x @ w`.
        tiles: see `pallas_matmul_reduce_scatter`.
        return_gathered: also the gathered x.
        save_gathered: keep the gathered x for the derivative of w, N times the memory
            of x; else x is gathered once more, in an all-gather that nothing hides.
        collective_id: see `pallas_matmul_reduce_scatter`.
        interpret: see `pallas_matmul_reduce_scatter`.

    Returns:
        [N m, n]; with `return_gathered` (that, gathered x [N m, k]).

    Raises:
        ValueError: see `pallas_matmul_reduce_scatter`; any number of rows will do.

    Source: T3, arXiv 2401.16677.
    """
    dtypes = precision, preferred_element_type
    plan, x, w = _plan(x, w, axis_name, *dtypes, tiles, collective_id, interpret)
    if plan.size == 1:
        y, gathered = plan.dot(x, w).astype(plan.result), x
    else:
        both: Any = _all_gather(plan, return_gathered, save_gathered, x, w)
        y, gathered = both
    return (y, gathered) if return_gathered else y


def _check_rows(plan: Plan, x: jax.Array) -> None:
    if x.shape[0] % plan.size:
        raise ValueError(
            f"{x.shape[0]} rows of x do not divide among {plan.size} devices of "
            f"{plan.axis_name!r}"
        )


def _plan(x, w, axis_name, precision, result, tiles, collective_id, interpret):
    """The plan that the arguments describe, once checked; x and w of one dtype."""
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"there is no axis {axis_name!r} here: collective matmuls run inside "
            "jax.shard_map"
        ) from None
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"x {x.shape} and w {w.shape} are no [m, k] and [k, n]")
    mesh = jax.sharding.get_abstract_mesh()
    others = [a for a in mesh.axis_names if a not in mesh.manual_axes]
    if others:
        raise ValueError(
            f"axes {others} of the mesh are not manual: a Pallas kernel is one "
            "device's program, so shard_map must be over all axes"
        )
    dtype = jnp.result_type(x, w)
    result = jnp.dtype(dtype if result is None else result)
    unit = 32 // min(dtype.itemsize, result.itemsize)
    if tiles and (tiles[0] % unit or tiles[1] % LANES or tiles[2] % LANES):
        raise ValueError(
            f"tiles {tiles} are no multiples of {(unit, LANES, LANES)}, the least "
            f"for {dtype}"
        )
    axes, place = mesh.axis_names, mesh.axis_names.index(axis_name)
    if collective_id is None:
        collective_id = place
    if interpret is None:
        device: Any = mesh.abstract_device
        platform = device.platform if device else jax.default_backend()
        interpret = platform != "tpu"
    if interpret is True:  # the interpreter that knows of devices and their memories
        interpret = pltpu.InterpretParams()
    dtypes = result, precision
    plan = Plan(axes, place, size, tiles, *dtypes, collective_id, interpret)
    both = varying((x.astype(dtype), w.astype(dtype)), axis_name)
    return plan, *_varying_alike(*both)


def _varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays that vary over the same mesh axes: a kernel takes no others."""
    axes = [jax.typeof(a).manual_axis_type.varying for a in arrays]
    union = frozenset().union(*axes)
    return [
        lax.pcast(a, tuple(union - has), to="varying") if union - has else a
        for a, has in zip(arrays, axes, strict=True)
    ]
