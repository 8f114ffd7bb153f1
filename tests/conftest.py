import contextlib
import gc

import pytest

with contextlib.suppress(ImportError):  # tests on a GPU machine may do without
    from hypothesis import settings

    settings.register_profile("gate", deadline=None)  # a busy machine decides nothing
    settings.load_profile("gate")


@pytest.fixture(autouse=True, scope="module")
def _imports_are_frozen():
    """Let collections of garbage look at what a module's tests make, not at all that was imported.

    Much here collects on purpose, and with everything imported one collection takes a third of a
    second.
    """
    gc.collect()
    gc.freeze()
