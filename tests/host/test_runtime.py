"""The harness tested on toy kernels: what it must find, with which report, and what it must let pass."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hostbuild import Driver

Drivers = Callable[[str, str], Driver]

BUILDS = ("fast", "asan", "race")
GOOD = (
    "block_sum",
    "last_block_one_fence",
    "last_block_all_fence",
    "shuffle_float",
    "shuffle_double",
    "shuffle_int",
    "copy",
    "early",
    "not_early",
    "staged",
)
EVERY_BUILD = {
    "bad_alignment": r"misaligned: a vector of 16 bytes .* 4 bytes off",
    "bad_divergent": r"divergent barrier: .*threads 0-31 wait at barrier 0; threads 32-63 wait at barrier 1",
    "bad_early_exit": r"divergent barrier: .*threads 40 have left .*threads 0-39, 41-63 wait at barrier 0",
    "bad_half_a_warp": r"deadlock: .*threads 16-31 wait at barrier 0; threads 0-15 wait in a shuffle",
    "bad_partial_warp": r"warp of fewer than 32 threads",
    "bad_shared_size": r"shared memory: .* makes it 256 bytes, launched with 240",
    "bad_two_arenas": r"shared memory: a thread's second arena",
    "bad_block_of_2048": r"launch limits: 2048 threads a block",
    "bad_shared_64k": r"launch limits: 65536 bytes of dynamic shared memory",
    "bad_never_awaited": r"in flight: block 0 .* ends before what it has staged is there",
    "bad_staged_off_its_boundary": r"misaligned: a vector of 8 bytes .* 4 bytes off",
    "bad_grid_y": r"launch limits: grid.y = 65536",
    "bad_early_load": r"early start: .* reads (x, byte \d+ of 256|memory) before it has waited",
    "bad_early_write": r"early start: .* writes (out, byte \d+ of 256|memory) before it has waited",
    "bad_early_ticket": r"early start: .* takes a ticket of (counter, byte 0 of 4|memory) before it has",
    "bad_early_idle": r"early start: block 1 .* leaves without a wait",
}
ONE_BUILD = [
    ("asan", "bad_overrun", r"heap-buffer-overflow"),
    ("asan", "bad_shared_overrun", r"heap-buffer-overflow"),
    ("race", "bad_overrun", r"out of bounds: .* reads 16 bytes at x, byte 800 of 812"),
    (
        "race",
        "bad_shared_overrun",
        r"out of bounds: .* writes 4 bytes at shared array 0 of block 0, byte 128 of 128",
    ),
    (
        "race",
        "bad_in_place_shift",
        r"data race on out, .* the read by block .*toy.cpp.* the write by block .*toy.cpp",
    ),
    ("race", "bad_shuffle_as_barrier", r"data race on shared array 0 of block 0"),
    ("race", "bad_read_of_output", r"uninitialised: .* reads out, byte \d+ of 256"),
    ("race", "bad_early_read", r"in flight: .* reads shared array 0 of block 0"),
    ("race", "bad_input_written", r"write to an input: .* writes out"),
    ("race", "bad_early_plain_read", r"early start: .* reads x, byte \d+ of 256 before it has waited"),
    ("race", "bad_prefetch", r"out of bounds: .* prefetches x, byte \d+ of 256"),
    ("asan", "bad_prefetch", r"out of bounds: a prefetch"),
]
# Sites of the toy kernels, by their number in drivers/toy.cpp, and what is reported when they are dropped.
DROPS = [
    ("block_sum", 0, r"uninitialised: .* shared array 0|data race on shared array 0"),
    ("block_sum", 1, r"data race on shared array 0"),
    ("last_block_one_fence", 2, r"data race on part, .* the read by .* after the write by"),
    ("last_block_one_fence", 3, r"data race on part|uninitialised: .* part"),
    (
        "last_block_one_fence",
        4,
        r"data race on shared array 0|uninitialised: .* shared array 0|data race on part",
    ),
    ("last_block_one_fence", 5, r"data race on part, .* the read by .* after the write by"),
    ("last_block_all_fence", 2, r"data race on part, .* the read by .* after the write by"),
    ("last_block_all_fence", 3, r"data race on part|uninitialised: .* part"),
    (
        "last_block_all_fence",
        4,
        r"data race on shared array 0|uninitialised: .* shared array 0|data race on part",
    ),
    ("last_block_all_fence", 5, r"data race on part, .* the read by .* after the write by"),
    ("early", 9, r"early start: .* reads x, byte \d+ of 256 before it has waited"),
    ("staged", 6, r"in flight: .* reads shared array 0 of block 0"),
    ("staged", 7, r"(in flight|uninitialised): .* reads shared array 0|data race on shared array 0"),
    ("staged", 8, r"in flight: .* reads shared array 0|data race on shared array 0"),
]
SCHEDULES = ("ascending:0", "reverse:1", "random:2", "random:3", "starvation:4", "starvation:5")

toy_in_all_builds = [pytest.param(build, marks=pytest.mark.needs_driver("toy", build)) for build in BUILDS]


@pytest.mark.parametrize("build", toy_in_all_builds)
@pytest.mark.parametrize("case", GOOD)
def test_correct_kernel_passes_under_every_schedule(driver: Drivers, build: str, case: str) -> None:
    code, output = driver("toy", build)("--case", case)
    assert code == 0, output
    assert "6 runs, 0 failures" in output


@pytest.mark.parametrize("build", toy_in_all_builds)
@pytest.mark.parametrize("case", EVERY_BUILD)
def test_bug_is_found_in_every_build_under_every_schedule(driver: Drivers, build: str, case: str) -> None:
    code, output = driver("toy", build)("--case", case)
    assert code == 1, output
    reports = re.findall(rf"^FAIL {case}, schedule .*{EVERY_BUILD[case]}", output, re.MULTILINE)
    assert len(reports) == len(SCHEDULES), output


@pytest.mark.parametrize(
    ("build", "case", "report"),
    [pytest.param(*row, marks=pytest.mark.needs_driver("toy", row[0])) for row in ONE_BUILD],
)
def test_bug_is_found_by_the_build_made_for_it(driver: Drivers, build: str, case: str, report: str) -> None:
    code, output = driver("toy", build)("--case", case)
    assert code != 0, output
    assert re.search(report, output), output


@pytest.mark.needs_driver("toy", "race")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("case", "dropped", "report"), DROPS)
def test_missing_barrier_or_fence_is_found_in_one_run(
    driver: Drivers, case: str, dropped: int, report: str, schedule: str
) -> None:
    code, output = driver("toy", "race")("--case", case, "--schedule", schedule, "--drop-site", str(dropped))
    assert code == 1, output
    assert re.search(report, output), output


@pytest.mark.needs_driver("toy", "race")
@pytest.mark.needs_driver("toy", "race_drop_1")
def test_dropping_at_run_time_is_dropping_at_compile_time(driver: Drivers) -> None:
    arguments = ("--case", "block_sum", "--schedule", "ascending:0")
    at_run_time = driver("toy", "race")(*arguments, "--drop-site", "1")
    at_compile_time = driver("toy", "race_drop_1")(*arguments)
    for code, output in (at_run_time, at_compile_time):
        assert code == 1, output
        assert "data race on shared array 0 of block 0, byte 4 of 384" in output


@pytest.mark.needs_driver("toy", "ucontext")
@pytest.mark.parametrize("case", GOOD)
def test_portable_fibers(driver: Drivers, case: str) -> None:
    """What machines other than x86-64 use."""
    code, output = driver("toy", "ucontext")("--case", case)
    assert code == 0, output


@pytest.mark.needs_driver("toy", "fast")
def test_missing_fence_is_beyond_the_fast_build(driver: Drivers) -> None:
    """Why there is a race build: in time order nothing is wrong."""
    code, output = driver("toy", "fast")("--case", "last_block_one_fence", "--drop-site", "2")
    assert code == 0, output


@pytest.mark.needs_driver("toy", "fast")
def test_unknown_names_are_errors(driver: Drivers) -> None:
    for arguments in (("--case", "nothing"), ("--schedule", "sideways"), ("--drop-site",), ("--quickly",)):
        code, output = driver("toy", "fast")(*arguments)
        assert code == 2, output


@pytest.mark.needs_driver("toy", "fast")
def test_copies_are_late_under_some_schedules(driver: Drivers) -> None:
    """What is read too early is poison where copies are done later, and right where they are done at once."""
    code, output = driver("toy", "fast")("--case", "bad_early_read")
    assert code == 1, output
    failed = re.findall(r"^FAIL bad_early_read, schedule (\S+): sum: got", output, re.MULTILINE)
    assert 0 < len(failed) < len(SCHEDULES), output
