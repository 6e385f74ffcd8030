"""Random tensor-parallel programs as data, and two interpretations of them.

One device's jax code inside of shard_map, and float64 NumPy on [devices, ...].
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


class Op(NamedTuple):
    """An operation of a block; its result is the next value."""

    kind: str
    of: tuple[int, ...]
    options: Any = None


class Block(NamedTuple):
    """From value 0, a part of the sequence, to the last value, of the same shape."""

    wrappers: tuple[str, ...]
    """outermost last"""
    ops: tuple[Op, ...]


class Program(NamedTuple):
    """What each of `size` devices computes."""

    size: int
    shape: tuple[int, ...]
    dtype: str
    weights: tuple[tuple[tuple[int, ...], bool], ...]
    """their shapes, and whether each device has others"""
    blocks: tuple[Block, ...]
    flag: bool
    """which branch its conditionals take"""
    vma: bool
    """whether shard_map checks what varies (`check_vma`)"""


UNARY = {
    "tanh": (jnp.tanh, np.tanh),
    "sin": (jnp.sin, np.sin),
    "silu": (jax.nn.silu, lambda x: x / (1 + np.exp(-x))),
    "half": (lambda x: 0.5 * x, lambda x: 0.5 * x),
}


class Dot(NamedTuple):
    """Options of a product."""

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    order: tuple[int, ...] | None
    """of the result's dimensions, by einsum; None: as dot_general has them"""
    wide: bool
    """sums in float32"""


def equation(dot: Dot, ranks, prefix="") -> str:
    """Einsum's name for it."""
    left = [chr(97 + d) for d in range(ranks[0])]
    right = [chr(107 + d) for d in range(ranks[1])]
    for mine, other in (dot.contract, dot.batch):
        for i, j in zip(mine, other, strict=True):
            right[j] = left[i]
    batch = [left[d] for d in dot.batch[0]]
    free = [c for c in left if c not in right] + [c for c in right if c not in left]
    out = batch + free
    out = out if dot.order is None else [out[d] for d in dot.order]
    texts = ["".join([prefix, *side]) for side in (left, right, out)]
    return f"{texts[0]},{texts[1]}->{texts[2]}"


def folded(x, shape, xp):
    """All elements, added up in this shape."""
    n = math.prod(shape)
    x = xp.pad(x.reshape(-1), (0, -x.size % n))
    x = x.reshape((-1, *shape))
    return x.sum(0) / math.sqrt(len(x))


def on_device(op: Op, args: list[Any], weights: Any) -> Any:
    """An operation as one device does it."""
    a: Any = args[0] if args else None
    options = op.options
    match op.kind:
        case "weight":
            return weights[options]
        case "gather":
            dim, tiled, to = options
            return lax.all_gather(a, "t", axis=dim, tiled=tiled, to=to)
        case "scatter":
            dim, tiled = options
            return lax.psum_scatter(a, "t", scatter_dimension=dim, tiled=tiled)
        case "psum":
            return lax.psum(a, "t")
        case "mine":
            part = a.shape[options] // lax.axis_size("t")
            start = lax.axis_index("t") * part
            return lax.dynamic_slice_in_dim(a, start, part, options)
        case "dot":
            b = args[1].astype(a.dtype)
            wide = jnp.float32 if options.wide else None
            if options.order is None:
                numbers = (options.contract, options.batch)
                return lax.dot_general(a, b, numbers, preferred_element_type=wide)
            text = equation(options, (a.ndim, b.ndim))
            return jnp.einsum(text, a, b, preferred_element_type=wide)
        case "bias":
            return a + lax.broadcast_in_dim(args[1].astype(a.dtype), a.shape, options)
        case "add":
            return a + args[1]
        case "multiply":
            return a * args[1]
        case "unary":
            return UNARY[options][0](a)
        case "reshape":
            return a.reshape(options)
        case "transpose":
            return a.transpose(options)
        case "cast":
            return a.astype(options)
        case "name":
            return checkpoint_name(a, "named")
        case "fold":
            return folded(a, options, jnp)
    raise AssertionError(op)


def on_all(op: Op, args: list[Any], weights: Any) -> Any:
    """The same on all devices, [devices, ...], in float64; casts do nothing."""
    a: Any = args[0] if args else None
    options = op.options
    match op.kind:
        case "weight":
            return weights[options]
        case "gather":
            dim, tiled, _ = options
            whole = np.concatenate(a, dim) if tiled else np.stack(a, dim)
            return np.stack([whole] * len(a))
        case "scatter":
            dim, tiled = options
            parts = np.stack(np.split(a.sum(0), len(a), dim))
            return parts if tiled else parts.squeeze(dim + 1)
        case "psum":
            return np.stack([a.sum(0)] * len(a))
        case "mine":
            each = [np.split(whole, len(a), options)[i] for i, whole in enumerate(a)]
            return np.stack(each)
        case "dot":
            b = args[1]
            return np.einsum(equation(options, (a.ndim - 1, b.ndim - 1), "z"), a, b)
        case "bias":
            shape, b = [1] * (a.ndim - 1), args[1]
            for d, n in zip(options, b.shape[1:], strict=True):
                shape[d] = n
            return a + b.reshape(len(a), *shape)
        case "add":
            return a + args[1]
        case "multiply":
            return a * args[1]
        case "unary":
            return UNARY[options][1](a)
        case "reshape":
            return a.reshape(len(a), *options)
        case "transpose":
            return a.transpose(0, *(d + 1 for d in options))
        case "cast" | "name":
            return a
        case "fold":
            return np.stack([folded(x, options, np) for x in a])
    raise AssertionError(op)


def interpret(block: Block, do, x, weights):
    """The last value of a block."""
    values = [x]
    for op in block.ops:
        values.append(do(op, [values[i] for i in op.of], weights))
    return values[-1]


def wrapped(name: str, f):
    """f(x, weights), called in some other way; the flag is the last of the weights."""

    @jax.custom_vjp
    def own(x, weights):
        return f(x, weights)

    own.defvjp(lambda *a: (f(*a), a), lambda saved, dy: jax.vjp(f, *saved)[1](dy))

    def twice(x, weights):
        return lax.scan(lambda c, _: (f(c, weights), None), x, None, length=2)[0]

    def branch(x, weights):
        yes, no = lambda x: f(x, weights), lambda x: 0.5 * x
        return lax.cond(weights[-1] > 0, yes, no, x)

    def batch(x, weights):
        both = jnp.stack([x, 0.5 * x])
        return jax.vmap(lambda x: f(x, weights))(both).sum(0)

    few = jax.checkpoint_policies.dots_saveable
    forms = dict(
        jit=jax.jit(f),
        checkpoint=jax.checkpoint(f),
        checkpoint_dots=jax.checkpoint(f, policy=few),
        custom_vjp=own,
        scan=twice,
        cond=branch,
        vmap=batch,
    )
    return forms[name]


WRAPPERS = "jit", "checkpoint", "checkpoint_dots", "custom_vjp", "scan", "cond", "vmap"


def as_jax(program: Program, inside: Callable[..., Any] = lambda f: f):
    """f(x, *weights, flag) of global arrays; `inside` wraps a device's part."""

    def device(x, *weights):
        for block in program.blocks:
            f = lambda x, ws, block=block: interpret(block, on_device, x, ws)  # noqa: E731
            for name in block.wrappers:
                f = wrapped(name, f)
            x = f(x, weights)
        return x

    def local(x, *weights):
        shapes = [s for s, _ in program.weights]
        weights = [w.reshape(s) for w, s in zip(weights, (*shapes, ()), strict=True)]
        return inside(device)(x.reshape(program.shape), *weights)[None]

    mesh = jax.make_mesh(
        (program.size,),
        ("t",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[: program.size],
    )
    specs = [P("t") if varies else P() for _, varies in program.weights]
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("t"), *specs, P()),
        out_specs=P("t"),
        check_vma=program.vma,
    )


def widened(program: Program) -> Program:
    """The same in float32 throughout."""
    wide = [
        [o._replace(options="float32") if o.kind == "cast" else o for o in b.ops]
        for b in program.blocks
    ]
    kinds = zip(program.blocks, wide, strict=True)
    blocks = tuple(b._replace(ops=tuple(ops)) for b, ops in kinds)
    return program._replace(dtype="float32", blocks=blocks)


def as_numpy(program: Program):
    """The same in float64."""

    def apply(names, block, x, weights):
        if not names:
            return interpret(block, on_all, x, weights)
        inner = lambda x: apply(names[:-1], block, x, weights)  # noqa: E731
        match names[-1]:
            case "scan":
                return inner(inner(x))
            case "cond":
                return inner(x) if program.flag else 0.5 * x
            case "vmap":
                return inner(x) + inner(0.5 * x)
        return inner(x)

    def f(x, *weights):
        kinds = zip(weights, program.weights, strict=False)
        weights = [w if v else np.stack([w] * program.size) for w, (_, v) in kinds]
        for block in program.blocks:
            x = apply(block.wrappers, block, x, weights)
        return x

    return f


def arguments(program: Program) -> list[np.ndarray]:
    """x, weights and flag, float64 with float32's (or bfloat16's) values."""
    rng = np.random.default_rng(len(program.weights))
    drawn = [rng.normal(size=(program.size, *program.shape))]
    for shape, varies in program.weights:
        w = rng.normal(size=(program.size, *shape) if varies else shape)
        drawn.append(w / math.prod(shape) ** 0.25)
    x, *weights = [np.asarray(jnp.asarray(a, program.dtype), np.float64) for a in drawn]
    return [x, *weights, np.asarray(1.0 if program.flag else -1.0)]


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled fast, rather than to run fast."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})
