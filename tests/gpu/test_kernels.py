"""On a GPU the kernels say what their references say, also of damaged bytes."""

import numpy as np
import pytest
import xxhash

from sllm_node.codec.exponent import FORMATS, decode, encode
from sllm_node.core.errors import CodecError
from sllm_node.core.units import MIB, align_up
from tests.gpu.test_loads import open_devices
from tests.unit.codec.cases import FORMAT_NAMES, cases, damaged, numbers, with_unused_codes

pytestmark = pytest.mark.gpu

ROOM = 64 * MIB
FILL = 0xA5


class Bench:
    """Memory of one GPU, and launches that are waited for."""

    def __init__(self):
        from cuda.bindings import driver

        from sllm_node.device.kernels import Kernels

        self.driver = driver
        (self.device,) = open_devices(1, 4 * ROOM)
        self.stream = self.device.stream()
        self.kernels = Kernels(self.device.cuda, self.device.cuda.handle)
        self.input, self.output = self.device.allocate(ROOM), self.device.allocate(ROOM)
        self.table = self.device.allocate(2 * MIB)

    def close(self):
        self.kernels.close()
        self.stream.close()
        for buffer in (self.input, self.output, self.table):
            buffer.close()
        self.device.close()

    def put(self, address, array):
        array = np.ascontiguousarray(array)
        with self.device.cuda:
            (code,) = self.driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes)
        self.device.cuda.check("put", (code, None))

    def get(self, address, size):
        array = np.empty(size, np.uint8)
        with self.device.cuda:
            (code,) = self.driver.cuMemcpyDtoH(array.ctypes.data, address, size)
        self.device.cuda.check("get", (code, None))
        return array

    def wait(self):
        with self.device.cuda:
            (code,) = self.driver.cuStreamSynchronize(self.stream.handle)
        self.device.cuda.check("wait", (code, None))

    def lay(self, chunks):
        """Put `chunks` of bytes onto the device; return their addresses."""
        places, offset = [], 0
        whole = np.full(sum(align_up(len(c), 256) + 256 for c in chunks), FILL, np.uint8)
        for chunk in chunks:
            whole[offset : offset + len(chunk)] = np.frombuffer(chunk, np.uint8)
            places.append(self.input.address + offset)
            offset += align_up(len(chunk), 256) + 256
        assert len(whole) <= ROOM
        self.put(self.input.address, whole)
        return places

    def decode(self, codec, encoded, sizes):
        """Return errors, decoded bytes, and whether nothing beside them was written."""
        from sllm_node.device.staging import CHUNK

        table, offsets, offset = np.zeros(len(encoded), CHUNK), [], 0
        for i, (place, chunk, size) in enumerate(
            zip(self.lay(encoded), encoded, sizes, strict=True)
        ):
            table[i] = (place, len(chunk), self.output.address + offset, size)
            offsets.append(offset)
            offset += align_up(size, 16) + 16
        self.put(self.output.address, np.full(offset, FILL, np.uint8))
        self.put(self.table.address, np.zeros(2 * MIB, np.uint8))
        errors = self.table.address
        self.kernels.decode(codec, table, errors, self.stream.handle)
        self.wait()
        out = self.get(self.output.address, offset)
        ends = [*offsets[1:], offset]
        gaps = [out[a + s : b] for a, s, b in zip(offsets, sizes, ends, strict=True)]
        assert all((gap == FILL).all() for gap in gaps), "written outside of the output"
        found = [out[a : a + s].tobytes() for a, s in zip(offsets, sizes, strict=True)]
        return self.get(errors, 4 * len(sizes)).view("<u4").tolist(), found


@pytest.fixture(scope="module")
def bench():
    made = Bench()
    yield made
    made.close()


@pytest.mark.parametrize("codec", FORMAT_NAMES)
def test_every_case_is_decoded_as_the_reference_does(bench, codec):
    data = list(cases(FORMATS[codec]).values())
    encoded = [encode(FORMATS[codec], memoryview(d)).tobytes() for d in data]
    errors, found = bench.decode(codec, encoded, [len(d) for d in data])
    assert errors == [0] * len(data)
    assert found == data


@pytest.mark.parametrize("codec", FORMAT_NAMES)
def test_damaged_chunks_are_refused_where_the_reference_refuses_them(bench, codec):
    layout, random = FORMATS[codec], np.random.default_rng(7)
    whole = [d for d in cases(layout).values() if len(d) < 200_000]
    encoded = [encode(layout, memoryview(d)).tobytes() for d in whole]
    chosen = [int(random.integers(0, len(whole))) for _ in range(1500)]
    broken = [damaged(encoded[i], random) for i in chosen]
    sizes = [len(whole[i]) for i in chosen]
    errors, found = bench.decode(codec, broken, sizes)
    for chunk, size, error, got in zip(broken, sizes, errors, found, strict=True):
        try:
            wanted = decode(layout, np.frombuffer(chunk, np.uint8), size).tobytes()
        except CodecError:
            assert error != 0
        else:
            assert error == 0
            assert got == wanted


@pytest.mark.parametrize("codec", FORMAT_NAMES)
def test_codes_before_the_first_block_are_refused(bench, codec):
    layout = FORMATS[codec]
    data = numbers(layout, 9 * 4096)
    made = with_unused_codes(layout, encode(layout, memoryview(data)), len(data))
    errors, _ = bench.decode(codec, [made.tobytes()], [len(data)])
    assert errors == [2]


def test_many_large_chunks_are_decoded_in_one_launch(bench):
    layout = FORMATS["exp-bf16"]
    data = [numbers(layout, MIB, i) for i in range(12)]
    encoded = [encode(layout, memoryview(d)).tobytes() for d in data]
    errors, found = bench.decode("exp-bf16", encoded, [len(d) for d in data])
    assert not any(errors)
    assert found == data


def test_checksums_are_those_of_xxh3(bench):
    from sllm_node.device.staging import PIECE

    random = np.random.default_rng(5)
    sizes = [256, 320, 1024, 1088, 4096, 32768, 33792, 65536, 100 * 4096, 3 * MIB + 4096]
    sizes += [int(random.integers(4, 3000)) * 64 for _ in range(60)]
    data = [random.integers(0, 256, size, np.uint8).tobytes() for size in sizes]
    table = np.zeros(len(data) + 1, PIECE)
    for i, (place, chunk) in enumerate(zip(bench.lay(data), data, strict=True)):
        table[i] = (place, len(chunk))
    table[-1] = (table[0]["bytes"], 100)  # no size that it takes
    digests = bench.table.address
    bench.kernels.checksum(table, digests, bench.stream.handle)
    bench.wait()
    found = bench.get(digests, 8 * len(table)).view("<u8").tolist()
    assert found == [*(xxhash.xxh3_64_intdigest(d) for d in data), 0]
