"""What commands print, on terminals of any width."""

import sys

import pytest

from sllm_node.cli.output import print_table

COLUMNS = ("model", "tier", ">size", ">device", ">DRAM", ">run", ">wait", "notes")
ROW = (
    "tiny-a",
    "device",
    "256.6 MiB",
    "256.6 MiB",
    "256.6 MiB",
    "0",
    "0",
    "pinned, leaves in 299 s, on cpu",
)


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_table_loses_nothing_on_a_narrow_terminal(monkeypatch, capsys, columns):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    print_table(COLUMNS, [ROW])
    shown = capsys.readouterr().out
    for word in (
        "model",
        "tier",
        "size",
        "device",
        "DRAM",
        "run",
        "wait",
        "notes",
        *ROW[:-1],
        *ROW[-1].split(),
    ):
        assert word in shown, word
    assert len(shown.splitlines()) < 9  # no column of single letters


def test_a_wide_terminal_is_kept_to(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    print_table(("name", "why"), [("a", "because " * 40)])
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 100


@pytest.mark.parametrize("name", ["[/x]", "[red]x", "[fd00::1]:7", "q:smile:b", r"\[x]"])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_name_of_others_is_shown_letter_by_letter(monkeypatch, capsys, name, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setenv("TERM", "dumb")
    print_table(("session", name, f">{name}"), [(name, "a", name)])
    assert capsys.readouterr().out.count(name) == 4
