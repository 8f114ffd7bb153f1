import os
import socket

import pytest

from sllm_node.core.config import parse_config
from sllm_node.core.contradictions import LONGEST_S
from sllm_node.node.node import STOP_SLACK_S
from sllm_node.node.systemd import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    name = str(tmp_path / "n") if request.param == "path" else f"@sllm-test-{os.getpid()}"
    receiver.bind("\0" + name[1:] if name.startswith("@") else name)
    receiver.setblocking(False)
    yield receiver, name
    receiver.close()


def test_each_message_arrives_as_systemd_reads_it(manager):
    receiver, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.ready("serving")
    notifier.status("busy")
    notifier.watchdog()
    notifier.stopping("draining", 2.5)
    assert [receiver.recv(999).decode() for _ in range(4)] == [
        "READY=1\nSTATUS=serving",
        "STATUS=busy",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=draining\nEXTEND_TIMEOUT_USEC=2500000",
    ]


def test_the_longest_drain_is_one_that_systemd_can_count(manager):
    receiver, name = manager
    drain_s = parse_config(f"[node]\ndrain_s = {LONGEST_S}\n").node.drain_s
    Notifier({"NOTIFY_SOCKET": name}).stopping("draining", drain_s + STOP_SLACK_S)
    assert int(receiver.recv(999).decode().rpartition("=")[2]) < 2**64 - 1


def test_without_a_manager_nothing_happens():
    Notifier({}).ready("serving")
    assert Notifier({}).watchdog_s is None


def test_a_manager_that_went_away_does_not_end_the_service(tmp_path):
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready("serving")


def test_a_manager_that_does_not_read_holds_nobody_up(manager):
    _, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    for number in range(2000):  # more than any socket queues
        notifier.status(f"status {number}")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_period_is_for_this_process_only(environment, expected):
    assert Notifier(environment).watchdog_s == expected
