"""MiniWoB++ in a real browser: small web tasks of one page each, 160 by 210 pixels.

    env = gymnasium.make("jaxlab/MiniWoB-v0", task="click-dialog")
    observation, info = env.reset(seed=7)
    observation, reward, *_ = env.step(env.unwrapped.oracle_action())

Pages are those of Farama's package `miniwob` (arXiv 1802.08802), and a seed gives the
problem that it gives there. What differs: there is no time limit, and the reward is the
page's own before it decays with time, at least 0; actions are those of `api`.

All environments of a process share a browser, each has a tab; several may act at once,
each in a thread of its own. If the page, the tab or the browser dies or hangs, `step`
and `reset` raise `api.Crash`; the next `reset` starts what is missing anew.
"""

import functools
import io
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import gymnasium
import numpy as np

from jaxlab.errors import UserError
from jaxlab.rl.envs import miniwob_tasks
from jaxlab.rl.envs.api import (
    KEYS,
    Action,
    Crash,
    Kind,
    action_space,
    encode,
    observation_space,
    parse_action,
    quoted,
    split_words,
    vocabulary_ids,
)
from jaxlab.rl.envs.browsers import BROWSERS
from jaxlab.rl.envs.cdp import Command, Tab
from jaxlab.rl.envs.miniwob_tasks import CHARACTERS, TASKS, VOCABULARY, WORDS

HEIGHT, WIDTH = 210, 160
SCROLL = 60
"""pixels of one scrolling action"""
TAB_EPISODES = 200
"""episodes before a tab is replaced, with all its page may have left behind"""
_IDS = vocabulary_ids(VOCABULARY)
_NOWHERE = (490.0, 310.0)
_SCROLLS = (Kind.SCROLL_UP, Kind.SCROLL_DOWN)
# Names and codes of keys, and the text that a press gives.
_KEYS = {
    "ENTER": ("Enter", 13, "\r"),
    "TAB": ("Tab", 9, ""),
    "ESCAPE": ("Escape", 27, ""),
    "BACKSPACE": ("Backspace", 8, ""),
    "UP": ("ArrowUp", 38, ""),
    "DOWN": ("ArrowDown", 40, ""),
    "LEFT": ("ArrowLeft", 37, ""),
    "RIGHT": ("ArrowRight", 39, ""),
}
READY = (
    "document.readyState === 'complete' && typeof core === 'object' && core.cover_div"
)
# A press on the cover would start another episode; its picture would hide the last one.
_PREPARE = """(() => {
  core.cover_div.onclick = null;
  core.cover_div.style.opacity = 0;
})()"""
_BEGIN = """((seed, shown) => {
  core.endEpisode(0);
  core.EPISODE_MAX_TIME = 1e9;
  core.setDataMode('train');
  if (document.activeElement) document.activeElement.blur();
  Math.seedrandom(seed);
  core.startEpisodeReal();
  const query = document.getElementById('query');
  if (shown !== null) query.innerHTML = shown;
  const said = core.getUtterance();
  return [said.utterance || said, query.innerHTML];
})"""
_STATE = "[WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL]"


class MiniWoBEnv(gymnasium.Env[dict[str, Any], dict[str, Any]]):
    """One episode after another of a task; see the module, and `api` for the spaces.

    `info` says task, seed, success (a raw reward of 1), raw_reward in [-1, 1], whether
    a coordinate was clipped, and outcome: solved, failed or limit, empty while the
    episode goes on.

    Args:
      task: a page of MiniWoB++; `reset(options={"task": ...})` takes another, for good.
      max_steps: actions before an episode is truncated; None: the task's limit.
      shuffled: the page shows, and the policy gets, the instruction of another seed; an
        option of `reset`, too.
      render_mode: "rgb_array": the page, and the last place pointed at; or None.
      timeout: seconds that a step may take before the page counts as hung.

    Raises:
      UserError: MiniWoB++ or a browser is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    vocabulary = VOCABULARY
    """words by id, of instructions and of `Kind.TYPE`"""

    def __init__(
        self,
        task: str = "click-test",
        *,
        max_steps: int | None = None,
        shuffled: bool = False,
        render_mode: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r}; give rgb_array")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps {max_steps}; give at least 1")
        miniwob_tasks.page(task)  # an unknown task is told at once
        _pillow()
        self.task, self.shuffled = task, shuffled
        self.max_steps, self.render_mode, self.timeout = max_steps, render_mode, timeout
        self.observation_space = observation_space(
            HEIGHT, WIDTH, len(VOCABULARY), WORDS, CHARACTERS
        )
        self.action_space = action_space(len(VOCABULARY))
        self.seed = -1
        self.text = ""
        self.outcome = "none"
        self.raw_reward = 0.0
        self.actions = 0
        self._image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        self._pointer: tuple[float, float] | None = None
        self._tab: Tab | None = None
        self._loaded, self._episodes, self._utterance = "", 0, ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begins the episode of a seed; None: of the next random one.

        Raises:
          Crash: neither the page nor, after that, a new one in another tab began.
          ValueError: no such task, or an option other than task and shuffled.
        """
        super().reset(seed=seed)
        options = options or {}
        unknown = set(options) - {"task", "shuffled"}
        if unknown:
            raise ValueError(f"no option {sorted(unknown)[0]!r}; give task or shuffled")
        task = options.get("task", self.task)
        miniwob_tasks.page(task)
        self.task, self.shuffled = task, options.get("shuffled", self.shuffled)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.seed, self.outcome, self.raw_reward = seed, "", 0.0
        self.actions, self._pointer = 0, None
        try:
            self._begin()
        except Crash:
            self._drop()
            try:
                self._begin()
            except Crash:
                self.outcome = "crash"
                raise
        return self._observation(), self._info(False)

    def step(
        self, action: Mapping[str, Any]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Carries out an action.

        Raises:
          Crash: the page died or hangs; the episode is lost.
          ValueError: no such action; the message names the entry that is wrong.
          gymnasium.error.ResetNeeded: the episode is over.
        """
        parsed, clipped = parse_action(action, len(VOCABULARY))
        if self.outcome:
            raise gymnasium.error.ResetNeeded(
                f"episode {self.task}/{self.seed} is over ({self.outcome}); reset"
            )
        points = parsed.kind <= Kind.DRAG or parsed.kind in _SCROLLS
        self._pointer = parsed.xy if points else None
        self.actions += 1
        limit = self.max_steps or TASKS.get(self.task, miniwob_tasks.OTHER_LIMIT)
        try:
            done = self._carry_out(parsed)
        except Crash:
            self.outcome = "crash"
            raise
        if done:
            self.outcome = "solved" if self.raw_reward >= 1 else "failed"
        elif self.actions >= limit:
            self.outcome = "limit"
        reward = max(self.raw_reward, 0.0) if done else 0.0
        truncated = self.outcome == "limit"
        return self._observation(), reward, done, truncated, self._info(clipped)

    def oracle_action(self, rng: Random | None = None) -> dict[str, Any] | None:
        """What an expert does now, of the action space.

        Args:
          rng: chooses among the places of an element; None: the middlemost.

        Returns:
          The action; None if the task has no expert, or that sees nothing to do.

        Raises:
          Crash: see `step`.
        """
        if self.outcome or self.task not in TASKS:
            return None
        argument = f"{_js(self.task)}]({_js(self._utterance)})"
        answer = self._tab_now().evaluate(f"({oracles()})[{argument}", self.timeout)
        action = read_oracle(answer, self.text, rng)
        return None if action is None else action.to_dict()

    def render(self) -> Any:
        """The page as it was after the last action: uint8 [210, 160, 3]."""
        if self.render_mode is None:
            return None
        return mark(self._image, self._pointer)

    def abort(self) -> None:
        """Ends the page from another thread: what waits for it raises `Crash`."""
        if (tab := self._tab) is not None:
            tab.close()

    def close(self) -> None:
        """Closes the tab, and the browser if this was its last one."""
        self._drop()
        self.outcome = self.outcome or "closed"

    # ------------------------------------------------------------------ inside

    def _tab_now(self) -> Tab:
        if self._tab is None:
            raise Crash("the environment has no page; reset")
        return self._tab

    def _drop(self) -> None:
        tab, self._tab, self._loaded = self._tab, None, ""
        if tab is not None:
            BROWSERS.close(tab)

    def _begin(self) -> None:
        """The page of the task, at the start of the seed's episode."""
        if self._tab is not None and self._episodes >= TAB_EPISODES:
            self._drop()
        if self._tab is None:
            root = miniwob_tasks.folder().as_uri() + "/"
            self._tab, self._episodes = BROWSERS.open(root), 0
        tab = self._tab
        try:
            if self._loaded != self.task:
                self._load(tab)
            shown = None
            if self.shuffled:
                # far from all seeds that are used, and another for each
                other = f"{_BEGIN}({self.seed + 2**40}, null)"
                shown = tab.evaluate(other, self.timeout)[1]
            begin = f"{_BEGIN}({self.seed}, {_js(shown)})"
            self._utterance = tab.evaluate(begin, self.timeout)[0]
            deadline = time.monotonic() + self.timeout
            while tab.evaluate("WOB_TASK_READY", self.timeout) is not True:
                if time.monotonic() > deadline:
                    raise ValueError("the task never became ready")
                time.sleep(0.01)
        except (ValueError, TypeError, IndexError) as error:
            tab.dead = f"{self.task}: {error}"
            raise Crash(tab.dead) from None
        self._episodes += 1
        self.text = miniwob_tasks.instruction(self.task, self._utterance)
        self._see(_mouse("mouseMoved", _NOWHERE))

    def _load(self, tab: Tab) -> None:
        url = miniwob_tasks.page(self.task).as_uri()
        tab.load(url, READY, max(self.timeout, 30.0))
        tab.evaluate(_PREPARE, self.timeout)
        self._loaded = self.task

    def _see(self, *first: Command) -> None:
        png = self._tab_now().screenshot(WIDTH, HEIGHT, *first, timeout=self.timeout)
        self._image = decode(png)

    def _carry_out(self, action: Action) -> bool:
        """Whether the episode is over; the picture and the raw reward are of then."""
        if action.kind is Kind.DONE:
            return True
        tab = self._tab_now()
        if action.kind is Kind.WAIT:
            time.sleep(0.2)
        try:
            if commands := inputs(action, quoted(self.text)):
                tab.call(*commands, timeout=self.timeout)
            self._see()
            done, raw = tab.evaluate(_STATE, self.timeout)
            if done is True:
                self.raw_reward = min(max(float(raw), -1.0), 1.0)
        except (ValueError, TypeError):  # another page, or none
            self._loaded, done = "", True
        return done is True

    def _observation(self) -> dict[str, Any]:
        return observe(self._image, self.text)

    def _info(self, clipped: bool) -> dict[str, Any]:
        return {
            "task": self.task,
            "seed": self.seed,
            "success": self.outcome == "solved",
            "raw_reward": self.raw_reward,
            "clipped": clipped,
            "outcome": self.outcome,
        }


def observe(image: np.ndarray, text: str) -> dict[str, Any]:
    """An observation: a picture, uint8 [210, 160, 3], and an instruction."""
    return {"image": image, "instruction": encode(text, _IDS, WORDS), "text": text}


def inputs(action: Action, fields: tuple[str, ...]) -> list[Command]:
    """An action as input events.

    Args:
      action: other than DONE; WAIT is none.
      fields: quoted texts of the instruction; one that is not there types nothing.
    """
    kind, at = action.kind, pixel(action.xy)
    if kind in (Kind.CLICK, Kind.DOUBLE_CLICK):
        events = [_mouse("mouseMoved", at)]
        for count in range(1, 2 + (kind is Kind.DOUBLE_CLICK)):
            events += [
                _press("mousePressed", at, count),
                _press("mouseReleased", at, count),
            ]
        return events
    if kind is Kind.DRAG:
        to = pixel(action.to)
        way = [
            tuple(a + (b - a) * s / 4 for a, b in zip(at, to, strict=True))
            for s in range(1, 5)
        ]
        moves = [_mouse("mouseMoved", (x, y), button="left", buttons=1) for x, y in way]
        start = _mouse("mouseMoved", at), _press("mousePressed", at, 1)
        return [*start, *moves, _press("mouseReleased", to, 1)]
    if kind is Kind.WAIT:
        return []
    if kind in _SCROLLS:
        delta = SCROLL if kind is Kind.SCROLL_DOWN else -SCROLL
        return [_mouse("mouseWheel", at, deltaX=0, deltaY=delta)]
    if kind is Kind.KEY:
        return _stroke(*_KEYS[KEYS[action.key]])
    if kind is Kind.TYPE:
        text = VOCABULARY[action.token] if action.token > 1 else ""
    else:
        text = fields[action.field] if action.field < len(fields) else ""
    return [event for c in text for event in _stroke(c, ord(c.upper()), c)]


def pixel(point: tuple[float, float]) -> tuple[float, float]:
    """Shares of the screen as pixels inside of it."""
    x, y = point
    return min(x * WIDTH, WIDTH - 0.5), min(y * HEIGHT, HEIGHT - 0.5)


def _mouse(kind: str, at: tuple[float, ...], **rest: Any) -> Command:
    return "Input.dispatchMouseEvent", {"type": kind, "x": at[0], "y": at[1], **rest}


def _press(kind: str, at: tuple[float, ...], count: int) -> Command:
    buttons = int(kind == "mousePressed")
    return _mouse(kind, at, button="left", buttons=buttons, clickCount=count)


def _stroke(name: str, code: int, text: str) -> list[Command]:
    """A key pressed and let go."""
    key: dict[str, Any] = {"key": name, "windowsVirtualKeyCode": code}
    if len(name) > 1:
        key["code"] = name
    down = {**key, "type": "keyDown" if text else "rawKeyDown"}
    if text:
        down["text"] = text
    method = "Input.dispatchKeyEvent"
    return [(method, down), (method, {**key, "type": "keyUp"})]


def read_oracle(answer: Any, text: str, rng: Random | None) -> Action | None:
    """The action that an expert of `miniwob_oracles.js` means."""
    if answer is None:
        return None
    kind = Kind[answer["do"]]
    if kind is Kind.KEY:
        return Action(kind, key=KEYS.index(answer["key"]))
    if kind is Kind.TYPE:
        typed, fields = answer["text"], quoted(text)[:4]
        if typed in fields:
            return Action(Kind.TYPE_FIELD, field=fields.index(typed))
        word = split_words(typed)[0] if not typed[0].isspace() else ""
        return Action(kind, token=_IDS[word if word in _IDS else typed[0]])
    at = _pick(answer["at"], rng)
    return Action(kind, at, _pick(answer["to"], None) if "to" in answer else at)


def _pick(points: list[list[float]], rng: Random | None) -> tuple[float, float]:
    """One of some points, in shares of the screen."""
    if rng is not None:
        x, y = rng.choice(points)
    else:
        middle = np.mean(points, 0)
        x, y = min(points, key=lambda point: float(np.sum((point - middle) ** 2)))
    return float(x / WIDTH), float(y / HEIGHT)


def decode(png: bytes) -> np.ndarray:
    """A screenshot as uint8 [210, 160, 3].

    Raises:
      Crash: it is of another size.
    """
    with _pillow().open(io.BytesIO(png), formats=("PNG",)) as image:
        if image.size != (WIDTH, HEIGHT):
            raise Crash(f"a screenshot of {image.size} pixels")
        return np.array(image.convert("RGB"))


def mark(image: np.ndarray, pointer: tuple[float, float] | None) -> np.ndarray:
    """A copy of a picture with a ring around a place, in shares of the screen."""
    image = image.copy()
    if pointer is not None:
        x, y = pixel(pointer)
        rows, columns = np.ogrid[:HEIGHT, :WIDTH]
        far = np.hypot(rows - y, columns - x)
        image[(far > 4) & (far < 6.5)] = (255, 0, 160)
    return image


@functools.cache
def oracles() -> str:
    """The experts, as a JavaScript expression."""
    return Path(__file__).with_name("miniwob_oracles.js").read_text()


def _js(value: Any) -> str:
    import json

    return json.dumps(value)


@functools.cache
def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("Pillow is not installed: pip install 'jaxlab[gui]'") from None
    return Image
