"""KV memory in blocks: who holds which, and what those hold that nobody holds any more. Pure.

The tensors are `kv`'s. A block is *blank*, *held* (by one session or by several), or *cached*: full,
known by its key, and held by nobody. Keys form chains: a key is made of the key of the block before
and of the block's own tokens, the first of a salt, so equal keys mean equal tokens from the very
beginning, and equal salts. A session that begins takes the longest run of known blocks and holds
them beside others; nobody writes to them, because they are full.

Who holds a known block holds those before it in its chain too: what is computed twice is exchanged
for what is known (`fill`), and a block whose predecessor is not known stays unknown itself. Blocks
are let go last one first. So, longest unused first, the cached blocks always end with the ones that
others lead to: when blank ones run out, a chain loses its end before its beginning.
Only a session that leaves its first blocks behind (`leave`) lets go of a beginning before its end;
what then can't be found for want of it goes in its turn.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final, NewType

BlockKey = NewType("BlockKey", bytes)
"""Says all that the values in a full block follow from: its tokens, those before them, the salt."""
_KEY_SIZE: Final = 16
"""Bytes; a cryptographic hash, so that nobody can make a prompt that finds another's blocks."""


def root_key(salt: str) -> BlockKey:
    """Return the key before a session's first block."""
    return BlockKey(blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=_KEY_SIZE).digest())


def block_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """Return the key of a full block of `tokens` behind the block `parent`."""
    return BlockKey(blake2b(parent + array("q", tokens).tobytes(), digest_size=_KEY_SIZE).digest())


class Blocks:
    """`total` blocks of `block_tokens` tokens each."""

    def __init__(self, total: int, block_tokens: int, *, is_caching: bool = True) -> None:
        assert total > 0
        self.total = total
        self.block_tokens = block_tokens
        self.is_caching = is_caching
        self._blank = list(range(total - 1, -1, -1))
        self._holders = [0] * total
        self._keys: list[BlockKey | None] = [None] * total
        self._origins: list[int | None] = [None] * total
        """Of known blocks whose values come of decode steps: the first token that these computed."""
        self._known: dict[BlockKey, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Known and held by nobody, let go longest ago first."""

    @property
    def free(self) -> int:
        """Blocks that nobody holds: blank and cached ones."""
        return len(self._blank) + len(self._cached)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and that a session may find."""
        return len(self._cached)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that all blocks together hold."""
        return self.total * self.block_tokens

    @property
    def usage(self) -> float:
        """Part of the blocks that are held, 0 to 1."""
        return 1.0 - self.free / self.total

    def find(self, keys: Iterable[BlockKey]) -> list[int]:
        """Return the blocks known by `keys`, up to the first key that is not known."""
        found: list[int] = []
        for key in keys:
            block = self._known.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def is_of(self, block: int, origin: int | None) -> bool:
        """Tell whether a known block's values come to be as `origin` says; None: they may anyhow."""
        return origin is None or self._origins[block] == origin

    def begin(self, table: list[int], found: Sequence[int], tokens: int) -> bool:
        """Fill an empty `table` with `found` and new blocks, to hold `tokens` tokens.

        False, and nothing taken, if there are too few.
        """
        assert not table
        idle = sum(not self._holders[block] for block in found)
        if self._needed(len(found), tokens) > self.free - idle:
            return False
        for block in found:
            self._hold(block)
        table.extend(found)
        return self.grow(table, tokens)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extend `table` to hold `tokens` tokens; False, and nothing taken, if there are too few."""
        count = self._needed(len(table), tokens)
        if count > self.free:
            return False
        table.extend(self._take() for _ in range(count))
        return True

    def fill(
        self,
        table: list[int],
        index: int,
        key: BlockKey,
        parent: BlockKey | None = None,
        origin: int | None = None,
    ) -> None:
        """Take note that block `index` of `table` is full and written, and known by `key`.

        If another block is known by it already, that one takes its place in `table`, unless it is
        not of the same `origin`; then this one stays unknown. `parent` is the key of the block
        before the first of `table`, if there was one. A step under way has the table as it was and
        goes on reading the other block; only later steps write to that one.
        """
        before = self._keys[table[index - 1]] if index else parent
        is_first = not index and parent is None
        if not self.is_caching or not (is_first or before in self._known):
            return
        block = table[index]
        assert self._holders[block] == 1
        assert self._keys[block] is None
        known = self._known.get(key)
        if known is None:
            self._known[key] = block
            self._keys[block] = key
            self._origins[block] = origin
            return
        if not self.is_of(known, origin):
            return
        self._hold(known)
        self._let_go(block)
        table[index] = known

    def give_back(self, table: list[int]) -> None:
        """Let go of all blocks of `table`, which is empty afterwards; known ones stay cached."""
        for block in reversed(table):
            self._let_go(block)
        table.clear()

    def leave(self, table: list[int], count: int) -> None:
        """Let go of the first `count` blocks of `table`, which begins behind them afterwards."""
        for block in reversed(table[:count]):
            self._let_go(block)
        del table[:count]

    def forget(self) -> None:
        """Know no block any more; what is held stays held."""
        self._blank.extend(self._cached)
        self._cached.clear()
        self._known.clear()
        self._keys = [None] * self.total

    def _needed(self, held: int, tokens: int) -> int:
        return max(0, -(-tokens // self.block_tokens) - held)

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            key = self._keys[block]
            assert key is not None
            del self._known[key]
            self._keys[block] = None
        self._holders[block] = 1
        return block

    def _hold(self, block: int) -> None:
        self._cached.pop(block, None)
        self._holders[block] += 1

    def _let_go(self, block: int) -> None:
        self._holders[block] -= 1
        assert self._holders[block] >= 0
        if self._holders[block]:
            return
        if self._keys[block] is None:
            self._blank.append(block)
        else:
            self._cached[block] = None
