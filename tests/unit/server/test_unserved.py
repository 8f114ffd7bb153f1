import json

import pytest

from sllm_node.core.errors import InvalidRequestError
from sllm_node.server.unserved import UNSERVED, is_neutral


@pytest.mark.parametrize("name", UNSERVED)
def test_a_field_that_asks_for_something_is_not_neutral(name):
    assert not is_neutral(name, b'{"something": 1}')
    assert not is_neutral(name, json.dumps([{}] * 1000).encode())


def test_neutral_values_are_known_however_they_are_written():
    assert is_neutral("response_format", b'{ "type" : "text" }')
    assert is_neutral("tools", b"[ ]")


def test_what_is_no_text_is_refused():
    with pytest.raises(InvalidRequestError, match="no JSON"):
        is_neutral("tool_choice", b'"\xff"')
