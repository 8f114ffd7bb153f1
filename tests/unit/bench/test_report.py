import json
from dataclasses import replace

import pytest

from sllm_node.bench.ablation import AblationResult
from sllm_node.bench.figures import ceiling_of, headline, rows_of, spread_of
from sllm_node.bench.machine import describe_machine, one_line
from sllm_node.bench.report import Report
from sllm_node.bench.scenarios import Sample, ScenarioResult

VERSIONS = {"sllm_node raw": "0", "safetensors": "1", "runai": None, "broken": "2"}


def result(scenario="cached", **seconds):
    names = {
        "plain_copy": "plain copy",
        "plain_reader": "plain reader",
        "sllm_node": "sllm_node raw",
    }
    samples = [
        Sample(scenario, number, names.get(name, name), "tiny-0", value)
        for name, values in seconds.items()
        for number, value in enumerate((99.0, *values))
    ]
    problems = {"runai": "not installed", "broken": "ValueError: no"}
    return ScenarioResult(scenario, 1_000_000_000, samples, problems)


CACHED = result(sllm_node=[1.0, 1.0, 2.0], safetensors=[6.0, 8.0, 7.0], plain_copy=[0.5])
RANDOM = result("random", sllm_node=[2.0], safetensors=[5.0], plain_copy=[0.5], plain_reader=[1.0])


@pytest.fixture
def report(tmp_path):
    ablation = AblationResult(1_000_000_000, {"per tensor": [4.0, 4.0], "+bulk": [2.0, 2.0]})
    machine = describe_machine(tmp_path, "the command")
    return Report(
        "A title", machine, "cpu", VERSIONS, 0, {"verify": "first"}, [CACHED, RANDOM], ablation
    )


def test_the_warm_up_does_not_count():
    assert spread_of(CACHED.seconds("sllm_node raw")).median == 1.0


def test_rows_tell_rate_share_of_the_ceiling_and_speedup_fastest_first():
    first, second, *rest = rows_of(CACHED, VERSIONS)
    assert (first.name, first.bytes_per_s, first.ceiling_share) == ("sllm_node raw", 1e9, 0.5)
    assert (second.name, second.speedup) == ("safetensors", 7.0)
    assert {(row.name, row.spread, row.remark) for row in rest} == {
        ("runai", None, "not installed"),
        ("broken", None, "ValueError: no"),
    }


def test_the_ceiling_is_the_slowest_plain_part_of_the_way():
    assert ceiling_of(CACHED) == ("plain copy", 2e9)
    assert ceiling_of(RANDOM) == ("plain reader", 1e9)
    assert ceiling_of(result(sllm_node=[1.0])) is None


def test_the_headline_has_the_figures_of_the_register():
    assert headline([CACHED, RANDOM], VERSIONS) == {
        "cached_speedup_over_safetensors": 7.0,
        "random_speedup_over_best_peer": 2.5,
        "disk_to_device_ratio": 0.5,
    }


def test_without_our_samples_there_is_no_speedup():
    rows = rows_of(result(safetensors=[1.0]), VERSIONS)
    assert [row.speedup for row in rows if row.spread] == [None]


def test_the_folder_has_tables_numbers_and_every_sample(report, tmp_path):
    report.write(tmp_path / "out")
    text = (tmp_path / "out" / "summary.txt").read_text()
    for word in ("A title", "7.00x", "50.0%", "not installed", "ablation", "the command"):
        assert word in text
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["machine"]["kernel"]
    assert summary["scenarios"]["random"]["ceiling"]["name"] == "plain reader"
    raw = json.loads((tmp_path / "out" / "raw.json").read_text())
    assert len(raw["loads"]) == len(CACHED.samples) + len(RANDOM.samples)
    assert raw["ablation_seconds"]["+bulk"] == [2.0, 2.0]


def test_the_short_form_has_a_line_for_everybody(report):
    lines = report.short().splitlines()
    assert len([line for line in lines if line.startswith("cached")]) == 5
    assert "7.000 s" in report.short()
    assert lines[-1].split() == ["ablation", "+bulk", "2.000", "s"]


def test_names_and_remarks_are_told_letter_by_letter(report):
    odd = result("random", sllm_node=[2.0])
    odd.problems["broken"] = "KeyError: '[/x]' :smile: [red]"
    told = replace(report, title="of /tmp/[/x]", scenarios=[odd], machine={
        **report.machine, "command": "bench :smile:"
    }).as_text()  # fmt: skip
    for words in ("of /tmp/[/x]\n", "'[/x]' :smile: [red]", "bench :smile:\n"):
        assert words in told


def test_plots_are_drawn_where_matplotlib_is_installed(report, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = report.plot(tmp_path)
    assert len(drawn) == 5
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_the_machine_is_told_in_one_line(tmp_path):
    line = one_line(describe_machine(tmp_path))
    assert "GiB memory" in line
    assert "Linux" in line
