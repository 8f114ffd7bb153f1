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
        ["--trace", "gamma:rate=1", "--scale", "inf"],
    ],
)
def test_what_is_not_there_is_refused_by_name(arguments):
    result = simulate(*arguments)
    assert type(result.exception) is SystemExit
    assert (result.exit_code, arguments[-1] in result.stderr) == (1, True)


def test_an_out_that_is_a_file_is_refused_before_anything_runs(tmp_path):
    file = tmp_path / "kept"
    file.write_text("x")
    result = simulate(*SHORT, "--out", str(file))
    assert result.stderr == (
        f"sllm-node: --out {file}: file exists; name a folder that can be written, or a new one\n"
    )


def test_a_trace_may_begin_with_a_byte_order_mark(tmp_path):
    trace = tmp_path / "trace.csv"
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,8,2\n"
    trace.write_text(text, encoding="utf-8-sig")
    result = simulate("--trace", str(trace), "--policy", "ours", "--json")
    assert [one.requests for one in msgspec.json.decode(result.stdout, type=list[Report])] == [1]
