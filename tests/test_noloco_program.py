"""What the compiled step sends, on 8 devices, and that it equals the simulation."""

import itertools
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.optim import (
    contraction,
    diloco,
    noloco,
    outer_step,
    partners,
    replica_axes,
    replica_specs,
    replicate,
)
from jaxlab.optim.audit import branches, collectives
from jaxlab.optim.pairing import MAX_ROWS, key_data, pairing_table, row_index

REPLICAS = 8
WIDTHS = (16, 32, 8)


def mesh_of(*sizes, names=("replica", "fsdp")):
    names = names[: len(sizes)]
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(
        sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices
    )


def first_params(rng):
    return {
        f"w{i}": jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)
        for i, shape in enumerate(itertools.pairwise(WIDTHS))
    }


def loss(params, batch):
    hidden = batch
    for name in sorted(params):
        hidden = jnp.tanh(hidden @ params[name])
    return jnp.mean(jnp.square(hidden - 0.3))


def linear_loss(params, batch):
    """Its gradient has no sums, which batched and single programs order apart."""
    return batch[0, 0] * sum(jnp.sum(w) for w in jax.tree.leaves(params))


def replica_step(tx, params, state, batch, loss=loss, after=lambda p, s: (p, s)):
    """One replica's whole training step."""
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    params, state = after(optax.apply_updates(params, updates), state)
    return params, state, value


def setup(tx, replicas=REPLICAS):
    params = first_params(np.random.default_rng(0))
    state = jax.jit(tx.init)(params)
    return replicate(params, replicas), replicate(state, replicas)


def batches(steps, replicas=REPLICAS):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(steps, replicas, 4, WIDTHS[0])), jnp.float32)


def by_vmap(tx, state, **options):
    axes = replica_axes(state)
    return jax.jit(
        jax.vmap(
            partial(replica_step, tx, **options),
            in_axes=(0, axes, 0),
            out_axes=(0, axes, 0),
            axis_name="replica",
        )
    )


def by_shard_map(tx, state, mesh, *, donate=False, **options):
    specs, axes = replica_specs(state), replica_axes(state)
    # One replica on each device: vmap takes the axis of length 1 off.
    local = jax.vmap(
        partial(replica_step, tx, **options),
        in_axes=(0, axes, 0),
        out_axes=(0, axes, 0),
    )
    step = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("replica"), specs, P("replica")),
        out_specs=(P("replica"), specs, P("replica")),
        axis_names={"replica"},
    )
    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


def compiled_text(step, *args):
    return step.lower(*args).compile().as_text()


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -------------------------------------------------------------- the same numbers


def flat(tree):
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in leaves], axis=1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(wire_dtype="int8"),
        dict(wire_dtype="bfloat16", error_feedback=True),
        dict(exchange="pair", nesterov=True),
        dict(group_size=4),
    ],
)
def test_vmap_equals_shard_map_bit_for_bit(settings):
    # Not Adam: XLA on CPU rounds its bias correction differently in the two programs.
    inner = optax.sgd(1e-2, momentum=0.9)
    tx = noloco(inner, axis_size=REPLICAS, inner_steps=3, **settings)
    params, state = setup(tx)
    simulated = by_vmap(tx, state, loss=linear_loss)
    sharded = by_shard_map(tx, state, mesh_of(8), loss=linear_loss)
    a, b = (params, state), (params, state)
    for batch in batches(13):
        *a, _ = simulated(*a, batch)
        *b, _ = sharded(*b, batch)
    # Estimated from a sum of squares, which each program takes in its own order.
    std_a, std_b = a[1].replica_std, b[1].replica_std
    np.testing.assert_allclose(std_a, std_b, rtol=1e-5)
    a[1], b[1] = (x._replace(replica_std=std_a) for x in (a[1], b[1]))
    assert_same(a, b)
    assert np.isfinite(flat(a[0])).all() and np.ptp(flat(a[0]), axis=0).max() > 0


def test_all_reduce_is_the_same_by_vmap_and_shard_map():
    """But for the order of the sum over replicas."""
    tx = diloco(optax.sgd(1e-2, momentum=0.9), axis_size=REPLICAS, inner_steps=3)
    params, state = setup(tx)
    a = b = (params, state)
    simulated, sharded = by_vmap(tx, state), by_shard_map(tx, state, mesh_of(8))
    for batch in batches(13):
        *a, _ = simulated(*a, batch)
        *b, _ = sharded(*b, batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), a, b)


def test_the_host_dispatched_form_is_the_same_bit_for_bit():
    """Inner steps that never exchange, and one small program for each row."""
    hyper = dict(axis_size=REPLICAS, inner_steps=3, seed=4)
    tx = noloco(optax.adam(1e-2), axis_size=REPLICAS, seed=4, inner_steps=None)
    params, state = setup(tx)
    axes, specs, mesh = replica_axes(state), replica_specs(state), mesh_of(8)
    inner = by_shard_map(tx, state, mesh)
    whole = by_shard_map(tx, state, mesh, after=partial(outer_step, **hyper))

    def exchange(row):
        local = jax.vmap(
            partial(outer_step, row=row, **hyper), in_axes=(0, axes), out_axes=(0, axes)
        )
        specs_ps = (P("replica"), specs)
        return jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=specs_ps, out_specs=specs_ps)
        )

    a = b = (params, state)
    for number, batch in enumerate(batches(12), 1):
        *a, _ = whole(*a, batch)
        *b, _ = inner(*b, batch)
        if number % 3 == 0:
            row = partners("round_robin", REPLICAS, 4, number // 3 - 1)
            b = exchange(row)(*b)
            for p, slow in zip(
                jax.tree.leaves(b[0]), jax.tree.leaves(b[1].slow), strict=True
            ):
                np.testing.assert_array_equal(p, slow)  # the exact hand-over
    assert_same(tuple(a), tuple(b))
    one = compiled_text(exchange(row), params, state)
    assert {c.kind for c in collectives(one)} == {"collective-permute"}
    assert len(collectives(one)) == len(WIDTHS) - 1
    assert not collectives(compiled_text(inner, params, state, batch))


def test_fsdp_inside_a_replica_gives_the_same_and_moves_only_shards():
    hyper = dict(axis_size=4, inner_steps=2)
    tx = noloco(optax.adam(1e-2), **hyper)
    params, state = setup(tx, 4)
    plain = by_shard_map(tx, state, mesh_of(4, 1))
    mesh = mesh_of(4, 2)

    def put(x):  # matrices lie cut along fsdp
        spec = P("replica", "fsdp") if x.ndim == 3 else P("replica")
        shared = x.dtype == jnp.uint32 or not x.ndim  # key and count
        return jax.device_put(x, NamedSharding(mesh, P() if shared else spec))

    sharded_params, sharded_state = jax.tree.map(put, (params, state))
    given = batches(8, 4)
    given_cut = jax.device_put(given, NamedSharding(mesh, P(None, "replica", "fsdp")))
    cut = by_shard_map(tx, state, mesh, donate=True)
    program = cut.lower(sharded_params, sharded_state, given_cut[0]).compile()
    text = program.as_text()

    a, b = (params, state), (sharded_params, sharded_state)
    wanted = [x.sharding for x in jax.tree.leaves(b)]
    for number in range(8):
        *a, _ = plain(*a, given[number])
        *b, _ = cut(*b, given_cut[number])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), a, b)
    # What a donated state is for: it goes out as it came in.
    for x, sharding in zip(jax.tree.leaves(b), wanted, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    leaves = len(jax.tree.leaves((params, state)))
    assert text.count("may-alias") + text.count("must-alias") >= leaves

    def replica_of(device):
        return device // 2

    found = collectives(text)
    across = [
        c
        for c in found
        if any(replica_of(a) != replica_of(b) for a, b in c.pairs)
        or any(len({replica_of(d) for d in g}) > 1 for g in c.groups)
        or not (c.pairs or c.groups)
    ]
    assert {c.kind for c in across} == {"collective-permute"}
    assert all(c.conditional for c in across)
    assert {c.bytes for c in across} == {16 * 32 * 4 // 2, 32 * 8 * 4 // 2}
    # Each shard swaps with the same shard of the partner.
    assert all(a % 2 == b % 2 for c in across for a, b in c.pairs)
    assert not [c for c in found if c.kind == "all-gather" and c.conditional]


# ------------------------------------------------------------------- the audit


def test_a_step_permutes_inside_the_conditional_and_nothing_else():
    tx = noloco(optax.adam(1e-2), axis_size=REPLICAS, inner_steps=3)
    params, state = setup(tx)
    text = compiled_text(
        by_shard_map(tx, state, mesh_of(8)), params, state, batches(1)[0]
    )
    found = collectives(text)
    assert {c.kind for c in found} == {"collective-permute"}
    assert all(c.conditional for c in found)

    table = pairing_table("round_robin", REPLICAS)[:, 0]
    switches = [b for b in branches(text) if len(b) == len(table)]
    assert len(switches) == 1
    for row, name in zip(table, switches[0], strict=True):
        wanted = {(i, int(j)) for i, j in enumerate(row)}
        mine = [c for c in found if c.computation == name]
        assert len(mine) == len(WIDTHS) - 1
        assert all(set(c.pairs) == wanted for c in mine)
    for index in range(20):  # and the branch taken is the row that the host names
        drawn = int(row_index(key_data(0), index, len(table)))
        np.testing.assert_array_equal(
            table[drawn], partners("round_robin", REPLICAS, 0, index)
        )


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=1,'c'=2] {'c'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=1,'c'=2] {'a','b'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=1,'c'=2] {'a','c'}", ((0, 1, 2, 3),)),
        ("mesh['a'=2,'c'=2], device_ids=([2,2]T(1,0)) {'c'}", ((0, 2), (1, 3))),
        ("mesh['a'=4] {'a':(1)2}", ()),  # part of an axis: not read, so it is all
    ],
)
def test_groups_are_read_in_every_notation(written, groups):
    text = f"""ENTRY %main (p: f32[2]) -> f32[2] {{
  %sum = f32[2] all-reduce(%p), channel_id=1, replica_groups={written}, to_apply=%add
}}"""
    assert [c.groups for c in collectives(text)] == [groups]


NUMBERS = sum(a * b for a, b in itertools.pairwise(WIDTHS))
SCALES = sum(a for a, _ in itertools.pairwise(WIDTHS))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, 4 * NUMBERS),
        (dict(exchange="pair"), 8 * NUMBERS),
        (dict(wire_dtype="bfloat16"), 2 * NUMBERS),
        (dict(wire_dtype=jnp.int8), NUMBERS + 4 * SCALES),
        (dict(wire_dtype="bf16", exchange="pair"), 4 * NUMBERS),
        (dict(group_size=4), 2 * 4 * NUMBERS),
    ],
)
def test_bytes_of_an_exchange_are_those_stated(settings, wanted):
    from jaxlab.optim import exchange_bytes

    tx = noloco(optax.sgd(1e-2), axis_size=REPLICAS, **settings)
    params, state = setup(tx)
    text = compiled_text(
        by_shard_map(tx, state, mesh_of(8)), params, state, batches(1)[0]
    )
    sums = {}
    for c in collectives(text):
        sums[c.computation] = sums.get(c.computation, 0) + c.bytes
    stages = 2 if settings.get("group_size") == 4 else 1
    assert set(sums.values()) == {wanted // stages}
    one = jax.tree.map(lambda x: x[0], params)
    assert exchange_bytes(one, axis_size=REPLICAS, **settings) == wanted


def test_bytes_of_the_peers():
    """Data parallel: an all-reduce every step; DiLoCo: one every H steps."""
    from jaxlab.optim import exchange_bytes

    mesh = mesh_of(8)
    tx = optax.sgd(1e-2)
    params = first_params(np.random.default_rng(0))

    def dp(params, batch):
        grads = jax.lax.pmean(
            jax.grad(loss)(jax.lax.pcast(params, "replica", to="varying"), batch[0]),
            "replica",
        )
        return optax.apply_updates(params, tx.update(grads, tx.init(params))[0])

    step = jax.jit(
        jax.shard_map(dp, mesh=mesh, in_specs=(P(), P("replica")), out_specs=P())
    )
    every = collectives(compiled_text(step, params, batches(1)[0]))
    assert {c.kind for c in every} == {"all-reduce"}
    assert not any(c.conditional for c in every)
    assert sum(c.bytes for c in every) == 4 * NUMBERS

    tx = diloco(optax.sgd(1e-2), axis_size=REPLICAS)
    many, state = setup(tx)
    text = compiled_text(by_shard_map(tx, state, mesh), many, state, batches(1)[0])
    found = collectives(text)
    assert {c.kind for c in found} == {"all-reduce"}
    assert all(c.conditional for c in found)
    assert sum(c.bytes for c in found) == 4 * NUMBERS
    ring = exchange_bytes(params, axis_size=REPLICAS, pairing="all")
    assert ring == 4 * NUMBERS * 2 * 7 // 8


def test_odd_numbers_have_a_bye_that_keeps_its_own_numbers():
    tx = noloco(optax.sgd(0.0), axis_size=7, inner_steps=1, momentum=0.0)
    params, state = setup(tx, 7)
    step = by_shard_map(tx, state, mesh_of(7))
    new, after, _ = step(params, state, batches(1, 7)[0])
    bye = int(np.flatnonzero(partners("round_robin", 7, 0, 0) == np.arange(7))[0])
    np.testing.assert_array_equal(new["w0"][bye], params["w0"][bye])
    assert np.isnan(after.replica_std[bye])
    assert np.isfinite(np.delete(after.replica_std, bye)).all()
    text = compiled_text(step, params, state, batches(1, 7)[0])
    assert all(len(c.pairs) == 7 for c in collectives(text))


def test_a_count_that_varies_is_refused_when_traced():
    tx = noloco(optax.sgd(0.1), axis_size=REPLICAS)
    params, state = setup(tx)
    specs = replica_specs(state)

    def local(params, state, batch):
        count = state.count + 0 * jax.lax.axis_index("replica")
        state = state._replace(count=count)
        return tx.update(params, state, params)[0]

    step = jax.shard_map(
        local,
        mesh=mesh_of(8),
        in_specs=(P("replica"), specs, P("replica")),
        out_specs=P("replica"),
    )
    with pytest.raises(ValueError, match="state.count varies over 'replica'"):
        jax.eval_shape(step, params, state, batches(1)[0])
    # And one with a leading axis, as a wrong spec would give it.
    wrong = state._replace(count=jnp.zeros(8, jnp.int32))
    with pytest.raises(ValueError, match="state.count has shape"):
        tx.update(params, wrong, params)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [8])
def test_state_survives_jit_eager_and_abstract_init(replicas):
    tx = noloco(optax.adam(1e-2), axis_size=replicas, inner_steps=2)
    params, state = setup(tx)
    axes = replica_axes(state)
    eager = jax.vmap(
        partial(replica_step, tx),
        in_axes=(0, axes, 0),
        out_axes=(0, axes, 0),
        axis_name="replica",
    )
    a, b = (params, state), (params, state)
    with jax.disable_jit():
        for batch in batches(3):
            *a, _ = eager(*a, batch)
    for batch in batches(3):
        *b, _ = by_vmap(tx, state)(*b, batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), a, b)
    abstract = jax.eval_shape(
        lambda p: replicate(tx.init(p), replicas),
        first_params(np.random.default_rng(0)),
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


SIXTY_FOUR = """
import jax, jax.numpy as jnp, optax
from jax.sharding import AxisType, PartitionSpec as P
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 64)
from jaxlab.optim import noloco, replica_axes, replica_specs, replicate
tx = noloco(optax.sgd(1e-2), axis_size=64)
params = {"w": jnp.ones((16, 16)), "b": jnp.ones(16)}
state = replicate(tx.init(params), 64)
params = replicate(params, 64)
specs, axes = (P("replica"), replica_specs(state)), (0, replica_axes(state))
def local(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state
mesh = jax.make_mesh((64,), ("replica",), axis_types=(AxisType.Auto,))
step = jax.shard_map(
    jax.vmap(local, in_axes=axes, out_axes=axes),
    mesh=mesh, in_specs=specs, out_specs=specs,
)
print(jax.jit(step).lower(params, state).compile().as_text())
"""


def test_sixty_four_replicas_stay_a_small_program():
    """How long it takes to compile is in benchmarks/noloco_program.py."""
    text = subprocess.run(
        [sys.executable, "-c", SIXTY_FOUR],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert len(text) < 1e6
    rows = max(len(b) for b in branches(text))
    assert rows == MAX_ROWS
    found = collectives(text)
    assert len(found) == 2 * MAX_ROWS and all(len(c.pairs) == 64 for c in found)


DROP_OUT = """
import json, jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, PartitionSpec as P
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from jaxlab.optim import noloco, replica_axes, replica_specs, replicate
tx = noloco(optax.sgd(0.0), axis_size=8, inner_steps=2)
params = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)
state = replicate(tx.init(params[0]), 8)._replace(slow=params)
axes, own, all_ = replica_axes(state), P("replica"), P()
def step(params, state, alive):
    updates, state = tx.update(params, state, params, alive=alive)
    return optax.apply_updates(params, updates), state
step = jax.jit(jax.shard_map(
    jax.vmap(step, in_axes=(0, axes, None), out_axes=(0, axes)),
    mesh=jax.make_mesh((8,), ("replica",), axis_types=(AxisType.Auto,)),
    in_specs=(own, replica_specs(state), all_), out_specs=(own, replica_specs(state)),
))
everyone = jnp.ones(8, bool)
path = [params]
for number in range(50):
    alive = everyone.at[3].set(False) if number < 10 else everyone
    params, state = step(params, state, alive)
    path.append(params)
print(json.dumps(np.asarray(path[::2], np.float64).tolist()))
"""


def test_a_replica_may_be_away_for_rounds_and_comes_back():
    """25 rounds without gradients on 8 devices; replica 3 is away for the first 5."""
    done = subprocess.run(
        [sys.executable, "-c", DROP_OUT],
        capture_output=True,
        text=True,
        check=True,
        timeout=180,  # a hang fails
    )
    path = np.asarray(json.loads(done.stdout))  # [round, replica, number]
    others = [i for i in range(8) if i != 3]
    away, back = path[:6], path[5:]
    np.testing.assert_array_equal(away[:, 3], np.tile(path[0, 3], (6, 1)))
    survivors = away[:, others].mean(1)
    np.testing.assert_allclose(survivors, np.tile(survivors[0], (6, 1)), atol=1e-6)
    np.testing.assert_allclose(
        back.mean(1), np.tile(path[0].mean(0), (21, 1)), atol=2e-6
    )
    rounds = 20
    rate = (back[-1].var(0).mean() / back[0].var(0).mean()) ** (1 / rounds)
    # The theory is of independent rows; without replacement they mix a little better.
    assert 0.6 * contraction(0.5, 0.7, 8) < rate < 1.1 * contraction(0.5, 0.7, 8)
