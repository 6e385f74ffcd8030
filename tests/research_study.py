"""A workspace with a context for tools, and a training script in miniature."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from jaxlab.research.journal import open_journal
from jaxlab.research.tool import Context
from jaxlab.research.workspace import open_workspace

TRAINER = Path(__file__).parent / "fake_trainer.py"
FIELDS = {
    "seed": 0,
    "steps": 3,
    "level": 2.0,
    "shared": 0.05,
    "noise": 0.01,
    "seconds": 0.0,
    "salt": "a",
    "diverge": 0,
    "crash": 0,
    "model": {"vocab": None},
}


def write_config(folder: Path, name: str, **fields) -> str:
    path = folder / f"{name}.py"
    path.write_text(f'"""{json.dumps(FIELDS | fields)}"""\n')
    return str(path)


@contextlib.contextmanager
def study(
    root: Path, question="Is b as good as a?", poll=lambda: False, **options
) -> Iterator[Context]:
    """A context as the driver gives it to tools, over a journal of its own."""
    workspace = open_workspace(root, make=True)
    with open_journal(workspace.root / "journal.jsonl") as journal:
        if not journal.events:
            journal.append("driver", "study", schema=1, question=question, options={})

        def record(kind, **data):
            return journal.append("test", kind, **data)

        def start_run(run, **data):
            return record("run_start", run=run, **data)

        yield Context(
            workspace=workspace,
            agent="test",
            call="1",
            options={"trainer": str(TRAINER), "parallel": 4, **options},
            record=record,
            events=lambda: journal.events,
            start_run=start_run,
            poll=poll,
        )
