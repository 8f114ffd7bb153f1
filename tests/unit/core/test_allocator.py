"""Buffers that are taken again and again, in a process of its own: the setting is the process's."""

import subprocess
import sys

PROGRAM = """
import resource, sys
import numpy as np
from sllm_node.core.allocator import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "keep" else None)
def work():
    for _ in range(50):
        parts = [np.ones(4 << 20, np.uint8) for _ in range(3)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    command = [sys.executable, "-c", PROGRAM, how]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return told[0], int(told[1])


def test_kept_memory_is_not_paid_for_again():
    set_, kept = faults("keep")
    if set_ == "False":  # not glibc
        return
    _, usual = faults("leave")
    assert kept < 1000
    assert usual > 10 * kept
