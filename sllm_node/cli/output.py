"""How commands speak: results on stdout, messages on stderr, JSON where it was asked for."""

import sys
from typing import Any, Final, Literal, NoReturn

import orjson

WIDE: Final = 500
"""Columns of a table that goes into a file or a pipe."""


def say(text: str) -> None:
    """Print a result."""
    print(text)


def tell(text: str) -> None:
    """Print a remark that is no result."""
    print(text, file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Print why, and end with status 1."""
    print(f"sllm-node: {message}", file=sys.stderr)
    sys.exit(1)


def print_json(value: Any) -> None:
    """Print `value` as indented JSON."""
    print(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS).decode())


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print rows under their columns; a name that begins with ">" makes its column right-aligned.

    On a terminal the last column folds and the others keep their width; elsewhere nothing folds.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        name, right = (column[1:], True) if column.startswith(">") else (column, False)
        is_last = column == columns[-1]
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(name, justify=justify, no_wrap=not is_last, overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else WIDE
    Console(width=width).print(table)
