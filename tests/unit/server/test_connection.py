import asyncio
import contextlib
import socket

import pytest
from aiohttp import web

from sllm_node.server.connection import Connection, Hold, Watch


class FakeTransport(asyncio.Transport):
    """Has as many bytes waiting as it is told."""

    def __init__(self):
        super().__init__()
        self.waiting = 0
        self.is_read = True
        self.socket = None
        self.is_gone = False
        self.is_aborted = False
        self.aborted = asyncio.Event()
        self.closed = asyncio.Event()

    def write(self, data):
        self.waiting += len(data)

    def writelines(self, list_of_data):
        self.waiting += sum(map(len, list_of_data))

    def is_closing(self):
        return self.is_gone

    def is_reading(self):
        return self.is_read

    def pause_reading(self):
        self.is_read = False

    def resume_reading(self):
        self.is_read = True

    def close(self):
        self.closed.set()

    def get_write_buffer_size(self):
        return self.waiting

    def get_extra_info(self, name, default=None):
        return self.socket if name == "socket" else default

    def abort(self):
        self.is_aborted = True
        self.aborted.set()


class Timers:
    """Runs what is due when the test says so."""

    def __init__(self):
        self.set = []

    def call_later(self, delay_s, callback, *arguments):
        self.set.append((delay_s, callback, arguments))
        return asyncio.TimerHandle(delay_s, callback, arguments, asyncio.get_running_loop())

    def fire(self):
        """Run the only timer."""
        ((_, callback, arguments),) = self.set
        self.set = []
        callback(*arguments)


@pytest.fixture
async def watched():
    transport, timers = FakeTransport(), Timers()
    return transport, timers, Watch(transport, 60.0, timers.call_later)


async def test_a_client_that_takes_no_bytes_for_so_long_is_dropped(watched):
    transport, timers, watch = watched
    transport.waiting = 10
    watch.begin()
    assert [delay_s for delay_s, _, _ in timers.set] == [60.0]
    timers.fire()
    assert transport.is_aborted
    assert timers.set == []


async def test_a_client_that_takes_some_bytes_is_waited_for(watched):
    transport, timers, watch = watched
    transport.waiting = 10
    watch.begin()
    for transport.waiting in (9, 20, 3):
        timers.fire()
        assert not transport.is_aborted
    timers.fire()
    assert transport.is_aborted


async def test_a_client_that_has_taken_all_is_not_watched_until_bytes_wait_again(watched):
    transport, timers, watch = watched
    watch.begin()
    assert timers.set == []
    transport.waiting = 10
    watch.begin()
    watch.begin()
    transport.waiting = 0
    timers.fire()
    assert (timers.set, transport.is_aborted) == ([], False)
    transport.waiting = 10
    watch.begin()
    timers.fire()
    assert transport.is_aborted


async def test_a_client_that_takes_bytes_of_a_full_kernel_is_waited_for(watched):
    transport, timers, watch = watched
    transport.waiting = 10
    transport.socket, client = socket.socketpair()
    transport.socket.setblocking(False)
    with transport.socket, client:
        with contextlib.suppress(BlockingIOError):
            while True:
                transport.socket.send(bytes(1 << 16))
        watch.begin()
        client.recv(1 << 20)
        timers.fire()
        assert not transport.is_aborted
        timers.fire()
        assert transport.is_aborted


async def test_an_answer_that_nobody_takes_is_not_kept_however_small_it_is():
    async def answer(_):
        return web.Response(text="x")

    transport, loop = FakeTransport(), asyncio.get_running_loop()
    connection = Connection(web.Server(answer), loop=loop, write_timeout_s=0.001)
    connection.connection_made(transport)
    connection.data_received(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await transport.aborted.wait()
    connection.connection_lost(None)


@pytest.mark.parametrize("is_gone", [True, False])
async def test_only_a_client_that_left_makes_a_broken_answer_no_mistake_of_ours(caplog, is_gone):
    async def answer(request):
        response = web.StreamResponse()
        await response.prepare(request)
        transport.is_gone = is_gone
        await response.write(b"x")
        raise ConnectionResetError("something else broke")

    transport, loop = FakeTransport(), asyncio.get_running_loop()
    connection = Connection(web.Server(answer), loop=loop, write_timeout_s=60.0)
    connection.connection_made(transport)
    connection.data_received(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await transport.closed.wait()
    connection.connection_lost(None)
    assert ("request failed" in caplog.messages) is not is_gone


class Held:
    """A client that is not read from."""

    def __init__(self):
        self.transport, self.timers = FakeTransport(), Timers()
        self.transport.is_read = False
        self.running = None
        self.hold = Hold(self.transport, 1.0, lambda: self.running, self.timers.call_later)


@pytest.fixture
async def held():
    return Held()


async def test_a_client_that_is_not_read_from_while_one_request_runs_is_dropped(held):
    held.running = "a"
    held.hold.begin()
    held.hold.begin()
    held.timers.fire()
    assert held.transport.is_aborted
    assert held.timers.set == []


async def test_a_client_whose_requests_end_is_not_dropped_for_sending_many(held):
    held.hold.begin()
    for held.running in (None, "a", "b", None, None):
        held.timers.fire()
    assert not held.transport.is_aborted
    held.running, held.transport.is_read = "c", True
    held.timers.fire()
    assert (held.timers.set, held.transport.is_aborted) == ([], False)


async def test_a_client_that_is_read_from_is_not_looked_at(held):
    held.transport.is_read = True
    held.hold.begin()
    assert held.timers.set == []


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
PART = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000000\r\n\r\n" + bytes(3_999_999)


@pytest.mark.parametrize("behind", [GET * 32, GET * 100, PART])
@pytest.mark.parametrize("at_once", [True, False])
async def test_who_sends_more_than_is_read_behind_a_running_request_is_dropped(behind, at_once):
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def answer(_):
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    transport, loop = FakeTransport(), asyncio.get_running_loop()
    server = web.Server(answer, handler_cancellation=True)
    connection = Connection(server, loop=loop, write_timeout_s=60.0, hold_s=0.001)
    connection.connection_made(transport)
    connection.data_received(GET + behind if at_once else GET)
    await began.wait()
    if not at_once:
        connection.data_received(behind)
    if not transport.is_reading():  # an older aiohttp has no limit of requests
        await transport.aborted.wait()
    connection.connection_lost(None)
    await cancelled.wait()
    assert transport.is_aborted is not transport.is_reading()


async def test_a_body_that_is_read_slowly_is_waited_for():
    read = asyncio.Event()

    async def answer(request):
        await read.wait()
        await request.read()
        return web.Response(text="x")

    transport, loop = FakeTransport(), asyncio.get_running_loop()
    connection = Connection(web.Server(answer), loop=loop, write_timeout_s=60.0)
    connection.connection_made(transport)
    connection.data_received(PART)
    while (request := connection._current_request) is None:
        await asyncio.sleep(0)
    assert not transport.is_reading()
    assert connection._running() is None
    read.set()
    while not transport.is_reading():
        await asyncio.sleep(0)
    connection.data_received(b"x")
    assert connection._running() in (request, None)
    connection.connection_lost(None)
