"""Trajectories: their blobs, which nobody can make misbehave, and padded batches."""

import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from jaxlab.rl.trajectory import (
    Step,
    Trajectory,
    assemble,
    collate,
    decode,
    encode,
    padded_size,
)


def example(steps=3, seed=0, **fields) -> Trajectory:
    rng = np.random.default_rng(seed)

    def step(t):
        ends = rng.integers(1, 4)
        tokens = np.where(np.arange(4) < ends, rng.integers(0, 9, 4), -1)
        return Step(
            rng.integers(0, 255, (8, 6, 3), np.uint8),
            tokens,
            -rng.random(4),
            rng.random(4),
            version=5 + t,
            worker=1,
            wait=0.25,
            busy=0.5,
        )

    given_ = {
        "id": 7,
        "task": "click",
        "seed": 11,
        "group": 2,
        "text": "PRESS ONE",
        "instruction": np.array([3, 1, 0], np.int32),
        "final": np.zeros((8, 6, 3), np.uint8),
        "reward": 0.5,
    }
    return assemble([step(t) for t in range(steps)], **(given_ | fields))


def same(a: Trajectory, b: Trajectory) -> bool:
    return all(
        np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y
        for x, y in zip(a, b, strict=True)
    )


@given(st.integers(1, 5), st.integers(0, 99), st.booleans(), st.floats(0, 1))
@settings(deadline=None)
def test_a_blob_gives_the_trajectory_back(steps, seed, capped, reward):
    one = example(steps, seed, cap_truncated=capped, reward=reward, source="human")
    back = decode(encode(one))
    assert same(one, back)
    assert back.length == steps
    assert encode(back) == encode(one)


def test_unknown_log_probabilities_survive():
    one = example()._replace(logp=np.full((3, 4), np.nan, np.float32))
    assert np.isnan(decode(encode(one)).logp).all()


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_garbage_is_refused(blob):
    for data in (blob, zlib.compress(blob)):
        with pytest.raises(ValueError, match="trajectory blob"):
            decode(data)


@given(st.data())
@settings(deadline=None)
def test_a_flipped_bit_is_refused_or_changes_numbers_only(data):
    blob = bytearray(encode(example()))
    place = data.draw(st.integers(0, len(blob) - 1))
    blob[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        back = decode(bytes(blob))
    except ValueError:
        return
    assert back.images.dtype == np.uint8


def test_a_bomb_is_refused():
    bomb = zlib.compress(bytes(10**7), 9)
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        decode(bomb, 10**6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logp": np.zeros((2, 4), np.float32)}, "logp has shape"),
        ({"version": np.zeros(3, np.int64)}, "version is int64"),
        ({"images": np.zeros((3, 8, 6, 4), np.uint8)}, "images has shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, match):
    whole = decode(encode(example()))._asdict() | change
    arrays = {k: v for k, v in whole.items() if isinstance(v, np.ndarray)}
    plain = {k: v for k, v in whole.items() if k not in arrays}
    blob = save(arrays, {"trajectory": json.dumps(plain)})
    with pytest.raises(ValueError, match=match):
        decode(zlib.compress(blob))


def test_a_reward_out_of_range_is_refused():
    with pytest.raises(ValueError, match="reward 1.5"):
        decode(encode(example(reward=1.5)))


def test_collate_pads_and_keeps_each_step():
    groups = [[example(2, 1), example(3, 2, reward=1.0)], [example(1, 3, reward=0.0)]]
    batch = collate(groups, version=9, steps=8)
    assert batch.group.tolist() == [0, 0, 0, 0, 0, 1, -1, -1]
    assert batch.reward.tolist() == [0.5, 0.5, 1, 1, 1, 0, 0, 0]
    assert batch.lag.tolist() == [4, 3, 4, 3, 2, 4, 0, 0]
    assert not batch.mask[6:].any() and batch.mask[:6].any(1).all()
    flat = [one for group in groups for one in group]
    np.testing.assert_array_equal(
        batch.images[:6], np.concatenate([o.images for o in flat])
    )
    masks = np.concatenate([o.mask for o in flat])
    np.testing.assert_array_equal(batch.mask[:6], masks)
    for row, one in ((0, flat[0]), (5, flat[2])):
        chosen = one.mask[0]
        np.testing.assert_allclose(
            batch.entropy[row], one.entropy[0][chosen].mean(), rtol=1e-6
        )
        np.testing.assert_array_equal(batch.logp[row][chosen], one.logp[0][chosen])
    with pytest.raises(ValueError, match="6 steps do not go into a batch of 5"):
        collate(groups, 9, 5)


@given(st.integers(1, 5000))
@settings(deadline=None)
def test_padded_sizes_are_few(steps):
    size = padded_size(steps)
    assert size >= steps
    assert size == 32 or size < 2 * steps


def test_demonstrations_have_no_lag():
    one = example()._replace(version=np.full(3, -1, np.int32))
    assert collate([[one]], version=9).lag.tolist() == [0, 0, 0]
