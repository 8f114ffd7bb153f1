"""What lies apart comes together as torch's indexing brings it, layer by layer."""

import pytest
import torch

from sllm_node.core.errors import KernelError
from sllm_node.engine import gathered
from tests.emulation.cpu_kernels import CpuKernels, is_possible
from tests.unit.engine import decode_cases as cases

RIG = cases.Rig(CpuKernels(), "cpu")
ROOM, KV_HEADS, HEADS, SIZE = 300, 2, 6, 80


def layer(seed=0):
    packed = RIG.random(7, HEADS + 2 * KV_HEADS, SIZE, seed=seed)
    keys, values = (RIG.random(ROOM, KV_HEADS, SIZE, seed=seed + n) for n in (1, 2))
    return packed[:, :HEADS], keys, values


@pytest.mark.skipif(not is_possible(), reason="needs g++")
@pytest.mark.parametrize("rows", [[], [0, 1, 2, 0, 1, 2, 6] * 30])
@pytest.mark.parametrize("tokens", [1, 299])
def test_keys_values_and_queries_are_gathered(tokens, rows):
    slots = torch.randperm(ROOM, generator=torch.Generator().manual_seed(1))[:tokens].int()
    places = torch.tensor(rows, dtype=torch.int32)
    query, keys, values = layer()
    gather = gathered.prepared(RIG.kernels, query, keys, values, slots, places)
    for seed in range(2):
        query, keys, values = layer(seed)
        found = gather(query, keys, values)
        for one, wanted in zip(found, (keys[slots], values[slots], query[places]), strict=True):
            assert torch.equal(one, wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keys": lambda x: x[:, :, :40]}, "keys"),
        ({"values": lambda x: x[:-1]}, "values"),
        ({"query": lambda x: x.half()}, "keys of torch.bfloat16 beside torch.float16"),
        ({"slots": lambda x: x.long()}, "slots of torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    query, keys, values = layer()
    slots = rows = torch.zeros(3, dtype=torch.int32)
    given = {"query": query, "keys": keys, "values": values, "slots": slots, "rows": rows}
    given.update({name: change(given[name]) for name, change in changes.items()})
    with pytest.raises(KernelError, match=words):
        gathered.prepared(RIG.kernels, **given)


def test_a_layer_unlike_the_first_is_refused():
    query, keys, values = layer()
    numbers = torch.zeros(3, dtype=torch.int32)
    gather = gathered.prepared(RIG.kernels, query, keys, values, numbers, numbers)
    with pytest.raises(KernelError, match="unlike"):
        gather(query, keys[:-1], values)
