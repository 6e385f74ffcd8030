"""A Chromium of our own, and its tabs, by the DevTools protocol over a pipe.

What a page can do is bounded here, since pages are not trusted: the browser has no
port that others could speak to, and no network (a namespace without links where the
system allows, and flags that send every request nowhere); a tab shows files of one
folder, its dialogs are dismissed, its downloads denied, windows it opens are closed. A
call that is not answered in time ends the tab. The browser ends with this process,
however that ends: the pipe closes.

Commands and events: https://chromedevtools.github.io/devtools-protocol/
"""

import contextlib
import fcntl
import functools
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlab.errors import UserError
from jaxlab.rl.envs.api import Crash

EXECUTABLES = ("chromium-headless-shell", "chrome-headless-shell", "chromium")
"""looked for in this order; a headless shell is faster and smaller"""
WIDTH, HEIGHT = 500, 320
"""of a tab, pixels; narrower than 500, jQuery UI centres dialogs outside of the page"""
LARGEST = 2**26
"""bytes of a message that a browser may send"""
_PREFIX = "jaxlab-chromium-"
_FLAGS = (
    "--headless",
    "--disable-gpu",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--disable-breakpad",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-smooth-scrolling",
    "--disable-features=Translate,MediaRouter,OptimizationHints",
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--disable-backgrounding-occluded-windows",
    # A picture waits for a frame: without a limit to their rate it waits less.
    "--disable-frame-rate-limit",
    "--disable-gpu-vsync",
    # A picture is drawn whole: parts drawn onto old ones differ at rounded corners.
    "--disable-partial-raster",
    "--force-color-profile=srgb",
    "--mute-audio",
    "--lang=en-US",
    "--js-flags=--max-old-space-size=512",
    # No page reaches a network, loopback included.
    "--proxy-server=http://127.0.0.1:9",
    "--proxy-bypass-list=<-loopback>",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
)
Command = tuple[str, Mapping[str, Any]]
"""a method of the protocol, and its parameters"""


def find_browser() -> str:
    """Path of the browser: CHROMIUM names it, else the first of `EXECUTABLES`.

    Raises:
      UserError: there is none; the message says how to install one.
    """
    named = os.environ.get("CHROMIUM")
    for name in (named,) if named else EXECUTABLES:
        if path := shutil.which(name):
            return path
    raise UserError(
        f"no browser {named!r} (environment variable CHROMIUM)"
        if named
        else "no browser: apt-get install -y chromium chromium-headless-shell "
        "(Debian), or name one by the environment variable CHROMIUM"
    )


@functools.cache
def isolation() -> tuple[str, ...]:
    """Words before a command that take its network away; none where forbidden."""
    ways = ("unshare", "--net"), ("unshare", "--user", "--map-current-user", "--net")
    for words in ways:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run((*words, "true"), check=True, capture_output=True, timeout=5)
            return (shutil.which(words[0]) or words[0], *words[1:])
    return ()


class Browser:
    """A browser process; threads may share it.

    Args:
      executable: None: `find_browser()`.
      timeout: seconds until it must have started, and until a tab must have opened.

    Raises:
      UserError: there is none.
      Crash: it did not start.
    """

    def __init__(self, executable: str | None = None, timeout: float = 30.0) -> None:
        path = executable or find_browser()
        self.timeout = timeout
        self.dead = ""
        """why it is; empty while it lives"""
        self._tabs: dict[str, Tab] = {}
        self._replies: dict[int, tuple[str | None, queue.SimpleQueue]] = {}
        self._last = 0
        self._lock = threading.Lock()
        self._profile, self._held = _make_profile()
        # Its own sandbox refuses root.
        root = ("--no-sandbox",) if os.geteuid() == 0 else ()
        flags = (*_FLAGS, *root, f"--user-data-dir={self._profile}", "about:blank")
        self.pid, self._reads, self._writes = _spawn((*isolation(), path, *flags))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.version = self.call(("Browser.getVersion", {}))[0]["product"]
            self.call(
                ("Browser.setDownloadBehavior", {"behavior": "deny"}),
                ("Target.setDiscoverTargets", {"discover": True}),
            )
        except Crash as error:
            self.close()
            raise Crash(f"{path} did not start: {error}") from None

    def call(
        self,
        *commands: Command,
        session: str | None = None,
        timeout: float | None = None,
    ) -> list[dict[str, Any]]:
        """Sends commands at once and waits for their results.

        Args:
          *commands: carried out in their order.
          session: of a tab; None: the browser itself.
          timeout: seconds for all of them; None: the browser's.

        Raises:
          Crash: the browser or the tab is dead, or does not answer in time.
          ValueError: the browser refuses a command.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        waiting, message, results = [], b"", []
        try:
            with self._lock:
                if self.dead:
                    raise Crash(self.dead)
                for method, parameters in commands:
                    self._last += 1
                    box: queue.SimpleQueue = queue.SimpleQueue()
                    self._replies[self._last] = session, box
                    waiting.append((self._last, method, box))
                    message += _line(self._last, method, parameters, session)
                self._write(message, deadline)
            for _, method, box in waiting:
                left = max(deadline - time.monotonic(), 0.0)
                try:
                    reply = box.get(timeout=left)
                except queue.Empty:
                    raise Crash(f"no answer to {method} in time") from None
                if isinstance(reply, str):
                    raise Crash(reply)
                if "error" in reply:
                    raise ValueError(f"{method}: {reply['error'].get('message')}")
                results.append(reply.get("result", {}))
        finally:
            for number, _, _ in waiting:
                self._replies.pop(number, None)
        return results

    def open(self, folder: str) -> "Tab":
        """A new tab, apart from the others: cookies, storage, process.

        Args:
          folder: URL that all it loads must begin with, as in file:///srv/pages/.

        Raises:
          Crash: the browser is dead, or does not answer in time.
        """
        context = self.call(("Target.createBrowserContext", {}))[0]["browserContextId"]
        shape = {"width": WIDTH, "height": HEIGHT, "browserContextId": context}
        create = "Target.createTarget", {"url": "about:blank", **shape}
        target = self.call(create)[0]["targetId"]
        attach = "Target.attachToTarget", {"targetId": target, "flatten": True}
        session = self.call(attach)[0]["sessionId"]
        tab = Tab(self, folder, context, target, session)
        self._tabs[session] = tab
        screen = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1}
        tab.call(
            ("Page.enable", {}),
            ("Inspector.enable", {}),
            ("Fetch.enable", {"patterns": [{"urlPattern": "*"}]}),
            ("Emulation.setDeviceMetricsOverride", {**screen, "mobile": False}),
            ("Emulation.setFocusEmulationEnabled", {"enabled": True}),
            timeout=self.timeout,
        )
        return tab

    def memory(self) -> int:
        """Bytes that its processes hold, shared ones in shares; 0 where unknown."""
        total = 0
        for process in _group(self.pid):
            with contextlib.suppress(OSError, ValueError):
                lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
                total += sum(int(x.split()[1]) for x in lines if x.startswith("Pss:"))
        return total * 1024

    def close(self) -> None:
        """Ends it, and all it started; again: nothing."""
        self._die("the browser is closed")
        with self._lock:  # two threads may close it: no number is given back twice
            pid, self.pid = self.pid, 0
        if pid:
            for process in (-pid, *_group(pid)):
                with contextlib.suppress(OSError):
                    (os.killpg if process < 0 else os.kill)(
                        abs(process), signal.SIGKILL
                    )
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            self._reader.join(5)
            os.close(self._writes)
            shutil.rmtree(self._profile, ignore_errors=True)
            os.close(self._held)

    # ------------------------------------------------------------------ inside

    def _die(self, why: str) -> None:
        with self._lock:
            self.dead = self.dead or why
            for _, box in self._replies.values():
                box.put(self.dead)

    def _write(self, message: bytes, deadline: float) -> None:
        """Holding the lock. A browser that has stopped reading must not hold us."""
        view = memoryview(message)
        while view:
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([], [self._writes], [], left)[1]:
                raise Crash("the browser does not read")
            try:
                view = view[os.write(self._writes, view) :]
            except BlockingIOError:
                continue
            except OSError:
                raise Crash(self.dead or "the browser is gone") from None

    def _read(self) -> None:
        """What the reader's thread does, until the browser is gone."""
        buffer, why = bytearray(), "the browser is gone"
        try:
            while part := os.read(self._reads, 1 << 20):
                start = len(buffer)
                buffer += part
                while (end := buffer.find(0, start)) >= 0:
                    self._receive(json.loads(bytes(buffer[:end])))
                    del buffer[: end + 1]
                    start = 0
                if len(buffer) > LARGEST:
                    why = f"the browser sent a message above {LARGEST} bytes"
                    break
        except OSError:
            pass  # it is gone
        except (ValueError, KeyError):
            why = "the browser sends what is no message"
        finally:
            self._die(why)
            os.close(self._reads)  # by who reads it: the number may be another's then

    def _receive(self, message: Mapping[str, Any]) -> None:
        if "id" in message:
            entry = self._replies.pop(message["id"], None)
            if entry is not None:
                entry[1].put(message)
            return
        method, given = message.get("method"), message.get("params", {})
        session = message.get("sessionId")
        tab = self._tabs.get(session or "")
        if method == "Target.targetCreated":
            info = given["targetInfo"]
            if "openerId" in info:
                self._tell("Target.closeTarget", {"targetId": info["targetId"]})
        elif method in ("Target.targetCrashed", "Target.targetDestroyed"):
            for tab in list(self._tabs.values()):
                if tab.target == given["targetId"]:
                    self._lose(tab, "the page crashed")
        elif tab is None:
            return
        elif method in ("Inspector.targetCrashed", "Inspector.detached"):
            self._lose(tab, "the page crashed")
        elif method == "Page.javascriptDialogOpening":
            self._tell("Page.handleJavaScriptDialog", {"accept": False}, session)
        elif method == "Fetch.requestPaused":
            wanted = {"requestId": given["requestId"]}
            if given["request"]["url"].startswith((tab.folder, "about:", "data:")):
                self._tell("Fetch.continueRequest", wanted, session)
            else:
                wanted["errorReason"] = "BlockedByClient"
                self._tell("Fetch.failRequest", wanted, session)

    def _tell(
        self, method: str, parameters: Mapping[str, Any], session: str | None = None
    ) -> None:
        """Sends a command whose answer nobody waits for."""
        with self._lock:
            self._last += 1
            message = _line(self._last, method, parameters, session)
            with contextlib.suppress(Crash):
                self._write(message, time.monotonic() + 1.0)

    def _lose(self, tab: "Tab", why: str) -> None:
        with self._lock:
            tab.dead = tab.dead or why
            for session, box in list(self._replies.values()):
                if session == tab.session:
                    box.put(tab.dead)

    def _forget(self, tab: "Tab") -> None:
        """Closes a tab; one whose page is stuck goes with its process."""
        self._tabs.pop(tab.session, None)
        with contextlib.suppress(Crash, ValueError):
            gone = "Target.disposeBrowserContext", {"browserContextId": tab.context}
            self.call(gone, timeout=5.0)


class Tab:
    """A page of a browser; one thread at a time."""

    def __init__(
        self, browser: Browser, folder: str, context: str, target: str, session: str
    ) -> None:
        self.browser, self.folder = browser, folder
        self.context, self.target, self.session = context, target, session
        self.dead = ""
        """why it is; empty while it lives"""

    def call(self, *commands: Command, timeout: float) -> list[dict[str, Any]]:
        """Sends commands at once and waits for their results; see `Browser.call`.

        Raises:
          Crash: the page or its browser is dead, or does not answer in time, after
            which the tab counts as dead.
          ValueError: the browser refuses a command.
        """
        if self.dead:
            raise Crash(self.dead)
        try:
            return self.browser.call(*commands, session=self.session, timeout=timeout)
        except Crash as error:
            self.dead = self.dead or str(error)
            raise

    def evaluate(self, expression: str, timeout: float) -> Any:
        """Value of a JavaScript expression, as JSON has it; not to be trusted.

        Raises:
          Crash: see `call`.
          ValueError: it threw.
        """
        asked = {"expression": expression, "returnByValue": True}
        reply = self.call(("Runtime.evaluate", asked), timeout=timeout)[0]
        if "exceptionDetails" in reply:
            details = reply["exceptionDetails"]
            thrown = details.get("exception", {}).get("description", details["text"])
            raise ValueError(f"the page threw {str(thrown)[:200]}")
        return reply["result"].get("value")

    def load(self, url: str, ready: str, timeout: float) -> None:
        """Goes to a page and waits until the expression `ready` is true there.

        Raises:
          Crash: it is not in time; the tab counts as dead.
        """
        deadline = time.monotonic() + timeout
        found = self.call(("Page.navigate", {"url": url}), timeout=timeout)[0]
        why = found.get("errorText", "it never became ready")
        condition = f"location.href === {json.dumps(url)} && Boolean({ready})"
        while time.monotonic() < deadline and "errorText" not in found:
            with contextlib.suppress(ValueError):  # while one page replaces the other
                if self.evaluate(condition, deadline - time.monotonic()) is True:
                    return
            time.sleep(0.01)
        self.dead = f"{url} did not load: {why}"
        raise Crash(self.dead)

    def screenshot(
        self, width: int, height: int, *first: Command, timeout: float
    ) -> bytes:
        """The page's left upper corner as PNG.

        Args:
          width: pixels.
          height: pixels.
          *first: commands to carry out before.
          timeout: seconds for all.

        Raises:
          Crash: see `call`.
        """
        import base64

        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        asked = {"format": "png", "optimizeForSpeed": True, "clip": clip}
        capture = "Page.captureScreenshot", asked
        return base64.b64decode(self.call(*first, capture, timeout=timeout)[-1]["data"])

    def close(self) -> None:
        """Ends it, and what waits for it in other threads; again: nothing."""
        if self.session in self.browser._tabs:
            self.browser._forget(self)
        self.browser._lose(self, "the tab is closed")


def _line(
    number: int, method: str, parameters: Mapping[str, Any], session: str | None
) -> bytes:
    entry = {"id": number, "method": method, "params": parameters}
    if session is not None:
        entry["sessionId"] = session
    return json.dumps(entry).encode() + b"\0"


def _spawn(words: tuple[str, ...]) -> tuple[int, int, int]:
    """Starts a process that speaks by descriptors 3 and 4: pid, what it says, hears."""

    def high(descriptor: int) -> int:
        """Out of the way of 3 and 4."""
        copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
        os.close(descriptor)
        return copy

    hears, ours = map(high, os.pipe())
    theirs, says = map(high, os.pipe())
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, hears, 3),
        (os.POSIX_SPAWN_DUP2, says, 4),
    ]
    try:
        pid = os.posix_spawn(
            words[0], words, os.environ, file_actions=actions, setpgroup=0
        )
    finally:
        os.close(hears)
        os.close(says)
    os.set_blocking(ours, False)
    return pid, theirs, ours


def _make_profile() -> tuple[Path, int]:
    """A folder for the browser's files, and its lock; sweeps those of dead owners."""
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            held = os.open(old / "held", os.O_RDWR)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(held)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    held = os.open(folder / "held", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    return folder, held


def _group(pid: int) -> list[int]:
    """The processes of a process group, and their descendants."""
    parents, found = {}, {pid}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
            if int(fields[2]) == pid:
                found.add(int(stat.parent.name))
    grown = True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return sorted(found)
