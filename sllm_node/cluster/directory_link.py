"""Keeps a node and its directory together: what `cluster/directory.py` asks for, done with etcd.

Two tasks. One reads all and follows the changes; the other keeps this node's key under a lease. Both
try for ever, ever more slowly up to a limit, with jitter so that nodes do not come back all at once.
Whatever etcd does, the directory answers from memory: no caller of it waits for the network.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from sllm_node.cluster.directory import Directory, News, ReadAll, Watch
from sllm_node.cluster.directory_keys import (
    Head,
    NodeRecord,
    SharedRecord,
    decode,
    encode,
    key_of,
)
from sllm_node.cluster.etcd import EtcdClient
from sllm_node.cluster.records import check
from sllm_node.core.alarm import Alarm
from sllm_node.core.clock import Clock
from sllm_node.core.errors import (
    EtcdCompactedError,
    EtcdError,
    EtcdLeaseError,
    EtcdUnreachableError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How long a silent node stays listed, and how patient a node is with its directory."""

    lease_s: int = 15
    renewals: int = 3
    """In the time of a lease."""
    first_wait_s: float = 0.1
    most_wait_s: float = 10.0

    def __post_init__(self) -> None:
        assert self.lease_s >= 1
        assert self.renewals >= 2
        assert 0 < self.first_wait_s <= self.most_wait_s


class Backoff:
    """Waits between attempts: each about twice the one before, up to a limit, less up to a half."""

    def __init__(self, first_s: float, most_s: float, draw: Callable[[], float]) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._draw = draw
        """Numbers from 0 to 1, another on each node."""
        self._next_s = first_s

    def next(self) -> float:
        """Return the seconds to wait before the next attempt."""
        wait_s = self._next_s
        self._next_s = min(self._most_s, 2 * wait_s)
        return wait_s * (1.0 - self._draw() / 2)

    def reset(self) -> None:
        """An attempt was in order."""
        self._next_s = self._first_s


class DirectoryLink:
    """One node's link. `run` until cancelled, then `leave`."""

    def __init__(
        self,
        client: EtcdClient,
        directory: Directory,
        options: LinkOptions,
        clock: Clock,
        draw: Callable[[], float],
        on_news: Callable[[News], None],
    ) -> None:
        self._client = client
        self._directory = directory
        self._options = options
        self._clock = clock
        self._on_news = on_news
        self._follow_backoff = Backoff(options.first_wait_s, options.most_wait_s, draw)
        self._lease_backoff = Backoff(options.first_wait_s, options.most_wait_s, draw)
        self._lease: int | None = None
        self._has_problem = False
        self._alarm = Alarm(clock, self._on_alarm)
        self._registration_lost = asyncio.Event()

    async def run(self) -> None:
        """Follow the directory and stay registered, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(), name="directory changes")
                group.create_task(self._stay_registered(), name="directory lease")
        finally:
            self._alarm.set(None)

    async def leave(self) -> bool:
        """Tell that this node leaves, after `run`; False: its lease has to end for that."""
        me = replace(self._directory.me, is_leaving=True)
        lease, self._lease = self._lease, None
        if lease is None:
            return False
        try:
            await self._client.put(key_of(me), encode(me), lease)
            await self._client.revoke(lease)
        except EtcdError:
            return False
        return True

    async def put(self, record: SharedRecord) -> None:
        """Register a model or desire replicas, for all nodes.

        Raises:
            InvalidRequestError: no operator can have meant that.
            EtcdError: it is not done.
        """
        check(record)
        await self._client.put(key_of(record), encode(record))

    async def drop(self, record: SharedRecord) -> None:
        """Take a record away, for all nodes.

        Raises:
            EtcdError: it is not done.
        """
        await self._client.delete(key_of(record))
        self._directory.on_dropped(record)
        self._tell()

    # --- following --------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            try:
                await self._take_step()
            except EtcdError as error:
                self._directory.on_unreachable(str(error))
                self._tell()
                await asyncio.sleep(self._follow_backoff.next())

    async def _take_step(self) -> None:
        match self._directory.step():
            case ReadAll():
                head, entries = await self._client.read()
                self._directory.on_read(head, entries, self._clock.now())
                self._tell()
                await self._restore()
                self._follow_backoff.reset()
            case Watch(revision):
                await self._watch(revision)

    async def _watch(self, revision: int) -> None:
        try:
            async with aclosing(self._client.watch(revision)) as changes:
                async for change in changes:
                    if isinstance(change, Head):
                        self._directory.on_watching(change)
                    else:
                        self._directory.on_changes(change)
                        self._follow_backoff.reset()
                    self._tell()
                    if isinstance(self._directory.step(), ReadAll):
                        return
        except EtcdCompactedError:
            self._directory.on_compacted()
            self._tell()
            return
        self._directory.on_ended()
        await asyncio.sleep(self._follow_backoff.next())

    async def _restore(self) -> None:
        """Put back what the directory has lost; another node may have done it.

        What can't be put now is tried again with the next renewal, or when all is read again.
        """
        for key, value in sorted(self._directory.restores().items()):
            try:
                await self._client.put_if(key, value, 0)
            except EtcdUnreachableError:
                raise
            except EtcdError as error:
                log.warning("record not put back", extra={"key": key, "problem": str(error)})
            else:
                self._directory.on_restored(key)

    # --- registered -------------------------------------------------------------------------------

    async def _stay_registered(self) -> None:
        while True:
            self._registration_lost.clear()
            try:
                wait_s = await self._renew()
                await self._restore()
                self._lease_backoff.reset()
                self._note(None)
            except EtcdLeaseError:
                self._lease = None
                self._directory.on_lease_lost()
                wait_s = self._lease_backoff.next()
            except EtcdError as error:
                self._note(error)
                wait_s = self._lease_backoff.next()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._registration_lost.wait()

    def _note(self, problem: EtcdError | None) -> None:
        """Log when this node can't stay registered any more, and when it can again."""
        if problem is not None and not self._has_problem:
            log.warning("directory lease not renewed", extra={"problem": str(problem)})
        elif problem is None and self._has_problem:
            log.info("directory lease renewed")
        self._has_problem = problem is not None

    async def _renew(self) -> float:
        """Keep the lease alive and the key under it; return when to do so again."""
        if self._lease is None:
            self._lease = await self._client.grant(self._options.lease_s)
        elif not await self._client.keep_alive(self._lease):
            raise EtcdLeaseError(self._client.endpoint, "the lease ended")
        if self._directory.needs_registration and not await self._claim(self._lease):
            return self._lease_backoff.next()
        return self._options.lease_s / self._options.renewals

    async def _claim(self, lease: int) -> bool:
        """Put this node's key in the place of an earlier life's; False: somebody put it meanwhile."""
        me = self._directory.me
        old = await self._client.get(key_of(me))
        is_later = old is not None and old.value is not None and _boot(old.value, me) > me.boot
        revision = 0 if old is None else old.revision
        if not is_later and not await self._client.put_if(key_of(me), encode(me), revision, lease):
            return False
        self._directory.on_registered()  # a later boot's key is told by whoever follows
        return True

    # --- telling ----------------------------------------------------------------------------------

    def _tell(self) -> None:
        for news in self._directory.news():
            self._on_news(news)
        if self._directory.needs_registration:
            self._registration_lost.set()
        self._alarm.set(self._directory.next_timer())

    def _on_alarm(self) -> None:
        self._directory.on_timer(self._clock.now())
        self._tell()


def _boot(value: bytes, me: NodeRecord) -> int:
    """Return the boot that a key tells; 0: it can't be read, and may be replaced."""
    try:
        record = decode(key_of(me), value)
    except ValueError:
        return 0
    return record.boot if isinstance(record, NodeRecord) else 0
