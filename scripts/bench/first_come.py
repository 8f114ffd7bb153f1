"""Turns first come, first served, prompts as long as a step may be: what `engine.turns` is compared with."""

from sllm_node.engine.turns import Need


class FirstCome:
    """Gives turns in the order in which they are asked for."""

    def __init__(self) -> None:
        self._last_seat = 0
        self._ready: list[int] = []
        self._taken: int | None = None

    def join(self) -> int:
        """Return the seat of a new engine."""
        self._last_seat += 1
        return self._last_seat

    def leave(self, seat: int) -> None:
        """Forget an engine."""
        self.rest(seat)

    def ready(self, seat: int, need: Need, now: float) -> None:
        """Take note that an engine waits."""
        self._ready.append(seat)

    def rest(self, seat: int) -> None:
        """Take note that an engine wants no turn."""
        self._ready = [one for one in self._ready if one != seat]
        if self._taken == seat:
            self._taken = None

    def begin(self, now: float) -> int | None:
        """Return whose turn begins."""
        if self._taken is None and self._ready:
            self._taken = self._ready.pop(0)
            return self._taken
        return None

    def following(self) -> int | None:
        """Return nobody: jobs begin when it is their turn."""
        return None

    def follow(self, seat: int) -> None:
        """Never asked for."""

    def ended(self, seat: int, prompt_tokens: int, now: float, draws: int = 0) -> None:
        """Take note that a turn has ended."""
        self._taken = None

    def prompt_tokens(self, seat: int) -> int | None:
        """Return no limit."""
        return None
