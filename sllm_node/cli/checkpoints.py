"""Commands on the checkpoints of a store folder: convert, recode, ls, inspect, verify, rm. No node is needed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sllm_node.cli.output import print_json, print_table, say, tell
from sllm_node.codec.names import AUTO, CHOICES, EXPONENT, RAW
from sllm_node.core.allocator import keep_freed_memory
from sllm_node.core.config import StoreConfig, load_config
from sllm_node.core.errors import SllmError, StoreFolderError
from sllm_node.core.types import ModelId
from sllm_node.core.units import format_count, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from sllm_node.checkpoint.catalog import Catalog, Checkpoint


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


StoreFolder = Annotated[
    Path,
    typer.Option("--store", envvar="SLLM_NODE_STORE", help="folder of converted checkpoints"),
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="take the folder from the node's config instead")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Name = Annotated[str, typer.Argument(help="the checkpoint's name")]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        parser=_size, metavar="SIZE", help="bytes under one checksum (16MiB raw, 1MiB encoded)"
    ),
]
Codec = Annotated[
    str,
    typer.Option(
        help=f"how bytes are stored: {', '.join(CHOICES)}, "
        f"or {AUTO}: {EXPONENT} on a machine with an NVIDIA GPU, which decodes, else {RAW}"
    ),
]
DEFAULT_STORE = Path(StoreConfig().path)


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for name, command in (
        ("convert", convert), ("ls", list_checkpoints), ("inspect", inspect),
        ("verify", verify), ("recode", recode), ("rm", remove),
    ):  # fmt: skip
        app.command(name)(command)


def convert(  # noqa: PLR0913 - each parameter is one of the command's options
    source: Annotated[str, typer.Argument(help="folder of safetensors, GGUF file, or hub id")],
    name: Annotated[str, typer.Option(help="what clients will call the model")],
    store: StoreFolder = DEFAULT_STORE,
    dtype: Annotated[
        str | None, typer.Option(help="cast weights: float32, bfloat16, float16 (default: keep)")
    ] = None,
    chunk_size: ChunkSize = None,
    codec: Codec = AUTO,
    *,
    config: ConfigFile = None,
    force: Annotated[
        bool,
        typer.Option(help="replace a checkpoint of that name, if nothing else is in its folder"),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint into the loading-optimised format."""
    from sllm_node.checkpoint.describe import describe
    from sllm_node.convert.convert import ConvertOptions
    from sllm_node.convert.convert import convert as run

    keep_freed_memory()
    store, chosen = _folder(store, config), _chosen(codec)
    options = ConvertOptions(dtype=dtype, chunk_bytes=chunk_size, force=force, codec=chosen)
    with _progress(f"converting {name}") as advance:
        checkpoint = run(
            source, name, store, options, progress=lambda p: advance(p.bytes_done, p.bytes_total)
        )
    if as_json:
        print_json(describe(checkpoint))
    else:
        say(
            f"{name}: {format_size(checkpoint.index.size)}, "
            f"{len(checkpoint.index.tensors)} tensors, in {checkpoint.path}{_how(checkpoint)}"
        )


def recode(
    name: Name,
    store: StoreFolder = DEFAULT_STORE,
    codec: Codec = AUTO,
    chunk_size: ChunkSize = None,
    config: ConfigFile = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint anew with another codec, in place; no byte of its tensors changes."""
    from sllm_node.checkpoint.describe import describe
    from sllm_node.checkpoint.recode import recode as run

    keep_freed_memory()
    before = _catalog(_folder(store, config)).get(ModelId(name))
    with _progress(f"recoding {name}") as advance:
        checkpoint = run(before, _chosen(codec), chunk_size, progress=advance)
    if as_json:
        print_json(describe(checkpoint))
        return
    say(
        f"{name}: {format_size(before.index.file_size)} on disk before, "
        f"{format_size(checkpoint.index.file_size)} now{_how(checkpoint)}"
    )


def _chosen(codec: str) -> str:
    """Return what `auto` means on this machine."""
    if codec != AUTO:
        return codec
    from sllm_node.device.optional import gpu_count

    return EXPONENT if gpu_count() else RAW


def _how(checkpoint: "Checkpoint") -> str:
    index = checkpoint.index
    if not index.is_encoded:
        return ""
    return f" ({100 * index.file_size / index.size:.1f} % of raw, codec {index.codec})"


def list_checkpoints(
    store: StoreFolder = DEFAULT_STORE, config: ConfigFile = None, *, as_json: AsJson = False
) -> None:
    """List the checkpoints of the store, and those that its node can fetch."""
    from sllm_node.checkpoint.describe import describe

    store = _folder(store, config)
    catalog = _catalog(store)
    found = [
        {
            **describe(catalog.get(model)),
            "tier": "nvme",
            "fetched": catalog.get(model).index.file_size,
        }
        for model in catalog.models()
    ] + list(_at_remotes(store))
    problems = {name: str(problem) for name, problem in catalog.problems.items()}
    if as_json:
        print_json({"checkpoints": found, "problems": problems})
        return
    rows: list[tuple[str, ...]] = [
        (
            d["name"], d["architecture"], d["dtype"], format_count(d["parameters"]),
            format_size(d["bytes"]), d["tier"], f"{100 * d['fetched'] / max(1, d['bytes_on_disk']):.0f} %",
        )
        for d in found
    ]  # fmt: skip
    print_table(("name", "architecture", "dtype", ">parameters", ">size", "tier", ">here"), rows)
    for problem in problems.values():
        tell(f"not usable: {problem}")


def inspect(
    name: Name,
    store: StoreFolder = DEFAULT_STORE,
    config: ConfigFile = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is made of."""
    from sllm_node.checkpoint.describe import describe

    checkpoint = _catalog(_folder(store, config)).get(ModelId(name))
    described = describe(checkpoint)
    if as_json:
        described["tensors_in_order"] = [
            {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "shard": t.shard, "offset": t.offset, "size": t.size}
            for t in checkpoint.index.tensors
        ]  # fmt: skip
        print_json(described)
        return
    print_table(
        ("property", "value"),
        [(key, _shown(key, value)) for key, value in described.items()],
    )


def _shown(key: str, value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{k}: {_shown(key, v)}" for k, v in value.items()) or "none"
    if isinstance(value, int) and "bytes" in key:
        return f"{format_size(value)} ({value:,})"
    return f"{value:,}" if isinstance(value, int) else str(value)


def verify(
    name: Name,
    store: StoreFolder = DEFAULT_STORE,
    config: ConfigFile = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Read every byte again; exit status 1 and the place of each damaged chunk if one is wrong."""
    from sllm_node.checkpoint.verify import verify as run

    keep_freed_memory()
    checkpoint, problem = _open_damaged(_folder(store, config), name)
    with _progress(f"verifying {name}") as advance:
        damages = run(checkpoint, progress=advance)
    if as_json:
        print_json({
            "name": name,
            "bytes": checkpoint.index.file_size,
            "damaged": [
                {"shard": d.shard, "offset": d.offset, "size": d.size, "tensors": list(d.tensors), "problem": d.problem}
                for d in damages
            ],
            "problem": None if problem is None else str(problem),
        })  # fmt: skip
    elif not damages and problem is not None:
        say(f"{name}: not usable: {problem}")
    elif not damages:
        say(f"{name}: {format_size(checkpoint.index.file_size)} verified, no damage")
    for damage in [] if as_json else damages:
        say(
            f"{name}: {damage.shard} bytes {damage.offset} to {damage.offset + damage.size}: "
            f"{damage.problem}; tensors: {', '.join(damage.tensors) or 'none'}"
        )
    if damages or problem is not None:
        raise typer.Exit(1)


def remove(
    name: Name,
    store: StoreFolder = DEFAULT_STORE,
    config: ConfigFile = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Delete a checkpoint, or a link to one. A node that has it loaded serves on until it evicts it."""
    from sllm_node.checkpoint.cards import Cards
    from sllm_node.checkpoint.catalog import Catalog

    store = _folder(store, config)
    if not store.is_dir():
        raise StoreFolderError(str(store), "is not there")
    stays = Catalog(store, Cards(store)).remove(ModelId(name))
    if as_json:
        print_json({"removed": name, "stays": None if stays is None else str(stays)})
    else:
        rest = "" if stays is None else f"; it was a link, and its bytes stay in {stays}"
        say(f"{name}: removed from {store}{rest}")


def _folder(store: Path, config: Path | None) -> Path:
    """Return the store folder that is meant."""
    return store if config is None else Path(load_config(config).store.path)


def _open_damaged(store: Path, name: str) -> "tuple[Checkpoint, SllmError | None]":
    """Open a checkpoint whose shards may be missing or cut short: to find that is verify's work.

    Return also why it can't be used.
    """
    from sllm_node.checkpoint.catalog import open_for_verify

    catalog = _catalog(store)
    if (problem := catalog.problems.get(name)) is not None:
        return open_for_verify(store / name), problem
    return catalog.get(ModelId(name)), None


def _at_remotes(store: Path) -> "Iterator[dict[str, Any]]":
    """Describe what a node's remotes have, as it found them last; damaged cards are left out."""
    from sllm_node.checkpoint.cards import Cards, read_index
    from sllm_node.checkpoint.catalog import Checkpoint
    from sllm_node.checkpoint.describe import describe

    cards = Cards(store)
    for model in cards.models():
        with suppress(SllmError):
            folder = cards.root / model
            described = describe(Checkpoint(model, folder, read_index(folder), ()))
            yield {**described, "tier": "remote", "fetched": cards.fetched(model)[0]}


def _catalog(store: Path) -> "Catalog":
    from sllm_node.checkpoint.catalog import Catalog

    if not store.is_dir():
        raise StoreFolderError(str(store), "is not there")
    catalog = Catalog(store)
    catalog.scan()
    return catalog


@contextmanager
def _progress(title: str) -> "Iterator[Callable[[int, int], None]]":
    """Show a bar with bytes, rate and time left on stderr; yield what moves it: (done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
