"""Safetensors files by hand, damaged ones too."""

import json


def header_of(tensors):
    """Return the header for name → (dtype, shape, bytes)."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
    return {"__metadata__": {"format": "pt"}, **header}


def write_file(path, tensors, header=None):
    """Write name → (dtype, shape, bytes), under another `header` if one is given."""
    text = json.dumps(header_of(tensors) if header is None else header).encode()
    data = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
