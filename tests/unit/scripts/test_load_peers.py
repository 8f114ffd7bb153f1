import json

import pytest

from scripts.bench import load_peers
from sllm_node.bench.contestants import OURS


@pytest.fixture
def summary(tmp_path):
    """What a run on a GPU leaves behind, cut down to what is recorded."""
    loads = [
        {"scenario": scenario, "name": name, "round": number, "seconds": 1.0 if number else 50.0}
        for scenario in ("cached", "random")
        for name in (OURS, "safetensors", "runai", "plain reader")
        for number in (1, 0, 2)
    ]
    rows = [{"name": OURS, "spread": {}}, {"name": "runai", "spread": {}}]
    machine = {
        "processor": "p", "cpus": 16, "memory_bytes": 2**37, "file_system": "ext4",
        "disk": "nvme0", "kernel": "6", "command": "the command",
    }  # fmt: skip
    fields = {
        "title": "8B", "device": "cuda:0", "machine": machine,
        "figures": {
            "cached_speedup_over_safetensors": 7.0, "random_speedup_over_best_peer": 1.5,
            "disk_to_device_ratio": 0.98,
        },
        "scenarios": {"random": {"contestants": rows, "ceiling": {"name": "plain reader"}}},
    }  # fmt: skip
    (tmp_path / "raw.json").write_text(json.dumps({"loads": loads}))
    (tmp_path / "summary.json").write_text(json.dumps(fields))
    return tmp_path / "summary.json"


def test_a_finished_run_is_recorded_with_its_own_machine_and_rounds(summary, tmp_path):
    load_peers.record(summary, tmp_path / "figures.json")
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {name: figure["value"] for name, figure in found.items()} == {
        "cached_speedup_over_safetensors": 7.0,
        "random_speedup_over_best_peer": 1.5,
        "disk_to_gpu_ratio": 0.98,
    }
    assert found["disk_to_gpu_ratio"]["samples"] == [1.0, 1.0]
    assert "over runai" in found["random_speedup_over_best_peer"]["note"]
    assert "16 CPUs" in found["cached_speedup_over_safetensors"]["machine"]
