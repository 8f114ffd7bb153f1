from sllm_node.bench.ceilings import CopyCeiling, DiskCeiling
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import StoreConfig


def test_the_plain_reader_reads_all_and_tells_a_rate(files):
    assert DiskCeiling(StoreConfig(reader_threads=2)).measure(files[0], MonotonicClock()) > 0


def test_the_plain_copy_tells_a_rate(files):
    assert CopyCeiling("cpu").measure(files[0], MonotonicClock()) > 0
