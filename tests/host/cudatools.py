"""CUDA tools for checks that need no GPU: NVRTC 12.6 and a disassembler from wheels, and what ptxas says.

The wheels go to build/wheels, outside of the environment, and are installed once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

from hostbuild import ROOT, nvcc

WHEELS = ROOT / "build" / "wheels"
INSTALL_TIMEOUT_S = 600

# CUDA 13 dropped Volta; 12.6 compiles for it. The headers are in wheels of their own, ptxas is in nvcc's.
NVRTC_WHEELS = tuple(f"nvidia-cuda-{part}-cu12==12.6.*" for part in ("nvrtc", "runtime", "nvcc", "cccl"))
# Reads sm_75 and later; the toolkit need not have it.
DISASSEMBLER_WHEELS = ("nvidia-cuda-nvdisasm==13.2.*",)


class Unavailable(RuntimeError):
    """A tool is not on this machine and cannot be installed."""


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"pip {' '.join(arguments)}: no answer in {INSTALL_TIMEOUT_S} s") from error
    if said.returncode != 0:
        lines = [line for line in said.stderr.splitlines() if "ERROR" in line] or said.stderr.splitlines()
        raise Unavailable(f"pip {' '.join(arguments)}: {lines[-1] if lines else 'failed'}")


def _wheels(name: str, requirements: tuple[str, ...]) -> Path:
    """The folder where these wheels are unpacked. Raises Unavailable if pip cannot get them."""
    target = WHEELS / name
    WHEELS.mkdir(parents=True, exist_ok=True)
    with open(WHEELS / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "complete").exists():
            shutil.rmtree(target, ignore_errors=True)
            _pip("install", "--no-deps", "--target", str(target), *requirements)
            (target / "complete").touch()
    return target


@functools.cache
def nvrtc_root() -> Path:
    """The folder of the NVRTC 12.6 wheels (it has cuda_nvrtc/, cuda_runtime/, ...).

    Raises:
        Unavailable: they are not there and pip cannot get them.
    """
    return _wheels("nvrtc-12.6", NVRTC_WHEELS) / "nvidia"


@functools.cache
def nvdisasm() -> Path:
    """The toolkit's disassembler, or a wheel's.

    Raises:
        Unavailable: it is not there and pip cannot get it.
    """
    compiler = nvcc()
    if compiler is not None and (compiler.parent / "nvdisasm").exists():
        return compiler.parent / "nvdisasm"
    found = next(_wheels("nvdisasm-13.2", DISASSEMBLER_WHEELS).glob("nvidia/**/nvdisasm"))
    found.chmod(0o755)
    return found


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas gave one kernel."""

    kernel: str  # demangled, without parameters
    architecture: str
    registers: int
    spilled_bytes: int
    stack_bytes: int


def _filt(names: list[str], *options: str) -> list[str]:
    said = subprocess.run(
        ["c++filt", *options], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [re.sub(r"^void ", "", name) for name in said.stdout.splitlines()]


def demangle(names: list[str]) -> list[str]:
    """C++ names without their parameter lists and return types."""
    return _filt(names, "-p")


def declarations(log: str) -> list[str]:
    """The kernels in the output of ptxas --verbose, with their parameter lists."""
    return sorted(set(_filt(re.findall(r"Compiling entry function '(\w+)'", log))))


def resources(log: str) -> list[Resources]:
    """Reads the output of ptxas --verbose."""
    entries = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    names = demangle([entry[0] for entry in entries])
    return [
        Resources(name, architecture, int(registers), int(stores) + int(loads), int(stack))
        for name, (_, architecture, stack, stores, loads, registers) in zip(names, entries)
    ]


def table(found: list[Resources]) -> str:
    """Registers by kernel and architecture, as text; "+8B" are spilled bytes, "s16" is a stack frame."""
    architectures = sorted({one.architecture for one in found}, key=lambda name: int(name[3:]))
    by_place = {(one.kernel, one.architecture): one for one in found}
    kernels = sorted({one.kernel for one in found})
    width = max(map(len, kernels))
    lines = [f"{'registers':{width}}" + "".join(f"{name:>9}" for name in architectures)]
    for kernel in kernels:
        line = f"{kernel:{width}}"
        for architecture in architectures:
            one = by_place.get((kernel, architecture))
            cell = "-" if one is None else str(one.registers)
            if one is not None and one.spilled_bytes:
                cell += f"+{one.spilled_bytes}B"
            elif one is not None and one.stack_bytes:
                cell += f"s{one.stack_bytes}"
            line += f"{cell:>9}"
        lines.append(line)
    return "\n".join(lines)


def disassemble(cubin: Path) -> dict[str, str]:
    """The machine code of each kernel, by demangled name."""
    command = [str(nvdisasm()), "--print-code", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    sections = re.split(r"^\s*\.section\s+\.text\.([\w$]+),.*$", said.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(demangle(sections[::2]), sections[1::2]))


def ptx_entries(ptx: str) -> dict[str, str]:
    """The text of each kernel of a PTX module, by demangled name."""
    parts = re.split(r"^\s*(?:\.visible\s+|\.weak\s+)?\.entry\s+(\w+)\(", ptx, flags=re.MULTILINE)[1:]
    return dict(zip(demangle(parts[::2]), parts[1::2]))


class Nvrtc:
    """NVRTC 12.6 by ctypes."""

    def __init__(self) -> None:
        library = nvrtc_root() / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
        self._lib = ctypes.CDLL(str(library))
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _check(self, code: int) -> None:
        if code != 0:
            raise RuntimeError(f"NVRTC: {self._lib.nvrtcGetErrorString(code).decode()}")

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        content = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, content))
        return content.value.decode()

    def ptx(self, source: str, kernels: list[str], includes: list[Path], options: list[str]) -> str:
        """Compiles `source` with these template instantiations to PTX.

        Raises:
            RuntimeError: it does not compile; the message is the log.
        """
        program = ctypes.c_void_p()
        name = b"kernels.cu"
        self._check(self._lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name, 0, None, None))
        try:
            for kernel in kernels:
                self._check(self._lib.nvrtcAddNameExpression(program, kernel.encode()))
            headers = [nvrtc_root() / part / "include" for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]
            flags = [*options, *(f"--include-path={folder}" for folder in [*includes, *headers])]
            array = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
            if self._lib.nvrtcCompileProgram(program, len(flags), array) != 0:
                raise RuntimeError(self._text(program, "ProgramLog"))
            return self._text(program, "PTX")
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))
