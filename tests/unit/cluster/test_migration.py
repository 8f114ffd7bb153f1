import pytest

from sllm_node.cluster.migration import (
    DESTINATION,
    ENTRY,
    HOLDER,
    EntryEvent,
    EntryState,
    HolderEvent,
    HolderState,
)


@pytest.mark.parametrize(("table", "states"), [(ENTRY, EntryState), (HOLDER, HolderState)])
def test_every_state_has_a_row_and_only_the_end_has_no_way_out(table, states):
    assert set(table) == set(states)
    assert [state for state, row in table.items() if not row] == [states.ENDED]


@pytest.mark.parametrize(("table", "events"), [(ENTRY, EntryEvent), (HOLDER, HolderEvent)])
def test_every_event_happens_somewhere(table, events):
    assert {event for row in table.values() for event in row} == set(events)


def test_a_session_can_be_cancelled_and_a_holder_released_in_every_state():
    assert all(EntryEvent.CANCELLED in row for row in ENTRY.values() if row)
    assert all(HolderEvent.RELEASED in row for row in HOLDER.values() if row)


def test_only_a_destination_becomes_the_owner():
    granted = {state for state, row in HOLDER.items() if HolderEvent.GRANTED in row}
    assert granted < DESTINATION
