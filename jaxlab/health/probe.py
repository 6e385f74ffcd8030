"""Which link is slow: probes between pairs of ranks, timed on the sender's clock.

A probe is a payload from i to j and an answer of a few bytes back. Only i looks at a
clock, so none need agree; and since the payload goes one way, `delay[i, j]` is about
the link from i to j and hardly about the way back. Read with
`jaxlab.health.detect.classify_matrix`, a slow cell is a link, a slow row what a node
sends, a slow column what it receives (C4, arXiv:2406.04594).

`ppermute_probe` asks the network that the training uses, between two steps.
`tcp_probe` is for agents beside the training, when a collective hangs and no other can
be run.
"""

import contextlib
import functools
import hashlib
import hmac
import itertools
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Round = tuple[tuple[int, int], ...]  # (source, destination), each rank at most once
Address = tuple[str, int]  # host, port

_NONCE, _PROOF = 32, hashlib.sha256().digest_size
_HEAD = struct.Struct("<QI")  # bytes of a payload, how many follow
_MOST_BYTES, _MOST_REPS = 2**28, 1000  # that a listener takes
_MOST_CALLERS = 256  # that it serves at one time
_CHUNK = 2**16
_CALLS = 64  # connections that a probe opens at one time


def schedule(n: int) -> list[Round]:
    """Rounds in which every rank probes every other, in disjoint pairs.

    The circle method: 2 (n - 1) rounds if n is even, 2 n if it is odd and one rank
    rests in each.

    Raises:
      ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}, not at least 1")
    size = n + n % 2
    ring, rounds = list(range(size)), []
    for _ in range(size - 1):
        pairs = [(ring[k], ring[size - 1 - k]) for k in range(size // 2)]
        there = tuple((i, j) for i, j in pairs if max(i, j) < n)
        rounds += [there, tuple((j, i) for i, j in there)]
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return [r for r in rounds if r]


def sampled_schedule(n: int, group: int, representative: int = 0) -> list[Round]:
    """Rounds for many ranks: all pairs within groups, and one rank of each group.

    About 2 (group + n / group) rounds, least near group = sqrt(n): 252 for 4096
    ranks in groups of 64, where all pairs would take 8190.

    Args:
      n: ranks; groups are of consecutive ones, the last may be smaller.
      group: ranks of a group, of a rack, say.
      representative: which rank of its group speaks for it to other groups; another
        one each time samples other links.

    Raises:
      ValueError: n or group is below 1.
    """
    if group < 1:
        raise ValueError(f"group is {group}, not at least 1")
    groups = [range(a, min(a + group, n)) for a in range(0, n, group)]
    rounds: dict[int, list[tuple[int, int]]] = {}
    for members in groups:
        for k, pairs in enumerate(schedule(len(members))):
            rounds.setdefault(k, []).extend((members[i], members[j]) for i, j in pairs)
    speakers = [members[representative % len(members)] for members in groups]
    between = [
        tuple((speakers[i], speakers[j]) for i, j in pairs)
        for pairs in schedule(max(len(groups), 1))
    ]
    return [*map(tuple, rounds.values()), *between]


# ------------------------------------------------------------ through the devices


@functools.lru_cache(maxsize=1024)
def _program(mesh: Mesh, names: tuple[str, ...], pairs: Round) -> Callable:
    """Payload forth and four bytes back, for all pairs at one time."""

    def body(payload: jax.Array) -> jax.Array:
        got = jax.lax.ppermute(payload, names, pairs)
        # The answer needs all of the payload, or a part might be sent alone.
        answer = got.max(axis=1)
        return jax.lax.ppermute(answer, names, [(j, i) for i, j in pairs])

    every = P(mesh.axis_names)
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=every, out_specs=every))


@functools.lru_cache(maxsize=16)
def _barrier(mesh: Mesh) -> Callable:
    every = P(mesh.axis_names)
    body = jax.shard_map(
        lambda x: jax.lax.psum(x, mesh.axis_names),
        mesh=mesh,
        in_specs=every,
        out_specs=P(),
    )
    return jax.jit(body)


def _ready(array: jax.Array) -> float:
    """The moment at which it is."""
    array.block_until_ready()
    return time.perf_counter()


def ppermute_probe(
    mesh: Mesh,
    nbytes: int = 262144,
    reps: int = 5,
    *,
    axis: str | None = None,
    rounds: Sequence[Round] | None = None,
    retries: int = 3,
) -> np.ndarray:
    """Measures how long a payload takes between ranks, and a tiny answer back.

    Every process of the job calls it together, between two steps; it uses
    collectives, and hangs where they hang. A payload waits for a destination that
    starts late, so the least of `reps` counts; and what is slow all the same is
    measured again, since noise passes and a slow link does not.

    Args:
      mesh: has devices of every process. A rank is a device: for one rank a process,
        give a mesh of one device each.
      nbytes: of a payload.
      reps: how often each pair is measured, after one run that compiles.
      axis: ranks are the positions along this axis, and a cell is the worst of all
        slices of the mesh, which are measured at one time. None: ranks are all
        devices of the mesh, in its order.
      rounds: the pairs to measure; None: all, by `schedule`.
      retries: how often, at most, rounds with a pair above twice the median are
        measured again, `reps` times each; until none of these gets faster.

    Returns:
      delay [n, n] in seconds, float64, from row to column, equal in all processes;
      NaN where not measured, as on the diagonal.

    Raises:
      ValueError: fewer than four bytes or one repetition, an axis that the mesh
        lacks, or rounds whose pairs are not disjoint.
    """
    if nbytes < 4 or reps < 1 or retries < 0:
        raise ValueError(
            f"{nbytes} bytes, {reps} times, {retries} retries: at least 4, 1 and 0"
        )
    if axis is not None and axis not in mesh.axis_names:
        raise ValueError(f"the mesh has no axis {axis!r}: {mesh.axis_names}")
    names = mesh.axis_names if axis is None else (axis,)
    n = mesh.size if axis is None else mesh.shape[axis]
    rounds = schedule(n) if rounds is None else [tuple(r) for r in rounds if r]
    for pairs in rounds:
        seen = [rank for pair in pairs for rank in pair]
        if len(set(seen)) < len(seen) or not all(0 <= rank < n for rank in seen):
            raise ValueError(f"not disjoint pairs of {n} ranks: {pairs}")
    rank_of = {
        device: int(
            np.ravel_multi_index(index, mesh.devices.shape)
            if axis is None
            else index[mesh.axis_names.index(axis)]
        )
        for index, device in np.ndenumerate(mesh.devices)
    }
    sharding = NamedSharding(mesh, P(mesh.axis_names))

    def filled(width: int) -> jax.Array:
        ones = np.broadcast_to(np.int32(1), (mesh.size, width))
        return jax.make_array_from_callback(
            ones.shape, sharding, lambda index: np.array(ones[index])
        )

    payload, one = filled(nbytes // 4), filled(1)
    local = [d for d in rank_of if d.process_index == jax.process_index()]
    least: dict[tuple[Any, int], float] = {}

    def measure(rounds: Sequence[Round], times: int, threads: ThreadPoolExecutor):
        """All rounds in turn, again and again: a noisy moment spoils no pair alone."""
        calls = [(dict(pairs), _program(mesh, names, pairs)) for pairs in rounds]
        for _, call in calls:
            jax.block_until_ready(call(payload))  # compiled, where it was not
        for _, (to, call) in itertools.product(range(times), calls):
            jax.block_until_ready(_barrier(mesh)(one))
            begin = time.perf_counter()
            shards = call(payload).addressable_shards
            # Each in a thread, for one may be ready long before another.
            ends = list(threads.map(_ready, [shard.data for shard in shards]))
            for shard, end in zip(shards, ends, strict=True):
                j = to.get(rank_of[shard.device])
                if j is not None:
                    pair = (shard.device, j)
                    least[pair] = min(least.get(pair, np.inf), end - begin)

    def gathered() -> np.ndarray:
        delay = np.full((n, n), np.nan)
        for (device, j), seconds in least.items():
            cell = (rank_of[device], j)
            delay[cell] = np.fmax(delay[cell], seconds)
        if jax.process_count() == 1:
            return delay
        every = multihost_utils.process_allgather(delay.astype(np.float32))
        return np.fmax.reduce(np.asarray(every, np.float64), axis=0)

    # The caller's own mesh, where there is one, is not the one of these programs.
    with jax.set_mesh(mesh), ThreadPoolExecutor(max(len(local), 1)) as threads:
        measure(rounds, reps, threads)
        delay = gathered()
        for _ in range(retries if rounds else 0):
            # Alike in all processes, who have the same matrix.
            high = delay > 2 * np.nanmedian(delay)
            suspect = [pairs for pairs in rounds if any(high[pair] for pair in pairs)]
            if not suspect:
                break
            measure(suspect, reps, threads)
            before, delay = delay, gathered()
            if not (delay < 0.8 * before)[high].any():
                break  # it was no noise
    return delay


# ------------------------------------------------------------ between agents


class Listener:
    """Answers `tcp_probe`s until it is closed; `address` is where."""

    def __init__(self, token: bytes, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listens.

        Args:
          token: a secret that all agents share, of at least 16 bytes.
          host: an address of this host; the default is reached from it alone.
          port: 0: any that is free.

        Raises:
          ValueError: a token that is too short.
          OSError: the address is taken or is none of this host's.
        """
        self._token = _checked(token)
        self._server = socket.create_server((host, port))
        self._server.settimeout(0.2)
        self.address: Address = self._server.getsockname()[:2]
        self._stop = threading.Event()
        self._free = threading.Semaphore(_MOST_CALLERS)
        self._thread = threading.Thread(
            target=self._accept, name="jaxlab-probe-listener", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "Listener":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening."""
        self._stop.set()
        self._thread.join()
        self._server.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                link, _ = self._server.accept()
            except OSError:  # nobody for a while, or who called has gone
                continue
            if not self._free.acquire(blocking=False):
                link.close()
                continue
            threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        try:
            with link, contextlib.suppress(OSError):
                _answer(link, self._token)
        finally:
            self._free.release()


def tcp_listener(token: bytes, host: str = "127.0.0.1", port: int = 0) -> Listener:
    """Starts the side of `tcp_probe` that answers; see `Listener`."""
    return Listener(token, host, port)


def tcp_probe(
    addresses: Sequence[Address | None],
    token: bytes,
    timeout: float = 2.0,
    *,
    nbytes: int = 262144,
    reps: int = 3,
) -> np.ndarray:
    """Measures the links from this agent to its peers, whatever the training does.

    Up to 64 are called at one time, so that peers which do not answer cost one
    `timeout` together; then payloads go to one after the other, for at most another
    each.
    Agents whose probes must not meet take turns (`schedule`).

    Args:
      addresses: of listeners, by rank; None: not to be measured, as one's own.
      token: the listeners'.
      timeout: seconds for a connection, and for the payloads to one peer.
      nbytes: of a payload.
      reps: payloads to each peer, of which the fastest counts.

    Returns:
      delay [n] in seconds, float64: a row of the matrix. NaN where there is no
      address, inf where nobody with the token answered in time.

    Raises:
      ValueError: no time, no payload, or more than listeners take; a short token.
    """
    _checked(token)
    if timeout <= 0 or not 0 < nbytes <= _MOST_BYTES or not 0 < reps <= _MOST_REPS:
        raise ValueError(f"timeout {timeout}, {nbytes} bytes, {reps} times: off limits")
    delay = np.full(len(addresses), np.nan)
    wanted = [(i, address) for i, address in enumerate(addresses) if address]
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(_CALLS))
        calls = [threads.submit(_call, a, token, timeout) for _, a in wanted]
        links = [call.result() for call in calls]
        for link in links:
            if link is not None:
                stack.callback(link.close)
        for (i, _), link in zip(wanted, links, strict=True):
            delay[i] = np.inf if link is None else _timed(link, nbytes, reps, timeout)
    return delay


def _checked(token: bytes) -> bytes:
    if len(token) < 16:
        raise ValueError(f"a token of {len(token)} bytes: at least 16, from `secrets`")
    return token


def _proof(token: bytes, who: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(token, b"jaxlab-probe " + who + b"".join(nonces), "sha256")


def _exactly(link: socket.socket, count: int, until: float) -> bytes:
    """Receives; OSError if it does not come by then or the other is gone."""
    parts = []
    while count:
        link.settimeout(max(until - time.monotonic(), 1e-3))
        part = link.recv(min(count, _CHUNK))
        if not part:
            raise ConnectionError("closed by the peer")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _call(address: Address, token: bytes, timeout: float) -> socket.socket | None:
    """A connection to a listener that knows the token; None if there is none."""
    until = time.monotonic() + timeout
    try:
        link = socket.create_connection(address, timeout=timeout)
    except OSError:
        return None
    try:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine, its = secrets.token_bytes(_NONCE), _exactly(link, _NONCE, until)
        link.sendall(mine + _proof(token, b"agent", its, mine))
        proof = _exactly(link, _PROOF, until)
        if hmac.compare_digest(proof, _proof(token, b"listener", mine, its)):
            return link
    except OSError:
        pass
    link.close()
    return None


def _timed(link: socket.socket, nbytes: int, reps: int, timeout: float) -> float:
    """The fastest of some payloads and answers; inf if one fails to come."""
    until, payload, least = time.monotonic() + timeout, bytes(nbytes), np.inf
    try:
        link.sendall(_HEAD.pack(nbytes, reps))
        for _ in range(reps):
            begin = time.perf_counter()
            link.settimeout(max(until - time.monotonic(), 1e-3))
            link.sendall(payload)
            _exactly(link, 4, until)
            least = min(least, time.perf_counter() - begin)
    except OSError:
        pass  # what came in time counts
    return least


def _answer(link: socket.socket, token: bytes, patience: float = 120.0) -> None:
    """The other side of `_call` and `_timed`, of a caller who may be anyone."""
    until = time.monotonic() + patience
    link.settimeout(patience)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    mine = secrets.token_bytes(_NONCE)
    link.sendall(mine)
    # A stranger who says nothing holds a place for a few seconds only.
    its = _exactly(link, _NONCE, min(until, time.monotonic() + 5.0))
    proof = _exactly(link, _PROOF, min(until, time.monotonic() + 5.0))
    if not hmac.compare_digest(proof, _proof(token, b"agent", mine, its)):
        return
    link.sendall(_proof(token, b"listener", its, mine))
    nbytes, reps = _HEAD.unpack(_exactly(link, _HEAD.size, until))
    if not 0 < nbytes <= _MOST_BYTES or reps > _MOST_REPS:
        return
    for _ in range(reps):
        left = nbytes
        while left:  # counted, and not kept
            left -= len(_exactly(link, min(left, _CHUNK), until))
        link.sendall(b"done")
