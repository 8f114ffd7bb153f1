"""The service unit fits the node's own defaults, and systemd accepts it where there is one."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sllm_node.cluster.file import NEEDED_FILES
from sllm_node.core.config import Config
from sllm_node.node.node import STOP_SLACK_S

UNIT = Path(__file__).parents[3] / "systemd" / "sllm-node.service"


def settings():
    lines = (
        line.split("=", 1)
        for line in UNIT.read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    return {key: value for key, value in lines}  # noqa: C416 - the last of repeated keys counts


def test_the_unit_waits_for_ready_and_feeds_a_watchdog():
    found = settings()
    assert (found["Type"], found["NotifyAccess"]) == ("notify", "main")
    assert float(found["WatchdogSec"]) > 0
    assert found["LimitMEMLOCK"] == "infinity"
    assert found["Restart"] == "on-failure"


def test_the_node_reads_a_copy_of_a_config_that_its_user_could_not_read():
    found = settings()
    assert found["DynamicUser"] == "yes"
    name, _, file = found["LoadCredential"].partition(":")
    assert file == "/etc/sllm-node/node.toml"
    assert found["ExecStart"].split()[-1] == f"${{CREDENTIALS_DIRECTORY}}/{name}"


def test_nothing_that_runs_before_the_node_needs_its_config():
    """Older systemd (247 to 251) hands credentials to ExecStart alone."""
    assert not [key for key in settings() if key.startswith("Exec") and "Pre" in key]


@pytest.mark.parametrize("mode", ["key", "tls"])
def test_the_unit_says_how_a_node_of_a_cluster_gets_its_secrets(mode):
    lines = UNIT.read_text().splitlines()
    for key in NEEDED_FILES[mode]:
        (line,) = [one for one in lines if one.startswith(f"#LoadCredential=trust.{key}:")]
        assert line.partition(":")[2].startswith("/etc/sllm-node/prod/")


def test_systemd_waits_for_a_drain():
    assert float(settings()["TimeoutStopSec"]) >= Config().node.drain_s + STOP_SLACK_S


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_accepts_the_unit(tmp_path):
    copy = tmp_path / UNIT.name
    copy.write_text(
        UNIT.read_text().replace("/opt/sllm-node/bin/sllm-node", str(shutil.which("true")))
    )
    done = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
