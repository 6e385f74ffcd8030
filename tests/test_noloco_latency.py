"""The latency model of NoLoCo against what the paper's figure and algebra say."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "noloco_latency.py"
SPEC = importlib.util.spec_from_file_location("noloco_latency", FILE)
latency = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(latency)


@pytest.mark.parametrize("levels", [1, 2, 5, 10])
def test_equal_message_times_give_the_levels_of_the_tree(levels):
    rng = np.random.default_rng(0)
    assert latency.ratio(2**levels, 0.0, 3, rng) == levels


@pytest.mark.parametrize("seed", [0, 1])
def test_the_figures_largest_value(seed):
    """Figure 5A ends near 40, at 1024 replicas and the widest distribution."""
    found = latency.ratio(1024, 2.5, 2000, np.random.default_rng(seed))
    assert abs(found - 39) < 2


def test_two_replicas_are_a_pair_whatever_the_distribution():
    """Draws against the closed form of the pair's expected time."""
    for cv in (0.5, 1.0):
        found = latency.ratio(2, cv, 200_000, np.random.default_rng(0))
        assert abs(found - 1) < 0.02


def test_the_distribution_has_the_coefficient_of_variation():
    draws = np.random.default_rng(0).lognormal(0, latency.sigma_of(0.5), 400_000)
    assert math.isclose(draws.std() / draws.mean(), 0.5, rel_tol=0.02)


def test_the_same_seed_gives_the_same_and_more_replicas_cost_more():
    def column(seed):
        rng = np.random.default_rng(seed)
        return [latency.ratio(n, 1.0, 500, rng) for n in (4, 16, 64, 256)]

    assert column(3) == column(3) != column(4)
    assert all(a < b for a, b in itertools.pairwise(column(3)))


def test_waiting_in_pairs_is_shorter_than_waiting_for_all():
    rng = np.random.default_rng(0)
    assert latency.blocking(2, 10, 20, rng) == 1  # a pair is all there is
    few, many = (latency.blocking(n, 100, 100, rng) for n in (16, 1024))
    assert 1.05 < few < 1.09 and 1.17 < many < 1.22  # the paper: about 20 %


def test_a_number_of_replicas_without_a_tree_is_refused():
    with pytest.raises(ValueError, match="replicas is 6"):
        latency.ratio(6, 1.0, 1, np.random.default_rng(0))


def test_the_program_prints_json():
    command = [sys.executable, str(FILE), "--trials", "50", "--runs", "1"]
    small = ["--replicas", "4", "--cv", "0", "--blocking-replicas", "16"]
    done = subprocess.run(
        [*command, *small], capture_output=True, text=True, check=True, timeout=60
    )
    report = json.loads(done.stdout)
    assert report["tree_all_reduce_over_pair"] == [
        {"replicas": 4, "cv": 0.0, "ratio": 2.0}
    ]
    assert len(report["waiting_for_all_over_waiting_in_pairs"]) == 3
