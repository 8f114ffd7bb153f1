"""OpenAI's requests: parsed strictly, every limit checked, every error naming its parameter.

Nothing is silently ignored. A field that OpenAI defines and we do not serve is taken when it asks
for nothing (null, or its neutral value) and refused otherwise; a field that nobody defines is
refused. `user` and `safety_identifier` are labels and go to the log.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from sllm_node.core.errors import InvalidRequestError
from sllm_node.core.types import SamplingParameters

STOPS_MAX: Final = 16
STOP_LENGTH_MAX: Final = 1024
PROMPTS_MAX: Final = 128
LOGPROBS_MAX: Final = 20
LOGIT_BIAS_MAX: Final = 1024
CACHE_SALT_MAX: Final = 1024
SEEDS: Final = 1 << 64
_SEED_STEP: Final = 0x9E3779B97F4A7C15
"""Odd, so that the seeds of a request's choices differ (2^64 over the golden ratio)."""

Nothing = Annotated[list[Any], Meta(max_length=0)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
TokenId = Annotated[int, Meta(ge=0)]
RequestT = TypeVar("RequestT", bound=msgspec.Struct)


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
    # What our own answers carry, so that they can be sent back as they are; we fill none of it.
    refusal: None = None
    tool_calls: Nothing | None = None
    function_call: None = None
    audio: None = None
    annotations: Nothing | None = None

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
    user: str | None = None
    safety_identifier: str | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=CACHE_SALT_MAX)] | None = None


class ChatRequest(_Common, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] = 0


class CompletionRequest(_Common, forbid_unknown_fields=True, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    """A text, the tokens of one, or a list of either."""
    logprobs: Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)] | None = None
    echo: bool = False


# --- fields that OpenAI defines and we do not serve ------------------------------------------------

_Neutral = Callable[[Any], bool]


def _only(*values: object) -> _Neutral:
    return lambda value: value in values


_NEVER: Final[_Neutral] = lambda value: False  # noqa: E731 - a value of the table below
_UNSERVED: Final[Mapping[str, _Neutral]] = {
    "audio": _NEVER,
    "best_of": _only(1),
    "function_call": _only("none"),
    "functions": _only([]),
    "metadata": _only({}),
    "modalities": _only(["text"]),
    "moderation": _NEVER,
    "parallel_tool_calls": _only(True, False),  # noqa: FBT003 - there are no tools to call
    "prediction": _NEVER,
    "prompt_cache_key": _NEVER,
    "prompt_cache_options": _NEVER,
    "prompt_cache_retention": _NEVER,
    "reasoning_effort": _only("none"),
    "response_format": _only({"type": "text"}),
    "service_tier": _only("auto", "default"),
    "store": _only(False),  # noqa: FBT003 - the neutral value
    "suffix": _only(""),
    "tool_choice": _only("none", "auto"),
    "tools": _only([]),
    "verbosity": _NEVER,
    "web_search_options": _NEVER,
}


def parse_chat(body: bytes) -> ChatRequest:
    """Parse the body of a chat request.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    request = _parse(body, ChatRequest)
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
    return request


def parse_completion(body: bytes) -> CompletionRequest:
    """Parse the body of a completion request.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    request = _parse(body, CompletionRequest)
    if not request.prompt:
        raise InvalidRequestError("prompt is empty", param="prompt")
    if len(prompts_of(request)) > PROMPTS_MAX:
        raise InvalidRequestError(f"at most {PROMPTS_MAX} prompts in a request", param="prompt")
    if request.echo and request.logprobs is not None:
        raise InvalidRequestError("echo with logprobs is not served", param="echo")
    return request


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts, each a text or its tokens."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    tokens = [token for token in prompt if isinstance(token, int)]
    if not tokens:
        return [part for part in prompt if not isinstance(part, int)]
    if len(tokens) < len(prompt):
        raise InvalidRequestError("prompt mixes tokens with texts or lists", param="prompt")
    return [tokens]


def decode_object(body: bytes) -> dict[str, Any]:
    """Decode a JSON object.

    Raises:
        InvalidRequestError: it is something else.
    """
    try:
        tree = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is no JSON: {error}") from error
    if not isinstance(tree, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return tree


def convert_object(tree: Any, kind: type[RequestT]) -> RequestT:
    """Convert decoded JSON to a request type.

    Raises:
        InvalidRequestError: naming the parameter.
    """
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error


def _parse(body: bytes, kind: type[RequestT]) -> RequestT:
    tree = decode_object(body)
    known = {field.name for field in msgspec.structs.fields(kind)}
    for name in [name for name in tree if name in _UNSERVED and name not in known]:
        value = tree.pop(name)
        if value is not None and not _UNSERVED[name](value):
            raise InvalidRequestError(f"{name} is not served by this node", param=name)
    wanted = {name: v for name, v in tree.items() if v is not None or name not in known}
    request = convert_object(wanted, kind)
    assert isinstance(request, _Common)
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream = true", param="stream_options")
    if request.stream_options is not None and request.stream_options.include_obfuscation:
        where = "stream_options.include_obfuscation"
        raise InvalidRequestError(f"{where} is not served by this node", param=where)
    return request


_FIELD: Final = re.compile(r"(?:unknown|required) field `([^`]+)`")
_PATH: Final = re.compile(r" - at `(key in )?\$(.*)`$")


def _explained(message: str) -> InvalidRequestError:
    """Return msgspec's finding with the parameter's path in OpenAI's style: `messages[0].role`."""
    path = _PATH.search(message)
    where = path[2].lstrip(".").removesuffix("[...]") if path else ""
    text = message[: path.start()] if path else message
    if (field := _FIELD.search(text)) is not None:
        where = f"{where}.{field[1]}" if where else field[1]
        unknown = "unknown" in text
        text = "this field is unknown" if unknown else "this field is required"
    elif "Invalid value" in text and where.endswith("type"):
        text = "only parts of type text are served"
    return InvalidRequestError(f"{where or 'body'}: {text}", param=where or None)


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
