"""Optimizers as optax transformations; stands alone on jax, numpy and optax."""

from jaxlab.optim.adamw import adamw, learning_rate
from jaxlab.optim.noloco import NoLoCoState, diloco, exchange_bytes, noloco, outer_step
from jaxlab.optim.pairing import partners
from jaxlab.optim.replicas import (
    map_replicas,
    mean_params,
    replica_axes,
    replica_specs,
    replicate,
    resize,
)
from jaxlab.optim.stability import contraction, gamma_max, stationary_variance

__all__ = [
    "NoLoCoState",
    "adamw",
    "contraction",
    "diloco",
    "exchange_bytes",
    "gamma_max",
    "learning_rate",
    "map_replicas",
    "mean_params",
    "noloco",
    "outer_step",
    "partners",
    "replica_axes",
    "replica_specs",
    "replicate",
    "resize",
    "stationary_variance",
]
