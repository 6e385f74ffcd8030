"""New weights for the rollout workers: one after the other, or all at once.

    python benchmarks/rl_sync.py --seconds 40

Four workers that take 0.6 s to load weights, new weights about every 1.5 s, 16
environments that sleep (`common/latent.py`) and never wait for a task. The number of
workers that serve is looked at all the time, at least every 20 ms; answers are counted
in windows of half a second. The dip is the worst window beside the median.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time

from common.latent import SCALE, LatentPolicy, slow_worker

from jaxlab import config
from jaxlab.optimizers import AdamW
from jaxlab.rl import launch
from jaxlab.rl.config import Curation, Envs, Objective, RLRun, Rollout

WINDOW = 0.5


def once(sync: str, seconds: float) -> dict[str, float]:
    """One kind of synchronisation for so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = RLRun(
            out=folder,
            steps=10**6,
            groups=1,
            policy=LatentPolicy(act=0.005, score=1.0),
            envs=Envs(
                id="common.latent:Latent-v0",
                tasks=("a", "b"),
                hosts=2,
                slots=8,
                max_steps=30,
            ),
            rollout=Rollout(workers=4, max_lag=1000, sync=sync),
            curation=Curation(n_max=4, dynamic_rollouts=False, dynamic_length=False),
            objective=Objective(beta=0.0),
            optimizer=AdamW(warmup=1, schedule="constant"),
            checkpoint=config.Checkpoint(every=0),
        )
        serving: list[int] = []
        gaps: list[float] = []
        windows: list[float] = []
        marks: list[tuple[float, float]] = []

        def look(hub, engine):
            now = time.monotonic()
            if hub.version < 3:
                return
            serving.append(hub.router.serving())
            if not marks:
                marks.extend([(now, hub.answers), (now, hub.answers)])
                gaps.append(now)
            gaps.append(now)
            if now - marks[-1][0] > WINDOW:
                windows.append((hub.answers - marks[-1][1]) / (now - marks[-1][0]))
                marks.append((now, hub.answers))
            hub.finished = now - marks[0][0] > seconds

        launch.train(run, lambda line: None, look, launch.Mains(worker=slow_worker))
    if not windows:
        raise SystemExit(f"{sync} was interrupted before it had been measured")
    middle = statistics.median(windows)
    return {
        "fewest_serving": min(serving),
        "share_of_looks_with_none": sum(n == 0 for n in serving) / len(serving),
        "longest_between_looks": max(
            b - a for a, b in zip(gaps, gaps[1:], strict=False)
        ),
        "answers_per_second": middle,
        "dip": 1 - min(windows) / middle,
        "windows_without_answers": sum(w == 0 for w in windows),
    }


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    os.environ[SCALE] = "0.5"
    results = {sync: once(sync, options.seconds) for sync in ("per_worker", "all")}
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]}"
    print(json.dumps({"benchmark": "rl_sync", "machine": machine} | results, indent=1))


if __name__ == "__main__":
    main()
