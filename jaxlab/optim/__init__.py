"""Optimizers as optax transformations; stands alone on jax, numpy and optax."""

from jaxlab.optim.adamw import adamw, learning_rate

__all__ = ["adamw", "learning_rate"]
