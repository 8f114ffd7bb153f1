"""How fast a GPU decodes the entropy coder that our codec was compared with.

    python -m scripts.bench.decode_rans [--device 0] [--gib 4]

As `scripts.bench.decode`: different chunks of 2 MiB of Gaussian bf16, ten launches between two events,
median of 9. The kernel is a plain one; it tells the order of magnitude.
"""

import argparse
import ctypes
import statistics
from pathlib import Path

import numpy as np
from cuda.bindings import driver

from scripts.bench.codec_candidates import Rans
from scripts.bench.decode import ROUNDS, Bench, weights
from sllm_node.core.units import GIB, MIB, align_up
from sllm_node.device import nvrtc
from sllm_node.device.cuda import CudaDevice

CHUNK = 2 * MIB
DISTINCT = 8


def load(bench: Bench) -> object:
    """Compile the kernel and return its function."""
    source = Path(__file__).with_suffix(".cu").read_bytes()
    headers = nvrtc.read_source("checksum_chunks")[1]
    code, _ = nvrtc.compile_source("decode_rans", source, headers, bench.kernels.architecture)
    check = bench.device.cuda.check
    with bench.device.cuda:
        module = check("load", driver.cuModuleLoadData(code))
        return check("find", driver.cuModuleGetFunction(module, b"decode_rans"))


def fill(bench: Bench) -> list[bytes]:
    """Put encoded chunks and the table of jobs onto the device; return the decoded chunks."""
    rng, coder, made = np.random.default_rng(0), Rans(), []
    for _ in range(min(DISTINCT, bench.count)):
        data = weights("exp-bf16", CHUNK, rng)
        frequencies, rest, states, counts, words = coder.encode(data)
        places = (np.cumsum(counts) - counts).astype("<u4")
        made.append((data, [frequencies, rest, states, places, words]))
    jobs = np.zeros((bench.count, 8), "<u8")
    place = bench.encoded.address
    for i in range(bench.count):
        parts = made[i % len(made)][1]
        for number, part in enumerate(parts):
            bench.put(place, part)
            jobs[i, number] = place
            place += align_up(part.nbytes, 16)
        jobs[i, 5:] = (bench.output.address + i * CHUNK, len(parts[3]), len(parts[4]))
    bench.put(bench.results.address, jobs)
    return [data for data, _ in made]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--gib", type=float, default=4)
    options = parser.parse_args()
    with CudaDevice(options.device) as device:
        bench = Bench(device, int(options.gib * GIB), CHUNK)
        function, data = load(bench), fill(bench)
        grid = (CHUNK // 2 // Rans.block // 8, bench.count, 1)

        def decode() -> None:
            arguments = ((bench.results.address,), (ctypes.c_void_p,))
            driver.cuLaunchKernel(function, *grid, 256, 1, 1, 0, bench.stream.handle, arguments, 0)

        rates = [bench.count * CHUNK / bench.seconds(decode) / 1e9 for _ in range(ROUNDS)]
        for i in (0, bench.count // 2, bench.count - 1):
            found = bench.get(bench.output.address + i * CHUNK, CHUNK).tobytes()
            assert found == data[i % len(data)], "decoded bytes differ"
        print(
            f"rANS: output {statistics.median(rates):.0f} GB/s ({min(rates):.0f} to {max(rates):.0f})"
        )
        bench.close()


if __name__ == "__main__":
    main()
