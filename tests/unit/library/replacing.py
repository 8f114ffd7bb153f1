"""A loader beside which somebody replaces what it loads."""

from sllm_node.library.loader import Loaded


class Replacing:
    """A loader before each of whose first loads somebody replaces the checkpoint.

    With `after`, as soon as all bytes are here, but before anything is made beside the load.
    """

    def __init__(self, loader, replace, times, *, after=False):
        self._loader = loader
        self._replace = replace
        self._left = list(range(times))
        self._after = after

    def load(self, *arguments, meanwhile, **options):
        if not self._after:
            self._replaced()
            return self._loader.load(*arguments, meanwhile=meanwhile, **options)
        loaded = self._loader.load(*arguments, meanwhile=lambda: None, **options)
        self._replaced()
        return Loaded(loaded.parts, meanwhile())

    def _replaced(self):
        if self._left:
            self._replace(self._left.pop(0))
