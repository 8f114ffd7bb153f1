"""What a checkpoint may be called: it is the name of a folder, and an argument of commands."""

import re
from typing import Final

MODEL_NAMES: Final = "letters, digits, '.', '_', ':' and '-', at most 96, a letter or digit first"
"""Which names those are, for people."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,95}")


def is_model_name(name: str) -> bool:
    """Tell whether `name` may name a checkpoint."""
    return _NAME.fullmatch(name) is not None
