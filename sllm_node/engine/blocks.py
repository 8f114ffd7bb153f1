"""KV memory in blocks: which are free. Pure; the tensors are `kv`'s."""


class Blocks:
    """`total` blocks of `block_tokens` tokens each."""

    def __init__(self, total: int, block_tokens: int) -> None:
        assert total > 0
        self.total = total
        self.block_tokens = block_tokens
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """Tokens that all blocks together hold."""
        return self.total * self.block_tokens

    @property
    def usage(self) -> float:
        """Part of the blocks in use, 0 to 1."""
        return 1.0 - len(self._free) / self.total

    def needed(self, held: int, tokens: int) -> int:
        """Return how many blocks more one who has `held` needs for `tokens` tokens."""
        return max(0, -(-tokens // self.block_tokens) - held)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extend `table` to hold `tokens` tokens; False, and nothing taken, if there are too few."""
        count = self.needed(len(table), tokens)
        if count > len(self._free):
            return False
        table.extend(self._free.pop() for _ in range(count))
        return True

    def give_back(self, table: list[int]) -> None:
        """Free all blocks of `table`, which is empty afterwards."""
        self._free.extend(reversed(table))
        table.clear()
        assert len(self._free) <= self.total
