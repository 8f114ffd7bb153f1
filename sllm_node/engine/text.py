"""Text to tokens and back: tokenizer, chat template, and the way from tokens to text that is safe.

`TextCodec` is made once per checkpoint and is called from worker threads; it uses the tokenizer's
Rust core directly, because transformers' wrapper changes its state on each call. `Detokenizer` and
`StopScanner` follow one session; both follow from its tokens alone, so a resumed session is rebuilt
by feeding them what was generated before.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from sllm_node.core.errors import (
    PROMPT_LIMIT,
    CheckpointFormatError,
    InvalidRequestError,
    PromptTooLongError,
)
from sllm_node.core.token_name import name_of
from sllm_node.core.types import TokenIds
from sllm_node.engine.token_bytes import TokenBytes

REPLACEMENT: Final = "\ufffd"
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
_HELD_TOKENS_MAX: Final = 8
"""Tokens that may wait for the end of a character; no character is longer, so then it is none."""
_WINDOW_MAX: Final = 64
"""Tokens that are decoded again to get the text of the next one."""
_PROMPT_TAIL: Final = 6
"""Tokens of the prompt that the first window begins with."""
_CHARACTER_TOKENS: Final = 4
"""That one character can be spread over."""

_NAMES_MAX: Final = 1 << 14
"""Names of tokens that are kept."""


class TextCodec:
    """The tokenizer, chat template and end tokens of one checkpoint."""

    def __init__(
        self, tokenizer: Any, eos_ids: frozenset[int], vocabulary_size: int, origin: str
    ) -> None:
        self._tokenizer = tokenizer
        self._core = tokenizer.backend_tokenizer
        self._origin = origin
        self.eos_ids = eos_ids
        """Tokens that end a generation."""
        self.vocabulary_size = vocabulary_size
        """Of the model: tokens that it can be given."""
        self.token_bytes = token_bytes = TokenBytes(self._core).of
        """What one token stands for, special or not."""
        self.token_text = lru_cache(_NAMES_MAX)(lambda token: name_of(token_bytes(token)))
        """The name of one token by itself; for log probabilities, up to twenty of each drawn one."""
        added = self._core.get_added_tokens_decoder().items()
        self._special = {token: found.content for token, found in added if found.special}
        # One by one: get_vocab would hold the GIL for a tenth of a second.
        names = (self._core.id_to_token(token) or "" for token in range(vocabulary_size))
        self._token_characters = max(map(len, names), default=1)
        """Characters of text that one token stands for, at most: those of the longest one's name."""

    def encode(
        self, text: str, *, add_special_tokens: bool = True, limit: int | None = None
    ) -> TokenIds:
        """Return the tokens of `text`.

        Raises:
            PromptTooLongError: they are more than `limit`, told by the text's length alone.
        """
        self._check_length(text, limit, "prompt")
        # A batch, because that is computed without the GIL; the fast one, because it makes no
        # offsets: they take half of the time, and freeing them takes long with the GIL held.
        batch = self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(batch[0].ids)

    def decode(self, tokens: Sequence[int], *, with_special: bool = False) -> str:
        """Return the text of `tokens`, special ones left out unless they are asked for."""
        return str(self._core.decode(list(tokens), skip_special_tokens=not with_special))

    def text_state(
        self, stops: Sequence[str], resumed: TokenIds = (), prompt: TokenIds = ()
    ) -> "TextState":
        """Start a session's text; that of `resumed` has been shown already."""
        named = {t: name for t, name in self._special.items() if any(name in s for s in stops)}
        return TextState.begin(self.decode, stops, resumed, prompt, named)

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, limit: int | None = None
    ) -> TokenIds:
        """Return the tokens of the conversation, up to where the assistant speaks.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the messages.
            PromptTooLongError: they are more than `limit`, told by the text's length alone.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                f"{self._origin} has no chat template; use /v1/completions", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses the messages: {error}", param="messages"
            ) from error
        self._check_length(text, limit, "messages")
        return self.encode(text, add_special_tokens=False)

    def _check_length(self, text: str, limit: int | None, param: str) -> None:
        if limit is not None and len(text) > limit * self._token_characters:
            least = -(-len(text) // self._token_characters)
            raise PromptTooLongError(least, limit, PROMPT_LIMIT, param=param, is_least=True)


def load_codec(directory: Path) -> TextCodec:
    """Read the tokenizer, chat template and end tokens of the checkpoint in `directory`.

    Raises:
        CheckpointFormatError: there is no tokenizer that works.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        problem = (
            "it has no tokenizer (tokenizer.json); convert it again from a source that has one"
        )
        raise CheckpointFormatError(str(directory), problem)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointFormatError(
            str(directory), f"its tokenizer can't be read: {error}"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointFormatError(str(directory), "its tokenizer has no tokenizer.json")
    # What training left in the file; it would cut or pad prompts without a word.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    known = len(tokenizer)
    size = _read_json(directory / "config.json").get("vocab_size", known)
    return TextCodec(tokenizer, _eos_ids(directory, tokenizer), int(size), directory.name)


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _eos_ids(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Return the end tokens of the generation config, or else of the config, and the tokenizer's."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not found:
            ids = _read_json(directory / name).get("eos_token_id")
            named = ids if isinstance(ids, list) else [ids]
            found.update(token for token in named if isinstance(token, int))
    own = tokenizer.eos_token_id
    return frozenset(found if own is None else {*found, own})


class Detokenizer:
    """Turns tokens into text as they come; a character is emitted when it is whole.

    Decoding a window that begins before the new tokens keeps what tokenizers do between words right
    (a space before a word, or none at the start), and costs the same however long the text is. The
    first window begins in the prompt, so that the text goes on from it: also in the middle of a
    character, which is emitted if the first tokens make it whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = _tail(decode, prompt)
        self._prefix = 0
        self._read = len(self._tokens)
        self._is_first = True
        """Nothing was emitted: the window's known part is the prompt's."""
        self.characters = 0
        """Emitted so far."""

    def add(self, token: int) -> str:
        """Take a token and return the new whole characters."""
        self._tokens.append(token)
        text, before = self._window()
        waits = len(self._tokens) - self._read
        if text.endswith(REPLACEMENT) and waits < _HELD_TOKENS_MAX:
            return ""
        return self._emit(text, before)

    def flush(self) -> str:
        """Return what is left at the end, an incomplete character as U+FFFD."""
        return self._emit(*self._window())

    def _window(self) -> tuple[str, str]:
        text = self._decode(self._tokens[self._prefix :])
        before = self._decode(self._tokens[self._prefix : self._read])
        if self._is_first and before.endswith(REPLACEMENT) and not text.startswith(before):
            return text, self._before_character(text)
        return text, before

    def _before_character(self, text: str) -> str:
        """Go back to before the character that the prompt has begun and its answer made whole."""
        for read in range(self._read, max(-1, self._read - _CHARACTER_TOKENS), -1):
            before = self._decode(self._tokens[:read])
            if text.startswith(before):
                self._read = read
                return before
        return self._decode(self._tokens[: self._read])

    def _emit(self, text: str, before: str) -> str:
        self._is_first = False
        # A window must begin with tokens that show, or what follows looks like the text's start.
        if len(text) > len(before) or len(self._tokens) - self._prefix > _WINDOW_MAX:
            self._prefix = self._read
        self._read = len(self._tokens)
        if self._prefix > _WINDOW_MAX:
            del self._tokens[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0
        emitted = text[len(before) :]
        self.characters += len(emitted)
        return emitted


def _tail(decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> list[int]:
    """Return the last tokens of a prompt, from where a character begins.

    One that is cut makes some tokenizers decode all bytes beside it as U+FFFD; so the last one, which
    may be cut, is left aside to tell.
    """
    for size in range(_PROMPT_TAIL, _PROMPT_TAIL + _CHARACTER_TOKENS):
        tail = list(prompt[-size:])
        for cut in range(_CHARACTER_TOKENS):
            text = decode(tail[: len(tail) - cut])
            if not (text.startswith(REPLACEMENT) or text.endswith(REPLACEMENT)):
                return tail
    return list(prompt[-_PROMPT_TAIL:])


class StopScanner:
    """Passes text on up to the first stop string; holds back what may be the beginning of one.

    Text may be hidden: a special token's, which is looked at and never passed on.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._shows: list[bool] = []
        """Of each character held: whether it can be shown."""
        self.found: str | None = None
        """The stop string that was met."""

    def add(self, text: str, *, is_hidden: bool = False) -> str:
        """Take text and return what can be shown."""
        if not self._stops:
            return "" if is_hidden else text
        self._held += text
        self._shows += [not is_hidden] * len(text)
        places = [(self._held.find(stop), stop) for stop in self._stops]
        met = [(at, -len(stop), stop) for at, stop in places if at >= 0]
        if met:
            at, _, self.found = min(met)
            shown = self._take(at)
            self._take(len(self._held))
            return shown
        return self._take(len(self._held) - self._longest_beginning())

    def flush(self) -> str:
        """Return what was held back: no stop string came of it."""
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        shown = "".join(compress(self._held[:count], self._shows))
        self._held = self._held[count:]
        del self._shows[:count]
        return shown

    def _longest_beginning(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


@dataclass(slots=True)
class TextState:
    """From one session's tokens to the text that its reader gets."""

    detokenizer: Detokenizer
    scanner: StopScanner
    special: Mapping[int, str]
    """Names of special tokens that stop strings are written with."""

    @classmethod
    def begin(
        cls,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str],
        resumed: TokenIds,
        prompt: TokenIds = (),
        special: Mapping[int, str] = MappingProxyType({}),
    ) -> "TextState":
        """Start a session; the text of `resumed` has been shown already."""
        state = cls(Detokenizer(decode, prompt), StopScanner(stops), special)
        for token in resumed:
            state.add(token)
        return state

    def add(self, token: int) -> str:
        """Take a token and return what can be shown."""
        name = self.special.get(token)
        if name is None:
            return self.scanner.add(self.detokenizer.add(token))
        text = self.detokenizer.flush() + self.detokenizer.add(token)
        shown = self.scanner.add(text)
        if self.scanner.found is not None:
            return shown
        return shown + self.scanner.add(name, is_hidden=True)

    def flush(self) -> str:
        """Return what is left when the session ends without a stop string."""
        shown = self.scanner.add(self.detokenizer.flush())
        return shown if self.scanner.found is not None else shown + self.scanner.flush()
