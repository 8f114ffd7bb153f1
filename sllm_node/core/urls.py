"""What of a remote's URL may be told and logged: neither user, password, query nor fragment."""

import re
from typing import Final

_PLAIN: Final = re.compile(r"(https?|s3)://[^/?#@\s]+(/[^?#\s]*)?")
_URL: Final = re.compile(r"\s?[a-zA-Z][a-zA-Z0-9+.-]*://\S*")


def is_plain(url: str) -> bool:
    """Tell whether `url` is an address of a remote without anything that is not for all to see."""
    return _PLAIN.fullmatch(url) is not None


def plain(url: str) -> str:
    """Return `url` without what is not for all to see."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def without_urls(text: str) -> str:
    """Return what `text` says beside URLs: clients may not know where a node's remotes are."""
    return _URL.sub("", text)
