"""What the device layer itself can do: the ceilings, and what mapping and page-locking cost.

    python -m scripts.bench.device [--device cuda:0] [--pool-gib 16] [--out FILE]

Prints a table and writes JSON: seconds to make a pool ready, to map and unmap 16 GiB in pieces of
several sizes, and the rate of copies from the pool through our stream, with one event a copy.
"""

import argparse
import json
import statistics
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from sllm_node.bench.devices import open_device
from sllm_node.core.units import GIB, MIB
from sllm_node.device.base import Device, DeviceRange, Event, PinnedBuffer

REPEATS = 5


def wait(event: Event) -> None:
    """Block until `event` has happened."""
    happened = threading.Event()
    failures: list[BaseException] = []

    def done(error: BaseException | None) -> None:
        if error is not None:
            failures.append(error)
        happened.set()

    event.on_done(done)
    happened.wait()
    if failures:
        raise failures[0]


def seconds(work: Any) -> float:
    """Return how long `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def mapped(place: DeviceRange, pieces: range) -> None:
    """Map and wait."""
    wait(place.map(pieces))


def unmapped(place: DeviceRange, pieces: range) -> None:
    """Unmap and wait."""
    wait(place.unmap(pieces))


def mapping(device: Device, size: int) -> dict[str, Any]:
    """Map and unmap `size` bytes, by the size of a piece."""
    found = {}
    for piece in (2 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB, size):
        place = device.reserve(size, piece)
        pieces = range(-(-size // place.piece_bytes))
        times = [
            (seconds(partial(mapped, place, pieces)), seconds(partial(unmapped, place, pieces)))
            for _ in range(REPEATS)
        ]
        place.close()
        found[f"{piece // MIB}MiB"] = {
            "map_ms": 1e3 * statistics.median(m for m, _ in times),
            "unmap_ms": 1e3 * statistics.median(u for _, u in times),
            "unmap_worst_ms": 1e3 * max(u for _, u in times),
        }
    return found


def copying(device: Device, pool: PinnedBuffer, total: int) -> dict[str, Any]:
    """Copy `total` bytes of the pool to the device, by the size of a copy."""
    target = device.allocate(total)
    stream = device.stream()
    found = {}
    for size in (1 * MIB, 4 * MIB, 16 * MIB, 32 * MIB, 64 * MIB, 256 * MIB):
        starts = range(0, total - size + 1, size)

        def work(size: int = size, starts: range = starts) -> None:
            left = threading.Semaphore(0)
            for start in starts:
                stream.copy_in(target, start, pool.view[start : start + size])
                stream.record().on_done(lambda error: left.release())
            for _ in starts:
                left.acquire()

        times = [seconds(work) for _ in range(REPEATS + 1)][1:]
        rates = [len(starts) * size / s / 1e9 for s in times]
        found[f"{size // MIB}MiB"] = {
            "gbps": statistics.median(rates), "worst_gbps": min(rates),
        }  # fmt: skip
    stream.close()
    target.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--pool-gib", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = options.pool_gib * GIB
    found: dict[str, Any] = {"device": options.device, "bytes": size}
    with open_device(options.device, 2 * size) as device:
        first: list[PinnedBuffer] = []
        found["pool_first_s"] = seconds(lambda: first.append(device.pin(size, huge_pages=True)))
        first.pop().close()
        times = []
        for _ in range(3):  # the memory of a virtual machine may come at first touch: not counted
            times.append(seconds(lambda: first.append(device.pin(size, huge_pages=True))))
            if len(times) < 3:
                first.pop().close()
        found["pool_s"] = times
        found["pool_gibps"] = size / GIB / statistics.median(times)
        print(f"pool: {found['pool_gibps']:.1f} GiB/s, first {found['pool_first_s']:.2f} s")
        found["mapping"] = mapping(device, size)
        found["copying"] = copying(device, first[0], size)
        first.pop().close()
    for part in ("mapping", "copying"):
        for key, values in found[part].items():
            print(part, key.rjust(9), *(f"{name} {value:.2f}" for name, value in values.items()))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
