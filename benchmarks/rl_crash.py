"""Kills a random part of a run every few seconds, and counts what is lost.

    python benchmarks/rl_crash.py --seconds 120 --every 5
    python benchmarks/rl_crash.py --seconds 120 --every 5 --chromium

Environment hosts, rollout workers and the learner of a run on the embedded interface
die by SIGKILL; with `--chromium` of a run on web pages, and browsers and renderers too.
Each host also keeps a list of what it has finished, outside of the store, with hashes.
Afterwards: every rollout on that list is stored, once; nothing was trained twice; no
rollout that died became a reward of 0; and how long after each death all environments
were there again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path

from common.latent import audited_host

from jaxlab import config
from jaxlab.optimizers import AdamW
from jaxlab.rl import figures, launch
from jaxlab.rl.config import Curation, Envs, GuiPolicy, RLRun, Rollout, TinyPolicy
from jaxlab.rl.envs import miniwob_tasks
from jaxlab.rl.store import Store
from jaxlab.rl.trajectory import decode

PIX = Envs(tasks=("color", "click"), hosts=3, slots=4, max_steps=6)
CHROMIUM = Envs(
    id="jaxlab/MiniWoB-v0",
    tasks=("click-test", "focus-text"),
    hosts=1,
    slots=3,
    max_steps=6,
)
SMALL = GuiPolicy(
    cell=5, stride=5, patch=10, pool=2, features=4, width=8, heads=2, layers=1
)


def audit(run: RLRun) -> dict[str, object]:
    """What the store holds beside what the hosts say."""
    limits = miniwob_tasks.TASKS | {task: 8 for task in PIX.tasks}
    store = Store(run.out)
    query = store.database.query
    finished = dict(
        line.split()
        for line in (Path(run.out) / "spool/finished").read_text().splitlines()
    )
    stored = {
        str(rollout): (path, sha256, cap)
        for rollout, path, sha256, cap in query(
            "SELECT rollout, path, sha256, cap FROM trajectory"
            " JOIN rollout ON rollout.id = trajectory.rollout"
        )
    }
    damaged = wrong = 0
    for path, sha256, cap in stored.values():
        blob = (Path(run.out) / path).read_bytes()
        damaged += hashlib.sha256(blob).hexdigest() != sha256
        one = decode(blob)
        wrong += one.truncated and one.length < min(cap, limits[one.task])
    waiting = {path.stem for path in Path(run.out, "spool").glob("*/*.trajectory")}
    used_in = query(
        "SELECT COUNT(*) FROM grouping WHERE state = 'USED' AND lease IS NULL"
    )[0][0]
    died = query("SELECT COUNT(*) FROM event WHERE kind = 'rollout_died'")[0][0]
    result = {
        "finished_by_hosts": len(finished),
        "stored": len(stored),
        "finished_and_not_stored": len(set(finished) - set(stored) - waiting),
        "still_in_a_spool": len(waiting - set(stored)),
        "damaged": damaged,
        "cut_short_and_stored": wrong,
        "used_without_a_lease": used_in,
        "rollouts_that_died": died,
        "largest_lag": figures.largest_lag(store.database),
        "groups": figures.group_counts(store.database),
    }
    store.close()
    return result


def browsers(host: int | None) -> dict[str, list[int]]:
    """Processes of a host's browsers, by kind."""
    found: dict[str, list[int]] = {"browser": [], "renderer": []}
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(
                path.read_text().rpartition(")")[2].split()[1]
            )
    for pid in parents:
        above = pid
        while above in parents and above != host:
            above = parents[above]
        if host is None or above != host:
            continue
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"--type=renderer" in words:
                found["renderer"].append(pid)
            elif b"--remote-debugging-pipe" in words and b"chrom" in words[0]:
                found["browser"].append(pid)
    return found


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chromium", action="store_true")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    kills: list[tuple[float, str]] = []
    back: list[float] = []
    begun: list[float] = []
    progress: list[int] = []

    with tempfile.TemporaryDirectory() as folder:
        run = RLRun(
            out=folder,
            steps=10**6,
            groups=2,
            envs=CHROMIUM if options.chromium else PIX,
            policy=SMALL if options.chromium else TinyPolicy(),
            rollout=Rollout(workers=2, max_lag=2),
            curation=Curation(n_max=4),
            optimizer=AdamW(lr=1e-2, warmup=1, schedule="constant", weight_decay=0.0),
            checkpoint=config.Checkpoint(every=5),
            keep_blobs=None,  # the audit reads all of them
        )
        slots = run.envs.hosts * run.envs.slots
        names = [f"host{i}" for i in range(run.envs.hosts)]
        names += ["worker0", "worker1", "learner"]

        def look(hub, engine):
            now = time.monotonic()
            if hub.version < 2:
                return
            if not begun:
                begun.extend([now, now])
            up = len(hub.slots) == slots
            if kills and len(back) < len(kills) and up and now - kills[-1][0] > 0.2:
                back.append(now - kills[-1][0])
            if now - begun[0] > options.seconds:
                hub.finished = len(back) == len(kills)
            elif now - begun[1] > options.every:
                begun[1] = now
                progress.append(hub.version)
                while len(back) < len(kills):
                    back.append(float("nan"))  # not back before the next kill
                alive = {n: [p] for n in names if (p := engine.pid(n)) is not None}
                if options.chromium:
                    pages = browsers(engine.pid("host0"))
                    alive |= {kind: pids for kind, pids in pages.items() if pids}
                name = rng.choice(sorted(alive))
                os.kill(rng.choice(alive[name]), signal.SIGKILL)
                kills.append((now, name))

        launch.train(run, lambda line: None, look, launch.Mains(host=audited_host))
        if not begun:
            raise SystemExit("it was interrupted before anything was killed")
        result = audit(run)
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]}"
    hosts = [s for s, (_, n) in zip(back, kills, strict=True) if n.startswith("host")]
    print(
        json.dumps(
            {
                "benchmark": "rl_crash",
                "machine": machine,
                "options": vars(options),
                "kills": [name for _, name in kills],
                "versions_at_kills": progress,
                "seconds_until_all_slots_are_back": {
                    "each": [round(s, 2) for s in back],
                    "median_after_a_host": statistics.median(hosts) if hosts else None,
                    "longest": max(back, default=0.0),
                },
            }
            | result,
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
