"""How people name codecs, without what they are made of."""

from typing import Final

RAW: Final = "raw"
EXPONENT: Final = "exp"
"""The family of codecs, as people name it; a chunk has the one for its dtype."""
CHOICES: Final = (RAW, EXPONENT)
AUTO: Final = "auto"
"""On the command line: what suits the machine; `exp` where a GPU decodes, else `raw`."""
