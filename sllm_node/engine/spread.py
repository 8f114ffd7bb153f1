"""A module whose layers lie on several devices: what they are given follows them there."""

from typing import Any

import torch


def spread(model: Any) -> None:
    """Let every layer of `model`, and every other part with weights, move its inputs to itself.

    For a module that is bound already. Layers are the members of the list as long as the config says
    there are; inside of one everything is on one device.
    """
    layers = layers_of(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        is_leaf = id(module) not in inside and any(True for _ in module.parameters(recurse=False))
        if is_leaf or any(module is layer for layer in layers):
            module.register_forward_pre_hook(_follow, with_kwargs=True)


def layers_of(model: Any) -> list[Any]:
    """Return the layers of `model`, if they are in one list."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def _follow(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    device = next(module.parameters()).device
    return _moved(args, device), _moved(kwargs, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
