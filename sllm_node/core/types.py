"""The nouns that more than one layer uses. Plain data: frozen, slotted, no behaviour to speak of."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NewType

ModelId = NewType("ModelId", str)
"""What a client names."""
NodeId = NewType("NodeId", str)
"""What the cluster file names: this node or a peer."""
SessionId = NewType("SessionId", str)
"""One generation, from request to last token."""
RequestId = NewType("RequestId", str)
"""One HTTP request; with n > 1 it has several sessions."""

TokenIds = tuple[int, ...]
FinishReason = Literal["stop", "length"]
ResumeMode = Literal["fast", "replay"]
"""How tokens that are known already are computed again: all at once, or as they were generated."""


class Tier(Enum):
    """Where bytes of a checkpoint can be, nearest to serving first."""

    DEVICE = "device"
    DRAM = "dram"
    NVME = "nvme"
    REMOTE = "remote"
    """A peer or an object store: comes onto NVMe while it is loaded."""


class ModelState(Enum):
    """What a model is doing on this node."""

    IDLE = "idle"
    """Not on the device, nobody waits."""
    QUEUED = "queued"
    """Requests wait for room on the device."""
    LOADING = "loading"
    READY = "ready"
    """On the device; serves at once."""
    EVICTING = "evicting"


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes [start, end) of a checkpoint, its shards one after another, and where they go."""

    device: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Share:
    """What a replica takes of one device."""

    device: str | None
    """None: whichever has room."""
    start: int
    end: int
    """Bytes [start, end) of the checkpoint."""
    size: int
    """Memory in all: weights and KV."""


Placement = tuple[Part, ...]
"""Where a replica lies: one part on one device, or parts in order on several."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load under way has come."""

    bytes_done: int
    bytes_total: int
    elapsed_s: float
    eta_s: float | None
    """Seconds to the last byte; None until a rate is known."""
    source: Tier
    """The slowest tier that the load reads from."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one finished load did: for metrics, logs and benchmarks."""

    model: ModelId
    bytes_total: int
    bytes_from_nvme: int
    bytes_from_dram: int
    bytes_from_sibling: int
    """Cloned from another device."""
    bytes_kept: int
    """On the device already, from an earlier replica."""
    bytes_relayed: int
    """Of all that moved: over the links of siblings."""
    elapsed_s: float
    first_copy_s: float
    """From the call to the first chunk copy issued."""
    verified_bytes: int
    bytes_from_remote: int = 0
    """Of `bytes_from_nvme`: those that a remote had to send first."""
    bytes_stored: int = 0
    """What was carried, as it is stored; all others count decoded bytes."""
    decode_s: float = 0.0
    """Of all decoding together; it runs beside the copies, and several at once on a CPU."""
    is_encoded: bool = False
    """Whether the checkpoint is one that has to be decoded."""


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How a token is drawn from logits; OpenAI's names and meanings, plus the usual extensions."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Of prompt and output tokens (Keskar et al. 2019, as transformers defines it)."""
    presence_penalty: float = 0.0
    """Of output tokens."""
    frequency_penalty: float = 0.0
    """Of output tokens."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """Random numbers follow from (seed, token index) alone. 64 bits, unsigned."""


@dataclass(frozen=True, slots=True)
class Stay:
    """What a node gave of a session that went on at another one."""

    node: str
    tokens: int
    """Of its output, that came from there."""
    left: str
    """`moved`, or the code of the error that ended it there."""


@dataclass(frozen=True, slots=True)
class Startup:
    """How a session came to run; None: not known, or not yet."""

    node: str | None = None
    """Where it runs, or ran last; in a cluster."""
    way: str | None = None
    """`serve`, `wait`, `load`, `evict` or `queue`, as it was placed; in a cluster."""
    why: str | None = None
    expected_s: float | None = None
    startup_s: float | None = None
    """From when it was asked for until it ran first."""
    earlier: tuple[Stay, ...] = ()
    """Where it ran before, the first one first; in a cluster."""


@dataclass(frozen=True, slots=True)
class Waited:
    """What a session waited for at the node that serves it, until it ran there."""

    queue_s: float = 0.0
    """For its turn and for room: before its model's load, or without one."""
    load_s: float = 0.0
    """For its model's load, from when it came or from when that began."""

    @property
    def total_s(self) -> float:
        """Return the seconds from when it came to this node until it ran."""
        return self.queue_s + self.load_s


@dataclass(frozen=True, slots=True)
class Weights:
    """Of which checkpoint a model's weights are, as nodes compare them."""

    created: int
    """Unix time of the conversion."""
    stored: int
    digest: str = ""
    """Of all digests of its chunks as they are stored; empty: an older release does not tell."""

    def is_same(self, other: "Weights") -> bool:
        """Tell whether a session may go on with the others: they are equal, or one conversion recoded."""
        if not (self.digest and other.digest):
            return True
        is_recoded = self.created == other.created and self.stored != other.stored
        return self.digest == other.digest or is_recoded


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the engine is asked for: tokens in, conditions of the end."""

    session: SessionId
    model: ModelId
    prompt: TokenIds
    sampling: SamplingParameters
    max_tokens: int
    """Output tokens at most, those in `resumed` included."""
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. k: the chosen token's, and those of the k most likely."""
    resumed: TokenIds = ()
    """Output tokens already generated elsewhere; generation goes on after them."""
    resume: ResumeMode | None = None
    """How output tokens are computed that are known: `resumed`, or after a preemption. None: as
    `engine.resume` says."""
    priority: int = 0
    """Higher goes first."""
    cache_salt: str = ""
    """Sessions find cached prefixes only of sessions with the same salt."""
    held: bool = False
    """Compute what is known and draw nothing until let go: another node decodes meanwhile, and its
    tokens are added. How a session moves."""
    waited_s: float = 0.0
    """How long it has waited for its turn before it came here, at other nodes or given back by this one."""
    weights: Weights | None = None
    """What `resumed` was computed with: with other weights it does not go on. None: nothing was, or it is not told."""
    open_ended: bool = False
    """Its client named no limit: `max_tokens` is what fits where most does, and a node with less room ends it
    where that ends."""

    @property
    def tokens_needed(self) -> int:
        """Return for how many tokens a node must have room, prompt and output; open-ended: for the next one."""
        output = len(self.resumed) + 1 if self.open_ended else self.max_tokens
        return len(self.prompt) + output


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probability (natural) of a token under the model's own distribution."""

    token: int
    text: str
    """Its name (`core.token_name`): of a part of a character, the bytes."""
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()
    """(token, text, logprob) of the most likely ones, best first."""
    offset: int = 0
    """Where its text begins in the session's: parts of one character begin where that begins."""


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """What a session has new: text that is whole characters and can't be part of a stop string."""

    text: str
    tokens: TokenIds
    """The tokens generated since the last chunk; text may lag behind them."""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    """Set on the last chunk and only there."""
    stop_text: str | None = None
    """The stop string that ended it, if one did."""
    cached_tokens: int = 0
    """Tokens of the session's prompt that the prefix cache had; the same in all its chunks."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model as `/v1/models` and `status` show it."""

    model: ModelId
    state: ModelState
    tier: Tier
    """The nearest tier that holds all of it."""
    bytes_total: int
    bytes_by_tier: dict[Tier, int]
    dtype: str
    architecture: str
    context_tokens: int
    pinned: bool
    priority: int
    running: int
    waiting: int
    keep_alive_until_s: float | None
    """Seconds from now until eviction for idleness; None: not counted down."""
    progress: LoadProgress | None
    created: int
    """Unix time of the conversion."""
    devices: tuple[str, ...] = ()
    """Where it is, or is coming."""
    stalled_s: float | None = None
    """For how long it has had work and no step has ended, if that is too long."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Why engines don't move."""

    reason: str
    models: tuple[ModelId, ...] = ()
    """Those that have work."""


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """A session as `status` shows it."""

    session: SessionId
    model: ModelId
    state: Literal["waiting", "running"]
    prompt_tokens: int
    generated_tokens: int
    age_s: float
    node: NodeId | None = None
    """Who serves it, or has it in its queue; None: nobody yet, or this node, in no cluster."""
    migration: str | None = None
    """The id of the move that is under way."""
    entry: NodeId | None = None
    """The node of its client; None: this node, in no cluster."""
