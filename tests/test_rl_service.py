"""The router of the rollout service, and the messages between the processes."""

import collections
import contextlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.rl import wire
from jaxlab.rl.cluster import make_env
from jaxlab.rl.config import RLRun, Rollout, TinyPolicy
from jaxlab.rl.service import Answerer, Router, WorkerSpec
from jaxlab.rl.tables import Version


def version(number):
    return Version(number, number, f"weights/{number}", "00")


def request(rollout, t=0, least=0):
    return {"rollout": rollout, "t": t, "least": least, "slot": "h/0"}


def router_with(count, sync="per_worker", at=0):
    router = Router(sync)
    router.publish(version(at))
    for i in range(count):
        router.join(f"w{i}", b"w%d" % i)
    for i in range(count):
        router.loaded(f"w{i}", at)
    return router


def acts(sends):
    return [(s.peer, s.body["rollout"]) for s in sends if s.kind == "act"]


def test_requests_go_to_the_worker_with_fewest_in_flight():
    router = router_with(3)
    got = collections.Counter(
        peer for r in range(9) for peer, _ in acts(router.ask(b"e", request(r)))
    )
    assert got == {b"w0": 3, b"w1": 3, b"w2": 3}
    for rollout in (0, 3, 6):  # w0 has answered all of its own
        router.answer("w0", request(rollout))
    assert acts(router.ask(b"e", request(9))) == [(b"w0", 9)]


def test_a_request_is_answered_once_and_the_same_again():
    router = router_with(2)
    [send] = router.ask(b"env", request(1))
    assert router.ask(b"moved", request(1)) == []  # under way
    answer = {**request(1), "tokens": [3]}
    [reply] = router.answer("w0", answer)
    assert reply == (b"moved", "acted", answer)
    assert router.ask(b"env", request(1)) == [(b"env", "acted", answer)]
    assert router.answer("w1", {**request(1), "tokens": [4]}) == []
    assert send.peer == b"w0"


def test_a_workers_death_moves_its_requests():
    router = router_with(2)
    for rollout in range(4):
        router.ask(b"e", request(rollout))
    lost = set(router.workers["w0"].in_flight)
    moved = acts(router.leave("w0"))
    assert {peer for peer, _ in moved} == {b"w1"}
    assert {(rollout, 0) for _, rollout in moved} == lost
    assert len(router.workers["w1"].in_flight) == 4


def test_without_workers_requests_wait():
    router = Router()
    assert router.ask(b"e", request(1)) == []
    router.publish(version(0))
    assert [s.kind for s in router.join("w0", b"w0")] == ["load"]
    assert acts(router.loaded("w0", 0)) == [(b"w0", 1)]


def test_workers_are_spread_over_the_devices_and_answer_alike():
    run = RLRun(policy=TinyPolicy(), rollout=Rollout(buckets=(2,)))
    with contextlib.closing(make_env(run.envs)) as env:
        space, (seen, _) = env.observation_space, env.reset(seed=1)
    asked = [request(3) | {name: seen[name] for name in ("image", "instruction")}]
    answers, used = [], []
    for index in range(9):
        answerer = Answerer(WorkerSpec(f"w{index}", index, None, run, space))
        params = answerer.place(answerer.policy.init(jax.random.key(0)))
        used += jax.tree.leaves(params)[0].devices()
        (answer,) = answerer(params, asked, 0)
        answers.append([answer["tokens"].tolist(), answer["logp"].tolist()])
    devices = jax.local_devices()
    assert used == [*devices[1:], *devices[:2]]  # the first is the learner's
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("workers", [2, 4])
def test_per_worker_sync_never_leaves_nobody_serving(workers):
    router = router_with(workers)
    sends = router.publish(version(1))
    seen = []
    while sends:
        assert len(sends) == 1  # one at a time
        seen.append(sends[0].peer)
        assert router.serving() == workers - 1
        assert acts(router.ask(b"e", request(100 + len(seen))))
        name = sends[0].peer.decode()
        sends = [s for s in router.loaded(name, 1) if s.kind == "load"]
    assert sorted(seen) == [b"w%d" % i for i in range(workers)]
    assert {w.version for w in router.workers.values()} == {1}


def test_all_worker_sync_stops_all_and_requests_wait():
    router = router_with(3, "all")
    assert len(router.publish(version(1))) == 3
    assert router.serving() == 0
    assert router.ask(b"e", request(1)) == []
    assert acts(router.loaded("w2", 1)) == [(b"w2", 1)]


def test_a_publication_during_a_roll_goes_to_those_still_to_come():
    router = router_with(2)
    [first] = router.publish(version(1))
    assert router.publish(version(2)) == []  # one is away already
    [second] = router.loaded(first.peer.decode(), 1)
    assert second.body["version"] == 2
    third = router.loaded(second.peer.decode(), 2)
    assert [s.body["version"] for s in third] == [2]


def test_a_worker_that_found_no_weights_is_told_of_the_newest():
    router = router_with(1)
    router.publish(version(1))
    router.publish(version(2))
    [send] = router.loaded("w0", 0)  # those of version 1 are gone already
    assert send.body["version"] == 2 and router.serving() == 0


def test_a_request_waits_for_the_version_that_it_needs():
    router = router_with(2)
    router.publish(version(1))  # w0 loads
    assert router.ask(b"e", request(1, least=1)) == []
    sends = router.loaded("w0", 1)
    assert acts(sends) == [(b"w0", 1)]


def test_what_is_forgotten_is_not_answered():
    router = router_with(1)
    router.ask(b"e", request(1))
    router.forget(1)
    assert router.answer("w0", request(1)) == []


@given(st.lists(st.tuples(st.sampled_from("akljdp"), st.integers(0, 7)), max_size=80))
@settings(deadline=None, max_examples=50)
def test_no_request_is_lost_or_answered_twice(events):
    """Whatever happens to the workers, in the end each request has one answer."""
    router, published, alive = Router(), 0, set()
    router.publish(version(0))
    asked, answered = set(), collections.Counter()
    loading: dict[str, int] = {}
    flying: dict[str, list] = collections.defaultdict(list)

    def take(sends):
        for send in sends:
            name = send.peer.decode()
            if send.kind == "acted":
                answered[send.body["rollout"]] += 1
            elif send.kind == "load":
                loading[name] = send.body["version"]
            else:
                assert name in alive and name not in loading
                flying[name].append(send.body)

    for kind, i in [
        *events,
        *[(k, i) for _ in range(9) for i in range(8) for k in "jla"],
    ]:
        name = f"w{i % 3}"
        if kind == "k" and name in alive:
            alive.discard(name)
            loading.pop(name, None)
            flying.pop(name, None)
            take(router.leave(name))
        elif kind == "j" and name not in alive:
            alive.add(name)
            take(router.join(name, name.encode()))
        elif kind == "l" and name in loading:
            take(router.loaded(name, loading.pop(name)))
        elif kind == "a" and flying[name]:
            take(router.answer(name, flying[name].pop()))
        elif kind == "p":
            published += 1
            take(router.publish(version(published)))
        elif kind == "d":
            asked.add(100 + i)
            if answered[100 + i] == 0:
                take(router.ask(b"e", request(100 + i)))
    assert all(answered[rollout] == 1 for rollout in asked)


# ----------------------------------------------------------------- messages


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.text()
        | st.binary()
        | st.floats(allow_nan=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
@settings(deadline=None)
def test_messages_come_back(value):
    assert wire.unpack(wire.pack(value)) == value


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (4, 2, 3)])
def test_arrays_come_back(dtype, shape):
    array = (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)
    back = wire.unpack(wire.pack({"a": array}))["a"]
    assert back.dtype == array.dtype and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_garbage_is_a_value_error_or_data(data):
    try:
        wire.unpack(data)
    except ValueError:
        pass


@given(st.data())
@settings(deadline=None)
def test_a_flipped_bit_never_does_worse(data):
    packed = bytearray(wire.pack({"a": np.ones((2, 3), np.float32), "b": [1, "x"]}))
    place = data.draw(st.integers(0, len(packed) - 1))
    packed[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        wire.unpack(bytes(packed))
    except ValueError:
        pass


def test_what_is_no_data_is_not_sent():
    with pytest.raises(TypeError, match="cannot send"):
        wire.pack({"a": object()})


def test_a_peer_without_the_key_is_not_heard():
    keys, other = wire.new_keys(), wire.new_keys()
    wrong = other._replace(address=keys.address, master_public=keys.master_public)
    with wire.listen(keys) as hub, wire.connect(keys) as peer:
        with wire.connect(wrong) as stranger:
            stranger.send("hello", {"from": "stranger"})
            peer.send("hello", {"from": "peer", "image": np.zeros((2, 2, 3), np.uint8)})
            heard = []
            for _ in range(40):
                heard += hub.receive(0.05)
    assert [m.body["from"] for m in heard] == ["peer"]
