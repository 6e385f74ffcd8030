"""The import rules of docs/architecture.md, and the sizes that keep files readable.

The rules are read off the source, so they hold for parts that do not exist yet and
for imports inside functions. What merely importing a module pulls in is measured in a
process of its own.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STANDALONE = ("optim", "overlap", "health")
# Besides jax, optax, numpy and the standard library: nothing of these imports more.
LEAVES = ("jaxlab.errors", "jaxlab._compat", "jaxlab.files")
# What a part needs of its own. Prometheus is an extra, imported where it is used.
OWN = {"health": ("zmq", "prometheus_client", "ray")}
# Slow to import, or absent where nobody needs them: imported where they are used.
HEAVY = (
    "grain",
    "matplotlib",
    "orbax",
    "openai",
    "playwright",
    "prometheus_client",
    "pyarrow",
    "pydantic",
    "pydantic_ai",
    "ray",
    "safetensors",
    "starlette",
    "tensorboard",
    "tensorflow",
    "tokenizers",
    "torch",
    "transformers",
    "typst",
)


def module_name(path: Path) -> str:
    """Returns `jaxlab.models.gpt` for .../jaxlab/models/gpt.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str) -> Iterator[str]:
    """Yields the full name of everything that a module of `package` imports.

    `from a import b` yields `a.b`: b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def files(*folders: str) -> list[Path]:
    return sorted(p for f in folders for p in (ROOT / f).rglob("*.py"))


def imported(path: Path) -> set[str]:
    name = module_name(path)
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    return set(imports(path.read_text(), package))


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def report(offences: list[tuple[Path, str]]) -> str:
    return "\n".join(f"{path.relative_to(ROOT)}: {what}" for path, what in offences)


def standalone_offences(part: str, names: set[str]) -> set[str]:
    """What a part that stands alone imports beyond the few things it may."""
    own = (f"jaxlab.{part}", *OWN.get(part, ()))
    allowed = ("jax", "optax", "numpy", *LEAVES, *own)
    return {
        name
        for name in names
        if not within(name, *allowed)
        and name.split(".")[0] not in sys.stdlib_module_names
    }


def test_reads_every_form_of_import():
    source = """
import jax.numpy as jnp, os
from . import pairing
from ..errors import UserError
def f():
    from flax import linen
"""
    assert set(imports(source, "jaxlab.optim")) == {
        "jax.numpy",
        "os",
        "jaxlab.optim.pairing",
        "jaxlab.errors.UserError",
        "flax.linen",
    }
    assert standalone_offences("optim", {"jaxlab.config.Run", "jax.lax", "json"}) == {
        "jaxlab.config.Run"
    }
    assert standalone_offences("health", {"zmq.auth", "jaxlab.files.write_text"}) == (
        set()
    )
    assert standalone_offences("optim", {"zmq.auth"}) == {"zmq.auth"}


@pytest.mark.parametrize("part", STANDALONE)
def test_part_stands_alone(part):
    offences = [
        (path, name)
        for path in [*files(f"jaxlab/{part}"), *ROOT.glob(f"jaxlab/{part}.py")]
        for name in standalone_offences(part, imported(path))
    ]
    assert not offences, report(offences)


def test_leaves_import_nothing_of_the_framework():
    offences = [
        (path, name)
        for leaf in LEAVES
        if (path := ROOT / f"{leaf.replace('.', '/')}.py").exists()
        for name in imported(path)
        if within(name, "jaxlab", "flax", "orbax", "grain")
        and not within(name, *LEAVES)
    ]
    assert not offences, report(offences)


def test_only_models_import_flax():
    offences = [
        (path, name)
        for path in files("jaxlab", "scripts", "configs")
        if not within(module_name(path), "jaxlab.models")
        for name in imported(path)
        if within(name, "flax")
    ]
    assert not offences, report(offences)


def test_only_scripts_import_the_training_loop():
    offences = [
        (path, name)
        for path in files("jaxlab", "configs")
        for name in imported(path)
        if within(name, "jaxlab.train")
    ]
    assert not offences, report(offences)


def test_research_imports_nothing_of_the_framework():
    """It starts the scripts and reads their files, as a person would."""
    frameworks = ("jax", "jaxlib", "flax", "optax", "orbax", "grain")
    offences = [
        (path, name)
        for path in files("jaxlab/research")
        for name in imported(path)
        if within(name, "jaxlab", *frameworks)
        and not within(name, "jaxlab.research", *LEAVES)
    ]
    assert not offences, report(offences)


def test_files_stay_readable():
    limits = {ROOT / "jaxlab/train.py": 250}
    lengths = {
        path: len(path.read_text().splitlines())
        for path in files("jaxlab", "scripts", "configs", "benchmarks")
    }
    offences = [
        (path, f"{length} lines, at most {limits.get(path, 500)}")
        for path, length in lengths.items()
        if length > limits.get(path, 500)
    ]
    assert not offences, report(offences)


def loaded_by(*modules: str) -> dict[str, list[str]]:
    """Imports modules one after another in a new process.

    Returns:
      For each, the top-level packages that it was the first to load.
    """
    program = """
import importlib, json, sys
first, seen = {}, set()
for name in sys.argv[1:]:
    importlib.import_module(name)
    now = {m.partition('.')[0] for m in sys.modules}
    first[name], seen = sorted(now - seen), now
print(json.dumps(first))
"""
    output = subprocess.run(
        [sys.executable, "-c", program, *modules],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def test_importing_jaxlab_is_free():
    loaded = loaded_by("jaxlab")["jaxlab"]
    other = set(loaded) - sys.stdlib_module_names - {"jaxlab"}
    heavy = {"jax", "jaxlib", "flax", "optax", "numpy", *HEAVY}
    assert "jaxlab" in loaded
    assert not heavy & other


def test_importing_health_needs_neither_jax_nor_zmq():
    """Its pure functions do not; what is asked for by name brings its module."""
    names = ["jaxlab.health", "jaxlab.health.journal", "jaxlab.health.plan"]
    loaded = loaded_by(*names)
    free = {*loaded[names[0]], *loaded[names[1]]}
    assert not free & {"jax", "jaxlib", "zmq", "prometheus_client"}
    assert "jax" in loaded["jaxlab.health.plan"]
    from jaxlab import health

    assert all(getattr(health, name) is not None for name in health.__all__)
    assert not hasattr(health, "no_such_name")


def test_importing_a_part_is_cheap():
    modules = [module_name(path) for path in files("jaxlab")]
    offences = {
        name: sorted(set(loaded) & set(HEAVY))
        for name, loaded in loaded_by(*modules).items()
        if set(loaded) & set(HEAVY)
    }
    assert not offences, offences
