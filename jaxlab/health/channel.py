"""How agents and master talk: JSON over ZeroMQ, both ends known by their keys.

CurveZMQ encrypts, and each end proves that it has the secret key which the other one
knows the public key of: one pair is the master's, one all agents'. Agents on other
hosts need a copy of the agents' key file, which only its owner can read. Who has no key
never reaches the decoder, and what is decoded is JSON of limited size: nothing that
arrives is unpickled or evaluated.
"""

import contextlib
import hmac
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zmq
import zmq.auth
import zmq.auth.thread

from jaxlab.errors import UserError

LARGEST = 2**22
"""Bytes of a message; a larger one ends the connection."""


class Codec(NamedTuple):
    """How a message is written; what arrives is data to `loads`, never code."""

    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]
    """raises ValueError, TypeError or RecursionError on what it cannot read"""
    largest: int
    """bytes of a message"""


JSON = Codec(
    lambda value: json.dumps(value, allow_nan=False).encode(), json.loads, LARGEST
)


class Keys(NamedTuple):
    """What a key file holds."""

    address: str
    """tcp://HOST:PORT of the master"""
    master_public: str
    agent_public: str
    agent_secret: str
    master_secret: str = ""
    """in the master's file alone"""


class Message(NamedTuple):
    """What was received."""

    sender: bytes
    """of the connection, to answer; empty for an agent"""
    kind: str
    body: dict[str, Any]


def new_keys(address: str) -> Keys:
    """Fresh keys of a job whose master listens at `address` (tcp://HOST:PORT)."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    agents = (key.decode() for key in zmq.curve_keypair())
    return Keys(address, public, *agents, master_secret=secret)


def write_keys(path: str | Path, keys: Keys) -> None:
    """Writes the key file, readable by its owner alone."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:  # mkstemp makes it 0600
        json.dump(keys._asdict(), file)
    os.replace(temporary, path)


def read_keys(path: str | Path) -> Keys:
    """Reads a key file.

    Raises:
        UserError: there is none, it is garbled, or others can read it.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        found = Keys(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"there is no key file {path}: copy the master's") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"the key file {path} is garbled: copy the master's") from error
    if mode & 0o077:
        raise UserError(f"others can read the key file {path}: chmod 600 {path}")
    return found


class Channel:
    """One end; `send` and `receive` never block longer than they are told to."""

    def __init__(self, socket: Any, routes: bool, codec: Codec) -> None:
        """`routes`: the master's end, which has many others."""
        self._socket, self._routes, self._codec = socket, routes, codec
        self.refused = 0
        """messages dropped because they were garbled"""

    def send(self, kind: str, body: dict[str, Any], to: bytes = b"") -> bool:
        """Queues a message; False if the other end is gone or too far behind."""
        data = self._codec.dumps({"kind": kind, "body": body})
        try:
            parts = [to, data] if self._routes else [data]
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def receive(self, seconds: float) -> list[Message]:
        """All messages there are, after waiting for the first one so long."""
        found: list[Message] = []
        if not self._socket.poll(int(1000 * seconds)):
            return found
        while len(found) < 1000:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            sender = parts[0] if self._routes else b""
            message = self._decoded(sender, parts[-1]) if len(parts) <= 2 else None
            if message is None:
                self.refused += 1
            else:
                found.append(message)
        return found

    def _decoded(self, sender: bytes, data: bytes) -> Message | None:
        """A message, or None if it is none."""
        try:
            found = self._codec.loads(data)
            kind, body = found["kind"], found["body"]
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        if not isinstance(kind, str) or not isinstance(body, dict):
            return None
        return Message(sender, kind, body)


@contextlib.contextmanager
def listen(keys: Keys, codec: Codec = JSON) -> Iterator[Channel]:
    """The master's end, at `keys.address`.

    Raises:
        UserError: the address cannot be bound.
    """
    context = zmq.Context()
    guard = zmq.auth.thread.ThreadAuthenticator(context)
    try:
        guard.start()
        guard.configure_curve_callback("*", credentials_provider=_Known(keys))
        socket = context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # to hear that an agent has gone
        socket.curve_server = True
        socket.curve_publickey = keys.master_public.encode()
        socket.curve_secretkey = keys.master_secret.encode()
        _limit(socket, codec)
        try:
            socket.bind(keys.address)
        except zmq.ZMQError as error:
            raise UserError(
                f"cannot listen at {keys.address}: {error}; choose another --address"
            ) from error
        yield Channel(socket, True, codec)
    finally:
        guard.stop()
        context.destroy(linger=200)


class _Known:
    """Knows the agents' public key."""

    def __init__(self, keys: Keys) -> None:
        self._key = keys.agent_public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether this is an agent of the job."""
        return hmac.compare_digest(key, self._key)


@contextlib.contextmanager
def connect(keys: Keys, codec: Codec = JSON) -> Iterator[Channel]:
    """An agent's end; connects again by itself as long as it lives."""
    context = zmq.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.curve_serverkey = keys.master_public.encode()
        socket.curve_publickey = keys.agent_public.encode()
        socket.curve_secretkey = keys.agent_secret.encode()
        _limit(socket, codec)
        socket.connect(keys.address)
        yield Channel(socket, False, codec)
    finally:
        context.destroy(linger=200)


def _limit(socket: Any, codec: Codec) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, codec.largest)
    # ZeroMQ's own heartbeats: a vanished peer is noticed, and connected to again.
    socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 5000)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
