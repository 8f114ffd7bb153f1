import pytest
import torch

from sllm_node.checkpoint.index import VERSION, Shard, TensorIndex
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.checkpoint.split import layer_starts
from sllm_node.core.errors import ArgumentError, DeviceMapError, DeviceMemoryError
from sllm_node.core.types import Part
from sllm_node.device.cpu import CpuDevice
from sllm_node.library.placement import device_name, place, place_modules

LAYERS = 4
NAMES = (
    "model.embed.weight",
    *(f"model.layers.{n}.{part}" for n in range(LAYERS) for part in ("attn.weight", "mlp.weight")),
    "model.norm.weight",
)
MODULES = {"model", "model.layers", "model.rotary", "lm_head", "model.embed", "model.norm"} | {
    f"model.layers.{n}{part}" for n in range(LAYERS) for part in ("", ".attn", ".mlp")
}


def index_of(names=NAMES, aliases=()):
    layout = plan_layout((TensorSpec(name, "U8", (1000,)) for name in names), 1 << 20)
    shards = tuple(Shard("shard-00000.bin", size, ()) for size in layout.shard_sizes)
    return TensorIndex(
        VERSION, "m", "X", "U8", 1, 4096, 0, shards, layout.tensors, tuple(aliases)
    )  # fmt: skip


class Machine:
    """A machine with GPUs of some free bytes each."""

    def __init__(self, *rooms):
        self.rooms = {f"cuda:{n}": room for n, room in enumerate(rooms)}
        self.opened = []

    def gpus(self):
        return tuple(self.rooms)

    def device(self, name):
        self.opened.append(name)
        return CpuDevice(self.rooms[name], name)

    def free_bytes(self, name):
        return self.rooms[name]


def start_of(index, name):
    return next(entry.offset for entry in index.tensors if entry.name == name)


@pytest.mark.parametrize(
    ("given", "name"),
    [("cpu", "cpu"), ("cuda:3", "cuda:3"), (1, "cuda:1"), ("cuda", "cuda:0"),
     (torch.device("cuda", 2), "cuda:2"), (torch.device("cpu"), "cpu"),
     (torch.device("cpu", 0), "cpu")],
)  # fmt: skip
def test_devices_are_named_as_people_name_them(given, name):
    assert device_name(given, "device") == name


@pytest.mark.parametrize("given", ["disk", "meta", "cuda:x", -1, None, True, 1.5, "mps"])
def test_what_is_no_device_is_refused(given):
    with pytest.raises(ArgumentError, match="is no device"):
        device_name(given, "device")


def test_auto_is_the_cpu_without_any_gpu():
    index = index_of()
    assert place(index, "auto", Machine()) == (Part("cpu", 0, index.size),)


def test_auto_is_the_first_gpu_with_room_and_opens_no_other():
    index, machine = index_of(), Machine(4096, 1 << 20, 1 << 20)
    assert place(index, "auto", machine) == (Part("cuda:1", 0, index.size),)
    assert machine.opened == ["cuda:0", "cuda:1"]


def test_auto_takes_as_few_gpus_as_hold_it_together_cut_between_layers():
    index = index_of()
    placement = place(index, "auto", Machine(12288, 8192, 12288))
    assert [part.device for part in placement] == ["cuda:0", "cuda:2"]
    assert placement[0].start == 0
    assert placement[0].end == placement[1].start
    assert placement[0].end in layer_starts(index)
    assert placement[1].end == index.size


def test_auto_without_room_is_an_error_and_not_the_cpu():
    with pytest.raises(DeviceMemoryError, match="cuda:0, cuda:1"):
        place(index_of(), "auto", Machine(4096, 4096))


def test_a_map_becomes_runs_of_layers():
    index = index_of()
    wanted = {"model": 0, "model.layers.2": 1, "model.layers.3": "cuda:1", "model.norm": 1}
    cut = start_of(index, "model.layers.2.attn.weight")
    assert place_modules(index, wanted, MODULES) == (
        Part("cuda:0", 0, cut),
        Part("cuda:1", cut, index.size),
    )
    assert place_modules(index, {"": "cpu"}, MODULES) == (Part("cpu", 0, index.size),)


def test_entries_of_modules_without_weights_do_no_harm():
    index = index_of()
    wanted = {"model": 0, "model.rotary": 0, "lm_head": 0}
    assert place_modules(index, wanted, MODULES) == (Part("cuda:0", 0, index.size),)


@pytest.mark.parametrize(
    ("device_map", "entry", "problem"),
    [
        ({"model": 0, "modle.norm": 1}, "modle.norm", "no module"),
        ({"model": "disk"}, "model", "no device"),
        ({"model.layers": 0, "model.norm": 0}, "model.embed.weight", "no entry names"),
        ({"model": 0, "model.layers.1": 1}, "model", "goes back to cuda:0"),
        ({"model": 0, "model.layers.3.mlp": 1, "model.norm": 1}, "model.layers.3.mlp", "divides layer 3"),
        ({"model": 0, "model.norm": "cpu"}, "model.norm", "one kind"),
    ],
)  # fmt: skip
def test_a_map_that_cant_be_carried_out_names_the_first_such_entry(device_map, entry, problem):
    with pytest.raises(DeviceMapError, match=problem) as caught:
        place_modules(index_of(), device_map, MODULES)
    assert caught.value.entry == entry


def test_tied_tensors_lie_on_one_device():
    index = index_of(aliases=[("lm_head.weight", "model.embed.weight")])
    wanted = {"model.embed": 0, "model.layers": 0, "model.norm": 1, "lm_head": 1}
    with pytest.raises(DeviceMapError, match="tied to") as caught:
        place_modules(index, wanted, MODULES)
    assert caught.value.entry == "lm_head"
