"""Trains what a config describes.

python scripts/train.py configs/gpt_tiny.py --steps 60 --out runs/a
python scripts/train.py runs/a/config.json          # again, or on from its checkpoint
python scripts/train.py configs/gpt_tiny.py --help  # every field and its default
python scripts/train.py configs/gpt_tiny.py --dry-run  # what would be run, as JSON
"""

import json

from jaxlab import allocator
from jaxlab.cli import run_main


def main(arguments: list[str]) -> None:
    """Parses the command line and trains."""
    from jaxlab import config

    dry = "--dry-run" in arguments
    run = config.parse([a for a in arguments if a != "--dry-run"], "scripts/train.py")
    if dry:
        print(json.dumps(config.describe(run), indent=1))
        return
    if isinstance(run, config.Run):
        from jaxlab.train import train

        train(run)
    else:
        from jaxlab.rl import launch

        launch.train(run)


if __name__ == "__main__":
    allocator.tune()
    run_main(main)
