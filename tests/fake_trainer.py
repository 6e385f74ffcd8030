"""A training script in miniature: the same options as scripts/train.py, no JAX.

Its loss is `level` plus noise by seed; `shared` is noise that arms have in common.
"""

import json
import random
import sys
import time
from pathlib import Path


def config_of(arguments):
    """Reads CONFIG.json or CONFIG.py (a JSON docstring), then --field value pairs."""
    path, *rest = arguments
    text = Path(path).read_text()
    config = json.loads(text[text.index("{") : text.rindex("}") + 1])
    for name, value in zip(rest[::2], rest[1::2], strict=True):
        name = name.removeprefix("--")
        if name not in config and name != "out":
            sys.exit(f"error: no field {name}")
        config[name] = type(config.get(name, ""))(value)
    return config


def main(arguments):
    dry = "--dry-run" in arguments
    config = config_of([a for a in arguments if a != "--dry-run"])
    if dry:
        print(json.dumps({"config": config, "data": "none"}))
        return
    out = Path(config["out"])
    # As the real one, which fills in what its data decide.
    (out / "config.json").write_text(json.dumps(config | {"model": {"vocab": 7}}))
    own = random.Random(f"{config['seed']} {config['level']} {config['salt']}")
    common = random.Random(config["seed"])
    loss = config["level"] + config["shared"] * common.gauss(0, 1)
    loss += config["noise"] * own.gauss(0, 1)
    print(config["salt"])
    time.sleep(config["seconds"])
    with open(out / "metrics.jsonl", "a") as file:
        for step in range(1, config["steps"] + 1):
            bad = config["diverge"] and config["seed"] % config["diverge"] == 0
            value = "NaN" if bad else loss + 1.0 / step
            file.write(json.dumps({"step": step, "eval/loss": value}) + "\n")
            file.flush()
    if config["crash"]:
        sys.exit("error: crashed as asked")


if __name__ == "__main__":
    main(sys.argv[1:])
