"""How good a trained run is, on what it has not been trained on.

Of a language model the loss on its held-out documents, or on another corpus:

python scripts/eval.py runs/gpt_tiny
python scripts/eval.py runs/gpt_tiny --corpus pydocs --batches 100

Of a GUI agent its success on held-out seeds, beside an oracle, random actions, and
itself with the instructions of other seeds; MiniWoB++ is judged by Farama's
environments and Selenium:

python scripts/eval.py runs/gui_miniwob --tasks click-dialog --seeds 1000000:1000200
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
    """Prints JSON: mean loss in nats, perplexity and bits per byte.

    Given the folder of a GUI agent, --help shows the options for that.
    """

    folder: tyro.conf.Positional[Path]
    """run folder"""
    corpus: str | None = None
    """another corpus than the run's own; its held-out documents are read"""
    batches: int = 0
    """batches of 16 sequences at most; 0: all"""


@dataclasses.dataclass(frozen=True)
class AgentEvaluation:
    """Prints JSON: success by actor and task with 95 % intervals; a table to stderr.

    Every episode becomes a line of FOLDER/eval/episodes.jsonl.
    """

    folder: tyro.conf.Positional[Path]
    """run folder"""
    tasks: tuple[str, ...] = ()
    """names of tasks; none: those of the run"""
    seeds: str = "1000000:1000200"
    """of the episodes, first:end; all of them held out"""
    actors: tuple[str, ...] = ("policy", "shuffled", "oracle", "random")
    """who plays them"""
    env: str | None = None
    """gymnasium's name of the environment; None: jaxlab/Farama-v0 for MiniWoB++, else
    the run's own"""
    workers: int = 2
    """environments at a time"""


def main(arguments: list[str]) -> None:
    """Parses the command line, evaluates, prints."""
    from jaxlab import config

    folder = Path(next((a for a in arguments if not a.startswith("-")), ""))
    saved = folder / "config.json"
    agent = saved.is_file() and not isinstance(config.load(saved), config.Run)
    kind = AgentEvaluation if agent else Evaluation
    options = parse_options(kind, arguments, "scripts/eval.py")
    result = agent_success(options) if agent else held_out_loss(options)
    json.dump(result, sys.stdout, indent=1)
    print()


def held_out_loss(options: Evaluation) -> dict[str, object]:
    """Loss of a language model."""
    from jaxlab import program

    trained = program.load(options.folder)
    corpus = options.corpus or trained.run.data.corpus
    loss, targets, text_bytes = program.held_out_loss(trained, corpus, options.batches)
    return {
        "run": str(options.folder),
        "step": trained.step,
        "corpus": corpus,
        "eval/loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * targets / text_bytes / math.log(2),
        "targets": targets,
    }


def agent_success(options: AgentEvaluation) -> dict[str, object]:
    """Success of a GUI agent."""
    from jaxlab.rl import evaluate

    return evaluate.evaluate_run(
        options.folder,
        options.tasks,
        evaluate.parse_seeds(options.seeds),
        options.actors,
        env=options.env,
        workers=options.workers,
    )


if __name__ == "__main__":
    run_main(main)
