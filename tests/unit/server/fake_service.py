"""A node without models: answers what it is told, and remembers what it was asked."""

import asyncio
import threading

from sllm_node.core.errors import InvalidRequestError, ModelNotFoundError
from sllm_node.core.types import (
    GenerationChunk,
    LoadProgress,
    ModelId,
    ModelState,
    ModelStatus,
    SessionId,
    SessionStatus,
    Startup,
    Tier,
    TokenLogprob,
)


class FakeCodec:
    """One token a character."""

    vocabulary_size = 0x110000

    def __init__(self):
        self.encoded = []
        self.threads = []
        """Who encoded each."""
        self.gates = {}
        """Events that encoding waits for, by the text."""

    def encode(self, text, *, add_special_tokens=True, limit=None):
        self.encoded.append(text)
        self.threads.append(threading.current_thread())
        if text in self.gates:
            self.gates[text].wait()
        return tuple(map(ord, text))

    def decode(self, tokens, *, with_special=False):
        text = "".join(map(chr, tokens))
        return text if with_special else text.replace("<s>", "")

    def render_chat(self, messages, *, limit=None):
        if any(m["content"] == "refuse" for m in messages):
            raise InvalidRequestError("the template refuses", param="messages")
        return self.encode("".join(f"{m['role']}:{m['content']};" for m in messages))


class FakeStream:
    """Gives the chunks it was made with; waits at a gate first, if there is one."""

    def __init__(self, chunks, gate=None, status=None):
        self._chunks = list(chunks)
        self._gate = gate
        self._status = status
        self.cancelled = asyncio.Event()
        self.is_ended = False
        self.startup_ = Startup()
        self.passes = 0

    async def __anext__(self):
        if self._gate is not None and not self._gate.is_set():
            await self._gate.wait()
        if not self._chunks:
            self.is_ended = True
            raise StopAsyncIteration
        chunk = self._chunks.pop(0)
        if isinstance(chunk, Exception):
            self.is_ended = True
            raise chunk
        if isinstance(chunk, asyncio.Event):
            await chunk.wait()
            return await self.__anext__()
        return chunk

    def startup(self):
        return self.startup_

    def passed_on(self):
        self.passes += 1

    def cancel(self):
        if not self.is_ended:
            self.cancelled.set()

    def status(self):
        waits = self._gate is not None and not self._gate.is_set()
        return self._status if waits else None


def chunks_of(text, finish="stop", logprobs=False, cached=0):
    made = [
        GenerationChunk(
            c, (ord(c),), (TokenLogprob(ord(c), c, -0.5, ((ord(c), c, -0.5),), i),) if logprobs else ()
        )
        for i, c in enumerate(text)
    ]  # fmt: skip
    return [*made, GenerationChunk("", (0,), (), finish, cached_tokens=cached)]


def status_of(model="m", **changes):
    return ModelStatus(
        **{
            "model": ModelId(model), "state": ModelState.LOADING, "tier": Tier.NVME,
            "bytes_total": 200, "bytes_by_tier": {Tier.NVME: 200, Tier.DRAM: 50}, "dtype": "BF16",
            "architecture": "LlamaForCausalLM", "context_tokens": 100, "pinned": False,
            "priority": 0, "running": 1, "waiting": 2, "keep_alive_until_s": 5.0,
            "progress": LoadProgress(50, 200, 0.5, 1.5, Tier.NVME), "created": 7,
            **changes,
        }
    )  # fmt: skip


class FakeWishes:
    """Keeps what is wished for; the node "c" is never told."""

    def __init__(self):
        self.names = {}
        self.scales = {}
        self.registered = {}
        self.covered = {}
        self.error = None

    def resolve(self, name):
        return self.names.get(name, name)

    def aliases(self):
        return self.names

    def hidden(self):
        return self.covered

    def desired(self):
        return tuple(self.scales.values())

    async def set_alias(self, name, model):
        if self.error is not None:
            raise self.error
        self.names[name] = model
        return ["c"]

    async def drop_alias(self, name):
        del self.names[name]
        return ["c"]

    async def register(self, registration):
        self.registered[registration.model] = registration.url

    async def unregister(self, model):
        del self.registered[model]

    async def scale(self, desired):
        self.scales[desired.model] = desired
        return ["c"]

    async def unscale(self, model):
        del self.scales[model]
        return ["c"]


class FakeService:
    """Serves the model "m"."""

    def __init__(self):
        self.codec = FakeCodec()
        self.is_draining = False
        self.requests = []
        self.expected = []
        self.wishes = FakeWishes()
        self.keep_alives = []
        self.streams = []
        self.acts = []
        self.limit = 100
        self.sessions_max = 100
        self.refuse = None
        self.full = None
        self.pinned = False
        self.load_error = None
        self.prepare_gate = None
        self.make_stream = lambda request: FakeStream(
            chunks_of("Hello", logprobs=request.logprobs is not None)
        )

    def expect(self, model, characters):
        self.expected.append((model, characters))

    async def prepare(self, model):
        if self.prepare_gate is not None:
            await self.prepare_gate.wait()
        self._check(model)
        return self.codec

    def context_limit(self, model):
        return self.limit

    @property
    def session_limit(self):
        return self.sessions_max

    def check_room(self, model, sessions):
        if self.full is not None:
            raise self.full

    def open(self, request, *, keep_alive_s=None):
        if self.refuse is not None and len(self.requests) >= self.refuse[0]:
            raise self.refuse[1]
        self.requests.append(request)
        self.keep_alives.append(keep_alive_s)
        stream = self.make_stream(request)
        self.streams.append(stream)
        return stream

    def models(self):
        return [status_of("m")]

    def status(self, model):
        self._check(model)
        return status_of(model, pinned=self.pinned)

    def sessions(self):
        return [SessionStatus(SessionId("r-0"), ModelId("m"), "running", 3, 4, 1.5)]

    def cancel_request(self, request_id):
        self.acts.append(("cancel", request_id))
        return 2

    def move(self, session, to):
        self.acts.append(("move", session, to))
        return {"session": session, "to": to, "migration": session + ".2"}

    async def load(self, model):
        self._check(model)
        self.acts.append(("load", model))
        if self.load_error is not None:
            raise self.load_error

    async def unload(self, model, *, force=False):
        self.acts.append(("unload", model, force))

    async def pin(self, model):
        self.acts.append(("pin", model))
        self.pinned = True

    async def unpin(self, model):
        self.acts.append(("unpin", model))
        self.pinned = False

    def drain(self):
        self.is_draining = True

    def undrain(self):
        self.is_draining = False

    def _check(self, model):
        if model != "m":
            raise ModelNotFoundError(model, ("m",))
