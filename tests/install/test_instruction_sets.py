"""The CPU's kernels for AVX2 and AVX-512: they are called, and lend nothing to the rest of the library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from paths import ROOT

CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
MACHINE = torch.backends.cpu.get_cpu_capability()

needs_avx = pytest.mark.skipif(MACHINE not in CAPABILITIES[1:], reason=f"this machine has {MACHINE}")


@needs_avx
def test_each_instruction_set_has_kernels_of_its_own() -> None:
    """Their vectors differ in length, so they add in another order, and round in other places."""
    program = (
        "import torch, gc_cuda; torch.manual_seed(0); "
        "print(gc_cuda.average_pool(torch.randn(2, 64, 40, 40)).double().sum(1).tolist())"
    )
    sums = set()
    served = CAPABILITIES[: CAPABILITIES.index(MACHINE) + 1]
    for capability in served:
        environ = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environ, cwd=ROOT, capture_output=True, text=True, check=True
        )
        sums.add(done.stdout)
    assert len(sums) == len(served)


@needs_avx
@pytest.mark.parametrize("capability", CAPABILITIES[1:])
def test_no_function_is_shared_with_the_rest_of_the_library(capability: str) -> None:
    """The linker takes the first of several copies: an older processor must not meet that of a newer one."""
    objects = list(ROOT.glob(f"build/torch-{torch.__version__}-*/**/cpu/capability_{capability.lower()}.o"))
    if shutil.which("nm") is None or not (ROOT / "build").exists():
        pytest.skip("needs nm, and a build in the source folder")
    assert objects
    for path in objects:
        listed = subprocess.run(
            ["nm", "--demangle", "--defined-only", path], capture_output=True, text=True, check=True
        )
        symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
        weak = {name for kind, name in symbols if kind in "VWu"}
        own = {name for name in weak if f"::{capability}" in name}
        assert len(own) > 100
        assert weak - own <= {"DW.ref.__gxx_personality_v0"}
