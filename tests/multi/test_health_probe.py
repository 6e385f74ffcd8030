"""Probes, the recorder and profiles in jobs of real processes.

Run as a program, this file is one process of such a job (see `Job`): it answers each
line of stdin with a line of JSON.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TOKEN = b"known to agents only"
AXIS = "data"
MBIT = 40  # of a link that is slow
LISTEN = 7900


# ------------------------------------------------------------------ a process


def work(index, count):
    """Answers orders: `probe`, `tcp`, `train`, `profile`."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    host, port = os.environ["COORDINATOR"].split(":")
    mine = os.environ["ADDRESSES"].split(",")[index]
    with contextlib.suppress(PermissionError):  # in a namespace: gloo listens there
        if mine != "127.0.0.1":
            socket.sethostname(mine)
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxlab.health import probe, profile
    from jaxlab.health.record import Recorder, instrument, watch

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", int(os.environ.get("DEVICES", "1")))
    jax.distributed.initialize(
        f"{host}:{port}", count, index, cluster_detection_method="deactivate"
    )
    n = jax.device_count()
    mesh = jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,))
    each, one = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    listener = probe.tcp_listener(TOKEN, mine, LISTEN + index)
    folder = os.environ["BOARDS"]
    recorder = Recorder(f"{folder}/{index}", index, period=0.05)

    def local(w, x):
        def body(w, x):
            w = jax.lax.pcast(w, (AXIS,), to="varying")
            loss, grads = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
            return grads[None], loss[None]

        given, result = (P(), P(AXIS)), (P(AXIS), P(AXIS))
        return jax.shard_map(body, mesh=mesh, in_specs=given, out_specs=result)(w, x)

    def sync(w, grads):
        def body(w, grads):
            mean = jax.lax.pmean(grads[0], AXIS)
            return w - 0.1 * mean, jnp.sum(mean**2)

        given, result = (P(), P(AXIS)), (P(), P())
        return jax.shard_map(body, mesh=mesh, in_specs=given, out_specs=result)(
            w, grads
        )

    def whole(w, x):  # nothing split, the collectives are the partitioner's
        loss, grads = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
        return w - 0.1 * grads, loss

    parts = jax.jit(local), jax.jit(sync, donate_argnums=(0, 1))
    step = instrument(*parts, recorder)
    unmodified = jax.jit(whole, donate_argnums=0, out_shardings=(one, one))
    fresh = jax.jit(lambda: jnp.full((64, 64), 0.1), out_shardings=one)
    x = jax.jit(lambda: jnp.ones((8 * n, 64)), out_shardings=each)()
    held = {"split": fresh(), "whole": fresh()}
    steps_of = {"split": step, "whole": watch(unmodified, recorder)}

    def train(steps, late, seconds, how="split"):
        for _ in range(steps):
            time.sleep(seconds * (index == late))
            held[how], metric = steps_of[how](held[how], x)
            jax.block_until_ready(metric)
        return {"metric": float(metric)}

    def same(steps):
        """Whether instrumented and plain steps have the same bits."""
        found = []
        for run in (step, lambda w, x: parts[1](w, parts[0](w, x)[0])):
            w = fresh()
            for _ in range(steps):
                w, _ = run(w, x)
            found.append(np.asarray(w.addressable_data(0)).tobytes())
        return {"same": found[0] == found[1]}

    def window(steps, late, seconds):
        w, loss = unmodified(fresh(), x)
        jax.block_until_ready(loss)

        def run():
            nonlocal w
            time.sleep(seconds * (index == late))
            w, loss = unmodified(w, x)
            return loss

        times = profile.sample_profile(run, steps).per_process()
        wide = {k: getattr(times, k).tolist() for k in ("wait", "local", "step")}
        return wide | {"processes": times.processes.tolist(), "ops": list(times.ops)}

    def tcp(to, timeout=1.0):
        given = [tuple(a) if a else None for a in to]
        return {"delay": probe.tcp_probe(given, TOKEN, timeout).tolist()}

    def ppermute(per_process=False, **options):
        first = {d.process_index: d for d in reversed(jax.devices())}
        few = Mesh(np.array([first[i] for i in sorted(first)]), ("process",))
        delay = probe.ppermute_probe(few if per_process else mesh, **options)
        return {"delay": delay.tolist()}

    orders = {
        "train": train,
        "same": same,
        "profile": window,
        "tcp": tcp,
        "probe": ppermute,
    }
    print(json.dumps({"pid": os.getpid()}), file=replies)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(orders[order.pop("do")](**order)), file=replies)
    listener.close()
    os._exit(0)  # others may be gone, and a farewell would wait for them


if __name__ == "__main__":
    work(*map(int, sys.argv[2:4]))
    raise SystemExit

from benchmarks.common.namespaces import QUEUE, Job, tool  # noqa: E402
from jaxlab.health import probe  # noqa: E402
from jaxlab.health.detect import (  # noqa: E402
    Baseline,
    DetectConfig,
    Kind,
    Phase,
    align,
    detect_stall,
)
from jaxlab.health.matrix import classify_matrix  # noqa: E402
from jaxlab.health.record import read_board, read_boards  # noqa: E402

# ------------------------------------------------------------------ schedules


@given(n=st.integers(1, 40))
def test_every_pair_meets_once_in_each_direction(n):
    rounds = probe.schedule(n)
    for pairs in rounds:
        ranks = list(itertools.chain.from_iterable(pairs))
        assert len(set(ranks)) == len(ranks)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(i, j) for i in range(n) for j in range(n) if i != j]
    assert len(rounds) == (0 if n == 1 else 2 * (n - 1 + n % 2))


@settings(max_examples=50)
@given(n=st.integers(1, 200), group=st.integers(1, 40), who=st.integers(0, 50))
def test_a_sampled_schedule_has_groups_and_their_speakers(n, group, who):
    rounds = probe.sampled_schedule(n, group, who)
    groups = [range(a, min(a + group, n)) for a in range(0, n, group)]
    speakers = [g[who % len(g)] for g in groups]
    wanted = {(i, j) for g in [*groups, speakers] for i in g for j in g if i != j}
    met = [pair for pairs in rounds for pair in pairs]
    assert len(met) == len(wanted) and set(met) == wanted
    for pairs in rounds:
        ranks = list(itertools.chain.from_iterable(pairs))
        assert len(set(ranks)) == len(ranks)
    assert len(rounds) <= 2 * (min(group, n) + len(groups))


def test_sizes_of_schedules():
    assert len(probe.sampled_schedule(4096, 64)) == 252
    assert len(probe.schedule(64)) == 126
    for wrong in (lambda: probe.schedule(0), lambda: probe.sampled_schedule(4, 0)):
        with pytest.raises(ValueError, match="is 0, not at least 1"):
            wrong()


# ------------------------------------------------------------ one process alone


def test_the_probe_of_one_process_measures_each_cell():
    import jax
    from jax.sharding import AxisType

    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    delay = probe.ppermute_probe(mesh, nbytes=4096, reps=1, axis="b")
    assert delay.shape == (4, 4) and np.isnan(np.diag(delay)).all()
    assert (delay[~np.eye(4, dtype=bool)] > 0).all()
    with jax.set_mesh(jax.make_mesh((8,), ("c",), axis_types=(AxisType.Auto,))):
        some = probe.ppermute_probe(mesh, 64, 1, rounds=[((0, 7), (3, 2))])
    assert sorted(zip(*np.nonzero(some > 0), strict=True)) == [(0, 7), (3, 2)]
    assert np.isnan(some).sum() == 62
    for wrong in (
        dict(nbytes=3),
        dict(reps=0),
        dict(axis="c"),
        dict(rounds=[((0, 1), (1, 2))]),
        dict(rounds=[((0, 8),)]),
    ):
        with pytest.raises(ValueError):
            probe.ppermute_probe(mesh, **wrong)


def test_strangers_get_no_answer():
    with probe.tcp_listener(TOKEN) as listener, probe.tcp_listener(b"?" * 16) as other:
        to = [None, listener.address, other.address]
        delay = probe.tcp_probe(to, TOKEN, 2.0, nbytes=10**6)
        assert np.isnan(delay[0]) and 0 < delay[1] < 2 and delay[2] == np.inf
        with socket.create_connection(listener.address, timeout=10) as stranger:
            nonce = stranger.recv(32)
            stranger.sendall(nonce + nonce)  # a reflection is no proof
            assert len(nonce) == 32 and stranger.recv(100) == b""
        with socket.create_connection(listener.address, timeout=10) as gone:
            gone.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert 0 < probe.tcp_probe([listener.address], TOKEN)[0] < 2
        assert listener.address[0] == "127.0.0.1"
    # Closed, and one that listens without ever answering.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        to = [listener.address, silent.getsockname()]
        begin = time.monotonic()
        assert (probe.tcp_probe(to, TOKEN, 0.3) == np.inf).all()
        assert time.monotonic() - begin < 5
    with pytest.raises(ValueError, match="token of 5 bytes"):
        probe.tcp_listener(b"short")
    for wrong in (dict(timeout=0.0), dict(nbytes=0), dict(reps=0), dict(nbytes=2**40)):
        with pytest.raises(ValueError, match="off limits"):
            probe.tcp_probe([], TOKEN, **wrong)


# ------------------------------------------------------------------- the jobs


@contextlib.contextmanager
def running(prefixes, addresses, port, devices=1):
    """A job with a process for each prefix of a command, and its folder of boards."""
    with tempfile.TemporaryDirectory() as boards, tempfile.TemporaryFile() as log:
        settings = {
            "COORDINATOR": f"{addresses[0]}:{port}",
            "ADDRESSES": ",".join(addresses),
            "BOARDS": boards,
            "DEVICES": str(devices),
        }
        before = {k: os.environ.get(k) for k in settings}
        os.environ.update(settings)
        try:
            job = Local(prefixes, __file__, log)
        finally:
            for k, v in before.items():
                os.environ.pop(k) if v is None else os.environ.update({k: v})
        try:
            job.pids = [a["pid"] for a in job.answers(120)]
            job.boards = [f"{boards}/{i}" for i in range(len(prefixes))]
            yield job
        finally:
            for process in job.processes:  # one may be stopped
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
            job.close()
            for process in job.processes:
                process.stdout.close()


class Local(Job):
    """A job of processes wherever their prefixes put them."""

    def __init__(self, prefixes, file, log):
        self.log, self.processes = log, []
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        root = os.path.dirname(os.path.dirname(os.path.dirname(file)))
        for i, prefix in enumerate(prefixes):
            program = [sys.executable, file, "--process", str(i), str(len(prefixes))]
            process = subprocess.Popen(
                [*prefix, *program],
                env=os.environ | {"PYTHONPATH": root},
                start_new_session=True,
                **pipes,
            )
            self.processes.append(process)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def pair():
    """Two processes of two devices each, on this host."""
    with running([()] * 2, ["127.0.0.1"] * 2, free_port(), devices=2) as job:
        yield job


def test_processes_agree_on_the_matrix(pair):
    first, second = (
        np.array(a["delay"]) for a in pair.ask(do="probe", nbytes=65536, reps=2)
    )
    assert first.shape == (4, 4) and np.isnan(np.diag(first)).all()
    assert (first[~np.eye(4, dtype=bool)] > 0).all()
    np.testing.assert_array_equal(first, second)
    small, same = (a["delay"] for a in pair.ask(do="probe", per_process=True, reps=1))
    np.testing.assert_array_equal(small, same)
    assert np.array_equal(np.array(small) > 0, [[False, True], [True, False]])


def test_an_instrumented_step_has_the_same_bits_in_two_processes(pair):
    assert pair.ask(do="same", steps=4) == [{"same": True}] * 2


@pytest.mark.parametrize("late", [0, 1])
def test_the_late_process_waits_least_in_an_unmodified_program(pair, late):
    first, second = pair.ask(do="profile", steps=4, late=late, seconds=0.05)
    assert first == second  # gathered to all
    assert first["processes"] == [0, 1] and first["ops"]
    wait, local = np.array(first["wait"]), np.array(first["local"])
    assert wait.shape == (4, 2)
    assert wait.sum(axis=0).argmin() == late
    assert local.mean(axis=0).argmax() == late


def test_the_late_process_arrives_last_in_an_instrumented_step(pair):
    start = [read_board(path).count for path in pair.boards]
    pair.ask(do="train", steps=12, late=1, seconds=0.05)
    logs = [
        read_board(path, since=s).samples
        for path, s in zip(pair.boards, start, strict=True)
    ]
    window = align(logs)
    assert len(window.number) >= 10
    local, wait = (np.median(x, axis=0) for x in (window.local, window.wait))
    assert local.argmax() == 1 and wait.argmin() == 1
    assert local[1] > 0.04 and wait[0] > 0.03  # slept 0.05


@pytest.mark.parametrize("how", ["split", "whole"])
def test_a_rank_whose_host_is_stuck_is_named_while_it_is(pair, how):
    pair.ask(do="train", steps=5, late=-1, seconds=0, how=how)
    baseline, kinds = Baseline(DetectConfig(), step=0.02), set()
    order = dict(do="train", steps=1, late=1, seconds=6, how=how)
    for process in pair.processes:
        process.stdin.write(json.dumps(order).encode() + b"\n")
        process.stdin.flush()
    end = time.monotonic() + 5.5
    while Kind.NONCOMM_HANG not in kinds and time.monotonic() < end:
        time.sleep(0.1)
        now = time.monotonic()
        found = detect_stall(read_boards(pair.boards, pair.pids, now), now, baseline)
        kinds.add(found.kind)
    assert kinds == {Kind.HEALTHY, Kind.NONCOMM_HANG}
    assert found.ranks == (1,), str(found)
    first, second = pair.answers(60)  # and then it goes on
    assert first == second


def test_signals_to_a_process_of_a_job_are_seen(pair):
    """The last of this job: it ends it."""

    def look():
        return read_boards(pair.boards, pair.pids, time.monotonic())

    def until(true):
        end = time.monotonic() + 30
        while not true(look()):
            assert time.monotonic() < end
            time.sleep(0.02)

    until(lambda b: (b.enter_seq == b.exit_seq).all())
    before = look()
    assert before.alive.all() and (before.phase == Phase.STEP).all()
    os.kill(pair.pids[1], signal.SIGSTOP)
    until(lambda b: b.stopped[1])
    frozen = look().heartbeat[1]
    # The other goes into the collective, and waits there.
    pair.processes[0].stdin.write(
        json.dumps(dict(do="train", steps=1, late=-1, seconds=0)).encode() + b"\n"
    )
    pair.processes[0].stdin.flush()
    until(lambda b: b.enter_seq[0] > b.exit_seq[0])
    until(lambda b: b.heartbeat[0] > before.heartbeat[0] + 0.3)
    found = look()
    assert list(found.stopped) == [False, True] and found.heartbeat[1] == frozen
    assert found.enter_seq[1] == found.exit_seq[1]
    os.kill(pair.pids[1], signal.SIGKILL)
    until(lambda b: not b.alive[1])


# -------------------------------------------------------------- shaped links


@contextlib.contextmanager
def full_mesh(count):
    """Namespaces with a pair of devices of their own for each pair of them.

    The device `to{j}` in namespace i carries what i sends to j, and nothing else.
    """
    names = [f"jaxlab-{os.getpid()}-{i}" for i in range(count)]
    try:
        for i, name in enumerate(names):
            tool("ip", "netns", "add", name)
            tool("ip", "-n", name, "link", "set", "lo", "up")
            tool("ip", "-n", name, "addr", "add", f"{address(i)}/32", "dev", "lo")
        for i, j in itertools.combinations(range(count), 2):
            tool(
                *("ip", "-n", names[i], "link", "add", f"to{j}", "type", "veth"),
                *("peer", "name", f"to{i}", "netns", names[j]),
            )
            for a, b in ((i, j), (j, i)):
                tool("ip", "-n", names[a], "link", "set", f"to{b}", "up")
        for a, b in itertools.permutations(range(count), 2):
            route = (f"{address(b)}/32", "dev", f"to{b}", "src", address(a))
            tool("ip", "-n", names[a], "route", "add", *route)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def address(index):
    return f"10.78.0.{index + 1}"


@contextlib.contextmanager
def slow(names, cells):
    """Limits what goes from i to j for each of some cells."""
    rate = ("rate", f"{MBIT}mbit", "burst", "16kb", "limit", str(QUEUE))
    try:
        for i, j in cells:
            where = ("dev", f"to{j}", "root")
            tool("tc", "-n", names[i], "qdisc", "replace", *where, "tbf", *rate)
        yield
    finally:
        for i, j in cells:
            tool("tc", "-n", names[i], "qdisc", "del", "dev", f"to{j}", "root")


@pytest.fixture(scope="module")
def linked(links):
    """Four processes in a full mesh of links."""
    with full_mesh(4) as names:
        prefixes = [("ip", "netns", "exec", n, "unshare", "--uts") for n in names]
        addresses = [address(i) for i in range(4)]
        with running(prefixes, addresses, 7899) as job:
            yield names, job


ROW = [(2, j) for j in (0, 1, 3)]
COLUMN = [(i, 2) for i in (0, 1, 3)]


@pytest.mark.parametrize(
    "cells, scope",
    [
        ([], "none"),
        ([(1, 2)], "point"),
        ([(1, 2), (2, 1)], "point"),
        (ROW, "row"),
        (COLUMN, "column"),
    ],
    ids=["healthy", "one way", "both ways", "sends", "receives"],
)
def test_slow_links_are_the_slow_cells(linked, cells, scope):
    names, job = linked
    with slow(names, cells):
        delay = np.array(job.ask(do="probe")[0]["delay"])
    found = classify_matrix(delay)
    assert found.scope == scope, f"{found}\n{delay}"
    assert found.kind == (Kind.COMM_SLOW if cells else Kind.HEALTHY)
    if scope == "point":
        assert list(found.links) == cells
    elif cells:
        assert found.ranks == (2,)


def test_agents_find_the_cut_and_the_slow_link_while_nothing_trains(linked):
    names, job = linked
    tool("ip", "-n", names[1], "link", "set", "to2", "down")
    try:
        with slow(names, [(3, 0)]):
            rows = []
            for i, process in enumerate(job.processes):
                to = [(address(j), LISTEN + j) if i != j else None for j in range(4)]
                process.stdin.write(json.dumps(dict(do="tcp", to=to)).encode() + b"\n")
                process.stdin.flush()
                rows.append(json.loads(process.stdout.readline())["delay"])
    finally:
        tool("ip", "-n", names[1], "link", "set", "to2", "up")
        # The kernel drops a device's routes with it.
        route = (f"{address(2)}/32", "dev", "to2", "src", address(1))
        tool("ip", "-n", names[1], "route", "replace", *route)
    delay = np.array(rows, float)
    unreachable = sorted(zip(*np.nonzero(np.isinf(delay)), strict=True))
    assert unreachable == [(1, 2), (2, 1)]
    reached = np.where(np.isfinite(delay), delay, 0)
    assert np.unravel_index(reached.argmax(), delay.shape) == (3, 0)
    # 262,144 bytes, of which the bucket lets 16 KiB through at once.
    assert reached.max() > 0.9 * (262144 - 16384) * 8 / (MBIT * 1e6)
