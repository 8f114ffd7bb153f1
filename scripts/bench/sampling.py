"""Drawing tokens on the CPU: `engine/draw.py` beside sampling row by row, the tests' reference.

    python -m scripts.bench.sampling [--rows 1 32 128] [--vocabulary 128256] [--samples 5]

`greedy`, `temperature`: all rows alike; `full`: every row with top-k, top-p, min-p and penalties over
a prompt of 500 and an output of 200 tokens; `mixed`: greedy, temperature, top-p, and penalties in
turn. Milliseconds of one core for a step's rows, whoever else is busy, the best of the samples, which
alternate; new counts making the plan, drawing and reading; what penalties know is kept up by sessions
and not counted.
"""

import argparse
import time
from collections.abc import Callable

import torch

from sllm_node.core.types import SamplingParameters
from sllm_node.engine.adjustments import adjustments
from sllm_node.engine.draw import sample
from sllm_node.engine.sampling import SamplingRow
from tests.unit.engine import sampling_reference
from tests.unit.engine.sampling_reference import ReferenceRow

PROMPT, OUTPUT = tuple(range(500)), tuple(range(400, 600))
GREEDY = SamplingParameters(temperature=0.0)
PLAIN = SamplingParameters(temperature=0.8)
TOP_P = SamplingParameters(temperature=0.8, top_p=0.95)
FULL = SamplingParameters(
    temperature=0.8, top_k=50, top_p=0.95, min_p=0.01,
    repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1,
)  # fmt: skip
PENALISED = SamplingParameters(temperature=0.8, frequency_penalty=0.1)
CASES = {
    "greedy": (GREEDY,), "temperature": (PLAIN,), "full": (FULL,),
    "mixed": (GREEDY, PLAIN, TOP_P, PENALISED),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--samples", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("case         rows   old ms   new ms  old / new")
    for count in asked.rows:
        logits = torch.randn(count, asked.vocabulary, generator=torch.Generator().manual_seed(0))
        for name, settings in CASES.items():
            old, new = compare(logits * 4, settings, asked.samples)
            print(f"{name:12} {count:4} {old * 1e3:8.2f} {new * 1e3:8.2f} {old / new:10.2f}")


def compare(
    logits: torch.Tensor, settings: tuple[SamplingParameters, ...], samples: int
) -> tuple[float, float]:
    """Return the seconds of the old and the new way, which must say the same."""
    old = [
        ReferenceRow(settings[i % len(settings)], i, None, PROMPT, OUTPUT)
        for i in range(len(logits))
    ]
    new = [
        SamplingRow(r.parameters, r.index, None, adjustments(r.parameters, PROMPT, OUTPUT))
        for r in old
    ]
    assert sampling_reference.sample(logits, old) == sample(logits, new)
    pairs = [
        (timed(lambda: sampling_reference.sample(logits, old)), timed(lambda: sample(logits, new)))
        for _ in range(samples)
    ]
    return min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)


def timed(job: Callable[[], object]) -> float:
    began = time.process_time()
    job()
    return time.process_time() - began


if __name__ == "__main__":
    main()
