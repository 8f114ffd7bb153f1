"""What decides about sessions that move, in every order of events: see `migration_world` for what is explored.

Asserted in each state: the reader's tokens are only ever extended, each position once, by one owner after another;
at most one node generates, and none is open that the entry does not count on; what comes of others is nobody's.
Of all states together: each run ends, and by itself only with all tokens.
"""

import pytest

from sllm_node.cluster.arbiter import TRANSITIONS, Accept, Arbiter, Close, EntryEvent, EntryState
from tests.sim.migration_world import Setting, explore

SETTINGS = {
    "no move": Setting(tokens=4, moves=0, losses=3, stops=1, chunk=2, in_flight=3),
    "a move": Setting(losses=2, stops=1, chunk=2),
    "a move, rounds": Setting(tokens=4, losses=1, stops=1, rounds=3, in_flight=1),
    "a move, as near as can be": Setting(losses=1, stops=1, is_near=(False,), rounds=4),
    "moves, one after another": Setting(tokens=2, moves=3, losses=2, stops=1),
    "one loss after another": Setting(tokens=2, losses=4, stops=1),
}  # fmt: skip

LARGE = {
    "a move": Setting(tokens=5, losses=3, stops=1, chunk=2),
    "a move, as near as can be": Setting(losses=3, stops=1, is_near=(False,), rounds=4),
    "rounds": Setting(tokens=5, losses=2, stops=1, chunk=2, rounds=4, in_flight=3),
    "moves, one after another": Setting(tokens=4, moves=3, losses=2, stops=1, chunk=2),
    "one loss after another": Setting(moves=2, losses=4, stops=1),
}  # fmt: skip


def check(setting, machine=Arbiter):
    found = explore(setting, machine)
    print(f"{found.states} states, {found.steps} steps, ends: {found.ends}")  # noqa: T201 - with -s
    assert found.stuck == []
    assert found.circle == 0
    assert found.ends["finished"] > 0
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_session_has_one_owner_and_its_tokens_once_and_ends(name):
    check(SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_so_it_is_in_larger_settings(name):
    check(LARGE[name])


@pytest.mark.parametrize("losses", [0, 2])
def test_a_session_that_nobody_stops_is_finished_whatever_it_loses(losses):
    assert set(check(Setting(tokens=2, moves=2, losses=losses)).ends) == {"finished"}


def test_each_entry_of_the_table_is_met():
    met: set[tuple[EntryState, EntryEvent]] = set()

    class Noting(Arbiter):
        def _go(self, event):
            met.add((self.state, event))
            super()._go(event)

    check(Setting(losses=2, stops=1), Noting)
    assert met == {(state, event) for state, row in TRANSITIONS.items() for event in row}


# --- mistakes that must be found ----------------------------------------------------------------


class Gullible(Arbiter):
    """Takes tokens of anybody."""

    def take(self, epoch, start, count, *, is_last):
        return super().take(self.owner or epoch, start, count, is_last=is_last)


class Overlapping(Arbiter):
    """Takes tokens wherever they begin."""

    def take(self, epoch, start, count, *, is_last):
        return super().take(epoch, self.position, count, is_last=is_last)


class TwoOwners(Arbiter):
    """Hands over and lets the source go on."""

    def go_on(self, *, is_near):
        return tuple(a for a in super().go_on(is_near=is_near) if not isinstance(a, Close))


class Forgetful(Arbiter):
    """Leaves the destination of a session that has finished as it is."""

    def take(self, epoch, start, count, *, is_last):
        found = super().take(epoch, start, count, is_last=is_last)
        return tuple(action for action in found if isinstance(action, Accept))


class Thrifty(Arbiter):
    """Gives the epoch of a destination that failed once more."""

    def lost(self, epoch):
        if self.destination is not None and epoch == self.destination.epoch:
            self.epochs -= 1
        return super().lost(epoch)


class Hasty(Arbiter):
    """Hands over to a destination that has told nothing."""

    @property
    def is_reached(self):
        return self.destination is not None


class Gapped(Arbiter):
    """Takes what came since the asking for sent."""

    def stands(self, epoch, position):
        return super().stands(epoch, self.position)


@pytest.mark.parametrize(
    "machine", [Gullible, Overlapping, TwoOwners, Forgetful, Thrifty, Hasty, Gapped]
)
def test_a_mistake_is_found(machine):
    with pytest.raises(AssertionError):
        explore(Setting(losses=2), machine)


class Waiting(Arbiter):
    """Waits until a destination has what nobody has sent it."""

    @property
    def is_reached(self):
        found = self.destination
        return found is not None and found.standing >= self.position


def test_a_session_that_waits_for_ever_is_found():
    assert explore(Setting(losses=1), Waiting).stuck
