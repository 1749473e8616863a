"""The parts of csrc/cuda that can be run without CUDA and without kernels, under g++'s sanitizers.

A program is units/<name>.cpp; it runs all of its cases and names the requirement that was not met.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import hostbuild
import pytest
from hostbuild import CACHE, HOST, ROOT

# What each program is linked with, of csrc/cuda/launch.
SOURCES = {
    "counters": ("counters.cpp",),
    "recent": (),
    "region_pool": (),
    "shared_memory": ("shared_memory.cpp",),
}
# Headers that units/torch_stub.h stands for.
TORCH = (
    "ATen/core/Tensor.h",
    "ATen/ops/zeros.h",
    "c10/cuda/CUDACachingAllocator.h",
    "c10/cuda/CUDAException.h",
    "c10/cuda/CUDAGraphsC10Utils.h",
    "c10/cuda/CUDAGuard.h",
)
SANITIZERS = ("address,undefined", "thread")
RUN_TIMEOUT_S = 120


def build(name: str, sanitizers: str) -> Path:
    folder = CACHE / "units"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / f"{name}-{sanitizers.replace(',', '-')}"
    command = ["g++", "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    command += [f"-fsanitize={sanitizers}", f"-I{ROOT / 'csrc'}", f"-I{HOST / 'units'}"]
    if SOURCES[name]:
        command += ["-isystem", str(hostbuild.cuda_include())]
    if name == "counters":
        stub = HOST / "units" / "torch_stub.h"
        for header in TORCH:
            (folder / header).parent.mkdir(parents=True, exist_ok=True)
            (folder / header).write_text(f'#include "{stub}"\n')
        command += [f"-I{folder}"]
    command += [str(HOST / "units" / f"{name}.cpp")]
    command += [str(ROOT / "csrc" / "cuda" / "launch" / source) for source in SOURCES[name]]
    said = subprocess.run(
        [*command, "-o", str(program)],
        capture_output=True,
        text=True,
        timeout=hostbuild.COMPILE_TIMEOUT_S,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    return program


@pytest.mark.parametrize("sanitizers", SANITIZERS)
@pytest.mark.parametrize("name", SOURCES)
def test_unit(name: str, sanitizers: str) -> None:
    reason = hostbuild.missing()
    if reason:
        pytest.skip(reason)
    program = build(name, sanitizers)
    said = subprocess.run([str(program)], capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    assert said.returncode == 0, said.stdout + said.stderr
    assert "all cases passed" in said.stdout
