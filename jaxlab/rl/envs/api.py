"""What all GUI environments share: actions, spaces, and instructions as numbers.

A policy sees an image and an instruction, and answers with one action. Coordinates
are shares of the screen, so that they hold at any size. Text that stands in quotes in
the instruction is typed by its number (`TYPE_FIELD`): a policy that copies needs no
word for what it copies.
"""

import enum
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

FIELDS = 4
"""quoted texts of an instruction that `TYPE_FIELD` reaches"""
KEYS = ("ENTER", "TAB", "ESCAPE", "BACKSPACE", "UP", "DOWN", "LEFT", "RIGHT")
PAD, UNKNOWN = 0, 1
"""ids of no word, and of a word outside the vocabulary"""
PRINTABLE = "".join(map(chr, range(32, 127)))
_WORD = re.compile(r'\w+|"|[^\w\s"]')


class Crash(RuntimeError):
    """An environment died, or hung, under an episode, through no action's fault.

    The episode is lost and has no reward; `reset` starts anew.
    """


class Kind(enum.IntEnum):
    """What an action does; `ARGUMENTS` says which of its entries it reads."""

    CLICK = 0
    DOUBLE_CLICK = 1
    DRAG = 2
    TYPE = 3
    """the word `token` of the vocabulary"""
    TYPE_FIELD = 4
    """the quoted text number `field` of the instruction"""
    KEY = 5
    SCROLL_UP = 6
    SCROLL_DOWN = 7
    WAIT = 8
    DONE = 9
    """ends the episode, which is judged as it stands"""


ARGUMENTS: dict[Kind, tuple[str, ...]] = {
    Kind.CLICK: ("xy",),
    Kind.DOUBLE_CLICK: ("xy",),
    Kind.DRAG: ("xy", "to"),
    Kind.TYPE: ("token",),
    Kind.TYPE_FIELD: ("field",),
    Kind.KEY: ("key",),
    Kind.SCROLL_UP: ("xy",),
    Kind.SCROLL_DOWN: ("xy",),
    Kind.WAIT: (),
    Kind.DONE: (),
}


class Action(NamedTuple):
    """One action. Entries that its kind does not read are ignored."""

    kind: Kind
    xy: tuple[float, float] = (0.5, 0.5)
    """where: from the left and from the top, in shares of the screen, 0 to 1"""
    to: tuple[float, float] = (0.5, 0.5)
    """where a drag ends"""
    token: int = 0
    """word of the vocabulary"""
    field: int = 0
    """quoted text of the instruction"""
    key: int = 0
    """of KEYS"""

    def to_dict(self) -> dict[str, Any]:
        """As an element of `action_space`."""
        return {
            "kind": np.int64(self.kind),
            "xy": np.array(self.xy, np.float32),
            "to": np.array(self.to, np.float32),
            "token": np.int64(self.token),
            "field": np.int64(self.field),
            "key": np.int64(self.key),
        }

    def __str__(self) -> str:
        """As a person writes it: `CLICK xy=(0.50, 0.25)`."""
        shown = [self.kind.name]
        for name in ARGUMENTS[self.kind]:
            value = getattr(self, name)
            if name == "key":
                value = KEYS[value]
            elif name in ("xy", "to"):
                value = f"({value[0]:.2f}, {value[1]:.2f})"
            shown.append(f"{name}={value}")
        return " ".join(shown)


_KINDS = tuple(Kind)


def parse_action(action: Mapping[str, Any], vocabulary: int) -> tuple[Action, bool]:
    """Reads an element of the action space; what its kind ignores may be absent.

    Args:
      action: see `action_space`.
      vocabulary: number of words.

    Returns:
      The action, and whether a coordinate lay outside the screen and was clipped.

    Raises:
      ValueError: the action has no such kind, lacks an entry that its kind reads, or
        an entry is out of range or not a number; the message names it.
    """
    try:
        kind = _KINDS[_index(action, "kind", len(_KINDS))]
        entries: dict[str, Any] = {}
        clipped = False
        for name in ARGUMENTS[kind]:
            if name == "token":
                entries[name] = _index(action, name, vocabulary)
            elif name == "field":
                entries[name] = _index(action, name, FIELDS)
            elif name == "key":
                entries[name] = _index(action, name, len(KEYS))
            else:
                entries[name], outside = _point(action, name)
                clipped |= outside
    except KeyError as error:
        raise ValueError(f"action lacks its entry {error}: {dict(action)}") from None
    return Action(kind, **entries), clipped


def _index(action: Mapping[str, Any], name: str, number: int) -> int:
    value = action[name]
    try:
        index = int(value)
        if index != value or not 0 <= index < number:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"action has {name} {value!r}; give an integer from 0 to {number - 1}"
        ) from None
    return index


def _point(action: Mapping[str, Any], name: str) -> tuple[tuple[float, float], bool]:
    value = action[name]
    try:
        x, y = (float(v) for v in value)
        if x != x or y != y:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"action has {name} {value!r}; give two numbers from 0 to 1"
        ) from None
    if 0 <= x <= 1 and 0 <= y <= 1:
        return (x, y), False
    return (min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)), True


def action_space(vocabulary: int) -> spaces.Space:
    """The same for all tasks of an environment with so many words."""
    return spaces.Dict(
        {
            "kind": spaces.Discrete(len(Kind)),
            "xy": spaces.Box(0.0, 1.0, (2,), np.float32),
            "to": spaces.Box(0.0, 1.0, (2,), np.float32),
            "token": spaces.Discrete(vocabulary),
            "field": spaces.Discrete(FIELDS),
            "key": spaces.Discrete(len(KEYS)),
        }
    )


def observation_space(
    height: int, width: int, vocabulary: int, words: int, characters: int
) -> spaces.Space:
    """An image, and the instruction twice: as ids of words, and as text.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      vocabulary: number of words.
      words: longest instruction, in words.
      characters: longest instruction, in characters.
    """
    return spaces.Dict(
        {
            "image": spaces.Box(0, 255, (height, width, 3), np.uint8),
            "instruction": spaces.Box(0, vocabulary - 1, (words,), np.int32),
            "text": spaces.Text(characters, min_length=0, charset=PRINTABLE),
        }
    )


def split_words(text: str) -> list[str]:
    """Words, quotation marks and other marks of a text, one by one."""
    return _WORD.findall(text)


def encode(text: str, words: Mapping[str, int], length: int) -> np.ndarray:
    """Ids of an instruction's words.

    A word without an id is spelled, if all of its letters have one, with the id of a
    blank, if there is one, between two such words.

    Args:
      text: the instruction.
      words: id of each word of the vocabulary.
      length: of the result; a longer instruction loses its end.

    Returns:
      int32 [length]: `UNKNOWN` for words without ids, `PAD` after the end.
    """
    ids: list[int] = []
    spelled = False
    for word in split_words(text):
        if word in words:
            ids.append(words[word])
            spelled = False
        elif all(letter in words for letter in word):
            ids += [words[" "]] if spelled and " " in words else []
            ids += [words[letter] for letter in word]
            spelled = True
        else:
            ids.append(UNKNOWN)
            spelled = False
    ids = ids[:length]
    return np.array(ids + [PAD] * (length - len(ids)), np.int32)


def quoted(text: str) -> tuple[str, ...]:
    """The texts in quotation marks, in their order: what `TYPE_FIELD` types."""
    return tuple(text.split('"')[1::2])


def vocabulary_ids(vocabulary: Sequence[str]) -> dict[str, int]:
    """Id of each word of a vocabulary, whose first two stand for PAD and UNKNOWN."""
    return {word: index for index, word in enumerate(vocabulary) if index > UNKNOWN}
