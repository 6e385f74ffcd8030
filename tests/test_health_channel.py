"""The channel: who has the keys is heard, and nobody else."""

import json
import os
import socket

import pytest
import zmq

from jaxlab.errors import UserError
from jaxlab.health import channel


@pytest.fixture
def keys():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return channel.new_keys(f"tcp://127.0.0.1:{port}")


def heard(end, seconds=5.0):
    return [(m.kind, m.body) for m in end.receive(seconds)]


def test_a_message_and_its_answer(keys):
    with channel.listen(keys) as master, channel.connect(keys) as agent:
        assert agent.send("hello", {"host": "a", "slots": 2})
        (message,) = master.receive(5.0)
        assert (message.kind, message.body) == ("hello", {"host": "a", "slots": 2})
        assert master.send("start", {"ranks": [0, 1]}, message.sender)
        assert heard(agent) == [("start", {"ranks": [0, 1]})]
        assert not master.send("start", {}, b"nobody")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04K\x01.",  # a pickle
        b"{}",
        b'{"kind": 1, "body": {}}',
        b'{"kind": "a", "body": []}',
        b"[" * 100_000,
        "é".encode("latin-1"),
    ],
)
def test_garbage_is_dropped_and_counted(keys, data):
    with channel.listen(keys) as master, channel.connect(keys) as agent:
        agent._socket.send(data)
        agent.send("after", {})
        found = heard(master) or heard(master)
        while not found:
            found = heard(master)
        assert found == [("after", {})]
        assert master.refused == 1


def test_a_message_that_is_too_large_does_not_arrive(keys):
    with channel.listen(keys) as master, channel.connect(keys) as agent:
        agent.send("large", {"text": "x" * channel.LARGEST})
        assert heard(master, 1.0) == []


@pytest.mark.parametrize("case", ["no key", "other key", "other master"])
def test_strangers_are_not_heard(keys, case):
    stranger = channel.new_keys(keys.address)
    with channel.listen(keys) as master:
        if case == "no key":
            context = zmq.Context()
            end = context.socket(zmq.DEALER)
            end.connect(keys.address)
            end.send(json.dumps({"kind": "hello", "body": {}}).encode())
            assert heard(master, 1.0) == []
            context.destroy(linger=0)
            return
        if case == "other key":
            stranger = stranger._replace(master_public=keys.master_public)
        with channel.connect(stranger) as agent:
            agent.send("hello", {})
            assert heard(master, 1.0) == []


def test_the_key_file(keys, tmp_path):
    path = tmp_path / "agent.key"
    channel.write_keys(path, keys)
    assert path.stat().st_mode & 0o777 == 0o600
    assert channel.read_keys(path) == keys
    os.chmod(path, 0o644)
    with pytest.raises(UserError, match="chmod 600"):
        channel.read_keys(path)
    path.write_text("{")
    with pytest.raises(UserError, match="garbled"):
        channel.read_keys(path)
    with pytest.raises(UserError, match="no key file"):
        channel.read_keys(tmp_path / "none")


def test_an_address_in_use_is_named(keys):
    with channel.listen(keys), pytest.raises(UserError, match=keys.address):
        with channel.listen(keys):
            pass


def test_a_new_master_with_the_old_keys_is_found_again(keys):
    with channel.connect(keys) as agent:
        for turn in range(2):
            with channel.listen(keys) as master:
                agent.send("report", {"turn": turn})
                assert ("report", {"turn": turn}) in heard(master)
