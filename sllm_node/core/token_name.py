r"""What a token is called where it stands alone, in log probabilities: its text, or its bytes if it has none.

A token may be a part of a character. It is called by its bytes then, as OpenAI does it: `bytes:\xe6\x97`.
Two tokens that differ in bytes differ in name, and a name tells the bytes.
"""

import re
from typing import Final

_PREFIX: Final = "bytes:"
_IN_BYTES: Final = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")


def name_of(data: bytes) -> str:
    """Return the name of the token that stands for `data`."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = None
    if text is None or _IN_BYTES.fullmatch(text):
        return _PREFIX + "".join(f"\\x{byte:02x}" for byte in data)
    return text


def bytes_of(name: str) -> bytes:
    """Return what a token of this name stands for."""
    match = _IN_BYTES.fullmatch(name)
    return name.encode() if match is None else bytes.fromhex(match[1].replace("\\x", ""))
