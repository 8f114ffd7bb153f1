"""Chunks of the pinned pool, lent for something that is no checkpoint."""

from collections.abc import Callable, Sequence


class Loan:
    """Chunks that are somebody's until `close`; nothing may work on their bytes any more then."""

    def __init__(self, views: Sequence[memoryview], give_back: Callable[[], None]) -> None:
        self.views = tuple(views)
        self._give_back = give_back
        self._is_open = True

    def close(self) -> None:
        """Give the chunks back; a second call does nothing."""
        if self._is_open:
            self._is_open = False
            self.views = ()
            self._give_back()
