"""The web page in a real browser: it shows, it sends messages, it keeps others out."""

import http.client
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from jaxlab.research.journal import read_journal
from jaxlab.research.types import GateResult
from tests.research_toy import drive, toy_gates

ROOT = Path(__file__).parent.parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")

pytestmark = pytest.mark.requires("pydantic_ai", "starlette", "uvicorn")


@contextmanager
def served(workspace):
    """Yields the address with its token; the server is a process of its own."""
    command = [sys.executable, "scripts/research.py", "serve", str(workspace)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield child.stdout.readline().strip()
    finally:
        child.terminate()
        child.wait(20)
        child.stdout.close()


class Tab:
    """A tab of a Chromium, by the DevTools protocol over a pipe."""

    def __init__(self, url, profile):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        shell = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._browser = subprocess.Popen(
            ["bash", "-c", shell, CHROMIUM, *flags],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._ids, self._rest, self._session = itertools.count(1), b"", None
        target = self.call("Target.createTarget", url=url)["targetId"]
        made = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = made["sessionId"]

    def call(self, method, **params):
        id = next(self._ids)
        row = {"id": id, "method": method, "params": params}
        if self._session:
            row["sessionId"] = self._session
        os.write(self._write, json.dumps(row).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                piece = os.read(self._read, 1 << 20)
                assert piece, "the browser went away"
                self._rest += piece
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == id:
                assert "error" not in answer, answer
                return answer["result"]

    def get(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True)
        return result["result"].get("value")

    def until(self, expression, seconds=60):
        end = time.monotonic() + seconds
        while not (value := self.get(expression)):
            assert time.monotonic() < end, (
                expression,
                self.get("document.body.innerText"),
            )
            time.sleep(0.1)
        return value

    def close(self):
        os.close(self._write)
        self._browser.wait(20)
        os.close(self._read)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "ws"


def ask(url, path, method="GET", body=None, **headers):
    """Status and body of a request of the server at `url`."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    try:
        return reply.status, reply.read()
    finally:
        connection.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_page_shows_and_steers_a_study(tmp_path, folder):
    box = {}
    hostile = "<img src=x onerror=\"document.title='stolen'\">"

    def gates(ws, events):
        return [*toy_gates(ws, events), GateResult("G10", True)]

    with served(folder) as url:
        tab = Tab(url, tmp_path / "profile")
        try:
            tab.until("document.getElementById('state').textContent == 'not begun'")
            thread = threading.Thread(
                target=lambda: box.update(e=drive(folder, "a 600 seconds", gates=gates))
            )
            thread.start()
            tab.until("document.title.startsWith('running: train: a')")
            tab.until("document.getElementById('runs').innerText.includes('a running')")
            rows = [{"step": i, "train/loss": 5 / i} for i in range(1, 5)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "runs/a/metrics.jsonl").write_text(text + '{"torn')
            tab.until("document.querySelectorAll('#curves polyline').length == 1")
            assert "step 4: 1.250" in tab.get(
                "document.getElementById('runs').innerText"
            )
            tab.get(
                "document.getElementById('text').value = "
                f"{json.dumps('also d ' + hostile)}; "
                "document.getElementById('say').click()"
            )
            tab.until("document.getElementById('said').innerText.includes('decided')")
            said = tab.get("document.getElementById('said').innerText")
            assert hostile in said and "read it and decided: train(" in said
            assert tab.get("document.images.length") == 0
            (folder / "runs/d").mkdir()
            (folder / "runs/d/go").touch()
            (folder / "runs/a/go").touch()
            thread.join(60)
            assert box["e"].code == 0
            tab.until("document.title.startsWith('ended')")
            runs = tab.get("document.getElementById('runs').innerText")
            assert "a done" in runs and "d done" in runs
            (folder / "paper/paper.pdf").write_bytes(b"%PDF-1.7\n%%EOF\n")
            src = tab.until("(document.querySelector('#paper iframe') || {}).src")
            body = tab.get(f"fetch({json.dumps(src)}).then(r => r.text())")
            assert body.startswith("%PDF-1.7")
        finally:
            tab.close()
    kinds = [e.kind for e in read_journal(folder / "journal.jsonl")]
    assert "ack" in kinds


def test_others_are_kept_out(folder):
    assert drive(folder, "a").code == 0
    secret = folder.parent / "secret"
    secret.write_text("secret")
    (folder / "paper/paper.pdf").symlink_to(secret)
    message = json.dumps({"command": "stop"})
    with served(folder) as url:
        token = url.partition("token=")[2]
        for path in (
            "/",
            "/state",
            "/events",
            "/paper.pdf",
            "/?token=x",
            "/state?token=",
        ):
            assert ask(url, path)[0] == 403, path
        assert ask(url, "/message", "POST", message)[0] == 403
        # another site's page, by a name that resolves to this machine
        assert ask(url, f"/?token={token}", Host="evil.example")[0] == 400
        # links are not followed, nor is there another file to be had
        assert ask(url, f"/paper.pdf?token={token}")[0] == 404
        for path in ("/../secret", "/%2e%2e/secret", "/journal.jsonl", "/notes/x"):
            assert ask(url, f"{path}?token={token}")[0] == 404, path
        for body in (
            "",
            "{",
            "[]",
            '{"command": "rm"}',
            '{"command": "say", "text": 3}',
        ):
            reply = ask(url, "/message", "POST", body, **{"x-token": token})
            assert reply[0] == 400, body
        long = json.dumps({"command": "say", "text": "x" * 20_000})
        assert ask(url, "/message", "POST", long, **{"x-token": token})[0] == 409
        status, body = ask(url, f"/state?token={token}")
        assert status == 200 and json.loads(body)["state"] == "ended"
    assert [*(folder / "inbox/new").iterdir()] == []


def test_an_edited_journal_is_said(folder):
    assert drive(folder, "a").code == 0
    path = folder / "journal.jsonl"
    path.write_text(path.read_text().replace("train", "brain", 1))
    with served(folder) as url:
        body = ask(url, f"/state?token={url.partition('token=')[2]}")[1]
    assert json.loads(body)["state"] == "edited"
