"""Fast saving and loading of dicts of tensors, for programs of your own.

    from sllm_node.torch import load_dict, save_dict

    save_dict(module.state_dict(), "checkpoints/step-1000")
    module.load_state_dict(load_dict("checkpoints/step-1000", "cuda:0"), assign=True)

`sllm_node.transformers` is the same for whole transformers models. Calls are synchronous and may be
made from any thread; what goes wrong is an `sllm_node.core.errors.SllmError`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from sllm_node.library import dicts
from sllm_node.library.files import AnyPath
from sllm_node.library.loader import PROCESS

__all__ = ["load_dict", "release_pool", "save_dict"]


def save_dict(
    state_dict: Mapping[str, torch.Tensor],
    directory: AnyPath,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write `state_dict` to the folder `directory`, whole or not at all, and return the folder.

    Tensors may be on any device, of any shape, contiguous or not; they come back contiguous. Two
    names for the same tensor are stored once and come back as the same tensor. `overwrite` replaces
    a checkpoint that lies there, and nothing else: a folder with other things in it is refused.

    A dict is no model: a node lists it and refuses to serve it.

    Raises:
        ArgumentError: no dict, or a folder that must not be replaced.
        ConversionError: a tensor that the format can't hold, or two that share some of their memory,
            or are such slices of one that this can't be ruled out.
        StoreFullError, StorageWriteError: the disk.
    """
    return dicts.save(state_dict, directory, overwrite=overwrite, progress=progress)


def load_dict(
    directory: AnyPath,
    device: str | int | torch.device = "cpu",
    *,
    store: AnyPath | None = None,
    pool_bytes: int | str | None = None,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Return the tensors in folder `directory`, in their order, on `device`.

    The checkpoint of a model is taken too. A name that is no folder is looked for in `store`, the
    folder of a node's checkpoints. All tensors lie in memory that belongs to them together: it is
    free again when the last of them is gone. They are ordinary otherwise, with a storage each.

    `pool_bytes` is the size of the page-locked memory that loads go through, by default 1 GiB or a
    sixteenth of the machine's memory; it stays for the next load until `release_pool`.

    Raises:
        ArgumentError: no such kind of device, or a pool of another size is open.
        CheckpointError: no checkpoint there, or its files are damaged.
        DeviceMemoryError: no room. DeviceError: no such device, or it failed.
    """
    return dicts.load(
        PROCESS.loader(), directory, device, store=store, pool_bytes=pool_bytes, progress=progress
    )


def release_pool() -> None:
    """Give the page-locked memory back that loads go through; the next load takes it anew.

    Loads under way in other threads fail; what was loaded stays.
    """
    PROCESS.release_pool()
