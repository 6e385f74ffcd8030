"""Actions as tokens: a kind, then its arguments, each chosen knowing those before.

So each token has a probability and an entropy of its own. All are of one set:

    kinds | cells, row by row | words | fields | keys        and -1 after the last

Places are cells of a grid over the screen; an action points at their middles.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlab.rl.envs.api import ARGUMENTS, FIELDS, KEYS, Action, Kind

LENGTH = 3
"""tokens of an action at most: a drag has a kind and two places"""
KINDS = len(Kind)


class ActionTokens(NamedTuple):
    """The set of tokens for a grid and a vocabulary."""

    rows: int
    """cells from top to bottom"""
    columns: int
    """cells from left to right"""
    words: int
    """words that can be typed"""

    @property
    def cells(self) -> int:
        """Places to point at."""
        return self.rows * self.columns

    @property
    def others(self) -> int:
        """Arguments that are no cells."""
        return self.words + FIELDS + len(KEYS)

    @property
    def size(self) -> int:
        """Tokens in all."""
        return KINDS + self.cells + self.others

    def encode(self, action: Action) -> np.ndarray:
        """Tokens of an action: int32 [LENGTH]."""
        tokens = [int(action.kind)]
        for name in ARGUMENTS[action.kind]:
            value = getattr(action, name)
            index = self._cell(value) if name in ("xy", "to") else int(value)
            tokens.append(self._range(name)[0] + index)
        return np.array(tokens + [-1] * (LENGTH - len(tokens)), np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> Action:
        """The action that tokens say.

        Raises:
            ValueError: they say none.
        """
        first, *rest = (int(token) for token in tokens)
        if not 0 <= first < KINDS:
            raise ValueError(f"action token {first} is no kind")
        kind = Kind(first)
        entries: dict[str, Any] = {}
        for place, name in enumerate(ARGUMENTS[kind]):
            token = rest[place] if place < len(rest) else -1
            start, count = self._range(name)
            if not start <= token < start + count:
                raise ValueError(f"action token {token} is no {name} of {kind.name}")
            entries[name] = token - start
            if name in ("xy", "to"):
                row, column = divmod(token - start, self.columns)
                entries[name] = (column + 0.5) / self.columns, (row + 0.5) / self.rows
        return Action(kind, **entries)

    def allowed(self) -> np.ndarray:
        """Which arguments a kind takes: bool [LENGTH - 1, KINDS, cells + others]."""
        table = np.zeros((LENGTH - 1, KINDS, self.cells + self.others), bool)
        for kind, names in ARGUMENTS.items():
            for place, name in enumerate(names):
                start, count = self._range(name)
                table[place, kind, start - KINDS : start - KINDS + count] = True
        return table

    def _range(self, name: str) -> tuple[int, int]:
        """First token and number of tokens of an argument."""
        start = KINDS
        if name in ("xy", "to"):
            return start, self.cells
        start += self.cells
        if name == "token":
            return start, self.words
        start += self.words
        return (start, FIELDS) if name == "field" else (start + FIELDS, len(KEYS))

    def _cell(self, xy: tuple[float, float]) -> int:
        column = min(int(xy[0] * self.columns), self.columns - 1)
        return min(int(xy[1] * self.rows), self.rows - 1) * self.columns + column
