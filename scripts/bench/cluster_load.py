"""What clients of a cluster ask and see: requests by a trace, streams token by token, the comparison.

Used by `scripts.bench.cluster`.
"""

import asyncio
import csv
import itertools
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

TRACE: Final = Path(__file__).parents[2] / "tests" / "data" / "azure_code_excerpt.csv"
PROMPT_MAX, OUTPUT_MAX = 200, 240
"""Tiny models take 512 tokens."""
GAP_MAX_S: Final = 2.0
"""Pauses of the trace are cut to it: it has one of two minutes."""
ASK_AGAIN_S: Final = 0.1
GIVE_UP_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the trace, as it is asked."""

    name: str
    arrival_s: float
    model: str
    prompt: str
    tokens: int

    @property
    def body(self) -> dict[str, Any]:
        """Return it as a client sends it: greedy, streamed, with its tokens."""
        return {
            "model": self.model, "prompt": self.prompt, "max_tokens": self.tokens,
            "temperature": 0, "ignore_eos": True, "logprobs": 1, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip


@dataclass(slots=True)
class Answer:
    """What came of a request."""

    tokens: list[str] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    sent_at: float = 0.0
    """Wall clock, as logs have it."""
    first_s: float | None = None
    last_s: float = 0.0
    worst_gap_s: float = 0.0
    entries_lost: int = 0
    """Times that the node with the client's connection died, and the client asked another one."""
    broken: list["Answer"] = field(default_factory=list)
    """What had come until then."""

    def take(self, event: dict[str, Any], at_s: float) -> None:
        """Take one event of the stream in."""
        if "error" in event:
            self.error = str(event["error"])
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            tokens = (choice["logprobs"] or {"tokens": []})["tokens"]
            if tokens:
                self.worst_gap_s = max(self.worst_gap_s, at_s - self.last_s if self.tokens else 0.0)
                self.first_s = at_s if self.first_s is None else self.first_s
                self.last_s = at_s
            self.tokens += tokens
            self.text += choice["text"]
            self.finish = choice["finish_reason"] or self.finish


def requests_of_trace(count: int, models: list[str], seed: int, speed: float) -> list[Request]:
    """Return `count` requests: arrivals and lengths of the excerpt, repeated as often as needed.

    Long pauses are cut. Lengths are scaled down to what tiny models take; models are drawn by Zipf's law.
    """
    with TRACE.open() as file:
        rows = list(csv.DictReader(file))
    clock = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    gaps = (min(GAP_MAX_S, after - before) for before, after in itertools.pairwise(clock))
    at = list(itertools.accumulate(gaps, initial=0.0))
    span_s = at[-1] + 1.0
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(models))]
    found = []
    for number in range(count):
        again, index = divmod(number, len(rows))
        row = rows[index]
        words = max(1, min(PROMPT_MAX, int(row["ContextTokens"]) // 32))
        prompt = "".join(draw.choice("abcdefghijklmnop ") for _ in range(words))
        tokens = max(4, min(OUTPUT_MAX, 2 * int(row["GeneratedTokens"])))
        arrival_s = (again * span_s + at[index]) / speed
        (model,) = draw.choices(models, weights)
        found.append(Request(f"r{number}", arrival_s, model, prompt, tokens))
    return found


async def ask(
    http: aiohttp.ClientSession, url: str, request: Request, name: str, answer: Answer
) -> None:
    """Stream one answer; raise aiohttp.ClientError where the node can't be reached any more."""
    start = time.perf_counter()
    answer.sent_at = time.time()
    headers = {"x-request-id": name}
    async with http.post(f"{url}/v1/completions", json=request.body, headers=headers) as response:
        if response.status != 200:
            answer.error = f"{response.status} {await response.text()}"
            return
        async for raw in response.content:
            if raw.startswith(b"data: {"):
                answer.take(orjson.loads(raw[6:]), time.perf_counter() - start)


async def ask_until_answered(
    http: aiohttp.ClientSession, request: Request, entry: Callable[[], str | None], tag: str
) -> Answer:
    """Ask one entry node after another, as a client does whose node dies; never twice for an error."""
    broken: list[Answer] = []
    answer = Answer()
    until = time.perf_counter() + GIVE_UP_S
    for attempt in itertools.count():
        url = entry()
        answer = Answer(entries_lost=len(broken), broken=broken)
        if url is None:
            answer.error = "no node to ask"
        else:
            try:
                await ask(http, url, request, f"{tag}-{request.name}-{attempt}", answer)
            except (aiohttp.ClientError, OSError) as error:
                answer.error = f"connection: {type(error).__name__}: {error}"
                if answer.tokens:
                    broken.append(answer)
            else:
                return answer
        if time.perf_counter() > until:
            return answer
        await asyncio.sleep(ASK_AGAIN_S)
    raise AssertionError


async def run_trace(
    requests: Iterable[Request], entry: Callable[[], str | None], tag: str, until_s: float
) -> dict[str, Answer]:
    """Send each request when it arrives; those that would arrive behind `until_s` are left out."""
    start = time.perf_counter()
    answers: dict[str, Answer] = {}
    timeout = aiohttp.ClientTimeout(total=None, sock_read=GIVE_UP_S)
    connector = aiohttp.TCPConnector(limit=0)

    async def one(request: Request) -> None:
        await asyncio.sleep(max(0.0, start + request.arrival_s - time.perf_counter()))
        if time.perf_counter() - start < until_s:
            answers[request.name] = await ask_until_answered(http, request, entry, tag)

    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        await asyncio.gather(*(one(request) for request in requests))
    return answers


def compared(
    requests: Iterable[Request], answers: dict[str, Answer], wanted: dict[str, Answer]
) -> dict[str, Any]:
    """Return how many answers failed or are not, token by token, those of the single node."""
    failed, wrong, prefixes = [], [], []
    for request in requests:
        if (answer := answers.get(request.name)) is None:
            continue
        right = wanted[request.name]
        if answer.error is not None or answer.finish is None:
            failed.append(f"{request.name} {request.model}: {answer.error or 'no end'}"[:400])
        elif (answer.tokens, answer.text) != (right.tokens, right.text) or (
            answer.usage.get("completion_tokens") != request.tokens
        ):
            wrong.append(
                f"{request.name} {request.model}: {len(answer.tokens)} of {request.tokens}"
            )
        prefixes += [
            request.name
            for part in answer.broken
            if part.tokens != right.tokens[: len(part.tokens)]
        ]
    return {
        "requests": len(answers), "failed": len(failed), "wrong_tokens": len(wrong),
        "tokens": sum(len(answer.tokens) for answer in answers.values()),
        "streams_that_lost_their_entry_node": sum(a.entries_lost for a in answers.values()),
        "of_them_wrong_up_to_there": len(prefixes),
        "problems": [*failed[:5], *wrong[:5], *prefixes[:5]],
    }  # fmt: skip
