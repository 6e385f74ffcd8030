"""Prometheus: a scrape over real HTTP, read by its own parser."""

import contextlib
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxlab.errors import UserError
from jaxlab.health import prometheus
from jaxlab.health.detect import Board, Kind, Phase
from jaxlab.health.journal import Downtime, Goodput, Journal
from jaxlab.health.steer import Job, Slot

ROOT = Path(__file__).parent.parent
DOWN = Downtime(1.5, 2.25, 0.5, 8.0)


def scrape(where, token=None):
    host, port = where
    host = f"[{host}]" if ":" in host else host
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"http://{host}:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found, name, **labels):
    return found["jaxlab_health_" + name, tuple(sorted(labels.items()))]


def job_folder(folder):
    """A folder as the journal writes it: 2 ranks, a spare, three diagnoses."""
    job = Job((Slot("a", 0), Slot('b"\n', 1)), (Slot("c", 0),), generation=3)
    board = Board(
        alive=np.ones(2, bool),
        stopped=np.zeros(2, bool),
        heartbeat=np.full(2, 100.0),
        progress=np.array([99.0, 97.5]),
        enter_seq=np.array([8, 8]),
        exit_seq=np.array([8, 7]),
        phase=np.array([Phase.STEP, Phase.CHECKPOINT]),
        step=np.array([41, 40]),
    )
    journal = Journal(folder, None, lambda line: None, wall=lambda: 1000.0)
    with contextlib.closing(journal):
        for kind in (Kind.CRASH, Kind.CRASH, Kind.COMM_SLOW):
            journal.event("diagnosis", 7, str(kind), kind=kind, ranks=[1], links=[])
        journal.event("start", 7, "started")
        journal.status(job, board, {0: 1}, Goodput(0.0, 25.0, 41, DOWN), "", 100.0)
    return folder


def test_a_scrape_has_what_the_journal_wrote(tmp_path):
    job_folder(tmp_path)
    with prometheus.serve(tmp_path, wall=lambda: 1004.0) as where:
        found = scrape(where)
        assert where[0] == "127.0.0.1"
    assert value(found, "step") == 41 and value(found, "generation") == 3
    assert value(found, "goodput") == 0.25
    assert value(found, "status_age_seconds") == 4.0
    uses = {use: value(found, "slots", use=use) for use in ("ranks", "spares")}
    assert uses == {"ranks": 2, "spares": 1}
    for row, seconds in DOWN._asdict().items():
        assert value(found, "downtime_seconds_total", row=row) == seconds
    count = {str(k): value(found, "diagnoses_total", kind=str(k)) for k in Kind}
    assert count == {str(k): 0 for k in Kind} | {"crash": 2, "comm_slow": 1}
    assert value(found, "rank_step", rank="0", slot="a:0") == 41
    odd = {"rank": "1", "slot": 'b"\n:1'}
    assert value(found, "rank_progress_age_seconds", **odd) == 2.5
    assert value(found, "rank_phase", **odd, phase="checkpoint") == 1


def test_each_line_counts_once_and_half_a_line_later(tmp_path):
    job_folder(tmp_path)
    events = tmp_path / "events.jsonl"
    line = json.dumps({"event": "diagnosis", "kind": "frozen"}).encode()
    with prometheus.serve(tmp_path) as where, open(events, "ab", 0) as file:
        file.write(b"garbage\n[]\n" + line[:9])
        assert value(scrape(where), "diagnoses_total", kind="frozen") == 0
        file.write(line[9:] + b"\n")
        for _ in range(2):
            found = scrape(where)
            assert value(found, "diagnoses_total", kind="frozen") == 1
            assert value(found, "diagnoses_total", kind="crash") == 2


@pytest.mark.parametrize("status", [None, "{", "[]", '{"step": 1}', '{"step": "x"}'])
def test_a_folder_without_a_status_still_counts(tmp_path, status):
    if status is not None:
        (tmp_path / "status.json").write_text(status)
    with prometheus.serve(tmp_path) as where:
        found = scrape(where)
    assert {name for name, _ in found} == {"jaxlab_health_diagnoses_total"}


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_another_address_needs_a_token(tmp_path, address):
    with pytest.raises(UserError, match=f"{address} is open to others: give a token"):
        with prometheus.serve(tmp_path, address=address):
            pass


def test_the_token_is_asked_for(tmp_path):
    with prometheus.serve(tmp_path, address="0.0.0.0", token="sésame") as (_, port):
        where = "127.0.0.1", port
        for wrong in (None, "open", "s\xe9sam"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                scrape(where, wrong)
        assert scrape(where, "sésame")


def test_the_port_is_free_again_and_one_that_is_taken_is_named(tmp_path):
    with prometheus.serve(tmp_path) as (host, port):
        with pytest.raises(UserError, match=f"cannot serve at 127.0.0.1:{port}"):
            with prometheus.serve(tmp_path, port):
                pass
    with socket.create_server((host, port)):
        pass


def test_without_the_extra_the_error_names_it(tmp_path):
    program = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from jaxlab.health import prometheus\n"
        "with prometheus.serve('.'): pass\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "pip install 'jaxlab[metrics]'" in run.stderr.splitlines()[-1]
