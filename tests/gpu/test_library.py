"""Models loaded by a program onto GPUs: ordinary, right, and gone without a trace."""

import gc

import pytest
import torch

from sllm_node.core.errors import DeviceMemoryError
from sllm_node.core.units import MIB
from sllm_node.library import dicts, models
from sllm_node.library.loader import Loader
from tests.models import make_model

pytestmark = pytest.mark.gpu
IDS = torch.arange(5, 29)[None]
POOL = "32MiB"


def make_loader(count=1, memory=600 * MIB):
    from sllm_node.device.cuda import CudaDevice, device_count

    if device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    names = tuple(f"cuda:{number}" for number in range(count))
    return Loader(lambda name: CudaDevice(int(name[5:]), memory), lambda: names)


def said(model, device="cuda:0"):
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 319}
    return model.generate(IDS.to(device), **options).tolist()


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "gemma2", "qwen3"])
def test_a_model_on_a_gpu_is_the_model_that_was_saved(tmp_path, family):
    loader, model = make_loader(), make_model(family)
    found = models.load(loader, models.save(model, tmp_path / "m"), pool_bytes=POOL)
    assert found.device == torch.device("cuda:0")
    oracle = model.to("cuda:0")
    with torch.no_grad():
        assert torch.equal(found(IDS.cuda()).logits, oracle(IDS.cuda()).logits)
    assert said(found) == said(oracle)
    del found
    gc.collect()
    assert loader.memory_used("cuda:0") == 0
    loader.close()


def test_a_parameter_outlives_its_model_and_can_be_moved_and_trained(tmp_path):
    loader = make_loader()
    folder = models.save(make_model("llama_tied"), tmp_path / "m")
    model = models.load(loader, folder, pool_bytes=POOL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(IDS.cuda(), labels=IDS.cuda()).loss.item()
    model(IDS.cuda(), labels=IDS.cuda()).loss.backward()
    optimizer.step()
    assert model(IDS.cuda(), labels=IDS.cuda()).loss.item() < before
    weight = model.lm_head.weight
    wanted = weight.detach().cpu()
    del model, optimizer
    gc.collect()
    assert loader.memory_used("cuda:0") > 0
    assert torch.equal(weight.detach().cpu(), wanted)
    del weight
    assert loader.memory_used("cuda:0") == 0
    moved = models.load(loader, folder, pool_bytes=POOL).to("cpu")
    gc.collect()
    assert loader.memory_used("cuda:0") == 0
    assert moved.lm_head.weight is moved.model.embed_tokens.weight
    loader.close()


def test_memory_that_a_kernel_still_reads_is_not_unmapped_under_it(tmp_path):
    loader = make_loader()
    big = torch.randn(4096, 4096)
    folder = dicts.save({"w": big}, tmp_path / "d")
    wanted = result = big.cuda()
    for _ in range(20):
        weight = dicts.load(loader, folder, "cuda:0", pool_bytes=POOL)["w"]
        result = torch.eye(4096, device="cuda:0")
        for _ in range(20):
            result = result @ weight * 0.01
        copied = weight.clone()  # enqueued behind many products
        del weight
        assert torch.equal(copied, wanted)
    del result
    assert loader.memory_used("cuda:0") == 0
    loader.close()


def test_five_hundred_loads_leave_the_drivers_free_memory_as_it_was(tmp_path):
    loader = make_loader()
    folder = dicts.save({"w": torch.randn(1 << 20), "e": torch.empty(0)}, tmp_path / "d")
    dicts.load(loader, folder, "cuda:0", pool_bytes=POOL)
    before = loader.free_bytes("cuda:0"), loader.device("cuda:0").driver_free()
    for _ in range(500):
        dicts.load(loader, folder, "cuda:0", pool_bytes=POOL)
    assert (loader.free_bytes("cuda:0"), loader.device("cuda:0").driver_free()) == before
    loader.close()


def test_no_room_on_a_gpu_is_told(tmp_path):
    loader = make_loader(memory=2 * MIB)
    folder = dicts.save({"w": torch.randn(1 << 20)}, tmp_path / "d")
    with pytest.raises(DeviceMemoryError):
        dicts.load(loader, folder, "cuda:0", pool_bytes=POOL)
    loader.close()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_is_split_over_two_gpus_by_a_map(tmp_path, family):
    loader, model = make_loader(2), make_model(family)
    folder = models.save(model, tmp_path / "m")
    layers = "model.layers" if family == "llama" else "transformer.h"
    last = {"llama": ("model.norm", "lm_head"), "gpt2": ("transformer.ln_f",)}[family]
    device_map = {"": 0, f"{layers}.1": 1} | dict.fromkeys(last, 1)
    found = models.load(loader, folder, device_map=device_map, pool_bytes=POOL)
    assert {p.device.index for p in found.parameters()} == {0, 1}
    assert said(found) == said(model.to("cuda:0"))
    other = found.to("cuda:1")  # copies from memory that only its own GPU was given access to
    assert {p.device.index for p in other.parameters()} == {1}
    loader.close()
