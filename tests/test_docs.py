"""What the documents say is what the code has."""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest
import typer

from scripts import readme
from sllm_node.core.config import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", readme.PARTS)
def test_generated_parts_are_up_to_date(name):
    assert readme.filled(name) == (ROOT / name).read_text(encoding="utf-8")


def test_node_toml_names_every_key_with_a_comment():
    text = (ROOT / "configs" / "node.toml").read_text(encoding="utf-8")
    named = {(t, k) for t, v in tomllib.loads(text).items() for k in v}
    declared = {
        (section.name, key.name)
        for section in msgspec.structs.fields(Config)
        if section.name not in ("models", "remotes")
        for key in msgspec.structs.fields(section.type)
    }
    assert named == declared
    keys = [line for line in text.splitlines() if re.match(r"\w+ = ", line)]
    assert [line for line in keys if "  # " not in line] == []


@pytest.mark.parametrize("table", ["models", "remotes"])
def test_node_toml_shows_every_key_of_a_named_table(table):
    text = (ROOT / "configs" / "node.toml").read_text(encoding="utf-8")
    tables = next(f for f in msgspec.structs.fields(Config) if f.name == table)
    for key in msgspec.structs.fields(tables.type.__args__[1]):
        assert f"# {key.name} = " in text


def test_every_module_has_its_place_in_architecture():
    missing = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "sllm_node").rglob("*.py"))
        if path.name != "__init__.py" and f"`{path.parent.name}/{path.name}`" not in ARCHITECTURE
        and f"`{path.name}`" not in ARCHITECTURE
    ]  # fmt: skip
    assert missing == []


def test_every_kernel_has_its_place_in_architecture():
    sources = [path for path in (ROOT / "kernels").iterdir() if path.suffix in (".cu", ".cuh")]
    names = {path.stem if path.suffix == ".cu" else path.name for path in sources}
    table = ARCHITECTURE.split("\n### Kernels\n")[1].split("\n## ")[0]
    assert {name for name in names if f"`{name}`" not in table} == set()


def rows_of(section):
    """Return the rows of a section's table."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("|")][2:]


def named_in(row):
    """Return what a row's first column names in code."""
    return re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", row)[1])


def commands():
    """Return every command by its whole name, with its options."""
    from sllm_node.cli.main import app

    def walk(group, path):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, [*path, name])
            else:
                yield " ".join([*path, name]), {o for p in command.params for o in p.opts}

    return dict(walk(typer.main.get_command(app), []))


def command_of(span, known):
    """Return the command that begins a piece of code, in whole words."""
    return next((name for name in known if f"{span} ".startswith(f"{name} ")), None)


def test_the_table_of_commands_has_every_command_and_no_other():
    known = commands()
    named = [span for row in rows_of("Command line") for span in named_in(row)]
    spans = [span for span in named if not span.startswith("--")]
    assert [span for span in spans if command_of(span, known) is None] == []
    assert {command_of(span, known) for span in spans} == known.keys()


def test_options_in_the_table_of_commands_are_those_of_their_commands():
    known = commands()
    for row in rows_of("Command line"):
        of_row = [known[name] for span in named_in(row) if (name := command_of(span, known))]
        assert set(re.findall(r"--[a-z][a-z-]*", row)) <= set().union(*of_row), row


def test_the_table_of_routes_has_every_route_and_no_other():
    from sllm_node.server.app import ROUTES

    named = set()
    for row in rows_of("HTTP"):
        method, path = "", ""
        for span in named_in(row):
            method = span.split()[0] if " " in span else method
            last = span.split()[-1].split("?")[0]
            path = last if last.startswith("/") else f"{path.rsplit('/', 1)[0]}/{last}"
            named.add((method, path))
    assert named == {(route.method, route.path) for route in ROUTES}


def test_nobody_elses_kernels_package_is_shadowed():
    assert not (ROOT / "kernels" / "__init__.py").exists()
