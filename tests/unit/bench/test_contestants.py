import pytest
import torch

from sllm_node.bench.contestants import OURS, Ours, find_peer
from sllm_node.bench.reference import read_reference
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.errors import BenchError
from sllm_node.core.units import MIB
from tests.unit.bench.rig import WEIGHTS


@pytest.fixture
def ours(files):
    contestant = Ours(StoreConfig(pool_bytes=ByteSize(64 * MIB), reader_threads=2))
    contestant.start(files[0].checkpoint, "cpu")
    yield contestant
    contestant.close()


@pytest.mark.parametrize("warm", [True, False])
def test_our_tensors_are_those_of_the_files(files, ours, warm):
    for one in (*files, files[0]):
        loaded = ours.load(one, "cpu", warm=warm)
        found = read_reference(one, "cpu").compare(loaded.tensors)
        assert (found.same, found.different, found.missing) == (39, (), ())
        loaded.free()


def test_a_second_close_does_nothing(ours):
    ours.close()


@pytest.mark.parametrize("name", ["safetensors", "transformers", "fastsafetensors", "runai"])
def test_a_peer_that_is_installed_loads_every_tensor(files, name):
    peer = find_peer(name)
    if peer.version() is None:
        pytest.skip(f"{name} is not installed")
    loaded = peer.load(files[0], "cpu", warm=True)
    found = read_reference(files[0], "cpu").compare(loaded.tensors)
    assert (found.same, found.different, found.missing) == (39, (), ())
    loaded.free()
    assert loaded.tensors == {}


def test_a_peer_for_gpus_refuses_the_cpu():
    peer = find_peer("instanttensor")
    assert peer.refusal("cpu") == "loads onto CUDA devices only"
    assert peer.refusal("cuda:0") is None


def test_an_unknown_peer_is_refused_with_those_there_are():
    with pytest.raises(BenchError, match=f"nobody.*{OURS}.*safetensors"):
        find_peer("nobody")


def test_the_comparison_names_what_differs_and_what_is_missing(files):
    reference = read_reference(files[0], "cpu")
    found = reference.compare({"lm_head.weight": torch.zeros(8192, 512, dtype=torch.bfloat16)})
    assert found.different == ("lm_head.weight",)
    assert len(found.missing) == 38
    assert reference.compare(WEIGHTS).same == 0


def test_without_room_the_reference_is_read_when_it_is_compared(files):
    reference = read_reference(files[0], "cpu", lambda device: 0)
    loaded = find_peer("safetensors").load(files[1], "cpu", warm=True)
    assert reference.compare(loaded.tensors).same == 39
