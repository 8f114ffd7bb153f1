"""The migration protocol in every order of events: see `migration_world` for what is explored.

Asserted in each state: at most one node decodes in an epoch and none in one that was not granted; the
reader's tokens are only ever extended, and each follows from those before it, whoever made it; places are
held exactly by those who need them; nothing is done for what has ended. Of all states together: from each
there is a way to the end that needs no luck (no cancel, no crash).
"""

import msgspec
import pytest

from sllm_node.cluster.entry import Entry
from sllm_node.cluster.migrations import Migrations
from tests.sim.migration_world import EagerPace, LatePace, NearPace, Setting, World, explore

PAIR = ("a", "b")

SETTINGS = {
    "no migration": Setting("a", "b", resends=True, attempts=2),
    "a migration, no round": Setting("a", "b", moves=("c",)),
    "a migration, rounds": Setting("a", "b", moves=("c",), tokens=3, pace=LatePace),
    "the reader goes away": Setting("a", "b", moves=("c",), cancels=True),
    "one of three dies": Setting("a", "b", moves=("c",), crashes=("a", "b", "c"), tokens=1),
    "the source dies": Setting("a", "b", moves=("c",), crashes=("b",)),
    "entry and source are one": Setting("a", "a", PAIR, moves=("b",), crashes=PAIR),
    "entry and destination are one": Setting(
        "a", "b", PAIR, moves=("a",), crashes=PAIR, cancels=True
    ),
    "a node dies and comes back": Setting(
        "a", "b", PAIR, moves=("a",), crashes=PAIR, restarts=True, tokens=1
    ),
    "messages come again as new ones": Setting("a", "b", PAIR, moves=("a",), resends=True),
    "old copies after a failure": Setting("a", "b", PAIR, attempts=2, refusals=1, pace=LatePace),
    "old copies make new holders": Setting("a", "b", moves=("c",), attempts=2),
    "somebody is wrongly taken for dead": Setting(
        "a", "b", moves=("c",), suspicions=1, tokens=1
    ),
    "apart without a migration": Setting("a", "b", PAIR, suspicions=2),
    "no memory, or a failed step": Setting("a", "b", PAIR, moves=("a",), refusals=1),
    "a drain": Setting("a", "b", PAIR, drains=PAIR),
    "a drain during a migration": Setting("a", "b", moves=("c",), drains=("b", "c"), tokens=1),
    "a second migration": Setting("a", "b", PAIR, moves=("a", "b")),
}  # fmt: skip

LARGE = {
    "one of three dies": Setting("a", "b", moves=("c",), crashes=("a", "b", "c"), pace=LatePace),
    "entry and source are one": Setting(
        "a", "a", PAIR, moves=("b",), crashes=PAIR, cancels=True, pace=LatePace
    ),
    "a node dies and comes back": Setting(
        "a", "b", PAIR, moves=("a",), crashes=PAIR, restarts=True
    ),
    "somebody is wrongly taken for dead": Setting("a", "b", moves=("c",), suspicions=1),
    "twice": Setting("a", "b", PAIR, moves=("a",), suspicions=2, tokens=1, recoveries=2),
    "no memory, or a failed step": Setting("a", "b", moves=("c",), refusals=2),
    "a second migration": Setting("a", "b", moves=("c", "b"), cancels=True),
    "a gap of one token, and deaths": Setting(
        "a", "b", PAIR, moves=("a",), crashes=PAIR, tokens=3, pace=NearPace
    ),
}  # fmt: skip


def check(setting):
    found = explore(setting, states_max=4_000_000)
    print(f"{found.states} states, {found.transitions} transitions, ends: {found.ends}")  # noqa: T201 - with -s
    assert found.stuck == []
    assert found.ends["finished"] > 0
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_session_has_one_owner_and_its_tokens_once_and_ends(name):
    check(SETTINGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_so_it_is_in_larger_settings(name):
    check(LARGE[name])


def test_without_losses_every_session_is_finished():
    assert set(check(Setting("a", "b", moves=("c",), resends=True, tokens=1)).ends) == {"finished"}


def test_a_gap_of_one_token_is_handed_over_at_once_or_behind_a_round_and_a_larger_one_never():
    found = check(Setting("a", "b", moves=("c",), tokens=3, pace=NearPace))
    assert {(1,), (2, 1), (3, 0)} <= found.rounds
    assert {rounds[-1] for rounds in found.rounds} == {0, 1}


class GullibleEntry(Entry):
    """Takes tokens of anybody."""

    def on_tokens(self, sender, message, now):
        if self.owner is not None:
            sender = self.owner.node
            message = msgspec.structs.replace(message, epoch=self.owner.epoch)
        super().on_tokens(sender, message, now)


class DeafMigrations(Migrations):
    """Never lets go."""

    def _on_release(self, sender, message):
        pass


class PlantedWorld(World):
    """A world with a mistake in it, to see that it is found."""

    def _do_begin(self, node, jobs, to):
        super()._do_begin(node, jobs, to)
        (entry,) = node.entries.values()
        entry.__class__ = GullibleEntry


class DeafWorld(World):
    def _make_effect(self, place, local, event):
        if local.node is not None:
            local.node.__class__ = DeafMigrations
        return super()._make_effect(place, local, event)


def test_an_entry_that_takes_tokens_of_anybody_is_found_out():
    with pytest.raises(AssertionError):
        explore(Setting("a", "b", moves=("c",), pace=EagerPace), world=PlantedWorld)


def test_a_node_that_never_lets_go_is_found_out():
    assert explore(Setting("a", "b", moves=("c",)), world=DeafWorld).stuck
