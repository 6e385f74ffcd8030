"""Loss curves of one run on different meshes: how far apart they are.

    python benchmarks/loss_curves.py --steps 30

Runs `configs/gpt_tiny.py` (4 layers made narrower, so that it takes minutes) with
the same global batch on 1 device, on 8 forced CPU devices in several meshes, and on
two processes over loopback, and prints JSON: the first and last loss of each and the
largest relative difference from the one device at any step.
"""

import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
MESHES = {
    "1 device": (1, {}),
    "data 8": (8, {"data": 8}),
    "fsdp 8": (8, {"fsdp": 8}),
    "tensor 4, data 2": (8, {"tensor": 4}),
    "data 2, fsdp 2, tensor 2": (8, {"data": 2, "fsdp": 2, "tensor": 2}),
    "replica 2, fsdp 4": (8, {"replica": 2, "fsdp": 4}),
}
SIZE = (
    "--model.width",
    "128",
    "--model.heads",
    "8",
    "--model.kv-heads",
    "4",
    "--length",
    "128",
    "--log-every",
    "1",
    "--evaluate.every",
    "0",
    "--checkpoint.every",
    "0",
    "--sample.tokens",
    "0",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to train."""

    steps: int = 30
    """steps of each run"""


def start(out: Path, steps: int, devices: int, options: list[str]) -> subprocess.Popen:
    """Starts scripts/train.py with so many forced CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [
            sys.executable,
            ROOT / "scripts/train.py",
            ROOT / "configs/gpt_tiny.py",
            "--steps",
            str(steps),
            "--out",
            str(out),
            *SIZE,
            *options,
        ],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
    )


def curve(out: Path) -> list[float]:
    """Training loss of each step."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def two_processes(out: Path, steps: int) -> list[subprocess.Popen]:
    """Starts the run on two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mesh = [
        "--mesh.fsdp",
        "4",
        "--distributed.coordinator",
        f"127.0.0.1:{port}",
        "--distributed.processes",
        "2",
    ]
    return [
        start(out, steps, 4, [*mesh, "--distributed.index", str(i)]) for i in range(2)
    ]


def main() -> None:
    """Runs all, prints JSON."""
    steps = tyro.cli(Options).steps
    with tempfile.TemporaryDirectory() as folder:
        curves = {}
        for name, (devices, axes) in MESHES.items():
            out = Path(folder) / name.replace(" ", "_")
            options = [x for k, v in axes.items() for x in (f"--mesh.{k}", str(v))]
            assert start(out, steps, devices, options).wait() == 0, name
            curves[name] = curve(out)
        out = Path(folder) / "processes"
        assert [p.wait() for p in two_processes(out, steps)] == [0, 0]
        curves["2 processes, data 2, fsdp 4"] = curve(out)

    one = curves["1 device"]
    rows = [
        {
            "mesh": name,
            "first": ours[0],
            "last": ours[-1],
            "largest_relative_difference": max(
                abs(a - b) / b for a, b in zip(ours, one, strict=True)
            ),
        }
        for name, ours in curves.items()
    ]
    json.dump(
        {
            "benchmark": "loss_curves",
            "steps": steps,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "rows": rows,
        },
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
