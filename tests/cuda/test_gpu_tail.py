"""The residual tail's kernels on a GPU, beside the definition that serves there otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from block_cases import Configuration
from evaluate import HALVES, missing_gpu
from tail_cases import GC_TRAIN, RUNNING, TAILS, Ran, Tail, away_from_zero, draw_tail, run_tail, tail_of
from torch import Tensor

import gc_cuda
from gc_cuda import reference

extension = importlib.import_module("gc_cuda._C")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(missing_gpu() != "", reason=missing_gpu() or "there is one"),
]

# Odd channels; whole vectors; rows of pairs and of single elements; a ResNet's last stage.
SIZES = [(3, 67, 31, 37), (2, 512, 60, 64), (2, 64, 25, 42), (8, 256, 7, 7), (1, 2048, 25, 42)]
# As in tests/ops/test_tail.py.
FACTOR, UNITS = 2, 4


@pytest.fixture(autouse=True)
def tail_on() -> Iterator[None]:
    before = extension.chosen_paths()
    extension.choose_paths("tail")
    yield
    extension.choose_paths(before)


def on_the_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def forward(library, tail: Tail, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """out and the running statistics, without gradients."""
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    statistics = {name: given.pop(name) for name in RUNNING if name in given}
    with torch.no_grad():
        out = tail_of(library, tail, given, statistics)(*given.values())
    return {"out": out, **statistics}


def distance(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def errors(found: Ran, truth: Ran) -> dict[str, float]:
    """Of out, the gradients and the running statistics; that of mask_bias is 0."""
    of_all = {"out": (found.out, truth.out)}
    of_all |= {name: (found.results[name], exact) for name, exact in truth.results.items()}
    return {name: distance(*pair) for name, pair in of_all.items() if name != "mask_bias"}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_equals_the_definition(random, tail, size, layout):
    inputs = on_the_gpu(draw_tail(random, tail, size, layout=layout))
    grad = random(*size, layout=layout).cuda()
    ours, theirs = (run_tail(library, tail, inputs, grad) for library in (gc_cuda, reference))
    assert all(error < 1e-10 for error in errors(ours, theirs).values())
    assert ours.out.stride() == inputs["y"].stride()
    if "mask_bias" in inputs:
        assert not ours.results["mask_bias"].any(), "a softmax does not feel it"


@pytest.mark.parametrize("mean", [0, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("tail", [one for one in TAILS if one.relu and one.identity], ids=str)
def test_is_as_exact_as_the_definition(random, tail, dtype, mean, layout):
    worst: dict[tuple[str, str], float] = {}
    for size in SIZES[:4]:
        drawn = draw_tail(random, tail, size, dtype=dtype, parameters=torch.float32, layout=layout, mean=mean)
        inputs = on_the_gpu(away_from_zero(reference, tail, drawn, activation="silu"))
        grad = random(*size, dtype=dtype, layout=layout).cuda()
        exact = run_tail(reference, tail, inputs, grad, torch.float64, activation="silu")
        for library in (gc_cuda, reference):
            found = errors(run_tail(library, tail, inputs, grad, activation="silu"), exact)
            for name, error in found.items():
                key = name, library.__name__
                worst[key] = max(worst.get(key, 0.0), error)
    for name in {name for name, _ in worst}:
        ours, theirs = worst[name, gc_cuda.__name__], worst[name, reference.__name__]
        units = UNITS if "." not in name else 4 * UNITS
        assert ours <= FACTOR * theirs + units * 2.0**-24, f"{name}: {ours:.3g}, PyTorch's {theirs:.3g}"


@pytest.mark.parametrize("tail", [GC_TRAIN, Tail(Configuration("avg", ("mul",)))], ids=str)
def test_the_same_bits_each_time(random, tail, layout):
    for size in SIZES:
        inputs = on_the_gpu(draw_tail(random, tail, size, dtype=torch.float32, layout=layout))
        first = forward(gc_cuda, tail, inputs)
        for _ in range(5):
            again = forward(gc_cuda, tail, inputs)
            assert all(torch.equal(one, again[name]) for name, one in first.items())


@pytest.mark.parametrize(
    ("tail", "launches"),
    [
        (Tail(Configuration("att", ("add",)), "eval"), 3),
        (GC_TRAIN, 4),
        (Tail(Configuration("avg", ("mul",)), "eval"), 3),
        (Tail(Configuration("avg", ("mul",))), 3),
        (Tail(Configuration("avg", ()), "eval"), 1),
        (Tail(Configuration("avg", ())), 2),
    ],
    ids=str,
)
def test_launches(random, tail, launches):
    inputs = on_the_gpu(draw_tail(random, tail, (2, 64, 25, 42), dtype=torch.float32))
    given = dict(inputs)
    statistics = {name: given.pop(name) for name in RUNNING if name in given}
    call = tail_of(gc_cuda, tail, given, statistics)
    with torch.no_grad():
        call(*given.values())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(*given.values())
            torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == launches, [event.name for event in kernels]


def test_off_it_is_the_definition(random):
    """Its own kernels give other bits."""
    inputs = on_the_gpu(draw_tail(random, GC_TRAIN, (2, 64, 25, 42), dtype=torch.float32))
    extension.choose_paths("none")
    off, defined = (forward(library, GC_TRAIN, inputs)["out"] for library in (gc_cuda, reference))
    assert torch.equal(off, defined)
