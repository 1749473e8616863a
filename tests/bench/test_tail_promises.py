"""bench/tail.py: what it holds a tail to, and that it times what it says."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Reads and writes of a tensor of y's size
PASSES = {"aten::sum": 1, "aten::copy_": 2, "aten::add.out": 3}


class Passes(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += PASSES[func.name()]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tail(bench):
    return bench("tail")


def small(tail, of_batch=True, direction="forward+backward"):
    statistics = tail.OF_BATCH if of_batch else tail.GIVEN
    return tail.Case(statistics, direction, "s", (32, 5, 6), "nchw")


@pytest.mark.parametrize(
    ("of_batch", "direction", "passes"),
    [(True, "forward+backward", 13), (False, "forward+backward", 11), (False, "forward", 4)],
)
def test_bare_passes_are_those_of_the_operation(tail, of_batch, direction, passes):
    problem = tail.make(small(tail, of_batch, direction))
    call = tail.bare_passes(problem, torch.empty_like(problem.y))
    with Passes() as counted:
        call()
    assert counted.count == passes


@pytest.mark.parametrize("of_batch", [True, False])
def test_everything_that_is_timed_is_compared_with_eager(tail, of_batch, monkeypatch):
    calls = tail.calls_of(small(tail, of_batch), compiled=False)
    assert list(calls) == [name for name in tail.NAMES if name != tail.COMPILED_PLAIN]
    right = tail.gc_cuda.bn_context_add_relu
    monkeypatch.setattr(
        tail.gc_cuda, "bn_context_add_relu", lambda y, *rest, **options: right(1.01 * y, *rest, **options)
    )
    with pytest.raises(AssertionError, match="output of GC tail is not that of GC eager"):
        tail.calls_of(small(tail, of_batch=False), compiled=False)


def sample(tail, **changes):
    ms = {"plain": 10.0, "GC eager": 30.0, "GC block only": 15.0, "GC tail": 8.8}
    ms |= {"SE tail": 7.0, "bare passes": 6.0}
    fields = {
        "threads": 1,
        "statistics": tail.OF_BATCH,
        "direction": "forward+backward",
        "stage": "c4",
        "shape": [2, 1024, 50, 84],
        "layout": "nchw",
        "ms": ms,
    }
    return tail.Sample(**fields | changes)


@pytest.mark.parametrize(
    ("of_batch", "lines"),
    [(True, {"c3": 0.85, "c4": 0.85, "c5": 0.9}), (False, {"c3": 1.0, "c4": 1.0, "c5": 1.1})],
)
def test_training_is_held_to_the_plain_tail(tail, of_batch, lines):
    statistics = tail.OF_BATCH if of_batch else tail.GIVEN
    for stage, line in lines.items():
        one = sample(tail, stage=stage, statistics=statistics)
        assert one.line == line
        assert one.missed == (line < 0.88)
    assert sample(tail, statistics=tail.GIVEN, direction="forward").line is None


def test_a_missed_line_is_marked(tail):
    rows = tail.table([sample(tail), sample(tail, stage="c5")])
    assert [row[4:7] for row in rows] == [["0.88", "≤ 0.85", "MISSED"], ["0.88", "≤ 0.9", ""]]
    assert rows[0][7:] == ["0.60", "0.70", "0.29", "0.59"]
    assert tail.kept_sentence([sample(tail), sample(tail, stage="c5")]) == "1 of 2 promises kept"


def test_files(tail, tmp_path):
    header = {"device": "A CPU", "torch": "2"}
    paths = tail.write(tmp_path, header, [sample(tail, statistics=of) for of in tail.LINES])
    assert [path.name for path in paths][:2] == ["a-cpu-tail.json", "a-cpu-tail.md"]
    content = json.loads(paths[0].read_text())
    assert [(entry["line"], entry["missed"]) for entry in content["samples"]] == [(0.85, True), (1.0, False)]
    assert "1 of 2 promises kept." in paths[1].read_text()
