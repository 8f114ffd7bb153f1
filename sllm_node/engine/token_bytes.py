"""Which bytes each token of a vocabulary stands for, by itself.

Decoding one token loses them: half a character becomes U+FFFD, and SentencePiece's decoders take a
space at the beginning away. So they are read off the token's name in the vocabulary, by the rules that
the tokenizer's own decoder names. One that is not known decodes each token for itself.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

_Rule = Callable[[str], str | bytes]
_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SHOWN: Final = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
"""Bytes that stand for themselves in the byte alphabet of GPT-2; the others follow behind 0xFF."""
_ALPHABET: Final = {
    **{chr(byte): byte for byte in _SHOWN},
    **{chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _SHOWN)},
}
_AT_EDGES: Final = ("Fuse", "Strip")
"""Steps of decoders that join tokens, or concern the text's edges."""


class TokenBytes:
    """The bytes of a tokenizer's tokens."""

    def __init__(self, core: Any) -> None:
        """`core`: a tokenizer of the package tokenizers."""
        self._core = core
        decoder = core.decoder
        rules = [None] if decoder is None else list(_rules(json.loads(decoder.__getstate__())))
        known = tuple(rule for rule in rules if rule is not None)
        self._rules = known if len(known) == len(rules) else None

    def of(self, token: int) -> bytes:
        """Return what `token` stands for; nothing if the vocabulary does not have it."""
        name: str | bytes | None = self._core.id_to_token(token)
        if name is None:
            return b""
        if self._rules is None:
            return str(self._core.decode([token], skip_special_tokens=False)).encode()
        for rule in self._rules:
            if isinstance(name, str):
                name = rule(name)
        return name.encode() if isinstance(name, str) else name


def _rules(decoder: Mapping[str, Any]) -> Iterator[_Rule | None]:
    """Yield what a decoder does to each token by itself, in order; None where that is not known."""
    kind = decoder["type"]
    if kind == "Sequence":
        for part in decoder["decoders"]:
            yield from _rules(part)
    elif kind == "ByteLevel":
        yield _of_alphabet
    elif kind == "ByteFallback":
        yield _of_byte
    elif kind == "Metaspace":
        yield _replacing(decoder["replacement"], " ")
    elif kind == "Replace" and "String" in decoder["pattern"]:
        yield _replacing(decoder["pattern"]["String"], decoder["content"])
    elif kind not in _AT_EDGES:
        yield None


def _of_alphabet(name: str) -> bytes:
    found = [_ALPHABET.get(character) for character in name]
    known = bytes(byte for byte in found if byte is not None)
    return known if len(known) == len(found) else name.encode()  # an added token: its own text


def _of_byte(name: str) -> str | bytes:
    match = _BYTE.fullmatch(name)
    return name if match is None else bytes.fromhex(match[1])


def _replacing(old: str, new: str) -> _Rule:
    return lambda name: name.replace(old, new)
