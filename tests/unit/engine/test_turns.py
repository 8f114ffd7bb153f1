"""Whose turn it is on a device, also in simulated time with given costs of steps."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.bench.first_come import FirstCome
from sllm_node.engine.turns import Need, Turns

LEAST = 128
MOST = 2048
PROMPTS = Need()


def decoding(oldest, sessions=1):
    return Need(sessions, oldest)


def seats(turns, count):
    return [turns.join() for _ in range(count)]


def order_of(turns, count, took_s=0.0, now=100.0):
    """Return who goes, one after another, when nobody asks again."""
    found = []
    for _ in range(count):
        seat = turns.begin(now)
        found.append(seat)
        now += took_s
        turns.ended(seat, 0, now)
    return found


# --- order --------------------------------------------------------------------------------------


def test_who_waits_longest_for_a_token_goes_first():
    turns = Turns(0.05, LEAST)
    first, second, third = seats(turns, 3)
    for seat, oldest in ((first, 3.0), (second, 1.0), (third, 2.0)):
        turns.ready(seat, decoding(oldest), 5.0)
    assert order_of(turns, 3) == [second, third, first]


def test_it_is_one_engines_turn_at_a_time():
    turns = Turns(0.05, LEAST)
    first, second = seats(turns, 2)
    turns.ready(first, PROMPTS, 0.0)
    turns.ready(second, PROMPTS, 0.0)
    assert (turns.begin(1.0), turns.begin(1.0)) == (first, None)
    turns.ended(first, 0, 2.0)
    assert (turns.begin(2.0), turns.begin(2.0)) == (second, None)


def test_between_two_turns_for_prompts_each_engine_that_decodes_goes_once():
    turns = Turns(0.05, LEAST)
    one, other, reader = seats(turns, 3)
    turns.ready(one, PROMPTS, 0.0)
    turns.ready(other, PROMPTS, 0.0)
    found = []
    for number in range(8):
        if number:
            turns.ready(
                found[-1], decoding(float(number)) if found[-1] == reader else PROMPTS, number
            )
        else:
            turns.ready(reader, decoding(0.0), 0.0)
        found += order_of(turns, 1)
    assert found == [reader, one, reader, other, reader, one, reader, other]


def test_pieces_of_two_prompts_alternate_and_a_short_one_does_not_wait_for_a_long_one():
    turns = Turns(0.05, LEAST)
    long, short = seats(turns, 2)
    turns.ready(long, PROMPTS, 0.0)
    assert order_of(turns, 1) == [long]
    turns.ready(short, PROMPTS, 1.0)
    turns.ready(long, PROMPTS, 2.0)
    assert order_of(turns, 2) == [short, long]


def test_who_rests_or_leaves_has_no_turn():
    turns = Turns(0.05, LEAST)
    first, second, third = seats(turns, 3)
    for seat in (first, second, third):
        turns.ready(seat, PROMPTS, 0.0)
    turns.rest(first)
    turns.leave(second)
    assert turns.begin(1.0) == third
    turns.rest(third)  # it makes no use of it
    assert turns.begin(1.0) is None


def test_a_turn_that_is_not_used_is_not_the_rounds_turn_for_prompts():
    turns = Turns(0.05, LEAST)
    reader, prompted, idle = seats(turns, 3)
    turns.ready(reader, decoding(0.0), 0.0)
    turns.ready(prompted, PROMPTS, 2.0)
    turns.ready(idle, PROMPTS, 1.0)
    assert order_of(turns, 1) == [reader]
    turns.ready(reader, decoding(1.0), 3.0)
    assert turns.begin(3.0) == idle
    turns.rest(idle)
    assert order_of(turns, 2) == [prompted, reader]


def test_who_leaves_in_its_turn_ends_it():
    turns = Turns(0.05, LEAST)
    first, second = seats(turns, 2)
    turns.ready(first, PROMPTS, 0.0)
    assert turns.begin(0.0) == first
    turns.ready(second, PROMPTS, 0.0)
    turns.leave(first)
    assert turns.begin(0.0) == second
    turns.ended(first, 0, 1.0)  # its job ends later
    assert turns.begin(1.0) is None


# --- how much of prompts ------------------------------------------------------------------------


def step(turns, seat, need, tokens, took_s, now=0.0):
    turns.ready(seat, need, now)
    assert turns.begin(now) == seat
    turns.ended(seat, tokens, now + took_s)


def limit(turns, seat, need=PROMPTS):
    """Return how much of prompts it may have in a turn that it makes no use of."""
    turns.ready(seat, need, 0.0)
    assert turns.begin(0.0) == seat
    tokens = turns.prompt_tokens(seat)
    turns.rest(seat)
    return tokens


def test_prompts_are_not_limited_while_nobody_else_decodes():
    turns = Turns(0.05, LEAST)
    one, other = seats(turns, 2)
    step(turns, one, decoding(0.0), 0, 0.01)
    step(turns, other, PROMPTS, 2048, 0.1)
    assert turns.prompt_tokens(one) is None
    assert turns.prompt_tokens(other) is not None
    turns.rest(one)
    assert turns.prompt_tokens(other) is None


def test_a_first_token_limits_the_prompts_of_who_is_next_before_its_engine_asks_again():
    turns = Turns(0.05, LEAST)
    reader, prompted = seats(turns, 2)
    turns.ready(reader, PROMPTS, 0.0)
    assert turns.begin(0.0) == reader
    assert turns.prompt_tokens(prompted) is None
    turns.ended(reader, 5, 0.01, 1)
    assert turns.prompt_tokens(prompted) == LEAST
    turns.rest(reader)  # it was its last
    assert turns.prompt_tokens(prompted) is None


def test_beside_others_readers_a_piece_is_as_long_as_their_target_leaves():
    turns = Turns(0.05, LEAST)
    one, other, third = seats(turns, 3)
    step(turns, one, decoding(0.0), 0, 0.020)  # half of it is known after one step
    assert limit(turns, other) == LEAST  # what its tokens cost is not known
    step(turns, other, PROMPTS, 1000, 0.1)
    assert limit(turns, other) == 400
    step(turns, third, decoding(0.0), 0, 0.040)
    assert limit(turns, other) == 200
    step(turns, third, decoding(0.0), 0, 0.100)
    assert limit(turns, other) == LEAST
    turns.leave(third)
    assert limit(turns, other) == 400


def test_a_target_of_0_means_the_shortest_pieces():
    turns = Turns(0.0, LEAST)
    one, other = seats(turns, 2)
    step(turns, one, decoding(0.0), 0, 0.001)
    step(turns, other, PROMPTS, 1000, 0.001)
    assert limit(turns, other) == LEAST


def test_what_a_short_piece_takes_says_nothing_about_long_ones():
    turns = Turns(0.05, LEAST)
    one, other = seats(turns, 2)
    step(turns, one, decoding(0.0), 0, 0.0)
    step(turns, other, PROMPTS, 1000, 0.1)
    before = limit(turns, other)
    step(turns, other, PROMPTS, 2, 0.1)
    assert limit(turns, other) == before == 500


def known(turns, seat):
    return pytest.approx((turns._seats[seat].step_s, turns._seats[seat].token_s), rel=1e-4)


def test_one_odd_step_changes_what_is_known_by_a_little():
    turns = Turns(0.05, LEAST)
    (one,) = seats(turns, 1)
    for _ in range(20):
        step(turns, one, decoding(0.0), 0, 0.010)
        step(turns, one, decoding(0.0), 1000, 0.110)
    assert known(turns, one) == (0.010, 100e-6)
    step(turns, one, decoding(0.0), 0, 5.0)
    assert known(turns, one) == (0.025, 100e-6)
    step(turns, one, decoding(0.0), 1000, 5.0)
    assert known(turns, one) == (0.025, 250e-6)
    step(turns, one, decoding(0.0), 0, 0.001)
    assert known(turns, one) == (0.015625, 250e-6)


def test_a_turn_that_only_reads_what_was_computed_before_says_nothing():
    turns = Turns(0.05, LEAST)
    (one,) = seats(turns, 1)
    step(turns, one, decoding(0.0), 0, 0.010)
    step(turns, one, decoding(0.0), 1000, 0.105)
    before = known(turns, one)
    step(turns, one, decoding(0.0), 1000, 0.00005)
    step(turns, one, decoding(0.0), 0, 0.00005)
    assert before == (0.005, 100e-6) == known(turns, one)


def test_of_a_step_with_prompts_its_tokens_cost_what_it_takes_longer_than_one_without():
    turns = Turns(0.05, LEAST)
    one, other = seats(turns, 2)
    for _ in range(20):
        step(turns, one, decoding(0.0), 0, 0.010)
        step(turns, one, decoding(0.0), 200, 0.030)
        step(turns, other, decoding(0.0), 0, 0.005)
    assert limit(turns, one, decoding(0.0)) == pytest.approx(350, abs=1)


def test_a_step_with_prompts_shorter_than_what_is_known_of_steps_without_corrects_that():
    turns = Turns(0.05, LEAST)
    (one,) = seats(turns, 1)
    step(turns, one, decoding(0.0), 0, 0.100)
    step(turns, one, decoding(0.0), 128, 0.020)
    assert known(turns, one) == (0.035, 0.0)


def gaps_beside_mixed(mixed, prompted, readers):
    """Return gaps of all who decode, of which `mixed` have endless prompts of their own too."""
    decoding = [Model(0.005, 25e-6, streams=1) for _ in range(mixed + readers)]
    prompted = [Model(0.005, 25e-6) for _ in range(prompted)]
    for model in (*decoding[:mixed], *prompted):
        model.prompts = [(0.0, 10**6)]
    simulate(Turns(0.05, LEAST), [*decoding, *prompted], 4.0, beside=MOST)
    taken = [10**6 - model.prompts[0][1] for model in (*decoding[:mixed], *prompted)]
    return [gap for model in decoding for at, gap in model.gaps if at > 1.0], taken


@pytest.mark.parametrize(
    ("mixed", "prompted", "readers"),
    [(0, 3, 1), (1, 1, 1), (2, 0, 1), (3, 0, 0), (3, 1, 1), (5, 0, 1), (2, 3, 2)],
)
def test_models_that_decode_and_have_prompts_share_one_target_a_round(mixed, prompted, readers):
    gaps, taken = gaps_beside_mixed(mixed, prompted, readers)
    assert max(gaps) < 0.055
    if mixed:
        assert max(taken[:mixed]) < 1.5 * min(taken[:mixed])


def test_where_the_shortest_pieces_leave_no_room_each_has_one_a_round():
    gaps, _ = gaps_beside_mixed(12, 0, 1)
    assert max(gaps) == pytest.approx(13 * 0.005 + 12 * LEAST * 25e-6)


# --- who follows for certain ----------------------------------------------------------------------


def taken_by_one_of_three():
    """Return turns, of the first of three, and the others, which are away."""
    turns = Turns(0.05, LEAST)
    first, second, third = seats(turns, 3)
    turns.ready(first, decoding(0.0), 0.0)
    assert turns.begin(0.0) == first
    return turns, first, second, third


def test_who_decodes_follows_for_certain_although_others_may_come_with_prompts():
    turns, first, second, third = taken_by_one_of_three()
    assert turns.following() is None
    turns.ready(second, decoding(1.0), 1.0)
    assert turns.following() == second
    turns.follow(second)
    turns.ready(third, PROMPTS, 1.0)
    assert (turns.following(), turns.begin(1.0)) == (None, None)
    turns.ended(first, 0, 2.0)
    assert order_of(turns, 2) == [second, third]


def test_nothing_is_certain_about_prompts():
    turns, _, second, _ = taken_by_one_of_three()
    turns.ready(second, PROMPTS, 1.0)
    assert turns.following() is None


def taken_by_the_second_of_three():
    """Return turns in which the first has gone in this round and decodes again, and the third has not asked."""
    turns, first, second, third = taken_by_one_of_three()
    turns.ready(second, decoding(1.0), 1.0)
    turns.ended(first, 0, 2.0, draws=1)
    assert turns.begin(2.0) == second
    turns.ready(first, decoding(2.0), 2.0)
    return turns, first, second, third


def test_it_is_open_who_follows_while_one_that_decodes_may_come_with_an_earlier_deadline():
    turns, first, second, third = taken_by_the_second_of_three()
    turns.ended(second, 0, 3.0, draws=1)
    assert turns.begin(3.0) == first  # a new round, in which the second has not gone
    turns.ready(third, decoding(2.5), 3.0)
    assert turns.following() is None
    turns.ready(second, decoding(3.0), 3.0)
    assert turns.following() == third


def test_a_round_begins_ahead_only_if_nobody_may_come_with_prompts():
    turns, first, _, third = taken_by_the_second_of_three()
    assert turns.following() is None
    turns.leave(third)
    assert turns.following() == first


def test_a_piece_of_the_round_before_is_not_counted_to_the_one_that_was_begun_ahead():
    turns = Turns(0.05, LEAST)
    first, second = seats(turns, 2)
    for seat in (first, second):
        turns.ready(seat, decoding(0.0), 0.0)
    assert turns.begin(0.0) == first
    turns.ended(first, 0, 1.0, draws=1)
    assert turns.begin(1.0) == second
    turns.ready(first, decoding(1.0), 1.0)
    assert turns.following() == first
    turns.follow(first)
    turns.ended(second, 500, 1.04, draws=1)
    assert turns._spent_s > 0
    assert turns.begin(1.04) == first
    assert turns._spent_s == 0


@pytest.mark.parametrize("end", ["rest", "leave"])
def test_who_was_to_follow_and_does_not_gives_its_turn_to_the_next(end):
    turns, first, second, third = taken_by_one_of_three()
    turns.ready(second, decoding(1.0), 1.0)
    turns.follow(second)
    turns.ready(third, decoding(1.5), 1.5)
    getattr(turns, end)(second)
    turns.ended(first, 0, 2.0)
    assert turns.begin(2.0) == third


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_who_follows_for_certain_goes_next_whatever_comes(data):
    count = data.draw(st.integers(2, 4))
    plain, ahead = Turns(0.05, LEAST), Turns(0.05, LEAST)
    away = dict.fromkeys(seats(plain, count), PROMPTS)
    assert seats(ahead, count) == list(away)
    taken, now = None, 0.0
    for _ in range(60):
        now += 0.01
        event = data.draw(st.sampled_from(("ready", "ready", "rest", "follow", "end")))
        if event == "ready" and away:
            seat = data.draw(st.sampled_from(sorted(away)))
            need = away.pop(seat)
            if need.decoding and data.draw(st.booleans()):
                need = PROMPTS  # its sessions have ended
            for turns in (plain, ahead):
                turns.ready(seat, need, now)
        elif event == "rest" and away:
            seat = data.draw(st.sampled_from(sorted(away)))
            away[seat] = PROMPTS
            for turns in (plain, ahead):
                turns.rest(seat)
        elif event == "follow" and (seat := ahead.following()) is not None:
            ahead.follow(seat)
        elif event == "end" and taken is not None:
            draws, prompts = data.draw(st.sampled_from(((0, 9), (1, 0), (2, 200))))
            for turns in (plain, ahead):
                turns.ended(taken, prompts, now, draws)
            away[taken] = decoding(now, draws) if draws else PROMPTS
            taken = None
        if taken is None:
            taken = plain.begin(now)
            assert taken == ahead.begin(now)
            assert plain._gone == ahead._gone
            assert plain._spent_s == ahead._spent_s


# --- nobody starves -----------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_nobody_waits_for_more_turns_than_it_says(data):
    count = data.draw(st.integers(1, 5))
    turns = Turns(0.05, LEAST)
    who = seats(turns, count)
    needs, passed, now = {}, {}, 0.0
    for _ in range(30):
        now += data.draw(st.sampled_from((0.0, 0.01, 0.1)))
        for seat in data.draw(st.sets(st.sampled_from(who))):
            if seat not in needs:
                # An old last token, again and again, as of a session that is never in a step.
                oldest = data.draw(st.sampled_from((0.0, now)))
                needs[seat] = data.draw(st.sampled_from((PROMPTS, decoding(oldest))))
                passed[seat] = []
                turns.ready(seat, needs[seat], now)
        seat = turns.begin(now)
        assert (seat is None) == (not needs)
        if seat is None:
            continue
        need = needs.pop(seat)
        passed.pop(seat)
        for others in passed.values():
            others.append((seat, bool(need.decoding)))
        turns.ended(seat, 0, now)
        for waiting, others in passed.items():
            prompts = sum(not is_decoding for _, is_decoding in others)
            if needs[waiting].decoding:
                assert prompts <= 1
                assert len(others) <= 2 * (count - 1) + 1
            else:
                assert prompts <= count - 1
                assert len(others) <= prompts + (prompts + 1) * (count - 1)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=6))
def test_of_those_that_are_ready_the_earliest_deadline_goes_first_decoding_ones_before(asked):
    turns = Turns(0.05, LEAST)
    keys = {}
    for is_decoding, at in asked:
        seat = turns.join()
        turns.ready(seat, decoding(float(at)) if is_decoding else PROMPTS, 10.0 + at)
        keys[seat] = (not is_decoding, at)
    found = order_of(turns, len(asked))
    assert [keys[seat] for seat in found] == sorted(keys.values())


# --- in simulated time --------------------------------------------------------------------------


@dataclass
class Model:
    """An engine with streams that never end and prompts that wait; times in seconds."""

    decode_s: float
    token_s: float = 50e-6
    streams: int = 0
    prompts: list = field(default_factory=list)
    """(arrival, tokens), in order of arrival."""
    last_token: float = 0.0
    gaps: list = field(default_factory=list)
    first_tokens: list = field(default_factory=list)
    piece: int = 0

    def need(self, now):
        if self.streams:
            return decoding(self.last_token, self.streams)
        return PROMPTS if any(arrival <= now for arrival, _ in self.prompts) else None

    def begin(self, now, limit, beside):
        """Return what its step takes."""
        arrived = self.prompts and self.prompts[0][0] <= now
        budget = min(MOST if limit is None else limit, beside if self.streams else MOST)
        self.piece = min(self.prompts[0][1], budget) if arrived else 0
        return self.decode_s + self.piece * self.token_s

    def end(self, now):
        if self.streams:
            self.gaps.append((now, now - self.last_token))
            self.last_token = now
        if self.piece:
            arrival, tokens = self.prompts[0]
            self.prompts[0] = arrival, tokens - self.piece
            if tokens == self.piece:
                self.prompts.pop(0)
                self.first_tokens.append(now - arrival)


def simulate(order, models, until_s, beside=LEAST):
    """Let the models take turns; whoever had one asks again when the next one has begun."""
    by_seat = {order.join(): model for model in models}
    asking, now, busy = set(), 0.0, None
    while now < until_s:
        for seat, model in by_seat.items():
            need = model.need(now)
            if seat != busy and seat not in asking and need is not None:
                asking.add(seat)
                order.ready(seat, need, now)
        busy = busy or order.begin(now)
        if busy is None:
            arrivals = [model.prompts[0][0] for model in models if model.prompts]
            if not arrivals:
                return
            now = min(arrivals)
            continue
        asking.discard(busy)
        model = by_seat[busy]
        now += model.begin(now, order.prompt_tokens(busy), beside)
        for seat, one in by_seat.items():  # who came while it lasted
            need = one.need(now)
            if seat != busy and seat not in asking and need is not None:
                asking.add(seat)
                order.ready(seat, need, now)
        order.ended(busy, model.piece, now)
        model.end(now)
        busy = order.begin(now)


def p99(values):
    return sorted(values)[int(0.99 * (len(values) - 1))]


def beside_prompts(order, others):
    """Return a reader's gaps while other models take 16,384 tokens each, and when the last has all."""
    reader = Model(0.007, streams=8)
    prompted = [Model(0.007, prompts=[(0.2, 16384)]) for _ in range(others)]
    simulate(order, [reader, *prompted], 6.0)
    last = max(one.first_tokens[0] for one in prompted)
    return [gap for at, gap in reader.gaps if 0.2 < at < 0.2 + last], last


@pytest.mark.parametrize("others", [1, 2, 4])
def test_readers_of_one_model_wait_for_one_piece_however_many_models_have_long_prompts(others):
    fair, fair_last = beside_prompts(Turns(0.05, LEAST), others)
    naive, naive_last = beside_prompts(FirstCome(), others)
    assert p99(naive) == pytest.approx(0.007 + others * (0.007 + MOST * 50e-6))
    assert max(fair) < 0.06
    assert p99(fair) < p99(naive) / (2 * others)
    assert fair_last < 1.35 * naive_last


def test_the_shortest_pieces_bound_readers_by_one_of_them():
    gaps, _ = beside_prompts(Turns(0.0, LEAST), 2)
    assert max(gaps) == pytest.approx(0.007 + 0.007 + LEAST * 50e-6)


def test_a_prompt_is_not_put_off_by_models_that_decode_without_a_pause():
    decoders = [Model(0.005, streams=4) for _ in range(4)]
    prompted = Model(0.007, prompts=[(0.5, 512)])
    simulate(Turns(0.05, LEAST), [*decoders, prompted], 2.0)
    assert prompted.first_tokens[0] < 4 * (4 * 0.005 + 0.007 + LEAST * 50e-6) + 0.02
    assert max(gap for one in decoders for _, gap in one.gaps) < 0.05


def test_of_models_that_only_decode_each_has_its_share():
    models = [Model(cost, streams=1) for cost in (0.002, 0.005, 0.011)]
    simulate(Turns(0.05, LEAST), models, 2.0)
    counts = [len(model.gaps) for model in models]
    assert max(counts) - min(counts) <= 2
