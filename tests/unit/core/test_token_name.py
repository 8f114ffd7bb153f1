import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm_node.core.token_name import bytes_of, name_of


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", ""), (b" the", " the"), ("日".encode(), "日"), (b"\xe6\x97", "bytes:\\xe6\\x97"),
        (b" \xf0", "bytes:\\x20\\xf0"), ("\ufffd".encode(), "\ufffd"),
    ],
)  # fmt: skip
def test_bytes_that_are_text_are_named_by_it_and_others_one_by_one(data, name):
    assert name_of(data) == name


@given(st.binary(max_size=8) | st.sampled_from([b"bytes:\\x61", b"bytes:", b"bytes:\\xG1"]))
def test_a_name_tells_its_bytes_and_no_others(data):
    assert bytes_of(name_of(data)) == data
