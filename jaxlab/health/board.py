"""The board of a rank: a small file that its process writes and others read.

The file is little-endian: header, two slots, ring. A change of state goes to the
older slot, with a sequence number and a checksum; a reader takes the newest slot that
is whole. So a reader never waits for the writer, and a writer killed in the middle of
a write leaves its previous state.
"""

import contextlib
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlab.errors import UserError
from jaxlab.health.detect import Board, Phase, RankSample

MAGIC, VERSION = b"JLBOARD\n", 2
_HEADER = struct.Struct("<8sIIIIQ")  # magic, version, rank, pid, ring, start of process
_SLOT = struct.Struct("<QddQQqqQ")  # sequence, then the fields of `State`
_ENTRY = struct.Struct("<Qqdddqd")  # index, then the fields of `RankSample`
_CRC = struct.Struct("<I")
_SLOTS = (64, 192)  # offsets; 128 bytes each
_RING, _STRIDE = 320, 64  # offset of the ring, bytes of an entry
MOST = 2**20  # entries of a ring that is believed
_TRIES = 50  # reads of a board that changes while it is read


class State(NamedTuple):
    """The fields of a slot."""

    heartbeat: float
    progress: float
    enter_seq: int
    exit_seq: int
    step: int
    phase: int
    count: int


class RankState(NamedTuple):
    """What one board says.

    `heartbeat` and `progress` are seconds of the host's monotonic clock; `count` is
    the number of samples so far, of which `samples` has the newest, oldest first.
    `started` tells a process from a later one with the same `pid` (clock ticks since
    the host booted; 0: not known).
    """

    rank: int
    pid: int
    started: int
    heartbeat: float
    progress: float
    enter_seq: int
    exit_seq: int
    step: int
    phase: int
    count: int
    samples: list[RankSample]


def _sealed(form: struct.Struct, *values: Any) -> bytes:
    """Bytes with their checksum."""
    data = form.pack(*values)
    return data + _CRC.pack(zlib.crc32(data))


def _opened(form: struct.Struct, data: bytes) -> tuple | None:
    """The values, or None if the checksum is not theirs."""
    body, seal = data[: form.size], data[form.size : form.size + _CRC.size]
    if len(seal) < _CRC.size or _CRC.unpack(seal)[0] != zlib.crc32(body):
        return None
    return form.unpack(body)


def write_state(mapped: mmap.mmap, sequence: int, state: State) -> None:
    """Writes a state to the older slot; sequences count from 1."""
    slot, at = _sealed(_SLOT, sequence, *state), _SLOTS[sequence % 2]
    mapped[at : at + len(slot)] = slot


def write_sample(mapped: mmap.mmap, index: int, ring: int, sample: RankSample) -> None:
    """Writes a sample over the oldest; indices count from 0."""
    entry, at = _sealed(_ENTRY, index, *sample), _RING + index % ring * _STRIDE
    mapped[at : at + len(entry)] = entry


def create(path: Path, rank: int, ring: int) -> mmap.mmap:
    """A mapped board of this process, which appears when its header is whole."""
    if path.exists():
        _check(path, path.read_bytes()[:_RING])
    pid = os.getpid()
    header = _sealed(_HEADER, MAGIC, VERSION, rank, pid, ring, process(pid)[1])
    blank = header.ljust(_RING + ring * _STRIDE, b"\0")
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            # Written in full: a hole in a full disk would be a SIGBUS later.
            with os.fdopen(handle, "r+b") as file:
                file.write(blank)
                file.flush()
                mapped = mmap.mmap(file.fileno(), len(blank))
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write the board {path}: {error.strerror}; choose another folder"
        ) from error
    return mapped


def _check(path: Path, head: bytes) -> tuple[int, int, int, int]:
    """Rank, pid, ring and start in a board's header; UserError if it is none."""
    if head[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path} is not a board of jaxlab.health; name another file")
    values = _opened(_HEADER, head)
    if values is None:
        raise UserError(f"the board {path} has a garbled header; delete it")
    _, version, rank, pid, ring, started = values
    if version != VERSION:
        raise UserError(
            f"the board {path} has version {version}, not {VERSION}: writer and reader "
            "need the same jaxlab"
        )
    size = path.stat().st_size
    if not 0 < ring <= MOST or size != _RING + ring * _STRIDE:
        raise UserError(f"the board {path} has {size} bytes, cut short; delete it")
    return rank, pid, ring, started


def read_board(path: str | Path, since: int | None = None) -> RankState:
    """Reads a board, while it is written too.

    Args:
      path: the file.
      since: samples from this one on, counted from 0, as far as the ring still has
        them; `count` of the last reading asks for the new ones. None: no samples.

    Raises:
      FileNotFoundError: there is none (yet).
      UserError: the file is not a board, or is garbled.
    """
    path = Path(path)
    with open(path, "rb") as file:
        file_no = file.fileno()
        rank, pid, ring, started = _check(path, os.pread(file_no, _RING, 0))
        for _ in range(_TRIES):
            head = os.pread(file_no, _RING, 0)
            slots = [_opened(_SLOT, head[at:]) for at in _SLOTS]
            whole = [slot for slot in slots if slot is not None]
            if whole:
                break
            time.sleep(0.001)
        else:
            raise UserError(f"the board {path} has no state that is whole; delete it")
        state = State(*max(whole)[1:])
        samples = []
        if since is not None:
            # An entry that is overwritten meanwhile is newer than the state.
            data = os.pread(file_no, ring * _STRIDE, _RING)
            for index in range(max(since, state.count - ring, 0), state.count):
                entry = _opened(_ENTRY, data[index % ring * _STRIDE :][:_STRIDE])
                if entry is not None and entry[0] == index:
                    samples.append(RankSample(*entry[1:]))
    return RankState(rank, pid, started, *state, samples)


def process(pid: int, proc: Path = Path("/proc")) -> tuple[str, int]:
    """State letter and start of a process; ("", 0) if there is none.

    Without /proc the letter is "R" for any process and the start is 0.
    """
    try:
        stat = (proc / f"{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        if (proc / "self/stat").exists():
            return "", 0
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "", 0
        except PermissionError:
            pass  # somebody else's, and there
        return "R", 0
    fields = stat.rpartition(")")[2].split()  # a name may contain anything
    return fields[0], int(fields[19])


def read_boards(paths: Sequence[str | Path], pids: Sequence[int], now: float) -> Board:
    """Reads the boards of processes of this host, and what the kernel says of them.

    Args:
      paths: of the boards, by rank. One that is missing, or older than its process,
        is that of a rank which has only just started.
      pids: of the processes.
      now: seconds of the monotonic clock: the progress of ranks without a board,
        which have no heartbeat (NaN).

    Returns:
      Arrays [n] by rank.

    Raises:
      UserError: a file is not a board, or is garbled.
    """
    rows = []
    for path, pid in zip(paths, pids, strict=True):
        letter, started = process(pid)
        alive = letter not in ("", "Z", "X", "x")
        try:
            state = read_board(path)
        except FileNotFoundError:
            state = None
        if state and 0 < state.started < started:
            # Another process has the number by now, or the board is an old one.
            alive, state = alive and state.pid != pid, None
        s = state or State(np.nan, now, 0, 0, -1, Phase.STARTING, 0)
        moments = (s.heartbeat, s.progress, s.enter_seq, s.exit_seq, s.phase, s.step)
        rows.append((alive, letter in ("T", "t"), *moments))
    kinds = (bool, bool, float, float, np.int64, np.int64, np.int64, np.int64)
    columns = zip(*rows, strict=True) if rows else [()] * len(kinds)
    arrays = [np.array(c, kind) for c, kind in zip(columns, kinds, strict=True)]
    names = "alive stopped heartbeat progress enter_seq exit_seq phase step".split()
    return Board(**dict(zip(names, arrays, strict=True)))
