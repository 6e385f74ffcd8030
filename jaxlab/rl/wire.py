"""How the processes of a run talk: MessagePack over the keyed, encrypted channel of C4.

A message is numbers, text, bytes, lists and string-keyed maps; arrays go as their
dtype, shape and bytes. Nothing that arrives is unpickled or evaluated.
"""

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np

from jaxlab.health import channel
from jaxlab.health.channel import Channel, Keys, Message

__all__ = ["Channel", "Keys", "Message", "connect", "listen", "new_keys", "pack"]

_ARRAY = 1
_DTYPES = {name: np.dtype(name) for name in ("uint8", "int32", "float32", "bool")}


def pack(value: Any) -> bytes:
    """Bytes of a message."""
    packed = msgpack.packb(value, default=_pack_array)
    assert packed is not None
    return packed


def unpack(data: bytes) -> Any:
    """Inverse of `pack`.

    Raises:
        ValueError: these bytes are no message.
    """
    try:
        return msgpack.unpackb(data, ext_hook=_unpack_array, max_ext_len=2**26)
    except ValueError:
        raise
    except Exception as error:  # msgpack has its own types
        raise ValueError(str(error)) from error


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        head = [value.dtype.name, list(value.shape), value.tobytes()]
        return msgpack.ExtType(_ARRAY, msgpack.packb(head))
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot send a {type(value).__name__}")


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    name, shape, content = msgpack.unpackb(data)
    if code != _ARRAY or name not in _DTYPES or len(shape) > 4:
        raise ValueError("no array")
    dtype = _DTYPES[name]
    if any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("no shape")
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array of another size than its shape")
    return np.frombuffer(content, dtype).reshape(shape)


PACKED = channel.Codec(pack, unpack, 2**27)


def new_keys(host: str = "127.0.0.1") -> Keys:
    """Fresh keys for a hub at a free port of this host."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return channel.new_keys(f"tcp://{host}:{port}")


@contextmanager
def listen(keys: Keys) -> Iterator[Channel]:
    """The hub's end."""
    with channel.listen(keys, PACKED) as opened:
        yield opened


@contextmanager
def connect(keys: Keys) -> Iterator[Channel]:
    """A peer's end; `keys` need not have the hub's secret."""
    with channel.connect(keys, PACKED) as opened:
        yield opened
