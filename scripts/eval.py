"""Loss of a trained run on its held-out documents, or on another corpus.

python scripts/eval.py runs/gpt_tiny
python scripts/eval.py runs/gpt_tiny --corpus pydocs --batches 100
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import tyro

from jaxlab.cli import parse_options, run_main


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Prints JSON: mean loss in nats, perplexity and bits per byte."""

    folder: tyro.conf.Positional[Path]
    """run folder"""
    corpus: str | None = None
    """another corpus than the run's own; its held-out documents are read"""
    batches: int = 0
    """batches of 16 sequences at most; 0: all"""


def main(arguments: list[str]) -> None:
    """Parses the command line, evaluates, prints."""
    options = parse_options(Evaluation, arguments, "scripts/eval.py")
    from jaxlab import program

    trained = program.load(options.folder)
    corpus = options.corpus or trained.run.data.corpus
    loss, targets, text_bytes = program.held_out_loss(trained, corpus, options.batches)
    result = {
        "run": str(options.folder),
        "step": trained.step,
        "corpus": corpus,
        "eval/loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * targets / text_bytes / math.log(2),
        "targets": targets,
    }
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    run_main(main)
