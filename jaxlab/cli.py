"""How the scripts start and end: options, exit codes, errors of one line."""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from jaxlab.errors import ConfigError, UserError


def run_main(
    main: Callable[[list[str]], None], argv: Sequence[str] | None = None
) -> None:
    """Calls `main(arguments)` and exits: 0 done, 1 failed, 2 bad usage.

    A `UserError` is printed to stderr in one line; `--debug` anywhere on the
    command line adds its traceback. Other exceptions keep theirs.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        main(arguments)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    else:
        code = 0
    sys.exit(code)


def parse_options(
    cls: type, arguments: Sequence[str], prog: str, default: Any = None
) -> Any:
    """Options of the command line as a dataclass, by tyro.

    Args:
        cls: the dataclass; its fields' docstrings are the help.
        arguments: the words of the command line.
        prog: name of the program in messages.
        default: values of what is not given; None: the dataclass's own.

    Raises:
        ConfigError: bad usage, in one line, with the nearest right option.
    """
    import tyro

    given = {} if default is None else {"default": default}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                tyro.conf.AvoidSubcommands[cls],
                args=list(arguments),
                prog=prog,
                **given,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_one_line(errors.getvalue())) from None


def _one_line(box: str) -> str:
    """Tyro's framed message in one line: its first section, and the best hint."""
    sections: list[list[str]] = [[]]
    for row in box.splitlines()[1:-1]:
        row = row.strip(" │|")  # the frame is ASCII where the locale is
        if set(row) <= {"─", "-"}:
            sections.append([])
        else:
            sections[-1].append(row)
    sections = [section for section in sections if section]
    text = " ".join(sections[0])
    hint = next((s for s in sections[1:] if s[0].startswith("Perhaps")), None)
    return text + (f"; perhaps you meant {hint[1].split()[0]}" if hint else "")
