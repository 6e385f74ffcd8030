"""Encodes a corpus into token files; training does it by itself when they miss.

python scripts/prepare_data.py stdlib
python scripts/prepare_data.py book.txt --tokenizer bpe:4096
python scripts/prepare_data.py 'shards/*.parquet' --text-field content
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from jaxlab import data
from jaxlab.cli import parse_options, run_main


@dataclass(frozen=True)
class Arguments:
    """Encodes a corpus into token files, unless the cache has them already."""

    corpus: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CORPUS")]
    """stdlib, pydocs, linuxdocs, or a folder, glob, .txt, .jsonl or .parquet"""
    tokenizer: str = "bytes"
    """bytes, bpe:4096 (trained on the corpus), or a tokenizer.json"""
    eval_fraction: float = 0.01
    """share of the documents held out for evaluation"""
    text_field: str = "text"
    """field of a .jsonl or .parquet row that holds the text"""
    cache: str | None = None
    """folder of token files; None: $JAXLAB_CACHE or ~/.cache/jaxlab"""
    verify: bool = False
    """also check the checksums of files over 1 GiB (smaller ones always are)"""


def main(arguments: list[str]) -> None:
    """Prepares and checks the token files, and prints what they hold."""
    chosen = parse_options(Arguments, arguments, "prepare_data.py")
    folder = data.prepare(
        chosen.corpus,
        chosen.tokenizer,
        eval_fraction=chosen.eval_fraction,
        text_field=chosen.text_field,
        cache=chosen.cache,
    )
    tokens = data.open_tokens(folder, verify=chosen.verify)
    print(folder)
    for split in ("train", "eval"):
        print(
            f"{split}: {tokens.meta['tokens'][split]:,} tokens in"
            f" {tokens.meta['documents'][split]:,} documents"
        )
    print(f"vocabulary: {tokens.tokenizer.vocab_size:,}")


if __name__ == "__main__":
    run_main(main)
