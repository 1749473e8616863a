"""The backward operator of the residual tail by itself, on every device, from what the CPU's forward operator
keeps: its gradients are those of the definition in float64.
"""

from __future__ import annotations

import pytest
import torch
from block_cases import CONFIGURATIONS, Configuration
from tail_cases import MODES, NO_BLOCK, RUNNING, TAILS, Tail, away_from_zero, draw_tail, run_tail

from gc_cuda import Transform, reference

# Odd everywhere; splits of an image; pixels that are no whole vectors; more channels than a block holds in
# float64.
SIZES = [(3, 12, 5, 7), (2, 67, 31, 37), (2, 64, 25, 42), (1, 2052, 3, 4)]
PARAMETERS = [f"{branch}.{name}" for branch in ("add", "mul") for name in Transform._fields]
NAMES = ["y", "identity", "weight", "bias", "mask_weight", "mask_bias", *PARAMETERS]


def on(device, value):
    """Tensors and lists of them, moved."""
    if isinstance(value, list):
        return [on(device, one) for one in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def gradients_on(device, tail, inputs, grad, needs=None, activation=0):
    """By name; the forward operator runs on the CPU. activation: 0 ReLU, 1 SiLU."""
    branches = [
        [inputs[f"{branch}.{name}"] for name in Transform._fields if f"{branch}.{name}" in inputs]
        for branch in ("add", "mul")
    ]
    norm = inputs.get("weight"), inputs.get("bias")
    block = [inputs.get("mask_weight"), inputs.get("mask_bias"), *branches]
    given = [inputs[name] for name in RUNNING] if tail.mode == "eval" else [None, None]
    kind = MODES.index(tail.mode)
    y, identity = inputs["y"], inputs.get("identity")
    arguments = y, identity, *norm, *given, kind, 1e-5, *block, 1e-5, activation, 0, tail.relu
    out, kept = torch.ops.gc_cuda.bn_context_add_relu(*arguments)
    needed = [name in inputs and (needs is None or name in needs) for name in NAMES]
    backward = grad, y, out if tail.relu else None, *norm, kind, *block, kept, activation, 0, needed
    found = torch.ops.gc_cuda.bn_context_add_relu_backward(*(on(device, one) for one in backward))
    return dict(zip([name for name, wanted in zip(NAMES, needed) if wanted], found))


def largest_errors(found, truth):
    """Relative to the largest value of each."""
    return {
        name: float(
            (value.cpu().double() - truth[name]).abs().max() / truth[name].abs().max().clamp(min=1e-30)
        )
        for name, value in found.items()
        if name != "mask_bias"
    }


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_equals_the_definition(random, tail, size, layout, device):
    inputs = draw_tail(random, tail, size, layout=layout)
    grad = random(*size, layout=layout)
    truth = run_tail(reference, tail, inputs, grad).results
    found = gradients_on(device, tail, inputs, grad)
    assert set(found) == set(inputs) - set(RUNNING)
    for name, error in largest_errors(found, truth).items():
        assert error < 1e-11, name
    if "mask_bias" in found:
        assert not found["mask_bias"].any(), "a softmax does not feel it"
    assert found["y"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("mean", [0, 1000])
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("block", CONFIGURATIONS, ids=str)
def test_float32_far_from_zero(random, block, mode, mean, layout, device):
    """Largest errors over several draws: PyTorch's of a single one may be luck."""
    tail, worst, eager = Tail(block, mode), {}, {}
    for size in ((2, 64, 13, 21), (1, 67, 31, 37), (2, 128, 7, 7)) * 2:
        inputs = draw_tail(random, tail, size, dtype=torch.float32, layout=layout, mean=mean)
        inputs = away_from_zero(reference, tail, inputs, activation="silu")
        grad = random(*size, dtype=torch.float32, layout=layout)
        truth = run_tail(reference, tail, inputs, grad, torch.float64, activation="silu").results
        theirs = run_tail(reference, tail, inputs, grad, activation="silu").results
        ours = gradients_on(device, tail, inputs, grad, activation=1)
        for found, largest in ((ours, worst), ({name: theirs[name] for name in ours}, eager)):
            for name, error in largest_errors(found, truth).items():
                largest[name] = max(largest.get(name, 0.0), error)
    for name, error in worst.items():
        # A sum of numbers that cancel is small beside its terms, and the transform has a chain of these.
        assert error <= 2 * eager[name] + (64 if "." in name else 16) * 2.0**-24, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [*CONFIGURATIONS, NO_BLOCK], ids=str)
def test_each_gradient_alone_has_the_same_bits(random, block, mode, device):
    """What is not needed is not computed, and changes nothing else."""
    tail = Tail(block, mode)
    inputs = draw_tail(random, tail, (2, 24, 9, 10), dtype=torch.float32)
    grad = random(2, 24, 9, 10, dtype=torch.float32)
    together = gradients_on(device, tail, inputs, grad)
    for name, value in together.items():
        alone = gradients_on(device, tail, inputs, grad, needs=(name,))
        assert set(alone) == {name} and torch.equal(alone[name], value), name


@pytest.mark.parametrize("layout_of", ["nchw", "channels_last"])
def test_bits_are_the_same_in_every_run(random, layout_of, device):
    tail = Tail(Configuration("att", ("add", "mul")), "train")
    inputs = draw_tail(random, tail, (4, 48, 31, 33), dtype=torch.float32)
    grad = random(4, 48, 31, 33, dtype=torch.float32)
    if layout_of == "channels_last":
        inputs["y"] = inputs["y"].contiguous(memory_format=torch.channels_last)
    first = gradients_on(device, tail, inputs, grad)
    for _ in range(4):
        again = gradients_on(device, tail, inputs, grad)
        assert all(torch.equal(again[name], value) for name, value in first.items())
