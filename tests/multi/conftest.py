"""Fixtures of tests that need machinery of their own."""

import pytest

from tests.multi.namespaces import left_behind, missing, namespaces


@pytest.fixture(scope="module")
def links():
    """Skips where there are no namespaces; checks that none is left."""
    why = missing()
    if why:
        pytest.skip(f"no shaped links: {why}")
    before = namespaces()
    yield
    assert not left_behind(namespaces() - before)
