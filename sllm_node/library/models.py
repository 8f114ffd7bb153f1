"""Transformers models: into our format, and back as ordinary models whose memory our store loaded."""

from collections.abc import Mapping
from functools import partial
from os import fspath
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from sllm_node.checkpoint.catalog import Checkpoint
from sllm_node.checkpoint.index import TensorIndex
from sllm_node.codec.names import RAW
from sllm_node.convert.convert import ConvertOptions, convert_opened
from sllm_node.convert.mapping import kept_in_fp32
from sllm_node.convert.memory import open_model
from sllm_node.convert.sources import check_apart, download_from_hub, open_source
from sllm_node.convert.tensors import COMPUTE_DTYPES, dtype_named
from sllm_node.convert.texts import GENERATION_FILE
from sllm_node.core.errors import ArgumentError, CheckpointFormatError, NotServableError, SllmError
from sllm_node.core.types import LoadProgress
from sllm_node.engine.skeleton import BUILDING, build_module, read_config
from sllm_node.engine.spread import spread
from sllm_node.engine.weights import TORCH_DTYPES, bind_views, torch_name, views_by
from sllm_node.library.files import (
    AnyPath,
    begun_anew,
    destination,
    find,
    pool_size,
    shown,
    unchanged,
)
from sllm_node.library.loader import Loader
from sllm_node.library.memory import Held
from sllm_node.library.placement import place, place_modules


def save(
    model: Any,
    directory: AnyPath,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    progress: bool = False,
) -> Path:
    """Do what `sllm_node.transformers.save_model` promises."""
    if not isinstance(model, PreTrainedModel):
        _check_source(model, tokenizer, directory)
    target = destination(directory, overwrite=overwrite)
    name = None if dtype is None else stored_dtype(dtype)
    options = ConvertOptions(dtype=name, force=overwrite, servable=False, codec=RAW)
    with shown(f"saving {target.name}", progress=progress) as show:
        write = partial(
            convert_opened,
            destination=target,
            options=options,
            progress=None if show is None else lambda p: show(p.bytes_done, p.bytes_total),
        )
        if isinstance(model, PreTrainedModel):
            source = open_model(model, tokenizer)
            write(source, source.origin)
            return target
        with open_source(str(model), name, download_from_hub, needs_tokenizer=False) as opened:
            write(opened, str(model))
    return target


@begun_anew
def load(  # noqa: PLR0913 - one for each argument of load_model
    loader: Loader,
    source: AnyPath,
    *,
    device_map: Any = "auto",
    dtype: Any = None,
    store: AnyPath | None = None,
    attn_implementation: str | None = None,
    pool_bytes: int | str | None = None,
    progress: bool = False,
) -> Any:
    """Do what `sllm_node.transformers.load_model` promises."""
    checkpoint = find(source, store)
    if not checkpoint.index.is_model:
        raise NotServableError(checkpoint.model)
    wanted = None if dtype in (None, "auto") else stored_dtype(dtype)
    pool = pool_size(pool_bytes)
    build = partial(_build, checkpoint.path, wanted, attn_implementation)
    showing = shown(f"loading {checkpoint.path.name}", progress=progress)
    with unchanged(checkpoint), showing as show:
        if isinstance(device_map, Mapping):
            model = build()
            placement = place_modules(checkpoint.index, device_map, _names(model))
            build = partial(_already, model)
        else:
            placement = place(checkpoint.index, device_map, loader)

        def watch(at: LoadProgress) -> None:
            assert show is not None
            show(at.bytes_done, at.bytes_total)

        loaded = loader.load(
            checkpoint,
            placement,
            pool_bytes=pool,
            watch=None if show is None else watch,
            meanwhile=build,
        )
    return _bound(loaded.made, checkpoint, loaded.parts, wanted)


def _check_source(source: Any, tokenizer: Any, directory: AnyPath) -> None:
    """Refuse what is no source of a model, or would be deleted by being saved to `directory`."""
    if not isinstance(source, (str, Path)):
        problem = f"{type(source).__name__} is no transformers model, folder or hub id"
        raise ArgumentError("model_or_source", problem)
    if tokenizer is not None:
        raise ArgumentError("tokenizer", "goes with a model in memory; a source has its own")
    check_apart(str(source), Path(fspath(directory)).expanduser())


def stored_dtype(dtype: Any) -> str:
    """Return the stored name of a dtype that a model can compute in.

    Raises:
        ArgumentError: it can't.
    """
    try:
        name = dtype_named(str(dtype).removeprefix("torch."))
    except SllmError as error:
        raise ArgumentError("dtype", str(error)) from error
    if name not in COMPUTE_DTYPES:
        raise ArgumentError("dtype", f"a model can't compute in {dtype}")
    return name


def _build(folder: Path, dtype: str | None, attention: str | None) -> Any:
    """Return the module without weights, as transformers would make it."""
    try:
        config = read_config(folder)
        config.name_or_path = str(folder)
        if dtype is not None:
            config.dtype = TORCH_DTYPES[dtype]
        model = build_module(config, attention)
        if (folder / GENERATION_FILE).is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError, KeyError, AttributeError) as error:
        problem = f"no model can be built from its config: {error}"
        raise CheckpointFormatError(str(folder), problem) from error
    return model


def _already(model: Any) -> Any:
    return model


def _names(model: Any) -> set[str]:
    names = {name for name, _ in model.named_modules()}
    return names | {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _bound(model: Any, checkpoint: Checkpoint, parts: tuple[Held, ...], dtype: str | None) -> Any:
    """Let `model` have the bytes of `parts`, as dtype `dtype` if one is asked for."""
    index = checkpoint.index
    views = views_by(index, partial(_bytes_of, parts, index))
    if dtype is not None:
        views = _cast(views, index, model, dtype)
    with BUILDING, torch.random.fork_rng(devices=[]):
        bind_views(model, index, views, torch_name(parts[0].part.device))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.__dict__.pop("_is_hf_initialized", None)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if len(parts) > 1:
        spread(model)
        model.hf_device_map = _device_map(index, parts)
    return model


def _bytes_of(parts: tuple[Held, ...], index: TensorIndex, start: int, end: int) -> torch.Tensor:
    for part in parts:
        if part.has(start, end):
            return part.tensor(start, end)
    raise CheckpointFormatError(index.model, f"bytes {start} to {end} lie on no device")


def _cast(
    views: dict[str, torch.Tensor], index: TensorIndex, model: Any, dtype: str
) -> dict[str, torch.Tensor]:
    """Return copies of what the forward pass computes with as `dtype`, and the rest as it is."""
    wanted = TORCH_DTYPES[dtype]
    fp32 = kept_in_fp32(model, wanted)
    cast = dict(views)
    for entry in index.tensors:
        if entry.dtype in COMPUTE_DTYPES:
            kept = fp32 is not None and fp32.search(entry.name)
            cast[entry.name] = views[entry.name].to(torch.float32 if kept else wanted)
    return cast


def _device_map(index: TensorIndex, parts: tuple[Held, ...]) -> dict[str, str]:
    """Return the device of each tensor, by name, as transformers and accelerate look it up."""
    found = {}
    for entry in index.tensors:
        start = index.shard_base(entry.shard) + entry.offset
        part = next(part for part in parts if part.has(start, start + entry.size))
        found[entry.name] = torch_name(part.part.device)
    return found
