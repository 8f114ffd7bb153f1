r"""What waits for a GPU, in one call: tests, the engine's figures, many things at once; a short table last.

    python scripts/gpu_session.py --out DIR [--parts imports,mixed,moe,tests,engine,chaos] [--limit-s 540]
        [--store /dev/shm/s] [--device cuda:0] [--chaos-minutes 1.2] [--engine-parts PARTS] [--shape 8b]

Parts run one after the other as processes of their own, each with its own limit and all within
`--limit-s`; one that fails or is late does not end the rest. DIR gets the log of each, what it measured as
JSON, and `session.json`. Exit status 1 unless all parts were well.

- imports: whether this Python has what the node and the tests need.
- mixed: steps with prompts and their graphs, first because they decide whether the rest means anything.
- moe: mixtures of experts against generate().
- tests: all other tests that need a GPU, and the contract of devices.
- engine: `scripts.bench.engine`.
- interleave: `scripts.bench.interleave`, only where it is named.
- chaos: `scripts.bench.chaos` on the GPU; ten minutes of it: `--parts chaos --chaos-minutes 9`.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
NEEDED: Final = (
    "aiohttp", "cuda.bindings", "hypothesis", "jinja2", "msgspec", "numpy", "orjson",
    "prometheus_client", "psutil", "pytest", "pytest_asyncio", "safetensors", "tokenizers", "torch",
    "transformers", "typer", "uvloop", "xxhash",
)  # fmt: skip
LIMITS_S: Final = {
    "imports": 60.0, "mixed": 90.0, "moe": 80.0, "tests": 240.0, "engine": 260.0, "chaos": 640.0,
    "interleave": 300.0,
}  # fmt: skip
USUAL: Final = tuple(part for part in LIMITS_S if part != "interleave")
KEPT_S: Final = {"engine": 150.0}
"""Of the time, for a part that is still to come; for chaos its minutes and `CHAOS_MORE_S`."""
CHAOS_MORE_S: Final = 25.0
STOP_GRACE_S: Final = 5.0
PYTEST: Final = (
    "-m",
    "pytest",
    "-q",
    "-m",
    "gpu",
    "-p",
    "no:cacheprovider",
    "--durations=8",
    "-rfEs",
)
FIRST: Final = ("tests/gpu/test_graphs.py", "tests/gpu/test_mixed.py", "tests/gpu/test_fused.py")
EXPERTS: Final = "tests/gpu/test_moe.py"


@dataclass(slots=True)
class Outcome:
    """How a part went."""

    part: str
    state: str = "not run"
    seconds: float = 0.0
    told: list[str] = field(default_factory=list)


def command_of(part: str, asked: argparse.Namespace) -> list[str]:
    """Return what a part runs, behind the name of this Python."""
    first = [path for path in FIRST if (ROOT / path).exists()]
    if part == "imports":
        return [str(Path(__file__).resolve()), "--check"]
    if part == "mixed":
        return [*PYTEST, *first]
    if part == "moe":
        return [*PYTEST, EXPERTS]
    if part == "tests":
        ignored = [f"--ignore={path}" for path in (*first, EXPERTS)]
        return [*PYTEST, *ignored, "tests/contract/test_device.py", "tests/gpu"]
    if part == "engine":
        limit_s = (
            LIMITS_S["engine"] - 90
        )  # what is under way then still ends, and weights are written first
        return [
            "-m", "scripts.bench.engine", "--shape", asked.shape, "--store", str(asked.store),
            "--device", asked.device, "--parts", asked.engine_parts, "--kv-mib", str(asked.kv_mib),
            "--limit-s", f"{limit_s:g}", "--out", str(asked.out / "engine.json"),
        ]  # fmt: skip
    if part == "interleave":
        return [
            "-m", "scripts.bench.interleave", "--shape", asked.shape, "--store", str(asked.store),
            "--device", asked.device, "--prompt-tokens", "32768", "--kv-mib", "8192",
            "--rounds", "2", "--out", str(asked.out / "interleave.json"),
        ]  # fmt: skip
    return [
        "-m", "scripts.bench.chaos", "--minutes", f"{asked.chaos_minutes:g}",
        "--device", asked.device, "--json", str(asked.out / "chaos.json"),
    ]  # fmt: skip


def kept_s(asked: argparse.Namespace, later: Sequence[str]) -> float:
    """Return the seconds that parts before must leave for those `later`."""
    chaos_s = 60 * asked.chaos_minutes + CHAOS_MORE_S if "chaos" in later else 0.0
    return chaos_s + sum(KEPT_S.get(part, 0.0) for part in later)


def run(part: str, asked: argparse.Namespace, limit_s: float) -> Outcome:
    """Run a part to its end or its limit."""
    begun = time.perf_counter()
    log = asked.out / f"{part}.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, *command_of(part, asked)],
            stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(limit_s)
            state = "well" if code == 0 else f"exit {code}"
        except subprocess.TimeoutExpired:
            state = "too late"
        finally:
            stop(child)
    told = found_in(log.read_text(errors="replace"), part)
    return Outcome(part, state, round(time.perf_counter() - begun, 1), told)


def stop(child: "subprocess.Popen[bytes]") -> None:
    """End a part's processes: those of the session that it leads."""
    for number, grace_s in ((signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, STOP_GRACE_S)):
        try:
            os.killpg(child.pid, number)
            child.wait(grace_s)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def found_in(text: str, part: str) -> list[str]:
    """Return the lines of a part's log that belong in the table."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    if part in {"mixed", "moe", "tests"}:
        wanted = [line[:230] for line in lines if re.match(r"(FAILED|ERROR|SKIPPED) ", line)]
        return [*wanted[:16], *lines[-1:]]
    if part == "engine":
        return [
            shortened(line) for line in lines if re.match(r"[a-z_0-9]+ +[\[{\"]", line)
        ] or lines[-3:]
    if part == "chaos":
        wanted = [
            line for line in lines if re.match(r"(done|tokens|errors|left|memory_\w+) ", line)
        ]
        return [*(line[:200] for line in wanted), *lines[-1:]][:8] if wanted else lines[-3:]
    return [line[:230] for line in lines[-12 if part == "interleave" else -3 :]]


def shortened(line: str) -> str:
    """Return a result of the engine's benchmark without its rounds."""
    name, _, rest = line.partition(" ")
    try:
        value = json.loads(rest)
    except json.JSONDecodeError:
        return line[:230]
    if isinstance(value, dict):
        value = {key: _rounded(one) for key, one in value.items() if not isinstance(one, list)}
    return f"{name:14} {json.dumps(value)}"[:230]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def check() -> int:
    """Tell what of this Python is missing."""
    missing = [name for name in NEEDED if not _is_there(name)]
    print(f"missing: {', '.join(missing) or 'nothing'}")
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {names}")
    return 1 if missing or not names else 0


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def table(outcomes: Sequence[Outcome]) -> None:
    """Print what was found."""
    for outcome in outcomes:
        for line in outcome.told:
            print(f"{outcome.part:8} {line}")
    for outcome in outcomes:
        print(f"= {outcome.part:8} {outcome.state:10} {outcome.seconds:6.1f} s")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default=",".join(USUAL))
    parser.add_argument("--limit-s", type=float, default=540.0)
    parser.add_argument("--store", type=Path, default=Path("/dev/shm/s"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--kv-mib", type=int, default=12288)
    parser.add_argument("--engine-parts", default="ceiling,decode,batch,beside,first")
    parser.add_argument("--chaos-minutes", type=float, default=1.2)
    parser.add_argument("--check", action="store_true", help="the part imports, here")
    asked = parser.parse_args()
    if not asked.check and asked.out is None:
        parser.error("--out: a folder")
    asked.parts = asked.parts.split(",")
    if unknown := set(asked.parts) - set(LIMITS_S):
        parser.error(f"no such parts: {', '.join(sorted(unknown))}")
    return asked


def main() -> int:
    """Run the parts, print and write."""
    asked = parsed()
    if asked.check:
        return check()
    asked.out = asked.out.resolve()
    asked.out.mkdir(parents=True, exist_ok=True)
    asked.store.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + asked.limit_s
    outcomes: list[Outcome] = []
    for number, part in enumerate(asked.parts):
        left_s = deadline - time.perf_counter() - kept_s(asked, asked.parts[number + 1 :])
        outcome = Outcome(part)
        if left_s > 2 * STOP_GRACE_S:
            outcome = run(part, asked, min(LIMITS_S[part], left_s - 2 * STOP_GRACE_S))
        outcomes.append(outcome)
        print(f"{part}: {outcome.state} after {outcome.seconds:.0f} s", flush=True)
        data = json.dumps([asdict(one) for one in outcomes], indent=1)
        (asked.out / "session.json").write_text(data)
    table(outcomes)
    return 0 if all(outcome.state == "well" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
