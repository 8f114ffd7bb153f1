"""What kernels of decode steps are asked to compute in tests, on a GPU or emulated on a CPU.

Each check fills outputs with NaN first, computes the truth in float64 from the same inputs, and compares.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from sllm_node.engine import decode_kernels as ours
from sllm_node.engine import decode_reference as reference
from sllm_node.engine import paged_attention as paged

ERROR_MAX = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
WORSE_THAN_TORCH = 1.2
NOISE = 1e-4
"""An error that is small in itself is not compared with torch's."""


@dataclass(frozen=True)
class Rig:
    kernels: Any
    device: str

    def random(self, *shape, seed=0, scale=1.0, dtype=torch.bfloat16):
        made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
        return made.to(self.device, dtype)

    def poisoned(self, *shape, dtype=torch.bfloat16):
        return torch.full(shape, float("nan"), device=self.device, dtype=dtype)


def error(found, truth):
    """Of the norm, per row at worst."""
    found, truth = found.double().flatten(1), truth.double().flatten(1)
    assert torch.isfinite(found).all()
    return float(((found - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-12)).max())


def check(found, truth, torchs=None):
    got = error(found, truth)
    assert got <= ERROR_MAX[found.dtype], got
    if torchs is not None:
        allowed = max(NOISE, WORSE_THAN_TORCH * error(torchs, truth))
        assert got <= allowed, (got, allowed)


@dataclass(frozen=True)
class LinearCase:
    rows: int
    inner: int
    outputs: tuple[int, ...]
    norm: bool = False
    bias: bool = False
    residual: bool = False
    offset: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    tuning: ours.Tuning | None = None


LINEAR = (
    LinearCase(1, 256, (48,)),
    LinearCase(1, 8, (1,)),
    LinearCase(3, 264, (17, 5, 40), bias=True),
    LinearCase(8, 1032, (130,), residual=True, bias=True),
    LinearCase(5, 1000, (96, 32, 32), norm=True),
    LinearCase(8, 2048, (200, 24), norm=True, offset=1.0, bias=True),
    LinearCase(13, 520, (70,), norm=True, residual=True),
    LinearCase(16, 640, (64, 16, 16)),
    LinearCase(2, 2304, (33,), dtype=torch.float16, residual=True),
    LinearCase(4, 1048, (100,), tuning=ours.Tuning(4, 2, 1, 4), norm=True),
    LinearCase(4, 1048, (100, 30), tuning=ours.Tuning(16, 2, 2, 1)),
    LinearCase(7, 3000, (50,), tuning=ours.Tuning(8, 2, 2, 2)),
    LinearCase(3, 4608, (90, 30), tuning=ours.NARROW_TUNING, norm=True),
    LinearCase(2, 6000, (40,), tuning=ours.Tuning(4, 4, 1, 4, 3), residual=True),
)


def check_linear(rig, case):
    made = {"dtype": case.dtype}
    x = rig.random(case.rows, case.inner, seed=1, **made)
    scale = case.inner**-0.5
    weights = [rig.random(n, case.inner, seed=n, scale=scale, **made) for n in case.outputs]
    biases = [rig.random(n, seed=n + 1, **made) if case.bias else None for n in case.outputs]
    norm = None
    if case.norm:
        norm = ours.RmsNorm(rig.random(case.inner, seed=3, **made), 1e-5, case.offset)
    residual = rig.random(case.rows, case.outputs[0], seed=4, **made) if case.residual else None
    outputs = [rig.poisoned(case.rows, n, **made) for n in case.outputs]
    asked = [ours.Matrix(w, o, b) for w, o, b in zip(weights, outputs, biases, strict=True)]
    ours.linear(rig.kernels, x, asked, norm, residual, case.tuning)
    for weight, bias, output in zip(weights, biases, outputs, strict=True):
        check(
            output,
            _linear(x, weight, bias, norm, residual, torch.float64),
            _linear(x, weight, bias, norm, residual, case.dtype),
        )
    if residual is not None:  # in place
        kept = residual.clone()
        ours.linear(rig.kernels, x, [replace(asked[0], output=kept)], norm, kept, case.tuning)
        assert torch.equal(kept, outputs[0])
    if case.rows > 1:  # a row does not depend on others
        alone = rig.poisoned(1, case.outputs[0], **made)
        first = None if residual is None else residual[:1]
        asked[0] = replace(asked[0], output=alone)
        ours.linear(rig.kernels, x[:1], asked[:1], norm, first, case.tuning)
        assert torch.equal(alone, outputs[0][:1])


def _to(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)


def _norm(norm, dtype):
    return replace(norm, weight=norm.weight.to(dtype))


def _linear(x, weight, bias, norm, residual, dtype):
    x = x.to(dtype)
    if norm is not None:
        x = reference.rms_norm(x, _norm(norm, dtype))
    y = functional.linear(x, weight.to(dtype), _to(bias, dtype))
    return y if residual is None else residual.to(dtype) + y


GATED_LINEAR = (
    LinearCase(1, 256, (24,)),
    LinearCase(8, 1096, (61,), norm=True),
    LinearCase(11, 512, (40,), norm=True, offset=1.0),
    LinearCase(3, 264, (8,), dtype=torch.float16),
    LinearCase(6, 1000, (37,), tuning=ours.Tuning(16, 2, 2, 1), norm=True),
)


def check_gated_linear(rig, case, gelu):
    made = {"dtype": case.dtype}
    (size,), scale = case.outputs, case.inner**-0.5
    x = rig.random(case.rows, case.inner, seed=1, **made)
    gate = rig.random(size, case.inner, seed=2, scale=scale, **made)
    up = rig.random(size, case.inner, seed=3, scale=scale, **made)
    norm = None
    if case.norm:
        norm = ours.RmsNorm(rig.random(case.inner, seed=4, **made), 1e-5, case.offset)
    output = rig.poisoned(case.rows, size, **made)
    unit = ours.GatedUnit(gate, up, gelu)
    ours.gated_linear(rig.kernels, x, unit, output, norm, case.tuning)
    results = [
        reference.gated(
            _linear(x, gate, None, norm, None, dtype),
            _linear(x, up, None, norm, None, dtype),
            gelu=gelu,
        )
        for dtype in (torch.float64, case.dtype)
    ]
    check(output, *results)


@dataclass(frozen=True)
class RopeCase:
    tokens: int
    heads: int
    kv_heads: int
    size: int
    rotary: int
    norm: bool = False
    angles: torch.dtype = torch.bfloat16
    dtype: torch.dtype = torch.bfloat16


ROPE = (
    RopeCase(1, 4, 2, 64, 64),
    RopeCase(3, 32, 8, 128, 128, norm=True, angles=torch.float32),
    RopeCase(2, 3, 1, 80, 32),
    RopeCase(2, 8, 1, 256, 128, norm=True),
    RopeCase(5, 2, 2, 96, 96, dtype=torch.float16, angles=torch.float32),
)


def check_rope(rig, case):
    made, slots_max = {"dtype": case.dtype}, 40
    tokens, size = case.tokens, case.size
    packed = rig.random(tokens, (case.heads + 2 * case.kv_heads) * size, seed=1, **made)
    cuts = [case.heads * size, case.kv_heads * size, case.kv_heads * size]
    query, key, value = (t.unflatten(1, (-1, size)) for t in packed.split(cuts, 1))
    phase = torch.rand(tokens, case.rotary // 2, generator=torch.Generator().manual_seed(2)) * 6
    phase = torch.cat((phase, phase), 1)
    angles = ours.Angles(
        phase.cos().to(rig.device, case.angles), phase.sin().to(rig.device, case.angles)
    )
    order = torch.randperm(slots_max, generator=torch.Generator().manual_seed(3))[:tokens].int()
    if tokens > 1:
        order[1] = -1
    keys = rig.poisoned(slots_max, case.kv_heads, size, **made)
    values = keys.clone()
    norms = None
    if case.norm:
        pair = [ours.RmsNorm(rig.random(size, seed=s, **made), 1e-6, 1.0) for s in (5, 6)]
        norms = (pair[0], pair[1])
    wanted = [_rotated(query, angles, norms and norms[0], d) for d in (torch.float64, case.dtype)]
    wanted_keys = [
        _rotated(key, angles, norms and norms[1], d) for d in (torch.float64, case.dtype)
    ]
    slots = ours.KvSlots(keys, values, order.to(rig.device))
    ours.rotate_and_keep(rig.kernels, ours.Heads(query, key, value), angles, slots, norms)
    check(query, *wanted)
    kept = order >= 0
    places = order[kept].long().to(rig.device)
    kept = kept.to(rig.device)
    check(keys[places], *(w[kept] for w in wanted_keys))
    assert torch.equal(values[places], value[kept])
    others = torch.ones(slots_max, dtype=torch.bool, device=rig.device)
    others[places] = False
    assert keys[others].isnan().all()
    assert values[others].isnan().all()


def _rotated(heads, angles, norm, dtype):
    heads = heads.to(dtype)
    if norm is not None:
        heads = reference.rms_norm(heads, _norm(norm, dtype))
    return reference.rotated(heads, angles)


@dataclass(frozen=True)
class AttentionCase:
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    size: int
    splits: int = 1
    window: int | None = None
    softcap: float | None = None
    block_tokens: int = 16
    dtype: torch.dtype = torch.bfloat16


ATTENTION = (
    AttentionCase((1,), 4, 1, 64),
    AttentionCase((17, 0, 64, 203), 8, 2, 128),
    AttentionCase((17, 300, 1, 0), 8, 2, 128, splits=4),
    AttentionCase((100, 515), 6, 6, 80, splits=3),
    AttentionCase((33, 90), 12, 1, 96, splits=2),
    AttentionCase((70, 18), 16, 1, 128, splits=2, softcap=5.0),
    AttentionCase((200, 7), 8, 1, 256, splits=2, window=100),
    AttentionCase((333, 45, 46), 14, 2, 64, splits=5, window=45, block_tokens=24),
    AttentionCase((129,), 9, 1, 256, splits=2),
    AttentionCase((1300, 16, 700), 4, 1, 64, splits=19),
    AttentionCase((64, 65, 257, 512), 16, 2, 96, splits=3),
    AttentionCase((640, 500), 16, 1, 64, splits=11, window=300),
    AttentionCase((250, 31), 10, 2, 128, dtype=torch.float16, splits=3, softcap=30.0),
)


def laid_out(rig, case):
    """Return a cache in which sessions' blocks lie anywhere, and NaN where nobody's tokens are."""
    made = {"dtype": case.dtype}
    counts = [-(-length // case.block_tokens) for length in case.lengths]
    total, most = sum(counts) + 3, max(*counts, 1)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).int()
    tables = torch.full((len(counts), most + 2), 2**30, dtype=torch.int32)
    shape = (total * case.block_tokens, case.kv_heads, case.size)
    keys, values = (rig.random(*shape, seed=s, **made) for s in (2, 3))
    unused = torch.ones(shape[0], dtype=torch.bool)
    first = 0
    for row, (count, length) in enumerate(zip(counts, case.lengths, strict=True)):
        tables[row, :count] = order[first : first + count]
        first += count
        tokens = torch.arange(max(0, length - (case.window or length)), length)
        blocks = tables[row].long()[tokens // case.block_tokens]
        unused[blocks * case.block_tokens + tokens % case.block_tokens] = False
    keys[unused.to(rig.device)] = float("nan")
    values[unused.to(rig.device)] = float("nan")
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=rig.device)
    return paged.KvTables(keys, values, tables.to(rig.device), lengths, case.block_tokens)


def check_attention(rig, case):
    cache = laid_out(rig, case)
    query = rig.random(len(case.lengths), case.heads, case.size, seed=4, dtype=case.dtype)
    scoring = paged.Scoring(1.7 * case.size**-0.5, case.window, case.softcap)
    splits = paged.make_splits(case.splits, query, case.kv_heads)
    output = rig.poisoned(*query.shape, dtype=case.dtype)
    paged.attend(rig.kernels, query, cache, scoring, splits, output)
    there = torch.tensor([length > 0 for length in case.lengths])
    assert not output[~there].any()
    wide = replace(cache, keys=cache.keys.double(), values=cache.values.double())
    truth = reference.attention(query.double(), wide, scoring)
    check(output[there], truth[there], reference.attention(query, cache, scoring)[there])
    again = rig.poisoned(*query.shape, dtype=case.dtype)
    paged.attend(rig.kernels, query, cache, scoring, splits, again)
    assert torch.equal(again, output)  # and the counters are back at 0
    assert not splits.arrived.any()


SIZES = ((1, 8), (3, 264), (20, 4096), (2, 16384), (33, 2056))


def check_norm(rig, rows, size, dtype):
    made = {"dtype": dtype}
    x, delta = rig.random(rows, size, seed=1, **made), rig.random(rows, size, seed=2, **made)
    norm = ours.RmsNorm(rig.random(size, seed=3, **made), 1e-6)
    output, total = rig.poisoned(rows, size, **made), rig.poisoned(rows, size, **made)
    ours.rms_norm(rig.kernels, x, norm, output)
    check(output, reference.rms_norm(x.double(), _norm(norm, torch.float64)),
          reference.rms_norm(x, norm))  # fmt: skip
    ours.rms_norm(rig.kernels, x, norm, output, delta, total)
    assert torch.equal(total, x + delta)
    check(output, reference.rms_norm(total.double(), _norm(norm, torch.float64)),
          reference.rms_norm(total, norm))  # fmt: skip


def check_gated(rig, rows, size, gelu):
    both = rig.random(rows, 2 * size, seed=1)
    gate, up = both.split(size, 1)
    output = rig.poisoned(rows, size)
    ours.gated(rig.kernels, gate, up, output, gelu=gelu)
    truth = reference.gated(gate.double(), up.double(), gelu=gelu)
    check(output, truth, reference.gated(gate, up, gelu=gelu))
