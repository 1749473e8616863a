"""The kernels of csrc/cuda/kernels on the CPU, as csrc/cuda launches them: every driver in every build."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import hostbuild
import pytest
from hostbuild import Driver

# All six schedules where runs are cheap. What the other builds find does not depend on the schedule (bounds,
# undefined behaviour, missing order), so two serve: one for each poison of fresh memory.
TWO_SCHEDULES = ("--schedule", "ascending:0", "--schedule", "random:3")
ARGUMENTS = {"fast": (), "asan": TWO_SCHEDULES, "race": TWO_SCHEDULES}

PAIRS = [
    pytest.param(name, build, marks=pytest.mark.needs_driver(name, build), id=f"{name}-{build}")
    for build in hostbuild.KERNEL_BUILDS
    for name in hostbuild.drivers()
]


@pytest.fixture(scope="module")
def runs(
    driver: Callable[[str, str], Driver],
    pool: ThreadPoolExecutor,
    selected: Callable[[str], list[dict[str, Any]]],
) -> dict[tuple[str, str], Future[tuple[int, str]]]:
    pairs = [(one["name"], one["build"]) for one in selected("test_kernels")]
    return {pair: pool.submit(driver(*pair), *ARGUMENTS[pair[1]]) for pair in pairs}


@pytest.mark.parametrize(("name", "build"), PAIRS)
def test_kernels(runs: dict[tuple[str, str], Future[tuple[int, str]]], name: str, build: str) -> None:
    code, output = runs[name, build].result()
    assert code == 0, output
    assert " 0 failures" in output


def test_every_launch_file_has_a_driver() -> None:
    """A new family of kernels must not go unrun."""
    assert set(hostbuild.launch_files()) <= set(hostbuild.drivers())
