from sllm_node.checkpoint.catalog import Catalog
from sllm_node.core.types import ModelId
from sllm_node.node.unfit import unfit
from tests.unit.checkpoint.raw import write_raw


def test_checkpoints_of_larger_chunks_than_the_pools_are_unfit(tmp_path):
    for name, chunk_bytes in (("small", 4096), ("large", 8192)):
        write_raw(tmp_path, name, chunk_bytes=chunk_bytes)
    catalog = Catalog(tmp_path)
    catalog.scan()
    assert list(unfit(catalog, catalog.models(), 4096)) == ["large"]
    assert unfit(catalog, catalog.models(), 8192) == {}


def test_a_checkpoint_that_is_gone_is_not_told_as_unfit(tmp_path):
    assert unfit(Catalog(tmp_path), [ModelId("gone")], 4096) == {}
