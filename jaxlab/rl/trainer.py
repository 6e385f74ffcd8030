"""The learner's process: lease, update, publish, and now and then save.

Its state is saved with what it has learnt from in mind: `store.acknowledge` follows a
checkpoint that is whole on disk. A learner that starts again goes on from there, and
publishes that state under a new version, since the lost ones were used for acting.
"""

import dataclasses
import os
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.rl import figures, wire
from jaxlab.rl.cluster import heartbeats, make_env
from jaxlab.rl.config import RLRun
from jaxlab.rl.rollout import TRAINING_SEEDS, chooser
from jaxlab.rl.store import Store
from jaxlab.rl.tables import Choice, Member
from jaxlab.rl.trajectory import collate, padded_size
from jaxlab.rl.weights import prune, save_weights

CONSUMER = "learner"


class LearnerSpec(NamedTuple):
    """What the learner's process is told; plain data."""

    name: str
    keys: wire.Keys
    run: RLRun
    space: Any
    """the environments' observation space"""


def learner_main(spec: LearnerSpec) -> None:
    """The process: trains to `run.steps`, or until it is told to stop."""
    stopping = threading.Event()
    threading.Thread(target=_beat, args=(spec, stopping), daemon=True).start()
    store = Store(spec.run.out, spec.run.store)
    with store, wire.connect(spec.keys) as channel:
        Trainer(spec, channel, store, stopping).train()
        channel.send("finished", {})
        stopping.wait(30.0)


def _beat(spec: LearnerSpec, stopping: threading.Event) -> None:
    """Heartbeats, and leases kept alive, also while an update takes long."""
    store, renewed = Store(spec.run.out, spec.run.store), time.monotonic()
    with store, wire.connect(spec.keys) as channel:
        for _ in heartbeats(channel):
            body = {"name": spec.name, "pid": os.getpid(), "totals": {}}
            channel.send("beat", body)
            if time.monotonic() - renewed > 10.0:
                renewed = time.monotonic()
                store.renew(CONSUMER)
    stopping.set()


class Trainer:
    """One learner: its state, and where that is saved and published."""

    def __init__(
        self,
        spec: LearnerSpec,
        channel: wire.Channel,
        store: Store,
        stopping: threading.Event,
    ) -> None:
        import jax

        from jaxlab.program import use_compilation_cache
        from jaxlab.rl import learner

        use_compilation_cache()
        self.run, self.channel, self.stopping = spec.run, channel, stopping
        self.store = store
        self.policy = self.run.policy.build(spec.space)
        self.learner = learner.build(self.run, self.policy)
        self.key = jax.random.key(self.run.seed)
        self.abstract = jax.eval_shape(
            lambda key: self.learner.init(self.policy.init(key)), self.key
        )
        self.step = 0
        self.state: Any = None

    def train(self) -> None:
        """Goes on from the last saved state."""
        from jaxlab import checkpoint

        run = self.run
        folder, keep = Path(run.out) / "checkpoints", run.checkpoint
        with checkpoint.open_checkpoints(
            folder, keep_last=keep.keep_last, keep_best=0
        ) as saved:
            found = checkpoint.restore(
                saved, self.abstract, description=self._description()
            )
            self.state, self.step = found or (self._first(), 0)
            self.store.release(CONSUMER)
            newest = figures.latest(self.store.database)
            self.version = -1 if newest is None else newest.version
            self._publish(None)
            self.channel.send("trained", {"step": self.step, "resumed": True})
            if found is None:
                self._save(saved)  # what was imitated need not be so again
            while self.step < run.steps and not self.stopping.is_set():
                self._update()
                last = self.step == run.steps
                if last or (keep.every and self.step % keep.every == 0):
                    self._save(saved)
            if self.step % (keep.every or run.steps):
                self._save(saved)

    def _first(self) -> Any:
        """The state to start from: of fresh weights, or of such that have imitated."""
        from jaxlab.rl.learner import clone
        from jaxlab.rl.play import demonstrations

        run, cloning = self.run, self.run.cloning
        params = self.policy.init(self.key)
        if not cloning.updates:
            return self.learner.init(params)
        tasks, per_task = run.envs.tasks, run.curation.per_task
        envs, shown = [make_env(run.envs) for _ in range(run.envs.slots)], []
        wanted = dict.fromkeys(tasks, per_task if run.curation.experience else 0)
        for one in demonstrations(
            self.policy,
            envs,
            tasks,
            cloning.episodes,
            run.seed,
            limit=run.envs.max_steps,
            below=TRAINING_SEEDS,
            stopped=self.stopping.is_set,
        ):
            shown.append(one)
            if one.reward > 0 and wanted[one.task]:
                wanted[one.task] -= 1
                self.store.add_experience(one, per_task)
            if len(shown) % 1000 == 0 or len(shown) == 1:
                line = f"expert: {len(shown)} of {cloning.episodes} episodes"
                self.channel.send("line", {"line": line})
        for env in envs:
            env.close()
        if self.stopping.is_set():
            raise SystemExit  # nothing is saved: the next start shows them anew
        self.channel.send("line", {"line": f"imitating {len(shown)} episodes"})
        updates = clone(cloning, self.policy, params, shown, run.seed)
        for number, (imitator, told) in enumerate(updates, 1):
            params = imitator
            if self.stopping.is_set():
                raise SystemExit  # it is not saved: the next start imitates anew
            if number % 100 == 0 or number == cloning.updates:
                line = (
                    f"imitation {number}/{cloning.updates}: {float(told['loss']):.3f}"
                )
                self.channel.send("line", {"line": line + " nats an action"})
        return self.learner.init(params)

    def _update(self) -> None:
        """One update, once there are enough groups."""
        run, begin, rejected = self.run, time.monotonic(), 0
        most = run.curation.max_rejected
        smallest = 1 if run.curation.keep_uninformative else 2
        choose = chooser(run.curation, self.version, run.seed)

        def counted(*group: Any) -> Choice:
            nonlocal rejected
            choice = choose(*group)
            rejected += not choice.keep
            return choice

        lease = None
        while lease is None:
            if self.stopping.is_set():
                return
            lease = self.store.lease(
                run.groups,
                self.version,
                run.rollout.max_lag,
                counted,
                consumer=CONSUMER,
                smallest=smallest,
                least=1 if most is not None and rejected >= most else None,
            )
            if lease is None:
                time.sleep(0.02)
        waited = time.monotonic() - begin
        loaded = [[(x, self.store.load(x)) for x in group] for group in lease.groups]
        groups = [[one for _, one in group] for group in loaded]
        steps = sum(one.length for group in groups for one in group)
        batch = collate(groups, self.version, padded_size(steps))
        self.state, metrics = self.learner.update(self.state, batch)
        values = {name: float(value) for name, value in metrics.items()}
        self.step += 1
        used = self.version
        self._publish(lease.id)
        entries = [pair for group in loaded for pair in group]
        # What was injected from the pool may be of any age.
        own = [one for entry, one in entries if isinstance(entry, Member)]
        lag = used - np.concatenate([one.version for one in own])
        body = {
            "step": self.step,
            "version": self.version,
            "metrics": values,
            "figures": {
                "lag_mean": float(lag.mean()),
                "lag_max": int(lag.max()),
                "steps": steps,
                "trajectories": len(entries),
                "injected": len(entries) - len(own),
                "reward": float(np.mean([one.reward for one in own])),
                "rejected": rejected,
                "wait_seconds": waited,
                "update_seconds": time.monotonic() - begin - waited,
            },
        }
        self.channel.send("trained", body)

    def _publish(self, lease: int | None) -> None:
        """Makes the weights known under the next version."""
        version = self.version + 1
        path = f"weights/{version}.safetensors"
        folder = Path(self.run.out)
        sha256 = save_weights(folder / path, self.state.params)
        self.store.publish(version, self.step, path, sha256, lease)
        self.version = version
        prune(folder / "weights", 4 + self.run.rollout.workers)

    def _save(self, saved: Any) -> None:
        """A checkpoint, and then the end of what it has learnt from."""
        from jaxlab import checkpoint

        checkpoint.save(saved, self.step, self.state, self._description())
        saved.wait()
        self.store.acknowledge(self.version, CONSUMER)

    def _description(self) -> dict[str, Any]:
        policy = self.run.policy
        return {"model": {"type": type(policy).__name__, **dataclasses.asdict(policy)}}
