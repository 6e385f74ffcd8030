"""A run small enough to be made many times, on text that the test writes."""

import dataclasses
import json
import os
import random
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

from jaxlab import config

ROOT = Path(__file__).parent.parent
WORDS = "def return self value none for in range if else import class yield".split()


def spoken(output: str) -> list[str]:
    """The lines that are ours: Gloo writes in pieces, which its threads may mix."""
    gloo = re.compile(r"\[Gloo\]|connected peer ranks|^\s*$")
    return [line for line in output.splitlines() if not gloo.search(line)]


def write_corpus(folder: Path, documents: int = 24) -> Path:
    """Text files of random words, always the same ones."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        text = " ".join(draw.choices(WORDS, k=200))
        (folder / f"{i}.txt").write_text(text)
    return folder


def tiny(tmp_path: Path, **fields) -> config.Run:
    """Six steps of a model with a few thousand weights."""
    model = config.GPT(layers=1, width=16, heads=2, mlp=32, vocab=320)
    run = config.Run(
        out=str(tmp_path / "run"),
        steps=6,
        batch=8,
        length=16,
        log_every=1,
        model=model,
        optimizer=config.AdamW(lr=1e-2, warmup=2),
        data=config.Data(
            corpus=str(write_corpus(tmp_path / "corpus")),
            cache=str(tmp_path / "cache"),
            eval_fraction=0.2,
        ),
        evaluate=config.Evaluate(every=3, batches=2),
        checkpoint=config.Checkpoint(every=2, keep_last=3),
        sample=config.Sample(tokens=0),
    )
    return dataclasses.replace(run, **fields)


def metrics(out: str | Path) -> dict[int, dict[str, float]]:
    """Rows of metrics.jsonl by step; one step may have several lines."""
    rows: dict[int, dict[str, float]] = {}
    for line in (Path(out) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update(row)
    return rows


def losses(out: str | Path) -> list[float]:
    """Training loss of each logged step, in order."""
    rows = metrics(out)
    return [rows[s]["train/loss"] for s in sorted(rows) if "train/loss" in rows[s]]


def launch(
    run: config.Run, *arguments: str, devices: int = 1, **variables: str
) -> subprocess.Popen:
    """Starts scripts/train.py on a saved config, as a user would."""
    path = Path(run.out).parent / f"{Path(run.out).name}.json"
    config.save(run, path)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(path.parent / "xla"),
    }
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts/train.py", path, *arguments],
        env=environment | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch_pair(run: config.Run, devices: int = 2) -> list[subprocess.Popen]:
    """Starts a run on two processes of so many devices each, over loopback.

    Each finds its number in the environment, as RANK.
    """
    address = f"127.0.0.1:{free_port()}"
    return [
        launch(
            run,
            "--distributed.coordinator",
            address,
            "--distributed.processes",
            "2",
            "--distributed.index",
            str(i),
            devices=devices,
            RANK=str(i),
        )
        for i in range(2)
    ]


def run_ranks(
    program: str, count: int, *arguments: str | Path
) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of processes of one device that run a program.

    Its arguments are a free port, its rank, and the given ones.
    """
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(port), str(rank)]
            + [str(argument) for argument in arguments],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a started program."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err
