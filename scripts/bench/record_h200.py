"""Put what runs on H200 machines have left in results/h200 into the register of figures.

    python -m scripts.bench.record_h200

Each figure names the file that it was read from and the command that made it.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any, Final

from scripts.bench.figures import RESULTS, record

FOLDER: Final = RESULTS.parent / "h200"
ONE: Final = "1 x H200 (driver 580.159), 16 cores, 126 GiB, virtual disk, Linux 6.18"
TWO: Final = "2 x H200 (driver 580.159), NVLink, 32 cores, 251 GiB, Linux 6.18"
FOUR: Final = "4 x H200 (driver 580.159), NVLink, 64 cores, 503 GiB, Linux 6.18"
CONTEXT_MAX: Final = 8192
"""Tokens of context up to which the gap of a move is judged."""
LOAD: Final = "python -m scripts.bench.gpu_load --shape"


def read(name: str) -> Any:
    """Return a result file."""
    return json.loads((FOLDER / name).read_text())


def rates(result: dict[str, Any], contestant: str) -> list[float]:
    """Return GB/s of each round."""
    return [result["bytes"] / seconds / 1e9 for seconds in result["samples_s"][contestant]]


def ratios(result: dict[str, Any], ceiling: str) -> list[float]:
    """Return ours over the ceiling, round by round."""
    seconds = result["samples_s"]
    return [c / o for c, o in zip(seconds[ceiling], seconds["ours"], strict=True)]


def put(name: str, samples: Sequence[float], **more: Any) -> None:
    """Record the median of `samples`, or the value given."""
    value = more.pop("value", None)
    rounded = [round(sample, 4) for sample in samples]
    record(name, statistics.median(samples) if value is None else value, rounded, **more)


def main() -> None:
    """Record everything."""
    _one_gpu()
    _storage()
    _codec()
    _several_gpus()
    _latency()
    _engine()
    _moves()


def _one_gpu() -> None:
    dram = read("x1_dram.json")["dram"]
    put(
        "dram_to_gpu_raw_ratio", ratios(dram, "copy"), machine=ONE,
        ceiling=statistics.median(rates(dram, "copy")),
        command=f"{LOAD} 8b --store /dev/shm/s --scenarios dram --chunk 32",
        note="8B shapes, 54.5 GB/s; the ceiling of the 32B run was out of order (27.5 GB/s, below ours)",
    )  # fmt: skip
    large = read("x4_32b.json")["dram"]
    put(
        "load_32b_dram_raw_s", large["samples_s"]["ours"], machine=FOUR,
        command=f"{LOAD} 32b --store /dev/shm/s --devices cuda:0,cuda:1,cuda:2,cuda:3 "
        "--scenarios dram --chunk 32",
        note="53.7 GB/s over one link",
    )  # fmt: skip
    device = read("x1_device.json")
    gib = device["bytes"] / (1 << 30)
    put(
        "pool_startup_gibps", [gib / seconds for seconds in device["pool_s"]], machine=ONE,
        command="python -m scripts.bench.device --pool-gib 16",
        note="16 GiB mapped, touched and registered; the first time, before the memory was touched "
        f"once, {device['pool_first_s']:.2f} s",
    )  # fmt: skip


def _storage() -> None:
    disk = read("x1_disk.json")["disk"]
    put(
        "disk_to_gpu_ratio", ratios(disk, "reader"), machine=ONE,
        ceiling=statistics.median(rates(disk, "reader")),
        command=f"{LOAD} 8b --store DIR --scenarios disk --threads 16 --rounds 2",
        note="2 rounds; a reader whose buffers stay in the processor's caches reached 4.5 GB/s on "
        "this virtual disk, ours through a pool of 512 MiB 4.3",
    )  # fmt: skip
    tmpfs = read("x1_tmpfs_32_16.json")["disk"]
    put(
        "tmpfs_to_gpu_gbps", rates(tmpfs, "ours"), machine=ONE,
        ceiling=statistics.median(rates(tmpfs, "reader")),
        command=f"{LOAD} 8b --store /dev/shm/s --scenarios disk --threads 16 --chunk 32 --rounds 5",
        note="16 cores copy while the GPU reads the same memory; through a pool of 1 GiB 43.2 GB/s",
    )  # fmt: skip
    command = (
        "sllm-node bench load --shape 8b --device cuda:0 --rounds 4 --budget 230 --contestants "
        "sllm_node,safetensors,fastsafetensors,runai,instanttensor"
    )
    peers = {s["scenario"]: s for s in _scenarios()}
    cached, drawn = peers["cached"], peers["random"]
    put(
        "cached_speedup_over_safetensors",
        _speedups(cached["samples"], "safetensors"), machine=ONE, command=command,
        measured_at="d23ae17",
        note="ours encoded, as convert writes it by default there; raw 7.8; over InstantTensor, the "
        "best peer, 1.55 and 1.10",
    )  # fmt: skip
    put(
        "random_speedup_over_best_peer", _speedups(drawn["samples"], "fastsafetensors"),
        machine=ONE, command=command, measured_at="d23ae17",
        note="over fastsafetensors; 2 rounds; ours encoded; raw 0.84, with read_block_bytes as for a "
        "virtual disk: a plain reader got 3.7 GB/s of this disk, fastsafetensors 3.8, ours raw 3.2",
    )  # fmt: skip


def _scenarios() -> list[dict[str, Any]]:
    """Return the samples of each scenario by contestant, without the round that warms up."""
    found: dict[str, dict[str, list[float]]] = {}
    for load in read("peers/raw.json")["loads"]:
        if load["round"]:
            samples = found.setdefault(load["scenario"], {})
            samples.setdefault(load["name"], []).append(load["seconds"])
    return [{"scenario": name, "samples": samples} for name, samples in found.items()]


def _speedups(samples: dict[str, list[float]], peer: str) -> list[float]:
    ours = statistics.median(samples["sllm_node codec"])
    return [seconds / ours for seconds in samples[peer]]


def _codec() -> None:
    small, large = read("x1_codec_8b.json")["codec"], read("x4_codec_32b.json")["codec"]
    shared: dict[str, Any] = {
        "machine": FOUR, "measured_at": "ff96a98",
        "command": f"{LOAD} 32b --store /dev/shm/t --devices cuda:0,cuda:1,cuda:2,cuda:3 "
        "--scenarios codec --no-disk --chunk 16 --rounds 3",
    }  # fmt: skip
    put(
        "dram_to_gpu_codec_gbps", rates(large, "codec"),
        ceiling=statistics.median(rates(small, "copy")),
        note="32B shapes, the worse of the two; 8B shapes "
        f"{statistics.median(rates(small, 'codec')):.1f} GB/s where raw has "
        f"{statistics.median(rates(small, 'raw')):.1f} (x1_codec_8b.json); the ceiling is a copy of "
        "raw bytes, 8B",
        **shared,
    )  # fmt: skip
    put(
        "load_32b_dram_codec_s", large["samples_s"]["codec"],
        note="one link of the four; raw in the same rounds "
        f"{statistics.median(large['samples_s']['raw']):.2f} s",
        **shared,
    )  # fmt: skip
    put(
        "load_32b_dram_codec_x4_s", large["samples_s"]["codec, 4 links"],
        note="raw over the same links "
        f"{statistics.median(large['samples_s']['raw, 4 links']):.2f} s; 8B shapes with units of "
        "32 MiB 244.8 GB/s encoded, 182.8 GB/s raw (x4_codec_8b.json)",
        **shared,
    )  # fmt: skip
    decoder, copy = _printed("exp-bf16"), _printed("copy within the device")
    middle, least, most = decoder[1:4]
    put(
        "decode_kernel_gbps", [least, middle, most], machine=ONE, ceiling=copy[-1],
        measured_at="d23ae17",
        command="python -m scripts.bench.decode --gib 4 --chunk-mib 2",
        note="least, median and most of 9 rounds of 10 launches (x1_decode.txt); the ceiling, a copy "
        "within the device, counts bytes read and written, as the decoder moves 2,980 GB/s",
    )  # fmt: skip


def _printed(label: str) -> list[float]:
    """Return the numbers of a line that `scripts.bench.decode` has printed, its label apart."""
    lines = (FOLDER / "x1_decode.txt").read_text().splitlines()
    line = next(line for line in lines if line.startswith(label))
    return [float(number) for number in re.findall(r"[\d.]+", line.removeprefix(label))]


def _several_gpus() -> None:
    two, four = read("x2_8b.json"), read("x4_8b.json")
    for name, result, count, machine in (
        ("relay_x2_gbps", two, 2, TWO),
        ("relay_x4_gbps", four, 4, FOUR),
    ):
        devices = ",".join(f"cuda:{number}" for number in range(count))
        put(
            name, rates(result["relay"], f"{count} links"), machine=machine,
            ceiling=statistics.median(rates(result["relay"], "one link")),
            command=f"{LOAD} 8b --store /dev/shm/s --devices {devices} --scenarios relay",
            note="8B shapes; the ceiling column is one link of the same run",
        )  # fmt: skip
    put(
        "clone_8b_ms", [1e3 * s for s in two["clone"]["samples_s"]["clone"]], machine=TWO,
        command=f"{LOAD} 8b --store /dev/shm/s --devices cuda:0,cuda:1 --scenarios clone",
        note="with three siblings that may reach the memory 54.7 ms",
    )  # fmt: skip


def _latency() -> None:
    latency = read("x1_latency.json")
    switches = sorted(latency["switch"])
    put(
        "resident_switch_ms", switches, machine=ONE,
        value=switches[int(0.99 * (len(switches) - 1))],
        command="python -m scripts.bench.warm_start --device cuda:0 --shape 8b "
        "--store /dev/shm/s --requests 40 --out FILE",
        note="p99 of 40 HTTP requests to two 8B models by turns; from DRAM to the first copy "
        f"{sorted(latency['copy'])[int(0.99 * (len(latency['copy']) - 1))]:.2f} ms",
    )  # fmt: skip


def _engine() -> None:
    last, whole, theirs = (
        read(f"{name}.json") for name in ("x2_engine_8b", "x2_first_8b", "x1_engine_8b_theirs")
    )
    command = (
        "python -m scripts.bench.engine --shape 8b --store /dev/shm/s --device cuda:0 "
        "--kv-mib 12288 --parts ceiling,decode"
    )
    newest: dict[str, Any] = {
        "machine": TWO, "measured_at": "4b46c68", "command": f"{command},batch,beside"
    }  # fmt: skip
    beside: dict[str, Any] = {
        "machine": TWO, "measured_at": "46a3a7d", "command": f"{command},first"
    }  # fmt: skip
    ceiling = last["ceiling"]
    put(
        "decode_b1_over_limit",
        [ms / ceiling["limit_ms"] for ms in last["decode"]["rounds_ms"]],
        note=f"{last['decode']['ms_per_token']:.2f} ms a token; the limit is "
        f"{ceiling['limit_ms']:.2f} ms at {ceiling['copy_gbps']:.0f} GB/s; transformers' generate "
        f"{theirs['generate']['ms_per_token']:.1f} ms in a run of an earlier version on one H200",
        **newest,
    )
    put(
        "decode_b32_tokens_per_s", last["batch_32"]["rounds"][1:],
        note="while a node served small models on the other GPU; the first round captures "
        "graphs and is not counted; 128 at once "
        f"{last['batch_128']['tokens_per_s']:.0f} tok/s; transformers' continuous batching "
        f"{theirs['continuous_32']['tokens_per_s']:.0f} tok/s for 32 in a run of an earlier version on one H200",
        **newest,
    )  # fmt: skip
    for name, part in (("ttft_dram_raw_s", "first_raw"), ("ttft_dram_codec_s", "first_codec")):
        spent = whole[part]
        early = whole[f"overlap_{part.removeprefix('first_')}"]
        put(
            name, spent["totals"],
            note=", ".join(
                f"{key} {1e3 * spent[key]:.0f} ms" for key in ("prepare", "load", "attach", "prefill")
            )
            + f"; with the first layers computed while the last ones load, as by default, "
            f"{early['first_s']:.3f} s, where the bare load took {early['bare_s']:.3f} s; tests "
            "ran on the other GPU",
            **beside,
        )  # fmt: skip
    put("ttft_resident_ms", [1e3 * whole["resident_raw"]["s"]], **beside)


def _moves() -> None:
    two, four = (read(f"x{count}_cluster_8b.json") for count in (2, 4))
    near, far = (
        [
            sample["beyond_a_step_ms"]
            for context, samples in found["moves"]["samples"].items()
            if int(context) <= CONTEXT_MAX
            for sample in samples
        ]
        for found in (two, four)
    )
    put(
        "migration_gap_p99_ms", near, machine=TWO, measured_at="4b46c68",
        command=two["about"]["command"], value=percentile(near, 0.99),
        note=f"{len(near)} moves of 1k, 2k, 4k and 8k tokens, four other streams at both ends; median "
        f"{statistics.median(near):.0f} ms; on four H200s, with fewer rounds than now (b7ef81e), p99 "
        f"{percentile(far, 0.99):.0f} ms and median {statistics.median(far):.0f} ms of {len(far)} moves",
    )  # fmt: skip


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the smallest sample that so large a share does not exceed."""
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]


if __name__ == "__main__":
    main()
