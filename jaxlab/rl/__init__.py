"""DART: asynchronous reinforcement learning for GUI agents (arXiv 2509.23866).

Names are imported when they are first asked for: the many processes that host
environments import `jaxlab.rl.envs` and need no jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlab.rl.curation import (
        Experience,
        PoolState,
        Source,
        entropy_mask,
        expire,
        is_informative,
        length_cap,
        needs_experience,
        pool_add,
        pool_sample,
        provenance,
        rollout_number,
        success_rate,
    )
    from jaxlab.rl.loss import (
        dart_loss,
        stepwise_advantage,
        truncated_importance_weights,
    )

_MODULES = {
    "Experience": "curation",
    "PoolState": "curation",
    "Source": "curation",
    "dart_loss": "loss",
    "entropy_mask": "curation",
    "expire": "curation",
    "is_informative": "curation",
    "length_cap": "curation",
    "needs_experience": "curation",
    "pool_add": "curation",
    "pool_sample": "curation",
    "provenance": "curation",
    "rollout_number": "curation",
    "stepwise_advantage": "loss",
    "success_rate": "curation",
    "truncated_importance_weights": "loss",
}

__all__ = [
    "Experience",
    "PoolState",
    "Source",
    "dart_loss",
    "entropy_mask",
    "expire",
    "is_informative",
    "length_cap",
    "needs_experience",
    "pool_add",
    "pool_sample",
    "provenance",
    "rollout_number",
    "stepwise_advantage",
    "success_rate",
    "truncated_importance_weights",
]


def __getattr__(name: str) -> Any:
    """Imports the module of a name."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
