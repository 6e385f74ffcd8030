"""Pixels of the small graphical interface, and its description in words.

Letters are 3 by 5 pixels. Widgets are drawn once for each state that they are seen in;
a frame is put together from these pictures.
"""

import textwrap
from functools import lru_cache

import numpy as np

from jaxlab.rl.envs.pix_screen import (
    PASSIVE,
    PRESSED,
    ROW,
    SIZE,
    Part,
    Screen,
    Widget,
    popup_y,
    stop_x,
    visible_rows,
)

_GLYPHS = (
    "A25755 B65656 C34443 D65556 E74647 F74644 G34553 H55755 I72227 J11152 K55655 "
    "L44447 M57755 N65555 O25552 P65644 Q25573 R65655 S34216 T72222 U55557 V55552 "
    "W55775 X55255 Y55222 Z71247 075557 126227 261247 361216 455711 574616 634757 "
    '771122 875757 975716 -00700 ?61202 :02020 .00002 ,00024 !22202 "55000'
)
"""a character, and of each of its five rows three pixels as an octal digit"""
COLORS = {
    "RED": (208, 40, 40),
    "GREEN": (40, 160, 60),
    "BLUE": (40, 80, 208),
    "YELLOW": (232, 208, 40),
    "PURPLE": (144, 48, 176),
    "BLACK": (16, 16, 16),
}
_SWATCHES = ((0, 0, 0), *COLORS.values())
_WHITE = (255, 255, 255)
# Background, face of buttons, ink, lines, accent.
THEMES = (
    ((236, 236, 236), (255, 255, 255), (16, 16, 16), (128, 128, 128), (48, 112, 208)),
    ((216, 228, 240), (248, 252, 255), (16, 24, 56), (96, 120, 152), (208, 88, 32)),
    ((240, 232, 216), (255, 250, 236), (56, 32, 16), (160, 128, 96), (32, 128, 96)),
    ((44, 48, 56), (72, 78, 90), (236, 236, 236), (120, 128, 140), (240, 176, 48)),
)
_PAPERS = tuple(np.full((SIZE, SIZE, 3), theme[0], np.uint8) for theme in THEMES)


@lru_cache
def _font() -> dict[str, np.ndarray]:
    return {
        glyph[0]: np.array([[int(d) >> s & 1 for s in (2, 1, 0)] for d in glyph[1:]])
        for glyph in _GLYPHS.split()
    }


@lru_cache(maxsize=4096)
def text_mask(text: str) -> np.ndarray:
    """Where the ink of a text is: bool [5, 4 * len(text)].

    Characters that the font lacks are blank.
    """
    mask = np.zeros((5, 4 * len(text)), bool)
    for place, character in enumerate(text):
        glyph = _font().get(character)
        if glyph is not None:
            mask[:, 4 * place : 4 * place + 3] = glyph
    return mask


def text_width(text: str) -> int:
    """Pixels that a text takes, without a margin."""
    return 4 * len(text) - 1


def _write(
    image: np.ndarray, x: int, y: int, text: str, ink: tuple[int, int, int]
) -> None:
    """Puts text on an image, cut at its edges."""
    part = image[y : y + 5, x:]
    mask = text_mask(text)[: part.shape[0], : part.shape[1]]
    part[: mask.shape[0], : mask.shape[1]][mask] = ink


def _framed(
    h: int, w: int, line: tuple[int, int, int], face: tuple[int, int, int]
) -> np.ndarray:
    image = np.full((h, w, 3), line, np.uint8)
    image[1:-1, 1:-1] = face
    return image


@lru_cache(maxsize=2048)
def _sprite(
    part: Part,
    w: int,
    h: int,
    text: str,
    value: int | str,
    options: tuple[str, ...],
    offset: int,
    color: int,
    focused: bool,
    theme: int,
) -> np.ndarray:
    """A widget's picture: uint8 [h, w, 3]. Not to be written to."""
    paper, face, ink, line, accent = THEMES[theme]
    edge = accent if focused else line
    middle = (h - 5) // 2
    if part is Part.BUTTON:
        image = _framed(h, w, edge, _SWATCHES[color] if color else face)
        _write(image, (w - text_width(text)) // 2, middle, text, ink)
    elif part is Part.PANEL:
        image = _framed(h, w, ink, paper)
        _write(image, 3, 3, text, ink)
    elif part is Part.TARGET:
        image = _framed(h, w, line, paper)
        _write(image, (w - text_width(text)) // 2, 2, text, ink)
    elif part is Part.ITEM:
        image = _framed(h, w, ink, accent)
        _write(image, (w - text_width(text)) // 2, middle, text, _WHITE)
    elif part is Part.ICON:
        image = np.full((h, w, 3), paper, np.uint8)
        left = w // 2 - 5
        image[0:2, left : left + 5] = edge
        image[2:8, left : left + 11] = edge
        image[3:7, left + 1 : left + 10] = face
        _write(image, (w - text_width(text)) // 2, h - 5, text, ink)
    elif part is Part.TAB:
        image = _framed(h, w, line, paper if value else face)
        if value:
            image[0] = accent
            image[-1] = paper
        _write(image, (w - text_width(text)) // 2, middle, text, ink)
    elif part is Part.FIELD:
        image = _framed(h, w, edge, face)
        _write(image, 2, middle, str(value), ink)
        caret = 2 + 4 * len(str(value))
        if focused and caret < w - 1:
            image[2:-2, caret] = accent
    elif part is Part.MENU:
        image = _framed(h, w, edge, face)
        _write(image, 2, middle, options[int(value)] if int(value) >= 0 else "-", ink)
        for row in range(3):
            image[middle + 1 + row, w - 7 + row : w - 2 - row] = line
    elif part is Part.LIST:
        image = _framed(h, w, edge, face)
        shown = (h - 2) // ROW
        for place, row in enumerate(range(offset, min(offset + shown, len(options)))):
            top = 1 + ROW * place
            if row == value:
                image[top : top + ROW, 1:-1] = accent
            _write(image, 3, top + 1, options[row], _WHITE if row == value else ink)
        if shown < len(options):
            start = 1 + (h - 2) * offset // len(options)
            image[1:-1, -4:-1] = paper
            image[start : start + (h - 2) * shown // len(options), -4:-1] = line
    else:
        image = np.full((h, w, 3), paper, np.uint8)
        if part is Part.SLIDER:
            image[h - 5, 2:-2] = line
            knob = stop_x(Widget(part, 0, 0, w, h), int(value))
            image[h - 8 : h - 1, knob - 1 : knob + 2] = edge if focused else ink
            _write(image, w // 2 - 1, 0, str(value), ink)
        elif part is Part.LABEL:
            _write(image, 0, middle, text, ink)
        else:  # a checkbox or radio button
            top = (h - 7) // 2
            image[top : top + 7, 0:7] = edge
            image[top + 1 : top + 6, 1:6] = face
            if part is Part.RADIO:
                image[top : top + 7 : 6, 0:7:6] = paper
            if value:
                image[top + 2 : top + 5, 2:5] = accent
            _write(image, 10, middle, text, ink)
    image.flags.writeable = False
    return image


def draw(screen: Screen, image: np.ndarray) -> None:
    """Draws the screen.

    Args:
      screen: what to draw.
      image: uint8 [64, 64, 3], overwritten.
    """
    theme, focus = screen.theme, screen.focus
    image[:] = _PAPERS[theme]
    for number in screen.stack:
        page = screen.pages[number]
        if page.loading:
            _write(image, 18, 24, "LOADING", THEMES[theme][2])
            image[34:38, 16 : 48 - 5 * page.loading] = THEMES[theme][4]
            continue
        for w in page.widgets:
            image[w.y : w.y + w.h, w.x : w.x + w.w] = _sprite(
                w.part,
                w.w,
                w.h,
                w.text,
                w.value,
                w.options,
                w.offset,
                w.color,
                w is focus,
                theme,
            )
    menu = screen.popup
    if menu is not None:
        top, height = popup_y(menu), ROW * len(menu.options)
        image[top : top + height, menu.x : menu.x + menu.w] = _sprite(
            Part.LIST,
            menu.w,
            height + 2,
            "",
            menu.value,
            menu.options,
            0,
            0,
            True,
            theme,
        )[1:-1]


def enlarge(
    image: np.ndarray, text: str, pointer: tuple[float, float] | None
) -> np.ndarray:
    """A frame for people: six times the size, under the instruction.

    Args:
      image: uint8 [64, 64, 3].
      text: the instruction.
      pointer: where a cross is drawn, in shares of the screen.

    Returns:
      uint8 [432, 384, 3].
    """
    scale, strip = 6, 48
    large = np.zeros((strip + scale * SIZE, scale * SIZE, 3), np.uint8)
    for row, line in enumerate(textwrap.wrap(text, 46)[:3]):
        mask = text_mask(line).repeat(2, 0).repeat(2, 1)
        top = 4 + 15 * row
        large[top : top + mask.shape[0], 6 : 6 + mask.shape[1]][mask] = _WHITE
    screen = large[strip:]
    screen[:] = image.repeat(scale, 0).repeat(scale, 1)
    if pointer is not None:
        x, y = (min(int(p * SIZE), SIZE - 1) * scale + scale // 2 for p in pointer)
        for color, half in (((0, 0, 0), 2), ((255, 0, 96), 1)):
            screen[max(0, y - half) : y + half, max(0, x - 10) : x + 10] = color
            screen[max(0, y - 10) : y + 10, max(0, x - half) : x + half] = color
    return large


def describe(screen: Screen) -> str:
    """The screen in words, a line for each widget or page that loads."""
    lines = []
    for number in screen.stack:
        page = screen.pages[number]
        if page.loading:
            lines.append(f"loading, {page.loading} more")
            continue
        for w in page.widgets:
            words = [w.part.value, w.text]
            if w.part not in (*PASSIVE, *PRESSED):
                chosen = w.value
                if w.options:
                    chosen = w.options[int(chosen)] if int(chosen) >= 0 else "-"
                words.append(f"= {chosen}")
            if w.part is Part.LIST:
                words.append(" ".join(w.options[row] for row in visible_rows(w)))
            if w is screen.popup:
                words.append("open: " + " ".join(w.options))
            if w is screen.focus:
                words.append("(focus)")
            if w.color:
                words.append(tuple(COLORS)[w.color - 1])
            lines.append(" ".join(word for word in words if word))
    return "\n".join(lines)
