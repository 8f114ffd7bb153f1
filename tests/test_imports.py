"""Each module stands alone, and the command line starts without the heavy packages."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CUDA_MODULES = (
    "cuda.py", "cuda_context.py", "cuda_decoder.py", "cuda_memory.py", "cuda_stream.py", "kernels.py",
    "nvrtc.py", "step_kernels.py",
)  # fmt: skip
CUDA = [("device", name) for name in CUDA_MODULES]
LIGHT = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in (
        "core",
        "codec",
        "checkpoint",
        "device",
        "store",
        "cluster",
        "schedule",
        "server",
        "cli",
        "node",
    )
    for path in sorted((ROOT / "sllm_node" / folder).glob("*.py"))
    if path.name != "__init__.py" and path.parts[-2:] not in CUDA
]
HEAVY = ("torch", "transformers", "cuda")


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.parametrize(
    "package", ["core", "codec", "checkpoint", "device", "store", "cluster", "cli"]
)
def test_light_packages_import_without_the_heavy_ones(package):
    modules = [name for name in LIGHT if name.split(".")[1] == package]
    code = f"import sys, {', '.join(modules)}; print([m for m in {HEAVY} if m in sys.modules])"
    done = run(code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_help_is_shown_without_torch():
    code = (
        "import sys; sys.argv = ['sllm-node', '--help']\n"
        "from sllm_node.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    done = run(code)
    assert "check-config" in done.stdout
    assert done.stdout.strip().endswith("HEAVY []")


def test_every_package_and_the_kernels_go_into_a_wheel():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    found = {path.parent for path in (ROOT / "sllm_node").rglob("__init__.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in found}
    assert set(setuptools["packages"]) == {*names, "sllm_node._kernels"}
    assert setuptools["package-dir"] == {"sllm_node._kernels": "kernels"}
    patterns = setuptools["package-data"]["sllm_node._kernels"]
    assert {path.suffix for path in (ROOT / "kernels").iterdir()} == {p[1:] for p in patterns}
