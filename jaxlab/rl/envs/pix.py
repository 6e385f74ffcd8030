"""The embedded graphical interface as an environment: no browser, thousands of steps/s.

    env = gymnasium.make("jaxlab/Pix-v0", task="form")
    observation, info = env.reset(seed=7)
    observation, reward, *_ = env.step(env.unwrapped.oracle_action())

An episode is a function of task and seed, to the bit. It ends with a reward of 1 when
what the instruction asks for is on the screen, and nothing else was changed, as the
widget is pressed that ends it (`Kind.DONE` where there is none); with 0 when that is
pressed too early, or a wrong one is. The limit of the task truncates it.

`start`, `advance` and `next_action` are the same without gymnasium.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from jaxlab.rl.envs.api import (
    Action,
    Kind,
    action_space,
    encode,
    observation_space,
    parse_action,
    quoted,
    vocabulary_ids,
)
from jaxlab.rl.envs.pix_draw import describe, draw, enlarge
from jaxlab.rl.envs.pix_screen import PASSIVE, PRESSED, SIZE, Ref, Screen, act
from jaxlab.rl.envs.pix_solve import next_step
from jaxlab.rl.envs.pix_tasks import (
    INSTRUCTION_CHARACTERS,
    INSTRUCTION_WORDS,
    TASKS,
    VOCABULARY,
    Goal,
    See,
    Want,
)

_IDS = vocabulary_ids(VOCABULARY)


@dataclass(slots=True, eq=False)
class Episode:
    """One attempt at a task; `advance` changes it in place."""

    task: str
    seed: int
    screen: Screen
    goal: Goal
    """what is judged"""
    shown: Goal
    """what the instruction says: the goal, unless the episode is shuffled"""
    fields: tuple[str, ...]
    """quoted texts of the instruction"""
    ids: np.ndarray
    """the instruction's words: int32 [INSTRUCTION_WORDS]"""
    limit: int
    """actions before it is truncated"""
    actions: int = 0
    outcome: str = ""
    """what ended it: solved, failed or limit; empty while it goes on"""


def start(
    task: str, seed: int, *, shuffled: bool = False, limit: int | None = None
) -> Episode:
    """Begins an episode.

    Args:
      task: a name of TASKS.
      seed: of the screen and the goal; the same on all machines.
      shuffled: the instruction is that of another goal drawn for the same screen, so
        that a perfect reader succeeds at a rate of 1 / `Task.goals`.
      limit: actions; None: the task's.

    Raises:
      ValueError: no such task.
    """
    if task not in TASKS:
        close = difflib.get_close_matches(task, TASKS, 1)
        hint = f"did you mean {close[0]!r}?" if close else "one of " + ", ".join(TASKS)
        raise ValueError(f"no task {task!r} in jaxlab/Pix-v0; {hint}")
    name, family = f"{task}/{seed}", TASKS[task]
    layout = Random(f"{name}/screen")
    scene = family.build(layout, Random(f"{name}/goal"))
    theme = layout.randrange(4) if family.level > 2 else 0
    screen = Screen(scene.pages, list(scene.stack), theme)
    shown = goal = _complete(screen, scene.goal)
    if shuffled:
        other = family.build(Random(f"{name}/screen"), Random(f"{name}/shuffled"))
        shown = _complete(screen, other.goal)
    return Episode(
        task,
        seed,
        screen,
        goal,
        shown,
        quoted(shown.text),
        encode(shown.text, _IDS, INSTRUCTION_WORDS),
        family.limit if limit is None else limit,
    )


def _complete(screen: Screen, goal: Goal) -> Goal:
    """The goal, and that all it does not name stays as it is."""
    named = {step.ref for step in goal.steps if isinstance(step, Want)}
    rest = [
        Want((number, index), widget.value)
        for number, page in enumerate(screen.pages)
        for index, widget in enumerate(page.widgets)
        if widget.part not in PASSIVE
        and widget.part not in PRESSED
        and not widget.free
        and (number, index) not in named
    ]
    return goal._replace(steps=(*goal.steps, *rest))


def advance(episode: Episode, action: Action) -> float:
    """Carries out an action, in place.

    Returns:
      The reward: 1.0 once, when the task is done; else 0.0.

    Raises:
      gymnasium.error.ResetNeeded: the episode is over.
    """
    if episode.outcome:
        raise gymnasium.error.ResetNeeded(
            f"episode {episode.task}/{episode.seed} is over ({episode.outcome}); reset"
        )
    episode.actions += 1
    ended = act(episode.screen, action, episode.fields, VOCABULARY)
    if ended is not None:
        solved = _solves(episode.screen, episode.goal, ended)
        episode.outcome = "solved" if solved else "failed"
        return float(solved)
    if episode.actions >= episode.limit:
        episode.outcome = "limit"
    return 0.0


def _solves(screen: Screen, goal: Goal, ended: Ref) -> bool:
    return ended == goal.press and all(
        isinstance(step, See)
        or screen.pages[step.ref[0]].widgets[step.ref[1]].value == step.value
        for step in goal.steps
    )


def next_action(episode: Episode, rng: Random | None = None) -> Action | None:
    """What an expert does now, who knows what the instruction asks for.

    Pointing actions go to the middle of a cell of `CELL` pixels. The expert looks at
    what a person would have to look at, so that its episodes can be imitated.

    Args:
      episode: in any state, not only one that the expert led to.
      rng: chooses among the cells of a widget; None: the middlemost.

    Returns:
      The action; None if the task can no longer be done, or the episode is over.
    """
    if episode.outcome:
        return None
    return next_step(episode.screen, episode.shown, _IDS, rng)


def view(episode: Episode) -> np.ndarray:
    """The screen: uint8 [64, 64, 3], the caller's own."""
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    draw(episode.screen, image)
    return image


class PixEnv(gymnasium.Env[dict[str, Any], dict[str, Any]]):
    """One episode after another of a task; see the module, and `api` for the spaces.

    `info` says task, seed, success, whether a coordinate was clipped, and outcome:
    solved, failed or limit, empty while the episode goes on.

    Args:
      task: a name of TASKS; `reset(options={"task": ...})` takes another, for good.
      max_steps: actions before an episode is truncated; None: the task's limit.
      shuffled: instructions of other goals, see `start`; an option of `reset`, too.
      render_mode: "rgb_array", enlarged with the instruction and the last place
        pointed at, "ansi", in words, or None.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}
    vocabulary = VOCABULARY
    """words by id, of instructions and of `Kind.TYPE`"""
    episode: Episode

    def __init__(
        self,
        task: str = "click",
        *,
        max_steps: int | None = None,
        shuffled: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r}; give rgb_array or ansi")
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps {max_steps}; give at least 1")
        self.task, self.shuffled = task, shuffled
        self.max_steps, self.render_mode = max_steps, render_mode
        self.observation_space, self.action_space = _spaces()
        self._pointer: tuple[float, float] | None = None
        start(task, 0)  # an unknown task is told at once

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begins the episode of a seed; None: of the next random one.

        Raises:
          ValueError: no such task, or an option other than task and shuffled.
        """
        self._begin(seed, options)
        return self._observation(view(self.episode)), self._info(False)

    def step(
        self, action: Mapping[str, Any]
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Carries out an action.

        Raises:
          ValueError: no such action; the message names the entry that is wrong.
          gymnasium.error.ResetNeeded: the episode is over.
        """
        reward, terminated, truncated, info = self._advance(action)
        observation = self._observation(view(self.episode))
        return observation, reward, terminated, truncated, info

    def oracle_action(self, rng: Random | None = None) -> dict[str, Any] | None:
        """What an expert does now, of the action space; see `next_action`."""
        action = next_action(self.episode, rng)
        return None if action is None else action.to_dict()

    def render(self) -> Any:
        """The screen as `render_mode` has it: uint8 [432, 384, 3], or text."""
        if self.render_mode == "rgb_array":
            return enlarge(view(self.episode), self.episode.shown.text, self._pointer)
        if self.render_mode == "ansi":
            return f"{self.episode.shown.text}\n{describe(self.episode.screen)}\n"
        return None

    def _begin(self, seed: int | None, options: Mapping[str, Any] | None) -> None:
        super().reset(seed=seed)
        options = options or {}
        unknown = set(options) - {"task", "shuffled"}
        if unknown:
            raise ValueError(f"no option {sorted(unknown)[0]!r}; give task or shuffled")
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.shuffled = options.get("shuffled", self.shuffled)
        self.episode = start(
            options.get("task", self.task),
            seed,
            shuffled=self.shuffled,
            limit=self.max_steps,
        )
        self.task, self._pointer = self.episode.task, None

    def _advance(
        self, action: Mapping[str, Any]
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        parsed, clipped = parse_action(action, len(VOCABULARY))
        reward = advance(self.episode, parsed)
        points = parsed.kind <= Kind.DRAG or parsed.kind in _SCROLLS
        self._pointer = parsed.xy if points else None
        outcome = self.episode.outcome
        ended = outcome in ("solved", "failed")
        return reward, ended, outcome == "limit", self._info(clipped)

    def _observation(self, image: np.ndarray) -> dict[str, Any]:
        episode = self.episode
        instruction = episode.ids.copy()
        return {"image": image, "instruction": instruction, "text": episode.shown.text}

    def _info(self, clipped: bool) -> dict[str, Any]:
        episode = self.episode
        return {
            "task": episode.task,
            "seed": episode.seed,
            "success": episode.outcome == "solved",
            "clipped": clipped,
            "outcome": episode.outcome,
        }


_SCROLLS = (Kind.SCROLL_UP, Kind.SCROLL_DOWN)


def _spaces() -> tuple[gymnasium.Space, gymnasium.Space]:
    words = len(VOCABULARY)
    observations = observation_space(
        SIZE, SIZE, words, INSTRUCTION_WORDS, INSTRUCTION_CHARACTERS
    )
    return observations, action_space(words)


class PixVectorEnv(gymnasium.vector.VectorEnv):
    """Many environments in one, drawn into one array.

    What it returns is what `gymnasium.vector.SyncVectorEnv` returns for the same
    environments: observations batched, and an episode that ended is followed by a
    new one in the next step, whose action is ignored.

    Args:
      num_envs: of them.
      task: of all, or one for each in turn.
      max_steps: see `PixEnv`.
      shuffled: see `PixEnv`.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}
    vocabulary = VOCABULARY

    def __init__(
        self,
        num_envs: int = 1,
        task: str | Sequence[str] = "click",
        *,
        max_steps: int | None = None,
        shuffled: bool = False,
    ) -> None:
        tasks = (task,) if isinstance(task, str) else tuple(task)
        self.num_envs = num_envs
        self.envs = [
            PixEnv(tasks[i % len(tasks)], max_steps=max_steps, shuffled=shuffled)
            for i in range(num_envs)
        ]
        self.single_observation_space, self.single_action_space = _spaces()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begins an episode in each; a number seeds them seed, seed + 1, ..."""
        if seed is None or isinstance(seed, int):
            first = seed
            seed = [None if first is None else first + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"{len(seed)} seeds for {self.num_envs} environments")
        for env, own in zip(self.envs, seed, strict=True):
            env._begin(own, options)
        return self._observations(), self._infos([e._info(False) for e in self.envs])

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Carries out an action in each: entries as in `PixEnv.step`, stacked."""
        names = tuple(actions)
        rewards = np.zeros(self.num_envs)
        ended, cut = (np.zeros(self.num_envs, bool) for _ in range(2))
        infos = []
        columns = [np.asarray(actions[name]).tolist() for name in names]
        for i, row in enumerate(zip(*columns, strict=True)):
            env = self.envs[i]
            if env.episode.outcome:
                env._begin(None, None)
                info = env._info(False)
            else:
                own = dict(zip(names, row, strict=True))
                rewards[i], ended[i], cut[i], info = env._advance(own)
            infos.append(info)
        return self._observations(), rewards, ended, cut, self._infos(infos)

    def oracle_actions(self, rng: Random | None = None) -> dict[str, np.ndarray]:
        """What an expert does in each; WAIT where it has nothing to do."""
        actions = [next_action(e.episode, rng) or Action(Kind.WAIT) for e in self.envs]
        own = [action.to_dict() for action in actions]
        return {name: np.stack([a[name] for a in own]) for name in own[0]}

    def _observations(self) -> dict[str, Any]:
        episodes = [env.episode for env in self.envs]
        images = np.empty((self.num_envs, SIZE, SIZE, 3), np.uint8)
        for episode, image in zip(episodes, images, strict=True):
            draw(episode.screen, image)
        return {
            "image": images,
            "instruction": np.stack([episode.ids for episode in episodes]),
            "text": tuple(episode.shown.text for episode in episodes),
        }

    def _infos(self, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One array for each entry, and another that says who has it: all."""
        batched: dict[str, Any] = {}
        for name, first in infos[0].items():
            kind = object if isinstance(first, str) else None
            batched[name] = np.array([info[name] for info in infos], kind)
            batched[f"_{name}"] = np.ones(len(infos), bool)
        return batched
