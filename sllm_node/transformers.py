"""Fast saving and loading of transformers models, for programs of your own.

    from sllm_node.transformers import load_model, save_model

    save_model("Qwen/Qwen3-8B", "checkpoints/qwen3-8b")
    model = load_model("checkpoints/qwen3-8b")

`sllm_node.torch` is the same for plain dicts of tensors. Calls are synchronous and may be made from
any thread; what goes wrong is an `sllm_node.core.errors.SllmError`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sllm_node.library import models
from sllm_node.library.files import AnyPath
from sllm_node.library.loader import PROCESS
from sllm_node.torch import release_pool

__all__ = ["load_model", "release_pool", "save_model"]


def save_model(
    model_or_source: Any,
    directory: AnyPath,
    *,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    progress: bool = False,
) -> Path:
    """Write a causal language model to the folder `directory`, whole or not at all; return the folder.

    `model_or_source` is a transformers model in memory, which must not change meanwhile, or a
    folder of safetensors, a GGUF file or a hub id. Config, generation config and the source's
    tokenizer go with it; a model in memory has none, so give its `tokenizer` if a node is to serve
    it. `dtype` is what float tensors are cast to; without it a model in memory is stored exactly.
    `overwrite` replaces a checkpoint that lies there, and nothing else: a folder with other things in
    it is refused.

    Raises:
        ArgumentError: an argument, or a folder that must not be replaced.
        ConversionError: a model that can't be written, saying why.
        StoreFullError, StorageWriteError: the disk.
    """
    return models.save(
        model_or_source,
        directory,
        dtype=dtype,
        overwrite=overwrite,
        tokenizer=tokenizer,
        progress=progress,
    )


def load_model(  # noqa: PLR0913 - each is a choice of its own
    directory_or_name: AnyPath,
    *,
    device_map: str | int | torch.device | Mapping[str, Any] = "auto",
    dtype: str | torch.dtype | None = None,
    store: AnyPath | None = None,
    attn_implementation: str | None = None,
    pool_bytes: int | str | None = None,
    progress: bool = False,
) -> Any:
    """Return the model in a folder, or the one of that name in the folder `store`, ready to use.

    It is what `AutoModelForCausalLM.from_pretrained` would return, in eval mode, with transformers'
    default attention unless `attn_implementation` names another. Each parameter has a storage of its
    own over memory that belongs to the model: the memory is free again when the last tensor of it is
    gone, so a parameter may outlive its model, at the price of all of the memory.

    `device_map`: `auto` is the first GPU with room, else as few as have it together, cut between
    layers, else an error; without any GPU the CPU. A device takes all of it. A dict from modules to
    devices, as accelerate's, must give each device one run of whole layers in forward order.

    `dtype` converts after the load, tensor by tensor on the device: until the end there must be room
    for both, and every load pays for it. Save in the dtype that you load.

    `pool_bytes` is as in `sllm_node.torch.load_dict`.

    Raises:
        ArgumentError: an argument; DeviceMapError names the entry.
        CheckpointError: no checkpoint there, its files are damaged, or it is a plain dict.
        DeviceMemoryError: no room. DeviceError: no such device, or it failed.
    """
    return models.load(
        PROCESS.loader(),
        directory_or_name,
        device_map=device_map,
        dtype=dtype,
        store=store,
        attn_implementation=attn_implementation,
        pool_bytes=pool_bytes,
        progress=progress,
    )
