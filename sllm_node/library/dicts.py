"""Plain dicts of tensors: into our format, and back in their order, tied ones tied."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from sllm_node.checkpoint.belongings import ORDER_FILE
from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.index import NO_ARCHITECTURE, VERSION, TensorIndex
from sllm_node.checkpoint.layout import TensorSpec, plan_layout
from sllm_node.checkpoint.output import (
    DiskFiles,
    SpaceNeeded,
    check_still_ours,
    linked,
    publish,
    write_errors_named,
)
from sllm_node.checkpoint.temporary import temporary_folder
from sllm_node.checkpoint.writer import ShardWriter, write_index
from sllm_node.convert.tensors import MemoryTensor, check_tensor
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.errors import ArgumentError, CheckpointFormatError, ConversionError
from sllm_node.core.types import LoadProgress, Part
from sllm_node.core.units import GIB, MIB
from sllm_node.engine.weights import views_by
from sllm_node.library.files import (
    AnyPath,
    Show,
    begun_anew,
    destination,
    find,
    pool_size,
    shown,
    unchanged,
)
from sllm_node.library.loader import Loader
from sllm_node.library.overlap import Extent, overlapping
from sllm_node.library.placement import device_name

_ORIGIN: Final = "state_dict"
_CHUNK_BYTES: Final = 16 * MIB
_SHARD_BYTES: Final = 4 * GIB


def save(
    state_dict: Any, directory: AnyPath, *, overwrite: bool = False, progress: bool = False
) -> Path:
    """Do what `sllm_node.torch.save_dict` promises."""
    target = destination(directory, overwrite=overwrite)
    tensors, aliases = _sorted_out(state_dict)
    layout = plan_layout((TensorSpec(t.name, t.dtype, t.shape) for t in tensors), _SHARD_BYTES)
    place, files, space = linked(target), DiskFiles(), SpaceNeeded()
    store = place.parent
    with write_errors_named(store, space, files), temporary_folder(store, target.name) as folder:
        space.require(layout.size, store, files)
        with (
            ShardWriter(folder, layout, _CHUNK_BYTES, files) as writer,
            shown(f"saving {target.name}", progress=progress) as show,
        ):
            for tensor, entry in zip(tensors, layout.tensors, strict=True):
                writer.begin(entry)
                _write(tensor, writer, layout.size, entry.offset, show)
            shards = writer.finish()
        if aliases:
            (folder / ORDER_FILE).write_bytes(msgspec.json.encode(list(state_dict)))
        index = TensorIndex(
            version=VERSION,
            model=target.name,
            architecture=NO_ARCHITECTURE,
            dtype=_most_common(tensors),
            context_tokens=1,
            chunk_bytes=_CHUNK_BYTES,
            created=int(MonotonicClock().wall()),
            shards=shards,
            tensors=layout.tensors,
            aliases=aliases,
        )
        write_index(folder, index, files)
        check_still_ours(place)
        publish(folder, place, files, replace=overwrite)
    return target


@begun_anew
def load(
    loader: Loader,
    directory: AnyPath,
    device: Any = "cpu",
    *,
    store: AnyPath | None = None,
    pool_bytes: int | str | None = None,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Do what `sllm_node.torch.load_dict` promises."""
    checkpoint = find(directory, store)
    index = checkpoint.index
    placement = (Part(device_name(device, "device"), 0, index.size),)
    with shown(f"loading {checkpoint.path.name}", progress=progress) as show:

        def watch(at: LoadProgress) -> None:
            assert show is not None
            show(at.bytes_done, at.bytes_total)

        loaded = loader.load(
            checkpoint,
            placement,
            pool_bytes=pool_size(pool_bytes),
            watch=None if show is None else watch,
            meanwhile=partial(_order, checkpoint),
        )
    views = views_by(index, loaded.parts[0].tensor)
    for alias, name in index.aliases:
        views[alias] = views[name]
    return {name: views[name] for name in loaded.made}


def _sorted_out(
    state_dict: Any,
) -> tuple[tuple[MemoryTensor, ...], tuple[tuple[str, str], ...]]:
    """Return what to store, and of those that are the same memory (name, name stored).

    Raises:
        ArgumentError: it is no dict of names.
        ConversionError: a tensor can't be stored, or two share some of their memory, or may.
    """
    if not isinstance(state_dict, Mapping):
        raise ArgumentError("state_dict", f"is a {type(state_dict).__name__}, not a dict")
    stored: dict[object, MemoryTensor] = {}
    aliases: list[tuple[str, str]] = []
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not _is_text(name):
            raise ArgumentError("state_dict", f"has the key {name!r}, which is no name")
        check_tensor(name, tensor, _ORIGIN)
        key = _place(tensor) if tensor.numel() else name
        if key in stored:
            aliases.append((name, stored[key].name))
        else:
            stored[key] = MemoryTensor(name, tensor)
    _check_apart([one for one in stored.values() if one.tensor.numel()])
    return tuple(stored.values()), tuple(aliases)


def _is_text(name: str) -> bool:
    """Tell whether UTF-8 can say `name`; lone surrogates are no characters."""
    return name.encode(errors="replace").decode() == name


def _place(tensor: torch.Tensor) -> object:
    """Return what two tensors have in common that are the same numbers in the same memory."""
    return (
        tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()),
        tensor.is_neg(),
    )  # fmt: skip


def _check_apart(tensors: list[MemoryTensor]) -> None:
    """Refuse tensors that share some memory and are not the same: they would come back untied."""
    pair = overlapping([_extent(one) for one in tensors])
    if pair is not None:
        share = "share" if all(one.is_solid for one in pair) else "share, or may share,"
        raise ConversionError(
            _ORIGIN,
            f"{pair[0].name!r} and {pair[1].name!r} {share} some of their memory but are not the "
            "same tensor; clone() one of them",
        )


def _extent(one: MemoryTensor) -> Extent:
    tensor, item = one.tensor, one.tensor.element_size()
    steps = tuple(step * item for step in tensor.stride())
    start, device = tensor.data_ptr(), str(tensor.device)
    return Extent(one.name, device, start, item, tuple(tensor.shape), steps)


def _write(
    tensor: MemoryTensor, writer: ShardWriter, total: int, done: int, show: Show | None
) -> None:
    for piece in tensor.slices():
        writer.write(piece)
        done += len(piece)
        if show is not None:
            show(done, total)


def _most_common(tensors: tuple[MemoryTensor, ...]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size
    return next((dtype for dtype, _ in sizes.most_common(1)), "U8")


def _order(checkpoint: Checkpoint) -> list[str]:
    """Return the names in the order of the dict that was saved, or of a model's tensors."""
    index = checkpoint.index
    names = [*(entry.name for entry in index.tensors), *(alias for alias, _ in index.aliases)]
    if not index.aliases:
        return names
    with unchanged(checkpoint):
        return _read_order(checkpoint.path / ORDER_FILE, names)


def _read_order(path: Path, names: list[str]) -> list[str]:
    if not path.is_file():  # of a model
        return names
    try:
        order = msgspec.json.decode(path.read_bytes(), type=list[str])
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointFormatError(str(path), f"can't be read: {error}") from error
    if sorted(order) != sorted(names):
        raise CheckpointFormatError(str(path), "does not name the tensors of the index")
    return order
