"""Collectives that hide behind matmuls; stands alone on jax and numpy."""

from jaxlab.overlap.matmul import (
    OverlapSkipped,
    all_gather_matmul,
    matmul_all_reduce,
    matmul_reduce_scatter,
)
from jaxlab.overlap.policy import Explanation, Policy, Site
from jaxlab.overlap.schedule import (
    Report,
    Window,
    aot_compile,
    compiler_options,
    schedule_report,
    target_mesh,
)
from jaxlab.overlap.transform import explain, overlap

__all__ = [
    "Explanation",
    "Policy",
    "Site",
    "explain",
    "overlap",
    "OverlapSkipped",
    "Report",
    "Window",
    "all_gather_matmul",
    "aot_compile",
    "compiler_options",
    "matmul_all_reduce",
    "matmul_reduce_scatter",
    "schedule_report",
    "target_mesh",
]
