"""Collectives that hide behind matmuls; stands alone on jax and numpy."""

from jaxlab.overlap.matmul import (
    OverlapSkipped,
    all_gather_matmul,
    matmul_all_reduce,
    matmul_reduce_scatter,
)

__all__ = [
    "OverlapSkipped",
    "all_gather_matmul",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
]
