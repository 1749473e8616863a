"""bench/cpu.py: what it holds the CPU path to, and the bare passes that stand beside it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Reads and writes of a tensor of x's size
PASSES = {"aten::sum": 1, "aten::copy_": 2, "aten::add.out": 3}


class Passes(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += PASSES[func.name()]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cpu(bench):
    return bench("cpu")


@pytest.fixture
def cases(bench):
    return bench("cases")


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_bare_passes_move_what_the_block_has_to(cpu, cases, direction):
    case = cases.Case(direction, "add", 1 / 4, "float32", "s", (16, 9, 14), 2, "nchw")
    problem = cases.make(case, "cpu")
    call = cpu.bare_passes(problem, torch.empty(case.shape))
    with Passes() as passes:
        call()
    assert passes.count == case.passes


def sample(cpu, **changes):
    fields = {
        "regime": "reused",
        "threads": 2,
        "direction": "forward",
        "dtype": "float32",
        "stage": "c3",
        "shape": [2, 512, 100, 168],
        "layout": "nchw",
        "ms": {
            "gc_cuda": 6.0,
            "eager": 24.0,
            "torch.compile": 12.0,
            "y.copy_(x)": 4.0,
            "x.clone()": 10.0,
            "bare passes": 5.0,
        },
    }
    return cpu.Sample(**fields | changes)


def found(cpu, *samples):
    return {p.what: p for p in cpu.promises(list(samples))}


def test_forward_is_held_to_a_copy_to_eager_and_to_the_compiler(cpu):
    of = found(cpu, sample(cpu))
    copy, eager, compiled = (
        of[f"forward{rest}"] for rest in (" / copy", ", eager / ours", ", torch.compile / ours")
    )
    assert (copy.value, copy.line, copy.kept, copy.limit) == (1.5, 1.6, True, 1.25)
    assert (eager.value, eager.line, eager.kept, eager.limit) == (4.0, 3.5, True, 4.8)
    assert (compiled.value, compiled.line, compiled.kept, compiled.limit) == (2.0, 2.5, False, 2.4)


def test_fresh_pages_widen_the_limit_by_what_a_clone_costs_above_a_copy(cpu):
    of = found(cpu, sample(cpu, regime="fresh"))
    times = of["forward / copy and fresh pages"]
    assert times.value == pytest.approx(6.0 / ((1.6 * 4.0 + 6.0) / 1.6))
    assert times.kept


def test_training_is_held_to_eager(cpu):
    training = found(cpu, sample(cpu, direction="forward+backward"))["forward+backward, eager / ours"]
    assert (training.value, training.line, training.kept, training.limit) == (4.0, 8.0, False, 4.8)
    small = found(cpu, sample(cpu, direction="forward+backward", stage="c5"))
    assert small["forward+backward, eager / ours"].line == 5.0


def test_threads_are_held_to_one_thread(cpu):
    single = sample(cpu, threads=1, ms={"gc_cuda": 9.0, "bare passes": 6.0})
    gain = found(cpu, sample(cpu), single)["forward, 1 -> 2 threads"]
    assert (gain.value, gain.line, gain.kept, gain.limit) == (1.5, 1.7, False, 1.2)


def test_bfloat16_is_held_to_float32(cpu):
    half = sample(cpu, dtype="bfloat16", ms={"gc_cuda": 7.5})
    ratio = found(cpu, sample(cpu), half)["forward, bfloat16 / float32"]
    assert (ratio.value, ratio.kept) == (1.25, False)


def test_a_missed_line_is_marked(cpu):
    rows = cpu.table(cpu.promises([sample(cpu)]))
    assert [row[1:6] for row in rows if row[5]] == [
        ["forward, torch.compile / ours", "c3 2x512x100x168 nchw", "2.00", "≥ 2.5", "MISSED"]
    ]
