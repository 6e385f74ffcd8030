"""Published weights: a safetensors file for each version, with its hash."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.files import write_bytes


def save_weights(path: Path, params: Any) -> str:
    """Writes weights, synced; their sha256."""
    import jax
    from safetensors.numpy import save

    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    data = save({jax.tree_util.keystr(k): np.ascontiguousarray(v) for k, v in flat})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def load_weights(path: str | Path, sha256: str, template: Any) -> Any:
    """Reads weights.

    Args:
        path: of the file.
        sha256: that was published with it.
        template: pytree of arrays or shapes that they must have.

    Raises:
        ValueError: the file is another than was published, or of another policy.
    """
    import jax
    from safetensors.numpy import load

    data = Path(path).read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"weights {path} are damaged")
    arrays = load(data)
    flat, tree = jax.tree_util.tree_flatten_with_path(template)
    names = [jax.tree_util.keystr(k) for k, _ in flat]
    for name, (_, wanted) in zip(names, flat, strict=True):
        found = arrays.get(name)
        if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(f"weights {path} are of another policy: {name}")
    return jax.tree.unflatten(tree, [jax.numpy.asarray(arrays[name]) for name in names])


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest weights; `<version>.safetensors`."""
    found = sorted(folder.glob("[0-9]*.safetensors"), key=lambda p: int(p.stem))
    for path in found[:-keep]:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
