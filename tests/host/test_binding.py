"""The CUDA device on the CPU: csrc/cuda/device.cpp with torch, launches in the harness.

They become the operators' kernels for CPU tensors in a process of their own, in which tests of the functions
run as they do for the CPU path: what a pass plans and hands to the kernels is what a GPU would get. All is
compiled with AddressSanitizer, which sees a kernel leave an allocation of torch's; the launch files and the
harness are the objects of the drivers' asan build.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hostbuild
import pytest
import torch
from hostbuild import HOST, ROOT
from torch.utils.cpp_extension import include_paths, library_paths

BINDING = HOST / "binding"
SOURCES = [ROOT / "csrc" / "cuda" / f"{name}.cpp" for name in ("device", "launch/planned")]
SOURCES += [BINDING / "device.cpp", BINDING / "dry.cpp"]
# The language that torch's headers are written in.
CPP = 20 if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12) else 17
# All functions and modules in small, among them no image, many channels, and every allocation counted.
TESTS = (
    "blocks/blocks",
    "ops/allocations",
    "ops/functional_broadcast",
    "ops/functional_pool",
    "ops/refusals",
)
# And of the residual tail, those that name no device; not squares that no float holds: only the CPU has them.
TAIL_TESTS = ("definition", "tiny", "many_channels", "strides", "frozen", "zero_weight", "not_finite")
TAIL_TESTS += ("(squares and not e+25)", "empty", "dtypes", "(does_not_grow and float32 and 1000)")
TIMEOUT_S = 900


def preloaded() -> list[str]:
    """AddressSanitizer's library, which has to come before all others, and the one that it wants."""
    names = ("libasan.so", "libstdc++.so")
    said = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in names
    ]
    return [one.stdout.strip() for one in said]


@pytest.fixture(scope="module")
def library() -> Path:
    """The binding, the launch files and the harness as one library."""
    reason = hostbuild.missing() or ("" if sys.platform == "linux" else "a library is preloaded as on Linux")
    if reason:
        pytest.skip(reason)
    torchs = [argument for folder in include_paths() for argument in ("-isystem", folder)]
    # Undefined behaviour in torch's headers is not ours.
    arguments = [f"-std=c++{CPP}", "-Wno-psabi", "-fno-sanitize=undefined"]
    arguments += [f"-I{BINDING / 'include'}", *torchs]
    folder = library_paths()[0]
    return hostbuild.build_library(
        "binding",
        hostbuild.ASAN,
        [(source, arguments) for source in SOURCES],
        [f"-L{folder}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}"],
    )


def environment(library: Path, launch_paths: str) -> dict[str, str]:
    """That of a process in which the library's launches serve the CPU's tensors."""
    paths = [str(ROOT), str(BINDING), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "GC_CUDA_BINDING": str(library),
        "GC_CUDA_DRY": "1",
        "GC_CUDA_PATHS": launch_paths,
        "PYTHONPATH": os.pathsep.join(paths),
        "LD_PRELOAD": ":".join(preloaded()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }


def said_by(library: Path, launch_paths: str, *arguments: str) -> str:
    """What Python prints with these arguments; it must end well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=TIMEOUT_S,
        env=environment(library, launch_paths),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


# With newer paths of a launch: what they hand from one launch to the next.
CALLS = [*((test, "none") for test in TESTS), ("blocks/blocks", "all")]


PLUGINS = ("-p", "on_the_host", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist")
TAIL = "ops/tail"
Runs = dict[tuple[str, str], Future[str]]


def pytest_of(test: str) -> tuple[str, ...]:
    folder, name = test.split("/")
    wanted = " or ".join(TAIL_TESTS) if test == TAIL else "cpu or dry"
    return ("-m", "pytest", "-q", "-x", *PLUGINS, "-k", wanted, f"tests/{folder}/test_{name}.py")


@pytest.fixture(scope="module")
def runs(library: Path, pool: ThreadPoolExecutor, selected: Callable[[str], list[dict[str, Any]]]) -> Runs:
    calls = [(TAIL, one["launch_paths"]) for one in selected("test_binding_of_the_residual_tail")]
    calls += [(one["test"], one["launch_paths"]) for one in selected("test_binding")]
    return {(test, paths): pool.submit(said_by, library, paths, *pytest_of(test)) for test, paths in calls}


@pytest.mark.parametrize(("test", "launch_paths"), CALLS)
def test_binding(runs: Runs, test: str, launch_paths: str) -> None:
    assert " passed" in runs[test, launch_paths].result()


@pytest.mark.parametrize("launch_paths", ["none", "early_start"])
def test_binding_of_the_residual_tail(runs: Runs, launch_paths: str) -> None:
    assert " passed" in runs[TAIL, launch_paths].result()


def test_launches_of_the_residual_tail(library: Path) -> None:
    """One for each sweep, one for the transform, and where grad_y needs the norm's gradients, one more."""
    said = said_by(library, "none", str(BINDING / "tail_launches.py"))
    found = {what: int(number) for what, number in re.findall(r"^(.*) (\d+)$", said, re.MULTILINE)}
    forward = {"GC eval": 3, "GC train": 4, "SE eval": 3, "SE train": 3, "plain eval": 1, "plain train": 2}
    forward |= {"GC eval without y": 3, "plain frozen without ReLU": 1}
    assert found == {f"{tail} forward": number for tail, number in forward.items()} | {
        "GC eval backward": 4,
        "GC train backward": 5,
        "SE eval backward": 3,
        "SE train backward": 4,
        "plain eval backward": 2,
        "plain train backward": 3,
        "GC eval without y backward": 4,
        "plain frozen without ReLU backward": 1,
    }


@pytest.mark.parametrize("launch_paths", ["none", "early_start"])
def test_the_first_launch_of_an_operator_waits_for_the_stream(library: Path, launch_paths: str) -> None:
    said = said_by(library, launch_paths, str(BINDING / "early.py"))
    found = {what: int(number) for what, number in re.findall(r"^(.*) (\d+)$", said, re.MULTILINE)}
    two = 2 if launch_paths == "early_start" else 0
    blocks = [f"{pooling} channel_{fusion}" for pooling in ("att", "avg") for fusion in ("add", "mul")]
    expected = {f"{block} {direction}": two for block in blocks for direction in ("forward", "backward")}
    expected |= {"many channels forward": two, "broadcast alone": 0, "pool alone": 0}
    # The transform and the output, unless they come first; not the pooling after statistics of the batch.
    of_tail = {"att given": 2, "avg given": 2, "alone given": 0}
    of_tail |= {"att training": 2, "avg training": 2, "alone training": 1}
    expected |= {f"tail {what}": early if two else 0 for what, early in of_tail.items()}
    assert found == expected


def test_the_backward_pass_has_the_same_bits_whoever_merges_its_sums(library: Path) -> None:
    merged, late = (said_by(library, paths, str(BINDING / "late.py")) for paths in ("none", "late_merge"))
    assert len(set(merged.splitlines())) == 36
    assert merged == late
