"""The tasks of MiniWoB++: pages, limits, and what their instructions may say."""

import difflib
import functools
import importlib.util
from pathlib import Path

from jaxlab.errors import UserError
from jaxlab.rl.envs.api import PRINTABLE

WORDS = 64
"""longest instruction, in ids"""
CHARACTERS = 256
"""longest instruction, in characters"""
TASKS: dict[str, int] = {
    "choose-list": 16,
    "click-button": 3,
    "click-button-sequence": 4,
    "click-checkboxes": 10,
    "click-checkboxes-large": 18,
    "click-checkboxes-transfer": 10,
    "click-collapsible-2-nodelay": 6,
    "click-collapsible-nodelay": 4,
    "click-color": 3,
    "click-dialog": 3,
    "click-dialog-2": 3,
    "click-link": 3,
    "click-option": 4,
    "click-shades": 12,
    "click-shape": 3,
    "click-tab": 3,
    "click-tab-2": 6,
    "click-tab-2-easy": 4,
    "click-tab-2-hard": 8,
    "click-tab-2-medium": 5,
    "click-test": 3,
    "click-test-2": 3,
    "click-test-transfer": 3,
    "click-widget": 3,
    "count-shape": 3,
    "drag-box": 5,
    "email-inbox-delete": 6,
    "email-inbox-important": 6,
    "enter-date": 6,
    "enter-password": 8,
    "enter-text": 6,
    "enter-text-2": 20,
    "enter-text-dynamic": 6,
    "find-greatest": 5,
    "find-word": 20,
    "focus-text": 3,
    "focus-text-2": 3,
    "form-sequence": 16,
    "form-sequence-2": 8,
    "grid-coordinate": 3,
    "identify-shape": 3,
    "login-user": 8,
    "multi-orderings": 12,
    "navigate-tree": 8,
    "odd-or-even": 7,
    "read-table": 20,
    "read-table-2": 30,
    "scroll-text": 40,
    "search-engine": 9,
    "simple-algebra": 8,
    "simple-arithmetic": 8,
    "social-media": 16,
    "use-autocomplete-nodelay": 24,
    "use-slider": 16,
    "use-spinner": 14,
    "visual-addition": 8,
}
"""tasks that have an expert, and how many actions they may take"""
OTHER_LIMIT = 20
"""actions of a task that has none"""
# What is to be typed, where the instruction does not quote it.
_COPIED = {
    "enter-date": r"Enter (\S+) as",
    "enter-time": r"Enter (.+) as",
    "multi-orderings": r"for (\w+) movies directed by (\w+) from year (\d+)",
    "multi-layouts": r"for (\w+) movies directed by (\w+) from year (\d+)",
}


@functools.cache
def folder() -> Path:
    """Where the pages are.

    Raises:
      UserError: the package `miniwob` is not installed.
    """
    found = importlib.util.find_spec("miniwob")
    if found is None or found.origin is None:
        raise UserError("MiniWoB++ is not installed: pip install 'jaxlab[gui]'")
    return Path(found.origin).parent / "html"


@functools.cache
def pages() -> frozenset[str]:
    """Names of all tasks, with and without experts."""
    return frozenset(page.stem for page in (folder() / "miniwob").glob("*.html"))


def page(task: str) -> Path:
    """The page of a task.

    Raises:
      ValueError: there is none; the message has the nearest name.
      UserError: MiniWoB++ is not installed.
    """
    if task not in pages():
        close = difflib.get_close_matches(task, sorted(pages()), 1)
        hint = f"did you mean {close[0]!r}?" if close else "see miniwob_tasks.TASKS"
        raise ValueError(f"no task {task!r} in jaxlab/MiniWoB-v0; {hint}")
    return folder() / "miniwob" / f"{task}.html"


def instruction(task: str, utterance: object) -> str:
    """What a page says, as the policy gets it.

    What is to be copied is in quotation marks, whether the page has them or not, so
    that `Kind.TYPE_FIELD` reaches it. The page is not trusted: the text is cut to
    `CHARACTERS`, and what is not printable ASCII becomes a question mark.
    """
    import re

    text = utterance if isinstance(utterance, str) else ""
    text = " ".join(text[: 4 * CHARACTERS].split())
    text = "".join(c if c in PRINTABLE else "?" for c in text)
    if copied := re.search(_COPIED.get(task, r"$^"), text):
        for number in range(copied.re.groups, 0, -1):
            start, end = copied.span(number)
            text = f'{text[:start]}"{text[start:end]}"{text[end:]}'
    return text[:CHARACTERS]


def _vocabulary() -> tuple[str, ...]:
    words = Path(__file__).with_name("miniwob_words.txt").read_text().split("\n")
    return (
        "",
        "\N{REPLACEMENT CHARACTER}",
        *PRINTABLE,
        *(word for word in words if len(word) > 1),
    )


VOCABULARY = _vocabulary()
"""words by id, of instructions and of `Kind.TYPE`: every character, and the words of
`miniwob_words.txt`"""
