"""A routed session against nodes that are scripts: lists of records, errors, and gates."""

import asyncio
import contextlib
from dataclasses import replace
from typing import cast

import pytest
from msgspec.structs import replace as replace_struct

from sllm_node.checkpoint.cards import PEERS
from sllm_node.cluster.candidate import Candidate, Kind
from sllm_node.cluster.choice import Choice
from sllm_node.cluster.document import encode_state
from sllm_node.cluster.forward import RoutedStream
from sllm_node.cluster.home import HomeStream, onward
from sllm_node.cluster.packing import pack
from sllm_node.cluster.reservations import Ask, ReservationId
from sllm_node.cluster.retries import BROKEN_MAX, LOOK_S, REFUSALS_MAX
from sllm_node.cluster.serving import EXTEND
from sllm_node.cluster.state import BootId
from sllm_node.cluster.ways import Limits, Tools
from sllm_node.cluster.wire import (
    Granted,
    Leave,
    Refusal,
    Standing,
    Tokens,
    Waiting,
    failed,
    unpack_extend,
    unpack_forward,
)
from sllm_node.core.clock import ManualClock
from sllm_node.core.errors import (
    CancelledByOperatorError,
    ChecksumError,
    DrainingError,
    EngineError,
    GivenBackError,
    InvalidRequestError,
    ModelNotFoundError,
    MoveRefusedError,
    NoPlaceError,
    OtherWeightsError,
    PeerUnreachableError,
    PromptTooLongError,
    QueueTimeoutError,
    RemoteUnreachableError,
    SessionLostError,
)
from sllm_node.core.types import (
    GenerationChunk,
    GenerationRequest,
    LoadProgress,
    ModelId,
    NodeId,
    SamplingParameters,
    SessionId,
    Startup,
    Tier,
    Weights,
)
from sllm_node.schedule.stream import Stream
from tests.unit.cluster.test_choice import node as state_of
from tests.unit.server.fake_service import FakeStream, status_of

PATIENCE_S = 10.0
REQUEST = GenerationRequest(SessionId("r-0"), ModelId("m"), (1, 2), SamplingParameters(), 10)


def tokens(*numbers, finish=None, cached=0):
    text = "".join(chr(96 + number) for number in numbers)
    return Tokens(GenerationChunk(text, numbers, (), finish, cached_tokens=cached), -1)


REFUSED = Refusal("no room", encode_state(state_of("a"), 1 << 16))


LET_GO = object()
"""In a script: waits until the session is handed over."""


class LocalStream(FakeStream):
    """A session that this node serves itself."""

    is_granted = True
    waited = weights = None

    def __init__(self, chunks, position=0):
        super().__init__(chunks)
        self.position = position
        self.started = asyncio.Event()
        self.started.set()

    def __aiter__(self):
        return self

    async def __anext__(self):
        chunk = await super().__anext__()
        self.position += len(chunk.tokens)
        return chunk

    async def standing(self, told):
        return None


class World:
    """Nodes by name, each with what it answers to one session after another."""

    def __init__(self, **scripts):
        self.scripts = {NodeId(name): list(script) for name, script in scripts.items()}
        self.asked = []
        """Node and forward of each session asked for."""
        self.closed = []
        self.learned, self.lost_nodes, self.outcomes, self.starts = [], [], [], []
        self.news = asyncio.Event()
        self.is_heard = True
        self.ended_streams = []
        self.clock = ManualClock()
        self.here, self.local = [], []
        self.known = []
        self.passes = []
        self.here_each = []
        """What each session here gives, before all others give `here`."""
        self.moves, self.leaves = [], []
        self.extends, self.extend_script = [], []
        self.let_go = asyncio.Event()
        self.ways = {}
        """Of nodes of which it is known how soon a session starts there."""

    # --- the client

    @contextlib.asynccontextmanager
    async def stream(self, peer, what, payload, silence_s):
        if what == EXTEND:
            self.extends.append((peer, unpack_extend(payload)))
            if self.extends[-1][1].lets_go:
                self.let_go.set()
            yield self._play(self.extend_script.pop(0) if self.extend_script else [Granted()], 0)
            return
        self.asked.append((peer, unpack_forward(payload)))
        script = (
            self.scripts[peer].pop(0) if self.scripts[peer] else [PeerUnreachableError(peer, "-")]
        )
        try:
            yield self._play(script, len(self.asked[-1][1].request.resumed))
        finally:
            self.closed.append(peer)

    async def _play(self, script, position):
        for item in script:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, asyncio.Event):
                await item.wait()
            elif item is LET_GO:
                await self.let_go.wait()
            elif isinstance(item, Tokens):
                yield pack(replace_struct(item, position=max(position, item.position)))
                position += len(item.chunk.tokens)
            else:
                yield pack(item)

    # --- the ways

    def choose(self, request, excluded):
        left = [name for name in self.scripts if name not in excluded]
        if not left:
            return None
        return replace(
            Choice(left[0], "load", f"{left[0]} is next"), candidate=self.ways.get(left[0])
        )

    def ask(self, choice, request):
        return Ask(ReservationId("r"), BootId("" if choice.node == "here" else "1"), 1)

    def standing(self, model):
        return None

    def learn(self, state):
        self.learned.append(state.node)

    def lost(self, node, error):
        self.lost_nodes.append(node)

    def started(self, choice, model, seconds, waited):
        self.starts.append(choice.node)

    def passed_on(self, node, seconds):
        self.passes.append((node, seconds))

    def left(self, choice, model, outcome):
        self.outcomes.append((choice.node, outcome))

    def ended(self, stream):
        self.ended_streams.append(stream)

    def moved(self, report):
        self.moves.append(report)

    async def changed(self, timeout_s):
        if self.is_heard:
            await self.news.wait()
            self.news.clear()
        else:
            self.clock.advance(timeout_s)
            await asyncio.sleep(0)
        return self.is_heard

    async def ensure(self, model):
        self.known.append(model)

    def leave(self, session, node, wish):
        self.leaves.append((session, node, wish))

    def open_local(self, request, keep_alive_s, choice):
        here = self.here_each.pop(0) if self.here_each else self.here
        stream = LocalStream(here, len(request.resumed))
        self.local.append((request, stream))
        return stream

    def open(self, request=REQUEST):
        first = self.choose(request, frozenset())
        limits = Limits(1.0, PATIENCE_S)
        return RoutedStream(request, 5.0, first, self, Tools(self, self.clock, limits))


async def read(stream):
    chunks = [chunk async for chunk in stream]
    await stream._task
    numbers = tuple(token for chunk in chunks for token in chunk.tokens)
    return numbers, "".join(chunk.text for chunk in chunks), chunks


async def test_it_is_known_how_it_came_to_run_and_how_long_its_tokens_were_held():
    gate = asyncio.Event()
    world = World(a=[[Waiting(), gate, Granted(), tokens(1), tokens(2, finish="length")]])
    stream = world.open()
    assert (stream.startup().node, stream.startup().startup_s) == ("a", None)
    world.clock.advance(0.5)
    gate.set()
    await anext(stream)
    assert stream.startup() == Startup("a", "load", "a is next", None, 0.5)
    world.clock.advance(0.25)
    stream.passed_on()
    stream.passed_on()
    assert world.passes == [("a", 0.25)]
    await stream._task


async def test_tokens_come_through_with_their_end():
    world = World(a=[[Waiting(), Granted(), tokens(1), tokens(2, 3, finish="length")]])
    stream = world.open()
    numbers, text, chunks = await read(stream)
    assert (numbers, text, chunks[-1].finish) == ((1, 2, 3), "abc", "length")
    assert (world.outcomes, world.starts, world.closed) == ([("a", "ok")], ["a"], ["a"])
    assert world.ended_streams == [stream]
    ((_, forward),) = world.asked
    assert (forward.request, forward.keep_alive_s, forward.hops) == (REQUEST, 5.0, 1)


@pytest.mark.parametrize(
    "end",
    [PeerUnreachableError("a", "gone"), None, DrainingError(1.0, was_running=True), EngineError("m", "x")],
    ids=["lost", "cut", "draining", "failed"],
)  # fmt: skip
async def test_a_session_goes_on_behind_its_tokens_when_its_node_fails(end):
    ends = [] if end is None else [end if isinstance(end, PeerUnreachableError) else failed(end)]
    world = World(
        a=[[Granted(), tokens(1, 2, cached=5), *ends]],
        b=[[Granted(), tokens(3, cached=7), tokens(4, finish="stop", cached=7)]],
    )
    numbers, text, chunks = await read(world.open(replace(REQUEST, resumed=(9,))))
    assert (numbers, text) == ((1, 2, 3, 4), "abcd")
    assert {chunk.cached_tokens for chunk in chunks} == {5}
    assert [(peer, forward.request.resumed) for peer, forward in world.asked] == [
        ("a", (9,)), ("b", (9, 1, 2)),
    ]  # fmt: skip
    assert world.lost_nodes == (
        ["a"] if end is None or isinstance(end, PeerUnreachableError) else []
    )


async def test_a_refusal_is_learned_from_and_the_next_placement_follows():
    world = World(a=[[REFUSED], [Granted(), tokens(1, finish="stop")]])
    assert (await read(world.open()))[0] == (1,)
    assert (world.learned, world.lost_nodes) == (["a"], [])
    assert world.outcomes == [("a", "refused"), ("a", "ok")]


async def test_a_node_that_refuses_again_and_again_is_left_alone():
    world = World(a=[[REFUSED]] * 10, b=[[tokens(1, finish="stop")]])
    assert (await read(world.open()))[0] == (1,)
    assert [peer for peer, _ in world.asked] == ["a"] * REFUSALS_MAX + ["b"]


@pytest.mark.parametrize(
    "error", [InvalidRequestError("wrong"), CancelledByOperatorError("an operator")]
)
async def test_what_no_node_can_better_is_told_at_once(error):
    world = World(a=[[failed(error)]], b=[[tokens(1, finish="stop")]])
    with pytest.raises(type(error)):
        await read(world.open())
    assert len(world.asked) == 1


TOO_LONG = failed(PromptTooLongError(309, 128, "KV memory"))


async def test_a_session_that_does_not_fit_at_one_node_is_taken_to_a_larger_one():
    world = World(a=[[TOO_LONG]], b=[[TOO_LONG]], c=[[tokens(1, finish="stop")]])
    assert (await read(world.open()))[0] == (1,)
    assert [peer for peer, _ in world.asked] == ["a", "b", "c"]
    assert world.lost_nodes == []


async def test_a_session_that_fits_nowhere_is_told_so_at_once():
    world = World(a=[[TOO_LONG]], b=[[TOO_LONG]])
    with pytest.raises(PromptTooLongError, match="KV memory"):
        await read(world.open())
    assert [peer for peer, _ in world.asked] == ["a", "b"]


async def test_a_session_waits_for_a_full_node_where_it_fits_and_asks_no_more_where_it_does_not():
    full = [[REFUSED]] * (REFUSALS_MAX + 1)
    world = World(a=[*full, [tokens(1, finish="stop")]], b=[[TOO_LONG]] * 5)
    world.is_heard = False
    assert (await read(world.open()))[0] == (1,)
    assert [peer for peer, _ in world.asked].count("b") == 1


async def test_a_session_of_this_node_that_does_not_fit_here_is_placed_elsewhere():
    world = World(here=[], b=[[tokens(1, finish="stop")]])
    home, _ = at_home(world, [PromptTooLongError(309, 128, "KV memory")], is_granted=False)
    assert (await anext(home)).tokens == (1,)
    assert [peer for peer, _ in world.asked] == ["b"]


def at_home(world, script, *, is_granted=True):
    """Return a session of this node that is placed elsewhere if that is worth a try, and who has ended."""
    stream, gone = Served(script), []
    stream.is_granted = is_granted

    def route(home, before):
        tools = Tools(world, world.clock, Limits(1.0, PATIENCE_S))
        request, choice, how = onward(
            home, before, NodeId("here"), world.choose, 0.0, is_draining=False
        )
        return RoutedStream(request, 5.0, choice, world, tools, how)

    return HomeStream(cast("Stream", stream), 5.0, route, gone.append), gone


async def test_a_session_whose_step_fails_here_goes_on_elsewhere_with_the_weights_that_it_began_with():
    world = World(here=[], b=[[Granted(), tokens(3, finish="stop")]])
    home, _ = at_home(world, [tokens(1, 2, cached=5).chunk, EngineError("m", "broke")])
    home._stream.weights = Weights(7, 5, "x")
    chunks = [chunk async for chunk in home]
    assert [token for chunk in chunks for token in chunk.tokens] == [1, 2, 3]
    assert {chunk.cached_tokens for chunk in chunks} == {5}
    ((peer, forward),) = world.asked
    assert (peer, forward.request.resumed, forward.request.weights) == (
        "b", (1, 2), Weights(7, 5, "x"),
    )  # fmt: skip
    assert [(stay.node, stay.tokens) for stay in home.startup().earlier] == [("here", 2)]
    assert world.outcomes[0] == ("here", "failed")


@pytest.mark.parametrize(
    ("error", "is_granted"),
    [
        (InvalidRequestError("wrong"), False), (CancelledByOperatorError("an operator"), True),
        (QueueTimeoutError("m", 60.0, 60.0), False), (DrainingError(1.0, was_running=True), True),
        (PromptTooLongError(309, 128, "KV memory"), True),
    ],
    ids=lambda value: getattr(value, "code", ""),
)  # fmt: skip
async def test_what_is_wrong_anywhere_or_was_meant_is_told_as_it_is(error, is_granted):
    world = World(here=[], b=[[tokens(1, finish="stop")]])
    home, gone = at_home(world, [error], is_granted=is_granted)
    with pytest.raises(type(error)) as caught:
        await anext(home)
    assert caught.value is error
    assert (world.asked, gone) == ([], [home])


@pytest.mark.parametrize("known", [(), (1,)], ids=["no token", "a token"])
async def test_what_fails_here_is_told_as_it_is_if_no_other_node_can_have_it(known):
    error, world = EngineError("m", "broke"), World(here=[])
    home, gone = at_home(world, [*(tokens(n).chunk for n in known), error])
    with pytest.raises(EngineError) as caught:
        [_ async for _ in home]
    assert (caught.value is error, gone, world.clock.now()) == (True, [home], 0.0)


async def test_a_session_that_breaks_one_node_after_another_is_given_up_before_it_breaks_all():
    broken = failed(EngineError("m", "broke"))
    names = "abcde"
    world = World(**{name: [[Granted(), broken]] for name in names})
    with pytest.raises(EngineError):
        await read(world.open())
    assert len(world.asked) == BROKEN_MAX
    more = [[Granted(), tokens(1), tokens(2), broken]]
    world = World(**{name: [[Granted(), broken]] for name in names} | {"a": more})
    with pytest.raises(SessionLostError, match=r"3 nodes failed in a row.* broke"):
        await read(world.open())
    assert len(world.asked) == BROKEN_MAX


async def test_nodes_that_fail_with_tokens_between_do_not_count_together():
    def breaks(*numbers):
        return [[Granted(), *map(tokens, numbers), failed(EngineError("m", "broke"))]]

    world = World(a=breaks(1), b=breaks(2), c=breaks(3), d=[[tokens(4, finish="stop")]])
    assert (await read(world.open()))[0] == (1, 2, 3, 4)


async def test_a_node_whose_checkpoint_is_damaged_is_not_asked_again():
    full = [[REFUSED]] * (REFUSALS_MAX + 2)
    world = World(here=[], b=[*full, [Granted(), tokens(1, finish="stop")]])
    world.is_heard = False
    home, _ = at_home(world, [ChecksumError("m", "s", 0, 1)], is_granted=False)
    assert (await anext(home)).tokens == (1,)
    assert world.local == []


async def test_a_session_is_asked_for_with_the_weights_that_it_began_with_and_not_where_there_are_others():
    weights = Weights(7, 5, "x")
    other = failed(OtherWeightsError("r-0", "m"))
    world = World(
        a=[[Granted(None, weights), tokens(1), PeerUnreachableError("a", "killed")]],
        b=[[other]] * 2,
        c=[[Granted(), tokens(2, finish="stop")]],  # an older release tells none
    )
    assert (await read(world.open()))[0] == (1, 2)
    assert [forward.request.weights for _, forward in world.asked] == [None, weights, weights]
    assert world.lost_nodes == ["a"]


async def test_a_session_without_a_token_takes_any_weights():
    world = World(
        a=[[Granted(None, Weights(7, 5, "x")), PeerUnreachableError("a", "killed")]],
        b=[[tokens(1, finish="stop")]],
    )
    assert (await read(world.open()))[0] == (1,)
    assert world.asked[1][1].request.weights is None


async def test_a_model_that_left_its_node_is_looked_for_elsewhere():
    world = World(a=[[failed(ModelNotFoundError("m"))]], b=[[tokens(1, finish="stop")]])
    assert (await read(world.open()))[0] == (1,)


async def test_a_session_waits_for_a_node_that_comes_back():
    world = World(a=[[tokens(1), PeerUnreachableError("a", "killed")], [tokens(2, finish="stop")]])
    stream = world.open()
    assert (await anext(stream)).tokens == (1,)
    world.news.set()
    assert (await read(stream))[0] == (2,)
    assert world.asked[1][1].request.resumed == (1,)


async def test_a_session_that_nobody_takes_any_more_ends_with_an_error_that_says_for_how_long_it_waited():
    world = World(a=[[tokens(1), failed(EngineError("m", "broke"))]])
    world.is_heard = False
    stream = world.open()
    with pytest.raises(
        SessionLostError, match=r"within 10 s \(timing.patience_s\).* 'a' can't be"
    ) as caught:
        await read(stream)
    assert (caught.value.code, world.clock.now()) == ("session_lost", PATIENCE_S)
    assert world.ended_streams == [stream]


async def test_a_node_that_is_too_small_for_a_session_that_runs_is_passed_over():
    world = World(
        a=[[tokens(1), PeerUnreachableError("a", "killed")]],
        b=[[failed(InvalidRequestError("too long"))]],
        c=[[tokens(2, finish="stop")]],
    )
    assert (await read(world.open()))[0] == (1, 2)


async def test_a_session_looks_again_although_nothing_is_heard():
    world = World(a=[[tokens(1), failed(EngineError("m", "broke"))], [tokens(2, finish="stop")]])
    world.is_heard = False
    assert (await read(world.open()))[0] == (1, 2)


async def test_patience_ends_although_nodes_come_and_go():
    world = World(a=[])
    world.clock.advance(1.0)
    stream = world.open()
    for _ in range(5):
        world.clock.advance(3.0)
        world.news.set()
        for _ in range(10):
            await asyncio.sleep(0)
    with pytest.raises(PeerUnreachableError):  # it has no token: nothing was lost
        await read(stream)


async def test_before_the_first_token_a_busy_node_is_told_if_there_is_no_other():
    world = World(a=[[failed(DrainingError(1.0))]])
    with pytest.raises(DrainingError):
        await read(world.open())


async def test_a_session_waits_for_the_peers_that_send_its_model_and_not_for_another_remote():
    gone = failed(RemoteUnreachableError(PEERS, "m", "all senders are gone"))
    world = World(a=[[gone], [tokens(1, finish="stop")]])
    world.is_heard = False
    assert (await read(world.open()))[0] == (1,)
    down = failed(RemoteUnreachableError("mirror", "m", "is down"))
    world = World(a=[[down], [tokens(1, finish="stop")]])
    with pytest.raises(RemoteUnreachableError, match="mirror"):
        await read(world.open())
    assert len(world.asked) == 1


async def test_cancel_closes_the_connection_and_ends_the_stream():
    world = World(a=[[tokens(1), asyncio.Event()]])
    stream = world.open()
    await anext(stream)
    stream.cancel()
    stream.cancel()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    while not (world.closed and world.outcomes):
        await asyncio.sleep(0)
    assert (world.outcomes, world.ended_streams) == ([("a", "cancelled")], [stream])


async def test_an_operator_ends_a_session_with_an_error_for_its_reader():
    world = World(a=[[asyncio.Event()]])
    stream = world.open()
    stream.stop(CancelledByOperatorError("an operator ended it"))
    with pytest.raises(CancelledByOperatorError):
        await anext(stream)


async def test_the_status_of_the_load_is_passed_on_until_the_session_runs():
    granted = asyncio.Event()
    world = World(a=[[Waiting(status_of()), granted, Granted(), tokens(1, finish="stop")]])
    stream = world.open()
    while stream.status() is None:
        await asyncio.sleep(0)
    assert stream.status() == status_of()
    assert stream.session_status().state == "waiting"
    granted.set()
    assert (await anext(stream)).tokens == (1,)
    assert stream.status() is None


async def test_a_reader_that_lags_gets_joined_chunks():
    done = asyncio.Event()
    world = World(a=[[tokens(1), tokens(2), done, tokens(3, finish="stop")]])
    stream = world.open()
    while len(stream.tokens_from(0)) < 2:
        await asyncio.sleep(0)
    chunk = await anext(stream)
    assert (chunk.tokens, chunk.text, chunk.finish) == ((1, 2), "ab", None)
    done.set()
    assert (await read(stream))[0] == (3,)


async def test_a_session_that_lost_its_node_can_go_on_here():
    world = World(a=[[Granted(), tokens(1)]], here=[])
    world.here = [tokens(2).chunk, tokens(3, finish="length").chunk]
    assert (await read(world.open()))[0] == (1, 2, 3)
    ((request, _),) = world.local
    assert request.resumed == (1,)
    assert world.outcomes == [("a", "failed"), ("here", "ok")]


# --- moves --------------------------------------------------------------------------------------


def to(node):
    return Choice(NodeId(node), "serve", "a test")


async def until(holds):
    while not holds():
        await asyncio.sleep(0)


async def test_a_session_is_handed_over_behind_the_tokens_that_came_meanwhile():
    go, there, never = asyncio.Event(), asyncio.Event(), asyncio.Event()
    more = replace_struct(tokens(4, finish="length"), position=3)
    world = World(
        a=[[Granted(), tokens(1, 2), go, tokens(3), never, tokens(9, finish="stop")]],
        b=[[Granted(), there, Standing(2), LET_GO, more]],
    )
    stream = world.open()
    await until(lambda: stream.position == 2)
    report = stream.move(to("b"), "operator")
    with pytest.raises(MoveRefusedError, match="moving already"):
        stream.move(to("c"), "operator")
    assert stream.session_status().migration == report.id == "r-0.2"
    go.set()
    await until(lambda: stream.position == 3)
    there.set()
    assert (await read(stream))[:2] == ((1, 2, 3, 4), "abcd")
    ((_, first), (_, held)) = world.asked
    assert (first.epoch, first.request.held) == (1, False)
    assert (held.epoch, held.request.held, held.request.resumed) == (2, True, (1, 2))
    extends = [(e.position, e.tokens, e.lets_go, e.epoch) for _, e in world.extends]
    assert extends[-1][2:] == (True, 2)
    assert [token for _, sent, *_ in extends for token in sent] == [3]
    assert (report.outcome, report.tokens, report.gap_s) == ("moved", 3, 0.0)
    assert world.moves == [report]
    assert world.outcomes == [("a", "moved"), ("b", "ok")]
    assert set(world.closed) == {"a", "b"}


async def test_tokens_that_come_between_the_asking_and_the_first_turn_of_a_move_are_not_taken_for_sent():
    go = asyncio.Event()
    more = replace_struct(tokens(3, finish="stop"), position=2)
    world = World(
        a=[[Granted(), tokens(1), go, tokens(2), asyncio.Event()]],
        b=[[Granted(), Standing(1), LET_GO, more]],
    )
    stream = world.open()
    await until(lambda: stream.position == 1)
    go.set()
    stream.move(to("b"), "operator")
    assert (await read(stream))[0] == (1, 2, 3)
    assert world.asked[1][1].request.resumed == (1,)


@pytest.mark.parametrize(
    "end",
    [
        (PeerUnreachableError("b", "gone"),), (REFUSED,), (failed(DrainingError(1.0)),),
        (Standing(1), PeerUnreachableError("b", "gone")),
    ],
)  # fmt: skip
async def test_a_destination_that_fails_before_the_handover_changes_nothing(end):
    go = asyncio.Event()
    world = World(a=[[Granted(), tokens(1), go, tokens(2, finish="stop")]], b=[[Granted(), *end]])
    stream = world.open()
    await until(lambda: stream.position == 1)
    report = stream.move(to("b"), "operator")
    await until(lambda: world.moves)
    assert (report.outcome, stream.node, stream.can_move) == ("failed", "a", True)
    go.set()
    assert (await read(stream))[0] == (1, 2)


async def test_a_source_that_fails_during_a_move_is_followed_by_the_destination():
    die, there = asyncio.Event(), asyncio.Event()
    more = replace_struct(tokens(2, finish="stop"), position=1)
    world = World(
        a=[[Granted(), tokens(1), die, PeerUnreachableError("a", "killed")]],
        b=[[Granted(), there, Standing(1), LET_GO, more]],
    )
    stream = world.open()
    await until(lambda: stream.position == 1)
    report = stream.move(to("b"), "operator")
    die.set()
    await until(lambda: world.lost_nodes)
    there.set()
    assert (await read(stream))[0] == (1, 2)
    assert report.outcome == "moved"
    assert [peer for peer, _ in world.asked] == ["a", "b"]


def way(node, startup_s):
    kind = Kind.LOAD if startup_s else Kind.SERVE
    return Candidate(kind, startup_s, NodeId(node), ("d0",), load_s=startup_s)


@pytest.mark.parametrize("expected_s", [None, 60.0], ids=["queues", "loads"])
async def test_a_session_whose_source_dies_goes_where_it_starts_sooner_than_its_destination_is_there(
    expected_s,
):
    die = asyncio.Event()
    world = World(
        a=[[Granted(), tokens(1), die, PeerUnreachableError("a", "killed")]],
        b=[[Waiting(), asyncio.Event()]],
        c=[[Granted(), tokens(2, finish="stop")]],
    )
    world.ways = {"c": way("c", 0.0)}
    stream, report = await moving_to_b(world, expected_s, die)
    assert (await read(stream))[0] == (1, 2)
    assert [(peer, f.request.resumed) for peer, f in world.asked] == [
        ("a", ()), ("b", (1,)), ("c", (1,)),
    ]  # fmt: skip
    assert (report.outcome, world.moves) == ("failed", [report])
    assert "'c' is sooner" in report.error
    assert "b" in world.closed


async def test_a_session_whose_source_dies_waits_for_a_destination_that_is_as_soon_until_it_is_late():
    die = asyncio.Event()
    world = World(
        a=[[Granted(), tokens(1), die, PeerUnreachableError("a", "killed")]],
        b=[[Waiting(), asyncio.Event()]],
        c=[[Granted(), tokens(2, finish="stop")]],
    )
    world.ways, world.is_heard = {"c": way("c", 4.5)}, False
    stream, report = await moving_to_b(world, 4.0, die)
    assert (await read(stream))[0] == (1, 2)
    assert (report.outcome, world.clock.now()) == ("failed", 9.0)  # 5 s later than was estimated


async def test_a_session_whose_source_dies_leaves_a_destination_that_computes_only_if_nothing_comes_of_it():
    die = asyncio.Event()
    world = World(
        a=[[Granted(), tokens(1), die, PeerUnreachableError("a", "killed")]],
        b=[[Granted(), asyncio.Event()]],
        c=[[Granted(), tokens(2, finish="stop")]],
    )
    world.ways, world.is_heard = {"c": way("c", 0.0)}, False
    stream, report = await moving_to_b(world, 1.0, die)
    assert (await read(stream))[0] == (1, 2)
    assert (report.outcome, world.clock.now()) == ("failed", PATIENCE_S)


async def test_a_session_whose_source_dies_goes_back_to_it_when_it_is_there_before_the_destination():
    die = asyncio.Event()
    world = World(
        a=[
            [Granted(), tokens(1), die, PeerUnreachableError("a", "killed")],
            [Granted(), tokens(2, finish="stop")],
        ],
        b=[[Waiting(), asyncio.Event()]],
    )
    world.ways, world.is_heard = {"a": way("a", 3.0)}, False
    stream, report = await moving_to_b(world, 60.0, die)
    assert (await read(stream))[0] == (1, 2)
    assert [peer for peer, _ in world.asked] == ["a", "b", "a"]
    assert (report.outcome, world.clock.now()) == ("failed", LOOK_S)
    assert "'a' is sooner" in report.error


async def test_a_session_whose_source_dies_gives_up_a_destination_of_which_nothing_comes():
    die = asyncio.Event()
    world = World(
        a=[[Granted(), tokens(1), die, PeerUnreachableError("a", "killed")]],
        b=[[Waiting(), asyncio.Event()]],
    )
    world.is_heard = False
    stream, report = await moving_to_b(world, 60.0, die)
    with pytest.raises(SessionLostError, match="nodes tried: 3"):
        await read(stream)
    assert (report.outcome, world.clock.now()) == ("failed", PATIENCE_S)
    assert "nothing came of it for 10 s" in report.error


async def test_a_session_whose_source_dies_waits_as_long_as_the_load_at_its_destination_goes_on():
    def loads(done):
        return Waiting(status_of(progress=LoadProgress(done, 100, 1.0, None, Tier.NVME)))

    die, more, much = asyncio.Event(), asyncio.Event(), asyncio.Event()
    last = replace_struct(tokens(2, finish="stop"), position=1)
    world = World(
        a=[[Granted(), tokens(1), die, PeerUnreachableError("a", "killed")]],
        b=[[loads(1), more, loads(50), much, loads(100), Granted(), Standing(1), LET_GO, last]],
    )
    stream, report = await moving_to_b(world, 1.0, die)
    for come, done in ((more, 50), (much, 100)):
        world.clock.advance(PATIENCE_S - 1)
        world.news.set()
        await until(lambda: not world.news.is_set())
        come.set()
        await until(lambda done=done: stream._move is None or stream._move._bytes == done)
    assert (await read(stream))[0] == (1, 2)
    assert (report.outcome, world.clock.now()) == ("moved", 2 * (PATIENCE_S - 1))


async def moving_to_b(world, expected_s, die):
    """Return a session that moves from `a`, which has died, to `b`."""
    stream = world.open()
    await until(lambda: stream.position == 1)
    candidate = None if expected_s is None else way("b", expected_s)
    report = stream.move(replace(to("b"), candidate=candidate), "operator")
    is_granted = isinstance(world.scripts[NodeId("b")][0][0], Granted)
    await until(lambda: len(world.asked) == 2 and stream._move._is_granted == is_granted)
    die.set()
    await until(lambda: world.lost_nodes)
    return stream, report


async def test_a_destination_that_dies_with_the_grant_is_replaced_from_the_tokens():
    never = asyncio.Event()
    world = World(
        a=[[Granted(), tokens(1), never], [Granted(), tokens(2, finish="stop")]],
        b=[[Granted(), Standing(1), never]],
    )
    world.extend_script = [[PeerUnreachableError("b", "killed")]]
    stream = world.open()
    await until(lambda: stream.position == 1)
    report = stream.move(to("b"), "drain")
    assert (await read(stream))[0] == (1, 2)
    assert (report.outcome, [f.epoch for _, f in world.asked]) == ("moved", [1, 2, 3])


async def other_weights_at(b_ends, a_ends):
    """Return a session with a token of node `a`, and its move to `b`, which has other weights."""
    begin, ours = asyncio.Event(), Granted(None, Weights(7, 5, "x"))
    world = World(
        a=[[begin, ours, tokens(1), *a_ends]],
        b=[[Granted(None, Weights(8, 5, "y")), *b_ends, Standing(0), LET_GO, tokens(9)]],
        c=[[ours, tokens(2, finish="stop")]],
    )
    stream = world.open()
    await until(lambda: world.asked)
    report = stream.move(to("b"), "operator")  # it waits still: nobody knows its weights
    await until(lambda: stream._move._is_granted)
    begin.set()
    await until(lambda: stream.position == 1)
    del world.scripts[NodeId("b")]  # no other than `c` is chosen
    return world, stream, report


async def test_a_destination_with_other_weights_gets_no_session_that_has_tokens():
    there, end = asyncio.Event(), asyncio.Event()
    world, stream, report = await other_weights_at([there], [end, tokens(2, finish="stop")])
    there.set()
    await until(lambda: world.moves)
    end.set()
    assert (await read(stream))[0] == (1, 2)
    assert (report.outcome, world.extends) == ("failed", [])
    assert "another checkpoint" in report.error


async def test_a_destination_with_other_weights_gets_none_whose_source_has_died_either():
    there, die = asyncio.Event(), asyncio.Event()
    world, stream, report = await other_weights_at([there], [die, PeerUnreachableError("a", "-")])
    die.set()
    await until(lambda: world.lost_nodes)
    there.set()
    assert (await read(stream))[0] == (1, 2)
    assert (report.outcome, world.extends) == ("failed", [])
    assert [peer for peer, _ in world.asked] == ["a", "b", "c"]


async def test_a_session_that_moves_before_its_first_token_goes_on_with_the_weights_of_its_destination():
    theirs = Weights(8, 5, "y")
    world = World(
        a=[[Granted(None, Weights(7, 5, "x")), asyncio.Event()]],
        b=[[
            Granted(None, theirs), Standing(0), LET_GO, tokens(1), PeerUnreachableError("b", "-"),
        ]],
        c=[[Granted(None, theirs), tokens(2, finish="stop")]],
    )  # fmt: skip
    stream = world.open()
    await until(lambda: stream.request.weights)
    stream.move(to("b"), "operator")
    await until(lambda: world.moves or world.extends)
    del world.scripts[NodeId("a")]
    assert (await read(stream))[0] == (1, 2)
    assert [(peer, f.request.weights) for peer, f in world.asked][1:] == [
        ("b", None), ("c", theirs),
    ]  # fmt: skip


async def test_a_cancel_during_a_move_closes_both_ends():
    world = World(a=[[tokens(1), asyncio.Event()]], b=[[Granted(), asyncio.Event()]])
    stream = world.open()
    await until(lambda: stream.position == 1)
    report = stream.move(to("b"), "operator")
    await until(lambda: len(world.asked) == 2)
    stream.cancel()
    await until(lambda: len(world.closed) == 2)
    assert (report.outcome, world.moves) == ("ended", [report])
    with pytest.raises(MoveRefusedError, match="ended"):
        stream.move(to("b"), "operator")


async def test_tokens_of_another_position_are_not_taken():
    wrong = replace_struct(tokens(7), position=5)
    world = World(a=[[tokens(1), wrong]], b=[[tokens(2, finish="stop")]])
    assert (await read(world.open()))[0] == (1, 2)


class Served(LocalStream):
    """A session of this node that `HomeStream` wraps."""

    request = REQUEST
    opened, is_granted = 0.0, True

    def leave(self, migration):
        self.cancel()


async def test_a_session_of_this_node_is_carried_from_its_next_chunk_on():
    held, more = asyncio.Event(), replace_struct(tokens(3, finish="stop"), position=2)
    world = World(here=[], b=[[Granted(), Standing(2), LET_GO, more]])
    stream, gone = Served([tokens(1).chunk, held, tokens(2).chunk, asyncio.Event()]), []

    def route(home, begun):
        limits = Limits(1.0, 10.0)
        tools = Tools(world, world.clock, limits)
        return RoutedStream(home.request, 5.0, to("here"), world, tools, begun)

    home = HomeStream(cast("Stream", stream), 5.0, route, gone.append)
    assert (await anext(home)).tokens == (1,)
    reading = asyncio.create_task(anext(home))
    await asyncio.sleep(0)
    home.when_routed(lambda routed: routed and routed.move(to("b"), "drain"))
    assert (home.routed, home.is_moving) == (None, True)
    held.set()
    assert (await reading).tokens == (2,)
    assert home.routed is not None
    assert (await anext(home)).tokens == (3,)
    with pytest.raises(StopAsyncIteration):
        await anext(home)
    assert stream.cancelled.is_set()
    assert world.asked[0][1].request.resumed == (1, 2)


async def test_a_node_that_asks_to_have_a_session_moved_is_heard():
    wish = Leave("b", "w-0")
    world = World(a=[[Granted(), tokens(1), wish, tokens(2, finish="length")]])
    stream = world.open()
    assert (await read(stream))[0] == (1, 2)
    assert world.leaves == [("r-0", "a", wish)]


async def test_a_session_that_got_no_room_here_is_placed_again_and_its_node_not_asked_for_ever():
    world = World(here=[], a=[[Granted(), tokens(1, finish="length")]])
    refused = GivenBackError("m", "a session stays")

    world.here_each = [[refused]] * REFUSALS_MAX
    stream = world.open()
    assert (await read(stream))[0] == (1,)
    assert len(world.local) == REFUSALS_MAX
    assert world.lost_nodes == []
    assert world.outcomes == [("here", "refused")] * REFUSALS_MAX + [("a", "ok")]


async def test_a_session_that_its_only_node_gives_back_again_and_again_waits_for_its_turn_there():
    world = World(here=[])
    world.is_heard = False
    refused = GivenBackError("m", "a session stays")
    world.here_each = [[refused]] * (REFUSALS_MAX + 2)
    world.here = [tokens(1, finish="length").chunk]
    assert (await read(world.open()))[0] == (1,)
    assert len(world.local) == REFUSALS_MAX + 3
    assert world.clock.now() == 3 * LOOK_S  # once it is refused, it asks again with news or a look


async def test_a_session_that_is_given_back_for_longer_than_it_waits_is_told_when_to_come_again():
    world = World(here=[])
    world.is_heard = False
    world.here = [GivenBackError("m", "a session stays")]
    stream = world.open()
    with pytest.raises(NoPlaceError, match="a session stays") as caught:
        await read(stream)
    assert caught.value.retry_after_s > 0
    assert world.clock.now() == PATIENCE_S


async def test_refusals_of_one_node_are_not_held_against_another():
    world = World(a=[[REFUSED]] * REFUSALS_MAX, b=[[REFUSED], [tokens(1, finish="stop")]], c=[])
    assert (await read(world.open()))[0] == (1,)
    assert [peer for peer, _ in world.asked] == ["a"] * REFUSALS_MAX + ["b"] * 2
