"""The rollout service: who computes an action, and with which weights.

`Router` is the service's state without its sockets: requests go to the serving worker
with the fewest in flight; new weights go to one worker after another, or to all at
once; the requests of a worker that died go to others. A request is known by (rollout,
t) and answered once: asked again, it gets the same answer.

`worker_main` is a rollout worker, a process with weights of its own. What has queued
up while it computed is its next batch, padded to one of a few sizes that are compiled
before it serves. Each row has its own random key, of the run, the rollout and t, so an
answer depends neither on the worker nor on who shares the batch.
"""

import contextlib
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxlab.rl import wire
from jaxlab.rl.cluster import BEAT, LOST
from jaxlab.rl.config import RLRun
from jaxlab.rl.tables import Version
from jaxlab.rl.weights import load_weights

Key = tuple[int, int]
"""(rollout, t)"""


@dataclass
class Worker:
    """What the router knows of a worker."""

    peer: bytes
    version: int = -1
    """of its weights; -1: none yet"""
    loading: int = -1
    """version that it was told to load; -1: it serves"""
    in_flight: dict[Key, dict[str, Any]] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    seen: float = 0.0


class Send(NamedTuple):
    """A message that the hub is to send."""

    peer: bytes
    kind: str
    body: dict[str, Any]


class Router:
    """Routes requests to workers; every method returns what to send.

    Args:
        sync: per_worker or all.
    """

    def __init__(self, sync: str = "per_worker") -> None:
        self.sync = sync
        self.workers: dict[str, Worker] = {}
        self.waiting: deque[tuple[Key, dict[str, Any]]] = deque()
        self.target: Version | None = None
        self._asked: dict[Key, bytes] = {}
        self._answers: OrderedDict[int, tuple[int, dict[str, Any]]] = OrderedDict()

    # ------------------------------------------------------------- requests

    def ask(self, peer: bytes, body: dict[str, Any]) -> list[Send]:
        """A request for an action from an environment."""
        key = (body["rollout"], body["t"])
        known = self._answers.get(key[0])
        if known is not None and known[0] == key[1]:
            return [Send(peer, "acted", known[1])]
        again = key in self._asked
        self._asked[key] = peer  # an environment that moved is answered where it is
        if again:
            return []
        self.waiting.append((key, body))
        return self.flush()

    def answer(self, name: str, body: dict[str, Any]) -> list[Send]:
        """A worker's answer."""
        key = (body["rollout"], body["t"])
        worker = self.workers.get(name)
        if worker is not None:
            worker.in_flight.pop(key, None)
        peer = self._asked.pop(key, None)
        if peer is None:
            return []  # another worker was faster
        self._answers[key[0]] = (key[1], body)
        self._answers.move_to_end(key[0])
        while len(self._answers) > 4096:
            self._answers.popitem(last=False)
        return [Send(peer, "acted", body), *self.flush()]

    def forget(self, rollout: int) -> None:
        """A rollout has ended or died: nobody waits for its answers."""
        self._answers.pop(rollout, None)
        for key in [key for key in self._asked if key[0] == rollout]:
            del self._asked[key]
        self.waiting = deque(w for w in self.waiting if w[0][0] != rollout)

    def flush(self) -> list[Send]:
        """Hands waiting requests to workers that may serve them."""
        sends: list[Send] = []
        left: deque[tuple[Key, dict[str, Any]]] = deque()
        for key, body in self.waiting:
            worker = self._pick(body["least"])
            if worker is None:
                left.append((key, body))
                continue
            worker.in_flight[key] = body
            sends.append(Send(worker.peer, "act", body))
        self.waiting = left
        return sends

    def _pick(self, least: int) -> Worker | None:
        serving = [
            worker
            for worker in self.workers.values()
            if worker.loading < 0 and worker.version >= max(least, 0)
        ]
        return min(serving, key=lambda w: len(w.in_flight), default=None)

    # ------------------------------------------------------------- workers

    def join(self, name: str, peer: bytes) -> list[Send]:
        """A worker is there, new or again; it has no weights."""
        sends = self.leave(name)
        self.workers[name] = Worker(peer)
        return sends + self._roll()

    def leave(self, name: str) -> list[Send]:
        """A worker has died: others get its requests."""
        worker = self.workers.pop(name, None)
        if worker is None:
            return []
        back = [item for item in worker.in_flight.items() if item[0] in self._asked]
        self.waiting.extendleft(reversed(back))
        return self._roll() + self.flush()

    def loaded(self, name: str, version: int) -> list[Send]:
        """A worker has done as it was told, or could not, and now has this version."""
        worker = self.workers.get(name)
        if worker is None:
            return []
        worker.version, worker.loading = version, -1
        return self._roll() + self.flush()

    def publish(self, version: Version) -> list[Send]:
        """There are new weights."""
        self.target = version
        return self._roll()

    def _roll(self) -> list[Send]:
        """Has workers load the newest weights: all, or one while the others serve."""
        if self.target is None:
            return []
        behind = [
            worker
            for worker in self.workers.values()
            if worker.version < self.target.version and worker.loading < 0
        ]
        if self.sync == "per_worker":
            # One at a time; those without any weights serve nobody and all may load.
            new = [worker for worker in behind if worker.version < 0]
            busy = any(w.loading >= 0 <= w.version for w in self.workers.values())
            old = [worker for worker in behind if worker.version >= 0]
            behind = new + ([] if busy else old[:1])
        for worker in behind:
            worker.loading = self.target.version
        return [Send(w.peer, "load", self.target._asdict()) for w in behind]

    def serving(self) -> int:
        """Workers that can answer now."""
        return sum(w.loading < 0 <= w.version for w in self.workers.values())


# ------------------------------------------------------------------- worker


class WorkerSpec(NamedTuple):
    """What a worker process is told; plain data."""

    name: str
    index: int
    keys: wire.Keys
    run: RLRun
    space: Any
    """the environments' observation space"""


def worker_main(
    spec: WorkerSpec, load: Callable[[str, str, Any], Any] = load_weights
) -> None:
    """The process: compiles, then answers until it is told to stop.

    Args:
        spec: what it is told.
        load: reads weights, as `load_weights` does.
    """
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    )
    answerer = Answerer(spec)
    params: Any = None
    version, parent = -1, os.getppid()
    busy, rows, batches = 0.0, 0, 0
    with wire.connect(spec.keys) as channel:
        channel.send("serve", {"name": spec.name, "pid": os.getpid()})
        beat = last_word = time.monotonic()
        queue: deque[dict[str, Any]] = deque()
        wanted: dict[str, Any] | None = None
        while True:
            for message in channel.receive(0.0 if queue else BEAT):
                last_word = time.monotonic()
                if message.kind == "act":
                    queue.append(message.body)
                elif message.kind == "load":
                    wanted = message.body
                elif message.kind == "stop":
                    return
            now = time.monotonic()
            if now - beat > BEAT:
                beat = now
                totals = {"busy": busy, "rows": rows, "batches": batches}
                body = {"name": spec.name, "pid": os.getpid(), "totals": totals}
                channel.send("beat", body)
            if os.getppid() != parent or now - last_word > LOST:
                os._exit(3)
            if queue:
                begin = time.monotonic()
                take = min(len(queue), spec.run.rollout.buckets[-1])
                batch = [queue.popleft() for _ in range(take)]
                for answer in answerer(params, batch, version):
                    channel.send("acted", {"name": spec.name, **answer})
                busy += time.monotonic() - begin
                rows, batches = rows + take, batches + 1
            if wanted is not None and not queue:  # what was asked before goes first
                path = f"{spec.run.out}/{wanted['path']}"
                # They may be gone where newer ones have come meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    loaded = load(path, wanted["sha256"], answerer.template)
                    params = answerer.place(loaded)
                    version = wanted["version"]
                    if not answerer.warm:
                        answerer.warm_up(params)
                channel.send("loaded", {"name": spec.name, "version": version})
                wanted = None


class Answerer:
    """Turns requests into answers."""

    def __init__(self, spec: WorkerSpec) -> None:
        import jax

        from jaxlab.program import use_compilation_cache

        use_compilation_cache()
        run, self.index = spec.run, spec.index
        self.buckets, self.space = run.rollout.buckets, spec.space
        self.policy = run.policy.build(spec.space)
        self.template = jax.eval_shape(self.policy.init, jax.random.key(0))
        self.warm = False
        devices = jax.local_devices()  # of which the learner takes the first
        self.device = devices[(self.index + 1) % len(devices)]
        root, policy = jax.random.key(run.seed), self.policy
        temperature = run.rollout.temperature

        def act(params: Any, images: Any, instruction: Any, ids: Any) -> Any:
            keys = jax.vmap(
                lambda i: jax.random.fold_in(jax.random.fold_in(root, i[0]), i[1])
            )(ids)
            return policy.act(params, images, instruction, keys, temperature)

        self._act = jax.jit(act)

    def place(self, params: Any) -> Any:
        """Weights on this worker's device, where it then acts."""
        import jax

        return jax.device_put(params, self.device)

    def warm_up(self, params: Any) -> None:
        """Compiles for each batch size."""
        image = np.zeros(self.space["image"].shape, np.uint8)
        words = np.zeros(self.space["instruction"].shape, np.int32)
        blank = {"rollout": 0, "t": 0, "image": image, "instruction": words}
        for size in self.buckets:
            self(params, [blank] * size, 0)
        self.warm = True

    def __call__(
        self, params: Any, batch: Sequence[dict[str, Any]], version: int
    ) -> list[dict[str, Any]]:
        """Answers to as many requests as the largest batch has."""
        size = next(size for size in self.buckets if size >= len(batch))
        rows = [*batch, *[batch[-1]] * (size - len(batch))]
        ids = np.array([(r["rollout"] % 2**31, r["t"]) for r in rows], np.uint32)
        tokens, logp, entropy = (
            np.asarray(x)
            for x in self._act(
                params,
                np.stack([r["image"] for r in rows]),
                np.stack([r["instruction"] for r in rows]),
                ids,
            )
        )
        return [
            {
                "rollout": request["rollout"],
                "t": request["t"],
                "tokens": tokens[i],
                "logp": logp[i],
                "entropy": entropy[i],
                "version": version,
                "worker": self.index,
                "action": plain_action(self.policy.action(tokens[i])),
            }
            for i, request in enumerate(batch)
        ]


def plain_action(action: Any) -> dict[str, Any]:
    """An `envs.api.Action` as numbers and lists."""
    return {
        "kind": int(action.kind),
        "xy": [float(v) for v in action.xy],
        "to": [float(v) for v in action.to],
        "token": int(action.token),
        "field": int(action.field),
        "key": int(action.key),
    }
