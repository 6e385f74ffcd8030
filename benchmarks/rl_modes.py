"""Who waits for whom: lockstep, batch-wise, task-wise and rollout-wise in one run.

    python benchmarks/rl_modes.py --seconds 60 --rounds 3
    python benchmarks/rl_modes.py --seconds 60 --rounds 3 --chromium

The same processes, environments, policy and cost of an update; only `rollout.mode`
differs. Environments and updates sleep (`common/latent.py`), by default in the regime
of the paper: updates of 8 s beside steps of 0.12 s. `--chromium` acts on eight tabs of
MiniWoB++ instead, whose steps take 50 to 500 ms more, beside updates of 3 s. `--scale
0.25` makes all that is slept four times as fast. Modes are interleaved; figures are
medians of the rounds, from the first update on, and the environments' are measured
inside their processes.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass

from common.latent import SCALE, LatentPolicy

from jaxlab import config
from jaxlab.optimizers import AdamW
from jaxlab.rl import launch
from jaxlab.rl.cluster import STATES
from jaxlab.rl.config import Curation, Envs, Objective, RLRun, Rollout
from jaxlab.rl.store import Store

MODES = ("lockstep", "batch", "task", "rollout")


@dataclass(frozen=True)
class Regime:
    """What acts, and how long an update takes."""

    envs: Envs
    batch: int
    """rollouts an update"""
    update: float
    """seconds"""
    workers: int


SLEPT = Regime(
    Envs("common.latent:Latent-v0", tuple("abcdefgh"), hosts=2, slots=16, max_steps=30),
    batch=32,
    update=8.0,
    workers=4,
)
CHROMIUM = Regime(
    Envs(
        "common.latent:LatentWeb-v0",
        ("click-button", "click-checkboxes", "enter-text", "login-user"),
        hosts=1,
        slots=8,
        max_steps=20,
    ),
    batch=16,
    update=3.0,
    workers=2,
)


def once(mode: str, regime: Regime, options: argparse.Namespace) -> dict[str, float]:
    """One mode for so many seconds."""
    scale = options.scale
    with tempfile.TemporaryDirectory() as folder:
        run = RLRun(
            out=folder,
            steps=10**6,
            groups=regime.batch // 8,
            policy=LatentPolicy(0.03 * scale, regime.update * scale),
            envs=regime.envs,
            rollout=Rollout(mode=mode, workers=regime.workers, max_lag=options.max_lag),
            curation=Curation(
                dynamic_rollouts=False,
                dynamic_length=False,
                experience=False,
                keep_uninformative=True,
            ),
            objective=Objective(beta=0.0),
            optimizer=AdamW(warmup=1, schedule="constant"),
            checkpoint=config.Checkpoint(every=0),
        )
        seen: list[tuple] = []

        def look(hub, engine):
            if hub.version < 2:
                return
            now = time.monotonic()
            if not seen or now - seen[0][0] > options.seconds:
                totals = hub.workers.total(), hub.hosts.total()
                seen.append((now, hub.version, hub.utilisation(), *totals))
                hub.finished = len(seen) > 1

        launch.train(run, lambda line: None, look)
        store = Store(folder)
        made, used = (
            store.database.query(
                "SELECT COALESCE(SUM(steps), 0) FROM trajectory JOIN grouping"
                f" ON grouping.id = trajectory.grouping WHERE {which}"
            )[0][0]
            for which in ("1 = 1", "grouping.state IN ('TRAINED', 'USED')")
        )
        store.close()
    if len(seen) < 2:
        raise SystemExit(f"{mode} was interrupted before it had been measured")
    begin, version0, envs0, work0, hosts0 = seen[0]
    end, version1, envs1, work1, hosts1 = seen[1]
    seconds = end - begin
    spent = {state: envs1[state] - envs0[state] for state in STATES}
    utilisation = (spent["busy"] + spent["reset"]) / sum(spent.values())
    return {
        "env_utilisation": utilisation,
        "useful_utilisation": utilisation * used / max(made, 1),
        "worker_utilisation": (work1["busy"] - work0["busy"])
        / seconds
        / regime.workers,
        "actions_per_minute": 60 * (hosts1["steps"] - hosts0["steps"]) / seconds,
        "updates_per_minute": 60 * (version1 - version0) / seconds,
        "consumed_share": used / max(made, 1),
    } | {f"env_{state}": value / sum(spent.values()) for state, value in spent.items()}


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on all that is slept"
    )
    parser.add_argument("--update", type=float, help="seconds, unscaled: 8, or 3")
    parser.add_argument("--chromium", action="store_true", help="on web pages")
    parser.add_argument("--max-lag", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args()
    os.environ[SCALE] = str(options.scale)
    regime = CHROMIUM if options.chromium else SLEPT
    if options.update is not None:
        regime = dataclasses.replace(regime, update=options.update)
    rounds = [
        {mode: once(mode, regime, options) for mode in options.modes}
        for _ in range(options.rounds)
    ]
    medians = {
        mode: {
            name: round(statistics.median(one[mode][name] for one in rounds), 4)
            for name in rounds[0][mode]
        }
        for mode in options.modes
    }
    ratios = {}
    if {"batch", "rollout"} <= set(medians):
        ratios = {
            f"{name}, rollout over batch": round(
                medians["rollout"][name] / max(medians["batch"][name], 1e-9), 3
            )
            for name in (
                "env_utilisation",
                "useful_utilisation",
                "worker_utilisation",
                "actions_per_minute",
                "updates_per_minute",
            )
        }
    print(
        json.dumps(
            {
                "benchmark": "rl_modes",
                "options": vars(options),
                "regime": dataclasses.asdict(regime),
                "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
                "load": os.getloadavg()[0],
                "medians": medians,
                "ratios": ratios,
                "rounds": rounds,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
