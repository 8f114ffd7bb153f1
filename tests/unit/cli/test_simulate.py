from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from sllm_node.cli.main import app
from sllm_node.sim.report import Report

ROOT = Path(__file__).parent.parent.parent.parent
CLUSTER = str(ROOT / "configs" / "simulation.toml")
SHORT = ["--trace", "gamma:rate=4,cv=2,duration=5", "--policy", "ours,serverless"]


def simulate(*arguments):
    return CliRunner().invoke(app, ["simulate", CLUSTER, *arguments])


def test_json_has_a_report_of_each_policy():
    result = simulate(*SHORT, "--json")
    reports = msgspec.json.decode(result.stdout, type=list[Report])
    assert [report.policy for report in reports] == ["ours", "serverless"]


def test_out_keeps_events_and_a_report(tmp_path):
    assert simulate(*SHORT, "--out", str(tmp_path)).exit_code == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"report.json", "events-ours.log", "events-serverless.log"} <= names


@pytest.mark.parametrize(
    "arguments",
    [
        ["--trace", "no-such.csv"],
        ["--trace", "gamma:rate=1", "--policy", "best"],
        ["--trace", "gamma:rate=1", "--mechanisms", "magic"],
    ],
)
def test_what_is_not_there_is_refused_by_name(arguments):
    result = simulate(*arguments)
    assert result.exit_code == 1
