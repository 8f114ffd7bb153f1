"""What the documents say is what the code has."""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

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


def test_every_command_is_in_readme():
    from sllm_node.cli.main import app

    names = [str(c.name or (c.callback and c.callback.__name__)) for c in app.registered_commands]
    names += [str(group.name) for group in app.registered_groups]
    missing = [name for name in names if f"`{name}" not in README]
    assert missing == []


def test_every_route_is_in_readme():
    from sllm_node.server.app import ROUTES

    paths = {route.path for route in ROUTES}
    verbs = {path.rsplit("/", 1)[-1] for path in paths}
    missing = [
        path
        for path in paths
        if path not in README and f"`{path.rsplit('/', 1)[-1]}`" not in README
    ]
    assert verbs
    assert missing == []


def test_nobody_elses_kernels_package_is_shadowed():
    assert not (ROOT / "kernels" / "__init__.py").exists()
