"""Edits of a finished study that `verify` has to find.

python benchmarks/research_mutations.py WORKSPACE --edits 240

Each edit is one change to a copy of the workspace: a digit of the PDF's text, of the
manuscript, its sources or the metrics, a field of a fact, of a plan, a result, a figure
or the journal. Half of the edits of source, PDF, metrics and facts are made by a hand
that also rewrites results and journal, so that every hash fits; only computing all
anew finds those. `outcome` is a metric that a plan is judged by, at a run's end; most
of `metrics` are others, which enter no fact.
"""

import argparse
import collections
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxlab.research import verify  # noqa: E402
from tests.research_mutations import KINDS, mutations, rehash  # noqa: E402

COVERED = ("source", "pdf", "metrics", "outcome", "fact")


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--edits", type=int, default=240)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    given = parser.parse_args()
    before = verify.verify(given.workspace)
    if not before.ok:
        sys.exit(f"the workspace does not verify: {before.findings[0]}")
    made: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    missed, by_gate, start = [], collections.Counter(), time.perf_counter()
    for number in range(given.edits):
        draw, kind = random.Random(number), given.kinds[number % len(given.kinds)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "ws"
            shutil.copytree(given.workspace, folder)
            _, what = mutations(folder, draw, kind)
            hidden = kind in COVERED and number // len(given.kinds) % 2 == 1
            if hidden:
                rehash(folder)
            report = verify.verify(folder)
        name = kind + (", journal rewritten" if hidden else "")
        made[name]["found" if report.findings else "missed"] += 1
        if report.findings:
            by_gate.update({finding.split(":")[0] for finding in report.findings})
        else:
            missed.append({"kind": name, "edit": what, "number": number})
    result = {
        "edits": given.edits,
        "missed": missed,
        "by kind": {k: dict(v) for k, v in sorted(made.items())},
        "found by": dict(by_gate.most_common()),
        "facts": before.facts,
        "numbers": before.json()["numbers"],
        "python": platform.python_version(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
