"""A brake for forked nodes (`forked`), so that tests do not depend on how fast a node is.

The tiny models generate all their tokens within moments, or don't, as the machine likes; a test that
does something to a running session must not depend on that. While the file `brake` lies beside the
node's configuration, each decode step takes `STEP_S`, and where a session has `SLOW_FROM` tokens
`LATE_S`: whatever a test does in between, however slow the machine, the session is not over before.
Prompts and what a move computes ahead are not held, and every step ends: moves make progress.

While the file `hold` lies there, the node sends of each file that peers ask for only what comes first.
"""

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Final

BRAKE: Final = "brake"
HOLD: Final = "hold"
STEP_S: Final = 0.02
SLOW_FROM: Final = 150
LATE_S: Final = 1.0
LOOK_S: Final = 0.01
"""How long it takes until a step sees that the brake is off."""


def put_brakes_on(folder: Path) -> None:
    """Change this process: it becomes a node that is slow while its folder says so."""
    _install(folder / BRAKE)
    _install_hold(folder / HOLD)


def _install(brake: Path) -> None:
    """Let steps that draw tokens of sessions under way take their time."""
    from sllm_node.engine.runner import Runner, StepPart
    from sllm_node.engine.sampling import Drawn

    advance = Runner.advance
    never = threading.Event()

    def braked(self: Runner, steps: Sequence[Sequence[StepPart]]) -> list[Drawn | None]:
        drawn = [part.draw.index for step in steps for part in step if part.draw is not None]
        last = max(drawn, default=0)  # of a first token it is 0
        until = monotonic() + (LATE_S if last >= SLOW_FROM else STEP_S)
        while last and (left := until - monotonic()) > 0 and brake.exists():
            never.wait(min(left, LOOK_S))
        return advance(self, steps)

    Runner.advance = braked  # type: ignore[method-assign]


def _install_hold(hold: Path) -> None:
    """Let ranges of files behind the first wait."""
    from sllm_node.checkpoint.catalog import Checkpoint
    from sllm_node.cluster.file_messages import AskFile
    from sllm_node.cluster.giving import Giving
    from sllm_node.cluster.transport import Reply

    send = Giving._send

    async def held(
        self: Giving, ask: AskFile, found: tuple[Checkpoint, Path], reply: Reply
    ) -> None:
        while ask.first and hold.exists():
            await asyncio.sleep(LOOK_S)
        await send(self, ask, found, reply)

    Giving._send = held  # type: ignore[method-assign]
