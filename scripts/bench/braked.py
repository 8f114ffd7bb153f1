"""Nodes that are slowed down and stop at brakes, for benchmarks of moves.

They are forked (`tests.e2e.forked`) and the product but for two things: a step takes `step_s` longer, so that
tiny models decode as slowly as large ones; and a node stops at a brake when its folder has the file
`brake-NAME`: it makes the file `at-NAME` and waits until the first is gone. Brakes: `loading` (memory
taken, the lease there), `resuming` (a step of a session that holds), `last` (the last round has come and is
not taken), `going` (the step of the first token after it). So whoever benches knows where a node stands.
"""

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from typing_extensions import override

from tests.e2e.forked import Change
from tests.e2e.process import NodeProcess

LOOK_S: Final = 0.003


class Brakes:
    """Of one node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kinds: set[str] = set()
        """What the steps that are planned do for sessions that move here."""

    def _arrived(self, name: str) -> bool:
        if not (self.folder / f"brake-{name}").exists():
            return False
        (self.folder / f"at-{name}").touch()
        return True

    def wait(self, name: str) -> None:
        """Stop a thread at a brake."""
        while self._arrived(name):
            time.sleep(LOOK_S)

    async def wait_async(self, name: str) -> None:
        """Stop a task at a brake."""
        while self._arrived(name):  # noqa: ASYNC110 - a file tells of no event
            await asyncio.sleep(LOOK_S)


def put_brakes_on(folder: Path, step_s: float) -> None:
    """Change this process: it becomes a node that can be stopped at will."""
    from sllm_node.cluster.serving import Serving
    from sllm_node.cluster.wire import unpack_extend
    from sllm_node.engine.batch import Batch
    from sllm_node.engine.runner import Runner
    from sllm_node.store.store import Store

    brakes = Brakes(folder)
    acquire, extend, plan, advance = Store.acquire, Serving.extend, Batch.plan, Runner.advance

    async def slow_acquire(self: Any, *arguments: Any, **options: Any) -> Any:
        lease = await acquire(self, *arguments, **options)
        try:
            await brakes.wait_async("loading")
        except asyncio.CancelledError:  # nobody else has the lease yet
            lease.release()
            raise
        return lease

    async def slow_extend(self: Any, sender: Any, payload: bytes, reply: Any) -> None:
        if unpack_extend(payload).lets_go:
            await brakes.wait_async("last")
        await extend(self, sender, payload, reply)

    def watched_plan(self: Any, *arguments: Any) -> Any:
        parts = plan(self, *arguments)
        moved = (part.session for part in parts if part.session.request.held)
        brakes.kinds |= {"resuming" if session.is_holding else "going" for session in moved}
        return parts

    def slow_advance(self: Any, steps: Any, *arguments: Any) -> Any:
        if steps:
            time.sleep(step_s)
        for kind in list(brakes.kinds):
            brakes.kinds.discard(kind)
            brakes.wait(kind)
        return advance(self, steps, *arguments)

    changes = {
        (Store, "acquire"): slow_acquire, (Serving, "extend"): slow_extend,
        (Batch, "plan"): watched_plan, (Runner, "advance"): slow_advance,
    }  # fmt: skip
    for (kind, name), change in changes.items():
        setattr(kind, name, change)


class BrakedNode(NodeProcess):
    """Each life has a log of its own, and `logs` are all of them; made with `braked`."""

    step_s = 0.02
    lives = 0

    @override
    def __enter__(self) -> Self:
        if self.lives:
            self._socket.close()
        self.lives += 1
        self.log = self.folder / f"node-{self.lives}.log"
        return super().__enter__()

    @override
    def _change(self) -> Change:
        return partial(put_brakes_on, step_s=self.step_s)

    @property
    def logs(self) -> list[Path]:
        """The logs of all lives."""
        return [self.folder / f"node-{life}.log" for life in range(1, self.lives + 1)]

    def stop_at(self, *names: str) -> None:
        """Have it stop at these brakes and at no others."""
        for file in [*self.folder.glob("brake-*"), *self.folder.glob("at-*")]:
            file.unlink(missing_ok=True)
        for name in names:
            (self.folder / f"brake-{name}").touch()

    def stands_at(self, name: str) -> bool:
        """Tell whether it has come to a brake."""
        return (self.folder / f"at-{name}").exists()
