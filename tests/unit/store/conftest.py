import pytest

from sllm_node.codec.names import EXPONENT, RAW
from tests.unit.store.handmade import Rig


@pytest.fixture
def with_codecs(request, monkeypatch):
    """Run the tests of a module with raw and with encoded checkpoints."""
    monkeypatch.setattr(Rig, "codec", request.param)


def pytest_generate_tests(metafunc):
    """Parametrise `with_codecs`."""
    if "with_codecs" in metafunc.fixturenames:
        metafunc.parametrize("with_codecs", [RAW, EXPONENT], indirect=True)
