"""The expert of the embedded interface: the next action toward a goal."""

from collections import deque
from collections.abc import Mapping
from random import Random

from jaxlab.rl.envs.api import KEYS, Action, Kind
from jaxlab.rl.envs.pix_screen import (
    CELL,
    CLOSE,
    DONE,
    PRESSED,
    ROW,
    SIZE,
    Part,
    Screen,
    Widget,
    item_home,
    popup_y,
    slider_stop,
    visible_rows,
)
from jaxlab.rl.envs.pix_tasks import Goal, See, Want

Box = tuple[int, int, int, int]
"""left, top, width and height, pixels"""


def next_step(
    screen: Screen, goal: Goal, words: Mapping[str, int], rng: Random | None = None
) -> Action | None:
    """What to do now.

    Args:
      screen: as it is.
      goal: what is to be.
      words: ids of what `Kind.TYPE` types.
      rng: chooses among the cells of a widget; None: the middlemost.

    Returns:
      The action; None if there is no way any more.
    """
    if screen.pages[screen.stack[-1]].loading:
        return Action(Kind.WAIT)
    for step in goal.steps:
        number, place = step.ref
        widgets = screen.pages[number].widgets
        if isinstance(step, See):
            if step.ref in screen.seen:
                continue
            if screen.stack[-1] != number:
                return _go(screen, number, rng)
            listed = next(w for w in widgets if w.part is Part.LIST)
            return _scroll(listed, place, rng)
        if widgets[place].value != step.value:
            if screen.stack[-1] != number:
                return _go(screen, number, rng)
            return _set(screen, widgets[place], step, words, rng)
    if screen.popup is not None:
        return Action(Kind.KEY, key=KEYS.index("ESCAPE"))
    if goal.press == DONE:
        return Action(Kind.DONE)
    number, place = goal.press
    if screen.stack[-1] != number:
        return _go(screen, number, rng)
    return _press(screen.pages[number].widgets[place], rng)


def _go(screen: Screen, goal: int, rng: Random | None) -> Action | None:
    """Toward a page, by the fewest presses."""
    if screen.popup is not None:
        return Action(Kind.KEY, key=KEYS.index("ESCAPE"))
    top = screen.stack[-1]
    ways: deque[tuple[int, Widget | None]] = deque([(top, None)])
    visited = {top}
    while ways:
        number, first = ways.popleft()
        for widget in screen.pages[number].widgets:
            to = widget.effect
            if to == CLOSE and number == top and len(screen.stack) > 1:
                to = screen.stack[-2]
            if widget.part in PRESSED and to >= 0 and to not in visited:
                if to == goal:
                    return _press(first or widget, rng)
                visited.add(to)
                ways.append((to, first or widget))
    return None


def _press(widget: Widget, rng: Random | None) -> Action:
    kind = Kind.DOUBLE_CLICK if widget.part is Part.ICON else Kind.CLICK
    return Action(kind, _aim(_box(widget), rng))


def _set(
    screen: Screen,
    widget: Widget,
    want: Want,
    words: Mapping[str, int],
    rng: Random | None,
) -> Action | None:
    """Toward the value that a widget of the page on show is to have."""
    value = want.value
    if screen.popup is not None and screen.popup is not widget:
        return Action(Kind.KEY, key=KEYS.index("ESCAPE"))
    if widget.part is Part.CHECK or (widget.part is Part.RADIO and value):
        return _press(widget, rng)
    if widget.part is Part.FIELD:
        if screen.focus is not widget:
            return _press(widget, rng)
        rest = str(value).removeprefix(has := str(widget.value))
        if not str(value).startswith(has):
            return Action(Kind.KEY, key=KEYS.index("BACKSPACE"))
        if want.quote >= 0 and not has:
            return Action(Kind.TYPE_FIELD, field=want.quote)
        return Action(Kind.TYPE, token=words[rest if rest in words else rest[0]])
    if widget.part is Part.SLIDER:
        x, y, w, h = _box(widget)
        at = [place for place in range(x, x + w) if slider_stop(widget, place) == value]
        return Action(Kind.CLICK, _aim((at[0] - 1, y, len(at) + 2, h), rng))
    if widget.part is Part.MENU and int(value) >= 0:
        if screen.popup is not widget:
            return _press(widget, rng)
        row = popup_y(widget) + ROW * int(value)
        return Action(Kind.CLICK, _aim((widget.x, row, widget.w, ROW), rng))
    if widget.part is Part.LIST and int(value) >= 0:
        if int(value) not in visible_rows(widget):
            return _scroll(widget, int(value), rng)
        row = widget.y + 1 + ROW * (int(value) - widget.offset)
        return Action(Kind.CLICK, _aim((widget.x, row, widget.w, ROW), rng))
    if widget.part is Part.ITEM:
        widgets = screen.pages[screen.stack[-1]].widgets
        targets = [w for w in widgets if w.part is Part.TARGET]
        items = [w for w in widgets if w.part is Part.ITEM]
        home = (*item_home(items.index(widget)), widget.w, widget.h)
        end = _box(targets[int(value) - 1]) if value else home
        return Action(Kind.DRAG, _aim(_box(widget), rng), _aim(end, rng))
    return None


def _scroll(widget: Widget, row: int, rng: Random | None) -> Action:
    kind = Kind.SCROLL_UP if row < widget.offset else Kind.SCROLL_DOWN
    return Action(kind, _aim(_box(widget), rng))


def _box(widget: Widget) -> Box:
    return widget.x, widget.y, widget.w, widget.h


def _aim(box: Box, rng: Random | None) -> tuple[float, float]:
    """The middle of a cell within a box, a pixel from its edges; in shares."""
    return _middle(box[0], box[2], rng), _middle(box[1], box[3], rng)


def _middle(start: int, length: int, rng: Random | None) -> float:
    first = -(-(start + 1 - CELL // 2) // CELL)
    last = (start + length - 2 - CELL // 2) // CELL
    cell = (first + last) // 2 if rng is None else rng.randint(first, last)
    return (cell * CELL + CELL // 2) / SIZE
