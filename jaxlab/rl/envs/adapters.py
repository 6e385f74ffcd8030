"""Other projects' environments behind our interface: Farama's MiniWoB++, BrowserGym.

    env = gymnasium.make("jaxlab/Farama-v0", task="click-dialog")
    env = gymnasium.make("jaxlab/BrowserGym-v0", task="browsergym/miniwob.click-dialog")

Actions and observations are those of `api`, so a policy that was trained elsewhere acts
here as it is. `FaramaEnv` shares nothing with `miniwob` but the pages' files and how a
text becomes ids: its browser, driver, clicks, screenshots and rewards are Farama's and
Selenium's, and so it can judge what `miniwob` trained.
"""

import contextlib
import importlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import gymnasium
import numpy as np

from jaxlab.errors import UserError
from jaxlab.rl.envs import miniwob, miniwob_tasks
from jaxlab.rl.envs.api import (
    KEYS,
    Action,
    Crash,
    Kind,
    action_space,
    observation_space,
    parse_action,
    quoted,
)
from jaxlab.rl.envs.miniwob_tasks import CHARACTERS, TASKS, VOCABULARY, WORDS

# What Debian's /usr/bin/chromium, a script, hands to the browser.
_CHROMIUM_FLAGS = (
    "--no-first-run --disable-background-networking --disable-quic --disable-sync "
    "--disable-component-update --disable-dev-shm-usage --proxy-server=127.0.0.1:9"
)
_KEY_NAMES = {
    "ENTER": "Enter",
    "TAB": "Tab",
    "ESCAPE": "Escape",
    "BACKSPACE": "Backspace",
    "UP": "ArrowUp",
    "DOWN": "ArrowDown",
    "LEFT": "ArrowLeft",
    "RIGHT": "ArrowRight",
}


class _Adapter(gymnasium.Env[dict[str, Any], dict[str, Any]]):
    """What both have alike: spaces, limits, outcomes."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    vocabulary = VOCABULARY

    def __init__(
        self, task: str, max_steps: int | None, render_mode: str | None, size: Any
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r}; give rgb_array")
        self.task, self.max_steps, self.render_mode = task, max_steps, render_mode
        self.height, self.width = size
        self.observation_space = observation_space(
            self.height, self.width, len(VOCABULARY), WORDS, CHARACTERS
        )
        self.action_space = action_space(len(VOCABULARY))
        self.seed, self.text, self.outcome, self.raw_reward = -1, "", "none", 0.0
        self.actions = 0
        self._image = np.zeros((self.height, self.width, 3), np.uint8)

    def render(self) -> Any:
        """The screen: uint8 [height, width, 3]."""
        return self._image.copy() if self.render_mode else None

    def _start(self, seed: int | None) -> None:
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.seed, self.outcome, self.raw_reward, self.actions = seed, "", 0.0, 0

    def _parse(self, action: Mapping[str, Any]) -> tuple[Action, bool]:
        parsed, clipped = parse_action(action, len(VOCABULARY))
        if self.outcome:
            raise gymnasium.error.ResetNeeded(
                f"episode {self.task}/{self.seed} is over ({self.outcome}); reset"
            )
        self.actions += 1
        return parsed, clipped

    def _end(
        self, done: bool, limit: int, clipped: bool
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        if done:
            self.outcome = "solved" if self.raw_reward >= 1 else "failed"
        elif self.actions >= limit:
            self.outcome = "limit"
        reward = max(self.raw_reward, 0.0) if done else 0.0
        cut = self.outcome == "limit"
        return self._observation(), reward, done, cut, self._info(clipped)

    def _observation(self) -> dict[str, Any]:
        return miniwob.observe(self._image, self.text)

    def _info(self, clipped: bool) -> dict[str, Any]:
        return {
            "task": self.task,
            "seed": self.seed,
            "success": self.outcome == "solved",
            "raw_reward": self.raw_reward,
            "clipped": clipped,
            "outcome": self.outcome,
        }

    def _typed(self, action: Action) -> str:
        if action.kind is Kind.TYPE:
            return VOCABULARY[action.token] if action.token > 1 else ""
        fields = quoted(self.text)
        return fields[action.field] if action.field < len(fields) else ""


class FaramaEnv(_Adapter):
    """MiniWoB++ as Farama has it: a browser of its own, by Selenium.

    The same problem for the same seed as `miniwob.MiniWoBEnv`, and the same `info`. The
    page's limit of ten seconds is lifted, and its reward taken before it decays.

    Args:
      task: a page of MiniWoB++.
      max_steps: actions before an episode is truncated; None: the task's limit.
      shuffled: the page shows, and the policy gets, the instruction of another seed; an
        option of `reset`, too.
      render_mode: "rgb_array" or None.

    Raises:
      UserError: MiniWoB++, a browser or its driver is not installed.
      Crash: the browser did not start.
    """

    def __init__(
        self,
        task: str = "click-test",
        *,
        max_steps: int | None = None,
        shuffled: bool = False,
        render_mode: str | None = None,
    ) -> None:
        miniwob_tasks.page(task)
        super().__init__(task, max_steps, render_mode, (miniwob.HEIGHT, miniwob.WIDTH))
        self.shuffled = shuffled
        with selenium_paths():
            from miniwob.action import ActionSpaceConfig, ActionTypes
            from miniwob.environment import MiniWoBEnvironment
            from miniwob.reward import get_raw_reward

            self._types = ActionTypes
            config = ActionSpaceConfig(
                action_types=list(ActionTypes),
                scroll_amount=miniwob.SCROLL,
                scroll_time=0,
                allowed_keys=[f"<{name}>" for name in _KEY_NAMES.values()],
            )
            self._config = config
            with _as_crash():
                self._inner = MiniWoBEnvironment(
                    subdomain=task,
                    action_space_config=config,
                    reward_processor=get_raw_reward,
                )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begins the episode of a seed; None: of the next random one.

        Raises:
          Crash: Selenium cannot.
        """
        super().reset(seed=seed)
        options = options or {}
        if options.get("task", self.task) != self.task:
            raise ValueError(
                f"this browser shows {self.task}; make another environment for "
                f"{options['task']}"
            )
        self.shuffled = options.get("shuffled", self.shuffled)
        self._start(seed)
        with _as_crash():
            self._script("core.EPISODE_MAX_TIME = 1e9;")
            shown = None
            if self.shuffled:
                self._inner.reset(seed=self.seed + 2**40)
                shown = self._script(
                    "return document.getElementById('query').innerHTML"
                )
            seen, _ = self._inner.reset(seed=self.seed)
            if shown is not None:
                self._script(
                    "document.getElementById('query').innerHTML = arguments[0]", shown
                )
                seen, _ = self._inner.instance.get_observation(use_cached_fields=True)
        self.text = miniwob_tasks.instruction(self.task, seen["utterance"])
        self._image = np.asarray(seen["screenshot"], np.uint8)
        return self._observation(), self._info(False)

    def step(
        self, action: Mapping[str, Any]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Carries out an action; the picture stays as it was where that ended it.

        Raises:
          Crash: Selenium cannot.
          ValueError: no such action; the message names the entry that is wrong.
          gymnasium.error.ResetNeeded: the episode is over.
        """
        parsed, clipped = self._parse(action)
        done = parsed.kind is Kind.DONE
        if parsed.kind is Kind.WAIT:
            time.sleep(0.2)
        with _as_crash():
            for part in () if done else self._translate(parsed):
                seen, raw, done, _, _ = self._inner.step(part)
                if done:
                    break
            if not done:  # the page may be a moment behind the click
                time.sleep(0.05)
                seen, raw, done, _, _ = self._inner.step(self._act("NONE"))
            if done and parsed.kind is not Kind.DONE:
                self.raw_reward = float(raw)
            elif not done:
                self._image = np.asarray(seen["screenshot"], np.uint8)
        limit = self.max_steps or TASKS.get(self.task, miniwob_tasks.OTHER_LIMIT)
        return self._end(done, limit, clipped)

    def oracle_action(self, rng: Random | None = None) -> dict[str, Any] | None:
        """What an expert does now; see `miniwob.MiniWoBEnv.oracle_action`."""
        if self.outcome or self.task not in TASKS:
            return None
        script = f"return ({miniwob.oracles()})[arguments[0]](arguments[1])"
        with _as_crash():
            said = self._script("return core.getUtterance()")
            said = said["utterance"] if isinstance(said, dict) else said
            answer = self._script(script, self.task, said)
        action = miniwob.read_oracle(answer, self.text, rng)
        return None if action is None else action.to_dict()

    def close(self) -> None:
        """Closes the browser."""
        if not self._inner.instance.died:
            with contextlib.suppress(Exception):
                self._inner.close()

    def _script(self, script: str, *arguments: Any) -> Any:
        return self._inner.instance.driver.execute_script(script, *arguments)

    def _act(self, name: str, **entries: Any) -> dict[str, Any]:
        """An action of Farama's, other entries of no matter."""
        kinds = list(self._config.action_types)
        return {"action_type": kinds.index(self._types[name]), **entries}

    def _translate(self, action: Action) -> list[dict[str, Any]]:
        at = {"coords": np.array(miniwob.pixel(action.xy), np.float32)}
        to = {"coords": np.array(miniwob.pixel(action.to), np.float32)}
        if action.kind is Kind.DRAG:
            half = {"coords": (at["coords"] + to["coords"]) / 2}
            moves = [self._act("MOVE_COORDS", **place) for place in (half, to)]
            down = self._act("MOUSEDOWN_COORDS", **at)
            return [down, *moves, self._act("MOUSEUP_COORDS", **to)]
        if action.kind in (Kind.TYPE, Kind.TYPE_FIELD):
            text = self._typed(action)
            return [self._act("TYPE_TEXT", text=text)] if text else []
        if action.kind is Kind.KEY:
            return [self._act("PRESS_KEY", key=action.key)]
        name = {
            Kind.CLICK: "CLICK_COORDS",
            Kind.DOUBLE_CLICK: "DBLCLICK_COORDS",
            Kind.SCROLL_UP: "SCROLL_UP_COORDS",
            Kind.SCROLL_DOWN: "SCROLL_DOWN_COORDS",
        }.get(action.kind)
        return [] if name is None else [self._act(name, **at)]


class BrowserGymEnv(_Adapter):
    """An environment of BrowserGym (arXiv 2412.05467), seen as a screen.

    Its tasks bring their own pages, servers and judges; what they need is theirs to
    say. Playwright's interface allows one thread a process.

    Args:
      task: id of an environment, as in "browsergym/miniwob.click-dialog"; the module
        `browsergym.miniwob` is imported by its name.
      size: height and width of the observation, pixels; screens are scaled to it.
      max_steps: actions before an episode is truncated; None: 20.
      render_mode: "rgb_array" or None.
      **rest: for the environment of BrowserGym.

    Raises:
      UserError: BrowserGym or the package of the task is not installed.
    """

    def __init__(
        self,
        task: str,
        *,
        size: tuple[int, int] = (miniwob.HEIGHT, miniwob.WIDTH),
        max_steps: int | None = None,
        render_mode: str | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(task, max_steps, render_mode, size)
        package = task.removeprefix("browsergym/").partition(".")[0]
        try:
            importlib.import_module(f"browsergym.{package}")
            actions = importlib.import_module("browsergym.core.action.highlevel")
        except ImportError as error:
            raise UserError(
                f"{task} needs BrowserGym ({error}): in an environment of its own, "
                f"it pins Playwright; pip install jaxlab browsergym-{package} and "
                "playwright install chromium"
            ) from None
        # Without, it knows elements by their ids alone, and no places.
        words = actions.HighLevelActionSet(("coord", "bid"), multiaction=True)
        rest = {"action_mapping": words.to_python_code} | rest
        self._inner = gymnasium.make(task, disable_env_checker=True, **rest)
        self._screen = size

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begins the episode of a seed; None: of the next random one."""
        super().reset(seed=seed)
        self._start(seed)
        seen, _ = self._inner.reset(seed=self.seed)
        self._look(seen)
        return self._observation(), self._info(False)

    def step(
        self, action: Mapping[str, Any]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Carries out an action.

        Raises:
          ValueError: no such action; the message names the entry that is wrong.
          gymnasium.error.ResetNeeded: the episode is over.
        """
        parsed, clipped = self._parse(action)
        done = parsed.kind is Kind.DONE
        if not done:
            said = browsergym_action(parsed, self._screen, self._typed(parsed))
            seen, reward, done, _, _ = self._inner.step(said)
            self._look(seen)
            self.raw_reward = float(reward) if done else 0.0
        return self._end(done, self.max_steps or miniwob_tasks.OTHER_LIMIT, clipped)

    def close(self) -> None:
        """Closes the browser."""
        self._inner.close()

    def _look(self, seen: Mapping[str, Any]) -> None:
        from PIL import Image

        screen = np.asarray(seen["screenshot"], np.uint8)[..., :3]
        self._screen = screen.shape[0], screen.shape[1]
        size = self.width, self.height
        self._image = np.array(
            Image.fromarray(screen).resize(size, Image.Resampling.BOX)
        )
        self.text = miniwob_tasks.instruction(
            self.task.rpartition(".")[2], seen["goal"]
        )


def browsergym_action(action: Action, screen: tuple[int, int], typed: str) -> str:
    """An action in BrowserGym's words: a call, which it parses.

    Args:
      action: other than DONE.
      screen: its height and width, pixels.
      typed: what TYPE and TYPE_FIELD type.
    """
    height, width = screen

    def at(point: tuple[float, float]) -> str:
        return f"{point[0] * width:.1f}, {point[1] * height:.1f}"

    if action.kind is Kind.CLICK:
        return f"mouse_click({at(action.xy)})"
    if action.kind is Kind.DOUBLE_CLICK:
        return f"mouse_dblclick({at(action.xy)})"
    if action.kind is Kind.DRAG:
        return f"mouse_drag_and_drop({at(action.xy)}, {at(action.to)})"
    if action.kind in (Kind.TYPE, Kind.TYPE_FIELD):
        return f"keyboard_type({typed!r})" if typed else "noop(0)"
    if action.kind is Kind.KEY:
        return f"keyboard_press({_KEY_NAMES[KEYS[action.key]]!r})"
    if action.kind in (Kind.SCROLL_UP, Kind.SCROLL_DOWN):
        down = miniwob.SCROLL if action.kind is Kind.SCROLL_DOWN else -miniwob.SCROLL
        return f"mouse_move({at(action.xy)})\nscroll(0, {down})"
    return "noop(200)"


@contextlib.contextmanager
def _as_crash() -> Iterator[None]:
    """What Selenium raises, as a crash."""
    from selenium.common.exceptions import WebDriverException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (WebDriverException, HTTPError, OSError) as error:
        raise Crash(f"Selenium: {str(error).splitlines()[0][:200]}") from error


@contextlib.contextmanager
def selenium_paths() -> Iterator[None]:
    """Names the browser and its driver to Selenium, so that it fetches none.

    Raises:
      UserError: one is missing.
    """
    miniwob_tasks.folder()
    given = {
        "MINIWOB_CHROME_BINARY": os.environ.get("MINIWOB_CHROME_BINARY")
        or shutil.which("chromium"),
        "MINIWOB_CHROMEDRIVER": os.environ.get("MINIWOB_CHROMEDRIVER")
        or shutil.which("chromedriver"),
    }
    for name, path in given.items():
        if not path or not Path(path).exists():
            raise UserError(
                f"no {name}: apt-get install -y chromium chromium-driver (Debian), or "
                "name one by that environment variable"
            )
    before = dict(os.environ)
    os.environ.update({name: str(path) for name, path in given.items()})
    flags = os.environ.get("CHROMIUM_FLAGS", "")
    os.environ["CHROMIUM_FLAGS"] = f"{flags} {_CHROMIUM_FLAGS}".strip()
    os.environ.setdefault("SE_OFFLINE", "true")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
