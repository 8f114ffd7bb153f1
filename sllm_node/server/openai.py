"""OpenAI's requests: parsed strictly, every limit checked, every error naming its parameter.

Nothing is silently ignored. A field that OpenAI defines and we do not serve is taken when it asks
for nothing (null, or its neutral value) and refused otherwise; a field that nobody defines is
refused, but in a message it may be null: so clients send our own answers back, with fields that they
add. `user` and `safety_identifier` are labels and go to the log; `name` goes to the chat template.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from sllm_node.core.errors import InvalidRequestError
from sllm_node.core.types import SamplingParameters
from sllm_node.server.parsing import parse, parse_any
from sllm_node.server.unserved import UNSERVED, is_neutral

STOPS_MAX: Final = 16
STOP_LENGTH_MAX: Final = 1024
PROMPTS_MAX: Final = 128
LOGPROBS_MAX: Final = 20
LOGIT_BIAS_MAX: Final = 1024
CACHE_SALT_MAX: Final = 1024
LABEL_MAX: Final = 1024
FIELD_LENGTH_MAX: Final = 1 << 18
"""Bytes of a field as it is sent, but for prompts: a request's limits fit in it many times."""
SEEDS: Final = 1 << 64
_SEED_STEP: Final = 0x9E3779B97F4A7C15
"""Odd, so that the seeds of a request's choices differ (2^64 over the golden ratio)."""

Nothing = Annotated[list[Any], Meta(max_length=0)]
NoFields = Annotated[dict[str, Any], Meta(max_length=0)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding that hides the lengths of tokens on the wire; not served, but it can be declined."""


class TextPart(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A part of a message's content."""

    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None
    """None: an answer without text."""
    name: str | None = None
    """The model's chat template gets it; most do not read it."""
    # What our own answers carry, so that they can be sent back as they are; we fill none of it.
    refusal: None = None
    tool_calls: Nothing | None = None
    function_call: None = None
    audio: None = None
    annotations: Nothing | None = None
    provider_specific_fields: dict[str, Nothing | NoFields | None] | None = None
    """A client's own place for fields of answers."""

    def as_template_input(self) -> dict[str, str]:
        """Return the message as chat templates take it; `developer` is what was called `system`."""
        content = self.content
        parts = [] if content is None or isinstance(content, str) else content
        text = content if isinstance(content, str) else "".join(part.text for part in parts)
        made = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return made if self.name is None else {**made, "name": self.name}


class _Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints take."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] = 1
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] = {}
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: str | list[str] = []
    ignore_eos: bool = False
    keep_alive: float | str | None = None
    user: Annotated[str, Meta(max_length=LABEL_MAX)] | None = None
    safety_identifier: Annotated[str, Meta(max_length=LABEL_MAX)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=CACHE_SALT_MAX)] | None = None


RequestT = TypeVar("RequestT", bound=_Common)


class ChatRequest(_Common, forbid_unknown_fields=True, kw_only=True, dict=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] = 0

    @cached_property
    def characters(self) -> int:
        """How long the conversation is."""
        parts = (message.content for message in self.messages)
        texts = ([p] if isinstance(p, str) else [part.text for part in p or ()] for p in parts)
        return sum(len(text) for found in texts for text in found)


class CompletionRequest(_Common, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/completions."""

    prompt: list[str | list[TokenId]]
    """Texts and tokens of texts; of a client also one such, which becomes a list of one."""
    logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None
    echo: bool = False


# --- parsing --------------------------------------------------------------------------------------


def _given(kind: type[_Common]) -> type[msgspec.Struct]:
    """Return a type that has each field that may be sent as the JSON it is.

    So a body is looked through once and costs little memory, and who is refused for one field is
    refused before the others are made: a tree of all values takes many times the bytes of a body.
    """
    names = dict.fromkeys((*kind.__struct_fields__, *UNSERVED))
    fields = [(name, msgspec.Raw, msgspec.Raw()) for name in names]
    return msgspec.defstruct(f"Given{kind.__name__}", fields, forbid_unknown_fields=True)


_GIVEN: Final[Mapping[type[_Common], type[msgspec.Struct]]] = {
    kind: _given(kind) for kind in (ChatRequest, CompletionRequest)
}


def parse_chat(body: bytes) -> ChatRequest:
    """Parse the body of a chat request.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    fields = _fields_of(body, ChatRequest)
    fields["messages"] = _without_unknown_nulls(fields.get("messages", b""))
    request = _request_of(fields, ChatRequest)
    for i, message in enumerate(request.messages):
        if message.content is None and message.role != "assistant":
            where = f"messages[{i}].content"
            raise InvalidRequestError(f"{where}: only an assistant's may be null", param=where)
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs = true", param="top_logprobs")
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens mean the same; send one", param="max_tokens"
        )
    assert request.characters >= 0  # counted here, where a long conversation holds up nobody
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Parse the body of a completion request.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    fields = _fields_of(body, CompletionRequest)
    prompts = _prompts_in(fields["prompt"]) if "prompt" in fields else []
    request = _request_of({**fields, "prompt": b"[]"} if prompts else fields, CompletionRequest)
    request.prompt = prompts
    if request.echo and request.logprobs is not None:
        raise InvalidRequestError("echo with logprobs is not served", param="echo")
    return request


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts, each a text or its tokens."""
    return request.prompt


def _fields_of(body: bytes, kind: type[RequestT]) -> dict[str, bytes]:
    """Return the JSON of each field that is there and served; only prompts may be long."""
    given = parse(body, _GIVEN[kind])
    known, found = kind.__struct_fields__, {}
    for name in given.__struct_fields__:
        text = bytes(getattr(given, name))
        if text in (b"", b"null"):
            continue
        if name in known and len(text) > FIELD_LENGTH_MAX and name not in ("messages", "prompt"):
            raise InvalidRequestError(
                f"{name} has {len(text)} bytes, the limit is {FIELD_LENGTH_MAX}", param=name
            )
        if name in known:
            found[name] = text
        elif not is_neutral(name, text):
            raise InvalidRequestError(f"{name} is not served by this node", param=name)
    return found


def _request_of(fields: Mapping[str, bytes], kind: type[RequestT]) -> RequestT:
    parts = (b'"%b":%b' % (name.encode(), text) for name, text in fields.items() if text)
    request = parse(b"{%b}" % b",".join(parts), kind)
    assert isinstance(request, _Common)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream = true", param="stream_options")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        where = "stream_options.include_obfuscation"
        raise InvalidRequestError(f"{where} is not served by this node", param=where)
    return request


def _without_unknown_nulls(messages: bytes) -> bytes:
    """Take fields out of messages that nobody knows and that say nothing."""
    if b"null" not in messages:
        return messages
    tree = parse_any(messages)
    for message in tree if isinstance(tree, list) else ():
        if isinstance(message, dict):
            for name in [name for name, value in message.items() if value is None]:
                if name not in Message.__struct_fields__:
                    del message[name]
    return msgspec.json.encode(tree)


_TOKENS: Final = re.compile(rb"\[\s*[-0-9]")


def _prompts_in(text: bytes) -> list[str | list[int]]:
    """Return a text, the tokens of one, or a list of either as a list."""
    if text.startswith(b'"'):
        prompts: list[str | list[int]] = [parse(text, str, "prompt")]
    elif _TOKENS.match(text):
        prompts = [parse(text, list[TokenId], "prompt")]
    elif len(parse(text, list[msgspec.Raw], "prompt")) > PROMPTS_MAX:
        raise InvalidRequestError(f"at most {PROMPTS_MAX} prompts in a request", param="prompt")
    else:
        prompts = parse(text, list[str | list[TokenId]], "prompt")
    if not prompts or text == b'""':
        raise InvalidRequestError("prompt is empty", param="prompt")
    return prompts


# --- what the engine is asked for -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wish:
    """A request's conditions of generation, the same for all its choices but for the seed."""

    sampling: SamplingParameters
    stop: tuple[str, ...]
    logprobs: int | None
    keep_alive_s: float | None
    max_tokens: int | None
    is_seeded: bool
    """The client gave the seed."""

    def for_choice(self, prompt: int, choice: int, choices: int) -> SamplingParameters:
        """Return the sampling parameters of a prompt's choice, one of `choices`.

        The first has the request's seed. Of a client's own seed each prompt draws as it does alone, so
        that no text depends on what else is asked for; otherwise no two sessions draw the same numbers.
        """
        number = choice if self.is_seeded else prompt * choices + choice
        seed = (self.sampling.seed + number * _SEED_STEP) % SEEDS
        return replace(self.sampling, seed=seed)


def wish_of(
    request: ChatRequest | CompletionRequest, *, random_seed: int, max_choices: int, vocabulary: int
) -> Wish:
    """Check what the types can't say, and return what to ask of the engine.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    if request.n > max_choices:
        raise InvalidRequestError(f"n is {request.n}, the limit is {max_choices}", param="n")
    seed = random_seed if request.seed is None else request.seed
    sampling = SamplingParameters(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(0, request.top_k),
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=_logit_bias(request.logit_bias, vocabulary),
        seed=seed % SEEDS,
    )
    return Wish(
        sampling, _stops(request.stop), _logprobs(request), parse_keep_alive(request.keep_alive),
        _max_tokens(request), request.seed is not None,
    )  # fmt: skip


def _max_tokens(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return request.max_completion_tokens
    return request.max_tokens


def limit_name(request: ChatRequest | CompletionRequest) -> str:
    """Return which parameter limits the request's tokens."""
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        return "max_completion_tokens"
    return "max_tokens"


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return request.top_logprobs if request.logprobs else None


def _stops(stop: str | list[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > STOPS_MAX:
        raise InvalidRequestError(f"at most {STOPS_MAX} stop strings", param="stop")
    for text in stops:
        if not 1 <= len(text) <= STOP_LENGTH_MAX:
            raise InvalidRequestError(
                f"a stop string has 1 to {STOP_LENGTH_MAX} characters", param="stop"
            )
    return stops


def _logit_bias(given: dict[str, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    if len(given) > LOGIT_BIAS_MAX:
        raise InvalidRequestError(f"at most {LOGIT_BIAS_MAX} entries", param="logit_bias")
    biases = []
    for key, bias in given.items():
        if not (len(key) <= 10 and key.isascii() and key.isdigit() and int(key) < vocabulary):
            raise InvalidRequestError(
                f"{key!r} is no token id of this model (0 to {vocabulary - 1})", param="logit_bias"
            )
        biases.append((int(key), bias))
    return tuple(biases)


_DURATION: Final = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)(ms|s|m|h)?")
_DURATION_S: Final = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_keep_alive(value: float | str | None) -> float | None:
    """Return seconds, -1 for ever, None for the node's default; text may carry a unit: "5m".

    Raises:
        InvalidRequestError: it is no duration.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise InvalidRequestError(
                f'{value!r} is no duration; write seconds, "5m", or -1 for ever', param="keep_alive"
            )
        value = float(match[1]) * _DURATION_S[match[2]]
    if not math.isfinite(value):
        raise InvalidRequestError("keep_alive must be finite; -1 is for ever", param="keep_alive")
    return -1.0 if value < 0 else value
