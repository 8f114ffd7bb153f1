"""Compiles CUDA sources at run time with NVRTC, which needs neither a GPU nor a toolkit, once.

What comes out is kept in the user's cache folder under the digest of all that went in: the source,
every header beside it, the options, the architecture, the compiler's version. A file there is whole
or not there: it is written under another name and renamed.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from cuda.bindings import nvrtc

from sllm_node.core.errors import KernelError

OPTIONS: Final = ("--std=c++17", "--restrict", "--extra-device-vectorization")
Defines = Sequence[tuple[str, int]]
_OK: Final = nvrtc.nvrtcResult.NVRTC_SUCCESS


def sources_folder() -> Path:
    """Return the folder of the kernels' sources: in the package if installed, beside it if not."""
    package = Path(__file__).parent.parent
    installed = package / "_kernels"
    return installed if installed.is_dir() else package.parent / "kernels"


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where compiled kernels are kept."""
    root = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/tmp")) / ".cache"  # noqa: S108
    return Path(root) / "sllm-node"


def compiled(
    name: str, architecture: str, cache: Path | None = None, defines: Defines = ()
) -> bytes:
    """Return the machine code of kernel `name` for `architecture`, as in sm_90.

    `defines`: macros and their numbers, for kernels that are compiled in several variants.

    Raises:
        KernelError: there is no such source, or it does not compile.
    """
    source, headers = read_source(name)
    folder = cache or cache_folder()
    try:
        path = folder / f"{_key(source, headers, architecture, defines)}.cubin"
    except RuntimeError as error:  # the compiler's library is not there
        raise KernelError(name, f"there is no compiler on this machine: {error}") from error
    with suppress(OSError):
        return path.read_bytes()
    code = compile_source(name, source, headers, architecture, defines)[0]
    with suppress(OSError):  # without a cache the next start compiles again
        _keep(path, code)
    return code


def compile_source(
    name: str,
    source: bytes,
    headers: Mapping[str, bytes],
    architecture: str,
    defines: Defines = (),
) -> tuple[bytes, str]:
    """Return the machine code, and what the compiler and its assembler say of it.

    Raises:
        KernelError: it does not compile.
    """
    _, program = _checked(
        name,
        nvrtc.nvrtcCreateProgram(
            source,
            f"{name}.cu".encode(),
            len(headers),
            list(headers.values()),
            [header.encode() for header in headers],
        ),
    )
    options = [*OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    options += [f"-D{macro}={number}" for macro, number in defines]
    try:
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytes(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        said = log.decode(errors="replace").strip("\0\n ")
        if code != _OK:
            raise KernelError(name, f"does not compile for {architecture}: {said}")
        _, size = _checked(name, nvrtc.nvrtcGetCUBINSize(program))
        cubin = bytes(size)
        _checked(name, nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin, said
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def read_source(name: str) -> tuple[bytes, dict[str, bytes]]:
    """Return the source of kernel `name`, and name → text of the headers beside it.

    Raises:
        KernelError: there is none.
    """
    folder = sources_folder()
    try:
        source = (folder / f"{name}.cu").read_bytes()
        headers = {path.name: path.read_bytes() for path in sorted(folder.glob("*.cuh"))}
    except OSError as error:
        raise KernelError(name, f"{folder} has no such source: {error.strerror}") from error
    return source, headers


def _key(source: bytes, headers: Mapping[str, bytes], architecture: str, defines: Defines) -> str:
    digest = hashlib.sha256()
    version = nvrtc.nvrtcVersion()[1:]
    texts = (repr((OPTIONS, architecture, version, tuple(defines))).encode(), source)
    for part in (*texts, *(name.encode() + b"\0" + text for name, text in headers.items())):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _keep(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, written = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(code)
            file.flush()
            os.fsync(file.fileno())  # or a crash may leave the name without the bytes
        Path(written).replace(path)
    except OSError:
        Path(written).unlink(missing_ok=True)
        raise


def _checked(name: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if result[0] != _OK:
        raise KernelError(name, f"the compiler fails: {result[0].name}")
    return result
