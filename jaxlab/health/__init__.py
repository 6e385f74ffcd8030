"""Health of a distributed program: find the slow or dead part (C4, arXiv 2406.04594).

What needs jax is imported when it is first asked for, so that the supervisor's small
commands start at once; agents and supervisor (`agent`, `supervise`) have modules of
their own and need ZeroMQ.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlab.health.detect import (
    Baseline,
    Board,
    DetectConfig,
    Diagnosis,
    Kind,
    Phase,
    RankSample,
    Window,
    align,
    detect_stall,
)
from jaxlab.health.matrix import classify_matrix
from jaxlab.health.pairs import plan_pairs
from jaxlab.health.sequential import (
    detect_slow,
    init_baseline,
    init_slow,
    update_baseline,
    update_slow,
)

if TYPE_CHECKING:
    from jaxlab.health.plan import plan_mesh, plan_order, ring_cost
    from jaxlab.health.probe import ppermute_probe, tcp_probe
    from jaxlab.health.profile import sample_profile
    from jaxlab.health.record import Recorder, instrument, watch

_WITH_JAX = {
    "plan_mesh": "plan",
    "plan_order": "plan",
    "ring_cost": "plan",
    "ppermute_probe": "probe",
    "tcp_probe": "probe",
    "sample_profile": "profile",
    "Recorder": "record",
    "instrument": "record",
    "watch": "record",
}

__all__ = [
    "Baseline",
    "Board",
    "DetectConfig",
    "Diagnosis",
    "Kind",
    "Phase",
    "RankSample",
    "Recorder",
    "Window",
    "align",
    "classify_matrix",
    "detect_slow",
    "detect_stall",
    "init_baseline",
    "init_slow",
    "instrument",
    "plan_mesh",
    "plan_order",
    "plan_pairs",
    "ppermute_probe",
    "ring_cost",
    "sample_profile",
    "tcp_probe",
    "update_baseline",
    "update_slow",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Imports the module of a name that needs jax."""
    if name not in _WITH_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WITH_JAX[name]}"), name)
