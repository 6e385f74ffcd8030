"""Training speed: jaxlab's loop, its bare jitted step, and PyTorch.

python benchmarks/train_throughput.py > throughput.json
python benchmarks/train_throughput.py --dtype bfloat16 --activation swiglu
python benchmarks/train_throughput.py --preset 124m --dtype bfloat16 --length 2048

All arms train the same weights on the same batches with the same mathematics:
RMSNorm, rotary embeddings, causal attention (torch: `scaled_dot_product_attention`),
tied output, clipping at 1 and AdamW (torch: fused; bf16 by autocast). Before
anything is timed, their losses over three steps must agree.

Each arm is a process of its own, and they take turns, so that each has its own
allocator and a disturbance meets all of them. On CPU, `torch_*` is torch as its
users run it and `torch_*_tuned` has the malloc settings that jaxlab's scripts give
themselves (`jaxlab.allocator`). `mfu` is the model's FLOPs (PaLM, appendix B) over
the best rate of a matrix product that any arm reached in the same run.
"""

import contextlib
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlab import allocator, config
from jaxlab.cli import parse_options, run_main
from jaxlab.errors import UserError

PRESETS = {
    "tiny": dict(layers=6, width=256, heads=4, vocab=8192),
    "124m": dict(layers=12, width=768, heads=12, vocab=50304),
    "350m": dict(layers=24, width=1024, heads=16, vocab=50304),
}
CHECKED_STEPS = 3
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}  # of the losses, relative
LR, DECAY = 3e-4, 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """Training throughput of jaxlab and PyTorch on one device, as JSON."""

    preset: Literal["tiny", "124m", "350m"] = "tiny"
    """size of the model"""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """MLP of the model"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute type"""
    batch: int = 16
    """sequences a step"""
    length: int = 256
    """tokens a sequence"""
    rounds: int = 5
    """interleaved rounds; medians and extremes are reported"""
    steps: int = 4
    """steps of an arm in a round"""
    torch: bool = True
    """compare with torch, where it is installed"""


def model_of(options: Options) -> config.GPT:
    """The model that both frameworks build."""
    shape = PRESETS[options.preset]
    model = config.GPT(**shape, activation=options.activation, dtype=options.dtype)
    return config.resolve_model(model, shape["vocab"])


def batch_of(options: Options, step: int) -> np.ndarray:
    """Tokens of a step, int32[batch, length + 1]: a skewed distribution to learn."""
    random = np.random.default_rng(step)
    vocab = PRESETS[options.preset]["vocab"]
    share = random.random((options.batch, options.length + 1))
    return (vocab * share**3).astype(np.int32)


# --------------------------------------------------------------- the workers


class Arm(NamedTuple):
    """What a worker process offers to the one that measures."""

    step: Callable[[int], Any]
    """starts a step on the batch of a number; returns its loss"""
    wait: Callable[[Any], float]
    """waits for all that was started; returns that loss"""
    gemm: Callable[[int, int, int], Callable[[], Any]]
    """a matrix product [m, k] @ [k, n]: a function that computes it and waits"""
    memory: Callable[[], int]
    """peak bytes: of the device, or of the process on CPU"""
    versions: dict[str, str]


def resident() -> int:
    """Peak resident memory of this process, bytes (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def jaxlab_arm(options: Options, weights: Path) -> Arm:
    """The bare jitted step of `jaxlab.program`; leaves its weights for torch."""
    import jax
    import jax.numpy as jnp

    from jaxlab import program
    from jaxlab.data import Batch

    optimizer = config.AdamW(lr=LR, schedule="constant", warmup=0, weight_decay=DECAY)
    run = config.Run(
        model=model_of(options),
        optimizer=optimizer,
        batch=options.batch,
        length=options.length,
        mesh=config.MeshShape(data=1),
    )
    made = program.build(run, PRESETS[options.preset]["vocab"])
    held, before = [made.init()], [None]
    if not weights.exists():
        flat = jax.tree_util.tree_flatten_with_path(held[0].params)[0]
        arrays = {"/".join(k.key for k in path): np.asarray(x) for path, x in flat}
        np.savez(weights, **arrays)

    def step(number):
        tokens = batch_of(options, number)[None]
        ones = np.ones(tokens[..., 1:].shape, np.float32)
        batch = Batch(tokens[..., :-1], tokens[..., 1:], ones, None)
        with jax.set_mesh(made.mesh):
            held[0], scalars = made.step(held[0], batch)
        jax.block_until_ready(before)  # one step ahead, as the loop is; not more
        before[0] = scalars["loss"]
        return scalars["loss"]

    def wait(loss):
        jax.block_until_ready(held[0])
        return float(loss)

    def gemm(m, k, n):
        a, b = jnp.ones((m, k), options.dtype), jnp.ones((k, n), options.dtype)
        product = jax.jit(jnp.matmul)
        return lambda: product(a, b).block_until_ready()

    def memory():
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") or resident()

    device = jax.devices()[0]
    return Arm(
        step, wait, gemm, memory, {"jax": jax.__version__, "device": device.device_kind}
    )


def torch_arm(options: Options, weights: Path, compiled: bool) -> Arm:
    """The same in PyTorch, with the weights that `jaxlab_arm` has left."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    import torch
    import torch_gpt

    train = torch_gpt.make_step(
        model_of(options),
        weights,
        length=options.length,
        lr=LR,
        weight_decay=DECAY,
        compiled=compiled,
    )

    def wait(loss):
        torch_gpt.settle()
        return float(loss)

    def gemm(m, k, n):
        dtype, device = getattr(torch, options.dtype), torch_gpt.DEVICE
        a, b = (torch.ones(s, dtype=dtype, device=device) for s in ((m, k), (k, n)))
        return lambda: (a @ b, torch_gpt.settle())

    def memory():
        cuda = torch_gpt.DEVICE.type == "cuda"
        return torch.cuda.max_memory_allocated() if cuda else resident()

    return Arm(
        lambda number: train(batch_of(options, number)),
        wait,
        gemm,
        memory,
        {"torch": torch.__version__},
    )


def loop_seconds(options: Options, folder: Path, nth: int) -> float:
    """Seconds a step of `jaxlab.train.train`, in the later half of a short run."""
    from jaxlab.metrics import read_jsonl
    from jaxlab.train import train

    run = loop_run(options, folder / f"loop_{nth}")
    train(run, say=lambda line: None)
    return read_jsonl(Path(run.out) / "metrics.jsonl")[1]["time/step"]


def loop_run(options: Options, out: Path) -> config.Run:
    """A run of the same shapes on the standard library's bytes."""
    return config.Run(
        out=str(out),
        steps=2 * options.steps,
        log_every=options.steps,
        batch=options.batch,
        length=options.length,
        model=model_of(options),
        optimizer=config.AdamW(lr=LR, schedule="constant", warmup=0),
        evaluate=config.Evaluate(every=0, batches=1),
        checkpoint=config.Checkpoint(every=0),
        sample=config.Sample(tokens=0),
        mesh=config.MeshShape(data=1),
    )


def work(kind: str, options: Options, folder: Path) -> None:
    """A worker: answers each line of stdin with a line of JSON."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    if kind == "jaxlab_loop":
        seconds = [loop_seconds(options, folder, 0)]  # fills the caches
        print(json.dumps({}), file=replies)
        for nth, _ in enumerate(sys.stdin, 1):
            seconds = [loop_seconds(options, folder, nth)]
            print(
                json.dumps(
                    {
                        "seconds": seconds[0],
                        "cpu_seconds": None,
                        "gemm": 0.0,
                        "memory": resident(),
                    }
                ),
                file=replies,
            )
        return
    weights = folder / "weights.npz"
    arm = (
        jaxlab_arm(options, weights)
        if kind == "jaxlab_step"
        else torch_arm(options, weights, compiled="compile" in kind)
    )
    losses = [arm.wait(arm.step(number)) for number in range(CHECKED_STEPS)]
    print(json.dumps({"losses": losses, "versions": arm.versions}), file=replies)
    model, rows = model_of(options), options.batch * options.length
    side = 2048 if options.preset == "tiny" else 8192
    products = [
        (2 * m * k * n, arm.gemm(m, k, n))
        for m, k, n in ((side, side, side), (rows, model.width, model.mlp or 0))
    ]
    for _ in sys.stdin:
        seconds = cpu = 0.0
        for _ in ("awake", "measured"):  # memory of an idle process comes back slowly
            loss, cpu, begin = None, time.process_time(), time.perf_counter()
            for i in range(options.steps):
                loss = arm.step(CHECKED_STEPS + i)
            arm.wait(loss)
            seconds = (time.perf_counter() - begin) / options.steps
            cpu = (time.process_time() - cpu) / options.steps
        rate = max(flops / min(map(timed, [f] * 6)) for flops, f in products)
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "cpu_seconds": cpu,
                    "gemm": rate,
                    "memory": arm.memory(),
                }
            ),
            file=replies,
        )


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


# ------------------------------------------------------------ the measurement


@contextlib.contextmanager
def worker(arm: str, options: Options, folder: Path) -> Iterator[Callable[[str], dict]]:
    """A worker process: a function that sends a line and returns the answer."""
    kind = arm.removesuffix("_tuned")
    environment = {**os.environ, "JAXLAB_CACHE": str(folder / "cache")}
    environment.pop("GLIBC_TUNABLES", None)
    environment.pop(allocator.SWITCH, None)
    if arm != kind or arm.startswith("jaxlab"):
        environment = allocator.tuned(environment) or environment
    program = (
        "import sys, json; sys.path.insert(0, sys.argv[1]);"
        "import train_throughput as t; from pathlib import Path;"
        "t.work(sys.argv[2], t.Options(**json.loads(sys.argv[3])),"
        "Path(sys.argv[4]))"
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            program,
            str(Path(__file__).parent),
            kind,
            json.dumps(dataclasses.asdict(options)),
            str(folder),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin and process.stdout

    def ask(line: str) -> dict:
        if line:
            print(line, file=process.stdin, flush=True)
        answer = process.stdout.readline()
        if not answer:
            raise UserError(f"the worker {arm} ended (exit {process.wait()})")
        return json.loads(answer)

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait()


def first_step_seconds(options: Options, folder: Path, name: str) -> float:
    """Seconds from `python scripts/train.py` to the first logged step."""
    run = dataclasses.replace(loop_run(options, folder / name), log_every=1)
    config.save(run, folder / f"{name}.json")
    script = Path(__file__).parents[1] / "scripts" / "train.py"
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder / f"{name}.json")],
        env={**os.environ, "JAXLAB_CACHE": str(folder / f"start_{options.dtype}")},
        stdout=subprocess.DEVNULL,
    )
    rows = folder / name / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size):
        if process.poll():
            raise UserError(f"scripts/train.py failed (exit {process.returncode})")
        time.sleep(0.01)
    seconds = time.perf_counter() - begin
    process.wait()
    return seconds


def arms_of(options: Options) -> list[str]:
    """Names of the arms that this machine can run."""
    import importlib.util
    import shutil

    arms = ["jaxlab_step", "jaxlab_loop"]
    if options.torch and importlib.util.find_spec("torch"):
        peers = ["torch_eager"]
        if shutil.which("c++") or shutil.which("g++"):
            peers.append("torch_compile")
        on_cpu = allocator.cpu_only(os.environ)
        arms += peers + [f"{peer}_tuned" for peer in peers if on_cpu]
    return arms


def measure(options: Options, folder: Path) -> dict[str, Any]:
    """Runs all arms in turns."""
    from jaxlab.metrics import train_flops_per_token

    arms, rounds = arms_of(options), []
    with contextlib.ExitStack() as stack:
        ask, checked, versions = {}, {}, {"python": platform.python_version()}
        for arm in arms:
            ask[arm] = stack.enter_context(worker(arm, options, folder))
            ready = ask[arm]("")
            checked |= {arm: ready["losses"]} if ready else {}
            versions |= ready.get("versions", {})
        for arm, losses in checked.items():
            error = np.max(np.abs(np.divide(losses, checked["jaxlab_step"]) - 1))
            if not error < TOLERANCE[options.dtype]:
                raise UserError(
                    f"{arm} computes something else: losses {losses}, "
                    f"and jaxlab's are {checked['jaxlab_step']}"
                )
        for _ in range(options.rounds):
            rounds.append({arm: ask[arm]("go") for arm in arms})
            print(json.dumps(rounds[-1]), file=sys.stderr)

    tokens = options.batch * options.length
    flops = train_flops_per_token(model_of(options), options.length)
    gemm = max(answer["gemm"] for row in rounds for answer in row.values())
    results = {}
    for arm in arms:
        rates = [tokens / row[arm]["seconds"] for row in rounds]
        cpu = [row[arm]["cpu_seconds"] for row in rounds]
        results[arm] = {
            "tokens_per_second": statistics.median(rates),
            "spread": [min(rates), max(rates)],
            "cpu_seconds_per_step": statistics.median(cpu) if cpu[0] else None,
            "mfu": statistics.median(rates) * flops / gemm,
            "peak_memory_bytes": rounds[-1][arm]["memory"],
            # Of rounds, not of medians: both met the same disturbances.
            "jaxlab_step_over_this": statistics.median(
                row[arm]["seconds"] / row["jaxlab_step"]["seconds"] for row in rounds
            ),
        }
    return {
        "options": dataclasses.asdict(options),
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "processor": processor(),
        },
        "versions": versions,
        "losses": checked,
        "gemm_flops": gemm,
        "flops_per_token": flops,
        "arms": results,
        "first_step_seconds": {
            name: first_step_seconds(options, folder, name)
            for name in ("nothing_cached", "warm")
        },
    }


def processor() -> str:
    """Name of the CPU, as Linux knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def main(arguments: list[str]) -> None:
    """Measures and prints JSON."""
    options = parse_options(Options, arguments, "benchmarks/train_throughput.py")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder)), indent=1))


if __name__ == "__main__":
    run_main(main)
