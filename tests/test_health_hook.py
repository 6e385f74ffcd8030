"""Hooks: told in order, by a command or over HTTP, and never in the way."""

import json
import shlex
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from jaxlab.errors import ConfigError
from jaxlab.health.hook import hook

EVENTS = [
    {"event": "diagnosis", "text": "FROZEN rank 2", "ranks": [2]},
    {"event": "delay", "seconds": [[0.1]]},  # too much and too often to be told
    {"event": "restart", "text": "without local:2"},
]


def python(code, *words):
    return shlex.join([sys.executable, "-c", code, *map(str, words)])


def test_a_command_gets_each_event_on_its_input(tmp_path):
    code = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')"
    with hook(python(code, tmp_path / "told $HOME"), print, 60.0) as tell:
        for event in EVENTS:
            tell(event)
    lines = (tmp_path / "told $HOME").read_text().splitlines()  # no shell saw it
    assert [json.loads(line) for line in lines] == [EVENTS[0], EVENTS[2]]


def test_an_address_gets_each_event_by_post():
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers["Content-Type"], json.loads(body)))
            self.send_response(500 if len(got) == 1 else 204)
            self.end_headers()

        def log_message(self, *_):
            pass

    said = []
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with hook(f"http://127.0.0.1:{server.server_port}/c4", said.append) as tell:
            for event in EVENTS:
                tell(event)
        server.shutdown()
        thread.join()
    kind = "application/json"
    assert got == [("/c4", kind, EVENTS[0]), ("/c4", kind, EVENTS[2])]
    assert len(said) == 1 and "fails: HTTP Error 500" in said[0]


@pytest.mark.parametrize("target", ["/no/such/command", "http://127.0.0.1:9/"])
def test_one_that_fails_is_told_of_once(target):
    said = []
    with hook(target, said.append) as tell:
        for event in EVENTS * 3:
            tell(event)
    assert len(said) == 1 and target in said[0]


def test_one_that_hangs_is_waited_for_by_nobody():
    said, began = [], time.monotonic()
    with hook(python("import time; time.sleep(600)"), said.append, 0.2) as tell:
        for event in EVENTS * 1000:
            tell(event)
    assert time.monotonic() - began < 60
    assert "timed out" in said[0]


def test_none_and_a_command_that_is_none():
    with hook("", print) as tell:
        tell(EVENTS[0])
    for target in ("a 'b", " "):
        with pytest.raises(ConfigError, match="--hook"), hook(target, print):
            pass
