"""A bad network between nodes of one machine, without privileges: one TCP relay for each pair of nodes.

Every relay delays what passes, as long links do; now and then much longer, which is what the loss of a
packet looks like to TCP; and a node that is cut off has its relays swallow all bytes, both ways, so
that nobody is told anything. Used by `scripts.bench.cluster` and `migration_matrix`.
"""

import asyncio
import contextlib
import itertools
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from tests.ports import free_port

DELAY_S: Final = 0.005
LOSS_SHARE: Final = 0.01
LOSS_S: Final = 0.2
"""What TCP waits at least until it sends again."""


class Relay:
    """The way from one node to another."""

    def __init__(self, address: str, draw: random.Random, *, is_bad: bool = True) -> None:
        """`is_bad`: it delays and loses."""
        host, _, port = address.rpartition(":")
        self._target = host, int(port)
        self._draw = draw
        self._is_bad = is_bad
        self._open = asyncio.Event()
        self._open.set()
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()

    async def start(self, port: int) -> None:
        """Listen; from now on the target is at this port, too."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)

    def cut(self, *, is_cut: bool) -> None:
        """Let nothing through, or go on: what was under way then is lost, and its connections with it."""
        if is_cut:
            self._open.clear()
        else:
            self._open.set()
            self._drop()

    def reset(self) -> None:
        """End the connections; while it is cut, new ones get no answer."""
        self._drop()

    async def close(self) -> None:
        """Stop."""
        if self._server is not None:
            self._server.close()
        self._drop()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def _drop(self) -> None:
        for pump in self._pumps:
            pump.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        try:
            await self._open.wait()
            other_reader, other_writer = await asyncio.open_connection(*self._target)
            try:
                there = asyncio.create_task(self._pump(reader, other_writer))
                back = asyncio.create_task(self._pump(other_reader, writer))
                try:
                    await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    there.cancel()
                    back.cancel()
                    await asyncio.gather(there, back, return_exceptions=True)
            finally:
                other_writer.transport.abort()
        except (OSError, asyncio.CancelledError):
            pass  # the other side is told by the end of its connection
        finally:
            writer.transport.abort()
            self._pumps.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if self._is_bad:
                    is_lost = self._draw.random() < LOSS_SHARE
                    await asyncio.sleep(DELAY_S + (LOSS_S if is_lost else 0.0))
                await self._open.wait()
                writer.write(data)
                await writer.drain()


def relayed(
    file: Path, names: Sequence[str], *, is_bad: bool = True
) -> "tuple[Network, dict[str, Path]]":
    """Return relays, and a cluster file for each node in which the others are where they listen."""
    text = file.read_text()
    addresses = dict(re.findall(r'id = "(\w+)"\naddress = "([^"]+)"', text))
    assert set(addresses) == set(names), text
    ports = {pair: free_port() for pair in itertools.permutations(names, 2)}
    files = {}
    for me in names:
        own = text
        for name in set(names) - {me}:
            own = own.replace(addresses[name], f"127.0.0.1:{ports[me, name]}")
        files[me] = file.with_name(f"cluster-{me}.toml")
        files[me].write_text(own)
    return Network(addresses, ports, is_bad=is_bad), files


class Network:
    """The relays between all pairs of nodes."""

    def __init__(
        self, addresses: dict[str, str], ports: dict[tuple[str, str], int], *, is_bad: bool = True
    ) -> None:
        """`ports`: where a node (first) finds another one (second)."""
        draw = random.Random(0)
        self._ports = ports
        self._relays = {pair: Relay(addresses[pair[1]], draw, is_bad=is_bad) for pair in ports}

    async def start(self) -> None:
        """Open all ways."""
        for pair, relay in self._relays.items():
            await relay.start(self._ports[pair])

    async def close(self) -> None:
        """Close all ways."""
        for relay in self._relays.values():
            await relay.close()

    def cut(self, name: str, *, is_cut: bool) -> None:
        """Cut a node off from all others, or no longer."""
        for pair, relay in self._relays.items():
            if name in pair:
                relay.cut(is_cut=is_cut)

    def part(self, pair: tuple[str, str], *, is_cut: bool, is_told: bool = False) -> None:
        """Cut two nodes off from each other, or no longer; `is_told`: connections end at once."""
        for way in (pair, pair[::-1]):
            self._relays[way].cut(is_cut=is_cut)
            if is_cut and is_told:
                self._relays[way].reset()

    async def trouble(
        self, names: Iterable[str], every_s: float, cut_s: float, is_done: asyncio.Event
    ) -> int:
        """Cut one node after another off for a while; return how often."""
        cuts, order = 0, list(names)
        while not is_done.is_set():
            name = order[cuts % len(order)]
            self.cut(name, is_cut=True)
            cuts += 1
            await asyncio.sleep(cut_s)
            self.cut(name, is_cut=False)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_done.wait(), every_s - cut_s)
        return cuts
