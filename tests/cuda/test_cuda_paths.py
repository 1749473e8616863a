"""The switch of newer paths of a launch (csrc/cuda/plan/paths.h), and the plans that take them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import gc_cuda  # noqa: F401  (loads torch, whose libraries the extension needs)

extension = importlib.import_module("gc_cuda._C")
plan = extension.plan

SM_75 = {"multiprocessors": 40, "shared_bytes": 65536}
NAMES = (
    *("staged_grad", "tiles_ahead", "late_merge", "early_start", "full_machine", "neighbours"),
    *("tail", "around"),
)


@pytest.fixture(autouse=True)
def the_choice_before() -> Iterator[None]:
    before = extension.chosen_paths()
    yield
    extension.choose_paths(before)


def imported(paths: str | None) -> subprocess.CompletedProcess[str]:
    """A process that imports the package with GC_CUDA_PATHS, and prints what is chosen."""
    environment = {name: value for name, value in os.environ.items() if name != "GC_CUDA_PATHS"}
    if paths is not None:
        environment["GC_CUDA_PATHS"] = paths
    code = "import gc_cuda, gc_cuda._C as c; print(c.chosen_paths())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


class TestSwitch:
    @pytest.mark.parametrize(
        ("said", "chosen"),
        [
            (None, "None"),
            ("", "None"),
            ("none", "none"),
            ("tiles_ahead,staged_grad", "staged_grad,tiles_ahead"),
            ("all", ",".join(NAMES)),
        ],
    )
    def test_the_environment_chooses(self, said: str | None, chosen: str) -> None:
        done = imported(said)
        assert done.stdout.strip() == chosen, done.stderr

    def test_a_wrong_name_in_the_environment_is_an_error_at_once(self) -> None:
        done = imported("staged_grads")
        assert done.returncode != 0
        assert "GC_CUDA_PATHS: paths must be all, none, or some of staged_grad," in done.stderr
        assert "got staged_grads" in done.stderr

    def test_a_process_chooses(self) -> None:
        extension.choose_paths("staged_grad")
        assert extension.chosen_paths() == "staged_grad"
        extension.choose_paths(None)
        assert extension.chosen_paths() is None
        with pytest.raises(ValueError, match=r"paths must be all, none, or some of .* got sideways"):
            extension.choose_paths("sideways")

    def test_the_tail_is_off_until_it_is_asked_for(self) -> None:
        assert not extension.tail_on(90)
        for paths, on in (("tail", True), ("all", True), ("staged_grad", False), ("none", False)):
            extension.choose_paths(paths)
            assert extension.tail_on(75) == extension.tail_on(120) == on, paths

    def test_around_is_off_until_it_is_asked_for(self) -> None:
        assert not extension.around_on(90)
        for paths, on in (("around", True), ("all", True), ("tail", False), ("none", False)):
            extension.choose_paths(paths)
            assert extension.around_on(75) == extension.around_on(120) == on, paths

    def test_plans_are_the_measured_ones_unless_asked(self) -> None:
        for kernel in ("pool_mask", "pool_uniform", "pool_backward_block", "broadcast"):
            for pixels in (16800, 1050, 49):
                p = plan(kernel, 2, 512, pixels)
                assert p.paths == "none", p
                assert str(p) == str(plan(kernel, 2, 512, pixels, paths="none"))


STAGED = [("pool_backward_block", "staged_grad"), ("pool_mask", "tiles_ahead")]


@pytest.mark.parametrize(("kernel", "path"), STAGED)
class TestStagedTiles:
    @pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_a_tile_fits_beside_what_the_kernel_had(
        self, kernel: str, path: str, layout: str, dtype: str
    ) -> None:
        for shape in ((2, 512, 16800), (2, 1024, 4200), (1, 2048, 1050)):
            p: Any = plan(kernel, *shape, layout, dtype, paths=path)
            assert p.paths == path, p
            assert p.shared_bytes >= p.rows * p.threads * 16, p

    def test_without_the_shared_memory_the_measured_way_serves(self, kernel: str, path: str) -> None:
        p = plan(kernel, 2, 2048, 4200, paths=path, **SM_75)
        assert p.paths == "none"
        assert str(p) == str(plan(kernel, 2, 2048, 4200, **SM_75))

    def test_single_halves_are_not_copied(self, kernel: str, path: str) -> None:
        assert plan(kernel, 2, 512, 49, dtype="float16", paths=path).paths == "none"
        assert plan(kernel, 2, 512, 50, dtype="float16", paths=path).paths == path


def test_staged_grad_needs_no_tile_of_16_rows() -> None:
    """Such a tile has no registers for more than one row of grad at a time: 63 us at c4 on an H100."""
    assert plan("pool_backward_block", 2, 1024, 4200).rows == 16
    assert plan("pool_backward_block", 2, 1024, 4200, paths="staged_grad").rows == 8
