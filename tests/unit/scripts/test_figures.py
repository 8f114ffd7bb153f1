import json

import pytest

from scripts.bench import figures


def test_every_recorded_figure_is_defined_and_complete():
    defined = figures.definitions()
    for name, figure in figures.measured().items():
        assert name in defined
        assert figure["unit"] == defined[name]["unit"]
        assert all(figure[key] for key in ("machine", "command", "commit", "date"))
        assert figure["samples"]


def test_a_figure_that_was_not_measured_shows_as_such():
    missing = set(figures.definitions()) - set(figures.measured())
    rows = [row for row in figures.table().splitlines() if "not measured yet" in row]
    assert len(rows) == len(missing)


def test_samples_that_are_recorded_again_keep_the_commit_that_was_measured(tmp_path):
    path = tmp_path / "figures.json"
    more = {"command": "c", "machine": "m", "path": path}
    figures.record("clone_8b_ms", 48.0, [47.0, 49.0], measured_at="abc", **more)
    figures.record("clone_8b_ms", 48.0, [47.0, 49.0], measured_at="later", note="n", **more)
    found = json.loads(path.read_text())["clone_8b_ms"]
    assert (found["commit"], found["note"]) == ("abc", "n")
    figures.record("clone_8b_ms", 50.0, [50.0], measured_at="later", **more)
    assert json.loads(path.read_text())["clone_8b_ms"]["commit"] == "later"


def test_recording_keeps_the_other_figures(tmp_path):
    path = tmp_path / "figures.json"
    for name, value in (("disk_to_dram_ratio", 0.9), ("convert_peak_rss_gib", 1.0)):
        figures.record(name, value, [value], ceiling=1.0, command="c", machine="m", path=path)
    recorded = json.loads(path.read_text())
    assert recorded["disk_to_dram_ratio"]["value"] == 0.9
    assert recorded["convert_peak_rss_gib"]["unit"] == "GiB"


def test_an_undefined_figure_is_refused(tmp_path):
    with pytest.raises(KeyError):
        figures.record("speed", 1.0, [1.0], path=tmp_path / "figures.json")
