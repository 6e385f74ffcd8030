"""A small graphical interface: widgets, and what actions do to them.

A screen has pages, of which one is shown, and dialogs over it take all input while
they are open. Positions are in pixels from the upper left corner. All that can be
pressed is at least 7 by 7, so that the middle of some cell of 4 by 4 pixels lies well
within it.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxlab.rl.envs.api import KEYS, Action, Kind

SIZE = 64
"""of the screen, pixels each way"""
CELL = 4
"""the grid at whose middles the oracle points, pixels"""
ROW = 8
"""height of a line of a list or of an open menu, pixels"""
TEXT_LIMIT = 8
"""characters that a text field holds"""
STOPS = 10
"""positions of a slider, 0 to 9"""

# What pressing leads to, besides the number of a page or dialog.
END, CLOSE, NOTHING = -1, -2, -3
Ref = tuple[int, int]
"""a widget: its page, and its place on it"""
DONE: Ref = (-1, -1)
"""in place of a widget: the episode was ended by the action of that name"""


class Part(enum.Enum):
    """Kinds of widgets."""

    LABEL = "label"
    BUTTON = "button"
    ICON = "icon"
    CHECK = "checkbox"
    RADIO = "radio"
    FIELD = "field"
    SLIDER = "slider"
    TAB = "tab"
    MENU = "menu"
    LIST = "list"
    ITEM = "item"
    TARGET = "target"
    PANEL = "panel"

    __hash__ = object.__hash__  # the members' own: a hash of their names is slower


PASSIVE = (Part.LABEL, Part.TARGET, Part.PANEL)
PRESSED = (Part.BUTTON, Part.TAB, Part.ICON)


@dataclass(slots=True, eq=False)
class Widget:
    """Something on a page."""

    part: Part
    x: int
    y: int
    w: int
    h: int
    text: str = ""
    value: int | str = 0
    """of a checkbox or radio button 0 or 1, of a field its text, of a slider its stop,
    of a menu or list the row (-1: none), of an item its target from 1 (0: none)"""
    effect: int = NOTHING
    """of pressing: a page, END, CLOSE or NOTHING"""
    options: tuple[str, ...] = ()
    """rows of a menu or list"""
    offset: int = 0
    """first row of a list that shows"""
    color: int = 0
    """of COLORS from 1; 0: as the theme has it"""
    free: bool = False
    """may have any value in the end"""


@dataclass(slots=True, eq=False)
class Page:
    """What is on the screen together."""

    widgets: list[Widget]
    dialog: bool = False
    """lies over the page before it, and takes all input"""
    loading: int = 0
    """actions to wait until it shows"""


@dataclass(slots=True, eq=False)
class Screen:
    """All there is to an episode's interface; `act` changes it in place."""

    pages: list[Page]
    stack: list[int] = field(default_factory=lambda: [0])
    """pages on show, the uppermost last"""
    theme: int = 0
    focus: Widget | None = None
    popup: Widget | None = None
    """the menu that is open"""
    seen: set[Ref] = field(default_factory=set)
    """(page, -1) and (page, row of its list) that have been on show"""

    def __post_init__(self) -> None:
        self.look()

    def look(self) -> None:
        """Notes what is on show."""
        page = self.stack[-1]
        if not self.pages[page].loading:
            self.seen.add((page, -1))
            for widget in self.pages[page].widgets:
                if widget.part is Part.LIST:
                    self.seen.update((page, row) for row in visible_rows(widget))


def visible_rows(widget: Widget) -> range:
    """Rows of a list that show."""
    last = widget.offset + (widget.h - 2) // ROW
    return range(widget.offset, min(last, len(widget.options)))


def stop_x(widget: Widget, stop: int) -> int:
    """Horizontal middle of a slider's stop on the screen."""
    return widget.x + 3 + round(stop * (widget.w - 7) / (STOPS - 1))


def slider_stop(widget: Widget, x: int) -> int:
    """The stop of a slider that is nearest to a place on the screen."""
    stop = round((x - widget.x - 3) * (STOPS - 1) / (widget.w - 7))
    return min(max(stop, 0), STOPS - 1)


def popup_y(menu: Widget) -> int:
    """Where the rows of an open menu begin: under it, or over it for want of space."""
    height = ROW * len(menu.options)
    below = menu.y + menu.h
    return below if below + height <= SIZE else menu.y - height


def act(
    screen: Screen, action: Action, fields: Sequence[str], vocabulary: Sequence[str]
) -> Ref | None:
    """Carries out an action, in place.

    Args:
      screen: changed.
      action: to carry out; one that makes no sense here does nothing.
      fields: the quoted texts of the instruction.
      vocabulary: the words that `Kind.TYPE` types.

    Returns:
      What ended the episode: a widget, or DONE; None if it goes on.
    """
    kind = action.kind
    if kind is Kind.DONE:
        return DONE
    ended = None
    page = screen.pages[screen.stack[-1]]
    if page.loading:
        page.loading -= 1
    elif kind is Kind.CLICK or kind is Kind.DOUBLE_CLICK:
        ended = _click(screen, *_pixel(action.xy), kind is Kind.DOUBLE_CLICK)
    elif kind is Kind.DRAG:
        _drag(screen, page, _pixel(action.xy), _pixel(action.to))
    elif kind is Kind.TYPE:
        _type(screen, vocabulary[action.token])
    elif kind is Kind.TYPE_FIELD:
        _type(screen, fields[action.field] if action.field < len(fields) else "")
    elif kind is Kind.KEY:
        ended = _key(screen, KEYS[action.key])
    elif kind is Kind.SCROLL_UP or kind is Kind.SCROLL_DOWN:
        under = _under(page, *_pixel(action.xy))
        if under is not None and page.widgets[under].part is Part.LIST:
            widget = page.widgets[under]
            shown = (widget.h - 2) // ROW
            step = 1 - shown if kind is Kind.SCROLL_UP else shown - 1
            last = max(0, len(widget.options) - shown)
            widget.offset = min(max(0, widget.offset + step), last)
    screen.look()
    return ended


def _pixel(xy: tuple[float, float]) -> tuple[int, int]:
    return min(int(xy[0] * SIZE), SIZE - 1), min(int(xy[1] * SIZE), SIZE - 1)


def _under(page: Page, x: int, y: int, target: bool = False) -> int | None:
    """The uppermost widget at a point that takes input, or the target for items."""
    for index in range(len(page.widgets) - 1, -1, -1):
        w = page.widgets[index]
        if w.x <= x < w.x + w.w and w.y <= y < w.y + w.h:
            if (w.part is Part.TARGET) if target else (w.part not in PASSIVE):
                return index
    return None


def _click(screen: Screen, x: int, y: int, double: bool) -> Ref | None:
    menu = screen.popup
    if menu is not None:  # a click elsewhere only closes it
        row = (y - popup_y(menu)) // ROW
        if 0 <= row < len(menu.options) and menu.x <= x < menu.x + menu.w:
            menu.value = row
        screen.popup = None
        return None
    number = screen.stack[-1]
    page = screen.pages[number]
    index = _under(page, x, y)
    if index is None:
        screen.focus = None
        return None
    widget = screen.focus = page.widgets[index]
    if widget.part is Part.SLIDER:
        widget.value = slider_stop(widget, x)
    elif widget.part is Part.LIST:
        row = widget.offset + (y - widget.y - 1) // ROW
        if row in visible_rows(widget):
            widget.value = row
    elif widget.part is not Part.ICON or double:
        return _press(screen, (number, index))
    return None


def _press(screen: Screen, ref: Ref) -> Ref | None:
    """What a click does to a widget wherever it hits it, and ENTER if it has focus."""
    page = screen.pages[ref[0]]
    widget = page.widgets[ref[1]]
    if widget.part in PRESSED:
        if widget.effect == END:
            return ref
        if widget.effect == CLOSE:
            _close(screen)
        elif widget.effect >= 0:
            if screen.pages[widget.effect].dialog:
                screen.stack.append(widget.effect)
            else:
                screen.stack = [widget.effect]
            screen.focus = None
    elif widget.part is Part.CHECK:
        widget.value = 1 - int(widget.value)
    elif widget.part is Part.RADIO:
        for other in page.widgets:
            if other.part is Part.RADIO:
                other.value = int(other is widget)
    elif widget.part is Part.MENU:
        screen.popup = widget
    return None


def _close(screen: Screen) -> None:
    if len(screen.stack) > 1:
        screen.stack.pop()
        screen.focus = None


def _drag(
    screen: Screen, page: Page, start: tuple[int, int], end: tuple[int, int]
) -> None:
    if screen.popup is not None:
        screen.popup = None
        return
    index = _under(page, *start)
    if index is None:
        return
    widget = page.widgets[index]
    if widget.part is Part.SLIDER:
        screen.focus = widget
        widget.value = slider_stop(widget, end[0])
    elif widget.part is Part.ITEM:
        screen.focus = widget
        items = [w for w in page.widgets if w.part is Part.ITEM]
        targets = [w for w in page.widgets if w.part is Part.TARGET]
        row = items.index(widget)
        target = _under(page, *end, target=True)
        if target is None:  # back to where items wait
            widget.value, (widget.x, widget.y) = 0, item_home(row)
        else:
            onto = page.widgets[target]
            widget.value = targets.index(onto) + 1
            widget.x = onto.x + (onto.w - widget.w) // 2
            widget.y = onto.y + 9 + row * (widget.h + 1)


def item_home(row: int) -> tuple[int, int]:
    """Where an item waits to be dragged."""
    return 8 + 28 * row, 3


def _type(screen: Screen, text: str) -> None:
    widget = screen.focus
    if widget is not None and widget.part is Part.FIELD:
        widget.value = (str(widget.value) + text)[:TEXT_LIMIT]


def _key(screen: Screen, key: str) -> Ref | None:
    number = screen.stack[-1]
    widgets = screen.pages[number].widgets
    focus = screen.focus
    if screen.popup is not None:
        if key in ("UP", "DOWN"):
            _move(screen.popup, -1 if key == "UP" else 1)
        elif key in ("ENTER", "ESCAPE"):
            screen.popup = None
    elif key == "ESCAPE":
        _close(screen)
    elif key == "TAB":
        order = [w for w in widgets if w.part not in PASSIVE]
        if order:
            place = order.index(focus) + 1 if focus in order else 0
            screen.focus = order[place % len(order)]
    elif focus is None:
        return None
    elif key == "ENTER":
        return _press(screen, (number, widgets.index(focus)))
    elif key == "BACKSPACE" and focus.part is Part.FIELD:
        focus.value = str(focus.value)[:-1]
    elif focus.part is Part.SLIDER and key in ("UP", "DOWN", "LEFT", "RIGHT"):
        step = 1 if key in ("UP", "RIGHT") else -1
        focus.value = min(max(int(focus.value) + step, 0), STOPS - 1)
    elif focus.part in (Part.LIST, Part.MENU) and key in ("UP", "DOWN"):
        _move(focus, -1 if key == "UP" else 1)
    return None


def _move(widget: Widget, step: int) -> None:
    """Selects the row before or after, and scrolls a list to it."""
    row = min(max(int(widget.value) + step, 0), len(widget.options) - 1)
    widget.value = row
    if widget.part is Part.LIST and row not in (rows := visible_rows(widget)):
        widget.offset = row if row < rows.start else row - len(rows) + 1
