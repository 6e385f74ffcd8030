"""Writes text with a trained model, and prints it as it comes.

python scripts/generate.py runs/gpt_tiny --prompt "def " --tokens 200
python scripts/generate.py path/to/llama --prompt "Once" --temperature 0
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxlab.cli import parse_options, run_main


@dataclasses.dataclass(frozen=True)
class Generation:
    """Continues a prompt with a model from a run folder or from Hugging Face."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """run folder, or a folder with config.json, .safetensors and tokenizer.json"""
    prompt: str = ""
    """start of the text; nothing: start of a document"""
    tokens: int = 200
    """tokens to write; fewer where the document ends before"""
    temperature: float = 0.8
    """0: always the likeliest token"""
    top_k: int = 0
    """choose among the k likeliest; 0: all"""
    top_p: float = 0.95
    """choose among the likeliest of this total probability"""
    seed: int = 0
    """the same one gives the same text"""


def main(arguments: list[str]) -> None:
    """Parses the command line and prints the prompt and its continuation."""
    options = vars(parse_options(Generation, arguments, "scripts/generate.py"))
    from jaxlab.models.generate import stream_text

    print(options["prompt"], end="", flush=True)
    for piece in stream_text(options.pop("folder"), **options):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    run_main(main)
