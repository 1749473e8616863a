"""Builds the drivers of tests/host with g++ and runs them.

A driver is drivers/<name>.cpp, linked with the launch files csrc/cuda/launch/*.cu, compiled for the CPU,
and with runtime/*.cpp. There are three builds of each: fast, asan (address and undefined-behaviour
sanitizers) and race (the harness's race checker). Objects are kept in build/host and used again while the
compiler, its flags and the text of all included files are the same.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

HOST = Path(__file__).resolve().parent
ROOT = HOST.parents[1]
CACHE = ROOT / "build" / "host"
LAUNCH = CACHE / "launch"
JOBS = 2
COMPILE_TIMEOUT_S = 600
RUN_TIMEOUT_S = 600

RACE_CHECKER = ("race", "race_memory", "tsan_hooks")


@dataclasses.dataclass(frozen=True)
class Build:
    """How one of the three builds compiles: `flags` everywhere, `kernel_flags` only where kernels are."""

    name: str
    flags: tuple[str, ...]
    kernel_flags: tuple[str, ...] = ()
    race_checker: bool = False


FAST = Build("fast", ("-O2", "-g1"), ("-O1",))
ASAN = Build(
    "asan",
    # Position-independent: test_binding.py makes a library of the objects.
    ("-O1", "-g1", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    # These two triple the time of compiling; AddressSanitizer reports a null pointer's use, too.
    ("-fno-sanitize=null,object-size",),
)
RACE = Build(
    "race",
    # Not position-independent, so that a report's program counters are those of the binary's line table.
    ("-O2", "-g1", "-fno-pie", "-no-pie", "-DGC_HOST_RACE"),
    (
        "-O1",
        "-fsanitize=thread",
        "--param=tsan-distinguish-volatile=1",
        "--param=tsan-instrument-func-entry-exit=0",
        "-fno-threadsafe-statics",
    ),
    race_checker=True,
)
# A barrier of the toy kernels dropped by the compiler, as a comparison with --drop-site.
DROP_1 = dataclasses.replace(RACE, name="race_drop_1", kernel_flags=(*RACE.kernel_flags, "-DGC_DROP_SITE=1"))
UCONTEXT = Build("ucontext", (*FAST.flags, "-DGC_HOST_UCONTEXT"))
BUILDS = {build.name: build for build in (FAST, ASAN, RACE, DROP_1, UCONTEXT)}
# What every kernel driver is built as.
KERNEL_BUILDS = ("fast", "asan", "race")

# Drivers that hold kernels: the toy kernels that test the harness itself, and the laboratory of bench/lab.
ALONE = ("toy", "lab")

# What tests want printed after the run.
TABLES = pytest.StashKey[list[str]]()


class BuildError(RuntimeError):
    """A driver could not be built; the message has the command and the compiler's output."""


def drivers() -> list[str]:
    """The names of the drivers of our kernels: drivers/*.cpp but for those with kernels of their own."""
    return sorted(path.stem for path in (HOST / "drivers").glob("*.cpp") if path.stem not in ALONE)


def launch_files() -> list[str]:
    """The names of csrc/cuda/launch/*.cu, one for each family of kernels."""
    return sorted(path.stem for path in (ROOT / "csrc" / "cuda" / "launch").glob("*.cu"))


@functools.cache
def nvcc() -> Path | None:
    """The compiler in its toolkit, also where the nvcc on the PATH is a wrapper script somewhere else."""
    found = shutil.which("nvcc")
    if found is None:
        return None
    said = subprocess.run(
        [found, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        timeout=60,
    )
    top = re.search(r"^#\$ TOP=(.*)$", said.stdout + said.stderr, re.MULTILINE)
    return (Path(top[1]) / "bin" / "nvcc").resolve() if top else Path(found)


@functools.cache
def cuda_include() -> Path | None:
    """A folder with cuda_fp16.h: of the toolkit, or of the packages that come with PyTorch's CUDA build."""
    compiler = nvcc()
    folders = []
    if compiler is not None:
        top = compiler.parents[1]
        folders += [*top.glob("targets/*/include"), top / "include"]
    for packages in [*site.getsitepackages(), site.getusersitepackages()]:
        folders += Path(packages).glob("nvidia/*/include")
    return next((folder for folder in folders if (folder / "cuda_fp16.h").exists()), None)


def missing() -> str:
    """What this machine lacks to build drivers, or the empty string."""
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_include() is None:
        return "no cuda_fp16.h: neither a CUDA toolkit nor nvidia-cuda-runtime is installed"
    return ""


@functools.cache
def _compiler_version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


@contextmanager
def _lock() -> Iterator[None]:
    """One build at a time, also across test sessions."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(*texts: str | bytes) -> str:
    """A name for this content."""
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text if isinstance(text, bytes) else text.encode()).digest())
    return total.hexdigest()[:20]


def _run_compiler(command: list[str]) -> None:
    said = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    if said.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{said.stdout}{said.stderr}")


def _unchanged(record: Path) -> bool:
    """Are the files that went into an object, noted in its record, still what they were?"""
    if not record.exists():
        return False
    for name, content in json.loads(record.read_text()).items():
        path = Path(name)
        if not path.exists() or digest(path.read_bytes()) != content:
            return False
    return True


def _rewrite_launches() -> None:
    """Copies csrc/cuda/launch to build/host/launch, kernel<<<...>>>(args) as runtime/launch_file.h wants."""
    cuda = ROOT / "csrc" / "cuda" / "launch"
    for old in (LAUNCH / "cuda" / "launch").glob("*"):
        if not (cuda / old.name).exists():
            old.unlink()
    for source in [*cuda.glob("*.cu"), *cuda.glob("*.h")]:
        text = source.read_text()
        rewritten = re.sub(r"(\w+)<<<([^;]*?)>>>\(", r"::gc::host::launch_kernel(\1, \2)(", text)
        target = LAUNCH / "cuda" / "launch" / source.name
        if source.suffix == ".cu" or rewritten != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_text() != rewritten:
                target.write_text(rewritten)
        else:
            target.unlink(missing_ok=True)


def _compile(source: Path, build: Build, kernels: bool, extra: Sequence[str] = ()) -> Path:
    """The object of one source file. extra: more of the compiler's arguments, before all folders of ours."""
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing", *build.flags]
    command += [*extra, "-DGC_HOST_RUN", f"-I{LAUNCH}", f"-I{HOST / 'runtime'}"]
    command += [
        f"-I{ROOT / 'csrc' / 'cuda' / 'kernels'}",
        f"-I{ROOT / 'csrc'}",
        "-isystem",
        str(cuda_include()),
    ]
    command += build.kernel_flags if kernels else ()
    if source.suffix == ".cu":
        command += ["-include", str(HOST / "runtime" / "launch_file.h"), "-x", "c++"]
    folder = CACHE / build.name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}-{digest(_compiler_version(), *command, str(source))}.o"
    record = target.with_suffix(".json")
    if target.exists() and _unchanged(record):
        return target
    record.unlink(missing_ok=True)
    depends = target.with_suffix(".d")
    _run_compiler([*command, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(target)])
    names = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    record.write_text(json.dumps({name: digest(Path(name).read_bytes()) for name in names}))
    return target


def _runtime(build: Build) -> list[tuple[Path, bool]]:
    runtime = sorted((HOST / "runtime").glob("*.cpp"))
    return [(path, False) for path in runtime if build.race_checker or path.stem not in RACE_CHECKER]


def _harness(build: Build) -> list[tuple[Path, bool]]:
    """What every driver of csrc/cuda/kernels has: each source with whether it holds kernels."""
    return [
        *_runtime(build),
        *((path, True) for path in sorted((LAUNCH / "cuda" / "launch").glob("*.cu"))),
        *((path, False) for path in sorted((ROOT / "csrc" / "cuda" / "plan").glob("*.cpp"))),
    ]


def _sources(driver: str, build: Build) -> list[tuple[Path, bool]]:
    """The sources of a driver, each with whether it holds kernels."""
    own = HOST / "drivers" / f"{driver}.cpp"
    if driver in ALONE:
        return [*_runtime(build), (own, True)]
    return [*_harness(build), (own, False)]


def _link(driver: str, build: Build, objects: list[Path]) -> Path:
    inputs = [str(path) for path in objects]
    target = CACHE / build.name / driver
    record = target.with_suffix(".link")
    content = digest(*(path.read_bytes() for path in objects))
    if not (target.exists() and record.exists() and record.read_text() == content):
        _run_compiler(["g++", *build.flags, *inputs, "-o", str(target)])
        record.write_text(content)
    return target


def build_all(targets: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Path]:
    """Builds (driver, build) pairs, at most two compilers at a time, and returns their programs.

    Raises:
        BuildError: a compiler failed.
    """
    wanted = sorted(set(targets))
    with _lock(), ThreadPoolExecutor(JOBS) as pool:
        _rewrite_launches()
        pending = {}
        for driver, name in wanted:
            for source, kernels in _sources(driver, BUILDS[name]):
                if (source, name) not in pending:
                    pending[source, name] = pool.submit(_compile, source, BUILDS[name], kernels)
        objects = {key: future.result() for key, future in pending.items()}
        programs = {}
        for driver, name in wanted:
            inputs = [objects[source, name] for source, _ in _sources(driver, BUILDS[name])]
            programs[driver, name] = _link(driver, BUILDS[name], inputs)
        return programs


def build_library(
    name: str, build: Build, more: Sequence[tuple[Path, Sequence[str]]], link: Sequence[str]
) -> Path:
    """A shared library of the launch files, the harness and more sources, each with arguments of its own.

    Raises:
        BuildError: a compiler failed.
    """
    with _lock(), ThreadPoolExecutor(JOBS) as pool:
        _rewrite_launches()
        sources = [(path, kernels, ()) for path, kernels in _harness(build)]
        sources += [(path, False, tuple(arguments)) for path, arguments in more]
        pending = [pool.submit(_compile, path, build, kernels, extra) for path, kernels, extra in sources]
        objects = [str(one.result()) for one in pending]
        target = CACHE / build.name / f"{name}.so"
        _run_compiler(["g++", *build.flags, "-shared", *objects, *link, "-o", str(target)])
        return target


@dataclasses.dataclass(frozen=True)
class Driver:
    """A built driver."""

    program: Path

    def __call__(self, *arguments: str, timeout: float = RUN_TIMEOUT_S) -> tuple[int, str]:
        """Runs it. Returns its exit code and its output, with source lines for program counters.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        said = subprocess.run(
            [str(self.program), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env={**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1"},
        )
        if said.returncode == 0:
            return 0, said.stdout
        return said.returncode, _with_lines(self.program, said.stdout)


def _with_lines(program: Path, text: str) -> str:
    """Replaces the race checker's [pc 0x...] by source lines, those outside of the runtime."""
    counters = sorted(set(re.findall(r"\[pc (0x[0-9a-f]+)\]", text)))
    if not counters or shutil.which("addr2line") is None:
        return text
    for counter in counters:
        said = subprocess.run(
            ["addr2line", "-i", "-e", str(program), hex(int(counter, 16) - 1)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = [line for line in said.stdout.splitlines() if "/tests/host/runtime/" not in line]
        if lines:
            place = lines[0].split(" ")[0]
            text = text.replace(f"[pc {counter}]", f"[{os.path.relpath(place, ROOT)}]")
    return text


if __name__ == "__main__":
    # For work by hand: builds what is named (driver:build), or everything, and prints where it is.
    names = [tuple(name.split(":")) for name in sys.argv[1:]]
    pairs = [(n[0], n[1]) for n in names] or [(d, b) for d in [*ALONE, *drivers()] for b in KERNEL_BUILDS]
    for program in build_all(pairs).values():
        print(program)
