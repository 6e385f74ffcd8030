"""What every test gets: 8 CPU devices, strict JAX, and skips that nobody overlooks."""

import collections
import importlib.util
import os

import hypothesis
import jax
import pytest

# Tests of meshes need devices, and their number is fixed at the first use of the
# backend; a program that a test starts inherits the platform only.
os.environ["JAX_PLATFORMS"] = "cpu"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("jaxlab", deadline=None)
hypothesis.settings.load_profile("jaxlab")
# A bias that broadcasts by accident is a defect, not a convenience.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Keeps compiled programs between runs, in pytest's own cache folder.

    One folder a worker, because JAX does not write its entries atomically; and an
    entry that cannot be read is an error, not a silent recompilation.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    if getattr(config, "cache", None) is not None:
        folder = config.cache.mkdir(f"xla-{jax.__version__}-{worker}")
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_raise_persistent_cache_errors", True)


def pytest_runtest_setup(item):
    """Skips what asks by `@pytest.mark.requires("torch")` for what is not here."""
    for mark in item.iter_markers("requires"):
        missing = [m for m in mark.args if importlib.util.find_spec(m) is None]
        if missing:
            pytest.skip(f"{' and '.join(missing)} not installed (see `make test-all`)")


def pytest_terminal_summary(terminalreporter):
    """Says what was skipped and why, in words, whatever pytest's verbosity is."""
    skipped = collections.defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr
        if isinstance(reason, tuple):
            reason = reason[2].removeprefix("Skipped: ")
        skipped[str(reason)].append(report.nodeid)
    if not skipped:
        return
    total = sum(map(len, skipped.values()))
    terminalreporter.section(f"NOT TESTED: {total} skipped", yellow=True, bold=True)
    for reason, tests in sorted(skipped.items()):
        terminalreporter.line(f"{reason}:", yellow=True)
        for test in sorted(tests):
            terminalreporter.line(f"  {test}")
