"""Codecs by name, and which one a chunk gets: the one for most of its bytes, if it pays."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from sllm_node.codec import exponent
from sllm_node.codec.names import RAW
from sllm_node.codec.planes import Bytes
from sllm_node.core.errors import CodecError

CODECS: Final = (RAW, *exponent.FORMATS)
"""What a chunk may have."""
WORTH: Final = 0.97
"""Encoded over raw bytes from which on a chunk stays raw."""
CODEC_OF_DTYPE: Final = {
    "BF16": exponent.BF16.name,
    "F16": exponent.F16.name,
    "F32": exponent.F32.name,
    "F8_E4M3": exponent.F8_E4M3.name,
    "F8_E5M2": exponent.F8_E5M2.name,
}


def codec_for(bytes_by_dtype: Mapping[str, int]) -> str:
    """Return the codec to try on a chunk with so many bytes of each dtype.

    Every codec takes any bytes, so those of other dtypes in the chunk are safe, only not smaller.
    """
    if not bytes_by_dtype:
        return RAW
    most = max(bytes_by_dtype, key=lambda dtype: bytes_by_dtype[dtype])
    return CODEC_OF_DTYPE.get(most, RAW)


def least_encoded(size: int) -> int:
    """Return what `size` bytes take at least when they are encoded, whatever they are."""
    return min(size * kind.least_bits // (8 * kind.width) for kind in exponent.FORMATS.values())


def encode_chunk(codec: str, data: memoryview) -> tuple[str, Bytes]:
    """Return the codec that `data` gets, `codec` or raw, and the bytes."""
    raw = np.frombuffer(data, np.uint8)
    if codec == RAW or len(data) % 4:
        return RAW, raw
    encoded = exponent.encode(exponent.FORMATS[codec], data)
    if len(encoded) >= WORTH * len(raw):
        return RAW, raw
    return codec, encoded


def decode_chunk(codec: str, encoded: memoryview, size: int) -> Bytes:
    """Return the `size` bytes that `encoded`, which may be padded, stands for.

    Raises:
        CodecError: the bytes are none that the codec writes.
    """
    decoded = np.empty(size, np.uint8)
    decode_chunk_into(codec, encoded, decoded)
    return decoded


def decode_chunk_into(codec: str, encoded: memoryview, decoded: Bytes) -> None:
    """Fill `decoded`, aligned to 4 bytes, with what `encoded`, which may be padded, stands for.

    Raises:
        CodecError: the bytes are none that the codec writes.
    """
    stored = np.frombuffer(encoded, np.uint8)
    if codec != RAW:
        exponent.decode_into(exponent.FORMATS[codec], stored, decoded)
        return
    if len(stored) < len(decoded):
        raise CodecError(codec, f"it holds {len(stored)} bytes where {len(decoded)} are expected")
    np.copyto(decoded, stored[: len(decoded)])
