"""The tasks of the embedded interface, from one press to forms over several screens.

A task draws a screen, and a goal on it, from two streams of random numbers: so the
same screen has many equally likely goals, and only the instruction tells which is
meant. Hence two exact figures for each task: how often one succeeds who carries out
the instruction of another goal (`1 / goals`), and how often one can who never reads it
(`blind`; it may copy quoted text, for that needs no reading).
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from jaxlab.rl.envs.pix_draw import COLORS, text_width
from jaxlab.rl.envs.pix_screen import (
    CLOSE,
    DONE,
    END,
    SIZE,
    STOPS,
    Page,
    Part,
    Ref,
    Widget,
    item_home,
)

CORE = ("CAT", "DOG", "SUN", "FIG", "STAR", "MOON", "APPLE", "TRAIN")
"""the words of the easier tasks"""
WORDS = (
    *CORE,
    *("HAT", "KEY", "MAP", "BOX", "PEN", "CUP", "FISH", "BIRD"),
    *("LAKE", "ROCK", "RAIN", "SNOW", "TREE", "LEAF", "COIN", "DRUM"),
)
SHORT = tuple(word for word in WORDS if len(word) <= 4)
LABELS = ("NAME", "TOWN", "FOOD", "PET", "JOB", "CLUB")
SIZES = ("BIG", "MID", "TINY")
TABS = ("ONE", "TWO", "SIX")
RECORDS = ("FORM", "INFO")
COUNTS = tuple(range(STOPS))
_SPOKEN = (
    *("PRESS", "THE", "OPEN", "CHECK", "AND", "TYPE", "IN", "PICK", "SET", "LEVEL"),
    *("TO", "CHOOSE", "SELECT", "DRAG", "SIZE", "NEWS", "NO", "DELETE", "CLOSE"),
    *("AD", "WAIT", "CODE", "CODES", "OF", "WITH", "FOR"),
)
VOCABULARY = (
    *("", "?"),  # PAD and UNKNOWN
    *"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",  # to spell what has no word
    '"',
    *(*_SPOKEN, *COLORS, *LABELS, *SIZES, *TABS, *WORDS),
)
"""words of instructions, and what `Kind.TYPE` types"""
INSTRUCTION_WORDS, INSTRUCTION_CHARACTERS = 16, 64


class Want(NamedTuple):
    """A widget is to have a value."""

    ref: Ref
    value: int | str
    quote: int = -1
    """quoted text of the instruction that this is, if any"""


class See(NamedTuple):
    """A page, or a row of the list on it, has to be looked at."""

    ref: Ref
    """the page, and the row or -1"""


class Goal(NamedTuple):
    """What is to be done."""

    text: str
    """the instruction"""
    press: Ref
    """what ends the episode well, once all else is right; maybe DONE"""
    steps: tuple[Want | See, ...] = ()
    """in the order in which one would go"""


class Scene(NamedTuple):
    """A task as drawn."""

    pages: list[Page]
    goal: Goal
    stack: tuple[int, ...] = (0,)
    """pages on show at the start"""


class Task(NamedTuple):
    """A family of episodes."""

    level: int
    """of difficulty: 1 one action, 2 one widget and OK, 3 several widgets or screens,
    4 what was seen must be remembered, 5 both"""
    limit: int
    """actions; then the episode is truncated"""
    goals: int
    """equally likely ones on a screen"""
    blind: float
    """highest rate of success without the instruction"""
    build: Callable[[Random, Random], Scene]
    """from the random numbers of the screen, and those of the goal"""


# ------------------------------------------------------------------------ widgets


def _button(x: int, y: int, text: str, effect: int = END) -> Widget:
    return Widget(Part.BUTTON, x, y, text_width(text) + 6, 9, text, effect=effect)


def _ok(layout: Random, text: str = "OK", effect: int = END) -> Widget:
    width = text_width(text) + 9
    x = layout.randint(3, 61 - width)
    return Widget(Part.BUTTON, x, 51, width, 11, text, effect=effect)


def _label(x: int, y: int, text: str) -> Widget:
    return Widget(Part.LABEL, x, y, text_width(text), 9, text)


def _labels(x: int, rows: Sequence[int], texts: Sequence[str]) -> list[Widget]:
    return [_label(x, y, text) for y, text in zip(rows, texts, strict=True)]


def _table(layout: Random, keys: Sequence[str], values: Sequence[str]) -> list[Widget]:
    """Labels that say which value a key has."""
    return [
        _label(layout.randint(3, 20), 13 + 13 * row, f"{key} {value}")
        for row, (key, value) in enumerate(zip(keys, values, strict=True))
    ]


def _field(y: int) -> Widget:
    return Widget(Part.FIELD, 22, y, 38, 9, value="")


def _menu(y: int, options: Sequence[str]) -> Widget:
    return Widget(Part.MENU, 22, y, 38, 10, value=-1, options=tuple(options))


def _scattered(
    layout: Random, texts: Sequence[str], effects: Sequence[int], top: int = 2
) -> list[Widget]:
    """Buttons somewhere, none over another."""
    rows = layout.sample(range((SIZE - 1 - top) // 12), len(texts))
    return [
        _button(
            layout.randint(1, 57 - text_width(text)),
            top + 12 * row + layout.randrange(3),
            text,
            effect,
        )
        for row, text, effect in zip(rows, texts, effects, strict=True)
    ]


def _options(layout: Random, part: Part, words: Sequence[str]) -> list[Widget]:
    """Checkboxes or radio buttons, in rows above OK."""
    pitch = 48 // len(words)
    return [
        Widget(
            part,
            layout.randint(2, 50 - text_width(word)),
            1 + pitch * row + layout.randrange(pitch - 9),
            text_width(word) + 11,
            9,
            word,
        )
        for row, word in enumerate(words)
    ]


def _tabs(names: Sequence[str], current: int) -> list[Widget]:
    width = 60 // len(names)
    return [
        Widget(Part.TAB, 2 + width * i, 0, width, 10, name, int(i == current), effect=i)
        for i, name in enumerate(names)
    ]


def _confirm(layout: Random, text: str) -> Page:
    """A dialog, whose widgets 1 and 2 are YES and NO."""
    left, right = layout.sample((9, 36), 2)
    y = layout.randint(10, 26)
    panel = Widget(Part.PANEL, 4, y, 56, 32, text)
    return Page(
        [panel, _button(left, y + 18, "YES"), _button(right, y + 18, "NO", CLOSE)],
        dialog=True,
    )


def _subset(number: int, words: Sequence[str]) -> str:
    return " AND ".join(word for i, word in enumerate(words) if number >> i & 1)


# --------------------------------------------------------------- level 1: one action


def _click(layout: Random, goal: Random) -> Scene:
    words = layout.sample(CORE, 3)
    which = goal.randrange(3)
    page = Page(_scattered(layout, words, (END,) * 3))
    return Scene([page], Goal(f"PRESS {words[which]}", (0, which)))


def _color(layout: Random, goal: Random) -> Scene:
    names = layout.sample(tuple(COLORS), 4)
    which = goal.randrange(4)
    widgets = [
        Widget(
            Part.BUTTON,
            2 + 31 * (i % 2) + layout.randrange(17),
            2 + 31 * (i // 2) + layout.randrange(17),
            13,
            13,
            effect=END,
            color=tuple(COLORS).index(name) + 1,
        )
        for i, name in enumerate(names)
    ]
    return Scene([Page(widgets)], Goal(f"PRESS THE {names[which]} BOX", (0, which)))


def _open(layout: Random, goal: Random) -> Scene:
    words = layout.sample(CORE, 3)
    which = goal.randrange(3)
    widgets = [
        Widget(
            Part.ICON,
            layout.randint(2, 61 - max(11, text_width(word))),
            1 + 21 * row + layout.randrange(6),
            max(11, text_width(word)),
            15,
            word,
            effect=END,
        )
        for row, word in enumerate(words)
    ]
    return Scene([Page(widgets)], Goal(f"OPEN {words[which]}", (0, which)))


# -------------------------------------------------------- level 2: one widget, and OK


def _check(layout: Random, goal: Random) -> Scene:
    words = layout.sample(CORE, 3)
    chosen = goal.randrange(1, 8)
    widgets = [*_options(layout, Part.CHECK, words), _ok(layout)]
    wants = tuple(Want((0, i), 1) for i in range(3) if chosen >> i & 1)
    text = f"CHECK {_subset(chosen, words)}"
    return Scene([Page(widgets)], Goal(text, (0, 3), wants))


def _enter(layout: Random, goal: Random) -> Scene:
    labels = layout.sample(LABELS, 3)
    which, word = goal.randrange(3), goal.choice(CORE)
    rows = [3 + 15 * row + layout.randrange(4) for row in range(3)]
    widgets = [*map(_field, rows), _ok(layout), *_labels(3, rows, labels)]
    text = f'TYPE "{word}" IN {labels[which]}'
    return Scene([Page(widgets)], Goal(text, (0, 3), (Want((0, which), word, 0),)))


def _radio(layout: Random, goal: Random) -> Scene:
    words = layout.sample(CORE, 4)
    which = goal.randrange(4)
    widgets = [*_options(layout, Part.RADIO, words), _ok(layout)]
    text = f"PICK {words[which]}"
    return Scene([Page(widgets)], Goal(text, (0, 4), (Want((0, which), 1),)))


def _slider(layout: Random, goal: Random) -> Scene:
    start, y = layout.choice(COUNTS), layout.randint(12, 30)
    level = goal.choice([count for count in COUNTS if count != start])
    widgets = [
        Widget(Part.SLIDER, 4, y, 56, 15, value=start),
        _ok(layout),
        _label(5, y - 10, "LEVEL"),
    ]
    text = f"SET LEVEL TO {level}"
    return Scene([Page(widgets)], Goal(text, (0, 1), (Want((0, 0), level),)))


def _choose(layout: Random, goal: Random) -> Scene:
    labels, words = layout.sample(LABELS, 2), layout.sample(WORDS, 6)
    menu, row = goal.randrange(2), goal.randrange(3)
    rows = [layout.randint(2, 10), layout.randint(24, 34)]
    widgets = [_menu(rows[i], words[3 * i : 3 * i + 3]) for i in range(2)]
    widgets += [_ok(layout), *_labels(3, rows, labels)]
    text = f"CHOOSE {words[3 * menu + row]} IN {labels[menu]}"
    return Scene([Page(widgets)], Goal(text, (0, 2), (Want((0, menu), row),)))


def _tab(layout: Random, goal: Random) -> Scene:
    names, words = layout.sample(TABS, 3), layout.sample(WORDS, 2)
    page, which = goal.randrange(3), goal.randrange(2)
    pages = [
        Page(_scattered(layout, words, (END, END), top=13) + _tabs(names, i))
        for i in range(3)
    ]
    return Scene(pages, Goal(f"PRESS {words[which]} IN {names[page]}", (page, which)))


def _scroll(layout: Random, goal: Random) -> Scene:
    words = tuple(layout.sample(WORDS, 10))
    row, y = goal.randrange(10), layout.randint(2, 14)
    listed = Widget(Part.LIST, 4, y, 56, 34, value=-1, options=words)
    wanted = Goal(f"SELECT {words[row]}", (0, 1), (Want((0, 0), row),))
    return Scene([Page([listed, _ok(layout)])], wanted)


def _drag(layout: Random, goal: Random) -> Scene:
    words = layout.sample(SHORT, 5)
    item, target = goal.randrange(2), goal.randrange(3)
    y = layout.randint(22, 33)
    widgets = [
        Widget(Part.TARGET, 1 + 21 * i, y, 20, 30, word)
        for i, word in enumerate(words[2:])
    ]
    for i in range(2):
        widgets.append(Widget(Part.ITEM, *item_home(i), 19, 9, words[i]))
    text = f"DRAG {words[item]} TO {words[2 + target]}"
    wants = (Want((0, 3 + item), target + 1),)
    return Scene([Page(widgets)], Goal(text, DONE, wants))


# --------------------------------------------- level 3: several widgets, or screens


def _form(layout: Random, goal: Random) -> Scene:
    labels, sizes = layout.sample(LABELS, 2), layout.sample(SIZES, 3)
    words, size, news = goal.sample(CORE, 2), goal.randrange(3), goal.randrange(2)
    first = goal.randrange(2)  # of the fields, in the instruction
    widgets = [
        _field(2),
        _field(13),
        _menu(24, sizes),
        Widget(Part.CHECK, layout.randint(3, 34), 37, 27, 9, "NEWS"),
        _ok(layout, "SAVE"),
        *_labels(3, (2, 13, 24), (*labels, "SIZE")),
    ]
    order = (first, 1 - first)
    clauses = [
        " ".join(f'{labels[i]} "{words[i]}"' for i in order),
        f"SIZE {sizes[size]}",
        "CHECK NEWS" if news else "NO NEWS",
    ]
    goal.shuffle(clauses)
    wants = (
        *(Want((0, i), words[i], order.index(i)) for i in range(2)),
        Want((0, 2), size),
        Want((0, 3), news),
    )
    return Scene([Page(widgets)], Goal(" ".join(clauses), (0, 4), wants))


def _delete(layout: Random, goal: Random) -> Scene:
    words = layout.sample(WORDS, 3)
    which = goal.randrange(3)
    rows = [4 + 20 * row + layout.randrange(8) for row in range(3)]
    x = layout.randint(30, 42)
    widgets = [_button(x, y, "DEL", 1 + i) for i, y in enumerate(rows)]
    widgets += _labels(5, rows, words)
    dialogs = [_confirm(layout, f"DELETE {word}") for word in words]
    return Scene(
        [Page(widgets), *dialogs], Goal(f"DELETE {words[which]}", (1 + which, 1))
    )


def _popup(layout: Random, goal: Random) -> Scene:
    words = layout.sample(WORDS, 3)
    which = goal.randrange(3)
    x, y = layout.randint(1, 15), layout.randint(1, 21)
    corner = layout.choice((x + 1, x + 38))
    ad = Page(
        [
            Widget(Part.PANEL, x, y, 48, 40),
            Widget(Part.BUTTON, corner, y + 1, 9, 9, "X", effect=CLOSE),
            _label(x + 16, y + 6, "WIN"),
            _button(x + layout.randint(2, 20), y + 24, layout.choice(words)),
        ],
        dialog=True,
    )
    page = Page(_scattered(layout, words, (END,) * 3))
    text = f"CLOSE THE AD AND PRESS {words[which]}"
    return Scene([page, ad], Goal(text, (0, which)), (0, 1))


def _load(layout: Random, goal: Random) -> Scene:
    sites, words = layout.sample(WORDS, 3), layout.sample(WORDS, 3)
    site, which = goal.randrange(3), goal.randrange(3)
    pages = [Page(_scattered(layout, sites, (1, 2, 3)))]
    for _ in range(3):
        widgets = _scattered(layout, words, (END,) * 3)
        pages.append(Page(widgets, loading=layout.randint(2, 4)))
    text = f"OPEN {sites[site]} WAIT AND PRESS {words[which]}"
    return Scene(pages, Goal(text, (1 + site, which)))


# ------------------------------------------------ levels 4 and 5: to be remembered


def _lookup(layout: Random, goal: Random) -> Scene:
    names, codes = layout.sample(WORDS[8:], 3), layout.sample(CORE, 3)
    which = goal.randrange(3)
    y = layout.randint(14, 34)
    form = [_field(y), _ok(layout), _label(3, y, "CODE"), *_tabs(RECORDS, 0)]
    info = _table(layout, names, codes) + _tabs(RECORDS, 1)
    text = f"TYPE THE CODE OF {names[which]}"
    steps = (See((1, -1)), Want((0, 0), codes[which]))
    return Scene([Page(form), Page(info)], Goal(text, (0, 1), steps))


def _recall(layout: Random, goal: Random) -> Scene:
    names, codes = layout.sample(WORDS[8:], 3), layout.sample(CORE, 3)
    which = goal.randrange(3)
    pages = [
        Page([_ok(layout, "NEXT", 1), *_table(layout, names, codes)]),
        Page(_scattered(layout, codes, (END,) * 3)),
    ]
    return Scene(pages, Goal(f"PRESS THE CODE OF {names[which]}", (1, which)))


def _order(layout: Random, goal: Random) -> Scene:
    sizes, words = layout.sample(SIZES, 3), layout.sample(WORDS, 3)
    start, y = layout.choice(COUNTS), layout.randint(2, 26)
    size, chosen, name = goal.randrange(3), goal.randrange(1, 8), goal.choice(CORE)
    level = goal.choice([count for count in COUNTS if count != start])
    pages = [
        Page([_menu(y, sizes), _ok(layout, "NEXT", 1), _label(3, y, "SIZE")]),
        Page(
            _options(layout, Part.CHECK, words)
            + [_button(38, 52, "NEXT", 2), _button(3, 52, "BACK", 0)]
        ),
        Page(
            [
                _field(4),
                Widget(Part.SLIDER, 4, layout.randint(18, 32), 56, 15, value=start),
                _button(42, 52, "PAY", 3),
                _button(3, 52, "BACK", 1),
                _label(3, 4, "FOR"),
            ]
        ),
        _confirm(layout, "PAY NOW?"),
    ]
    extras = _subset(chosen, words)
    text = f'SIZE {sizes[size]} WITH {extras} FOR "{name}" LEVEL {level}'
    wants = (
        Want((0, 0), size),
        *(Want((1, i), chosen >> i & 1) for i in range(3)),
        Want((2, 0), name, 0),
        Want((2, 1), level),
    )
    return Scene(pages, Goal(text, (3, 1), wants))


def _audit(layout: Random, goal: Random) -> Scene:
    names, codes = layout.sample(WORDS, 8), layout.sample(range(10, 100), 8)
    first, second = goal.sample(range(8), 2)
    rows = [15 + layout.randrange(3), 31 + layout.randrange(3)]
    form = [*map(_field, rows), _ok(layout), *_labels(3, rows, ("1ST", "2ND"))]
    table = tuple(f"{n} {code}" for n, code in zip(names, codes, strict=True))
    listed = Widget(Part.LIST, 4, 15, 56, 42, value=-1, options=table, free=True)
    steps = (
        See((1, first)),
        See((1, second)),
        Want((0, 0), str(codes[first])),
        Want((0, 1), str(codes[second])),
    )
    text = f"TYPE THE CODES OF {names[first]} AND {names[second]}"
    pages = [Page(form + _tabs(RECORDS, 0)), Page([listed, *_tabs(RECORDS, 1)])]
    return Scene(pages, Goal(text, (0, 2), steps))


TASKS: dict[str, Task] = {
    "click": Task(1, 8, 3, 1 / 3, _click),
    "color": Task(1, 8, 4, 1 / 4, _color),
    "open": Task(1, 8, 3, 1 / 3, _open),
    "check": Task(2, 12, 7, 1 / 7, _check),
    "enter": Task(2, 12, 24, 1 / 3, _enter),
    "radio": Task(2, 12, 4, 1 / 4, _radio),
    "slider": Task(2, 12, 9, 1 / 9, _slider),
    "choose": Task(2, 12, 6, 1 / 6, _choose),
    "tab": Task(2, 12, 6, 1 / 6, _tab),
    "scroll": Task(2, 12, 10, 1 / 10, _scroll),
    "drag": Task(2, 12, 6, 1 / 6, _drag),
    "form": Task(3, 20, 336, 1 / 12, _form),
    "delete": Task(3, 20, 3, 1 / 3, _delete),
    "popup": Task(3, 20, 3, 1 / 3, _popup),
    "load": Task(3, 20, 9, 1 / 9, _load),
    "lookup": Task(4, 20, 3, 1 / 3, _lookup),
    "recall": Task(4, 20, 3, 1 / 3, _recall),
    "order": Task(5, 30, 1512, 1 / 189, _order),
    "audit": Task(5, 30, 56, 1 / 56, _audit),
}
"""by name, in order of difficulty"""
