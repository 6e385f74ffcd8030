"""The whole of it, as a user would: learn, be killed, go on, end with the same weights.

Trains `configs/gpt_tiny.py` for some hundred steps twice: once undisturbed, and once
killed with SIGKILL in the middle and started again with the same command. Both must
end with identical parameters, and below the loss of a bigram model fitted to the
same training text. Not a pytest: takes minutes. Run it by `make e2e`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxlab import data, program

ROOT = Path(__file__).parent.parent
STEPS, KILL_AFTER = 300, 150
EVAL_LOSS_BELOW = 1.7  # nats per byte


def command(out: Path) -> list[str]:
    """The command line of a run."""
    return [
        sys.executable,
        str(ROOT / "scripts/train.py"),
        str(ROOT / "configs/gpt_tiny.py"),
        "--steps",
        str(STEPS),
        "--out",
        str(out),
    ]


def last_step(out: Path) -> int:
    """Newest step in a run's metrics, 0 before there are any."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def bigram_loss(tokens: data.Tokens) -> float:
    """Nats per token of add-one-smoothed bigrams on the held-out text."""
    size = tokens.tokenizer.vocab_size
    counts = np.ones((size, size))
    np.add.at(counts, (tokens.train[:-1], tokens.train[1:]), 1)
    log_p = np.log(counts / counts.sum(1, keepdims=True))
    return float(-log_p[tokens.eval[:-1], tokens.eval[1:]].mean())


def eval_loss(out: Path) -> float:
    """Last evaluation loss in a run's metrics."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["eval/loss"] for row in rows if "eval/loss" in row][-1]


def main() -> None:
    """Runs the check; an assertion names what failed."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        subprocess.run(command(whole), check=True)

        process = subprocess.Popen(command(cut))
        end = time.monotonic() + 900
        while last_step(cut) < KILL_AFTER:
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < end, "the run did not get to the middle"
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        subprocess.run(command(cut), check=True)

        ours, theirs = program.load(cut), program.load(whole)
        assert ours.step == theirs.step == STEPS
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)

        bigram = bigram_loss(data.open_tokens(data.prepare("stdlib")))
        reached = eval_loss(cut)
        assert reached == eval_loss(whole)
        print(
            f"end to end: eval/loss {reached:.4f} after {STEPS} steps with a SIGKILL "
            f"after {KILL_AFTER}; wanted below {EVAL_LOSS_BELOW}; bigrams reach "
            f"{bigram:.4f}; parameters identical to the undisturbed run's"
        )
        assert reached < EVAL_LOSS_BELOW < bigram


if __name__ == "__main__":
    main()
