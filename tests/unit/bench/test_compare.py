import json

import pytest

from sllm_node.bench.compare import ComparisonPlan, compare, goes_on
from sllm_node.bench.machine import describe_machine
from sllm_node.bench.probe import probe
from sllm_node.bench.report import Report
from sllm_node.core.clock import MonotonicClock
from sllm_node.core.config import StoreConfig
from sllm_node.core.errors import BenchError, DeviceError
from tests.unit.bench.rig import no_drop

CONTESTANTS = ("sllm_node raw", "sllm_node codec", "safetensors", "instanttensor")


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
    assert rows["sllm_node raw"]["remark"] == rows["safetensors"]["remark"] == "39 tensors equal"
    assert rows["instanttensor"]["spread"] is None
    assert summary["scenarios"]["cached"]["ceiling"]["bytes_per_s"] > 0
    assert report.ablation is None
    assert told


def test_everything_runs_and_every_step_of_the_ablation_is_in_the_report(store, tmp_path):
    wanted = plan(
        store, scenarios=("cached", "random"), copies=2, with_ablation=True, ablation_rounds=1,
        page_cache=no_drop(tmp_path), out=tmp_path,
    )  # fmt: skip
    report = compare(wanted, StoreConfig(), MonotonicClock(), lambda text: None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["ablation"]) == 6
    assert summary["scenarios"]["random"]["page_cache"] == wanted.page_cache.way
    assert report.scenarios[1].seconds("plain reader")[0] > 0
    assert not report.remarks


def test_a_folder_can_be_compared_without_us(store, files):
    wanted = plan(store, shape=None, source=files[0].folder, contestants=("safetensors",))
    report = compare(wanted, StoreConfig(), MonotonicClock(), lambda text: None)
    assert report.title.startswith("Loading tiny-0 onto cpu")
    assert len(report.scenarios[0].seconds("safetensors")) == 1


def test_a_part_that_fails_is_a_remark_and_the_rest_goes_on(tmp_path):
    told = []
    machine = describe_machine(tmp_path)
    report = Report("t", machine, "cpu", {}, 0, {})
    with goes_on(report, "the ablation", told.append):
        int("no room")
    assert told == report.remarks == [report.remarks[0]]
    assert "the ablation failed: ValueError: invalid literal" in report.as_text()


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
