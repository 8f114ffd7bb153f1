"""From JSON to a request's types: what is wrong is told with the parameter's path in OpenAI's style."""

import re
from typing import Any, Final, TypeVar

import msgspec

from sllm_node.core.errors import InvalidRequestError

ValueT = TypeVar("ValueT")
_FIELD: Final = re.compile(r"(?:unknown|required) field `([^`]+)`")
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
        raise InvalidRequestError(f"the body is no JSON: {error}") from error


def parse_any(text: bytes) -> Any:
    """Parse JSON as what it says it is.

    Raises:
        InvalidRequestError: it is no JSON.
    """
    found: Any = parse(text, object)
    return found


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
