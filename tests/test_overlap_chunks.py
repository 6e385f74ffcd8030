"""benchmarks/overlap_chunks.py, run small: the arithmetic of what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).parent.parent / "benchmarks" / "overlap_chunks.py"
SMALL = "--rows 64 --width 32 --hidden 64 --size 2 --rounds 1 --repeats 1".split()


def start(*arguments):
    return subprocess.run(
        [sys.executable, str(FILE), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(FILE.parents[1])},
    )


def test_every_number_of_blocks_is_measured_and_both_choices_are_shown():
    done = start(*SMALL)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["options"]["rows"] == 64 and found["platform"] == "cpu"
    rows = {(r["product"], r["blocks"]): r for r in found["products"]}
    assert rows.keys() == {(p, b) for p in ("up", "down") for b in (1, 2, 4, 8)}
    for (product, blocks), row in rows.items():
        median, least, most = row["seconds"]
        assert 0 < least <= median <= most and row["rows_of_a_block"] == 64 // blocks
        whole = rows[product, 1]["seconds"][0]
        assert abs(row["efficiency"] - whole / median) < 1e-9
        assert row["predicted_seconds"] > 0
    rates = [2 * 64 * 32 * 32 / rows[p, 1]["seconds"][0] for p in ("up", "down")]
    assert abs(found["measured"]["peak"] / (sum(rates) / 2) - 1) < 1e-9
    assert len(found["choices"]) == 4
    for choice in found["choices"]:
        ours, theirs = choice["predicted"], choice["with_what_was_measured"]
        assert ours["mode"] == theirs["mode"] == "plain"  # XLA on CPU overlaps nothing
        assert choice["agree"]


def test_sizes_that_do_not_divide_are_refused_in_one_line():
    done = start("--rows", "100", "--width", "32", "--hidden", "64")
    assert done.returncode == 1 and not done.stdout
    assert "--rows 100 must divide by 4 x --size 8" in done.stderr.splitlines()[-1]
