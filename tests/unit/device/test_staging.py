import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.device.base import ChunkJob
from sllm_node.device.staging import JOBS_MAX, Copy, Ring, batches

PAGE = 4096


def job(number, codec="exp-bf16", pages=3, *, whole=True, digest=None):
    place = number * 16384
    writes = ((place, place + 16384),) if whole else ((place + 256, place + 512),)
    return ChunkJob(codec, number * pages * PAGE, pages * PAGE, place, 16384, writes, digest)


def test_neighbours_are_copied_together():
    (batch,) = batches([job(0), job(1), job(2, "raw"), job(3), job(4)], 1 << 20)
    assert batch.runs == (Copy(0, 0, 6 * PAGE), Copy(9 * PAGE, 6 * PAGE, 6 * PAGE))
    assert batch.direct == (Copy(6 * PAGE, 2 * 16384, 16384),)
    assert batch.size == 12 * PAGE


def test_a_chunk_that_goes_to_its_place_in_part_gets_room_to_be_decoded_in():
    (batch,) = batches([job(0), job(1, whole=False)], 1 << 20)
    assert [one.decoded_at for one in batch.staged] == [None, 6 * PAGE]
    assert batch.size == 10 * PAGE


def test_kernels_are_told_addresses_in_the_region_and_at_the_place():
    (batch,) = batches([job(0), job(1, whole=False), job(2, "raw", digest=7)], 1 << 20)
    (decoding,) = batch.decodings
    assert decoding.chunks(1 << 40, 1 << 41).tolist() == [
        ((1 << 40), 3 * PAGE, 1 << 41, 16384),
        ((1 << 40) + 3 * PAGE, 3 * PAGE, (1 << 40) + 9 * PAGE, 16384),
    ]
    assert batch.pieces(1 << 40)[2].tolist() == ((1 << 40) + 6 * PAGE, 3 * PAGE)
    assert batch.moves == (
        Copy(9 * PAGE + 256, 16384 + 256, 256),
        Copy(6 * PAGE, 2 * 16384, 16384),
    )


def test_what_is_wrong_is_told_of_the_first_chunk_that_was_asked():
    (batch,) = batches([job(0, digest=5), job(1, digest=6)], 1 << 20)
    digests, errors = np.zeros(8, np.uint64), np.zeros(8, np.uint32)
    digests[:2] = 5, 6
    assert batch.wrong(digests, errors) is None
    errors[1] = 2
    wrong = batch.wrong(digests, errors)
    assert wrong is not None
    assert wrong.problem == "its codes do not fit its counts"
    digests[1] = 7
    wrong = batch.wrong(digests, errors)
    assert wrong is not None
    assert (wrong.job, wrong.problem) == (job(1, digest=6), None)


def test_raw_chunks_are_staged_when_their_digest_is_asked_for():
    (batch,) = batches([job(0, "raw", digest=7)], 1 << 20)
    assert batch.direct == ()
    assert batch.staged[0].decoded_at is None


def test_chunks_of_one_codec_lie_together_in_the_table():
    jobs = [job(number, codec) for number, codec in enumerate(["exp-f32", "exp-bf16"] * 3)]
    (batch,) = batches(jobs, 1 << 20)
    assert [one.job.codec for one in batch.staged] == ["exp-bf16"] * 3 + ["exp-f32"] * 3
    assert batch.runs == (Copy(0, 0, 18 * PAGE),)


def test_batches_keep_to_their_limits_and_lose_nothing():
    jobs = [job(number) for number in range(3 * JOBS_MAX)]
    limit = 9 * PAGE
    made = list(batches(jobs, limit))
    assert [one.job for batch in made for one in batch.staged] == jobs
    assert all(batch.size <= limit for batch in made)
    assert len(list(batches(jobs, 1 << 40))) == 3
    assert len(list(batches(jobs[:2], 1))) == 2


@given(st.lists(st.integers(1, 10), max_size=60))
def test_nobody_takes_memory_of_the_ring_without_waiting_for_its_reader(sizes):
    ring = Ring(10)
    readers, forgotten = {}, []
    for token, size in enumerate(sizes):
        start, waited, ended = ring.take(size)
        assert 0 <= start <= 10 - size
        wanted = {readers[byte] for byte in range(start, start + size) if byte in readers}
        assert set(waited) == wanted
        readers |= dict.fromkeys(range(start, start + size), token)
        forgotten += ended
        assert not set(ended) & set(readers.values())
        ring.give(start, size, token)
    left = ring.tokens()
    assert set(left) == set(readers.values())
    assert sorted(left + forgotten) == list(range(len(sizes)))


def test_a_reader_of_two_regions_is_waited_for_by_both_who_take_them():
    ring = Ring(8)
    ring.give(ring.take(8)[0], 8, "reader")
    assert ring.take(4) == (0, ["reader"], [])
    assert ring.take(4) == (4, ["reader"], ["reader"])
