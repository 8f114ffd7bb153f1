"""Run with `python -m tests.e2e.braked serve ...`: a node that decodes slowly while its brake is on.

The tiny models generate all their tokens within moments, or don't, as the machine likes; a test that
does something to a running session must not depend on that. While the file `brake` lies beside the
node's configuration, each decode step takes `STEP_S`, and where a session has `SLOW_FROM` tokens
`LATE_S`: whatever a test does in between, however slow the machine, the session is not over before.
Prompts and what a move computes ahead are not held, and every step ends: moves make progress.
"""

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Final

from sllm_node.cli.main import main
from sllm_node.engine.runner import Runner, StepPart
from sllm_node.engine.sampling import Drawn

BRAKE: Final = "brake"
STEP_S: Final = 0.02
SLOW_FROM: Final = 150
LATE_S: Final = 2.0
LOOK_S: Final = 0.01
"""How long it takes until a step sees that the brake is off."""


def install(brake: Path) -> None:
    """Let steps that draw tokens of sessions under way take their time."""
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


if __name__ == "__main__":
    install(Path(sys.argv[sys.argv.index("--config") + 1]).parent / BRAKE)
    main()
