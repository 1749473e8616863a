"""Checks of the compiled kernels without a GPU.

nvcc compiles the launch files of csrc/cuda, which contain every instantiation, for what CUDA 13 supports.
NVRTC 12.6 compiles the same instantiations for sm_70. Hot kernels are those that move whole 16-byte vectors:
they must not spill registers, and must have 16-byte loads.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cudatools
import hostbuild
import pytest
from cudatools import Resources
from hostbuild import CACHE, JOBS, ROOT

# PTX is made once for what shares it: the kernels have no code of their own for sm_86 or sm_89.
TARGETS = {
    "compute_75": ("sm_75",),
    "compute_80": ("sm_80", "sm_86", "sm_89"),
    "compute_90": ("sm_90",),
    "compute_100": ("sm_100",),
    "compute_120": ("sm_120",),
}
ARCHITECTURES = tuple(name for names in TARGETS.values() for name in names)
LAUNCH_FILES = tuple(path.stem for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
DISASSEMBLED = "sm_80"
COMPILE_TIMEOUT_S = 900
ELEMENT_BYTES = {"float": 4, "double": 8, "__half": 2, "__nv_bfloat16": 2}


def is_hot(kernel: str) -> bool:
    """Does an instantiation <type, layout, rows, width, ...> move 16 bytes at a time?"""
    match = re.search(r"<(\w+), \(gc::Layout\)\d, \d+, (\d+)", kernel)
    assert match is not None, f"not <type, layout, rows, width, ...>: {kernel}"
    return ELEMENT_BYTES[match[1]] * int(match[2]) == 16


def _inputs_digest(launch_file: str, *more: str) -> str:
    headers = [*(ROOT / "csrc" / "kernels").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h")]
    texts = [path.read_bytes() for path in sorted(headers)]
    return hostbuild.digest((ROOT / "csrc" / "cuda" / f"{launch_file}.cu").read_bytes(), *texts, *more)


def _compile(launch_file: str, virtual: str) -> Path:
    """A folder with the log of ptxas and one cubin an architecture. Kept while the sources are the same."""
    compiler = hostbuild.nvcc()
    assert compiler is not None
    version = subprocess.run([str(compiler), "--version"], capture_output=True, text=True, check=True).stdout
    folder = (
        CACHE
        / "static"
        / f"{launch_file}-{virtual}-{_inputs_digest(launch_file, version, *TARGETS[virtual])}"
    )
    if (folder / "log").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [str(compiler), "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "--fatbin"]
    command += [
        f"-gencode=arch={virtual},code=[{','.join(TARGETS[virtual])}]",
        "--keep",
        f"--keep-dir={folder}",
    ]
    command += [str(ROOT / "csrc" / "cuda" / f"{launch_file}.cu"), "-o", str(folder / "fatbin")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    assert said.returncode == 0, f"{' '.join(command)}\n{said.stdout}{said.stderr}"
    for file in folder.iterdir():
        if file.suffix != ".cubin":
            file.unlink()
    (folder / "log").write_text(said.stdout + said.stderr)
    return folder


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Future[Path]]:
    """The folders of _compile(), made two at a time."""
    if hostbuild.nvcc() is None:
        pytest.skip("no nvcc")
    # The slow ones first.
    with ThreadPoolExecutor(JOBS) as pool:
        pairs = [(name, virtual) for virtual in TARGETS for name in reversed(LAUNCH_FILES)]
        return {pair: pool.submit(_compile, *pair) for pair in pairs}


@pytest.fixture(scope="module")
def resources(compiled: dict[tuple[str, str], Future[Path]]) -> list[Resources]:
    """What ptxas said of every kernel on every architecture."""
    found = [
        one
        for folder in compiled.values()
        for one in cudatools.resources((folder.result() / "log").read_text())
    ]
    return found


def test_nvcc_compiles_every_kernel_for_every_architecture(
    resources: list[Resources], pytestconfig: pytest.Config
) -> None:
    kernels = {one.kernel for one in resources}
    assert len(kernels) >= 100
    assert {(one.kernel, one.architecture) for one in resources} == {
        (k, a) for k in kernels for a in ARCHITECTURES
    }
    hot = [one for one in resources if is_hot(one.kernel)]
    cold_spills = [one for one in resources if one.spilled_bytes and not is_hot(one.kernel)]
    text = f"Hot kernels (of {len(kernels)}), {hostbuild.nvcc()}\n{cudatools.table(hot)}"
    if cold_spills:
        text += f"\nOther kernels that spill\n{cudatools.table(cold_spills)}"
    pytestconfig.stash[hostbuild.TABLES].append(text)


def test_hot_kernels_do_not_spill(resources: list[Resources]) -> None:
    spills = [one for one in resources if is_hot(one.kernel) and one.spilled_bytes]
    assert not spills, "\n" + cudatools.table(spills)


@pytest.mark.parametrize("launch_file", LAUNCH_FILES)
def test_hot_kernels_load_16_bytes(compiled: dict[tuple[str, str], Future[Path]], launch_file: str) -> None:
    virtual = next(name for name, real in TARGETS.items() if DISASSEMBLED in real)
    cubins = list(compiled[launch_file, virtual].result().glob(f"*{DISASSEMBLED}*.cubin"))
    assert len(cubins) == 1
    try:
        code = cudatools.disassemble(cubins[0])
    except cudatools.Unavailable as error:
        pytest.skip(str(error))
    hot = {kernel: text for kernel, text in code.items() if is_hot(kernel)}
    assert hot
    narrow = [kernel for kernel, text in hot.items() if "LDG.E.128" not in text]
    assert not narrow, f"no LDG.E.128 in {narrow}"


def _compile_volta(launch_file: str, kernels: list[str]) -> tuple[str, str]:
    """The PTX of these kernels by NVRTC 12.6, and ptxas's log for sm_70. Kept like _compile()'s."""
    folder = CACHE / "static" / f"{launch_file}-volta-{_inputs_digest(launch_file, *kernels)}"
    ptx, log = folder / "kernels.ptx", folder / "log"
    if log.exists():
        return ptx.read_text(), log.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    source = f'#include "kernels/{launch_file}.h"\n'
    options = ["--gpu-architecture=compute_70", "--std=c++17"]
    ptx.write_text(cudatools.Nvrtc().ptx(source, kernels, [ROOT / "csrc"], options))
    ptxas = cudatools.nvrtc_root() / "cuda_nvcc" / "bin" / "ptxas"
    ptxas.chmod(0o755)
    command = [str(ptxas), "-arch=sm_70", "-v", str(ptx), "-o", str(folder / "cubin")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    assert said.returncode == 0, said.stdout + said.stderr
    log.write_text(said.stdout + said.stderr)
    return ptx.read_text(), said.stdout + said.stderr


def test_volta(compiled: dict[tuple[str, str], Future[Path]], pytestconfig: pytest.Config) -> None:
    """CUDA 13 cannot compile for V100: NVRTC 12.6 does, with the same kernels and the same demands."""
    try:
        cudatools.nvrtc_root()
    except cudatools.Unavailable as error:
        pytest.skip(f"NVRTC 12.6: {error}")
    with ThreadPoolExecutor(JOBS) as pool:
        pending = {}
        for name in LAUNCH_FILES:
            log = (compiled[name, "compute_75"].result() / "log").read_text()
            kernels = sorted(one.kernel for one in cudatools.resources(log))
            pending[name] = pool.submit(_compile_volta, name, kernels), kernels
        results = {name: (future.result(), kernels) for name, (future, kernels) in pending.items()}

    found: list[Resources] = []
    for name, ((ptx, log), kernels) in results.items():
        entries = cudatools.resources(log)
        assert sorted(one.kernel for one in entries) == kernels, name
        found += entries
        code = cudatools.ptx_entries(ptx)
        narrow = [
            kernel
            for kernel in kernels
            if is_hot(kernel) and not re.search(r"ld\.global\S*\.v4", code[kernel])
        ]
        assert not narrow, f"no 16-byte loads in {narrow}"
    hot = [one for one in found if is_hot(one.kernel)]
    pytestconfig.stash[hostbuild.TABLES].append(f"Hot kernels by NVRTC 12.6\n{cudatools.table(hot)}")
    assert not [one for one in hot if one.spilled_bytes]
