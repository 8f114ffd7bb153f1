import pytest

from sllm_node.bench.ablation import Ablation, AblationPlan, run_ablation
from sllm_node.bench.reference import read_reference
from sllm_node.core.clock import ManualClock
from sllm_node.core.config import ByteSize, StoreConfig
from sllm_node.core.errors import BenchError
from sllm_node.core.units import MIB
from tests.unit.bench.rig import no_drop


@pytest.fixture
def ablation(files):
    return Ablation(files[0], "cpu", StoreConfig(chunk_bytes=ByteSize(16 * MIB), reader_threads=2))


def test_every_step_loads_the_right_bytes_once_a_round(files, ablation, tmp_path):
    plan = AblationPlan(2, page_cache=no_drop(tmp_path))
    reference = read_reference(files[0], "cpu")
    result = run_ablation(ablation, files[0], reference, ManualClock(), plan)
    assert list(result.seconds) == [
        "per tensor", "+bulk", "+direct", "+threads", "+pinned", "+pipeline",
    ]  # fmt: skip
    assert {len(seconds) for seconds in result.seconds.values()} == {2}


def test_only_the_first_round_begins_after_the_deadline(files, ablation, tmp_path):
    plan = AblationPlan(5, deadline=-1.0, page_cache=no_drop(tmp_path))
    reference = read_reference(files[0], "cpu")
    result = run_ablation(ablation, files[0], reference, ManualClock(), plan)
    assert {len(seconds) for seconds in result.seconds.values()} == {1}


def test_a_step_that_loaded_nothing_is_found_out(files, ablation):
    with pytest.raises(BenchError, match="'none' loads 39 tensors wrongly"):
        ablation.check("none", read_reference(files[0], "cpu"))
