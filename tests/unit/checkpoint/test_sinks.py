import numpy as np

from sllm_node.checkpoint.digest import chunk_digest
from sllm_node.checkpoint.index import TensorEntry
from sllm_node.checkpoint.sinks import chunk_codecs
from sllm_node.checkpoint.stored import all_chunks, read_decoded, read_stored
from tests.unit.checkpoint.raw import WEIGHTS, content, write_raw


def decoded(checkpoint, number):
    chunks = checkpoint.index.file_chunks(number)
    return b"".join(bytes(read_decoded(checkpoint, chunk)) for chunk in chunks)


def test_each_chunk_is_tried_with_the_codec_of_what_it_holds():
    entries = [
        TensorEntry("a", "BF16", (6000,), 0, 0, 12_000),
        TensorEntry("b", "F32", (1000,), 0, 12_032, 4_000),
        TensorEntry("c", "I64", (512,), 0, 16_384, 4_096),
    ]
    assert chunk_codecs(entries, 24_576, 4096) == (
        "exp-bf16", "exp-bf16", "exp-bf16", "exp-f32", "raw", "raw",
    )  # fmt: skip


def test_an_encoded_checkpoint_decodes_to_what_a_raw_one_holds(tmp_path):
    sizes = {"chunk_bytes": 16384, "shard_bytes": 65536}
    raw = write_raw(tmp_path, "raw", WEIGHTS, **sizes)
    encoded = write_raw(tmp_path, "encoded", WEIGHTS, **sizes, codec="exp")
    assert encoded.index.tensors == raw.index.tensors
    assert encoded.index.is_encoded
    assert encoded.index.file_size < 0.85 * raw.index.size
    for number, shard in enumerate(raw.index.shards):
        assert decoded(encoded, number) == (raw.path / shard.name).read_bytes()
    for entry, spec in zip(encoded.index.tensors, WEIGHTS, strict=True):
        whole = decoded(encoded, entry.shard)
        assert whole[entry.offset : entry.offset + entry.size] == content(spec)


def test_what_lies_in_a_file_are_whole_pages_under_their_digests(tmp_path):
    checkpoint = write_raw(
        tmp_path, "m", WEIGHTS, chunk_bytes=16384, shard_bytes=65536, codec="exp"
    )
    for chunk in all_chunks(checkpoint):
        path = checkpoint.path / checkpoint.index.shards[chunk.shard].name
        assert chunk.offset % 4096 == chunk.size % 4096 == 0
        assert chunk_digest(read_stored(path, chunk)) == chunk.digest
    for shard in checkpoint.index.shards:
        assert (checkpoint.path / shard.name).stat().st_size == shard.file_size


def test_what_no_codec_makes_smaller_becomes_a_checkpoint_of_version_1(tmp_path):
    raw = write_raw(tmp_path, "raw")
    tried = write_raw(tmp_path, "tried", codec="exp")
    assert tried.index.version == 1
    assert tried.index.shards == raw.index.shards


def test_bytes_may_come_in_any_pieces(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from sllm_node.checkpoint.output import DiskFiles
    from sllm_node.checkpoint.sinks import EncodingSink

    data = np.random.default_rng(0).standard_normal(20_480).astype("<f4").tobytes()
    made = []
    for step in (1000, 16384, 81_920):
        files = DiskFiles()
        descriptor = files.create(tmp_path / str(step))
        with ThreadPoolExecutor(2) as threads:
            sink = EncodingSink(descriptor, files, 16384, ("exp-f32",) * 5, threads)
            for start in range(0, len(data), step):
                sink.append(memoryview(data)[start : start + step])
            made.append((sink.finish("s"), (tmp_path / str(step)).read_bytes()))
    assert made[0] == made[1] == made[2]
    assert made[0][0].size == len(data)
