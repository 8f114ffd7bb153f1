import json

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


@pytest.mark.parametrize(
    "half", [r"\ud800", r"\udc00", r"\uDBFF", r"\ud800\u0041", r"\ud83d\ude00\ud800"]
)
@pytest.mark.parametrize("behind", ["", "and more text", r"\\ud800"])
@pytest.mark.parametrize("more", ["", ', "inner": []'])
def test_half_of_a_character_is_told_as_what_it_is(half, behind, more):
    with pytest.raises(
        InvalidRequestError, match=r"half of a character: \\u[dD][8-9a-fA-F]"
    ) as told:
        parse(f'{{"text": "{half}{behind}"{more}}}'.encode(), Outer)
    assert half.replace(r"\u0041", "")[-6:] in str(told.value)


@pytest.mark.parametrize("whole", [r"\ud83d\ude00", r"\\ud800", r"\\\\udc00"])
def test_whole_characters_are_not_blamed_for_what_else_is_wrong(whole):
    with pytest.raises(InvalidRequestError, match="the body is no JSON"):
        parse(f'{{"text": "{whole}'.encode(), Outer)
    assert parse(f'{{"inner": [], "text": "{whole}"}}'.encode(), Outer).text == json.loads(
        f'"{whole}"'
    )
