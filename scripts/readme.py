"""Write the generated parts of the documents: figures, metrics, served architectures; modules.

python -m scripts.readme writes README.md and ARCHITECTURE.md; --check only compares (exit status 1 if they differ).
"""

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from prometheus_client.metrics import MetricWrapperBase

from scripts.bench import figures
from sllm_node.core.metrics import Metrics

ROOT = Path(__file__).parent.parent
LAYERS = (
    "core", "codec", "checkpoint", "device", "store", "engine", "convert", "library", "schedule",
    "cluster",
    "server", "sim", "node", "bench", "cli",
)  # fmt: skip


def metrics() -> str:
    """Return the table of metrics, from their definitions."""
    made = [m for m in vars(Metrics()).values() if isinstance(m, MetricWrapperBase)]
    rows = ["| metric | labels | what |", "| --- | --- | --- |"]
    for metric in made:
        described = next(iter(metric.describe()))
        suffix = "_total" if described.type == "counter" else ""
        labels = ", ".join(metric._labelnames)  # noqa: SLF001 - the library has no public name for them
        rows.append(f"| `{described.name}{suffix}` | {labels} | {described.documentation} |")
    return "\n".join(rows)


def architectures() -> str:
    """Return the served architectures, one line."""
    from sllm_node.engine.skeleton import SUPPORTED

    return ", ".join(f"`{name}`" for name in sorted(SUPPORTED)) + "."


def modules() -> str:
    """Return the tree of modules with the first sentence of each; pure ones are marked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    pure = next(c for c in contracts if c["name"] == "decisions are pure")["source_modules"]
    rows = ["| module | | what |", "| --- | --- | --- |"]
    rows += [
        f"| `{name}` | | {_sentence(ROOT / 'sllm_node' / name)} |"
        for name in ("__main__.py", "torch.py", "transformers.py")
    ]
    for layer in LAYERS:
        package = ROOT / "sllm_node" / layer
        rows.append(f"| **{layer}/** | | *{_sentence(package / '__init__.py')}* |")
        for path in sorted(package.glob("*.py")):
            if path.name != "__init__.py":
                mark = "◆" if f"sllm_node.{layer}.{path.stem}" in pure else ""
                rows.append(f"| `{layer}/{path.name}` | {mark} | {_sentence(path)} |")
    return "\n".join(rows)


def migration() -> str:
    """Return the states of a session at its entry: a diagram and a table."""
    from sllm_node.cluster.arbiter import TRANSITIONS, EntryState

    return "\n\n".join(_machine(TRANSITIONS, EntryState.SEEKING))


def _machine(table: Mapping[Any, Mapping[Any, Any]], first: Enum) -> tuple[str, str]:
    """Return a machine's diagram, and its table."""
    states = list(table)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.name}"]
    for state, row in table.items():
        ends: dict[Any, list[str]] = {}
        for event, following in row.items():
            ends.setdefault(following, []).append(event.value)
        lines += [f"    {state.name} --> {to.name}: {', '.join(by)}" for to, by in ends.items()]
    lines += [f"    {state.name} --> [*]" for state, row in table.items() if not row]
    events: type[Enum] = type(next(iter(table[first])))
    rows = ["| event | " + " | ".join(state.name for state in states) + " |"]
    rows.append("| --- " * (len(states) + 1) + "|")
    for event in events:
        cells = (table[state].get(event) for state in states)
        names = (cell.name if cell else "" for cell in cells)
        rows.append(f"| {event.value} | " + " | ".join(names) + " |")
    return "\n".join([*lines, "```"]), "\n".join(rows)


def _sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = docstring.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"figures": figures.table, "metrics": metrics, "architectures": architectures},
    "ARCHITECTURE.md": {"modules": modules, "migration": migration},
}


def filled(name: str) -> str:
    """Return the document `name` with what stands between each pair of marks written anew."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for part, content in PARTS[name].items():
        begin, end = f"<!-- {part} -->", f"<!-- end of {part} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{content()}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    stale = [name for name in PARTS if filled(name) != (ROOT / name).read_text(encoding="utf-8")]
    if check:
        print(f"stale: {', '.join(stale)}" if stale else "the documents are up to date")
        return int(bool(stale))
    for name in stale:
        (ROOT / name).write_text(filled(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
