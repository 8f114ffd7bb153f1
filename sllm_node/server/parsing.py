"""From JSON to a request's types: what is wrong is told with the parameter's path in OpenAI's style."""

import re
from typing import Any, Final, TypeVar

import msgspec

from sllm_node.core.errors import InvalidRequestError

ValueT = TypeVar("ValueT")
_FIELD: Final = re.compile(r"(?:unknown|required) field `([^`]+)`")
_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_HALF_AT: Final = re.compile(r"(?:end of hex escape|surrogate pair) \(byte (\d+)\)$")
_HALF_AT_END: Final = re.compile(rb"(?<!\\)(?:\\\\)*(\\u[dD][89abAB][0-9a-fA-F]{2})[^\\]{0,5}\Z")
"""Where too little follows for msgspec to see that the other half of the pair does not."""
_PATH: Final = re.compile(r" - at `(key in )?\$(.*)`$")


def parse(text: bytes, kind: type[ValueT], where: str = "") -> ValueT:
    """Parse JSON as `kind`; `where`: the parameter whose value `text` is, if it is not a whole body.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), where) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(
            _half_character(text, str(error)) or f"the body is no JSON: {error}"
        ) from error


def parse_any(text: bytes) -> Any:
    """Parse JSON as what it says it is.

    Raises:
        InvalidRequestError: it is no JSON.
    """
    found: Any = parse(text, object)
    return found


def _half_character(text: bytes, problem: str) -> str | None:
    """Tell of one escape of a pair without the other, if that is msgspec's `problem`."""
    if (at := _HALF_AT.search(problem)) is not None:
        end = int(at[1])
        halves = _HALF.findall(text, max(0, end - 14), end)
    else:
        halves = _HALF_AT_END.findall(text[-40:]) if "truncated" in problem else []
    if not halves:
        return None
    half = halves[-1].decode()
    return f"the body has half of a character: {half} without the other half of its pair; send whole ones"


def _explained(message: str, base: str) -> InvalidRequestError:
    """Return msgspec's finding with the parameter's path: `messages[0].role`."""
    path = _PATH.search(message)
    where = base + (path[2].removesuffix("[...]") if path else "")
    where = where.lstrip(".")
    text = message[: path.start()] if path else message
    if (field := _FIELD.search(text)) is not None:
        where = f"{where}.{field[1]}" if where else field[1]
        unknown = "unknown" in text
        text = "this field is unknown" if unknown else "this field is required"
    elif "Invalid value" in text and where.endswith("type"):
        text = "only parts of type text are served"
    return InvalidRequestError(f"{where or 'body'}: {text}", param=where or None)
