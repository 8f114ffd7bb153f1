"""How near a decode step comes to the memory's rate: our kernels one by one, and whole steps of 32 layers.

    python -m scripts.bench.decode_step [--device 0] [--out FILE] [--limit-s 100] [--only products ...]

Shapes are those of an 8B Llama in bf16, weights are random. Everything is captured in CUDA graphs and
goes round through the weights of 32 layers, so that no cache helps; times are medians of replays. Rates
are of weights, or of keys and values, read; the ceiling is a copy within the device in the same process,
counted as bytes read and written. cuBLAS gets q, k, v and gate, up as one matrix each, without norm,
residual or activation. Each section runs in a process of its own: one that fails does not end the rest.
`ours in turn`: without letting a kernel start before the one before it has ended; `ours, out ahead`: all
of `out` comes into the L2 cache beside attention. Tunings are written warps/steps/tiles/blocks/ahead, as in
`engine.decode_kernels.Tuning`; `best` compares the best one with the one that a shape gets. Attention is
measured by splits, and once with the rotation before it, as it comes in a step.
"""

import argparse
import contextlib
import faulthandler
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from sllm_node.bench.devices import open_device
from sllm_node.core.units import GIB, MIB
from sllm_node.device.step_kernels import StepKernels
from sllm_node.engine import decode_kernels as ours
from sllm_node.engine import paged_attention as paged

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, INNER, VOCABULARY = 32, 4096, 32, 8, 128, 14336, 128256
QKV = (HEADS + 2 * KV_HEADS) * HEAD
CUTS = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
BLOCK_TOKENS = 16
REPLAYS = 7
SECTIONS = ("products", "tuning", "attention", "steps")
TUNINGS = (
    ours.DEFAULT_TUNING,
    ours.NARROW_TUNING,
    ours.Tuning(8, 4, 1, 2, 2),
    ours.Tuning(8, 2, 1, 4),
    ours.Tuning(4, 4, 1, 4),
    ours.Tuning(4, 2, 1, 6),
    ours.Tuning(16, 2, 1, 2),
    ours.Tuning(8, 8, 1, 1),
    ours.Tuning(16, 2, 2, 1),
)
OUT_AHEAD = ours.Tuning(ahead=2)
"""The rest of a tile of 4,096: while attention computes, the memory has time for it."""
ATTENTIONS = ((1, 256), (1, 1024), (1, 32768), (8, 1024), (32, 1024), (32, 8192), (128, 2048))
DTYPE, DEVICE = torch.bfloat16, "cuda"


def random(*shape: int, scale: float = 0.02) -> torch.Tensor:
    """Return random bf16 on the GPU."""
    return torch.empty(*shape, dtype=DTYPE, device=DEVICE).normal_(0, scale)


def parts(packed: torch.Tensor, dimension: int) -> tuple[torch.Tensor, ...]:
    """Return the parts of queries, keys and values."""
    ends = (CUTS[0], CUTS[0] + CUTS[1])
    return torch.tensor_split(packed, ends, dimension)


def captured_ms(work: Callable[[], object]) -> float:
    """Return the milliseconds of one replay of `work` as a graph; the median of several."""
    torch.cuda.synchronize()
    work()  # compiles and loads what it needs
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        begun, ended = events
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(float(begun.elapsed_time(ended)))
    return statistics.median(times)


def copy_gbps() -> float:
    """Return the rate of a copy within the device, read and written."""
    source = torch.empty(4 * GIB, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = captured_ms(lambda: target.copy_(source))
    return 2 * source.numel() / ms / 1e6


class Report:
    """What a section found; lines are printed as they come."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def put(self, key: str, values: dict[str, Any]) -> None:
        """Keep and print one line."""
        self.found[key] = values
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in values.items()
        )
        print(key.ljust(26), "  ".join(shown), flush=True)

    @contextlib.contextmanager
    def attempt(self, key: str) -> Iterator[None]:
        """Let the rest go on when this fails."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are measured
            traceback.print_exc()
            self.put(key, {"error": f"{type(error).__name__}: {error}"[:300]})


@dataclass
class Layer:
    """The weights of one layer."""

    qkv: torch.Tensor
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    first_norm: ours.RmsNorm
    second_norm: ours.RmsNorm


def layer() -> Layer:
    """Return random weights."""
    return Layer(
        random(QKV, HIDDEN), random(HIDDEN, HEADS * HEAD), random(2 * INNER, HIDDEN),
        random(HIDDEN, INNER), norm(), norm(),
    )  # fmt: skip


def norm() -> ours.RmsNorm:
    """Return random weights of a norm."""
    return ours.RmsNorm(1 + random(HIDDEN), 1e-5)


class Products:
    """The products of a layer by our kernel, and by cuBLAS, with outputs of their own."""

    NAMES = ("qkv", "out", "gate_up", "down", "head")

    def __init__(self, kernels: Any, layers: list[Layer], rows: int) -> None:
        self.kernels, self.layers = kernels, layers
        self.x, self.wide = random(rows, HIDDEN, scale=1), random(rows, INNER, scale=1)
        self.packed, self.residual = random(rows, QKV), random(rows, HIDDEN)
        self.head, self.logits = torch.empty(0), torch.empty(0)

    def weight(self, name: str, one: Layer) -> torch.Tensor:
        """Return a matrix by its name."""
        found: torch.Tensor = self.head if name == "head" else getattr(one, name)
        return found

    def launch(self, name: str, one: Layer, tuning: ours.Tuning | None) -> None:
        """Launch one product of ours."""
        if name == "gate_up":
            unit = ours.GatedUnit(one.gate_up[:INNER], one.gate_up[INNER:])
            ours.gated_linear(self.kernels, self.x, unit, self.wide, one.second_norm, tuning)
            return
        residual = before = None
        if name == "qkv":
            outputs, before = parts(self.packed, 1), one.first_norm
            pairs = zip(parts(one.qkv, 0), outputs, strict=True)
            matrices = [ours.Matrix(weight, output) for weight, output in pairs]
        elif name == "head":
            matrices, before = [ours.Matrix(self.head, self.logits)], one.first_norm
        else:
            residual = self.residual
            matrices = [ours.Matrix(self.weight(name, one), self.residual)]
        x = self.wide if name == "down" else self.x
        ours.linear(self.kernels, x, matrices, before, residual, tuning)

    def launch_torchs(self, name: str, one: Layer) -> None:
        """Launch the same product of torch's."""
        functional.linear(self.wide if name == "down" else self.x, self.weight(name, one))

    def launch_all(self, name: str, layers: list[Layer], tuning: ours.Tuning | None) -> None:
        """Launch a product of ours for each layer."""
        for one in layers:
            self.launch(name, one, tuning)

    def launch_torchs_all(self, name: str, layers: list[Layer]) -> None:
        """Launch a product of torch's for each layer."""
        for one in layers:
            self.launch_torchs(name, one)

    def times(self, name: str, tuning: ours.Tuning | None = None) -> tuple[float, float]:
        """Return microseconds of one product of ours, and GB of its weights."""
        layers = self.layers[:4] if name == "head" else self.layers
        ms = captured_ms(partial(self.launch_all, name, layers, tuning))
        return ms * 1e3 / len(layers), self.weight(name, layers[0]).nbytes / 1e9

    def torchs(self, name: str) -> float:
        """Return microseconds of one product of torch's."""
        layers = self.layers[:4] if name == "head" else self.layers
        return captured_ms(partial(self.launch_torchs_all, name, layers)) * 1e3 / len(layers)


def products(kernels: Any, report: Report, gbps: float) -> None:
    """Measure each product for several numbers of rows."""
    layers, head = [layer() for _ in range(LAYERS)], random(VOCABULARY, HIDDEN)
    for rows in (1, 8, 16):
        made = Products(kernels, layers, rows)
        made.head, made.logits = head, random(rows, VOCABULARY)
        for name in Products.NAMES:
            with report.attempt(f"{name} {rows}"):
                us, gb = made.times(name)
                cublas = made.torchs(name)
                report.put(f"{name} {rows}", {
                    "us": us, "share": gb / us * 1e6 / gbps, "cublas_us": cublas,
                    "cublas_share": gb / cublas * 1e6 / gbps, "faster": cublas / us,
                })  # fmt: skip


def tuning(kernels: Any, report: Report, gbps: float) -> None:
    """Try every way to cut each product, for several numbers of rows."""
    layers, head = [layer() for _ in range(LAYERS)], random(VOCABULARY, HIDDEN)
    table: dict[str, dict[str, Any]] = {}
    for rows in (1, 8):
        made = Products(kernels, layers, rows)
        made.head, made.logits = head, random(rows, VOCABULARY)
        for name in Products.NAMES:
            shares: dict[str, Any] = {}
            for one in TUNINGS:
                with report.attempt(f"tuning {name} {rows} {label(one)}"):
                    us, gb = made.times(name, one)
                    shares[label(one)] = gb / us * 1e6 / gbps
            report.put(f"tuning {name} {rows}", shares)
            best = max(shares, key=lambda key: float(shares[key]))
            outputs = 2 * INNER if name == "gate_up" else made.weight(name, layers[0]).shape[0]
            given = label(ours.tuning_for(-(-outputs // 16), kernels.multiprocessors))
            table[f"best {name} {rows}"] = {
                "tuning": best, "share": shares[best], "given": given, "share_of_given": shares[given],
            }  # fmt: skip
    for key, values in table.items():
        report.put(key, values)


def label(one: ours.Tuning) -> str:
    """Return a tuning as people write it."""
    return f"{one.warps}/{one.steps}/{one.tiles}/{one.blocks}/{one.ahead}"


class Cache:
    """A KV cache of several layers for sessions of one length, blocks in random order."""

    def __init__(self, layers: int, sessions: int, tokens: int) -> None:
        blocks = -(-tokens // BLOCK_TOKENS)
        shape = (layers, sessions * blocks * BLOCK_TOKENS, KV_HEADS, HEAD)
        self.keys, self.values = random(*shape, scale=1), random(*shape, scale=1)
        order = torch.randperm(sessions * blocks, device=DEVICE).int()
        self.tables = order.view(sessions, blocks)
        self.lengths = torch.full((sessions,), tokens, dtype=torch.int32, device=DEVICE)
        last = (tokens - 1) // BLOCK_TOKENS
        self.slots = self.tables[:, last] * BLOCK_TOKENS + (tokens - 1) % BLOCK_TOKENS
        self.positions = (self.lengths - 1).float()

    def layer(self, number: int) -> paged.KvTables:
        """Return one layer's part."""
        return paged.KvTables(
            self.keys[number], self.values[number], self.tables, self.lengths, BLOCK_TOKENS
        )


def splits(kernels: Any, query: torch.Tensor, tokens: int) -> paged.Splits:
    """Return the splits for queries of sessions of one length."""
    count = paged.splits_for(query.shape[0] * KV_HEADS, tokens, kernels.multiprocessors)
    return paged.make_splits(count, query, KV_HEADS)


def attend_all(
    kernels: Any, query: torch.Tensor, cache: Cache, made: paged.Splits, repeats: int
) -> None:
    """Launch attention for each layer of `cache`, several times."""
    output, scoring = torch.empty_like(query), paged.Scoring(HEAD**-0.5)
    for number in list(range(len(cache.keys))) * repeats:
        paged.attend(kernels, query, cache.layer(number), scoring, made, output)


def attention(kernels: Any, report: Report, gbps: float) -> None:
    """Measure attention by sessions and length."""
    for sessions, tokens in ATTENTIONS:
        with report.attempt(f"attention {sessions} {tokens}"):
            size = sessions * tokens * KV_HEADS * HEAD * 2 * 2
            layers = max(1, min(LAYERS, 3 * GIB // size))
            cache = Cache(layers, sessions, tokens)
            query = random(sessions, HEADS, HEAD, scale=1)
            chosen = splits(kernels, query, tokens)
            for count in sorted({1, -(-chosen.count // 2), chosen.count, 2 * chosen.count}):
                made = paged.make_splits(min(count, paged.SPLITS_MAX), query, KV_HEADS)
                repeats = max(1, 8 // layers)

                work = partial(attend_all, kernels, query, cache, made, repeats)
                us = captured_ms(work) * 1e3 / (layers * repeats)
                rate = size / us / 1e3
                mark = " chosen" if count == chosen.count else ""
                report.put(f"attention {sessions} {tokens} /{count}{mark}", {
                    "us": us, "gbps": rate, "share": rate / gbps,
                })  # fmt: skip
            del cache
    for sessions in (1, 32):
        with report.attempt(f"rotation {sessions}"):
            step = Step(kernels, [], (random(1, HIDDEN), random(1, HIDDEN)), sessions, 1024)
            angles = step.angles()
            report.put(f"rotation {sessions} 1024", {
                "us": captured_ms(partial(over_layers, step.rotate, angles)) * 1e3 / LAYERS,
                "us_with_attention": captured_ms(partial(over_layers, step.attend, angles)) * 1e3 / LAYERS,
            })  # fmt: skip


def over_layers(work: Callable[[int, ours.Angles], None], angles: ours.Angles) -> None:
    """Do something for each layer."""
    for number in range(LAYERS):
        work(number, angles)


class Step:
    """A whole decode step: tokens in, tokens out."""

    def __init__(self, kernels: Any, layers: list[Layer], tables: tuple[Any, Any], sessions: int,
                 tokens: int) -> None:  # fmt: skip
        self.kernels, self.layers = kernels, layers
        self.embedding, self.head = tables
        self.norm = norm()
        self.cache = Cache(LAYERS, sessions, tokens)
        self.ids = torch.zeros(sessions, dtype=torch.long, device=DEVICE)
        self.hidden, self.delta = random(sessions, HIDDEN), random(sessions, HIDDEN)
        self.normed, self.packed = random(sessions, HIDDEN), random(sessions, QKV)
        self.attended, self.wide = random(sessions, HIDDEN), random(sessions, INNER)
        self.logits = random(sessions, VOCABULARY)
        self.frequencies = 5e5 ** -(torch.arange(0, HEAD, 2, device=DEVICE) / HEAD)
        self.splits = splits(kernels, self.attended.view(sessions, HEADS, HEAD), tokens)
        self.scoring = paged.Scoring(HEAD**-0.5)

    def angles(self) -> ours.Angles:
        """Compute cosines and sines as transformers does."""
        phases = self.cache.positions[:, None] * self.frequencies
        phases = torch.cat((phases, phases), -1)
        return ours.Angles(phases.cos().to(DTYPE), phases.sin().to(DTYPE))

    def rotate(self, number: int, angles: ours.Angles) -> None:
        """Rotate packed queries, and keep keys and values."""
        query, key, value = (t.view(len(t), -1, HEAD) for t in parts(self.packed, 1))
        cache = self.cache.layer(number)
        slots = ours.KvSlots(cache.keys, cache.values, self.cache.slots)
        ours.rotate_and_keep(self.kernels, ours.Heads(query, key, value), angles, slots)

    def attend(self, number: int, angles: ours.Angles) -> None:
        """From packed queries, keys and values to `attended`."""
        self.rotate(number, angles)
        query, output = parts(self.packed, 1)[0], self.attended
        query, output = (t.view(len(t), -1, HEAD) for t in (query, output))
        cache = self.cache.layer(number)
        paged.attend(self.kernels, query, cache, self.scoring, self.splits, output)

    def fused(self, out_tuning: ours.Tuning | None = None) -> None:
        """Run a step on our products."""
        kernels = self.kernels
        torch.index_select(self.embedding, 0, self.ids, out=self.hidden)
        angles = self.angles()
        for number, one in enumerate(self.layers):
            pairs = zip(parts(one.qkv, 0), parts(self.packed, 1), strict=True)
            matrices = [ours.Matrix(weight, output) for weight, output in pairs]
            ours.linear(kernels, self.hidden, matrices, one.first_norm)
            self.attend(number, angles)
            out = [ours.Matrix(one.out, self.hidden)]
            ours.linear(kernels, self.attended, out, None, self.hidden, out_tuning)
            unit = ours.GatedUnit(one.gate_up[:INNER], one.gate_up[INNER:])
            ours.gated_linear(kernels, self.hidden, unit, self.wide, one.second_norm)
            down = [ours.Matrix(one.down, self.hidden)]
            ours.linear(kernels, self.wide, down, None, self.hidden)
        ours.linear(kernels, self.hidden, [ours.Matrix(self.head, self.logits)], self.norm)
        torch.argmax(self.logits, 1, out=self.ids)

    def beside_cublas(self) -> None:
        """Run a step on torch's products."""
        kernels, hidden = self.kernels, self.hidden
        torch.index_select(self.embedding, 0, self.ids, out=hidden)
        angles = self.angles()
        delta = None
        for number, one in enumerate(self.layers):
            ours.rms_norm(kernels, hidden, one.first_norm, self.normed, delta, hidden)
            torch.mm(self.normed, one.qkv.t(), out=self.packed)
            self.attend(number, angles)
            torch.mm(self.attended, one.out.t(), out=self.delta)
            ours.rms_norm(kernels, hidden, one.second_norm, self.normed, self.delta, hidden)
            both = functional.linear(self.normed, one.gate_up)
            ours.gated(kernels, both[:, :INNER], both[:, INNER:], self.wide)
            delta = torch.mm(self.wide, one.down.t(), out=self.delta)
        ours.rms_norm(kernels, hidden, self.norm, self.normed, delta, hidden)
        torch.mm(self.normed, self.head.t(), out=self.logits)
        torch.argmax(self.logits, 1, out=self.ids)


def steps(kernels: Any, report: Report, gbps: float) -> None:
    """Measure whole steps by sessions, with 1,024 tokens each."""
    tokens = 1024
    layers = [layer() for _ in range(LAYERS)]
    tables = random(VOCABULARY, HIDDEN), random(VOCABULARY, HIDDEN)
    matrices = [m for one in layers for m in (one.qkv, one.out, one.gate_up, one.down)]
    weights = sum(m.nbytes for m in matrices) + tables[1].nbytes
    in_turn = StepKernels(*opened[:2], overlaps=False)
    report.put("weights / copy rate", {"gb": weights / 1e9, "ms": weights / gbps / 1e6})
    for sessions in (1, 4, 8, 16, 32):
        kv = sessions * tokens * LAYERS * KV_HEADS * HEAD * 4
        floor = (weights + kv) / gbps / 1e6
        ways: list[tuple[str, Any]] = [("cublas", kernels)]
        if sessions <= ours.ROWS_MAX:
            ways = [
                ("ours", kernels),
                ("ours, out ahead", kernels),
                ("ours in turn", in_turn),
                *ways,
            ]
        for way, launcher in ways:
            with report.attempt(f"step {sessions} {way}"):
                step = Step(launcher, layers, tables, sessions, tokens)
                fused = partial(step.fused, OUT_AHEAD if way == "ours, out ahead" else None)
                ms = captured_ms(step.beside_cublas if way == "cublas" else fused)
                report.put(f"step {sessions} {way}", {
                    "ms": ms, "floor_ms": floor, "share": floor / ms,
                    "tokens_per_s": sessions / ms * 1e3,
                    "finite": bool(torch.isfinite(step.logits).all()),
                })  # fmt: skip


opened: list[Any] = []
"""The context and handle of the device, for kernels that are launched otherwise."""


def section(name: str, ordinal: int, limit_s: float) -> None:
    """Run one section; its last line of output is JSON."""
    faulthandler.dump_traceback_later(limit_s, exit=True)
    torch.cuda.set_device(ordinal)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    torch.empty(1, device=DEVICE)
    report = Report()
    with open_device(f"cuda:{ordinal}", 64 * MIB) as device:
        cuda: Any = device
        opened.extend((cuda.cuda, cuda.cuda.handle))
        kernels = StepKernels(*opened)
        with report.attempt("overlapping launches"):
            row = random(2, HIDDEN)
            captured_ms(partial(ours.rms_norm, kernels, row, norm(), torch.empty_like(row)))
        if report.found:
            kernels = StepKernels(*opened, overlaps=False)
        gbps = copy_gbps()
        torch.cuda.empty_cache()
        report.put(f"copy ({name})", {"gbps": gbps})
        work = {"products": products, "tuning": tuning, "attention": attention, "steps": steps}
        with report.attempt(name):
            work[name](kernels, report, gbps)
        print(json.dumps(report.found), flush=True)


def main() -> None:
    """Run the sections one after another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit-s", type=float, default=100)
    parser.add_argument("--only", nargs="*", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        section(options.section, options.device, options.limit_s)
        return
    found: dict[str, Any] = {}
    end = time.monotonic() + options.limit_s
    order = ("steps", "attention", "tuning", "products")
    for name in (name for name in order if name in options.only):
        left = end - time.monotonic()
        if left < 5:
            print(f"{name}: no time left")
            continue
        command = [sys.executable, "-m", "scripts.bench.decode_step", "--section", name]
        command += ["--device", str(options.device), "--limit-s", f"{left:.0f}"]
        found[name] = run(command)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found))


def run(command: list[str]) -> dict[str, Any]:
    """Run a section, pass on what it prints, and return its JSON."""
    last, lines = "", []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                last = line
            else:
                lines.append(line.rstrip())
                print(line, end="", flush=True)
    if process.returncode or not last:
        print(f"{command[4]}: ended with {process.returncode}")
    found: dict[str, Any] = (
        json.loads(last) if last else {"ended": process.returncode, "lines": lines}
    )
    return found


if __name__ == "__main__":
    main()
