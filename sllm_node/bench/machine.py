"""What a measurement was made on: the part of a report without which its numbers mean nothing."""

import os
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from sllm_node.bench.devices import describe_gpus


def describe_machine(store: Path, command: str | None = None) -> dict[str, object]:
    """Return processor, memory, GPU, disk, kernel, versions, date and command."""
    return {
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **describe_gpus(),
        **_disk(store),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "transformers")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command or " ".join([_program(), *sys.argv[1:]]),
    }


def _program() -> str:
    """Return what a user types for this program, also where Python was told to run the package."""
    name = Path(sys.argv[0]).name
    return "sllm-node" if name == "__main__.py" else name


def one_line(machine: dict[str, object]) -> str:
    """Return the machine in words, for a table's head."""
    parts = [f"{machine['processor']}, {machine['cpus']} CPUs"]
    parts.append(f"{_gib(machine['memory_bytes'])} GiB memory")
    if "gpu" in machine:
        parts.append(f"{machine['gpu_count']} x {machine['gpu']} (driver {machine['driver']})")
    parts.append(f"{machine['file_system']} on {machine['disk']}")
    parts.append(f"Linux {machine['kernel']}")
    return ", ".join(parts)


def _gib(size: object) -> str:
    return f"{size / 2**30:.0f}" if isinstance(size, int) else "?"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _disk(store: Path) -> dict[str, object]:
    """Return file system and device of the deepest mount above `store`."""
    best = ("unknown", "unknown", "")
    place = str(store.resolve())
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        device, mount, kind = line.split()[:3]
        is_above = place == mount or place.startswith(mount.rstrip("/") + "/")
        if is_above and len(mount) >= len(best[2]):
            best = (device, kind, mount)
    status = os.statvfs(store)
    return {
        "disk": best[0],
        "file_system": best[1],
        "disk_free_bytes": status.f_bavail * status.f_frsize,
    }
