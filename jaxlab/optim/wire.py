"""What an exchange puts on the wire, and how much of it.

A narrow message is bit-cast to integers: XLA on CPU would otherwise widen a bfloat16
permute to float32 without a word.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_TYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "int8": "int8"}


def wire_type(dtype: Any) -> str | None:
    """The name of a wire type: None (no rounding), "bfloat16" or "int8".

    Raises:
        ValueError: any other type.
    """
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in _TYPES:
        raise ValueError(f"wire_dtype is {name}; choose None, bfloat16 or int8")
    return _TYPES[name]


def encode(x: jax.Array, wire: str | None) -> tuple[jax.Array, ...]:
    """The arrays that are sent for x.

    int8 has one float32 scale for each row of the last dimension: max |x| / 127.
    """
    if wire is None:
        return (x,)
    if wire == "bfloat16":
        return (jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16),)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True) if x.ndim else jnp.abs(x)
    scale = jnp.where(largest > 0, largest / 127, 1).astype(jnp.float32)
    return jnp.round(x / scale).astype(jnp.int8), scale


def decode(message: tuple[jax.Array, ...], wire: str | None, dtype: Any) -> jax.Array:
    """What the receiver makes of a message, and the sender of its own."""
    if wire is None:
        return message[0]
    if wire == "bfloat16":
        return jax.lax.bitcast_convert_type(message[0], jnp.bfloat16).astype(dtype)
    number, scale = message
    return (number.astype(jnp.float32) * scale).astype(dtype)


def message_bytes(shape: tuple[int, ...], wire: str | None, dtype: Any) -> int:
    """Bytes of a message for an array of this shape and type."""
    numbers = int(np.prod(shape))
    if wire is None:
        return numbers * jnp.dtype(dtype).itemsize
    if wire == "bfloat16":
        return 2 * numbers
    return numbers + 4 * int(np.prod(shape[:-1]))
