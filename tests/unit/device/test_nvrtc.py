"""Every kernel compiles for every architecture that we name; no GPU is needed for that."""

import re

import pytest

from sllm_node.core.errors import KernelError
from sllm_node.device import kernels, nvrtc

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SPILLED_BYTES_MAX = 32
REGISTERS_MAX = {kernels.CHECKSUM: 80}


def test_the_folder_of_sources_holds_the_kernels_of_the_table_and_no_others():
    found = {path.stem for path in nvrtc.sources_folder().glob("*.cu")}
    assert found == set(kernels.KERNELS)
    assert found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", kernels.KERNELS)
def test_a_kernel_compiles_and_stays_within_its_registers(name, architecture):
    source, headers = nvrtc.read_source(name)
    code, log = nvrtc.compile_source(name, source, headers, architecture)
    assert code.startswith(b"\x7fELF")
    assert name.encode() in code
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert registers is None or int(registers[1]) <= REGISTERS_MAX.get(name, 64)
    assert spilled is None or int(spilled[1]) <= SPILLED_BYTES_MAX


def test_what_was_compiled_is_kept_and_found_again(tmp_path):
    first = nvrtc.compiled(kernels.CHECKSUM, "sm_80", tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"kept")
    assert nvrtc.compiled(kernels.CHECKSUM, "sm_80", tmp_path) == b"kept"
    assert nvrtc.compiled(kernels.CHECKSUM, "sm_90", tmp_path) != first
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_a_compilation_only(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert nvrtc.compiled(kernels.CHECKSUM, "sm_80", file).startswith(b"\x7fELF")


def test_the_cache_lies_where_the_environment_says():
    assert str(nvrtc.cache_folder({"XDG_CACHE_HOME": "/c"})) == "/c/sllm-node"
    assert str(nvrtc.cache_folder({"HOME": "/h"})) == "/h/.cache/sllm-node"


def test_a_source_that_does_not_compile_is_told_with_the_compilers_words():
    with pytest.raises(KernelError, match=r"(?s)kernel k: does not compile for sm_80:.*nonsense"):
        nvrtc.compile_source("k", b"nonsense", {}, "sm_80")


def test_a_kernel_that_does_not_exist_is_told():
    with pytest.raises(KernelError, match="no such source"):
        nvrtc.compiled("nothing", "sm_80")
