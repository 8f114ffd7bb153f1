import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sllm_node.core.types import ModelId
from sllm_node.store.residency import Residency, Unit, UnitState
from tests.unit.store.handmade import chunk_of

CHUNKS = 6
MODELS = {ModelId("a"): 3, ModelId("b"): 4, ModelId("c"): 9}


def units(count):
    return tuple(Unit(i, 0, i * 10, 10, i * 10, 10) for i in range(count))


def ledger_with(**filled):
    ledger = Residency(CHUNKS)
    for name, count in MODELS.items():
        ledger.open(ModelId(name), units(count))
    for given, count in filled.items():
        load(ledger, given, count)
    return ledger


def load(ledger, name, count):
    for unit in range(count):
        ledger.take(ModelId(name), unit)
        ledger.filled(ModelId(name), unit, verified=True)


def test_a_victim_loses_its_tail_first():
    ledger = ledger_with(a=3, b=3)
    ledger.begin_load(ModelId("c"))
    _, victim = ledger.take(ModelId("c"), 0)
    assert victim == "a"
    assert [chunk_of(ledger, ModelId("a"), unit) is None for unit in range(3)] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("protect", ["pin", "load"])
def test_a_pinned_or_loading_model_is_no_victim(protect):
    ledger = ledger_with(a=3, b=3)
    if protect == "pin":
        ledger.pin(ModelId("a"), pinned=True)
    else:
        ledger.begin_load(ModelId("a"))
    ledger.begin_load(ModelId("c"))
    _, victim = ledger.take(ModelId("c"), 0)
    assert victim == "b"


def test_lent_chunks_are_free_ones_then_those_of_the_least_recently_used_and_two_stay():
    ledger = ledger_with(a=3)
    lent = [ledger.lend() for _ in range(5)]
    assert [taken and taken[1] for taken in lent] == [None, None, None, "a", None]
    assert ledger.free == 0
    assert lent[-1] is None
    ledger.take_back(lent[0][0])
    assert ledger.lend() == (lent[0][0], None)


def test_two_chunks_stay_for_loads_besides_pinned_ones():
    ledger = ledger_with(a=3)
    ledger.pin(ModelId("a"), pinned=True)
    assert ledger.lend() is not None
    assert ledger.lend() is None
    ledger.pin(ModelId("a"), pinned=False)
    assert ledger.lend() is not None


def test_what_could_be_lent_is_known_before_anything_is_evicted():
    ledger = ledger_with(a=3, b=2)
    assert ledger.lendable == 4
    ledger.hold(ModelId("a"), 0)
    ledger.begin_load(ModelId("b"))
    assert ledger.lendable == 3  # one is free, two are a's
    ledger.pin(ModelId("a"), pinned=True)
    assert ledger.lendable == 1
    assert [ledger.lend() is not None for _ in range(2)] == [True, False]
    assert ledger.lendable == 0


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_model_pinned_after_a_loan_leaves_two_chunks_to_each_load(is_pinned):
    ledger = ledger_with()
    ledger.lend()
    load(ledger, "a", 3)
    load(ledger, "c", 2)
    ledger.pin(ModelId("a"), pinned=True)
    ledger.pin(ModelId("c"), pinned=True)
    ledger.pin(ModelId("b"), pinned=is_pinned)
    ledger.begin_load(ModelId("b"))
    taken = [ledger.take(ModelId("b"), unit) for unit in range(3)]
    assert [one and one[1] for one in taken] == ["a", "a", None]
    assert (ledger.bytes_of(ModelId("a")), ledger.bytes_of(ModelId("c"))) == (10, 20)


def test_without_a_loan_pinned_models_keep_all_chunks():
    ledger = ledger_with(a=3, c=3)
    for name in ("a", "c"):
        ledger.pin(ModelId(name), pinned=True)
    ledger.begin_load(ModelId("b"))
    assert ledger.take(ModelId("b"), 0) is None


def test_a_load_without_victims_recycles_its_own_latest_copied_unit():
    ledger = ledger_with(c=6)
    model = ModelId("c")
    ledger.begin_load(model)
    assert ledger.take(model, 6) is None
    for unit in (0, 1):
        ledger.hold(model, unit)
        ledger.unhold(model, unit, copied=True)
    assert ledger.take(model, 6) is not None
    assert chunk_of(ledger, model, 0) is not None
    assert chunk_of(ledger, model, 1) is None


def test_what_is_known_of_a_closed_model_is_gone():
    ledger = ledger_with(a=3)
    ledger.close(ModelId("a"))
    assert not ledger.knows(ModelId("a"))
    assert ledger.bytes_of(ModelId("a")) == 0
    assert not ledger.is_pinned(ModelId("a"))
    assert ledger.free == ledger.chunks == CHUNKS
    assert ledger.models() == ("b", "c")


@pytest.mark.parametrize("is_told_twice", [False, True])
def test_a_damaged_unit_in_use_stays_until_its_last_copy_ends(is_told_twice):
    ledger = ledger_with(a=1)
    ledger.hold(ModelId("a"), 0)
    ledger.hold(ModelId("a"), 0)
    ledger.unhold(ModelId("a"), 0, copied=False)
    ledger.drop(ModelId("a"), 0)
    assert chunk_of(ledger, ModelId("a"), 0) is not None
    assert not ledger.is_verified(ModelId("a"), 0)
    ledger.unhold(ModelId("a"), 0, copied=not is_told_twice)
    if is_told_twice:
        ledger.drop(ModelId("a"), 0)
    assert chunk_of(ledger, ModelId("a"), 0) is None
    assert ledger.free == CHUNKS


class Ledger(RuleBasedStateMachine):
    """Any order of loads, reads, copies, failures, evictions and pins keeps the books right."""

    def __init__(self):
        super().__init__()
        self.ledger = ledger_with()
        self.loading = set()
        self.lent = []

    def slots(self, model):
        return self.ledger._rows[model].slots

    def pick(self, data, model, wanted):
        found = [i for i, slot in enumerate(self.slots(model)) if wanted(slot)]
        return data.draw(st.sampled_from(found)) if found else None

    @rule(model=st.sampled_from(list(MODELS)))
    def begin(self, model):
        if model not in self.loading:
            self.ledger.begin_load(model)
            self.loading.add(model)

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def take(self, data):
        model = data.draw(st.sampled_from(sorted(self.loading)))
        unit = self.pick(data, model, lambda slot: slot.state is UnitState.EMPTY)
        if unit is None:
            return
        safe = {
            (m, i): slot.chunk
            for m in MODELS
            for i, slot in enumerate(self.slots(m))
            if slot.holds or slot.state is UnitState.FILLING or (m in self.loading and m != model)
            or (self.ledger.is_pinned(m) and m != model and not self.lent)
        }  # fmt: skip
        pins = self.pinned_but(model)
        taken = self.ledger.take(model, unit)
        if taken is None:
            assert self.ledger.free == 0
        else:
            assert taken[0] not in self.lent
        for (m, i), chunk in safe.items():
            if (m, i) != (model, unit):
                assert self.slots(m)[i].chunk == chunk
        if self.pinned_but(model) < pins:
            assert len(self.lent) + pins > CHUNKS - 2

    def pinned_but(self, model):
        pinned = [m for m in MODELS if self.ledger.is_pinned(m) and m != model]
        return sum(s.state is not UnitState.EMPTY for m in pinned for s in self.slots(m))

    @rule(
        data=st.data(),
        model=st.sampled_from(list(MODELS)),
        verified=st.booleans(),
        fails=st.booleans(),
    )
    def read_ends(self, data, model, verified, fails):
        unit = self.pick(data, model, lambda slot: slot.state is UnitState.FILLING)
        if unit is None:
            return
        if fails:
            self.ledger.failed(model, unit)
        else:
            self.ledger.filled(model, unit, verified=verified)
            assert self.ledger.is_verified(model, unit) >= verified

    @rule(data=st.data(), model=st.sampled_from(list(MODELS)))
    def hold(self, data, model):
        unit = self.pick(
            data, model, lambda slot: slot.state is UnitState.FILLED and slot.holds < 2
        )
        if unit is not None and model in self.loading:
            assert self.ledger.hold(model, unit) == chunk_of(self.ledger, model, unit)

    @rule(data=st.data(), model=st.sampled_from(list(MODELS)), copied=st.booleans())
    def unhold(self, data, model, copied):
        unit = self.pick(data, model, lambda slot: slot.holds > 0)
        if unit is not None:
            self.ledger.unhold(model, unit, copied=copied)

    @rule(data=st.data(), model=st.sampled_from(list(MODELS)))
    def drop(self, data, model):
        unit = self.pick(data, model, lambda slot: slot.state is UnitState.FILLED)
        if unit is not None:
            self.ledger.drop(model, unit)
            assert not self.ledger.is_verified(model, unit)

    @rule(model=st.sampled_from(list(MODELS)))
    def end(self, model):
        busy = any(slot.holds or slot.state is UnitState.FILLING for slot in self.slots(model))
        if model in self.loading and not busy:
            self.ledger.end_load(model)
            self.loading.discard(model)

    @rule(model=st.sampled_from(list(MODELS)), pinned=st.booleans())
    def pin(self, model, pinned):
        self.ledger.pin(model, pinned=pinned)

    @rule(model=st.sampled_from(list(MODELS)))
    def evict(self, model):
        before = self.ledger.bytes_of(model)
        assert self.ledger.evict(model) == before - self.ledger.bytes_of(model)

    @rule()
    def lend(self):
        protected = [m for m in MODELS if m in self.loading or self.ledger.is_pinned(m)]
        before = [self.ledger.bytes_of(model) for model in protected]
        lendable = self.ledger.lendable
        taken = self.ledger.lend()
        assert (taken is not None) == (lendable > 0)
        assert taken is None or self.ledger.lendable == lendable - 1
        if taken is not None:
            self.lent.append(taken[0])
            pinned = [s for m in MODELS if self.ledger.is_pinned(m) for s in self.slots(m)]
            kept = sum(slot.state is not UnitState.EMPTY for slot in pinned)
            assert len(self.lent) + kept <= CHUNKS - 2
        assert [self.ledger.bytes_of(model) for model in protected] == before

    @precondition(lambda self: self.lent)
    @rule()
    def take_back(self):
        self.ledger.take_back(self.lent.pop())

    @invariant()
    def every_chunk_has_one_owner(self):
        owned = [s.chunk for m in MODELS for s in self.slots(m) if s.state is not UnitState.EMPTY]
        assert sorted(owned + self.ledger._free + self.lent) == list(range(CHUNKS))

    @invariant()
    def sums_are_right(self):
        slots = [slot for model in MODELS for slot in self.slots(model)]
        assert self.ledger.in_flight == sum(
            slot.state is UnitState.FILLING or slot.holds > 0 for slot in slots
        )
        for model in MODELS:
            filled = [
                i for i, slot in enumerate(self.slots(model)) if slot.state is UnitState.FILLED
            ]
            assert self.ledger.bytes_of(model) == 10 * len(filled)
            assert self.ledger._rows[model].tail >= max(filled, default=-1)


TestLedger = Ledger.TestCase
TestLedger.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, derandomize=True
)
