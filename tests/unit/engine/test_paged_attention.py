"""How many parts sessions are cut into, and what attention refuses."""

from dataclasses import replace

import pytest
import torch

from sllm_node.core.errors import KernelError
from sllm_node.engine import paged_attention as paged
from tests.emulation.cpu_kernels import CpuKernels
from tests.unit.engine import decode_cases as cases

RIG = cases.Rig(CpuKernels(), "cpu")
CASE = cases.AttentionCase((20, 5), 8, 2, 64)


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (63, 1), (128, 2), (1024, 16)])
def test_a_short_session_is_cut_no_finer_than_its_tiles(tokens, most):
    assert 0.9 * most <= paged.splits_for(8, tokens, 132) <= most


def test_one_long_session_fills_the_device():
    assert 0.95 * 264 <= 8 * paged.splits_for(8, 32768, 132) <= 264


def test_sessions_that_fill_the_device_are_not_cut():
    assert paged.splits_for(2 * 132, 2048, 132) == 1


def test_sessions_that_fill_most_of_the_device_are_not_cut():
    assert paged.splits_for(32 * 8, 131072, 132) == 1


def asked(**changes):
    cache = cases.laid_out(RIG, CASE)
    query = RIG.random(2, 8, 64)
    given = {"cache": cache, "query": query, "scoring": paged.Scoring(0.1),
             "splits": paged.make_splits(2, query, 2), "output": query.clone()}  # fmt: skip
    given.update({key: change(given[key]) for key, change in changes.items()})
    return given


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": lambda q: q[:, :, :48]}, "heads of 48"),
        ({"query": lambda q: q[:, :7]}, "7 heads for 2"),
        ({"query": lambda q: q.repeat(1, 5, 1)}, "20 heads that share keys"),
        ({"output": lambda o: o.float()}, "output of torch.float32"),
        ({"cache": lambda c: replace(c, lengths=c.lengths.long())}, "lengths of torch.int64"),
        ({"cache": lambda c: replace(c, keys=c.keys[:, :, ::2])}, "keys"),
        ({"cache": lambda c: replace(c, block_tokens=0)}, "blocks of 0"),
        ({"splits": lambda s: replace(s, count=3)}, "fewer sessions or splits"),
        ({"scoring": lambda s: replace(s, window=0)}, "a window of 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(KernelError, match=words):
        paged.attend(CpuKernels(), **asked(**changes))


def test_memory_for_one_split_is_a_token():
    query = torch.zeros(4, 8, 64, dtype=torch.bfloat16)
    splits = paged.make_splits(1, query, 2)
    assert splits.sums.numel() <= 64
    assert splits.arrived.tolist() == [0] * 8
