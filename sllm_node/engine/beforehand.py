"""What is known of a model before it is loaded: its tokenizer and KV geometry, read in worker threads."""

from contextlib import suppress
from pathlib import Path

from sllm_node.core.errors import SllmError
from sllm_node.engine.kv import token_bytes_from_config
from sllm_node.engine.skeleton import build_skeleton, read_config
from sllm_node.engine.text import TextCodec, load_codec


def read_codec(directory: Path) -> tuple[TextCodec, int]:
    """Return a checkpoint's codec, and the KV memory of one token."""
    return load_codec(directory), token_bytes_from_config(read_config(directory))


def read_token_bytes(directory: Path) -> int | None:
    """Return the KV memory of one token: about a millisecond; None: not to be had, which `read_codec` tells."""
    try:
        return token_bytes_from_config(read_config(directory))
    except Exception:  # noqa: BLE001 - any config may lie there
        return None


def import_for(directory: Path) -> None:
    """Import the model's and the tokenizer's modules; a checkpoint with problems tells them later."""
    with suppress(SllmError, OSError, ValueError):
        build_skeleton(directory)
        load_codec(directory)
