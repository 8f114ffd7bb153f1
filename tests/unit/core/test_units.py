import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.core.units import (
    GIB,
    LARGEST_SIZE,
    MIB,
    align_up,
    format_count,
    format_rate,
    format_size,
    parse_size,
)


@given(st.integers(0, 10**15), st.integers(1, 10**6))
def test_align_up_gives_the_next_multiple(value, alignment):
    aligned = align_up(value, alignment)
    assert aligned % alignment == 0
    assert value <= aligned < value + alignment


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16MiB", 16 * MIB),
        (" 1.5 gib ", 3 * GIB // 2),
        ("2 GB", 2 * 10**9),
        ("7", 7),
        (7, 7),
        ("1.1GB", 1_100_000_000),
        ("9007199254740993", 2**53 + 1),
        (LARGEST_SIZE, LARGEST_SIZE),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [LARGEST_SIZE + 1, "8388608TiB", "9" * 400, "9" * 5000, f"{'9' * 400}GiB", 10**400],
    ids=lambda text: str(text)[:20],
)
def test_a_size_that_no_machine_counts_to_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="size") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["", "MiB", "4 parsecs", "-3", "0.3B", -3, True])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"size|whole"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"), [(3, "3 B"), (2048, "2.0 KiB"), (5 * MIB, "5.0 MiB"), (3 * GIB, "3.0 GiB"), (1 << 41, "2.0 TiB")]
)  # fmt: skip
def test_sizes_are_written(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (45_120, "45.1 thousand"), (134_515_008, "135 million"), (8_030_261_248, "8.03 billion")],
)  # fmt: skip
def test_counts_are_written_with_three_digits(count, text):
    assert format_count(count) == text


def test_rates_are_written_in_decimal_units():
    assert format_rate(55.3e9) == "55.30 GB/s"
    assert format_rate(4.2e6) == "4.2 MB/s"
