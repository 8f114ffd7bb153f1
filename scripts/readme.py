"""Write the generated parts of README: figures, metrics, served architectures.

python -m scripts.readme writes them; --check only compares (exit status 1 if they differ).
"""

import argparse
import sys
from pathlib import Path

from prometheus_client.metrics import MetricWrapperBase

from scripts.bench import figures
from sllm_node.core.metrics import Metrics

README = Path(__file__).parent.parent / "README.md"


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


def filled(text: str) -> str:
    """Return `text` with what stands between each pair of marks written anew."""
    for name, content in (
        ("figures", figures.table()), ("metrics", metrics()), ("architectures", architectures()),
    ):  # fmt: skip
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    wanted = filled(text)
    if not check:
        README.write_text(wanted, encoding="utf-8")
        return 0
    print("README is up to date" if text == wanted else "README is stale: python -m scripts.readme")
    return int(text != wanted)


if __name__ == "__main__":
    sys.exit(main())
