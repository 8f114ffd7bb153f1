"""How commands speak: results on stdout, messages on stderr, JSON where it was asked for."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal, NoReturn

import orjson

WIDE: Final = 500
"""Columns of a table that goes into a file or a pipe."""

_BETWEEN: Final = 3
_EDGES: Final = 2
"""What a table has between two columns, and around all."""
FOLDED: Final = 24
"""Columns that the last column of a table has, however narrow the terminal is."""


def say(text: str) -> None:
    """Print a result."""
    with _printing():
        print(text)


def tell(text: str) -> None:
    """Print a remark that is no result."""
    print(text, file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Print why, and end with status 1."""
    print(f"sllm-node: {message}", file=sys.stderr)
    sys.exit(1)


def show_any_text() -> None:
    """Let stdout show escaped what it has no letter for, as stderr does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def end_stdout() -> None:
    """Write what stdout has kept until now."""
    if sys.stdout is not None:
        with _printing():
            sys.stdout.flush()


@contextmanager
def _printing() -> Iterator[None]:
    """Fail if stdout can't be written, as on a full disk."""
    try:
        yield
    except OSError as error:
        sys.stdout = None  # Python would try again at the end, and print a traceback
        if isinstance(error, BrokenPipeError):  # the reader has enough
            sys.exit(1)
        fail(f"the output can't be written: {error.strerror}")


def print_json(value: Any) -> None:
    """Print `value` as indented JSON."""
    try:
        text = orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError:  # a file's name that is no UTF-8
        text = json.dumps(value, indent=2, sort_keys=True)
    say(text)


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print rows under their columns; a name that begins with ">" makes its column right-aligned.

    On a terminal that is too narrow the last column folds, down to `FOLDED`; the terminal wraps what is
    left over, and nothing is cut off. Elsewhere nothing folds. A cell is shown letter by letter: names of
    clients have what rich takes for markup, `[red]`, `[/x]` or `:smile:`.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    least = _EDGES - _BETWEEN
    for i, column in enumerate(columns):
        name, right = (column[1:], True) if column.startswith(">") else (column, False)
        is_last = i == len(columns) - 1
        justify: Literal["left", "right"] = "right" if right else "left"
        widest = max(len(cell) for cell in (name, *(row[i] for row in rows)))
        least += _BETWEEN + (min(widest, FOLDED) if is_last else widest)
        table.add_column(name, justify=justify, no_wrap=not is_last, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = max(Console().width, least) if sys.stdout and sys.stdout.isatty() else WIDE
    # A terminal that tells nothing of itself would get 80 columns, were the height not given, too.
    with _printing():
        Console(width=width, height=25, markup=False, emoji=False).print(table)
