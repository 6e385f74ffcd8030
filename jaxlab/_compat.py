"""What jaxlab needs of JAX's insides: jax 0.10.2 to 0.12.0.1."""

import functools
from typing import Any

import jax
from jax._src import compilation_cache, compiler, distributed


@functools.cache
def cache_on_every_process() -> None:
    """Has every process of a job on CPU write to the persistent compilation cache.

    JAX writes on process 0 alone, because the others would find its entries. On CPU
    they do not: the key has the topology as each process sees it. So after a restart
    all but process 0 would compile again, and process 0 would wait for them. The
    entries are named by their keys: no two processes write the same file.
    """
    original = getattr(compiler, "_cache_write", None)
    if original is None or not hasattr(compilation_cache, "put_executable_and_time"):
        return  # another version of JAX: slower restarts

    def write(
        key: str, seconds: float, module: str, backend: Any, executable: Any, *rest: Any
    ) -> None:
        shortest = jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore
        callbacks = any(rest)
        if distributed.global_state.process_id == 0 or backend.platform != "cpu":
            original(key, seconds, module, backend, executable, *rest)
        elif seconds >= shortest and not callbacks:
            compilation_cache.put_executable_and_time(
                key, module, executable, backend, int(seconds)
            )

    compiler._cache_write = write
