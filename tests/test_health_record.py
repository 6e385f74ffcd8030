"""The board of a rank, the recorder that writes it, and profiles of programs."""

import gc
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.errors import UserError
from jaxlab.health import board, profile
from jaxlab.health.detect import Phase, RankSample, align
from jaxlab.health.record import Recorder, instrument, read_board, read_boards, watch


class Clock:
    """One that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def recorder(tmp_path, clock):
    with Recorder(tmp_path / "board", 3, clock=clock) as made:
        yield made


def until(true, seconds=30.0):
    """Waits for something, not for long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


# ---------------------------------------------------------------- the board


def test_a_sample_has_its_times(recorder, clock):
    assert recorder.current == -1
    recorder.step(7)
    assert recorder.current == 7
    for seconds in (2.0, 0.5):
        clock.now += seconds
        recorder.enter()
        clock.now += 0.25
        recorder.exit()
    state = read_board(recorder.path, since=0)
    assert state.samples == [
        RankSample(7, 100.0, 102.0, 102.25, Phase.STEP),
        RankSample(7, 102.25, 102.75, 103.0, Phase.STEP),
    ]
    assert (state.rank, state.pid, state.count) == (3, os.getpid(), 2)
    assert (state.enter_seq, state.exit_seq, state.step) == (2, 2, 7)
    assert state.progress == 103.0


def test_a_sample_has_the_time_for_which_the_process_was_stopped(tmp_path):
    """Inside, in one step of two: by signals to another process, as a quota does it."""
    program = (
        "import sys; from jaxlab.health.record import Recorder\n"
        "recorder = Recorder(sys.argv[1], 0)\n"
        "for step in range(2):\n"
        "    recorder.step(step); recorder.enter(); print(flush=True)\n"
        "    input(); recorder.exit()\n"
        "print(flush=True); input()"
    )
    path = tmp_path / "board"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    words = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(words, **pipes) as process:
        assert process.stdin and process.stdout
        stopped = [0.0, 0.0]
        for step in range(2):
            process.stdout.readline()
            begin = time.monotonic()
            for _ in range(5 * step):
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.2)
                process.send_signal(signal.SIGCONT)
                time.sleep(0.02)
            stopped[step] = (time.monotonic() - begin) * step
            process.stdin.write("\n")
            process.stdin.flush()
        process.stdout.readline()
        calm, held = read_board(path, since=0).samples
        process.communicate("\n")
    assert calm.paused <= calm.t_exit - calm.t_enter
    assert 0.7 * stopped[1] < held.paused <= held.t_exit - held.t_enter


def test_a_phase_is_no_time_of_a_step(recorder, clock):
    recorder.step(0)
    with recorder.phase(Phase.EVALUATION):
        clock.now += 5
        with recorder.phase(Phase.CHECKPOINT):
            assert read_board(recorder.path).phase == Phase.CHECKPOINT
            clock.now += 50
        assert read_board(recorder.path).phase == Phase.EVALUATION
    clock.now += 1
    recorder.enter()
    clock.now += 1
    recorder.exit()
    (sample,) = read_board(recorder.path, since=0).samples
    assert sample == RankSample(0, 155.0, 156.0, 157.0, Phase.STEP)


def test_collecting_garbage_is_a_pause_that_is_told(recorder, clock):
    seen = []

    class Garbage:
        def __init__(self):
            self.ring = self

        def __del__(self):
            seen.append(read_board(recorder.path).phase)

    def collect(generation):
        Garbage()
        gc.collect(generation)
        return seen.pop(), read_board(recorder.path).phase

    gc.collect()
    recorder.step(0)
    with recorder.tell_collections():
        assert collect(2) == (Phase.OTHER, Phase.STEP)
        assert collect(1) == (Phase.STEP, Phase.STEP)  # is short
        with recorder.phase(Phase.CHECKPOINT):
            assert collect(2) == (Phase.CHECKPOINT, Phase.CHECKPOINT)
    assert collect(2) == (Phase.STEP, Phase.STEP)


def test_running_ahead_of_a_device_that_hangs_is_no_progress(recorder, clock):
    for step in range(3):
        clock.now += 1
        recorder.step(step)
        recorder.enter()
    state = read_board(recorder.path)
    assert (state.enter_seq, state.exit_seq, state.progress) == (3, 0, 101.0)
    clock.now = 200.0
    for _ in range(3):
        recorder.exit()
    samples = read_board(recorder.path, since=0).samples
    # What was dispatched early began when the one before had ended.
    assert [s.t_enter for s in samples] == [101.0, 200.0, 200.0]
    assert [s.t_start for s in samples] == [101.0, 200.0, 200.0]


def test_done_only_where_nothing_was_raised(tmp_path):
    path = tmp_path / "board"
    with pytest.raises(KeyError), Recorder(path, 0, period=0.01) as recorder:
        recorder.step(0)
        raise KeyError
    failed = read_board(path)
    assert failed.phase == Phase.STEP
    until(lambda: read_board(path).heartbeat > failed.heartbeat)  # it lives
    recorder.close()
    recorder = Recorder(path, 0)
    recorder.close()
    recorder.close()
    recorder.step(4)  # of no effect, and no error
    assert (read_board(path).phase, read_board(path).step) == (Phase.DONE, -1)


def test_an_exit_without_enter_is_refused(recorder):
    with pytest.raises(ValueError, match="without enter"):
        recorder.exit()


@settings(max_examples=50, deadline=None)
@given(ring=st.integers(1, 7), done=st.integers(0, 20), since=st.integers(0, 25))
def test_the_ring_keeps_the_newest(tmp_path_factory, ring, done, since):
    path = tmp_path_factory.mktemp("ring") / "board"
    with Recorder(path, 0, ring=ring) as recorder:
        for step in range(done):
            recorder.step(step)
            recorder.enter()
            recorder.exit()
    state = read_board(path, since=since)
    assert [s.step for s in state.samples] == list(range(max(since, done - ring), done))
    assert state.count == done


def test_a_write_that_breaks_off_anywhere_leaves_the_state_before(recorder, clock):
    recorder.step(1)
    recorder.enter()
    old = recorder.path.read_bytes()
    clock.now += 1
    recorder.exit()
    new = recorder.path.read_bytes()
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    changed.sort(key=lambda i: i < 320)  # the sample is written before the state
    seen, copy = set(), recorder.path.with_name("copy")
    for broken in range(len(changed) + 1):
        data = bytearray(old)
        for i in changed[:broken]:
            data[i] = new[i]
        copy.write_bytes(data)
        state = read_board(copy, since=0)
        seen.add((state.exit_seq, state.count, len(state.samples)))
    assert seen == {(0, 0, 0), (1, 1, 1)}


@pytest.mark.parametrize("at", range(0, 32))
def test_a_garbled_header_is_refused(recorder, at):
    data = bytearray(recorder.path.read_bytes())
    data[at] ^= 0xFF
    other = recorder.path.with_name("other")
    other.write_bytes(data)
    with pytest.raises(UserError) as said:
        read_board(other)
    assert "\n" not in str(said.value) and str(other) in str(said.value)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda b: b"", "not a board"),
        (lambda b: b"\x89PNG" + b[4:], "not a board"),
        (lambda b: b[:100], "cut short"),
        (lambda b: b[:-1], "cut short"),
        (lambda b: b[:64] + bytes(len(b) - 64), "no state that is whole"),
        (
            lambda b: (
                board._sealed(
                    board._HEADER, board.MAGIC, 3, *struct.unpack("<IIIQ", b[12:32])
                )
                + b[36:]
            ),
            "version 3, not 2",
        ),
    ],
)
def test_what_is_not_a_board_is_refused_in_one_line(recorder, change, said):
    other = recorder.path.with_name("other")
    other.write_bytes(change(recorder.path.read_bytes()))
    with pytest.raises(UserError, match=said) as error:
        read_boards([other], [os.getpid()], 0.0)
    assert "\n" not in str(error.value)


def test_a_foreign_file_is_not_overwritten(tmp_path):
    path = tmp_path / "thesis"
    path.write_text("all of it")
    with pytest.raises(UserError, match="not a board"):
        Recorder(path, 0)
    assert path.read_text() == "all of it"
    with pytest.raises(UserError, match="cannot write the board .*choose another"):
        Recorder(tmp_path / "none" / "board", 0)
    for wrong in (dict(period=0.0), dict(ring=0), dict(rank=-1)):
        with pytest.raises(ValueError, match="out of range"):
            Recorder(tmp_path / "board", **{"rank": 0, **wrong})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_a_rank_without_a_board_has_just_started(tmp_path):
    found = read_boards([tmp_path / "none"], [os.getpid()], 5.0)
    assert found.alive[0] and not found.stopped[0]
    assert (found.phase[0], found.progress[0]) == (Phase.STARTING, 5.0)
    assert np.isnan(found.heartbeat[0])
    assert read_boards([], [], 0.0).alive.shape == (0,)


def test_a_board_of_an_earlier_process_does_not_count(recorder, tmp_path):
    child = subprocess.Popen(["sleep", "60"])
    try:
        recorder.step(9)
        # The number is the child's, and the board is older than the child.
        found = read_boards([recorder.path], [child.pid], 5.0)
        assert found.alive[0] and (found.step[0], found.phase[0]) == (-1, 0)
        # The same number, given to a later process: the board's own one is dead.
        data = bytearray(recorder.path.read_bytes())
        header = board._sealed(
            board._HEADER, board.MAGIC, board.VERSION, 3, child.pid, recorder.ring, 1
        )
        data[: len(header)] = header
        other = tmp_path / "other"
        other.write_bytes(data)
        assert not read_boards([other], [child.pid], 5.0).alive[0]
    finally:
        child.kill()
        child.wait()


def test_without_proc_a_process_is_only_alive_or_not(tmp_path):
    assert board.process(os.getpid(), tmp_path) == ("R", 0)
    child = subprocess.Popen(["true"])
    child.wait()
    assert board.process(child.pid, tmp_path) == ("", 0)
    assert board.process(child.pid) == ("", 0)
    assert board.process(os.getpid())[0] == "R"


# ------------------------------------------------- other processes, and signals

WRITER = """
import ctypes, sys
from jaxlab.health.record import Recorder
recorder = Recorder(sys.argv[1], 0, period=0.05)
print("made", flush=True)
for line in sys.stdin:
    if line == "steps\\n":  # as fast as it can
        print("going", flush=True)
        for step in range(10**9):
            recorder.step(step)
            recorder.enter()
            recorder.exit()
    # A call through CDLL releases the interpreter lock, one through PyDLL keeps it.
    kind = ctypes.CDLL if line == "released\\n" else ctypes.PyDLL
    print("sleeping", flush=True)
    kind(None).sleep(3)
"""


@pytest.fixture
def writer(tmp_path):
    """A process with a recorder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "board")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(order):
        process.stdin.write(order + "\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    try:
        assert process.stdout.readline() == "made\n"
        yield process, ask, tmp_path / "board"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_no_reader_sees_half_a_write_also_of_one_who_is_killed(writer):
    process, ask, path = writer
    assert ask("steps") == "going"
    last, read, end = -1, 0, time.monotonic() + 2.0
    while time.monotonic() < end:
        state = read_board(path, since=max(last - 1, 0))
        assert state.exit_seq <= state.enter_seq <= state.exit_seq + 1
        assert state.count == state.exit_seq
        assert state.step in (state.enter_seq, state.enter_seq - 1)
        assert state.count >= last
        for a, b in itertools.pairwise(state.samples):
            assert b.step > a.step and b.t_start == a.t_exit
        last, read = state.count, read + 1
    assert read > 20 and last > 100
    process.kill()
    process.wait()
    state = read_board(path, since=0)
    assert state.count >= last and len(state.samples) >= 1023


def test_signals_are_seen_on_the_board(writer):
    process, _, path = writer

    def look():
        return read_boards([path], [process.pid], time.monotonic())

    first = look()
    assert first.alive[0] and not first.stopped[0]
    until(lambda: look().heartbeat[0] > first.heartbeat[0])
    process.send_signal(signal.SIGSTOP)
    until(lambda: look().stopped[0])
    silent = look()
    time.sleep(0.3)
    assert look().heartbeat[0] == silent.heartbeat[0] and look().alive[0]
    process.send_signal(signal.SIGCONT)
    until(lambda: look().heartbeat[0] > silent.heartbeat[0])
    assert not look().stopped[0]
    process.kill()
    until(lambda: not look().alive[0])  # a zombie, for its parent has not waited
    process.wait()
    assert not look().alive[0] and look().phase[0] == Phase.STARTING


@pytest.mark.parametrize("how, beats", [("released", True), ("kept", False)])
def test_native_code_that_keeps_the_interpreter_lock_stops_the_heart(
    writer, how, beats
):
    _, ask, path = writer
    assert ask(how) == "sleeping"
    beat, before = [], read_board(path).heartbeat
    for _ in range(3):  # of the 3 s that it is in the call
        time.sleep(0.7)
        now = read_board(path).heartbeat
        beat.append(now > before)
        before = now
    assert any(beat) if beats else not all(beat)


# ---------------------------------------------------------------- a split step


@pytest.fixture(scope="module")
def parts():
    """A data-parallel step, split; its batch and a maker of its state."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    each, one = P("data"), P()

    def shard(f, given, result):
        return jax.shard_map(f, mesh=mesh, in_specs=given, out_specs=result)

    def varying(w):
        return jax.lax.pcast(w, ("data",), to="varying")

    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    def local(state, batch):
        def body(w, x):
            value, grads = jax.value_and_grad(loss)(varying(w), x)
            return grads[None], value[None]

        return shard(body, (one, each), (each, each))(state["w"], batch)

    def sync(state, partial):
        def body(w, grads):
            mean = jax.lax.pmean(grads[0], "data")
            return w - 0.1 * mean, jnp.sum(mean**2)

        new, norm = shard(body, (one, each), (one, one))(state["w"], partial)
        return {"w": new}, {"norm": norm, "all": new * 2}

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    def fresh():
        return {"w": put(jax.random.normal(jax.random.key(0), (16, 16)), one)}

    batch = put(jax.random.normal(jax.random.key(1), (32, 16)), each)
    return jax.jit(local), jax.jit(sync, donate_argnums=(0, 1)), batch, fresh


def drained(recorder, count):
    until(lambda: read_board(recorder.path).count >= count)
    return read_board(recorder.path, since=0)


def test_an_instrumented_step_has_the_same_bits(parts, tmp_path):
    local, sync, batch, fresh = parts
    state, norms = fresh(), []
    for _ in range(5):
        partial, _ = local(state, batch)
        state, metrics = sync(state, partial)
        norms.append(np.asarray(metrics["norm"]))
    with Recorder(tmp_path / "board", 0) as recorder:
        step = instrument(local, sync, recorder)
        recorder.step(100)
        other, seen = fresh(), []
        for _ in range(5):
            other, metrics = step(other, batch)
            seen.append(np.asarray(metrics["norm"]))
        found = drained(recorder, 5)
    assert np.array_equal(np.array(norms), np.array(seen))
    assert np.array_equal(np.asarray(state["w"]), np.asarray(other["w"]))
    assert [s.step for s in found.samples] == [100, 101, 102, 103, 104]
    assert found.enter_seq == found.exit_seq == 5
    for a, b in itertools.pairwise(found.samples):
        assert a.t_start <= a.t_enter <= a.t_exit <= b.t_start


def test_compilations_are_tagged(parts, tmp_path):
    _, _, batch, fresh = parts
    local = jax.jit(lambda s, x: (jnp.sum(x) * s["w"], jnp.sum(x)))
    sync = jax.jit(lambda s, p: ({"w": s["w"] - p}, jnp.sum(p)), donate_argnums=0)
    with Recorder(tmp_path / "board", 0) as recorder:
        step, state = instrument(local, sync, recorder), fresh()
        for rows in (32, 32, 16, 16):
            state, _ = step(state, batch[:rows])
        with recorder.phase(Phase.EVALUATION):
            state, _ = step(state, batch[:8])
        state, _ = step(state, batch[:8])
        found = drained(recorder, 6)
        assert found.phase == Phase.STEP
    phases = [s.phase for s in found.samples]
    usual = Phase.STEP
    assert phases == [
        Phase.STARTING,
        usual,
        Phase.OTHER,
        usual,
        Phase.EVALUATION,
        usual,
    ]
    assert list(align([found.samples]).number) == [1, 3, 5]


def test_arrival_and_end_are_stamped_while_the_host_runs_on(tmp_path):
    gates = {"local": threading.Event(), "sync": threading.Event()}
    scalar = jax.ShapeDtypeStruct((), np.float32)

    def through(name, x):
        def wait(x):
            assert gates[name].wait(30)
            return np.asarray(x)

        return io_callback(wait, scalar, x)

    local = jax.jit(lambda s, b: (through("local", s + b),) * 2)
    sync = jax.jit(lambda s, p: (s + p, through("sync", p)))
    with Recorder(tmp_path / "board", 0) as recorder:
        step = instrument(local, sync, recorder)
        numbers = [
            (x.enter_seq, x.exit_seq)
            for x in _stages(recorder, step, gates, jnp.float32(1))
        ]
    assert numbers == [(0, 0), (1, 0), (1, 1)]


def _stages(recorder, step, gates, x):
    """The board before the local part has ended, before the rest has, and after."""
    host = threading.Thread(target=step, args=(x, x), daemon=True)
    host.start()
    time.sleep(0.5)
    yield read_board(recorder.path)
    gates["local"].set()
    until(lambda: read_board(recorder.path).enter_seq == 1)
    time.sleep(0.2)
    yield read_board(recorder.path)
    gates["sync"].set()
    yield drained(recorder, 1)
    host.join(30)


def test_what_nobody_could_wait_for_is_refused(tmp_path):
    add = jax.jit(lambda s, x: s + x)
    with Recorder(tmp_path / "board", 0) as recorder:
        none = instrument(lambda s, b: (b, ()), lambda s, p: (s, p), recorder)
        with pytest.raises(ValueError, match="no array in what marks"):
            none(jnp.ones(()), jnp.ones(()))
        only = watch(jax.jit(lambda s: s + 1, donate_argnums=0), recorder)
        state = only(jnp.zeros(1000))
        with pytest.raises(ValueError, match="was donated"):
            only(state)
        fine = watch(add, recorder, result=lambda out: {"a": out})
        fine(jnp.ones(3), jnp.ones(3))


def test_a_step_that_fails_leaves_the_rank_inside(tmp_path):
    def fail(x):
        raise ArithmeticError("the device broke")

    scalar = jax.ShapeDtypeStruct((), np.float32)
    bad = jax.jit(lambda s, p: (s, jax.pure_callback(fail, scalar, p)))
    with Recorder(tmp_path / "board", 0) as recorder:
        step = instrument(jax.jit(lambda s, b: (s + b, s * b)), bad, recorder)
        with pytest.raises(jax.errors.JaxRuntimeError):
            jax.block_until_ready(step(jnp.ones(()), jnp.ones(())))
        until(lambda: read_board(recorder.path).enter_seq == 1)
        time.sleep(0.2)
        state = read_board(recorder.path)
    assert (state.enter_seq, state.exit_seq, state.count) == (1, 0, 0)


# ------------------------------------------------------- unmodified programs


@pytest.fixture(scope="module")
def program():
    """A step that the partitioner spread over three axes: call, text, fresh state."""
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    specs = {"a": P("fsdp", "tensor"), "b": P("tensor", "fsdp")}
    of = {k: NamedSharding(mesh, s) for k, s in specs.items()}

    def train_step(w, x):
        def loss(w):
            return jnp.mean((jax.nn.relu(x @ w["a"]) @ w["b"]) ** 2)

        value, grads = jax.value_and_grad(loss)(w)
        return jax.tree.map(lambda a, b: a - 0.01 * b, w, grads), value

    def fresh():
        keys = jax.random.split(jax.random.key(0))
        return {
            k: jax.device_put(jax.random.normal(key, (64, 64)), of[k])
            for k, key in zip(specs, keys, strict=True)
        }

    x = jax.random.normal(jax.random.key(1), (32, 64))
    x = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))
    step = jax.jit(
        train_step, donate_argnums=0, out_shardings=(of, NamedSharding(mesh, P()))
    )
    text = step.lower(fresh(), x).compile().as_text()
    return step, text, fresh, x


def test_a_watched_step_has_the_same_bits(program, tmp_path):
    step, _, fresh, x = program
    with Recorder(tmp_path / "board", 0) as recorder:
        one, other, watched = fresh(), fresh(), watch(step, recorder)
        for _ in range(5):
            one, loss = step(one, x)
            other, same = watched(other, x)
            assert np.asarray(loss).tobytes() == np.asarray(same).tobytes()
        found = drained(recorder, 5)
    for k in one:
        assert np.asarray(one[k]).tobytes() == np.asarray(other[k]).tobytes()
    assert [s.step for s in found.samples] == list(range(5))
    assert align([found.samples]).wait.shape[1] == 1


def test_a_profile_has_every_collective_of_every_device(program):
    step, text, fresh, x = program
    w, loss = step(fresh(), x)

    def run():
        nonlocal w, loss
        w, loss = step(w, x)
        return loss

    times = profile.sample_profile(run, 3)
    assert set(times.ops) == profile.collectives(text) and len(times.ops) > 3
    assert times.by_op.shape == (3, 8, len(times.ops)) and (times.by_op > 0).all()
    assert sorted(times.devices) == list(range(8)) and not times.processes.any()
    np.testing.assert_allclose(
        times.wait + times.pure_comm[:, None], times.total, atol=1e-9
    )
    assert (times.wait >= 0).all() and (times.step > 0).all()
    named = profile.sample_profile(run, 2, module="jit_train_step", hlo=text)
    assert named.ops == times.ops and named.step.shape == (2, 8)
    window = named.per_process().window(first=40)
    assert window.local.shape == window.wait.shape == (2, 1)
    assert list(window.number) == [40, 41]
    with pytest.raises(ValueError, match="no two runs of jit_other.*jit_train_step"):
        profile.sample_profile(run, 2, module="jit_other")
    with pytest.raises(ValueError, match="0 steps"):
        profile.sample_profile(run, 0)


@pytest.mark.parametrize("late", [2, 5])
def test_the_device_that_is_late_waits_least(late):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    scalar = jax.ShapeDtypeStruct((), np.float32)

    def sleep(device, x):
        time.sleep(0.05 * float(device == late))
        return x

    def body(x):
        device = jax.lax.axis_index("data") * 2 + jax.lax.axis_index("tensor")
        slept = jax.pure_callback(sleep, scalar, device, x[0])
        part = jax.lax.psum(x * slept, "tensor")
        return jax.lax.psum(jnp.sum(part), ("data",))[None]

    spec = P(("data", "tensor"))
    step = jax.jit(
        jax.shard_map(
            body, mesh=mesh, in_specs=spec, out_specs=P("tensor"), check_vma=False
        )
    )
    x = jax.device_put(jnp.ones(32), NamedSharding(mesh, spec))
    jax.block_until_ready(step(x))
    times = profile.sample_profile(lambda: step(x), 4)
    assert times.wait.sum(axis=0).argmin() == late
    assert times.local.mean(axis=0).argmax() == late


@pytest.mark.parametrize(
    "name, found",
    [
        ("all-reduce", True),
        ("all-reduce-start.12", True),
        ("all-gather-done", True),
        ("reduce-scatter.1", True),
        ("collective-permute-start", True),
        ("ragged-all-to-all.3", True),
        ("psum.4", True),
        ("psum_invariant.4", True),
        ("all_gather.3", True),
        ("ppermute.1", True),
        ("reduce_scatter.7", True),
        ("%x.3 = f32[8]{0:T(128)} all-reduce(f32[8] %y)", True),
        ("%x = (f32[8], f32[8]) all-gather-start(f32[8] %y)", True),
        ("wrapped_reduce", False),
        ("reduce.1", False),
        ("all-reduce-fusion", False),
        ("%all-reduce-like.1 = f32[8] fusion(f32[8] %y)", False),
        ("partition-id", False),
        ("", False),
    ],
)
def test_names_of_collectives(name, found):
    assert profile.is_collective(name) == found


def space(device, module, operations, extra=""):
    """The text of a profile of two runs on one accelerator; times in ns."""
    names = {name: i + 2 for i, name in enumerate(operations)}
    runs = (0, 1000)

    def event(meta, begin, took):
        return (
            f"events {{ metadata_id: {meta} offset_ps: {begin * 1000} "
            f"duration_ps: {took * 1000} {extra.format(names=names, meta=meta)} }}"
        )

    spans = " ".join(event(1, r, 900) for r in runs)
    ops = " ".join(
        event(names[name], r + begin, took)
        for r in runs
        for name, (begin, took) in operations.items()
    )
    metas = " ".join(
        f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        for name, i in {f"{module}(77)": 1, **names}.items()
    )
    line = 'lines {{ id: {} name: "{}" {} }}'
    return (
        f'planes {{ name: "{device}" {line.format(1, "XLA Modules", spans)} '
        f"{line.format(2, 'XLA Ops', ops)} "
        f"{line.format(3, 'Async XLA Ops', ops)} {metas} }}"
    )


def test_planes_of_accelerators_as_they_are_documented():
    # Not from a real machine: names and lines as XLA's documentation has them.
    text = space(
        "/device:TPU:1",
        "jit_step",
        {
            "%fusion.1 = f32[8] fusion(f32[8] %p)": (0, 100),
            "%all-reduce-start.2 = f32[8] all-reduce-start(f32[8] %p)": (100, 10),
            "%all-reduce-done.2 = f32[8] all-reduce-done(f32[8] %p)": (200, 300),
        },
    )
    data = jax.profiler.ProfileData.from_text_proto(text)
    runs = profile.read_runs(data)
    assert list(runs) == ["jit_step"] and list(runs["jit_step"]) == [1]
    for run, begin in zip(runs["jit_step"][1], (0, 1000), strict=True):
        assert run.seconds == pytest.approx(
            {"all-reduce-start.2": 10e-9, "all-reduce-done.2": 300e-9}
        )
        assert run.end == pytest.approx((begin + 500) * 1e-9)
    times = profile.collective_times(data)
    assert times.step[0, 0] == pytest.approx(1000e-9)
    assert times.total[0, 0] == pytest.approx(310e-9)


def test_streams_of_a_gpu_as_they_are_documented():
    # Not from a real machine either. No line says where a run begins; `loop` runs
    # twice a run, on another stream than the rest.
    names = ["jit_step", "kernel", "fusion.1", "loop.2", "all-reduce-start.3"]

    def event(begin, took, operation, copy=False):
        stats = "".join(
            f"stats {{ metadata_id: {i} ref_value: {names.index(value) + 10} }} "
            for i, value in ((1, operation), (2, "jit_step"))
        )
        return (
            f"events {{ metadata_id: 1 offset_ps: {begin * 1000} "
            f"duration_ps: {took * 1000} {'' if copy else stats}}} "
        )

    runs = (0, 1000, 2000)
    main = "".join(
        event(r, 100, "fusion.1")
        + event(r + 200, 50, "loop.2")
        + event(r + 300, 50, "loop.2")
        + event(r + 950, 10, "loop.2", copy=True)
        for r in runs
    )
    side = "".join(event(r + 400, 100 + r // 10, "all-reduce-start.3") for r in runs)
    metadata = "".join(
        f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }} '
        for i, name in [(1, "hlo_op"), (2, "hlo_module"), *enumerate(names, 10)]
    )
    data = jax.profiler.ProfileData.from_text_proto(
        'planes { name: "/device:GPU:0" event_metadata { key: 1 value { id: 1 name: '
        f'"kernel" }} }} {metadata} lines {{ id: 1 name: "Stream #7(Compute)" {main}}} '
        f'lines {{ id: 2 name: "Stream #9(NCCL)" {side}}} }}'
    )
    found = profile.read_runs(data)["jit_step"][0]
    assert [run.seconds["all-reduce-start.3"] for run in found] == pytest.approx(
        [100e-9, 200e-9, 300e-9]
    )
    assert [run.end for run in found] == pytest.approx([500e-9, 1600e-9, 2700e-9])


def test_a_board_in_use_is_little(tmp_path):
    path = Path(tmp_path / "board")
    with Recorder(path, 0):
        assert path.stat().st_size == 320 + 1024 * 64
        assert json.dumps(read_board(path)._asdict())  # plain values


def test_the_benchmark_of_the_overhead_runs():
    """Not what the recorder costs: that both sides do the same, and are compared."""
    file = Path(__file__).parents[1] / "benchmarks" / "health_overhead.py"
    small = ("--pairs", "10", "--steps", "3", "--width", "32", "--batch", "8")
    done = subprocess.run(
        [sys.executable, str(file), *small], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert set(report["arms"]) == {"instrument", "watch", "split"}
    for arm in report["arms"].values():
        low, high = arm["overhead"]["interval"]
        assert arm["pairs"] == 10 and arm["step"] > 0
        assert low <= arm["overhead"]["median"] <= high
        assert arm["meets"] == (high < report["goal"] == 0.005)
    few = subprocess.run(
        [sys.executable, str(file), "--pairs", "9"], capture_output=True, text=True
    )
    assert few.returncode == 2 and "at least 10" in few.stderr
