"""Runs the kernels' own sources on the CPU, so that their indices can be tested without a GPU."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from sllm_node.device.nvrtc import sources_folder

HERE = Path(__file__).parent
ENTRY = """
#include "emulator.h"
#include "{name}.cu"
template <class P> static void run_as(void (*)(const P), const void *record, const uint32_t *grid, uint32_t threads) {{
    static const P *parameters;
    parameters = (const P *)record;
    emulated::run([] {{ {name}(*parameters); }}, grid, threads);
}}
extern "C" void launch(const void *record, const uint32_t *grid, uint32_t threads) {{
    run_as({name}, record, grid, threads);
}}
"""


def is_possible():
    return shutil.which("g++") is not None


@functools.cache
def _built(variant):
    folder = Path(tempfile.mkdtemp(prefix="sllm-emulated-"))
    for path in sources_folder().iterdir():
        if path.name == f"{variant.name}.cu" or path.suffix == ".cuh":
            shutil.copy(path, folder)
    for name in ("emulator.h", "ptx.cuh"):
        shutil.copy(HERE / name, folder)
    (folder / "entry.cpp").write_text(ENTRY.format(name=variant.name))
    macros = [f"-D{macro}={number}" for macro, number in variant.defines]
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *macros]
    subprocess.run(
        [*command, "entry.cpp", "-o", "kernel.so"], cwd=folder, check=True, capture_output=True
    )
    library = ctypes.CDLL(str(folder / "kernel.so"))
    shutil.rmtree(folder)
    return library


class CpuKernels:
    """Kernels as `engine.decode_kernels` wants them; tensors are the CPU's."""

    multiprocessors = 3

    def blocks(self, variant, threads):
        return 2

    def launch(self, variant, grid, threads, parameters, stream):
        library = _built(variant)
        library.launch(
            ctypes.c_void_p(parameters.ctypes.data),
            np.array(grid, np.uint32).ctypes.data_as(ctypes.c_void_p),
            ctypes.c_uint32(threads),
        )

    def prepared(self, variant, grid, threads, parameters, stream):
        return functools.partial(self.launch, variant, grid, threads, parameters, stream)
