"""How commands speak: results on stdout, messages on stderr, JSON where it was asked for."""

import sys
from typing import Any, NoReturn

import orjson


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
    """Print rows under their columns; numbers are right-aligned by being given as such."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        name, right = (column[1:], True) if column.startswith(">") else (column, False)
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=not sys.stdout.isatty()).print(table)
