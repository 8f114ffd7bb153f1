"""OpenAI's answers: objects, stream chunks, usage, logprobs, errors. Plain dictionaries for orjson."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sllm_node.core.token_name import bytes_of
from sllm_node.core.types import FinishReason, GenerationChunk, TokenLogprob


@dataclass(slots=True)
class Usage:
    """Tokens of a request; a prompt counts once however many choices it has."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    """Of the prompts: found in the prefix cache."""

    def as_json(self) -> dict[str, Any]:
        """Return OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(slots=True)
class Choice:
    """What one session has produced so far."""

    index: int
    echo: str = ""
    """Text that stands before what is generated."""
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0
    finish: FinishReason | None = None

    def add(self, chunk: GenerationChunk) -> None:
        """Take a chunk in."""
        self.text.append(chunk.text)
        self.logprobs += chunk.logprobs
        self.tokens += len(chunk.tokens)
        self.finish = chunk.finish


@dataclass(frozen=True, slots=True)
class Reply:
    """What all objects of one answer share."""

    id: str
    model: str
    created: int
    with_logprobs: bool


class ChatShape:
    """Objects of /v1/chat/completions."""

    prefix = "chatcmpl-"

    def whole(self, reply: Reply, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Return the answer to a request without streaming."""
        made = [
            {
                "index": choice.index,
                "message": {
                    "role": "assistant", "content": "".join(choice.text), "refusal": None
                },
                "logprobs": _chat_logprobs(reply, choice.logprobs),
                "finish_reason": choice.finish,
            }
            for choice in choices
        ]  # fmt: skip
        return {**_head(reply, "chat.completion"), "choices": made, "usage": usage.as_json()}

    def opening(self, reply: Reply, choice: Choice) -> dict[str, Any] | None:
        """Return the chunk that begins a choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk(reply, choice.index, delta, None, ())

    def piece(
        self, reply: Reply, choice: Choice, text: str, chunk: GenerationChunk
    ) -> dict[str, Any]:
        """Return a chunk with text."""
        delta = {"content": text} if text or chunk.logprobs else {}
        return self._chunk(reply, choice.index, delta, chunk.finish, chunk.logprobs)

    def usage(self, reply: Reply, usage: Usage) -> dict[str, Any]:
        """Return the chunk that ends a stream whose reader wants usage."""
        return {**_head(reply, "chat.completion.chunk"), "choices": [], "usage": usage.as_json()}

    def _chunk(
        self,
        reply: Reply,
        index: int,
        delta: dict[str, Any],
        finish: FinishReason | None,
        logprobs: Sequence[TokenLogprob],
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _chat_logprobs(reply, logprobs) if logprobs else None,
            "finish_reason": finish,
        }
        return {**_head(reply, "chat.completion.chunk"), "choices": [choice]}


class CompletionShape:
    """Objects of /v1/completions."""

    prefix = "cmpl-"

    def whole(self, reply: Reply, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """Return the answer to a request without streaming."""
        made = [
            {
                "index": choice.index,
                "text": choice.echo + "".join(choice.text),
                "logprobs": _completion_logprobs(reply, choice.logprobs),
                "finish_reason": choice.finish,
            }
            for choice in choices
        ]
        return {**_head(reply, "text_completion"), "choices": made, "usage": usage.as_json()}

    def opening(self, reply: Reply, choice: Choice) -> dict[str, Any] | None:
        """Return the chunk that begins a choice: the echoed prompt, if that was wanted."""
        if not choice.echo:
            return None
        return self._chunk(reply, choice.index, choice.echo, None, None)

    def piece(
        self, reply: Reply, choice: Choice, text: str, chunk: GenerationChunk
    ) -> dict[str, Any]:
        """Return a chunk with text."""
        logprobs = _completion_logprobs(reply, chunk.logprobs) if chunk.logprobs else None
        return self._chunk(reply, choice.index, text, chunk.finish, logprobs)

    def usage(self, reply: Reply, usage: Usage) -> dict[str, Any]:
        """Return the chunk that ends a stream whose reader wants usage."""
        return {**_head(reply, "text_completion"), "choices": [], "usage": usage.as_json()}

    def _chunk(
        self,
        reply: Reply,
        index: int,
        text: str,
        finish: FinishReason | None,
        logprobs: dict[str, Any] | None,
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**_head(reply, "text_completion"), "choices": [choice]}


def _head(reply: Reply, kind: str) -> dict[str, Any]:
    return {"id": reply.id, "object": kind, "created": reply.created, "model": reply.model}


def _chat_logprobs(reply: Reply, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not reply.with_logprobs:
        return None
    content = [
        {
            **_chat_logprob(entry.text, entry.logprob),
            "top_logprobs": [_chat_logprob(text, logprob) for _, text, logprob in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_logprob(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(bytes_of(text))}


def _completion_logprobs(reply: Reply, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not reply.with_logprobs:
        return None
    return {
        "tokens": [entry.text for entry in logprobs],
        "token_logprobs": [entry.logprob for entry in logprobs],
        "top_logprobs": [_by_name(entry) for entry in logprobs],
        "text_offset": [entry.offset for entry in logprobs],
    }


def _by_name(entry: TokenLogprob) -> dict[str, float]:
    """Return the most likely tokens and the sampled one; of equal names the most likely."""
    found: dict[str, float] = {}
    for _, name, value in (*entry.top, (entry.token, entry.text, entry.logprob)):
        found.setdefault(name, value)
    return found
