"""What this part needs of JAX's insides: jax 0.10.2 to 0.12.0.1."""

import contextlib
from collections.abc import Iterator

from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]


@contextlib.contextmanager
def coordination_service(address: str, processes: int) -> Iterator[None]:
    """JAX's coordinator, in this process: it outlives every rank.

    `jax.distributed.initialize` has process 0 start one; with
    `JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:0` there, that one is left unused.

    Args:
        address: HOST:PORT to listen at.
        processes: that will connect.
    """
    service = _jax.get_distributed_runtime_service(
        address, processes, heartbeat_timeout=100, shutdown_timeout=5
    )
    try:
        yield
    finally:
        service.shutdown()
