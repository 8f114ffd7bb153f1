"""What keys of the configuration say against each other, each of them right by itself."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from sllm_node.core.hosts import address_problem, is_loopback, listen_problem
from sllm_node.core.names import MODEL_NAMES, is_model_name
from sllm_node.core.units import PAGE
from sllm_node.core.urls import plain

if TYPE_CHECKING:
    from sllm_node.core.config import Config

LONGEST_S: Final = 1e9
"""Seconds that a key may name: thirty years. Timers and systemd count to an end."""
_DEVICE_NAME = re.compile(r"cpu(:\d+)?|cuda(:\d+)?")


def contradictions(config: "Config") -> Iterator[str]:
    """Yield each, naming its keys."""
    checks: tuple[Callable[[Config], str | None], ...] = (
        _check_chunks, _check_blocks, _check_pool, _check_offload, _check_bind, _check_body, _check_keys, _check_keep_alive, _check_beside, _check_device, _check_remotes, _check_cluster,
    )  # fmt: skip
    for check in checks:
        if (problem := check(config)) is not None:
            yield problem


def _check_chunks(config: "Config") -> str | None:
    chunk = config.store.chunk_bytes
    if chunk < PAGE or chunk % PAGE:
        return f"store.chunk_bytes = {chunk}: must be a multiple of {PAGE} bytes, for direct I/O"
    return None


def _check_blocks(config: "Config") -> str | None:
    block = config.store.read_block_bytes
    if block % PAGE:
        return f"store.read_block_bytes = {block}: must be a multiple of {PAGE} bytes, or 0"
    return None


def _check_pool(config: "Config") -> str | None:
    smallest = 2 * config.store.chunk_bytes
    if config.store.pool_bytes < smallest:
        return (
            f"store.pool_bytes = {config.store.pool_bytes}: must hold two chunks at least "
            f"({smallest} bytes), so that one is read while the other is copied"
        )
    return None


def _check_offload(config: "Config") -> str | None:
    chunk, pool = config.store.chunk_bytes, config.store.pool_bytes
    size = config.engine.kv_offload_bytes
    if config.engine.kv_offload and not chunk <= size <= pool - 2 * chunk:
        return (
            f"engine.kv_offload_bytes = {size}: must be one chunk of the pool at least ({chunk} bytes) and "
            f"leave two of store.pool_bytes = {pool} to loads, while engine.kv_offload is on"
        )
    return None


def _check_bind(config: "Config") -> str | None:
    server = config.server
    if is_loopback(server.host) or server.api_keys or server.allow_unauthenticated_remote:
        return None
    return (
        f"server.host = {server.host!r} is reachable from other machines: set server.api_keys, "
        "or server.allow_unauthenticated_remote = true if that is what you want"
    )


def _check_body(config: "Config") -> str | None:
    if config.server.max_body_bytes < 1:
        return "server.max_body_bytes = 0: must be 1 byte at least, as no request would have a body"
    return None


def _check_keys(config: "Config") -> str | None:
    """Look for keys that no client could send; the key itself is not told."""
    for table in ("api_keys", "admin_keys"):
        for i, key in enumerate(getattr(config.server, table)):
            if key != key.strip() or has_control_characters(key):
                return (
                    f"server.{table}[{i}]: has a space at an end or a control character, which no request "
                    "can carry; remove it"
                )
    return None


def has_control_characters(key: str) -> bool:
    """Tell whether no header of a request may have `key`."""
    return any(ord(character) < 32 or ord(character) == 127 for character in key)


def _check_keep_alive(config: "Config") -> str | None:
    values = {"schedule.keep_alive_s": config.schedule.keep_alive_s}
    for name, model in config.models.items():
        if model.keep_alive_s is not None:
            values[f"models.{name}.keep_alive_s"] = model.keep_alive_s
    for key, value in values.items():
        if value != -1 and not 0 <= value <= LONGEST_S:
            return f"{key} = {value}: must be seconds ({LONGEST_S:.0f} at most), or -1 for ever"
    return None


def _check_beside(config: "Config") -> str | None:
    ratio = config.engine.prefill_beside_ratio
    if 0 < ratio <= 1:
        return (
            f"engine.prefill_beside_ratio = {ratio}: a step with prompts takes longer than one "
            "without; write more than 1, or 0 for no such limit"
        )
    return None


def _check_device(config: "Config") -> str | None:
    device = config.device
    for name in device.names:
        if not _DEVICE_NAME.fullmatch(name):
            return f'device.names: {name!r} is no device; write "cpu", "cuda:0" or "cuda" for all'
    if len({name.partition(":")[0] for name in device.names}) > 1:
        return "device.names mixes kinds of devices; a node serves on CPUs or on GPUs"
    if len(set(device.names)) < len(device.names) or ("cuda" in device.names[1:]):
        return f"device.names = {list(device.names)}: names a device twice"
    size = device.cpu_bytes if device.names[0].startswith("cpu") else device.memory_bytes
    if 0 < size <= config.engine.kv_cache_bytes:
        return (
            f"engine.kv_cache_bytes = {config.engine.kv_cache_bytes}: leaves no room for weights "
            f"in device.memory_bytes = {size}"
        )
    return None


def _check_remotes(config: "Config") -> str | None:
    for name, remote in config.remotes.items():
        if name.startswith(":"):
            return f"remotes.{name!r}: a name must not begin with ':'"
        only_s3 = {
            "endpoint": remote.endpoint, "region": remote.region,
            "credentials_file": remote.credentials_file, "anonymous": remote.anonymous or None,
        }  # fmt: skip
        wrong = [key for key, value in only_s3.items() if value is not None]
        if remote.url.startswith("s3:"):
            wrong = ["key_file"] if remote.key_file is not None else []
        if wrong:
            return f"remotes.{name}.{wrong[0]}: means nothing for url = {plain(remote.url)!r}"
        for model in remote.models:
            if not is_model_name(model):
                return f"remotes.{name}.models: {model!r} can be no model's name: {MODEL_NAMES}"
    return None


def _check_cluster(config: "Config") -> str | None:
    checks = (("listen", listen_problem), ("address", address_problem))
    for key, check in checks:
        value = getattr(config.cluster, key)
        if value and not config.cluster.file:
            return f"cluster.{key} = {value!r}: means nothing without cluster.file"
        if value and (problem := check(value)) is not None:
            return f"cluster.{key} = {value!r}: {problem}"
    return None
