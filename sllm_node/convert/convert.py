"""Convert a model, once, into the format that loads fast.

The source is opened, its config, generation config and tokenizer go into a temporary folder, a
module without weights is built from them, and tells which tensors are needed and in which order.
Then one tensor after another is read, converted if its layout or dtype differs, and written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sllm_node.checkpoint.belongings import in_the_way
from sllm_node.checkpoint.catalog import Checkpoint, is_model_name, may_go, open_checkpoint
from sllm_node.checkpoint.index import INDEX_FILE, VERSION, Shard, TensorIndex
from sllm_node.checkpoint.layout import Layout, plan_layout
from sllm_node.checkpoint.output import (
    DiskFiles,
    OutputFiles,
    SpaceNeeded,
    check_still_ours,
    linked,
    publish,
    write_errors_named,
)
from sllm_node.checkpoint.recode import check_codec
from sllm_node.checkpoint.sinks import chunk_bytes_or_default
from sllm_node.checkpoint.temporary import temporary_folder
from sllm_node.checkpoint.writer import ShardWriter, with_shards, write_index
from sllm_node.codec.names import EXPONENT
from sllm_node.convert.mapping import GroupRunner
from sllm_node.convert.plan import Plan, check_computable, plan_tensors, tensor_bytes
from sllm_node.convert.sources import (
    Download,
    Source,
    check_apart,
    download_from_hub,
    open_source,
)
from sllm_node.convert.tensors import COMPUTE_DTYPES, dtype_named
from sllm_node.convert.texts import context_tokens, library_errors_named, set_dtype
from sllm_node.core.clock import Clock, MonotonicClock
from sllm_node.core.errors import (
    CheckpointFormatError,
    ConversionError,
    UnsupportedArchitectureError,
)
from sllm_node.core.units import GIB, PAGE
from sllm_node.engine.skeleton import (
    SUPPORTED,
    architecture,
    build_module,
    build_skeleton,
    forward_order,
    read_config,
    registration_order,
)

_DISK: Final = DiskFiles()
_CLOCK: Final = MonotonicClock()


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert."""

    dtype: str | None = None
    """What to cast float tensors to; None keeps the source's, and dequantises to bfloat16."""
    chunk_bytes: int | None = None
    """What one digest covers, before it is encoded; None: what suits the codec."""
    shard_bytes: int = 4 * GIB
    """The size of a shard at most, but for a tensor that is larger."""
    force: bool = False
    """Replace a checkpoint of that name, if nothing else is in its folder."""
    codec: str = EXPONENT
    """One of `codec.names.CHOICES`."""
    servable: bool = True
    """Refuse what a node can't serve: other architectures, folders without a tokenizer."""


@dataclass(frozen=True, slots=True)
class ConvertProgress:
    """How far a conversion has come."""

    bytes_done: int
    bytes_total: int
    tensor: str
    """The one being written."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a conversion reaches outside itself; tests put their own in."""

    files: OutputFiles = _DISK
    clock: Clock = _CLOCK
    download: Download = download_from_hub


def convert(
    source: str,
    name: str,
    store: Path,
    options: ConvertOptions = ConvertOptions(),
    *,
    progress: Callable[[ConvertProgress], None] | None = None,
    surroundings: Surroundings = Surroundings(),
) -> Checkpoint:
    """Convert `source`, a folder of safetensors, a GGUF file or a hub id, to `store`/`name`.

    Raises:
        ConversionError: the source can't be converted, or the name is taken or not allowed.
        UnsupportedArchitectureError: no step loop for such a model.
        StoreFullError: the checkpoint does not fit on the disk.
        StorageWriteError: the disk failed.
    """
    chunk_bytes = chunk_bytes_or_default(options.chunk_bytes, options.codec)
    _check(name, store, options, chunk_bytes)
    check_apart(source, store / name)
    if (store / name).exists() and (problem := in_the_way(store / name)):
        raise ConversionError(f"name {name!r}", f"is taken: {store / name} {problem}")
    dtype = _dtype(options)
    download = surroundings.download
    with open_source(source, dtype, download, needs_tokenizer=options.servable) as opened:
        return convert_opened(
            opened, source, store / name, options, progress=progress, surroundings=surroundings
        )


def convert_opened(
    opened: Source,
    origin: str,
    destination: Path,
    options: ConvertOptions,
    *,
    progress: Callable[[ConvertProgress], None] | None = None,
    surroundings: Surroundings = Surroundings(),
) -> Checkpoint:
    """Write `opened`, which `origin` names in errors, as the checkpoint `destination`.

    Raises:
        As `convert` does.
    """
    dtype = _dtype(options)
    chunk_bytes = chunk_bytes_or_default(options.chunk_bytes, options.codec)
    place = linked(destination)
    store, name = place.parent, destination.name
    space = SpaceNeeded()
    files = surroundings.files
    with write_errors_named(store, space, files), temporary_folder(store, name) as folder:
        opened.write_texts(folder)
        model, order = _build(folder, origin, servable=options.servable)
        plan = plan_tensors(model, order, opened, dtype, origin)
        if options.servable:
            check_computable(plan, model, origin)
        set_dtype(folder, plan.compute_dtype)
        layout = plan_layout((tensor.spec for tensor in plan.tensors), options.shard_bytes)
        space.require(layout.size, store, files)
        with ShardWriter(folder, layout, chunk_bytes, files, options.codec) as writer:
            shards = _write(plan, layout, writer, GroupRunner(model), progress)
        created = int(surroundings.clock.wall())
        index = _index(name, model.config, plan, layout, chunk_bytes, created)
        write_index(folder, with_shards(index, shards), files)
        _check_written(folder, origin)
        check_still_ours(place)
        publish(folder, place, files, replace=options.force)
    return open_checkpoint(destination)


def _check_written(folder: Path, origin: str) -> None:
    """Make sure, before it takes anything's place, that a node can open what was written."""
    try:
        open_checkpoint(folder)
    except CheckpointFormatError as error:
        problem = f"what was written of it can't be read back ({error.problem}); "
        raise ConversionError(origin, f"{problem}nothing was replaced") from error


def _index(
    name: str, config: Any, plan: Plan, layout: Layout, chunk_bytes: int, created: int
) -> TensorIndex:
    """Return the index of what is written, but for its shards."""
    return TensorIndex(
        version=VERSION,
        model=name,
        architecture=architecture(config),
        dtype=plan.dtype,
        context_tokens=context_tokens(config),
        chunk_bytes=chunk_bytes,
        created=created,
        shards=(),
        tensors=layout.tensors,
        aliases=plan.aliases,
    )


def _dtype(options: ConvertOptions) -> str | None:
    return dtype_named(options.dtype) if options.dtype is not None else None


def _check(name: str, store: Path, options: ConvertOptions, chunk_bytes: int) -> None:
    if not is_model_name(name):
        raise ConversionError(
            f"name {name!r}",
            "is not allowed: letters, digits, '.', '_', ':' and '-', at most 96, "
            "a letter or digit first",
        )
    _check_free(name, store, force=options.force)
    if options.servable and _dtype(options) not in {None, *COMPUTE_DTYPES}:
        problem = "is none that a node computes in; give bfloat16, float16 or float32"
        raise ConversionError(f"dtype {options.dtype!r}", problem)
    check_codec(options.codec, chunk_bytes)
    if options.shard_bytes < PAGE or options.shard_bytes % PAGE:
        problem = f"is not a multiple of {PAGE} bytes"
        raise ConversionError(f"shard size {options.shard_bytes}", problem)


def _check_free(name: str, store: Path, *, force: bool) -> None:
    path = store / name
    if path.exists() and not may_go(path):
        raise ConversionError(
            f"name {name!r}",
            f"is taken: {path} is no checkpoint (it has no {INDEX_FILE}) and is left alone; "
            "choose another name or --store",
        )
    if (path / INDEX_FILE).exists() and not force:
        raise ConversionError(
            f"name {name!r}",
            f"is taken in {store}; 'sllm-node rm {name}' removes that checkpoint, "
            "--force replaces it",
        )


def _build(folder: Path, origin: str, *, servable: bool) -> tuple[Any, tuple[str, ...]]:
    """Return the module that the texts in `folder` describe, without weights, and its order.

    Of what the step loop can't run, the order of registration: nearly always that of the forward
    pass.
    """
    with library_errors_named(origin, "no model can be built from its config"):
        try:
            model = build_skeleton(folder)
            return model, forward_order(model)
        except UnsupportedArchitectureError as error:
            if servable:
                raise UnsupportedArchitectureError(origin, error.architecture, SUPPORTED) from error
        model = build_module(read_config(folder))
        return model, registration_order(model)


def _write(
    plan: Plan,
    layout: Layout,
    writer: ShardWriter,
    runner: GroupRunner,
    progress: Callable[[ConvertProgress], None] | None,
) -> tuple[Shard, ...]:
    total = sum(entry.size for entry in layout.tensors)
    done = 0
    for tensor, entry in zip(plan.tensors, layout.tensors, strict=True):
        writer.begin(entry)
        for piece in tensor_bytes(tensor, runner):
            writer.write(piece)
            done += len(piece)
            if progress is not None:
                progress(ConvertProgress(done, total, entry.name))
    return writer.finish()
