"""The kernels of csrc/cuda/kernels on the CPU, as csrc/cuda launches them: every driver in every build."""

from __future__ import annotations

from collections.abc import Callable

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


@pytest.mark.parametrize(("name", "build"), PAIRS)
def test_kernels(driver: Callable[[str, str], Driver], name: str, build: str) -> None:
    code, output = driver(name, build)(*ARGUMENTS[build])
    assert code == 0, output
    assert " 0 failures" in output


def test_every_launch_file_has_a_driver() -> None:
    """A new family of kernels must not go unrun."""
    assert set(hostbuild.launch_files()) <= set(hostbuild.drivers())
