import json

import pytest

from sllm_node.bench.compare import ComparisonPlan, compare
from sllm_node.bench.probe import probe
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import BenchError, DeviceError

CONTESTANTS = ("sllm_node", "safetensors", "instanttensor")


@pytest.fixture
def store(files):
    return files[0].folder.parent.parent


def plan(store, **fields):
    wanted = {
        "shape": "tiny", "scenarios": ("cached",), "rounds": 1, "with_probe": False,
        "contestants": CONTESTANTS, "budget_s": 60.0,
    }  # fmt: skip
    return ComparisonPlan(store, **{**wanted, **fields})


def test_a_comparison_on_the_tiny_shape_is_whole(store, tmp_path):
    told = []
    report = compare(plan(store, out=tmp_path), StoreConfig(), MonotonicClock(), told.append)
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["scenarios"]["cached"]["contestants"]}
    assert set(rows) == set(CONTESTANTS)
    assert rows["sllm_node"]["remark"] == rows["safetensors"]["remark"] == "39 tensors equal"
    assert rows["instanttensor"]["spread"] is None
    assert summary["scenarios"]["cached"]["ceiling"]["bytes_per_s"] > 0
    assert report.ablation is None
    assert told


def test_a_folder_can_be_compared_without_us(store, files):
    wanted = plan(store, shape=None, source=files[0].folder, contestants=("safetensors",))
    report = compare(wanted, StoreConfig(), MonotonicClock(), lambda text: None)
    assert report.title.startswith("Loading tiny-0 onto cpu")
    assert len(report.scenarios[0].seconds("safetensors")) == 1


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"shape": "9b"}, BenchError),
        ({"contestants": ("nobody",)}, BenchError),
        ({"device": "cuda:99"}, DeviceError),
    ],
)
def test_what_is_not_there_is_refused_at_once(store, fields, error):
    with pytest.raises(error):
        compare(plan(store, **fields), StoreConfig(), MonotonicClock(), lambda text: None)


def test_a_peer_is_tried_in_a_process_of_its_own(store):
    assert probe("safetensors", store, "cpu") is None
    assert "nobody" in str(probe("nobody", store, "cpu"))
