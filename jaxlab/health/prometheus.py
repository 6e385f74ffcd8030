"""What the supervisor knows, for Prometheus; needs the extra `metrics`.

Everything is read from the job's `health` folder when it is asked for, so nothing is
kept twice, and a folder can be served by another process than the supervisor.
"""

import contextlib
import hmac
import ipaddress
import json
import socket
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from wsgiref import simple_server

from jaxlab.errors import UserError
from jaxlab.health.detect import Kind, Phase

PREFIX = "jaxlab_health_"
_PLAIN = {
    "step": "Training steps done, of the furthest.",
    "goodput": "Seconds of steps done for the first time over all seconds.",
    "generation": "Restarts of the job so far.",
}


class Tally:
    """Diagnoses by kind in an `events.jsonl` that grows; of each line read once."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._counts = Counter({str(kind): 0 for kind in Kind})
        self._lock = threading.Lock()

    def read(self) -> dict[str, int]:
        """Counts so far; a line that is still being written counts the next time."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            with open(self._path, "rb") as file:
                file.seek(self._at)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._at += len(line)
                    with contextlib.suppress(ValueError, KeyError, TypeError):
                        row = json.loads(line)
                        if row["event"] == "diagnosis":
                            self._counts[str(Kind(row["kind"]))] += 1
        return dict(self._counts)


def _read(path: Path) -> Mapping[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else None
    return None


def families(
    status: Mapping[str, Any] | None, diagnoses: Mapping[str, int], now: float
) -> list[Any]:
    """The metric families of Prometheus' client.

    Args:
        status: of `status.json`; None: there is none, or it is unreadable.
        diagnoses: number of each kind.
        now: seconds since 1970.

    Raises:
        KeyError, TypeError, ValueError: the status is not as it should be.
    """
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    count = CounterMetricFamily(
        PREFIX + "diagnoses", "Diagnoses by kind.", labels=["kind"]
    )
    for kind, number in diagnoses.items():
        count.add_metric([kind], number)
    if status is None:
        return [count]
    made: list[Any] = [count]
    for name, words in _PLAIN.items():
        made.append(GaugeMetricFamily(PREFIX + name, words, float(status[name])))
    age = GaugeMetricFamily(
        PREFIX + "status_age_seconds",
        "Since the supervisor last wrote; more than a few: it does not run.",
        now - float(status["time"]),
    )
    slots = GaugeMetricFamily(
        PREFIX + "slots", "Places for processes by use.", labels=["use"]
    )
    for use in ("ranks", "spares", "evicted"):
        slots.add_metric([use], len(status[use]))
    down = CounterMetricFamily(
        PREFIX + "downtime_seconds", "Time without progress by cause.", labels=["row"]
    )
    for row, seconds in status["downtime"].items():
        down.add_metric([row], float(seconds))
    labels = ["rank", "slot"]
    step = GaugeMetricFamily(PREFIX + "rank_step", "The step of a rank.", labels=labels)
    still = GaugeMetricFamily(
        PREFIX + "rank_progress_age_seconds",
        "Since a rank last progressed.",
        labels=labels,
    )
    phase = GaugeMetricFamily(
        PREFIX + "rank_phase",
        "1 for the phase that a rank is in.",
        labels=[*labels, "phase"],
    )
    for row in status["ranks"]:
        name = [str(row["rank"]), str(row["slot"])]
        step.add_metric(name, int(row["step"]))
        still.add_metric(name, float(row["progress"]))
        phase.add_metric([*name, Phase(row["phase"]).name.lower()], 1)
    return [*made, age, slots, down, step, still, phase]


class _Collector:
    """Reads the folder whenever somebody asks."""

    def __init__(self, folder: Path, wall: Callable[[], float]) -> None:
        self._status, self._wall = folder / "status.json", wall
        self._tally = Tally(folder / "events.jsonl")

    def collect(self) -> Iterable[Any]:
        """The metric families as of now."""
        diagnoses, now = self._tally.read(), self._wall()
        try:
            return families(_read(self._status), diagnoses, now)
        except (KeyError, TypeError, ValueError):  # of another version of jaxlab
            return families(None, diagnoses, now)


class _Server(socketserver.ThreadingMixIn, simple_server.WSGIServer):
    daemon_threads = True


class _Handler(simple_server.WSGIRequestHandler):
    timeout = 10  # seconds for a request

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a scrape is no news."""


def _guarded(app: Callable[..., Any], token: str) -> Callable[..., Any]:
    """The application for those who have the token."""
    wanted = f"Bearer {token}".encode("latin-1", "replace")

    def checked(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        given = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1", "replace")
        if token and not hmac.compare_digest(given, wanted):
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer")])
            return [b"the token is missing or wrong\n"]
        return app(environ, start_response)

    return checked


@contextlib.contextmanager
def serve(
    folder: str | Path,
    port: int = 0,
    *,
    address: str = "127.0.0.1",
    token: str = "",
    wall: Callable[[], float] = time.time,
) -> Iterator[tuple[str, int]]:
    """Serves `http://ADDRESS:PORT/metrics` for as long as the block runs.

    Plain HTTP: the token crosses the network as it is, so beyond trusted networks
    leave the default and put a proxy with TLS in front.

    Args:
        folder: the job's `health` folder.
        port: 0: one that is free.
        address: to listen at. Other than this machine's own needs a token.
        token: who asks sends `Authorization: Bearer TOKEN`; "": nobody has to.
        wall: seconds since 1970.

    Yields:
        Address and port.

    Raises:
        UserError: the extra is not installed, the address is open to others without a
            token, or it cannot be listened at.
    """
    try:
        from prometheus_client import CollectorRegistry, make_wsgi_app
    except ImportError:
        raise UserError(
            "Prometheus needs the extra metrics: pip install 'jaxlab[metrics]'"
        ) from None
    if not (_loopback(address) or token):
        raise UserError(
            f"{address} is open to others: give a token, or serve at 127.0.0.1"
        )
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(Path(folder), wall))  # pyright: ignore
    # Compression would be all that a scrape costs.
    app = _guarded(make_wsgi_app(registry, disable_compression=True), token)

    class Server(_Server):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

    try:
        server = simple_server.make_server(address, port, app, Server, _Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve at {address}:{port}: {error}") from error
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield str(server.server_address[0]), server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _loopback(address: str) -> bool:
    if address == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return False
