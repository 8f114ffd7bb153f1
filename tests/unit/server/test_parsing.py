import msgspec
import pytest

from sllm_node.core.errors import InvalidRequestError
from sllm_node.server.parsing import parse


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    count: int


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: list[Inner]
    names: dict[str, int] = {}
    raw: msgspec.Raw = msgspec.Raw()
    text: str = ""


@pytest.mark.parametrize(
    ("text", "param"),
    [
        (b"[]", None), (b"{}", "inner"), (b'{"inner": [], "x": 1}', "x"), (b'{"inner": 1}', "inner"),
        (b'{"inner": [{}]}', "inner[0].count"), (b'{"inner": [{"count": 1, "y": 1}]}', "inner[0].y"),
        (b'{"inner": [], "names": {"a": "b"}}', "names"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_path(text, param):
    with pytest.raises(InvalidRequestError) as caught:
        parse(text, Outer)
    assert caught.value.param == param


def test_a_value_alone_is_told_with_the_path_of_its_parameter():
    with pytest.raises(InvalidRequestError, match=r"^prompt\[1\]: ") as caught:
        parse(b'[1, "a"]', list[int], "prompt")
    assert caught.value.param == "prompt[1]"


@pytest.mark.parametrize("text", [b"", b"{", b'{"text": "\xff"}', b'{"raw": ' + b"[" * 50_000])
def test_what_is_no_json_is_told_so(text):
    with pytest.raises(InvalidRequestError, match="the body is no JSON"):
        parse(text, Outer)
