"""What of a request can never be served, known before anything of it is computed."""

from dataclasses import replace

from sllm_node.core.errors import InvalidRequestError, PromptTooLongError
from sllm_node.core.types import GenerationRequest
from sllm_node.engine.sampling import check_parameters


def check_request(request: GenerationRequest, context_tokens: int, vocabulary: int | None) -> None:
    """Refuse what can never be served.

    Raises:
        InvalidRequestError: no prompt, tokens outside the vocabulary, parameters out of range.
        PromptTooLongError: prompt and output exceed the model's context.
    """
    if not request.prompt:
        raise InvalidRequestError("the prompt has no tokens", param="prompt")
    check_parameters(request.sampling, vocabulary)
    if request.logprobs is not None and request.logprobs < 0:
        raise InvalidRequestError(f"logprobs = {request.logprobs} is negative", param="logprobs")
    if not all(request.stop):
        raise InvalidRequestError("a stop string is empty", param="stop")
    if len(request.resumed) >= request.max_tokens:
        raise InvalidRequestError("nothing is left to generate", param="max_tokens")
    _check_room(request, context_tokens, "the model's context")
    if vocabulary is not None:
        tokens = (*request.prompt, *request.resumed)
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise InvalidRequestError(
                f"the prompt has token ids outside 0 to {vocabulary - 1}", param="prompt"
            )


def check_capacity(request: GenerationRequest, capacity_tokens: int) -> None:
    """Refuse what all blocks together can't hold.

    Raises:
        PromptTooLongError: prompt and output exceed them.
    """
    _check_room(request, capacity_tokens, "KV memory (engine.kv_cache_bytes)")


def ended_by_room(request: GenerationRequest, room_tokens: int) -> GenerationRequest:
    """Return the request with an end: an open-ended one's output ends with the room for prompt and output."""
    left = room_tokens - len(request.prompt)
    if not request.open_ended or request.max_tokens <= left:
        return request
    return replace(request, max_tokens=left)


def _check_room(request: GenerationRequest, room_tokens: int, reason: str) -> None:
    if request.tokens_needed > room_tokens:
        param = "prompt" if request.open_ended else "max_tokens"
        raise PromptTooLongError(request.tokens_needed, room_tokens, reason, param=param)
