"""Fields that OpenAI defines and we do not serve: what may be sent in them, as it asks for nothing."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from sllm_node.server.parsing import parse_any

_Neutral = Callable[[Any], bool]


def _only(*values: object) -> _Neutral:
    return lambda value: value in values


_NEVER: Final[_Neutral] = lambda value: False  # noqa: E731 - a value of the table below
UNSERVED: Final[Mapping[str, _Neutral]] = {
    "audio": _NEVER,
    "best_of": _only(1),
    "function_call": _only("none"),
    "functions": _only([]),
    "metadata": _only({}),
    "modalities": _only(["text"]),
    "moderation": _NEVER,
    "parallel_tool_calls": _only(True, False),  # noqa: FBT003 - there are no tools to call
    "prediction": _NEVER,
    "prompt_cache_key": _NEVER,
    "prompt_cache_options": _NEVER,
    "prompt_cache_retention": _NEVER,
    "reasoning_effort": _only("none"),
    "response_format": _only({"type": "text"}),
    "service_tier": _only("auto", "default"),
    "store": _only(False),  # noqa: FBT003 - the neutral value
    "suffix": _only(""),
    "tool_choice": _only("none", "auto"),
    "tools": _only([]),
    "verbosity": _NEVER,
    "web_search_options": _NEVER,
}
_LENGTH_MAX: Final = 256
"""Bytes; neutral values are short."""


def is_neutral(name: str, text: bytes) -> bool:
    """Tell whether a field whose JSON is `text` asks for nothing.

    Raises:
        InvalidRequestError: it is no JSON.
    """
    return len(text) <= _LENGTH_MAX and UNSERVED[name](parse_any(text))
