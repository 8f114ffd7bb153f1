"""Which model's step goes next on a device, and how much of its prompts that may take. Pure.

Engines of one device take turns: a turn is one job of the step thread, and while it lasts the device
works for that model. An engine with something to do asks for a turn and says for what: for sessions
that decode, or for prompts only.

A turn in which sessions decode is due at the last token of the one that has waited longest, plus
`engine.inter_token_target_s`; one for prompts only as long after it became ready, so that pieces of
several models' prompts alternate, and a short prompt does not wait for all of a long one. Earliest
deadline first, with one rule above it: between two turns for prompts only, each engine that decodes
and is ready goes once. So readers of models that only decode wait for one piece of a prompt of one model that
doesn't decode, however many such have some; and prompts are not put off by models that decode without a pause.
A model that decodes and has prompts takes a piece of them in each round.

Nobody starves. Turns of engines that decode go in rounds, each once in a round, so one of D such
waits for at most 2 (D - 1) others and one for prompts; one of P with prompts only for at most P - 1
such and P rounds of D.

How long the pieces of a round may take together is what the target says: while others decode, steps
share the time that is left beside all their steps, by what these have taken lately, with those whose
last turn had prompts, and who comes after it is spent has `prefill_beside_tokens`, as all have at least, as far as
turns go: beside a model's own readers `beside` goes down to a quarter of it.
So a gap is longer than the target where these leave no room; and by up to as much again for a round
or two after a model began to take prompts. When nobody else decodes, nothing limits a piece.

While a turn lasts, the one behind it may be certain already: sessions decode in it, and nobody who may
ask meanwhile would go before it (`following`). Its job can be put behind the one under way then (`follow`), so
that nothing lies between the two; the order is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_WEIGHT: Final = 0.5
"""Of the newest step in what is known of a model's steps."""
_FACTOR: Final = 4.0
"""The newest step counts as so many times what is known at most, and as that part of it at least."""
_LAUNCH_S: Final = 1e-4
"""A shorter turn computed nothing: it read a step that had ended before it began."""


@dataclass(frozen=True, slots=True)
class Need:
    """What an engine asks a turn for."""

    decoding: int = 0
    """Sessions whose next token is due."""
    oldest: float = 0.0
    """When the one of them that has waited longest had its last token."""


@dataclass(slots=True)
class _Seat:
    """One engine, as far as turns go."""

    need: Need
    since: float = 0.0
    """When it became ready."""
    number: int = 0
    """Order in which engines became ready; that of two at the same time, too."""
    is_ready: bool = False
    began: float = 0.0
    """When its turn began."""
    step_s: float = 0.0
    """What a step without prompts takes; 0: not known yet."""
    token_s: float = 0.0
    """What each token of prompts adds; 0: not known yet."""
    had_prompts: bool = False
    """Its last turn took tokens of prompts."""

    def learn(self, prompt_tokens: int, took_s: float, least_tokens: int) -> None:
        """Take note of what a step took."""
        if took_s < _LAUNCH_S:
            return
        if not prompt_tokens or took_s < self.step_s:
            self.step_s = _learned(self.step_s, took_s, self.step_s)
        elif 2 * prompt_tokens >= least_tokens:  # a shorter piece costs what any step costs
            token_s = (took_s - self.step_s) / prompt_tokens
            self.token_s = _learned(self.token_s, token_s, self.token_s or token_s)


def _learned(known_s: float, took_s: float, before_s: float) -> float:
    if known_s:
        took_s = min(max(took_s, known_s / _FACTOR), known_s * _FACTOR)
    return before_s + _WEIGHT * (took_s - before_s)


class Turns:
    """Gives turns to the engines of one device, one at a time."""

    def __init__(self, target_s: float, least_tokens: int) -> None:
        """`least_tokens`: of prompts, that a step may always have."""
        self._target_s = target_s
        self._least_tokens = least_tokens
        self._seats: dict[int, _Seat] = {}
        self._last_seat = self._last_number = 0
        self._taken: int | None = None
        """Whose turn it is."""
        self._following: int | None = None
        """Who has the next one for certain."""
        self._gone: set[int] = set()
        """Engines that decode and had a turn since the last one for prompts, or in this round."""
        self._gone_before: set[int] = set()
        """The same before the turn that is taken."""
        self._spent_s = 0.0
        """What prompts took of this round, which begins with its turn for prompts only."""

    def join(self) -> int:
        """Return the seat of a new engine."""
        self._last_seat += 1
        self._seats[self._last_seat] = _Seat(Need())
        return self._last_seat

    def leave(self, seat: int) -> None:
        """Forget an engine that is closed."""
        self._seats.pop(seat, None)
        self._gone.discard(seat)
        if self._taken == seat:
            self._taken = None
        if self._following == seat:
            self._following = None

    def ready(self, seat: int, need: Need, now: float) -> None:
        """Take note that an engine waits for a turn."""
        one = self._seats[seat]
        assert not one.is_ready
        self._last_number += 1
        one.is_ready, one.need, one.since, one.number = True, need, now, self._last_number

    def rest(self, seat: int) -> None:
        """Take note that an engine wants no turn, or makes no use of its own: it has nothing to do."""
        one = self._seats[seat]
        one.is_ready, one.need, one.had_prompts = False, Need(), False
        if self._following == seat:
            self._following = None
        if self._taken == seat:  # as if it had not been: it is nobody's turn for prompts
            self._taken, self._gone = None, self._gone_before & self._seats.keys()

    def begin(self, now: float) -> int | None:
        """Return whose turn begins; None: it is somebody's turn already, or nobody waits."""
        ready = {seat: one for seat, one in self._seats.items() if one.is_ready}
        if self._taken is not None or not ready:
            return None
        seat, is_new_round = self._choice(ready)
        if (
            self._following is not None
        ):  # the same, but for who came with a need that nobody foresaw
            seat, is_new_round = self._following, self._following in self._gone
            self._following = None
        self._gone_before = set(self._gone)
        if is_new_round:
            self._gone.clear()
            self._spent_s = 0.0
        one = ready[seat]
        if one.need.decoding:
            self._gone.add(seat)
        one.is_ready, one.began, self._taken = False, now, seat
        return seat

    def _choice(self, ready: Mapping[int, _Seat]) -> tuple[int, bool]:
        """Return who of them goes first, and whether a round begins with it."""
        due = [seat for seat, one in ready.items() if one.need.decoding and seat not in self._gone]
        is_new_round = not due
        if is_new_round:
            due = [seat for seat, one in ready.items() if not one.need.decoding] or list(ready)
        seat = min(due, key=lambda seat: (self._deadline(ready[seat]), ready[seat].number))
        return seat, is_new_round

    def following(self) -> int | None:
        """Return who goes when the turn under way has ended, whoever asks until then; None: it is open."""
        ready = {seat: one for seat, one in self._seats.items() if one.is_ready}
        if self._taken is None or self._following is not None or not ready:
            return None
        seat, is_new_round = self._choice(ready)
        if not ready[seat].need.decoding:
            return None
        away = self._seats.keys() - ready.keys() - {self._taken}
        if not is_new_round:  # who has prompts only comes behind those who decode, in this one
            away = {one for one in away if self._seats[one].need.decoding} - self._gone
        return None if away else seat

    def follow(self, seat: int) -> None:
        """Take note that the job of who is `following` is behind the one under way."""
        self._following = seat

    def ended(self, seat: int, prompt_tokens: int, now: float, draws: int = 0) -> None:
        """Take note that a turn has ended, and with it a step with so many tokens of prompts.

        `draws`: sessions that have a token by it and wait for the next one. Who is next plans before
        their engine asks again, and must know of them.
        """
        if self._taken != seat:
            return
        self._taken = None
        one = self._seats[seat]
        if draws:
            one.need = Need(draws, now)
        one.had_prompts = prompt_tokens > 0
        if prompt_tokens:
            self._spent_s += max(0.0, now - one.began - one.step_s)
        one.learn(prompt_tokens, now - one.began, self._least_tokens)

    def prompt_tokens(self, seat: int) -> int | None:
        """Return how many tokens of prompts its next step may have; None: any number."""
        others = [one for other, one in self._seats.items() if other != seat and one.need.decoding]
        if not others:
            return None
        own = self._seats[seat]
        left_s = self._target_s - own.step_s - sum(one.step_s for one in others)
        # A round has a turn of each that decodes, and one more for those that don't.
        sharing = 1 + sum(one.had_prompts for one in others)
        if own.need.decoding:
            sharing += any(
                one.had_prompts and not one.need.decoding for one in self._seats.values()
            )
        left_s = min(left_s / sharing, left_s - self._spent_s)
        if not own.token_s or left_s <= 0:
            return self._least_tokens
        return max(self._least_tokens, int(left_s / own.token_s))

    def _deadline(self, one: _Seat) -> float:
        return (one.need.oldest if one.need.decoding else one.since) + self._target_s
