"""How fast a GPU decodes and checks chunks that lie in its memory.

    python -m scripts.bench.decode [--device 0] [--gib 4] [--chunk-mib 2] [--record]

For each codec: chunks of Gaussian weights, different ones, decoded over and over into one buffer;
seconds between two events of the stream around 10 launches, median of 9. Rates are of decoded bytes,
for the checksum of the bytes read. The ceiling is a copy within the device in the same run, counted
as bytes read and written. The launches of all codecs are interleaved round by round.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver

from scripts.bench.figures import record
from sllm_node.codec import exponent
from sllm_node.core.units import GIB, MIB, align_up
from sllm_node.device.cuda import CudaDevice
from sllm_node.device.kernels import Kernels
from sllm_node.device.staging import CHUNK, PIECE

LAUNCHES = 10
ROUNDS = 9
DISTINCT = 32
"""Chunks that differ; the others repeat them at other addresses."""


def weights(codec: str, size: int, rng: np.random.Generator) -> bytes:
    """Return Gaussian numbers as this codec's dtype."""
    numbers = rng.standard_normal(size) * 0.02
    if codec == "exp-f32":
        return bytes(numbers[: size // 4].astype("<f4").tobytes())
    if codec == "exp-f16":
        return numbers[: size // 2].astype("<f2").tobytes()
    if codec == "exp-bf16":
        return (numbers[: size // 2].astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    halves = (numbers * 64).astype("<f2").view("<u2")
    if codec == "exp-f8e5m2":
        return bytes((halves >> 8).astype(np.uint8).tobytes())
    sign, rest = halves >> 8 & 0x80, np.clip((halves & 0x7FFF) >> 7, 0, 127)
    return bytes((sign | rest).astype(np.uint8).tobytes())


class Bench:
    """Device memory with encoded chunks, and timed launches on it."""

    def __init__(self, device: CudaDevice, total: int, chunk: int) -> None:
        self.device, self.chunk = device, chunk
        self.count = total // chunk
        self.stream = device.stream()
        self.kernels = Kernels(device.cuda, device.cuda.handle)
        self.kernels.prepare()
        self.encoded = device.allocate(self.count * chunk)
        self.output = device.allocate(self.count * chunk)
        self.chunks, self.pieces = np.zeros(0, CHUNK), np.zeros(0, PIECE)
        self.results = device.allocate(2 * MIB)
        with device.cuda:
            self.events = [device.cuda.check("event", driver.cuEventCreate(0)) for _ in range(2)]

    def put(self, address: int, data: Any) -> None:
        """Copy host bytes to the device."""
        array = np.ascontiguousarray(data)
        with self.device.cuda:
            (code,) = driver.cuMemcpyHtoD(address, array.ctypes.data, array.nbytes)
            self.device.cuda.check("copy", (code, None))

    def get(self, address: int, size: int) -> np.ndarray[Any, Any]:
        """Copy device bytes to the host."""
        array = np.empty(size, np.uint8)
        with self.device.cuda:
            (code,) = driver.cuMemcpyDtoH(array.ctypes.data, address, size)
            self.device.cuda.check("copy", (code, None))
        return array

    def seconds(self, launch: Callable[[], None]) -> float:
        """Return the seconds of one launch, of ten."""
        cuda, handle = self.device.cuda, self.stream.handle
        with cuda:
            driver.cuEventRecord(self.events[0], handle)
            for _ in range(LAUNCHES):
                launch()
            driver.cuEventRecord(self.events[1], handle)
            driver.cuEventSynchronize(self.events[1])
            return (
                float(cuda.check("time", driver.cuEventElapsedTime(*self.events))) / 1e3 / LAUNCHES
            )

    def close(self) -> None:
        """Free everything."""
        self.kernels.close()
        self.stream.close()
        for buffer in (self.encoded, self.output, self.results):
            buffer.close()

    def copy(self) -> None:
        """Enqueue a copy of all of the buffer."""
        size = self.count * self.chunk
        (code,) = driver.cuMemcpyDtoDAsync(
            self.output.address, self.encoded.address, size, self.stream.handle
        )
        self.device.cuda.check("copy", (code, None))


def fill(bench: Bench, codec: str) -> tuple[float, int, list[bytes]]:
    """Put encoded chunks and their table onto the device; return ratio, encoded bytes, decoded chunks."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(min(DISTINCT, bench.count)):
        data = weights(codec, bench.chunk, rng)
        encoded = exponent.encode(exponent.FORMATS[codec], memoryview(data))
        made.append((data, np.pad(encoded, (0, -len(encoded) % 4096))))
    table = np.zeros(bench.count, CHUNK)
    pieces = np.zeros(bench.count, PIECE)
    place = bench.encoded.address
    for i in range(bench.count):
        encoded = made[i % len(made)][1]
        bench.put(place, encoded)
        output = bench.output.address + i * bench.chunk
        table[i] = (place, len(encoded), output, bench.chunk)
        pieces[i] = (place, len(encoded))
        place += align_up(len(encoded), 4096)
    bench.chunks, bench.pieces = table, pieces
    bench.put(bench.results.address, np.zeros(2 * MIB, np.uint8))
    ratio = sum(len(e) for _, e in made) / (len(made) * bench.chunk)
    return ratio, int(table["encoded_size"].sum()), [data for data, _ in made]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--chunk-mib", type=float, default=2)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    chunk = int(options.chunk_mib * MIB)
    with CudaDevice(options.device) as device:
        bench = Bench(device, int(options.gib * GIB), chunk)
        samples: dict[str, list[float]] = {}
        copies: list[float] = []
        total = bench.count * chunk
        address = bench.results.address

        def check() -> None:
            bench.kernels.checksum(bench.pieces, address + MIB, bench.stream.handle)

        for codec in exponent.FORMATS:
            ratio, encoded, data = fill(bench, codec)

            def decode(codec: str = codec) -> None:
                bench.kernels.decode(codec, bench.chunks, address, bench.stream.handle)

            decode()
            bench.seconds(check)
            assert not bench.get(address, 4 * bench.count).any(), "a decoder reports an error"
            for i in (0, bench.count // 2, bench.count - 1):
                found = bench.get(bench.output.address + i * chunk, chunk).tobytes()
                assert found == data[i % len(data)], "decoded bytes differ"
            for _ in range(ROUNDS):
                copies.append(2 * total / bench.seconds(bench.copy) / 1e9)
                samples.setdefault(codec, []).append(total / bench.seconds(decode) / 1e9)
                samples.setdefault("checksum", []).append(encoded / bench.seconds(check) / 1e9)
            decode()
            rate = statistics.median(samples[codec])
            print(
                f"{codec:12s} ratio {ratio:.4f}  output {rate:7.0f} GB/s "
                f"({min(samples[codec]):.0f} to {max(samples[codec]):.0f}), "
                f"moved {rate * (1 + ratio):.0f} GB/s"
            )
        checks = samples["checksum"]
        print(
            f"checksum     {statistics.median(checks):.0f} GB/s ({min(checks):.0f} to {max(checks):.0f})"
        )
        print(f"copy within the device, read + written: {statistics.median(copies):.0f} GB/s")
        if options.record:
            rates = samples["exp-bf16"]
            record(
                "decode_kernel_gbps", statistics.median(rates), rates,
                ceiling=statistics.median(copies),
                command=f"python -m scripts.bench.decode --gib {options.gib:g} --chunk-mib {options.chunk_mib:g} --record",
                note=f"chunks of {options.chunk_mib:g} MiB; the ceiling counts bytes read and written",
            )  # fmt: skip
        bench.close()


if __name__ == "__main__":
    main()
