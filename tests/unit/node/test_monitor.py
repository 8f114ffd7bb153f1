import asyncio
import contextlib

from sllm_node.core.clock import ManualClock
from sllm_node.core.metrics import Metrics
from sllm_node.core.types import Stall
from sllm_node.node.monitor import Monitor
from sllm_node.node.systemd import Notifier


class RecordingNotifier(Notifier):
    def __init__(self, watchdog_s):
        super().__init__({})
        self.watchdog_s = watchdog_s
        self.beats = 0
        self.lines = []

    def watchdog(self):
        self.beats += 1

    def status(self, line):
        self.lines.append(line)


def monitor(notifier, stalled=lambda: None, describe=lambda: "idle"):
    return Monitor(ManualClock(), Metrics(), notifier, stalled, describe)


def test_signs_of_life_come_three_times_a_period():
    notifier = RecordingNotifier(3.0)
    watching = monitor(notifier)
    for tenth in range(60):
        watching.beat(tenth / 10)
    assert notifier.beats == 6


def test_a_stalled_engine_gets_no_sign_of_life_and_says_why():
    notifier = RecordingNotifier(3.0)
    monitor(notifier, stalled=lambda: Stall("step stuck for 130 s")).beat(100.0)
    assert notifier.beats == 0
    assert notifier.lines == ["step stuck for 130 s"]


def test_without_a_watchdog_no_sign_is_sent():
    notifier = RecordingNotifier(None)
    monitor(notifier).beat(1.0)
    assert notifier.beats == 0


def test_the_status_line_is_sent_when_it_changes():
    notifier = RecordingNotifier(None)
    lines = iter(["a", "a", "b"])
    watching = monitor(notifier, describe=lambda: next(lines))
    for now in range(3):
        watching.beat(float(now))
    assert notifier.lines == ["a", "b"]


async def test_the_lag_of_the_loop_is_measured():
    metrics = Metrics()
    looked = asyncio.Event()

    def describe():
        looked.set()
        return "idle"

    watching = Monitor(ManualClock(), metrics, RecordingNotifier(None), lambda: None, describe)
    task = asyncio.create_task(watching.run())
    await looked.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert metrics.registry.get_sample_value("sllm_event_loop_lag_seconds_count") == 1.0
