"""What a checkpoint's folder has of its own, and what somebody else put there.

A replacement takes the folder's name, and what lay in it is deleted. So nothing may lie there that
neither a conversion, a save nor a pull writes. Which texts those write is up to the tokenizer, too, so
names that transformers' tokenizers give their files count as a checkpoint's.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from sllm_node.checkpoint.index import INDEX_FILE

ORDER_FILE: Final = "order.json"
"""The names of all tensors as a dict had them; there only if some are tied."""
_SHOWN_MAX: Final = 8
_OWN: Final = (
    INDEX_FILE, ORDER_FILE, "shard-[0-9][0-9][0-9][0-9][0-9]*.bin",
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates",
    "vocab*.json", "vocab.txt", "merges.txt", "dict.txt", "bpe.codes", "entity_vocab.json",
    "spiece.model", "spm*.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "prophetnet.tokenizer", "byte_maps.json", "emoji.json", "normalizer.json",
    "word_pronunciation.json", "word_shape.json",
    "configuration_*.py", "modeling_*.py", "tokenization_*.py",
    ".gitattributes", ".DS_Store", ".nfs*",
)  # fmt: skip
"""Patterns of names; the last ones are what systems leave anywhere."""


def in_the_way(folder: Path) -> str | None:
    """Say why the checkpoint in `folder` must not be replaced by another one; None: it may be."""
    try:
        others = sorted(path.name for path in folder.iterdir() if not _is_own(path.name))
    except OSError as error:
        return f"can't be listed, so what would be deleted is not known: {error.strerror}"
    if not others:
        return None
    more = f" and {len(others) - _SHOWN_MAX} more" if len(others) > _SHOWN_MAX else ""
    return (
        "has what is no part of a checkpoint and would be deleted with it: "
        f"{', '.join(others[:_SHOWN_MAX])}{more}; move that elsewhere, or choose another name"
    )


def _is_own(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _OWN)
