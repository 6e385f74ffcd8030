"""What a compiled program really sends: its collectives, read from the HLO text.

text = jax.jit(step).lower(*args).compile().as_text()
for c in collectives(text): print(c)
"""

import re
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_BITS = {"pred": 8, "bf16": 16, "token": 0}
_OPCODE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
)


class Collective(NamedTuple):
    """One collective instruction of a program."""

    kind: str
    """one of `KINDS`"""
    computation: str
    """name of the computation that holds it"""
    conditional: bool
    """it runs only if some conditional of the program takes its branch"""
    bytes: int
    """of its result on one device"""
    pairs: tuple[tuple[int, int], ...]
    """(source, target) of a collective-permute"""
    groups: tuple[tuple[int, ...], ...]
    """devices that communicate; () for a permute, or where all do"""


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled module, in the order of the text.

    Args:
        text: of `compiled.as_text()`.
    """
    computations, entry = _computations(text)
    always = _reached(computations, entry, through_conditionals=False)
    live = _reached(computations, entry, through_conditionals=True)
    found = []
    for name in computations:
        if name not in live:
            continue
        for line in computations[name]:
            match = _OPCODE.search(line)
            if match is None:
                continue
            shape, kind, start = match.groups()
            found.append(
                Collective(
                    kind,
                    name,
                    name not in always,
                    _bytes(shape, kind if start else ""),
                    tuple((a, b) for a, b in _lists(line, "source_target_pairs")),
                    _lists(line, "replica_groups"),
                )
            )
    return found


def branches(text: str) -> list[tuple[str, ...]]:
    """Computations that each conditional of a module chooses from."""
    found = []
    for lines in _computations(text)[0].values():
        for line in lines:
            if " conditional(" in line:
                found.append(tuple(_called(line)))
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line)
        if head:
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif " = " in line:
            lines.append(line)
    return computations, entry


def _called(line: str) -> list[str]:
    names = []
    for one, several in _CALLED.findall(line):
        names += [one] if one else [n.strip(" %") for n in several.split(",")]
    return names


def _reached(
    computations: dict[str, list[str]], entry: str, through_conditionals: bool
) -> set[str]:
    seen, todo = set(), [entry]
    while todo:
        name = todo.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        for line in computations[name]:
            if through_conditionals or " conditional(" not in line:
                todo += _called(line)
    return seen


def _bytes(shape: str, asynchronous: str) -> int:
    """Bytes of a shape, or of the result in what an asynchronous start returns."""
    parts = re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", shape)
    sizes = []
    for kind, dims in parts:
        bits = _BITS.get(kind) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", kind))
        sizes.append(bits * int(np.prod([int(d) for d in dims.split(",") if d])) // 8)
    if asynchronous == "collective-permute":  # (operand, result, contexts)
        return sizes[1]
    if asynchronous in ("all-gather", "reduce-scatter", "all-to-all"):
        return sum(sizes[len(sizes) // 2 :])
    return sum(sizes)


def _lists(line: str, name: str) -> tuple[tuple[int, ...], ...]:
    """Lists of devices: written out, as a range turned round, or by axes of a mesh."""
    match = re.search(rf"{name}=\{{(\{{.*?\}})\}}", line)
    if match:
        groups = re.findall(r"\{([\d,\s]*)\}", match[1])
        return tuple(tuple(int(d) for d in g.split(",") if d.strip()) for g in groups)
    match = re.search(rf"{name}=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if not match:
        return _mesh_lists(line, name)
    target, source, order = (
        [int(d) for d in part.split(",")] if part else None for part in match.groups()
    )
    assert target is not None and source is not None
    devices = np.arange(np.prod(source)).reshape(source).transpose(order)
    return tuple(tuple(g) for g in devices.reshape(target).tolist())


def _mesh_lists(line: str, name: str) -> tuple[tuple[int, ...], ...]:
    """As in mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}."""
    match = re.search(
        rf"{name}=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{((?:'\w+',?)+)\}",
        line,
    )
    if not match:
        return ()
    axes = {a: int(n) for a, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
    devices = np.arange(np.prod(list(axes.values())))
    if match[2]:
        source, order = ([int(d) for d in match[i].split(",")] for i in (2, 3))
        devices = devices.reshape(source).transpose(order)
    along = re.findall(r"'(\w+)'", match[4])
    across = [axis for axis in axes if axis not in along]
    order = [list(axes).index(axis) for axis in across + along]
    devices = devices.reshape(list(axes.values())).transpose(order)
    groups = devices.reshape(-1, int(np.prod([axes[axis] for axis in along])))
    return tuple(tuple(g) for g in groups.tolist())
