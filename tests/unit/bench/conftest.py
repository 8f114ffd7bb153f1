import pytest

from tests.unit.bench.rig import make_files


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Two copies of the tiny shape, in both formats."""
    return make_files(tmp_path_factory.mktemp("bench"), copies=2)
