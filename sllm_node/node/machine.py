"""What a preflight asks of the machine it runs on: memory, limits, folders, ports, GPUs."""

import resource
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from sllm_node.core.config import DeviceConfig
from sllm_node.node import folders
from sllm_node.node.devices import open_devices
from sllm_node.node.systemd import Notifier

_CGROUPS: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory that this process may have."""

    total: int
    """Of the machine, or of the control group if that may have less."""
    available: int


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """A device that was opened and closed again."""

    name: str
    asked: int
    """What the node would take."""
    free: int


class Machine(Protocol):
    """What is asked; `ThisMachine` is the real one."""

    def memory(self) -> Memory: ...

    def lockable(self) -> int | None:
        """Return the bytes that may be page-locked; None: no limit."""

    def listen_problem(self, host: str, port: int) -> str | None:
        """Return why nobody could listen there now; None: one could."""

    def look(self, folder: Path) -> folders.Look:
        """Return what a folder allows."""

    def devices(self, config: DeviceConfig) -> list[DeviceRoom]:
        """Open the devices that `config` names, and close them.

        Raises:
            DeviceError: one is not there, or has no free memory.
        """


class ThisMachine:
    """The machine that this process runs on."""

    def memory(self) -> Memory:
        found = _meminfo()
        total, available = found["MemTotal"], found["MemAvailable"]
        limit = _group_limit()
        return Memory(min(total, limit), min(available, limit))

    def lockable(self) -> int | None:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY else soft

    def listen_problem(self, host: str, port: int) -> str | None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            for family, kind, protocol, _, address in found:
                try:
                    taken = socket.socket(family, kind, protocol)
                except OSError:  # a kernel without IPv6, as asyncio has it
                    continue
                with taken:
                    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    taken.bind(address)
        except OSError as error:
            return (error.strerror or str(error)).lower()
        return None

    def look(self, folder: Path) -> folders.Look:
        return folders.look(folder)

    def devices(self, config: DeviceConfig) -> list[DeviceRoom]:
        if config.names[0].startswith("cpu"):
            return []  # host memory, which has a line of its own
        opened = open_devices(config, Notifier({}))
        try:
            return [
                DeviceRoom(one.name, one.memory_total, one.driver_free())  # type: ignore[attr-defined]
                for one in opened
            ]
        finally:
            for one in opened:
                one.close()


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = (line.replace(":", "").split() for line in lines)
    return {name: int(value) << 10 for name, value, *_ in fields}


def _group_limit() -> int:
    """Return the least memory limit of this process's control group and of those above it."""
    least = 1 << 62
    with suppress(OSError, ValueError):
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::")[2].strip()
        group = _CGROUPS / own.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):
                least = min(least, int((folder / "memory.max").read_text(encoding="ascii")))
    return least
