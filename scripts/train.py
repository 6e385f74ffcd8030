"""Trains what a config describes.

python scripts/train.py configs/gpt_tiny.py --steps 60 --out runs/a
python scripts/train.py runs/a/config.json          # again, or on from its checkpoint
python scripts/train.py configs/gpt_tiny.py --help  # every field and its default
"""

from jaxlab import allocator
from jaxlab.cli import run_main


def main(arguments: list[str]) -> None:
    """Parses the command line and trains."""
    from jaxlab import config

    run = config.parse(arguments, "scripts/train.py")
    from jaxlab.train import train

    train(run)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
