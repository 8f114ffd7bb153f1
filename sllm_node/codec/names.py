"""How people name codecs, without what they are made of."""

from typing import Final

RAW: Final = "raw"
EXPONENT: Final = "exp"
"""The family of codecs, as people name it; a chunk has the one for its dtype."""
AUTO: Final = "auto"
"""Whatever is best now."""
CHOICES: Final = (AUTO, RAW, EXPONENT)
DEFAULT: Final = AUTO
"""What a conversion uses unless it is told."""
