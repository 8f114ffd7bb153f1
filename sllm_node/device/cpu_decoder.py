"""Decodes chunks in threads, by the reference of the codecs: what a CPU device has for kernels.

A chunk is decoded from the pool straight to its place; only of one that goes there in part, there is
a copy in between.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from sllm_node.codec.chunks import decode_chunk, decode_chunk_into
from sllm_node.codec.names import RAW
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.errors import CodecError
from sllm_node.device.base import (
    ChunkJob,
    ChunkJobs,
    Decoded,
    DeviceBuffer,
    Stream,
    WrongChunkError,
)

_THREADS: Final = min(8, len(os.sched_getaffinity(0)))


class CpuDecoder:
    """Threads of one device that decode."""

    needs_staging = False

    def __init__(self, *, verifies: bool = False) -> None:
        self.verifies = verifies
        self._threads = ThreadPoolExecutor(_THREADS, "sllm-decode")

    def stage_in(self, staging: DeviceBuffer) -> None:
        """Do nothing: encoded bytes are read where they lie."""

    def decode(
        self,
        link: Stream,
        destination: DeviceBuffer,
        place: int,
        source: memoryview,
        jobs: ChunkJobs,
        done: Decoded,
    ) -> None:
        rest = []
        for job in jobs.jobs:
            if job.codec != RAW or job.digest is not None:
                rest.append(job)
                continue
            for start, end in job.writes:
                begin = job.offset + start - job.place
                link.copy_in(destination, place + start, source[begin : begin + end - start])

        def copied(error: BaseException | None) -> None:
            if error is not None:
                done(error, 0.0)
            else:
                self._threads.submit(_decode_all, destination, place, source, rest, done)

        link.record().on_done(copied)

    def close(self) -> None:
        self._threads.shutdown(wait=True)


def _decode_all(
    destination: DeviceBuffer,
    place: int,
    source: memoryview,
    jobs: Sequence[ChunkJob],
    done: Decoded,
) -> None:
    """Decode `jobs` and tell; in a thread."""
    clock = MonotonicClock()
    start, failure = clock.now(), None
    try:
        target = np.asarray(destination.array)
        for job in jobs:
            _decode_one(job, target, place, source[job.offset : job.offset + job.size])
    except BaseException as error:  # noqa: BLE001 - the root of a thread's work: handed on
        failure = error
    done(failure, clock.now() - start)


def _decode_one(
    job: ChunkJob, target: npt.NDArray[np.uint8], place: int, stored: memoryview
) -> None:
    if job.digest is not None and xxhash.xxh3_64_intdigest(stored) != job.digest:
        raise WrongChunkError(job, None)
    try:
        if job.is_whole:
            begin = place + job.place
            decode_chunk_into(job.codec, stored, target[begin : begin + job.decoded_size])
            return
        decoded = decode_chunk(job.codec, stored, job.decoded_size)
    except CodecError as error:
        raise WrongChunkError(job, error.problem) from error
    for start, end in job.writes:
        np.copyto(target[place + start : place + end], decoded[start - job.place : end - job.place])
