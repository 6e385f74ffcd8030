"""Which form each collective takes, and why: `Policy`, and what `explain` says."""

import collections
import concurrent.futures
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxlab.overlap import _compat, sites
from jaxlab.overlap.hardware import Hardware, choose, find, measure

FORMS = ("ring", "bidirectional", "pallas")
"""Forms that overlap."""


@dataclass(frozen=True)
class Policy:
    """Which form each site takes."""

    mode: Literal["auto", "ring", "bidirectional", "pallas", "plain"] = "auto"
    """auto: plain, ring or bidirectional, whichever is predicted to be fastest;
    pallas: one TPU kernel each (`jaxlab.overlap.pallas`), under a shard_map over all
    axes; off TPU they are interpreted, slowly"""
    chunks: int = 1
    """of a ring, see `matmul_reduce_scatter`: on TPU take 2; auto chooses by itself,
    pallas has none"""
    save_gathered: bool = False
    """keep what was gathered for the derivative, see `all_gather_matmul`"""
    min_bytes: int = 0
    """smaller collectives stay plain"""
    axes: tuple[str, ...] | None = None
    """mesh axes to overlap; None: all"""
    hardware: Hardware | None = None
    """what auto predicts for; None: the devices here, by name or by a measurement"""


class Site(NamedTuple):
    """A collective and what became of it."""

    what: str
    """all-gather, reduce-scatter or all-reduce, with shapes"""
    where: str
    """file, line and function"""
    form: str
    """ring, bidirectional, pallas, plain (chosen), skipped, or alone (no product
    beside it)"""
    chunks: int = 1
    reason: str = ""
    """why it is not overlapped; empty where it is"""
    seconds: float | None = None
    """predicted; None where nothing was predicted"""
    plain_seconds: float | None = None

    def __str__(self) -> str:
        text = f"{self.form:13} {self.what}  {self.where}"
        if self.seconds is not None and self.plain_seconds is not None:
            times = self.seconds * 1e3, self.plain_seconds * 1e3
            text += "  predicted {:.3f} ms, plain {:.3f} ms".format(*times)
        return text + (f"\n{'':20}{self.reason}" if self.reason else "")


class Explanation(NamedTuple):
    """All sites of a function; printable."""

    sites: tuple[Site, ...]

    @property
    def rewritten(self) -> tuple[Site, ...]:
        """Those that are overlapped."""
        return tuple(s for s in self.sites if s.form in FORMS)

    @property
    def skipped(self) -> tuple[Site, ...]:
        """Those with a product beside them that could not."""
        return tuple(s for s in self.sites if s.form == "skipped")

    def __str__(self) -> str:
        head = f"{len(self.rewritten)} of {len(self.sites)} collectives are overlapped"
        if not self.sites:
            head = (
                "there is no explicit collective here; those that the partitioner "
                "inserts cannot be seen: write the tensor axis under jax.shard_map"
            )
        times = collections.Counter(map(str, self.sites))
        lines = [f"{n:3} x {text}" for text, n in times.items()]
        return "\n".join([head, *lines])


def site(eqn: Any, form: str, **rest: Any) -> Site:
    """What is to be said of a collective's equation."""
    name = eqn.primitive.name.removesuffix("_invariant")
    what = name.replace("psum", "all-reduce").replace("_", "-")
    ends = (*eqn.invars[:1], *eqn.outvars[:1])
    shapes = [a.aval.str_short(short_dtypes=True).split("{")[0] for a in ends]
    return Site(f"{what} {' to '.join(shapes)}", _compat.where(eqn), form, **rest)


def decide(
    jaxpr: Any, group: sites.Gather | sites.Sum, size: int, policy: Policy
) -> tuple[Site, dict[str, Any] | None]:
    """The form of a group on a ring of `size` devices.

    Returns:
        what `explain` says of it, and the arguments of its rewriting; None: it stays.
    """
    eqn, products = jaxpr.eqns[group.index], group.products
    first = jaxpr.eqns[products[0].index]
    moved = _moved(eqn)
    if moved.size * moved.dtype.itemsize < policy.min_bytes:
        return site(eqn, "plain", reason="under min_bytes"), None
    predicted: dict[str, Any] = {}
    mode, chunks = policy.mode, policy.chunks
    if mode == "auto":
        hardware = policy.hardware or here()
        if hardware is None:
            reason = "XLA on CPU multiplies and communicates one after the other"
            return site(eqn, "plain", reason=reason), None
        shape = _shape(jaxpr, group, size)
        saved = policy.save_gathered
        mode, chunks, *seconds = choose(**shape, save_gathered=saved, hardware=hardware)
        predicted = dict(zip(("seconds", "plain_seconds"), seconds, strict=True))
    if mode == "plain":
        reason = (
            "plain is predicted to be as fast" if predicted else "as the policy says"
        )
        return site(eqn, "plain", reason=reason, **predicted), None
    if mode == "pallas":
        reason, chunks = _no_kernel(first), 1
    else:
        rows, lanes = group.cut.size // size, chunks * (1 + (mode == "bidirectional"))
        if rows % lanes and policy.mode == "auto":
            mode, chunks, lanes = "ring", 1, 1
        reason = f"{rows} rows do not divide into {lanes} lanes" if rows % lanes else ""
    if reason:
        return site(eqn, "skipped", reason=reason), None
    settings = {name: first.params[name] for name in sites.SETTINGS}
    settings |= dict(axis_name=sites.axis_of(eqn), mode=mode, chunks=chunks)
    if isinstance(group, sites.Gather):
        settings["save_gathered"] = policy.save_gathered
    return site(eqn, mode, chunks=chunks, **predicted), settings


def _moved(eqn: Any) -> Any:
    """The whole array of a collective."""
    gathers = eqn.primitive.name in sites.GATHERS
    return (eqn.outvars if gathers else eqn.invars)[0].aval


def _shape(jaxpr: Any, group: sites.Gather | sites.Sum, size: int) -> dict[str, Any]:
    """The arguments of `hardware.choose`."""
    eqns = jaxpr.eqns
    gathers = isinstance(group, sites.Gather)
    first = eqns[group.products[0].index]
    side = group.products[0].side if gathers else group.products[0].owner
    operand = first.invars[side].aval
    contract = first.params["dimension_numbers"][0][side]
    k = int(np.prod([operand.shape[d] for d in contract]))
    rows = operand.size // k
    columns = [eqns[p.index].outvars[0].aval.size // rows for p in group.products]
    eqn = eqns[group.index]
    kinds = {"reduce_scatter": "scatter"}
    kind = "gather" if gathers else kinds.get(eqn.primitive.name, "reduce")
    return dict(
        kind=kind,
        rows=rows,
        k=k if gathers else k * len(columns),
        n=sum(columns) if gathers else columns[0],
        size=size,
        itemsize=_moved(eqn).dtype.itemsize,
        backward=kind != "reduce",
    )


def _no_kernel(product: Any) -> str:
    """Why a product cannot be a Pallas kernel; "" if it can."""
    mesh = jax.sharding.get_abstract_mesh()
    others = [a for a in mesh.axis_names if a not in mesh.manual_axes]
    if others:
        return f"axes {others} of the mesh are not manual, as a Pallas kernel wants all"
    dtypes = {a.aval.dtype for a in product.invars}
    if not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return "a Pallas kernel takes float32 and bfloat16"
    return ""


@functools.cache
def here() -> Hardware | None:
    """The accelerators of this program; None: CPUs, where XLA overlaps nothing."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return None
    return find(device.device_kind) or measured_apart()


def measured_apart() -> Hardware:
    """`hardware.measure`, also while a function is traced; alike in all processes."""
    # What JAX traces, and for which mesh, is the calling thread's alone.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(_measured).result()


def _measured() -> Hardware:
    found = measure()
    if jax.process_count() == 1:
        return found
    # Processes that choose differently compile different programs, and hang.
    facts = dataclasses.asdict(found)
    kinds = {name: type(v) for name, v in facts.items() if isinstance(v, int | float)}
    numbers = {name: np.float32(facts[name]) for name in kinds}
    agreed = multihost_utils.broadcast_one_to_all(numbers)
    rates = {name: kind(agreed[name]) for name, kind in kinds.items()}
    return dataclasses.replace(found, **rates)
