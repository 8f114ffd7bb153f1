"""From a device_map to a placement: which bytes of a checkpoint go to which device.

A checkpoint's tensors lie in the order in which the forward pass needs them, and a device gets one
run of them. So a map must name runs of whole layers in that order; what else accelerate can carry
out (a module twice on one device with another between, halves of a layer, disks) is refused by the
name of its first entry that can't be done.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Protocol

import torch

from sllm_node.checkpoint.index import TensorEntry, TensorIndex
from sllm_node.checkpoint.split import layer_of, split
from sllm_node.core.errors import ArgumentError, DeviceMapError, DeviceMemoryError
from sllm_node.core.types import Part, Placement
from sllm_node.core.units import align_up
from sllm_node.device.base import Device

CPU: Final = "cpu"
AUTO: Final = "auto"


class Devices(Protocol):
    """The devices of this machine; the loader satisfies it."""

    def gpus(self) -> Sequence[str]:
        """Return the names of the GPUs."""

    def device(self, name: str) -> Device:
        """Return a device, opening it the first time."""

    def free_bytes(self, name: str) -> int:
        """Return the memory that a load onto device `name` can have now."""


def device_name(device: Any, argument: str) -> str:
    """Return our name of a device as people write it: `cpu`, `cuda:1`, 1, a torch.device.

    Raises:
        ArgumentError: it is no device.
    """
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        return f"cuda:{device}"
    if isinstance(device, torch.device):
        device = CPU if device.type == CPU else str(device)  # torch's only one, also as cpu:0
    if device == "cuda":
        return "cuda:0"
    kind, _, number = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise ArgumentError(argument, f'{device!r} is no device; there are "cpu" and "cuda:N"')
    return str(device)


def place(index: TensorIndex, device_map: Any, devices: Devices) -> Placement:
    """Return where `device_map`, `auto` or a device, puts all of a checkpoint.

    Raises:
        ArgumentError: it is neither.
        DeviceMemoryError: the GPUs together have no room; the CPU is no substitute unasked.
    """
    if device_map == AUTO:
        return _automatic(index, devices)
    return (Part(device_name(device_map, "device_map"), 0, index.size),)


def _automatic(index: TensorIndex, devices: Devices) -> Placement:
    """Return the first GPU with room, or as few as have it together; the CPU if there is none."""
    rooms: dict[str, int] = {}
    for name in devices.gpus():
        grain = devices.device(name).granularity
        # Each part is rounded up by itself.
        rooms[name] = max(0, devices.free_bytes(name) - grain)
        if align_up(index.size, grain) <= rooms[name]:
            return (Part(name, 0, index.size),)
    if not rooms:
        return (Part(CPU, 0, index.size),)
    names = sorted(rooms, key=lambda name: -rooms[name])
    for count in range(2, len(names) + 1):
        chosen = sorted(names[:count], key=list(rooms).index)
        given = [rooms[name] for name in chosen]
        cuts = split(index, 0, given) if all(given) else None
        if cuts is not None:
            return tuple(
                Part(name, cut.start, cut.end) for name, cut in zip(chosen, cuts, strict=True)
            )
    total = sum(devices.device(name).memory_total for name in rooms)
    raise DeviceMemoryError(", ".join(rooms), index.size, sum(rooms.values()), total)


def place_modules(
    index: TensorIndex, device_map: Mapping[str, Any], modules: Collection[str]
) -> Placement:
    """Return where `device_map`, from modules to devices, puts each run of tensors.

    `modules` are the names of all modules and tensors of the model.

    Raises:
        DeviceMapError: naming the first entry that can't be carried out.
    """
    wanted = {}
    for name, device in device_map.items():
        if name and name not in modules:
            raise DeviceMapError(name, "is no module of this model")
        try:
            wanted[name] = device_name(device, name)
        except ArgumentError as error:
            raise DeviceMapError(name, f"can't be carried out: {error.problem}") from error
    entries = {entry.name: _entry_for(entry.name, wanted) for entry in index.tensors}
    _check_ties(index, entries, wanted)
    runs = _runs(index, entries, wanted)
    ends = [*(start for _, start in runs[1:]), index.size]
    return tuple(Part(name, start, end) for (name, start), end in zip(runs, ends, strict=True))


def _entry_for(tensor: str, wanted: Mapping[str, str]) -> str:
    """Return the entry that says where `tensor` goes: the one that names most of it."""
    parts = tensor.split(".")
    for count in range(len(parts), -1, -1):
        if (name := ".".join(parts[:count])) in wanted:
            return name
    raise DeviceMapError(tensor, "is a tensor that no entry names, nor a module around it")


def _check_ties(index: TensorIndex, entries: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for alias, stored in index.aliases:
        entry = _entry_for(alias, wanted)
        if wanted[entry] != wanted[entries[stored]]:
            raise DeviceMapError(
                entry,
                f"is on {wanted[entry]}, but {alias} is tied to {stored}, which is on "
                f"{wanted[entries[stored]]}",
            )


def _runs(
    index: TensorIndex, entries: Mapping[str, str], wanted: Mapping[str, str]
) -> list[tuple[str, int]]:
    """Return each device and the byte of the checkpoint where its run begins."""
    runs: list[tuple[str, int]] = []
    before: TensorEntry | None = None
    for tensor in index.tensors:
        entry = entries[tensor.name]
        device = wanted[entry]
        if before is None or device != runs[-1][0]:
            start = index.shard_base(tensor.shard) + tensor.offset if before else 0
            _check_cut(before, tensor, entry, device, runs)
            runs.append((device, start))
        before = tensor
    return runs


def _check_cut(
    before: TensorEntry | None,
    tensor: TensorEntry,
    entry: str,
    device: str,
    runs: Sequence[tuple[str, int]],
) -> None:
    """Refuse a run that begins at `tensor`, if it can't."""
    if before is None:
        return
    if device in (name for name, _ in runs):
        raise DeviceMapError(
            entry,
            f"goes back to {device}, which has layers before those on {runs[-1][0]}; "
            "a device takes one run of layers, in the order of the forward pass",
        )
    if device.partition(":")[0] != runs[0][0].partition(":")[0]:
        raise DeviceMapError(entry, f"is on {device}, others on {runs[0][0]}; use one kind")
    layer = layer_of(tensor.name)
    if layer is not None and layer == layer_of(before.name):
        raise DeviceMapError(entry, f"divides layer {layer}; a layer lies on one device as a whole")
