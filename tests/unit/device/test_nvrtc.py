"""Every kernel compiles for every architecture that we name; no GPU is needed for that."""

import re

import pytest

from sllm_node.core.errors import KernelError
from sllm_node.device import kernels, nvrtc

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SPILLED_BYTES_MAX = 32
REGISTERS_MAX = {kernels.CHECKSUM: 80}
PRODUCTS = (
    {},
    {"NORM": 1},
    {"NORM": 1, "GATED": 1},
    {"TILES_N": 2},
    {"TILES_N": 2, "NORM": 1, "GATED": 1},
    {"F16": 1},
    {"WARPS": 16, "STEPS": 2, "TILES_M": 2, "BLOCKS": 1, "NORM": 1},
    {"STEPS": 2, "BLOCKS": 3, "NORM": 1, "AHEAD": 3},
    {"STEPS": 2, "BLOCKS": 3, "NORM": 1, "TILES_N": 2},
)
ATTENTIONS = (
    *({"HEAD": size} for size in (64, 80, 96, 128, 256)),
    {"GROUPS_OF_8": 2},
    {"F16": 1},
)
SMALL = ({}, {"F16": 1})
VARIANTS = [
    *(("gemv", defines) for defines in PRODUCTS),
    *(("paged_attention", defines) for defines in ATTENTIONS),
    *(
        (name, defines)
        for name in ("rope_kv", "rms_norm", "gated", "gather_context", "join_segments")
        for defines in SMALL
    ),
]


def test_the_folder_of_sources_holds_the_kernels_of_the_table_and_no_others():
    found = {path.stem for path in nvrtc.sources_folder().glob("*.cu")}
    assert found == {*kernels.KERNELS, *(name for name, _ in VARIANTS)}
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "defines"), VARIANTS, ids=str)
def test_a_variant_of_a_step_kernel_compiles_without_spilling(name, defines, architecture):
    source, headers = nvrtc.read_source(name)
    code, log = nvrtc.compile_source(name, source, headers, architecture, tuple(defines.items()))
    assert name.encode() in code
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert spilled is None or int(spilled[1]) <= SPILLED_BYTES_MAX


def test_variants_are_kept_apart(tmp_path):
    first = nvrtc.compiled("gated", "sm_80", tmp_path)
    assert nvrtc.compiled("gated", "sm_80", tmp_path, (("F16", 1),)) != first
    assert len(list(tmp_path.iterdir())) == 2


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
