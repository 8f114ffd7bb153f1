"""What can be converted: a Hugging Face folder, a GGUF file, a model on the hub."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from sllm_node.checkpoint.index import INDEX_FILE
from sllm_node.checkpoint.output import linked
from sllm_node.convert.gguf import GgufModel, load_gguf
from sllm_node.convert.safetensors import WEIGHTS_INDEX_FILE, few, open_weights
from sllm_node.convert.tensors import SourceTensor
from sllm_node.convert.texts import CONFIG_FILE, copy_texts
from sllm_node.core.errors import ConversionError

Download = Callable[[str], Path]
"""Brings a hub model's files to this machine and returns their folder; raises OSError, ValueError."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES: Final = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_HUB_FILES_LEFT: Final = ("original/*", "consolidated*", "*/*")
_ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_GGUF_PART: Final = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Source(Protocol):
    """A model to be converted."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]: ...

    @property
    def in_module_layout(self) -> bool:
        """Whether the tensors have the module's names and shapes already."""

    @property
    def is_exact(self) -> bool:
        """Whether every tensor must have a place, and keeps its dtype unless one is asked for."""

    def write_texts(self, folder: Path) -> None:
        """Write config, generation config and tokenizer into `folder`."""


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A Hugging Face folder of safetensors."""

    folder: Path
    origin: str
    tensors: Mapping[str, SourceTensor]
    needs_tokenizer: bool = True
    in_module_layout: bool = False
    is_exact: bool = False

    def write_texts(self, folder: Path) -> None:
        copy_texts(self.folder, folder, self.origin, needs_tokenizer=self.needs_tokenizer)


@contextmanager
def open_source(
    source: str, dtype: str | None, download: Download, *, needs_tokenizer: bool = True
) -> Iterator[Source]:
    """Find out what `source` names and open it; `dtype` is what a GGUF file is dequantised to.

    Without `needs_tokenizer`, a folder may have none.

    Raises:
        ConversionError: it is nothing that can be converted, with what to do.
    """
    path = Path(source).expanduser()
    with ExitStack() as files:
        if path.is_dir():
            yield _open_folder(path, source, dtype, files, needs_tokenizer)
        elif path.is_file():
            yield _open_file(path, source, dtype)
        elif _HUB_ID.fullmatch(source):
            folder = _download(source, download)
            yield _open_folder(folder, source, dtype, files, needs_tokenizer)
        else:
            raise ConversionError(source, "there is no such folder or file, and it is no hub id")


def check_apart(source: str, destination: Path) -> None:
    """Make sure that replacing `destination` leaves `source` whole.

    Raises:
        ConversionError: the source is there, or inside.
    """
    path = Path(source).expanduser()
    replaced = linked(destination)
    named = linked(path.parent) / path.name  # a link is a part of its folder, wherever it leads
    for place in (named, linked(path)):
        if path.exists() and place.is_relative_to(replaced):
            problem = f"to replace {destination} would delete the source; choose another name"
            raise ConversionError(source, problem)


def download_from_hub(model: str) -> Path:
    """Bring the files that a conversion needs from the hub into its cache; never a pickle."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        model, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_FILES_LEFT)
    )
    return Path(folder)


def _download(model: str, download: Download) -> Path:
    try:
        return download(model)
    except (OSError, ValueError) as error:
        raise ConversionError(
            model,
            f"there is no such folder, and the hub did not deliver it "
            f"({type(error).__name__}: {_first_line(error)}); check the name and the network, "
            "log in with 'hf auth login' if it is gated, or give a local folder",
        ) from error


def _open_folder(
    path: Path,
    origin: str,
    dtype: str | None,
    files: ExitStack,
    needs_tokenizer: bool,  # noqa: FBT001 - passed on as it came
) -> Source:
    _check_no_adapter(path, origin)
    if (path / WEIGHTS_INDEX_FILE).is_file() or any(path.glob("*.safetensors")):
        if not (path / CONFIG_FILE).is_file():
            raise ConversionError(origin, f"has no {CONFIG_FILE}")
        return FolderSource(path, origin, open_weights(path, files), needs_tokenizer)
    if (path / INDEX_FILE).is_file():
        raise _converted_already(origin, path)
    names = sorted(entry.name for entry in path.iterdir())
    quantised = [name for name in names if name.endswith(".gguf")]
    if len(quantised) == 1:
        return load_gguf(path / quantised[0], origin, dtype)
    if quantised:
        whole = [name for name in quantised if not _GGUF_PART.search(name)]
        raise _several_gguf(origin, quantised, whole)
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise _pickle_refused(origin, pickles)
    raise ConversionError(origin, "has no safetensors and no GGUF file")


def _check_no_adapter(folder: Path, origin: str) -> None:
    names = [name for name in _ADAPTER_FILES if (folder / name).is_file()]
    if not names:
        return
    merge = "PeftModel.from_pretrained(MODEL, FOLDER).merge_and_unload().save_pretrained(OTHER)"
    others = (path for path in folder.iterdir() if path.name not in _ADAPTER_FILES)
    if any(path.suffix in (".safetensors", ".gguf") for path in others):
        raise ConversionError(
            origin,
            f"has a PEFT adapter ({names[0]}), which would be left out; merge it first: {merge}; "
            "or give a folder without it",
        )
    raise ConversionError(
        origin, f"is a PEFT adapter ({names[0]}) without its model; merge it into that: {merge}"
    )


def _open_file(path: Path, origin: str, dtype: str | None) -> GgufModel:
    if path.suffix == ".gguf":
        return load_gguf(path, origin, dtype)
    if (path.parent / INDEX_FILE).is_file():
        raise _converted_already(origin, path.parent)
    if path.suffix in _PICKLES:
        raise _pickle_refused(origin, [path.name])
    if path.suffix == ".safetensors":
        raise ConversionError(origin, "is one file of a model; give the folder that it lies in")
    raise ConversionError(origin, "is neither a folder nor a GGUF file")


def _several_gguf(origin: str, names: list[str], whole: list[str]) -> ConversionError:
    if whole:
        return ConversionError(origin, f"has several GGUF files, name one: {few(whole)}")
    return ConversionError(
        origin,
        f"has its GGUF model in parts ({few(names)}); join them first: "
        f"llama-gguf-split --merge {names[0]} WHOLE.gguf",
    )


def _converted_already(origin: str, folder: Path) -> ConversionError:
    place = folder.absolute()
    return ConversionError(
        origin,
        f"is a checkpoint already: give its folder {place.parent} as --store, or copy it into "
        f"your store; 'sllm-node recode {place.name}' changes its codec",
    )


def _pickle_refused(origin: str, names: list[str]) -> ConversionError:
    return ConversionError(
        origin,
        f"has its weights in pickle files only ({few(names)}), which can run any code when they "
        "are opened; make safetensors of them where you trust them: "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
