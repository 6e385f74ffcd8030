"""Journal, workspace, tools and processes: what every other part relies on."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.research.journal import (
    JournalError,
    locked,
    open_journal,
    read_journal,
)
from jaxlab.research.process import alive, end_group, launch
from jaxlab.research.tool import Context, Tool, tool
from jaxlab.research.types import Ref, ToolError
from jaxlab.research.workspace import PathError, open_workspace

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False).filter(lambda x: abs(x) < 1e300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def written(folder, *datas, **options):
    path = folder / "journal.jsonl"
    with open_journal(path, **options) as journal:
        for data in datas:
            journal.append("driver", "note", **data)
    return path


@given(st.lists(st.dictionaries(st.text(min_size=1), JSON, max_size=3), max_size=4))
def test_what_is_written_is_read(tmp_path_factory, datas):
    folder = tmp_path_factory.mktemp("journal")
    datas = [{"value": data} for data in datas]
    events = read_journal(written(folder, *datas))
    assert [e.data for e in events] == datas
    assert [e.i for e in events] == [*range(len(datas))]


def test_torn_last_line_is_cut_off(tmp_path):
    path = written(tmp_path, {"a": 1}, {"a": 2})
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert [e.data["a"] for e in read_journal(path)] == [1]
        with open_journal(path) as journal:
            journal.append("driver", "note", a=2)
        assert [e.data["a"] for e in read_journal(path)] == [1, 2]


@pytest.mark.parametrize("place", range(0, 240, 7))
def test_any_changed_byte_is_found(tmp_path, place):
    path = written(tmp_path, {"a": 1, "text": "five runs"}, {"a": 2}, {"a": 3})
    body = bytearray(path.read_bytes())
    body[place] ^= 1
    path.write_bytes(body)
    with pytest.raises(JournalError, match="event [01]"):
        read_journal(path)


def test_a_removed_event_is_found(tmp_path):
    path = written(tmp_path, {"a": 1}, {"a": 2}, {"a": 3})
    first, _, third = path.read_text().splitlines()
    path.write_text(f"{first}\n{third}\n")
    with pytest.raises(JournalError, match="event 1"):
        read_journal(path)


def test_one_writer(tmp_path):
    path = tmp_path / "journal.jsonl"
    with open_journal(path):
        assert locked(path)
        with pytest.raises(JournalError, match="another process"), open_journal(path):
            pass
    assert not locked(path)


def test_another_schema_is_refused(tmp_path):
    path = written(tmp_path, {"schema": 99})
    with pytest.raises(JournalError, match="schema 99"):
        read_journal(path)


def test_full_disk_leaves_whole_events(tmp_path):
    path = tmp_path / "journal.jsonl"
    calls = []

    def fsync(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    with open_journal(path, fsync=fsync) as journal:
        journal.append("driver", "note", a=1)
        with pytest.raises(JournalError, match="No space left"):
            journal.append("driver", "note", a=2)
        journal.append("driver", "note", a=3)
    assert [e.data["a"] for e in read_journal(path)] == [1, 3]


def test_secrets_reach_no_file(tmp_path):
    secret = 'sk-"quoted"\\é'
    ws = open_workspace(tmp_path / "ws", make=True, secrets=(secret,))
    with open_journal(ws.root / "journal.jsonl", clean=ws.clean) as journal:
        journal.append(
            "driver", "reply", text=f"key {secret} here", deep=[{"k": secret}]
        )
    ws.write_text("notes/a.md", f"the key is {secret}")
    ws.write_json("notes/b.json", {"key": secret})
    ws.put_blob(f"the key is {secret}")
    for name in ws.files():
        body = ws.read_text(name)
        assert secret not in body and json.dumps(secret)[1:-1] not in body


HOSTILE = ["/etc/passwd", "../x", "a/../../x", "", ".", "a\0b", "notes/../../x", "//x"]


@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_paths(tmp_path, path):
    ws = open_workspace(tmp_path / "ws", make=True)
    for use in (ws.resolve, ws.read_bytes, lambda p: ws.write_text(p, "x"), ws.ref):
        with pytest.raises(PathError):
            use(path)


def test_links_are_refused(tmp_path):
    ws = open_workspace(tmp_path / "ws", make=True)
    outside = tmp_path / "ws_evil"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (ws.root / "notes/link").symlink_to(outside / "secret")
    (ws.root / "notes/folder").symlink_to(outside)
    (ws.root / "notes/self").symlink_to(ws.root / "notes")
    os.mkfifo(ws.root / "notes/pipe")
    for path in ("notes/link", "notes/folder/secret", "notes/self/link"):
        with pytest.raises(PathError):
            ws.resolve(path)
        with pytest.raises(PathError):
            ws.read_bytes(path)
    with pytest.raises(PathError):
        ws.write_text("notes/folder/new", "x")
    with pytest.raises(PathError):
        ws.read_bytes("notes/pipe")
    ws.write_text("notes/link", "mine")  # replaces the link, not its target
    assert (outside / "secret").read_text() == "secret"
    assert [*outside.iterdir()] == [outside / "secret"]
    assert "notes/self/link" not in ws.files()


@given(st.lists(st.sampled_from(["..", ".", "a", "", "b\0", "~", "%2e%2e", "a b"])))
def test_no_path_leaves(tmp_path_factory, parts):
    ws = open_workspace(tmp_path_factory.mktemp("ws"), make=True)
    try:
        path = ws.resolve("/".join(parts))
    except PathError:
        return
    assert Path(os.path.realpath(path)).is_relative_to(ws.root)


def test_references_are_checked(tmp_path):
    ws = open_workspace(tmp_path / "ws", make=True)
    ref = ws.write_text("notes/a.md", "one")
    ws.check(ref)
    assert ws.ref("notes/a.md") == ref
    ws.write_text("notes/a.md", "two")
    with pytest.raises(ToolError, match="changed"):
        ws.check(ref)
    with pytest.raises(ToolError, match="no 'runs/x/result.json'"):
        ws.check(Ref("run", "x", "0"))
    with pytest.raises(ToolError, match="no fact"):
        ws.check(Ref("fact", "mean"))
    ws.write_json("facts/ledger.json", {"facts": [{"id": "mean", "value": 1.0}]})
    ws.check(Ref("fact", "mean"))


@tool("idempotent")
def train_one(context: Context, config: str, seeds: list[int], steps: int = 10) -> dict:
    """Trains one
    config.

    Not told to the model.
    """
    return {"config": config, "seeds": seeds, "steps": steps}


def test_a_tool_is_declared_by_its_signature():
    assert isinstance(train_one, Tool)
    assert (train_one.name, train_one.kind) == ("train_one", "idempotent")
    assert train_one.purpose == "Trains one config."
    assert train_one.schema["required"] == ["config", "seeds"]
    assert train_one.validate({"config": "a", "seeds": [1]})["steps"] == 10
    for wrong, where in (
        ({"config": "a"}, "seeds"),
        ({"config": "a", "seeds": "x"}, "seeds"),
        ({"config": "a", "seeds": [1], "step": 3}, "step"),
    ):
        with pytest.raises(ToolError, match=f"train_one: {where}"):
            train_one.validate(wrong)


def test_a_process_group_ends(tmp_path):
    program = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    log = tmp_path / "log"
    process = launch([sys.executable, "-c", program], log, tmp_path, {"PATH": "/bin"})
    until = time.monotonic() + 20
    while "up" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.02)
    assert alive(process)
    start = time.monotonic()
    end_group(process, patience=0.3)
    assert time.monotonic() - start < 2
    assert not living_in_group(process.pid)


def living_in_group(pgid):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[2] == str(pgid) and fields[0] != "Z":
            found.append(pid)
    return found
