"""Checks of the compiled kernels without a GPU.

nvcc compiles the launch files of csrc/cuda, which contain every instantiation, for sm_80, and the hot
instantiations for the other architectures of CUDA 13. NVRTC 12.6 compiles every instantiation for sm_70. Hot
kernels are those that move whole 16-byte vectors of float32, float16 or bfloat16 feature maps, and the
transform on such types: they must not spill registers, and those on feature maps must have 16-byte loads.

The other instantiations say nothing that depends on the architecture but through __CUDA_ARCH__. So the gate
compiles them once for each of its cases: here for sm_80, and in the CUDA build for the architectures named in
.ci/run. `./compile.sh cuda` by itself compiles all for all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cudatools
import hostbuild
import pytest
from cudatools import Resources
from hostbuild import CACHE, JOBS, ROOT

EVERY_KERNEL = ("compute_80", ("sm_80",))
HOT_KERNELS = (
    ("compute_80", ("sm_86", "sm_89")),  # the kernels have no code of their own for these: one PTX serves
    *((f"compute_{n}", (f"sm_{n}",)) for n in (75, 90, 100, 120)),
)
ARCHITECTURES = {name for _, names in (EVERY_KERNEL, *HOT_KERNELS) for name in names}
# Backwards, for the last take longest, and what begins last should not.
LAUNCH_FILES = tuple(reversed(hostbuild.launch_files()))
COMPILE_TIMEOUT_S = 900
ELEMENT_BYTES = {"float": 4, "__half": 2, "__nv_bfloat16": 2}  # float64 is for checks, not for speed


def is_hot(kernel: str) -> bool:
    """Is it among the instantiations whose speed counts?"""
    transform = re.search(r"(transform_\w+)<(\w+), (\d+)>", kernel)
    if transform is not None:
        single_weights = transform[1] == "transform_forward" and transform[3] == "1"
        return transform[2] in ELEMENT_BYTES and not single_weights
    return moves_vectors(kernel)


def moves_vectors(kernel: str) -> bool:
    """Does an instantiation move 16 bytes of a feature map at a time? A flat one does; the others are
    <type, layout, rows, width, ...>.
    """
    if "transform_" in kernel or "norm_gradients" in kernel:
        return False
    flat = re.search(r"_flat<(\w+),", kernel)
    if flat is not None:
        return flat[1] in ELEMENT_BYTES
    match = re.search(r"<(\w+), \(gc::Layout\)\d, \d+, (\d+)", kernel)
    assert match is not None, f"not <type, layout, rows, width, ...>: {kernel}"
    return ELEMENT_BYTES.get(match[1], 0) * int(match[2]) == 16


STAGED_HALVES = (
    "gc::pool_backward<{}, (gc::Layout)0, 8, 8, gc::PoolBackwardTraits<(gc::PoolGradient)2, (gc::Path)1> >"
)
# On sm_70 no plan takes it: copies to shared memory begin with sm_80.
TALL_TILES_AHEAD = (
    "gc::pool_forward<float, (gc::Layout)0, 16, 4, gc::PoolForwardTraits<(gc::Weighting)0, (gc::Path)2> >"
)
# With the mean beside the mask's weights, NVRTC 12.6 leaves a tall tile too few registers.
TALL_NORMALIZED = "gc::pool_forward<float, (gc::Layout)0, 16, 4, gc::NormalizedPoolTraits<(gc::Weighting)0> >"
# Some words of the transform, which without them would have to fetch later; and one beside the addresses of a
# staged grad.
KNOWN_SPILLS = {
    (TALL_TILES_AHEAD, "sm_70"): 48,
    (TALL_NORMALIZED, "sm_70"): 104,
    ("gc::normalized_transform_backward<float, 4>", "sm_70"): 12,
    **{
        (f"gc::normalized_transform_backward<{half}, {images}>", "sm_70"): spilled
        for half in ("__half", "__nv_bfloat16")
        for images, spilled in ((2, 48), (4, 40))
    },
    (STAGED_HALVES.format("__half"), "sm_100"): 8,
    (STAGED_HALVES.format("__nv_bfloat16"), "sm_100"): 8,
    ("gc::transform_forward<__half, 2>", "sm_120"): 32,
    ("gc::transform_forward<__nv_bfloat16, 2>", "sm_120"): 32,
    ("gc::merging_transform_forward<__half, 2>", "sm_120"): 20,
    ("gc::merging_transform_forward<__nv_bfloat16, 2>", "sm_120"): 20,
}


def forbidden_spills(found: list[Resources]) -> list[Resources]:
    """Hot kernels that spill registers."""
    return [
        one
        for one in found
        if is_hot(one.kernel) and one.spilled_bytes > KNOWN_SPILLS.get((one.kernel, one.architecture), 0)
    ]


def _folder(name: str, *more: str) -> Path:
    """Where the results of compiling are kept while the sources, and what else is named, are the same."""
    sources = [path for path in (ROOT / "csrc" / "cuda").rglob("*") if path.suffix in (".h", ".cu")]
    content = hostbuild.digest(*(path.read_bytes() for path in sorted(sources)), *more)
    folder = CACHE / "static" / f"{name}-{content}"
    for old in folder.parent.glob(f"{name}-*"):
        if old != folder:
            shutil.rmtree(old)
    return folder


def _compile(source: Path, virtual: str, real: tuple[str, ...]) -> Path:
    """A folder with the log of ptxas and one cubin an architecture."""
    compiler = hostbuild.nvcc()
    assert compiler is not None
    version = subprocess.run([str(compiler), "--version"], capture_output=True, text=True, check=True).stdout
    folder = _folder(f"{source.stem}-{real[0]}", version, source.read_text(), *real)
    if (folder / "log").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [str(compiler), "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "--fatbin"]
    command += [f"-gencode=arch={virtual},code=[{','.join(real)}]", "--keep", f"--keep-dir={folder}"]
    command += [str(source), "-o", str(folder / "fatbin")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    assert said.returncode == 0, f"{' '.join(command)}\n{said.stdout}{said.stderr}"
    for file in folder.iterdir():
        if file.suffix != ".cubin":
            file.unlink()
    (folder / "log").write_text(said.stdout + said.stderr)
    return folder


def test_every_instantiation_is_compiled_for_each_case_of_the_sources() -> None:
    """By the gate, whose CUDA build leaves architectures out that have no code of their own."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu", ".cpp")]
    asked = [one for path in sources for one in re.findall(r"__CUDA_ARCH\w*.*", path.read_text())]
    begins = [int(match[1]) for one in asked if (match := re.fullmatch(r"__CUDA_ARCH__ >= (\d+)", one))]
    assert len(begins) == len(asked) > 0, asked
    built = re.search(r"TORCH_CUDA_ARCH_LIST='(.*)\+PTX'", (ROOT / ".ci" / "run").read_text())
    assert built is not None
    compiled = [80, *(int(name.replace(".", "")) for name in built[1].split(";"))]

    def case_of(architecture: int) -> int:
        return sum(10 * architecture >= begin for begin in begins)

    assert {case_of(int(name[3:])) for name in ARCHITECTURES} == set(map(case_of, compiled))


@pytest.fixture(scope="module")
def every_kernel() -> dict[str, Path]:
    """The folders of _compile() for each launch file, with all its instantiations."""
    if hostbuild.nvcc() is None:
        pytest.skip("no nvcc")
    with ThreadPoolExecutor(JOBS) as pool:
        sources = {name: ROOT / "csrc" / "cuda" / "launch" / f"{name}.cu" for name in LAUNCH_FILES}
        pending = {name: pool.submit(_compile, source, *EVERY_KERNEL) for name, source in sources.items()}
    return {name: future.result() for name, future in pending.items()}


@pytest.fixture(scope="module")
def hot_kernels(every_kernel: dict[str, Path]) -> list[Path]:
    """The folders of _compile() for the hot instantiations on the architectures not in every_kernel."""
    folder = CACHE / "static" / "hot"
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for name, compiled in every_kernel.items():
        entries = cudatools.declarations((compiled / "log").read_text())
        lines = [f'#include "cuda/kernels/{name}.h"']
        lines += [f"template __global__ void {one};" for one in sorted(entries) if is_hot(one)]
        source = folder / f"{name}.cu"
        source.write_text("\n".join(lines) + "\n")
        sources.append(source)
    with ThreadPoolExecutor(JOBS) as pool:
        pending = [pool.submit(_compile, source, *target) for target in HOT_KERNELS for source in sources]
    return [future.result() for future in pending]


@pytest.fixture(scope="module")
def resources(every_kernel: dict[str, Path], hot_kernels: list[Path]) -> list[Resources]:
    """What ptxas said of every kernel on every architecture that it was compiled for."""
    folders = [*every_kernel.values(), *hot_kernels]
    return [one for folder in folders for one in cudatools.resources((folder / "log").read_text())]


def test_nvcc_compiles_the_kernels_for_every_architecture(
    resources: list[Resources], pytestconfig: pytest.Config
) -> None:
    kernels = {one.kernel for one in resources}
    hot = [one for one in resources if is_hot(one.kernel)]
    assert len(kernels) >= 100
    assert len(hot) >= len(kernels) // 5 * len(ARCHITECTURES)
    assert {(one.kernel, one.architecture) for one in hot} == {
        (kernel, architecture) for kernel in kernels if is_hot(kernel) for architecture in ARCHITECTURES
    }
    text = f"Hot kernels (of {len(kernels)}), {hostbuild.nvcc()}\n{cudatools.table(hot)}"
    cold_spills = [one for one in resources if one.spilled_bytes and not is_hot(one.kernel)]
    if cold_spills:
        text += f"\nOther kernels that spill\n{cudatools.table(cold_spills)}"
    pytestconfig.stash[hostbuild.TABLES].append(text)


def test_hot_kernels_do_not_spill(resources: list[Resources]) -> None:
    spills = forbidden_spills(resources)
    assert not spills, "\n" + cudatools.table(spills)


def bound_of(kernel: str) -> int:
    """The registers of a thread that plans count on, by the constants of kernels/traits.h."""
    text = (ROOT / "csrc" / "cuda" / "kernels" / "traits.h").read_text()
    constants = dict(re.findall(r"constexpr int (k\w*Registers\w*) = (\d+);", text))
    name = "kRegistersOfThread"
    if "(gc::Path)16" in kernel and "broadcast_flat" in kernel:
        name = "kMoreRegisters"
    elif "(gc::Path)16" in kernel and "<double" not in kernel:
        name = "kFullMachineRegisters"
    return int(constants[name])


def test_a_thread_takes_no_more_registers_than_plans_count_on(resources: list[Resources]) -> None:
    """Or fewer blocks would be resident at once than a plan fills the machine with."""
    assert len({bound_of(one.kernel) for one in resources}) == 3
    more = [one for one in resources if one.registers > bound_of(one.kernel)]
    assert not more, "\n" + cudatools.table(more)


def machine_code(folder: Path) -> dict[str, str]:
    """That of each kernel, by name, where _compile() was for one architecture."""
    (cubin,) = folder.glob("*.cubin")
    try:
        return cudatools.disassemble(cubin)
    except cudatools.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("launch_file", [name for name in LAUNCH_FILES if "transform" not in name])
def test_hot_kernels_load_16_bytes(every_kernel: dict[str, Path], launch_file: str) -> None:
    code = machine_code(every_kernel[launch_file])
    hot = {kernel: text for kernel, text in code.items() if moves_vectors(kernel)}
    assert hot
    # Into registers, or into shared memory while the thread goes on.
    narrow = [kernel for kernel, text in hot.items() if not re.search(r"LDG\.E\.128|LDGSTS\S*\.128", text)]
    assert not narrow, f"no 16-byte loads in {narrow}"


@pytest.mark.parametrize("launch_file", ["pool_backward", "pool_forward"])
def test_staged_tiles_bypass_the_registers(every_kernel: dict[str, Path], launch_file: str) -> None:
    code = machine_code(every_kernel[launch_file])
    staged = {kernel: text for kernel, text in code.items() if re.search(r"\(gc::Path\)[12]\b", kernel)}
    assert len(staged) >= 20
    through_registers = [kernel for kernel, text in staged.items() if "LDGSTS" not in text]
    assert not through_registers
    never_awaited = [kernel for kernel, text in staged.items() if "LDGDEPBAR" not in text]
    assert not never_awaited


def test_newer_ways_of_uniform_pooling_load_without_a_division(every_kernel: dict[str, Path]) -> None:
    """A block's first load waits for all that comes before it."""
    code = machine_code(every_kernel["pool_forward"])
    before_load = {
        kernel: text.split("LDG")[0] for kernel, text in code.items() if "(gc::Weighting)2" in kernel
    }
    divide = {kernel for kernel, text in before_load.items() if "MUFU.RCP" in text}
    assert divide == {kernel for kernel in before_load if "(gc::Path)" not in kernel}
    assert 0 < len(divide) < len(before_load)


def _compile_volta(launch_file: str, kernels: list[str]) -> tuple[str, str]:
    """The PTX of these kernels by NVRTC 12.6, and ptxas's log for sm_70."""
    folder = _folder(f"{launch_file}-volta", *kernels)
    ptx, log = folder / "kernels.ptx", folder / "log"
    if log.exists():
        return ptx.read_text(), log.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    source = f'#include "cuda/kernels/{launch_file}.h"\n'
    options = ["--gpu-architecture=compute_70", "--std=c++17"]
    ptx.write_text(cudatools.Nvrtc().ptx(source, kernels, [ROOT / "csrc"], options))
    ptxas = cudatools.nvrtc_root() / "cuda_nvcc" / "bin" / "ptxas"
    ptxas.chmod(0o755)
    command = [str(ptxas), "-arch=sm_70", "-v", str(ptx), "-o", str(folder / "cubin")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    assert said.returncode == 0, said.stdout + said.stderr
    log.write_text(said.stdout + said.stderr)
    return ptx.read_text(), said.stdout + said.stderr


def test_volta(every_kernel: dict[str, Path], pytestconfig: pytest.Config) -> None:
    """CUDA 13 cannot compile for V100: NVRTC 12.6 does, with the same kernels and the same demands."""
    try:
        cudatools.nvrtc_root()
    except cudatools.Unavailable as error:
        pytest.skip(f"NVRTC 12.6: {error}")
    kernels = {
        name: sorted({one.kernel for one in cudatools.resources((folder / "log").read_text())})
        for name, folder in every_kernel.items()
    }
    with ThreadPoolExecutor(JOBS) as pool:
        pending = {name: pool.submit(_compile_volta, name, kernels[name]) for name in LAUNCH_FILES}
    found: list[Resources] = []
    for name, future in pending.items():
        ptx, log = future.result()
        entries = cudatools.resources(log)
        assert sorted(one.kernel for one in entries) == kernels[name]
        found += entries
        code = cudatools.ptx_entries(ptx)
        narrow = [
            one
            for one in kernels[name]
            if moves_vectors(one) and not re.search(r"ld\.global\S*\.v4", code[one])
        ]
        assert not narrow, f"no 16-byte loads in {narrow}"
    hot = [one for one in found if is_hot(one.kernel)]
    pytestconfig.stash[hostbuild.TABLES].append(f"Hot kernels by NVRTC 12.6\n{cudatools.table(hot)}")
    spills = forbidden_spills(hot)
    assert not spills, "\n" + cudatools.table(spills)
