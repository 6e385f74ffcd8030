"""Transparent overlap of random tensor-parallel programs: the function as written."""

import collections
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxlab.overlap import Policy, explain, overlap
from tests.overlap_programs import (
    WRAPPERS,
    Block,
    Dot,
    Op,
    Program,
    arguments,
    as_jax,
    as_numpy,
    compiled,
    on_all,
    widened,
)

Pick = Callable[[Any], Any]  # draws one of several


class Builder:
    """Operations of a block that is being drawn, and the shapes of their values."""

    def __init__(self, pick: Pick, program: Program, weights: list[Any]):
        self.pick, self.weights = pick, weights
        self.size, self.dtype, self.vma = program.size, program.dtype, program.vma
        self.zeros = [np.zeros((self.size, *program.shape))]
        self.ops: list[Op] = []

    def add(self, kind: str, *of: int, options: Any = None) -> int:
        """Number of the new value."""
        self.ops.append(Op(kind, of, options))
        zeros = [np.zeros((self.size, *s)) for s, _ in self.weights]
        self.zeros.append(on_all(self.ops[-1], [self.zeros[i] for i in of], zeros))
        return len(self.ops)

    def shape(self, value: int) -> tuple[int, ...]:
        return self.zeros[value].shape[1:]

    def weight(self, shape, varies: bool | None = None) -> int:
        if varies is None:
            varies = self.pick((True, True, False))
        self.weights.append((tuple(shape), varies))
        return self.add("weight", options=len(self.weights) - 1)

    def chance(self, one_in: int) -> bool:
        return self.pick((False,) * (one_in - 1) + (True,))


def permutation(pick: Pick, n: int) -> tuple[int, ...]:
    left, found = list(range(n)), []
    while left:
        found.append(left.pop(pick(range(len(left)))))
    return tuple(found)


def moved(b: Builder, v: int, most: int) -> int:
    """After at most so many reshapes, transposes, casts and names."""
    for _ in range(b.pick(range(most + 1))):
        shape, rank = b.shape(v), len(b.shape(v))
        kinds = "transpose", "split", "merge", "any", "one", "cast", "name"
        kind = b.pick(kinds) if rank else "one"
        if kind == "transpose":
            v = b.add("transpose", v, options=permutation(b.pick, rank))
        elif kind == "split":
            d = b.pick(range(rank))
            major = b.pick([n for n in range(1, shape[d] + 1) if shape[d] % n == 0])
            parts = major, shape[d] // major
            v = b.add("reshape", v, options=(*shape[:d], *parts, *shape[d + 1 :]))
        elif kind == "merge" and rank > 1:
            d = b.pick(range(rank - 1))
            one = (shape[d] * shape[d + 1],)
            v = b.add("reshape", v, options=(*shape[:d], *one, *shape[d + 2 :]))
        elif kind == "any":
            left, parts = math.prod(shape), []
            for _ in range(b.pick(range(3))):
                parts.append(b.pick([n for n in range(1, left + 1) if left % n == 0]))
                left //= parts[-1]
            v = b.add("reshape", v, options=(*parts, left))
        elif kind == "one":
            d = b.pick(range(rank + 1))
            v = b.add("reshape", v, options=(*shape[:d], 1, *shape[d:]))
        elif kind == "cast":
            mixed = ("float32", "bfloat16")
            to = "float32" if b.dtype == "float32" else b.pick(mixed)
            v = b.add("cast", v, options=to)
        else:
            v = b.add("name", v)
    return v


def product(b: Builder, v: int, like: Op | None = None) -> int:
    """With new weights, over some dimensions; `like` another one."""
    if like is not None:
        left = like.of[0] == v
        shape = b.shape(like.of[1] if left else like.of[0])
        w = b.weight(shape)
        return b.add("dot", *((v, w) if left else (w, v)), options=like.options)
    shape, rank = b.shape(v), len(b.shape(v))
    last = (rank - 1,)
    choices = [last] * 7 + [(0,), (b.pick(range(rank)),)]
    if rank > 2:
        choices += [(rank - 2, rank - 1)] * 3
    mine = b.pick(choices)
    batch = ()
    if b.chance(12) and len(mine) < rank:
        batch = (b.pick([d for d in range(rank) if d not in mine]),)
    columns = b.pick(((2,), (3,), (4,), (6,), (2, 3), () if len(mine) < rank else (2,)))
    sizes = [*(shape[d] for d in batch), *(shape[d] for d in mine), *columns]
    places = permutation(b.pick, len(sizes)) if b.chance(2) else range(len(sizes))
    w = b.weight([sizes[p] for p in places])
    where = [list(places).index(i) for i in range(len(sizes))]
    n = len(batch)
    theirs = tuple(where[n : n + len(mine)])
    of: tuple[int, ...] = (v, w)
    contract: Any = (mine, theirs)
    batches: Any = (batch, tuple(where[:n]))
    if b.chance(3):
        of, contract, batches = of[::-1], contract[::-1], batches[::-1]
    out = rank - len(mine) + len(columns)
    order = permutation(b.pick, out) if b.chance(3) else None
    # XLA's CPU has no bfloat16 products in float32 of other forms.
    wide = b.chance(3) and len(mine) == 1 and len(columns) == 1 and not batch
    return b.add("dot", *of, options=Dot(contract, batches, order, wide))


def biased(b: Builder, v: int) -> int:
    shape = b.shape(v)
    dims = [d for d in range(len(shape)) if b.pick((True, False))]
    small = b.weight([b.pick((1, shape[d], shape[d])) for d in dims])
    return b.add("bias", v, small, options=tuple(dims))


def hidden(b: Builder, v: int) -> int:
    """What stands between two products."""
    if b.chance(3):
        v = biased(b, v)
    v = moved(b, v, 1)
    return b.add("unary", v, options=b.pick(("tanh", "silu", "sin")))


def gathered(b: Builder, extra: list[int]) -> list[int]:
    """Products of what is gathered."""
    v = moved(b, 0, b.pick((0, 0, 2)))
    if b.chance(4):
        v = b.add("unary", v, options="tanh")
    if not b.chance(8):
        tiled, rank = b.pick((True, True, False)), len(b.shape(v))
        dims = [*range(max(1, rank - 1)), 0, 0, 0, rank - tiled]
        # Without its checks JAX cannot differentiate the invarying kind.
        to = b.pick(("varying", "varying", "invarying" if b.vma else "varying"))
        v = b.add("gather", v, options=(b.pick(dims), tiled, to))
    if b.chance(4):
        extra.append(v)
    v = moved(b, v, b.pick((0, 0, 2)))
    found: list[int] = []
    for _ in range(b.pick((1, 1, 2, 3))):
        other = moved(b, v, 1) if b.chance(6) else v
        again = found and other == v and b.pick((True, True, False))
        like = b.ops[found[0] - 1] if again else None
        if like is None or v not in like.of:
            like = None
        found.append(product(b, other, like))
    if b.chance(12):
        dims = tuple(range(1, len(b.shape(v))))
        square = b.add("dot", v, v, options=Dot((dims, dims), ((), ()), None, False))
        extra.append(square)
    if b.chance(5):
        extra.append(found[0])
    return found


def combined(b: Builder, values: list[int], extra: list[int]) -> int:
    """One hidden value."""
    first, *rest = values
    first = hidden(b, first)
    for v in rest:
        v = b.add("unary", v, options="tanh") if b.chance(2) else v
        if b.shape(v) == b.shape(first):
            kind = b.pick(("add", "multiply"))
            first = b.add(kind, first, v)
        else:
            extra.append(v)
    return first


def summed(b: Builder, v: int, extra: list[int]) -> tuple[int, bool]:
    """The sum over devices of products; whether each device has another part."""
    y = product(b, v)
    first = b.ops[y - 1]
    for _ in range(b.pick((0, 0, 0, 1, 2))):
        other = b.add("unary", v, options="sin") if b.chance(2) else v
        of = tuple(other if i == v else i for i in first.of)
        y = b.add("add", y, product(b, other, first._replace(of=of)))
    if b.chance(6):
        extra.append(y)
    if b.chance(3):
        y = biased(b, y)
    y = moved(b, y, b.pick((0, 0, 1, 2)))
    if b.chance(4):
        y = biased(b, y)
    if b.chance(10):
        y = b.add("unary", y, options="half")
    shape = b.shape(y)
    ways = [(d, True) for d, n in enumerate(shape) if n % b.size == 0]
    ways += [(d, False) for d, n in enumerate(shape) if n == b.size]
    if ways and not b.chance(3):
        return b.add("scatter", y, options=b.pick(ways)), True
    y = b.add("psum", y)
    cuts = [d for d, n in enumerate(shape) if n % b.size == 0]
    if cuts and b.chance(2):
        return b.add("mine", y, options=b.pick(cuts)), True
    return y, False


def draw_block(b: Builder, wrappers: tuple[str, ...]) -> Block:
    extra: list[int] = []
    shape = b.shape(0)
    y = combined(b, gathered(b, extra), extra)
    varies = False
    if not b.chance(8):
        y, varies = summed(b, y, extra)
    y = b.add("fold", moved(b, y, 1), options=shape)
    for v in extra:
        y = b.add("add", y, b.add("fold", v, options=shape))
    y = b.add("unary", b.add("cast", y, options=b.dtype), options="sin")
    if not varies or b.chance(2):
        y = b.add("add", y, 0)
    if any(op.kind == "scatter" and not op.options[1] for op in b.ops):
        # jax.vmap of an untiled psum_scatter raises an IndexError in JAX itself.
        wrappers = tuple(name for name in wrappers if name != "vmap")
    return Block(wrappers, tuple(b.ops))


def draw_program(pick: Pick) -> Program:
    size = pick((2, 3, 4))
    rank = pick((2, 2, 3, 4))
    middle = tuple(pick((1, 2, 3, 4)) for _ in range(rank - 2))
    shape = (pick((1, 2, 3, 4, 6, 6, 12)), *middle, pick((3, 4, 6)))
    dtype = pick(("float32", "float32", "float32", "bfloat16"))
    vma, flag = pick((True, False)), pick((True, True, False))
    program = Program(size, shape, dtype, (), (), flag, vma)
    weights: list[Any] = []
    blocks = []
    for _ in range(pick((1, 1, 2))):
        wrappers = [pick(WRAPPERS) for _ in range(pick((0, 0, 1, 2)))]
        builder = Builder(pick, program, weights)
        blocks.append(draw_block(builder, tuple(wrappers)))
    return program._replace(weights=tuple(weights), blocks=tuple(blocks))


def seeded(seed: int) -> Program:
    return draw_program(random.Random(seed).choice)


@st.composite
def programs(draw):
    return draw_program(lambda options: draw(st.sampled_from(list(options))))


# -------------------------------------------------------------------------- checks

COLLECTIVES = ("all_gather", "reduce_scatter", "psum")


def inner(value):
    """Jaxprs in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [j for v in value for j in inner(v)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


def counted(jaxpr) -> collections.Counter[str]:
    """Collectives, with those in bodies."""
    found: collections.Counter[str] = collections.Counter()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name.removesuffix("_invariant")
        found[name] += name in COLLECTIVES
        for value in eqn.params.values():
            for body in inner(value):
                found += counted(body)
    return +found


def check_explanation(plain, rewritten, args, policy):
    """Each collective is listed once; what became a ring is no longer there."""
    before = counted(jax.make_jaxpr(plain)(*args).jaxpr)
    after = counted(jax.make_jaxpr(rewritten)(*args).jaxpr)
    found = explain(plain, *args, policy=policy, log=lambda text: None)
    names = {"all-gather": "all_gather", "reduce-scatter": "reduce_scatter"}
    kinds = [names.get(s.what.split()[0], "psum") for s in found.sites]
    assert collections.Counter(kinds) == before
    assert {s.form for s in found.sites} <= {policy.mode, "plain", "skipped", "alone"}
    assert all(s.reason for s in found.sites if s.form in ("skipped", "alone"))
    rings = collections.Counter(
        k for k, s in zip(kinds, found.sites, strict=True) if s in found.rewritten
    )
    # An all-reduce is a ring and an all-gather.
    gathers = before["all_gather"] - rings["all_gather"] + rings["psum"]
    assert after["all_gather"] <= gathers
    assert after["reduce_scatter"] <= before["reduce_scatter"] - rings["reduce_scatter"]
    return found


def close(got, plain, want, dtype):
    """No further from the reference than twice what the plain one is."""
    got, plain = np.asarray(got, np.float64), np.asarray(plain, np.float64)
    scale = np.abs(want).max() + 1e-3
    eps = 2e-5 if dtype == "float32" else 3e-2
    error, usual = np.abs(got - want).max() / scale, np.abs(plain - want).max() / scale
    assert usual < 1e-3 or dtype == "bfloat16", "the reference is another"
    assert error <= 2 * usual + eps, f"{error} where it is {usual}"


class Way(NamedTuple):
    """How a program is overlapped."""

    policy: Policy = Policy(mode="ring")
    inside: bool = False
    """overlap in the shard_map, rather than around it"""
    around: bool = False
    """also the gradient's program"""


def check(program: Program, way: Way):
    """Values, gradients and explanation; returns the explanation."""
    exact = arguments(program)
    args = [jnp.asarray(a, program.dtype) for a in exact]
    on = lambda f: overlap(f, policy=way.policy, on_skip="ignore")  # noqa: E731
    plain = as_jax(program)
    ring = as_jax(program, on) if way.inside else on(plain)

    def gradient(f):
        def loss(x, weights):
            y = f(x, *weights, args[-1])
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        return jax.grad(loss, (0, 1), has_aux=True)

    given = args[0], args[1:-1]
    (dx, dws), y = jax.block_until_ready(compiled(gradient(plain))(*given))
    slopes = dx, dws
    if program.dtype != "float32":
        wide = [jnp.asarray(a, jnp.float32) for a in args[:-1]]
        slopes, _ = compiled(gradient(as_jax(widened(program))))(wide[0], wide[1:])
    found = check_explanation(plain, ring, args, way.policy)
    want = as_numpy(program)(*exact)
    results = [compiled(gradient(ring))(*given)]
    if way.around:
        whole = on(gradient(plain))
        results.append(compiled(whole)(*given))
        check_explanation(gradient(plain), whole, given, way.policy)
    for (dx_ring, dws_ring), y_ring in results:
        close(y_ring, y, want, program.dtype)
        trees = ((dx_ring, dws_ring), (dx, dws), slopes)
        for g, p, w in zip(*map(jax.tree.leaves, trees), strict=True):
            assert g.dtype == p.dtype
            close(g, p, np.asarray(w, np.float64), program.dtype)
    if program.dtype == "float32":
        check_slope(program, exact, (dx, dws), results[0][0])
    return found


def check_slope(program: Program, exact, plain, ring):
    """The gradient along one direction, against NumPy's central difference."""
    rng = np.random.default_rng(1)
    f = as_numpy(program)
    along = [rng.normal(size=a.shape) for a in exact]
    step = 1e-5
    ends = [
        (f(*(a + s * step * d for a, d in zip(exact, along, strict=True))) ** 2).sum()
        for s in (1, -1)
    ]
    want = (ends[0] - ends[1]) / (2 * step)

    def slope(gradient):
        parts = zip((gradient[0], *gradient[1]), along[:-1], strict=True)
        terms = [np.asarray(g, np.float64) * d for g, d in parts]
        return sum(t.sum() for t in terms), sum(np.abs(t).sum() for t in terms)

    (a, scale), (b, _) = slope(plain), slope(ring)
    usual, error = abs(a - want) / (scale + 1e-3), abs(b - want) / (scale + 1e-3)
    assert usual < 1e-4, "the plain gradient is wrong"
    assert error <= 2 * usual + 1e-5


POLICIES = [
    Policy(mode="ring"),
    Policy(mode="ring"),
    Policy(mode="bidirectional"),
    Policy(mode="ring", chunks=2),
    Policy(mode="bidirectional", chunks=2),
]
WAYS = st.builds(Way, st.sampled_from(POLICIES), st.booleans(), st.booleans())


@hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(programs(), WAYS)
def test_a_random_program_is_the_same(program, way):
    found = check(program, way)
    hypothesis.event(f"rewritten: {len(found.rewritten)}")
    hypothesis.target(float(len(found.rewritten)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_fixed_program_is_the_same(seed):
    check(seeded(seed), Way(POLICIES[seed + 1], inside=seed % 2 == 0, around=True))


@pytest.mark.slow
def test_the_drawn_programs_are_of_all_kinds_and_are_rewritten():
    """Else the tests above could pass because nothing was rewritten."""
    forms, rings, seen = (collections.Counter() for _ in range(3))
    for seed in range(60):
        program = seeded(seed)
        seen.update(name for b in program.blocks for name in b.wrappers)
        seen.update(op.kind for b in program.blocks for op in b.ops)
        args = [jnp.asarray(a, program.dtype) for a in arguments(program)]
        policy = Policy(mode="ring")
        found = explain(as_jax(program), *args, policy=policy, log=lambda text: None)
        forms.update(site.form for site in found.sites)
        rings.update(site.what.split()[0] for site in found.rewritten)
    kinds = "gather scatter psum mine dot bias add multiply unary reshape transpose"
    assert seen.keys() >= {*WRAPPERS, *kinds.split(), "cast", "name", "fold"}
    assert forms["ring"] >= 50 and forms["ring"] >= 0.35 * forms.total()
    assert min(rings[k] for k in ("all-gather", "reduce-scatter", "all-reduce")) >= 5


def program_of(*ops: Op, weights) -> Program:
    return Program(2, (4, 4), "float32", weights, (Block((), ops),), True, True)


ROWS = Dot(((1,), (0,)), ((), ()), None, False)
"""[m, k] @ [k, n]"""

# What was once rewritten wrongly.
FAILED = {
    "a gather to the same everywhere, used as such": program_of(
        Op("gather", (0,), (0, True, "invarying")),
        Op("weight", (), 0),
        Op("dot", (1, 2), ROWS),
        Op("add", (3, 1)),
        Op("fold", (4,), (4, 4)),
        Op("add", (5, 0)),
        weights=(((4, 4), True),),
    ),
    "a gather to the same everywhere, times a weight that is": program_of(
        Op("gather", (0,), (0, True, "invarying")),
        Op("weight", (), 0),
        Op("dot", (1, 2), ROWS),
        Op("fold", (3,), (4, 4)),
        Op("add", (4, 0)),
        weights=(((4, 4), False),),
    ),
    "a product that is the same everywhere, scattered": program_of(
        Op("gather", (0,), (0, True, "invarying")),
        Op("weight", (), 0),
        Op("dot", (1, 2), ROWS),
        Op("scatter", (3,), (0, True)),
        Op("add", (4, 0)),
        weights=(((4, 4), False),),
    ),
    # Its gradient was too small by the number of devices.
    "a product that is the same everywhere, summed": program_of(
        Op("gather", (0,), (0, True, "invarying")),
        Op("weight", (), 0),
        Op("dot", (1, 2), ROWS),
        Op("psum", (3,)),
        Op("fold", (4,), (4, 4)),
        Op("add", (5, 0)),
        weights=(((4, 4), False),),
    ),
}


@pytest.mark.parametrize("name", FAILED)
def test_what_once_failed(name):
    check(FAILED[name], Way(around=True))
