"""The public modules as a program uses them, with the loader of the process."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sllm_node.torch
import sllm_node.transformers
from sllm_node.core.errors import SllmError
from sllm_node.library.loader import PROCESS
from tests.models import make_model, make_source

ROOT = Path(__file__).parents[2]
POOL = "32MiB"


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    gc.collect()
    left = PROCESS.loader().memory_used("cpu")
    sllm_node.torch.release_pool()
    assert left == 0


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## In your own scripts\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    make_source(tmp_path / "Qwen3-8B", "qwen3")
    sllm_node.torch.save_dict({}, tmp_path / "nothing")
    sllm_node.torch.load_dict(tmp_path / "nothing", pool_bytes=POOL)  # a smaller pool will do
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example, names)
    assert type(names["model"]).__name__ == "Qwen3ForCausalLM"
    assert "Why is the sky blue?" in capsys.readouterr().out


def test_a_model_and_a_dict_go_there_and_back(tmp_path):
    model = make_model("llama")
    ids = torch.arange(5, 15)[None]
    folder = sllm_node.transformers.save_model(model, tmp_path / "m")
    found = sllm_node.transformers.load_model(folder, device_map="cpu", pool_bytes=POOL)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, found(ids).logits)
    folder = sllm_node.torch.save_dict(model.state_dict(), tmp_path / "d")
    tensors = sllm_node.torch.load_dict(folder, "cpu", pool_bytes=POOL)
    assert list(tensors) == list(model.state_dict())


def test_a_gpu_that_is_not_there_is_an_error_of_ours(tmp_path):
    folder = sllm_node.torch.save_dict({"x": torch.ones(1)}, tmp_path / "d")
    for device in ("cuda:99", "cpu:1"):
        with pytest.raises(SllmError, match=device):
            sllm_node.torch.load_dict(folder, device)


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_packages_they_are_named_after_stay_what_they_are():
    code = (
        "import sllm_node.transformers, sllm_node.torch, sys\n"
        "import sllm_node.engine.skeleton as s, sllm_node.engine.weights as w\n"
        "import torch, transformers\n"
        "print(s.torch is torch is w.torch, s.AutoConfig is transformers.AutoConfig)\n"
        "print(hasattr(torch, 'Tensor'), hasattr(transformers, 'AutoModel'))\n"
    )
    done = run(code)
    assert (done.stdout.split(), done.stderr) == (["True"] * 4, "")


def test_the_package_itself_stays_light_and_dicts_need_no_transformers():
    code = (
        "import sys, sllm_node\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])\n"
        "import sllm_node.torch\n"
        "print([m for m in ('transformers', 'aiohttp') if m in sys.modules])\n"
    )
    done = run(code)
    assert (done.stdout.split(), done.stderr) == (["[]", "[]"], "")


def test_a_program_ends_quietly_with_models_alive(tmp_path):
    folder = sllm_node.transformers.save_model(make_model("llama"), tmp_path / "m")
    code = (
        "from sllm_node.transformers import load_model\n"
        f"model = load_model({str(folder)!r}, device_map='cpu', pool_bytes={POOL!r})\n"
        "print(model.dtype)\n"
    )
    done = run(code)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("torch.float32", "", 0)
