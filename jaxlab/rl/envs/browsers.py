"""The browser that the environments of a process share."""

import atexit
import threading

from jaxlab.rl.envs.api import Crash
from jaxlab.rl.envs.cdp import Browser, Tab

BROWSER_TABS = 25
"""tabs that a browser opens before it is replaced, and"""
BROWSER_MEMORY = 3 * 2**30
"""bytes that it may hold before it is"""


class Browsers:
    """The browser of a process: there while somebody has a tab of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: dict[Browser, int] = {}
        self._opened = 0
        self._now: Browser | None = None

    def open(self, folder: str) -> Tab:
        """A new tab of the browser; of another, where that is dead or worn.

        Raises:
          Crash: no browser starts, or it opens no tab.
          UserError: there is none.
        """
        with self._lock:
            if self._now is None or self._now.dead or self._worn(self._now):
                old, self._now = self._now, None
                if old is not None and not self._users[old]:
                    self._end(old)
                self._now, self._opened = Browser(), 0
                self._users[self._now] = 0
            browser = self._now
            self._users[browser] += 1
            self._opened += 1
        try:
            return browser.open(folder)
        except Crash:
            with self._lock:
                browser.close()
                self._leave(browser)
            raise

    def close(self, tab: Tab) -> None:
        """Closes a tab, and the browser with its last one."""
        tab.close()
        with self._lock:
            self._leave(tab.browser)

    def memory(self) -> int:
        """Bytes that they hold together."""
        with self._lock:
            return sum(browser.memory() for browser in self._users)

    def shut(self) -> None:
        """Closes all, whoever has tabs."""
        with self._lock:
            for browser in list(self._users):
                self._end(browser)

    def _worn(self, browser: Browser) -> bool:
        return self._opened >= BROWSER_TABS or browser.memory() > BROWSER_MEMORY

    def _leave(self, browser: Browser) -> None:
        if browser in self._users:
            self._users[browser] -= 1
            if not self._users[browser]:
                self._end(browser)

    def _end(self, browser: Browser) -> None:
        self._users.pop(browser, None)
        if self._now is browser:
            self._now = None
        browser.close()


BROWSERS = Browsers()
atexit.register(BROWSERS.shut)
