"""Newer paths of a launch on a GPU, beside the measured ones in the same process (docs/newer-paths.md)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from block_cases import CONFIGURATIONS, WHOLE, draw_inputs, function_of
from evaluate import missing_gpu
from torch import Tensor

import gc_cuda
from gc_cuda import reference

extension = importlib.import_module("gc_cuda._C")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(missing_gpu() != "", reason=missing_gpu() or "there is one"),
]

PATHS = ("staged_grad", "tiles_ahead", "late_merge", "early_start", "full_machine", "neighbours", "all")
# Whole vectors and several tiles to a split; pairs; single elements; all channels of a ResNet's last stage.
SIZES = ((2, 512, 60, 64), (2, 1024, 25, 42), (8, 256, 7, 7), (1, 2048, 25, 42))
DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def the_choice_before() -> Iterator[None]:
    before = extension.chosen_paths()
    yield
    extension.choose_paths(before)


def results(function, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def drawn(random, size, layout, dtype, configuration=WHOLE):
    inputs = draw_inputs(
        random,
        configuration,
        size,
        dtype=dtype,
        parameters=torch.float32,
        device="cuda",
        layout=layout,
    )
    leaves = [t.requires_grad_() for t in inputs.values()]
    return function_of(gc_cuda, configuration, inputs), leaves, inputs


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("configuration", (CONFIGURATIONS[0], CONFIGURATIONS[4], WHOLE), ids=str)
def test_a_path_is_as_exact_as_the_measured_one(random, configuration, size, layout, dtype, paths):
    """Against the reference in float64, at most twice as far from it; and the same bits each time."""
    function, leaves, inputs = drawn(random, size, layout, dtype, configuration)
    grad = random(*size, dtype=dtype, device="cuda", layout=layout)
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    expected = results(function_of(reference, configuration, wide), list(wide.values()), grad.double())
    extension.choose_paths("none")
    measured = results(function, leaves, grad)
    extension.choose_paths(paths)
    newer = results(function, leaves, grad)
    again = results(function, leaves, grad)
    step = torch.finfo(dtype).eps
    for one, other, third, want in zip(newer, measured, again, expected, strict=True):
        assert torch.equal(one, third), "not reproducible"
        assert distance(one, want) <= 2 * distance(other, want) + 4 * step


@pytest.mark.parametrize("paths", ["early_start", "all"])
def test_launches_that_overlap_find_what_the_one_before_has_written(random, layout, paths):
    """Calls one after the other on new values, without a pause: each has the bits of a call by itself."""
    function, leaves, _ = drawn(random, (2, 256, 25, 42), layout, torch.float32)
    grad = random(2, 256, 25, 42, dtype=torch.float32, device="cuda", layout=layout)
    values = [random(*leaves[0].shape, dtype=torch.float32, device="cuda", layout=layout) for _ in range(8)]
    extension.choose_paths(paths)
    alone = []
    for value in values:
        torch.cuda.synchronize()
        alone.append(results(function, [value.requires_grad_(), *leaves[1:]], grad))
        torch.cuda.synchronize()
    for _ in range(10):
        together = [results(function, [value, *leaves[1:]], grad) for value in values]
        for one, other in zip(together, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("paths", PATHS)
def test_graphs(random, layout, paths):
    """Captured with the path, a replay has the bits of a call; also after the choice has changed."""
    function, leaves, _ = drawn(random, (2, 256, 25, 42), layout, torch.float32)
    grad = random(2, 256, 25, 42, dtype=torch.float32, device="cuda", layout=layout)
    extension.choose_paths(paths)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = results(function, leaves, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(function, leaves, grad)
    extension.choose_paths("none")
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
