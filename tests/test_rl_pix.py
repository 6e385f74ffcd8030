"""The embedded graphical interface: its contract, its tasks, and what they need."""

import hashlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlab.rl.envs  # noqa: F401  (registers)
from jaxlab.rl.envs.api import (
    ARGUMENTS,
    FIELDS,
    KEYS,
    UNKNOWN,
    Action,
    Kind,
    encode,
    parse_action,
    split_words,
)
from jaxlab.rl.envs.pix import (
    Episode,
    PixEnv,
    PixVectorEnv,
    advance,
    next_action,
    start,
    view,
)
from jaxlab.rl.envs.pix_draw import draw, enlarge, text_mask
from jaxlab.rl.envs.pix_screen import (
    CELL,
    CLOSE,
    DONE,
    END,
    PASSIVE,
    SIZE,
    TEXT_LIMIT,
    Page,
    Part,
    Screen,
    Widget,
    act,
    stop_x,
    visible_rows,
)
from jaxlab.rl.envs.pix_solve import next_step
from jaxlab.rl.envs.pix_tasks import (
    INSTRUCTION_CHARACTERS,
    INSTRUCTION_WORDS,
    TASKS,
    VOCABULARY,
    Want,
)

ROOT = Path(__file__).parent.parent
WORDS = {word: index for index, word in enumerate(VOCABULARY)}
ALL = pytest.mark.parametrize("task", TASKS)


def play(episode: Episode, rng: Random | None = None) -> tuple[float, list[Action]]:
    """The expert's episode: its rewards together, and its actions."""
    reward, actions = 0.0, []
    while not episode.outcome:
        action = next_action(episode, rng)
        assert action is not None
        actions.append(action)
        reward += advance(episode, action)
    return reward, actions


def same(a: dict, b: dict) -> bool:
    return (
        np.array_equal(a["image"], b["image"])
        and np.array_equal(a["instruction"], b["instruction"])
        and a["text"] == b["text"]
    )


# ------------------------------------------------------------------- the contract


@ALL
def test_gymnasium_finds_no_fault(task):
    env = gymnasium.make("jaxlab/Pix-v0", task=task)
    check_env(env.unwrapped)
    assert env.unwrapped.spec.id == "jaxlab/Pix-v0"


def test_importing_registers_and_needs_no_jax():
    program = """
import sys, gymnasium
env = gymnasium.make("jaxlab.rl.envs:jaxlab/Pix-v0", task="form")
env.reset(seed=0)
print("jax" in sys.modules, "flax" in sys.modules, env.unwrapped.task)
"""
    output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT)
    assert output.decode().split() == ["False", "False", "form"]


def test_spaces_are_the_same_for_all_tasks():
    spaces = {
        (str(e.observation_space), str(e.action_space)) for e in map(PixEnv, TASKS)
    }
    assert len(spaces) == 1


def test_observation_says_what_the_instruction_says():
    env = PixEnv("form")
    observation, info = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    ids = [i for i in observation["instruction"] if i]
    assert [VOCABULARY[i] for i in ids] == split_words(observation["text"])
    assert info == {
        "task": "form",
        "seed": 3,
        "success": False,
        "clipped": False,
        "outcome": "",
    }


def test_long_and_unknown_instructions_are_encoded():
    ids = encode("PRESS XYLOPHONE, CAT", {"PRESS": 2, "CAT": 3}, 3)
    assert ids.tolist() == [2, UNKNOWN, UNKNOWN] and ids.dtype == np.int32
    assert encode("", {}, 2).tolist() == [0, 0]


def test_options_change_the_task():
    env = PixEnv("click")
    _, info = env.reset(seed=1, options={"task": "order"})
    assert info["task"] == "order"
    _, info = env.reset()
    assert info["task"] == "order" and info["seed"] != 1
    with pytest.raises(ValueError, match="no option 'tasks'; give task or shuffled"):
        env.reset(options={"tasks": "click"})


def test_unknown_names_are_told_with_the_right_one():
    with pytest.raises(ValueError, match="no task 'clik'.*did you mean 'click'"):
        PixEnv("clik")
    with pytest.raises(ValueError, match="no task 'zz'.*one of click, color"):
        PixEnv().reset(options={"task": "zz"})
    with pytest.raises(ValueError, match="render_mode 'human'"):
        PixEnv(render_mode="human")
    with pytest.raises(ValueError, match="max_steps 0"):
        PixEnv(max_steps=0)


def test_reward_comes_once_and_the_end_is_the_end():
    env = PixEnv("form")
    env.reset(seed=5)
    rewards, ended = [], False
    while not ended:
        _, reward, terminated, truncated, info = env.step(env.oracle_action())
        rewards.append(reward)
        ended = terminated or truncated
    assert rewards == [0.0] * (len(rewards) - 1) + [1.0]
    assert terminated and not truncated
    assert info["success"] and info["outcome"] == "solved"
    assert env.oracle_action() is None
    with pytest.raises(gymnasium.error.ResetNeeded, match="form/5 is over .solved."):
        env.step(Action(Kind.WAIT).to_dict())


@ALL
def test_limit_truncates(task):
    env = PixEnv(task)
    env.reset(seed=0)
    ends = []
    for _ in range(TASKS[task].limit):
        _, reward, terminated, truncated, info = env.step(Action(Kind.WAIT).to_dict())
        assert reward == 0 and not terminated
        ends.append(truncated)
    assert ends == [False] * (len(ends) - 1) + [True] and info["outcome"] == "limit"


def test_a_last_action_that_solves_is_no_truncation():
    env = PixEnv("click", max_steps=1)
    env.reset(seed=0)
    _, reward, terminated, truncated, _ = env.step(env.oracle_action())
    assert (reward, terminated, truncated) == (1.0, True, False)


def test_observations_are_the_callers_own():
    env = PixEnv("check")
    first, _ = env.reset(seed=2)
    kept = {name: np.copy(first[name]) for name in ("image", "instruction")}
    second, *_ = env.step(env.oracle_action())
    assert np.array_equal(first["image"], kept["image"])
    assert not np.array_equal(first["image"], second["image"])
    for name in kept:
        assert not np.shares_memory(first[name], second[name])
        second[name][:] = 0
    third, *_ = env.step(Action(Kind.WAIT).to_dict())
    assert third["image"].any() and np.array_equal(
        third["instruction"], kept["instruction"]
    )
    assert np.array_equal(env.reset(seed=2)[0]["image"], kept["image"])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"kind": 10}, "kind 10; give an integer from 0 to 9"),
        ({"kind": -1}, "kind -1"),
        ({"kind": 0.5, "xy": (0, 0)}, "kind 0.5"),
        ({"xy": (0, 0)}, "lacks its entry 'kind'"),
        ({"kind": Kind.CLICK}, "lacks its entry 'xy'"),
        ({"kind": Kind.DRAG, "xy": (0, 0)}, "lacks its entry 'to'"),
        ({"kind": Kind.CLICK, "xy": (0.5, math.nan)}, "has xy .*two numbers"),
        ({"kind": Kind.CLICK, "xy": (0.5,)}, "has xy"),
        ({"kind": Kind.CLICK, "xy": None}, "has xy None"),
        ({"kind": Kind.TYPE, "token": len(VOCABULARY)}, "has token"),
        ({"kind": Kind.TYPE_FIELD, "field": FIELDS}, "has field 4"),
        ({"kind": Kind.KEY, "key": math.inf}, "has key inf"),
    ],
)
def test_an_impossible_action_is_named_and_changes_nothing(action, message):
    env = PixEnv("form")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert env.episode.actions == 0


def test_coordinates_are_clipped_and_told():
    action, clipped = parse_action({"kind": 0, "xy": (-3, math.inf)}, 9)
    assert clipped and action.xy == (0.0, 1.0)
    env = PixEnv("click")
    env.reset(seed=0)
    assert env.step({"kind": 0, "xy": (2.0, -1.0)})[4]["clipped"]
    assert not env.step({"kind": 0, "xy": (1.0, 0.0)})[4]["clipped"]


def test_actions_survive_the_space():
    space = PixEnv().action_space
    for kind in Kind:
        action = Action(kind, (0.25, 0.75), (0.5, 0.125), 7, 2, 3)
        assert space.contains(action.to_dict())
        parsed, clipped = parse_action(action.to_dict(), len(VOCABULARY))
        assert not clipped and parsed.kind is kind
        assert all(getattr(parsed, n) == getattr(action, n) for n in ARGUMENTS[kind])
    assert str(Action(Kind.CLICK, (0.5, 0.25))) == "CLICK xy=(0.50, 0.25)"
    assert str(Action(Kind.KEY, key=1)) == "KEY key=TAB"


def test_renders_for_people():
    env = PixEnv("enter", render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    assert before.shape == (432, 384, 3) and before.dtype == np.uint8
    assert np.array_equal(before[48::6, ::6], view(env.episode))
    assert before[:48].any()  # the instruction
    env.step(Action(Kind.CLICK, (0.01, 0.99)).to_dict())
    assert not np.array_equal(env.render(), before)  # where it was
    words = PixEnv("enter", render_mode="ansi")
    words.reset(seed=0)
    text = words.render()
    assert text.startswith(words.episode.shown.text) and "button OK" in text
    assert PixEnv().render_mode is None and PixEnv().render() is None


def test_the_longest_instruction_fits_over_the_picture():
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    for text in ("W" * INSTRUCTION_CHARACTERS, "W " * (INSTRUCTION_CHARACTERS // 2)):
        ink = enlarge(black, text, None).any(-1).sum()
        assert ink == 4 * text_mask("W").sum() * text.count("W")  # none is cut


# ------------------------------------------------------------------ the same again


def digest(task: str, seeds: range) -> str:
    """Of all frames, instructions and rewards of expert and random episodes."""
    seen = hashlib.sha256()
    for seed in seeds:
        rng = Random(seed)
        episode = start(task, seed)
        while not episode.outcome:
            seen.update(view(episode).tobytes() + episode.ids.tobytes())
            action = Action(Kind(rng.randrange(9)), (rng.random(), rng.random()))
            if rng.random() < 0.7:
                action = next_action(episode, rng) or action
            seen.update(str((action, advance(episode, action))).encode())
    return seen.hexdigest()


def test_a_seed_gives_the_same_episode_in_another_process():
    here = {task: digest(task, range(3)) for task in TASKS}
    program = """
import json, sys
sys.path.insert(0, ".")
from tests.test_rl_pix import TASKS, digest
print(json.dumps({task: digest(task, range(3)) for task in TASKS}))
"""
    output = subprocess.check_output(
        [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": "7"}
    )
    assert json.loads(output.splitlines()[-1]) == here
    assert len(set(here.values())) == len(TASKS)


@ALL
def test_seeds_differ(task):
    frames = {view(start(task, seed)).tobytes() for seed in range(20)}
    texts = {start(task, seed).shown.text for seed in range(20)}
    assert len(frames) >= 5 and len(texts) >= 4


# ---------------------------------------------------------------- what is seen


def test_every_state_is_seen():
    """Whatever matters is in the picture, and looks different from anything else."""
    others = {
        Part.FIELD: ["", "CAT", "CAR"],
        Part.CHECK: [0, 1],
        Part.RADIO: [0, 1],
        Part.SLIDER: list(range(10)),
        Part.MENU: [-1, 0, 1],
        Part.LIST: [-1, 0, 1],
    }
    for part, values in others.items():
        frames = set()
        for value in values:
            for focused in (False, True):
                screen, by = a_screen()
                by[part].value = value
                screen.focus = by[part] if focused else None
                frames.add(picture(screen))
        assert len(frames) == 2 * len(values), part
    screen, by = a_screen()
    frames = {picture(screen)}
    for row in range(1, 4):
        by[Part.LIST].offset = row
        frames.add(picture(screen))
    do(screen, Kind.CLICK, by[Part.MENU])
    frames.add(picture(screen))
    by[Part.MENU].value = 0
    frames.add(picture(screen))
    screen.popup, screen.stack = None, [0, 1]
    frames.add(picture(screen))
    for left in range(5):
        screen.stack, screen.pages[0].loading = [0], left
        frames.add(picture(screen))
    assert len(frames) == 4 + 2 + 1 + 5


def picture(screen: Screen) -> bytes:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    draw(screen, image)
    return image.tobytes()


@pytest.mark.parametrize("task", ["tab", "lookup", "audit"])
def test_pages_are_told_apart_by_their_tabs(task):
    screen = start(task, 0).screen
    frames = set()
    for page in range(len(screen.pages)):
        screen.stack = [page]
        frames.add(np.frombuffer(picture(screen), np.uint8)[: 10 * SIZE * 3].tobytes())
    assert len(frames) == len(screen.pages)


# -------------------------------------------------------------------- the expert


@ALL
def test_expert_solves_every_seed_within_the_limit(task):
    most = 0
    for seed in range(150):
        rng = Random(seed) if seed % 2 else None
        episode = start(task, seed + 10**6 * (seed % 3))
        reward, actions = play(episode, rng)
        assert reward == 1.0 and episode.outcome == "solved", (task, seed)
        most = max(most, len(actions))
        for action in actions:  # as a policy with a grid of cells would say it
            for name in set(ARGUMENTS[action.kind]) & {"xy", "to"}:
                for share in getattr(action, name):
                    assert share * SIZE % CELL == CELL / 2 and 0 < share < 1
    assert most * 2 <= TASKS[task].limit


def test_expert_uses_every_kind_of_action():
    used = {
        a.kind for task in TASKS for s in range(20) for a in play(start(task, s))[1]
    }
    # Keys and scrolling up mend what others did.
    assert set(Kind) - used == {Kind.KEY, Kind.SCROLL_UP}


def test_levels_rise():
    levels = [task.level for task in TASKS.values()]
    assert levels == sorted(levels) and set(levels) == {1, 2, 3, 4, 5}
    mean = {
        level: np.mean(
            [
                len(play(start(name, seed))[1])
                for name, task in TASKS.items()
                if task.level == level
                for seed in range(10)
            ]
        )
        for level in set(levels)
    }
    assert mean[1] == 1 < mean[2] < mean[3] < mean[5]


@pytest.mark.parametrize("task", ["lookup", "audit"])
def test_expert_looks_before_it_types(task):
    """Its episodes can be imitated: what it types has been on the screen."""
    for seed in range(30):
        episode, typed, shown = start(task, seed), 0, set()
        wanted = [s for s in episode.goal.steps if isinstance(s, Want) and s.value]
        while not episode.outcome:
            screen = episode.screen
            for widget in screen.pages[screen.stack[-1]].widgets:
                rows = visible_rows(widget) if widget.part is Part.LIST else ()
                for text in (widget.text, *(widget.options[row] for row in rows)):
                    shown.update(split_words(text))
            action = next_action(episode)
            if action.kind is Kind.TYPE:
                assert {want.value for want in wanted} <= shown
                typed += 1
            advance(episode, action)
        assert typed >= len(wanted) >= 1
        assert not {want.value for want in wanted} & set(
            split_words(episode.shown.text)
        )


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(list(TASKS)), st.integers(0, 10**6), st.integers(0, 10**6))
def test_expert_mends_what_a_random_policy_did(task, seed, noise):
    rng = Random(noise)
    episode = start(task, seed, limit=400)
    for _ in range(rng.randrange(12)):
        kind = rng.choice([k for k in Kind if k is not Kind.DONE])
        point = (rng.random(), rng.random())
        end = (rng.random(), rng.random())
        advance(
            episode,
            Action(
                kind, point, end, rng.randrange(len(VOCABULARY)), 0, rng.randrange(8)
            ),
        )
        if episode.outcome:
            return
    while not episode.outcome:
        action = next_action(episode, rng)
        if action is None:
            return  # a menu cannot be emptied again, nor a site be left
        advance(episode, action)
    assert episode.outcome == "solved"


# ----------------------------------------------- the instruction has to be read


def within(successes: int, number: int, rate: float) -> bool:
    """Whether a binomial count is plausible (4.5 standard deviations, and one)."""
    spread = math.sqrt(number * rate * (1 - rate))
    return abs(successes - number * rate) <= 4.5 * spread + 1


NUMBER = 300


@ALL
def test_shuffled_instructions_are_worth_one_goal_in_many(task):
    solved = 0
    for seed in range(NUMBER):
        episode = start(task, seed, shuffled=True)
        assert np.array_equal(view(episode), view(start(task, seed)))
        play(episode)
        solved += episode.outcome == "solved"
        assert (episode.outcome == "solved") == (
            episode.goal.press == episode.shown.press
            and {s for s in episode.goal.steps if isinstance(s, Want)}
            == {s for s in episode.shown.steps if isinstance(s, Want)}
        ) or any(isinstance(s, Want) and s.quote >= 0 for s in episode.goal.steps)
    assert within(solved, NUMBER, 1 / TASKS[task].goals), (solved, NUMBER)


@ALL
def test_no_goal_is_more_frequent_than_said(task):
    counts = Counter()
    for seed in range(600):
        goal = start(task, seed).goal
        wants = [
            (step.ref, step.quote if step.quote >= 0 else step.value)
            for step in goal.steps
            if isinstance(step, Want)
        ]
        counts[goal.press, tuple(sorted(wants, key=str))] += 1
    most, blind = max(counts.values()), TASKS[task].blind
    assert most <= 600 * blind + 4 * math.sqrt(600 * blind * (1 - blind)) + 1


def blind_step(episode: Episode, guess: Episode) -> Action | None:
    """The expert on a goal drawn without the instruction, but for quoted text.

    What it copies is the instruction's own, so it carries out its guess as well as can
    be done unread.
    """
    steps = tuple(
        step._replace(value=episode.fields[step.quote])
        if isinstance(step, Want) and step.quote >= 0
        else step
        for step in guess.shown.steps
    )
    return next_step(episode.screen, guess.shown._replace(steps=steps), WORDS)


@ALL
def test_blind_policy_reaches_its_ceiling_and_no_more(task):
    solved = 0
    for seed in range(NUMBER):
        episode = start(task, seed)
        guess = start(task, seed, shuffled=True)
        while not episode.outcome:
            advance(episode, blind_step(episode, guess))
        solved += episode.outcome == "solved"
    assert within(solved, NUMBER, TASKS[task].blind), (solved, NUMBER)
    assert 1 / TASKS[task].goals <= TASKS[task].blind <= 1 / 3


def rate(task: str, action: Action, seeds: range) -> float:
    solved = 0
    for seed in seeds:
        episode = start(task, seed)
        while not episode.outcome:
            advance(episode, action)
        solved += episode.outcome == "solved"
    return solved / len(seeds)


@ALL
def test_one_action_repeated_solves_nothing_much(task):
    point, other = (34 / 64, 26 / 64), (30 / 64, 54 / 64)
    for kind in Kind:
        found = rate(task, Action(kind, point, other, WORDS["CAT"]), range(25))
        assert found <= (TASKS[task].blind if TASKS[task].level == 1 else 0.0), kind


def test_no_place_is_worth_a_fixed_click():
    places = [(x / 16, y / 16) for x in range(1, 16, 2) for y in range(1, 16, 2)]
    rates = [rate("click", Action(Kind.CLICK, p), range(60)) for p in places]
    assert 0.02 < np.mean(rates) and max(rates) < 1 / 3


# ---------------------------------------------------------------- what is drawn


@ALL
def test_pages_are_well_laid_out(task):
    for seed in range(60):
        episode = start(task, seed)
        for page in episode.screen.pages:
            pressable = [w for w in page.widgets if w.part not in PASSIVE]
            for w in page.widgets:
                assert 0 <= w.x and w.x + w.w <= SIZE, w
                assert 0 <= w.y and w.y + w.h <= SIZE, w
                assert len(w.text) * 4 - 1 <= w.w, w
            for i, w in enumerate(pressable):
                assert min(w.w, w.h) >= 7, w
                for o in pressable[:i]:
                    apart = w.x >= o.x + o.w or o.x >= w.x + w.w
                    assert apart or w.y >= o.y + o.h or o.y >= w.y + w.h, (w, o)
                for o in page.widgets:
                    if o.part is Part.LABEL:  # no text is hidden
                        apart = w.x >= o.x + o.w or o.x >= w.x + w.w
                        assert apart or w.y >= o.y + o.h or o.y >= w.y + w.h, (w, o)
        text = episode.shown.text
        assert len(text) <= INSTRUCTION_CHARACTERS
        assert len(split_words(text)) <= INSTRUCTION_WORDS
        assert UNKNOWN not in episode.ids
        assert len(episode.fields) <= FIELDS


def test_letters_are_told_apart():
    characters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?!:-"
    glyphs = {text_mask(c).tobytes() for c in characters}
    assert len(glyphs) == len(characters)
    assert not text_mask("~").any()
    assert len(set(VOCABULARY)) == len(VOCABULARY)


# ---------------------------------------------------------------- what actions do


def centre(widget: Widget) -> tuple[float, float]:
    return (widget.x + widget.w // 2) / SIZE, (widget.y + widget.h // 2) / SIZE


def do(screen: Screen, kind: Kind, widget: Widget | None = None, **entries):
    xy = (0.99, 0.99) if widget is None else centre(widget)
    return act(screen, Action(kind, xy, **entries), ("COPIED",), VOCABULARY)


def key(screen: Screen, *names: str):
    return [do(screen, Kind.KEY, key=KEYS.index(name)) for name in names][-1]


def a_screen() -> tuple[Screen, dict[Part, Widget]]:
    widgets = [
        Widget(Part.FIELD, 2, 2, 38, 9, value=""),
        Widget(Part.CHECK, 2, 12, 20, 9, "A"),
        Widget(Part.RADIO, 30, 12, 14, 9, "B"),
        Widget(Part.RADIO, 46, 12, 14, 9, "C"),
        Widget(Part.SLIDER, 2, 22, 56, 15, value=5),
        Widget(Part.MENU, 2, 38, 24, 9, value=-1, options=("X", "Y")),
        Widget(Part.LIST, 28, 38, 34, 18, value=-1, options=tuple("PQRST")),
        Widget(Part.BUTTON, 2, 54, 20, 9, "GO", effect=1),
    ]
    panel = Widget(Part.PANEL, 0, 0, 64, 64)
    dialog = Page(
        [
            panel,
            Widget(Part.BUTTON, 2, 20, 9, 9, "X", effect=CLOSE),
            Widget(Part.BUTTON, 30, 20, 20, 9, "END", effect=END),
        ],
        dialog=True,
    )
    return Screen([Page(widgets), dialog]), {w.part: w for w in widgets[::-1]}


def test_text_goes_where_the_focus_is():
    screen, by = a_screen()
    do(screen, Kind.TYPE, token=WORDS["CAT"])
    assert by[Part.FIELD].value == ""  # nothing has focus
    do(screen, Kind.CLICK, by[Part.FIELD])
    do(screen, Kind.TYPE, token=WORDS["CAT"])
    assert by[Part.FIELD].value == "CAT"
    key(screen, "BACKSPACE")
    do(screen, Kind.TYPE_FIELD, field=0)
    assert by[Part.FIELD].value == "CACOPIED" and TEXT_LIMIT == 8
    do(screen, Kind.TYPE_FIELD, field=1)  # there is no such text
    do(screen, Kind.TYPE, token=WORDS["CAT"])  # full
    assert by[Part.FIELD].value == "CACOPIED"
    do(screen, Kind.CLICK)  # on nothing: focus goes
    key(screen, "BACKSPACE")
    assert by[Part.FIELD].value == "CACOPIED"


def test_boxes_and_radio_buttons():
    screen, by = a_screen()
    second = screen.pages[0].widgets[3]
    for expected in (1, 0, 1):
        do(screen, Kind.CLICK, by[Part.CHECK])
        assert by[Part.CHECK].value == expected
    do(screen, Kind.CLICK, by[Part.RADIO])
    assert (by[Part.RADIO].value, second.value) == (1, 0)
    do(screen, Kind.CLICK, second)
    do(screen, Kind.CLICK, second)
    assert (by[Part.RADIO].value, second.value) == (0, 1)


def test_slider_by_click_drag_and_key():
    screen, by = a_screen()
    slider = by[Part.SLIDER]
    for stop in range(10):
        xy = (stop_x(slider, stop) / SIZE, centre(slider)[1])
        act(screen, Action(Kind.CLICK, xy), (), VOCABULARY)
        assert slider.value == stop
    do(screen, Kind.DRAG, slider, to=(0.0, 1.0))
    assert slider.value == 0
    key(screen, "LEFT")
    assert slider.value == 0
    key(screen, "UP", "RIGHT")
    assert slider.value == 2
    do(screen, Kind.DRAG, slider, to=(1.0, 0.0))
    key(screen, "RIGHT")
    assert slider.value == 9


def test_menu_opens_chooses_and_closes():
    screen, by = a_screen()
    menu = by[Part.MENU]
    do(screen, Kind.CLICK, menu)
    assert screen.popup is menu and menu.value == -1
    do(screen, Kind.CLICK, by[Part.CHECK])  # elsewhere: closes, and does no more
    assert screen.popup is None and by[Part.CHECK].value == 0
    do(screen, Kind.CLICK, menu)
    act(screen, Action(Kind.CLICK, (10 / 64, (47 + 12) / 64)), (), VOCABULARY)
    assert screen.popup is None and menu.value == 1
    do(screen, Kind.CLICK, menu)
    key(screen, "UP", "UP", "ENTER")
    assert screen.popup is None and menu.value == 0
    do(screen, Kind.CLICK, menu)
    do(screen, Kind.DRAG, by[Part.SLIDER], to=(0.0, 0.0))
    assert screen.popup is None and by[Part.SLIDER].value == 5


def test_list_scrolls_within_its_ends():
    screen, by = a_screen()
    listed = by[Part.LIST]
    assert (0, 1) in screen.seen and (0, 2) not in screen.seen
    do(screen, Kind.SCROLL_UP, listed)
    assert listed.offset == 0
    for expected in (1, 2, 3, 3):  # two rows show of five
        do(screen, Kind.SCROLL_DOWN, listed)
        assert listed.offset == expected
    assert (0, 4) in screen.seen
    do(screen, Kind.SCROLL_UP, by[Part.FIELD])  # not over it
    assert listed.offset == 3
    xy = (40 / 64, (listed.y + 1 + 8 + 4) / 64)
    act(screen, Action(Kind.CLICK, xy), (), VOCABULARY)
    assert listed.value == 4
    key(screen, "UP", "UP", "UP", "UP", "UP")
    assert (listed.value, listed.offset) == (0, 0)


def test_dialog_takes_all_input_until_closed():
    screen, by = a_screen()
    do(screen, Kind.CLICK, by[Part.BUTTON])
    assert screen.stack == [0, 1]
    do(screen, Kind.CLICK, by[Part.CHECK])
    assert by[Part.CHECK].value == 0
    close, end = screen.pages[1].widgets[1:]
    do(screen, Kind.CLICK, close)
    assert screen.stack == [0] and screen.focus is None
    do(screen, Kind.CLICK, by[Part.BUTTON])
    key(screen, "ESCAPE")
    assert screen.stack == [0]
    key(screen, "ESCAPE")  # the page below stays
    assert screen.stack == [0]
    do(screen, Kind.CLICK, by[Part.BUTTON])
    assert do(screen, Kind.CLICK, end) == (1, 2)
    assert do(screen, Kind.DONE) == DONE


def test_keyboard_reaches_everything():
    screen, by = a_screen()
    assert key(screen, "ENTER") is None
    key(screen, "TAB", "TAB", "ENTER")
    assert by[Part.CHECK].value == 1
    key(screen, *["TAB"] * 6, "ENTER")
    assert screen.stack == [0, 1]
    assert key(screen, "TAB", "TAB", "ENTER") == (1, 2)


def test_double_click_opens_and_a_click_selects():
    for kind, outcome in ((Kind.CLICK, ""), (Kind.DOUBLE_CLICK, "solved")):
        episode = start("open", 0)
        action = next_action(episode)
        assert action.kind is Kind.DOUBLE_CLICK
        advance(episode, action._replace(kind=kind))
        assert episode.outcome == outcome


def test_items_go_home_unless_dropped_on_a_target():
    episode = start("drag", 0)
    action = next_action(episode)
    items = [w for w in episode.screen.pages[0].widgets if w.part is Part.ITEM]
    home = [(w.x, w.y) for w in items]
    advance(episode, action._replace(to=(0.5, 0.26)))
    assert [(w.x, w.y) for w in items] == home and not any(w.value for w in items)
    advance(episode, action)
    assert sorted(bool(w.value) for w in items) == [False, True]
    moved = next(w for w in items if w.value)
    back = Action(Kind.DRAG, centre(moved), (0.5, 0.26))
    advance(episode, back)
    assert [(w.x, w.y) for w in items] == home and not any(w.value for w in items)


def test_items_share_a_target():
    episode = start("drag", 0)
    widgets = episode.screen.pages[0].widgets
    first, second = (w for w in widgets if w.part is Part.ITEM)
    target = widgets[1]
    advance(episode, Action(Kind.DRAG, centre(first), centre(target)))
    advance(episode, Action(Kind.DRAG, centre(second), centre(first)))
    assert first.value == second.value == 2
    assert second.y >= first.y + first.h


def test_looking_through_a_list_spoils_nothing():
    episode = start("audit", 0)
    advance(episode, next_action(episode))
    listed = episode.screen.pages[1].widgets[0]
    advance(episode, Action(Kind.CLICK, centre(listed)))
    assert listed.value != -1
    assert play(episode)[0] == 1.0


def test_loading_takes_no_input():
    episode = start("load", 0)
    advance(episode, next_action(episode))
    page = episode.screen.pages[episode.screen.stack[-1]]
    waits, place = page.loading, centre(page.widgets[0])
    assert waits >= 2
    for left in range(waits - 1, -1, -1):
        advance(episode, Action(Kind.CLICK, place))
        assert page.loading == left and not episode.outcome
    advance(episode, Action(Kind.CLICK, place))
    assert episode.outcome in ("solved", "failed")


@pytest.mark.parametrize("task", ["check", "choose", "enter", "form", "drag"])
def test_needless_changes_spoil_an_episode(task):
    spoiled = 0
    for seed in range(10):
        _, (*actions, last) = play(start(task, seed))
        episode = start(task, seed)
        for action in actions:
            advance(episode, action)
        rest = [w for w in episode.screen.pages[0].widgets if w.value in (0, -1, "")]
        rest = [w for w in rest if w.part in (Part.CHECK, Part.MENU, Part.ITEM)] or [
            w for w in rest if w.part is Part.FIELD
        ]
        for widget in rest[:1]:
            widget.value = "A" if widget.part is Part.FIELD else 1
            advance(episode, last)
            assert episode.outcome == "failed"
            spoiled += 1
    assert spoiled >= 3


POINT = st.tuples(st.floats(0, 1), st.floats(0, 1))
ACTIONS = st.builds(
    Action,
    st.sampled_from([k for k in Kind if k is not Kind.DONE] * 2 + [Kind.DONE]),
    POINT,
    POINT,
    st.integers(0, len(VOCABULARY) - 1),
    st.integers(0, FIELDS - 1),
    st.integers(0, len(KEYS) - 1),
)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(list(TASKS)),
    st.integers(0, 2**31),
    st.booleans(),
    st.lists(ACTIONS, min_size=30, max_size=30),
)
def test_any_actions_end_within_the_limit_and_replay(task, seed, shuffled, actions):
    env, again = PixEnv(task, shuffled=shuffled), PixEnv(task, shuffled=shuffled)
    assert same(env.reset(seed=seed)[0], again.reset(seed=seed)[0])
    total, number, ended = 0.0, 0, False
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action.to_dict())
        other, *rest = again.step(action.to_dict())
        assert same(observation, other)
        assert rest == [reward, terminated, truncated, info]
        assert env.observation_space.contains(observation)
        total, number, ended = total + reward, number + 1, terminated or truncated
        state_is_sound(env.episode)
        if ended:
            break
    assert ended and number <= TASKS[task].limit
    assert total == float(info["success"])
    assert not (terminated and truncated)


def state_is_sound(episode: Episode) -> None:
    screen = episode.screen
    assert screen.stack and all(screen.pages[p].dialog for p in screen.stack[1:])
    top = screen.pages[screen.stack[-1]]
    assert screen.focus is None or screen.focus in top.widgets
    assert screen.popup is None or screen.popup in top.widgets
    for page in screen.pages:
        assert sum(w.value for w in page.widgets if w.part is Part.RADIO) <= 1
        for w in page.widgets:
            if w.part is Part.FIELD:
                assert isinstance(w.value, str) and len(w.value) <= TEXT_LIMIT
            elif w.part in (Part.MENU, Part.LIST):
                assert -1 <= w.value < len(w.options)
                assert 0 <= w.offset < len(w.options)
            elif w.part in (Part.CHECK, Part.RADIO):
                assert w.value in (0, 1)
            elif w.part is Part.SLIDER:
                assert 0 <= w.value <= 9


# --------------------------------------------------------------------- many at once


def test_many_at_once_are_what_gymnasium_makes_of_them():
    tasks = ["click", "form", "load", "order"]
    ours = PixVectorEnv(6, tasks)
    theirs = SyncVectorEnv(
        [lambda i=i: PixEnv(tasks[i % 4]) for i in range(6)]  # type: ignore[misc]
    )
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    ours.action_space.seed(0)
    pairs = [(ours.reset(seed=9), theirs.reset(seed=9))]
    for step in range(40):
        actions = ours.oracle_actions(Random(step))
        if step % 5 == 0:
            actions = ours.action_space.sample()
        pairs.append((ours.step(actions), theirs.step(actions)))
    solved = 0
    for (mine, *rest, info), (other, *others, other_info) in pairs:
        assert same(mine, other)
        for a, b in zip(rest, others, strict=True):
            assert np.array_equal(a, b) and a.dtype == b.dtype
        assert info.keys() == other_info.keys()
        for name in info:
            assert np.array_equal(info[name], other_info[name])
        solved += int(info["success"].sum())
    assert solved > 10
    assert not np.shares_memory(pairs[-1][0][0]["image"], pairs[-2][0][0]["image"])


def test_gymnasium_makes_many():
    many = gymnasium.make_vec("jaxlab/Pix-v0", num_envs=3, task="check")
    assert isinstance(many, PixVectorEnv)
    observation, _ = many.reset(seed=[4, None, 6])
    assert observation["image"].shape == (3, SIZE, SIZE, 3)
    assert np.array_equal(observation["image"][2], view(start("check", 6)))
    with pytest.raises(ValueError, match="2 seeds for 3"):
        many.reset(seed=[1, 2])
    many.close()
