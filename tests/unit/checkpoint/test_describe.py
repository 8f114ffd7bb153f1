import json

from sllm_node.checkpoint.describe import describe
from tests.unit.checkpoint.raw import write_raw


def test_a_description_counts_what_is_there_and_json_can_hold_it(tmp_path):
    described = json.loads(json.dumps(describe(write_raw(tmp_path))))
    assert described == {
        "name": "m",
        "architecture": "LlamaForCausalLM",
        "dtype": "BF16",
        "parameters": 4300,
        "context_tokens": 512,
        "bytes": 20480,
        "bytes_by_dtype": {"BF16": 8000, "U8": 5000, "F32": 1200, "I64": 8},
        "bytes_on_disk": 20480,
        "ratio": 1.0,
        "ratio_by_dtype": {"BF16": 1.0, "U8": 1.0, "F32": 1.0, "I64": 1.0},
        "tensors": 5,
        "tied": {"tied": "a"},
        "shards": 3,
        "chunk_bytes": 4096,
        "chunks": 5,
        "codec": "raw",
        "codecs": {"raw": 5},
        "format_version": 1,
        "created": "2023-11-14T22:13:20+00:00",
        "path": str(tmp_path / "m"),
    }
