"""ContextBlock equals its reference and mmcv's, and behaves like it where a backbone uses it."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import nn
from whole_models import FUSIONS, POOLINGS, randomised, run

import gc_cuda
from gc_cuda import reference

# Roundings to a half dtype between x and out: context, first product, norm, second product, sigmoid, scaling,
# sum.
BLOCK_ROUNDINGS = 7


def twins(*args, dtype=torch.float64, device="cpu", **kwargs):
    """Our block and the reference with the same parameters."""
    ours = randomised(gc_cuda.ContextBlock(*args, **kwargs))
    theirs = reference.ContextBlock(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device, dtype), theirs.to(device, dtype)


@pytest.mark.parametrize("pooling_type", POOLINGS)
@pytest.mark.parametrize("fusion_types", FUSIONS)
@pytest.mark.parametrize("size", [(2, 32, 9, 14), (1, 64, 7, 7), (2, 17, 31, 37)], ids=str)
def test_equals_the_reference(random, pooling_type, fusion_types, size, layout, device):
    ours, theirs = twins(size[1], 1 / 4, pooling_type, fusion_types, device=device)
    x, grad = (random(*size, device=device, layout=layout) for _ in range(2))
    (out, gradients), (expected, expected_gradients) = run(ours, x, grad), run(theirs, x, grad)
    assert_close_to_truth("out", out, expected, expected)
    for name, gradient in expected_gradients.items():
        # the gradient of the mask bias is 0: what is left of it in PyTorch is the rounding of large terms
        scale = grad.abs().sum() if name == "conv_mask.bias" else gradient
        assert_close_to_truth(f"grad of {name}", gradients[name], gradient, gradient, scale)


@pytest.mark.parametrize("pooling_type", POOLINGS)
@pytest.mark.parametrize("fusion_types", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(random, pooling_type, fusion_types, dtype, layout, device):
    ours, theirs = twins(64, 1 / 4, pooling_type, fusion_types, dtype=dtype, device=device)
    x = random(2, 64, 25, 42, dtype=dtype, device=device, layout=layout)
    eager, truth = theirs(x), copy.deepcopy(theirs).double()(x.double())
    out = ours(x)
    assert_close_to_truth("out", out, eager, truth, truth.abs() + x.abs().double(), roundings=BLOCK_ROUNDINGS)
    assert out.is_contiguous(memory_format=layout)


def test_new_block_is_the_identity(random, layout, device):
    x = random(2, 32, 9, 14, dtype=torch.float32, device=device, layout=layout)
    for pooling_type in POOLINGS:
        block = gc_cuda.ContextBlock(32, 1 / 4, pooling_type).to(device)
        assert torch.equal(block(x), x)
        # mmcv's multiplying branch starts at sigmoid(0)
        block = gc_cuda.ContextBlock(32, 1 / 4, pooling_type, ("channel_mul",)).to(device)
        assert torch.equal(block(x), x / 2)


def test_unused_branches_are_none():
    block = gc_cuda.ContextBlock(32, 1 / 4, "avg", ("channel_mul",))
    assert block.conv_mask is None
    assert block.channel_add_conv is None
    assert isinstance(block.channel_mul_conv, nn.Sequential)


def test_reset_parameters_restores_the_identity(random):
    block = randomised(gc_cuda.ContextBlock(32, 1 / 4, "att", ("channel_add",)))
    x = random(2, 32, 5, 6, dtype=torch.float32)
    assert not torch.equal(block(x), x)
    block.reset_parameters()
    assert torch.equal(block(x), x)
    assert torch.equal(block.conv_mask.bias, torch.zeros(1))


def test_deepcopy_is_independent(random):
    block = randomised(gc_cuda.ContextBlock(16, 1 / 4))
    x = random(2, 16, 5, 6, dtype=torch.float32)
    twin, before = copy.deepcopy(block), block(x)
    assert torch.equal(twin(x), before)
    nn.init.zeros_(twin.channel_add_conv[3].weight)
    assert torch.equal(block(x), before)
    assert not torch.equal(twin(x), before)


def test_cropped_feature_map(random, layout):
    """Where mmcv's block raises."""
    ours, theirs = twins(16, 1 / 4)
    x = random(2, 16, 8, 9, layout=layout)[:, :, 1:-1, 2:]
    assert_close_to_truth("out", ours(x), theirs(x), theirs(x))


def test_frozen_parameters_get_no_gradient(random):
    block = randomised(gc_cuda.ContextBlock(16, 1 / 4)).requires_grad_(False)
    x = random(2, 16, 5, 6, dtype=torch.float32, grad=True)
    block(x).sum().backward()
    assert all(parameter.grad is None for parameter in block.parameters())
    assert x.grad is not None


def test_parametrized_weights(random):
    """Weight norm and the like: the block reads the weights as its convolutions would."""
    x, grad = (random(2, 16, 5, 6) for _ in range(2))
    ours, theirs = twins(16, 1 / 2, "att", ("channel_add", "channel_mul"))
    for block in (ours, theirs):
        nn.utils.parametrizations.weight_norm(block.conv_mask)
        nn.utils.parametrizations.weight_norm(block.channel_add_conv[0])
        nn.utils.parametrizations.spectral_norm(block.channel_mul_conv[3]).eval()
    theirs.load_state_dict(ours.state_dict())
    (out, gradients), (expected, expected_gradients) = run(ours, x, grad), run(theirs, x, grad)
    assert any(name.endswith("parametrizations.weight.original0") for name in gradients)
    assert_close_to_truth("out", out, expected, expected)
    for name, gradient in expected_gradients.items():
        scale = grad.abs().sum() if name == "conv_mask.bias" else gradient
        assert_close_to_truth(f"grad of {name}", gradients[name], gradient, gradient, scale)


def test_parameters_that_appear_when_they_are_looked_up(random):
    """As DeepSpeed's ZeRO-3 gathers them: in the dictionary of the module, by its subscript."""
    read = []

    class Gathering(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    block = randomised(gc_cuda.ContextBlock(16, 1 / 4))
    x = random(2, 16, 5, 6, dtype=torch.float32)
    expected = block(x)
    parts = [module for module in block.modules() if module._parameters]
    for module in parts:
        module._parameters = Gathering(module._parameters)
    assert torch.equal(block(x), expected)
    assert read == ["weight", "bias"] * len(parts)


@pytest.mark.parametrize(
    ("parameters", "map_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_parameters_of_a_dtype_that_does_not_fit(random, parameters, map_dtype):
    """Eager raises, too; under autocast, which casts there, the block runs."""
    block = randomised(gc_cuda.ContextBlock(16, 1 / 4)).to(parameters)
    x = random(2, 16, 5, 6, dtype=map_dtype)
    with pytest.raises(
        TypeError, match=f"x must be {parameters} like the block's parameters, got {map_dtype}"
    ):
        block(x)
    if map_dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x)
        torch.testing.assert_close(out, copy.deepcopy(block).float()(x))
        out.sum().backward()
        assert all(parameter.grad.dtype == parameters for parameter in block.parameters())


def test_another_eps(random, device):
    """Of a block, and of the function with its parameters."""
    ours, theirs = twins(32, 1 / 4, "att", FUSIONS[-1], eps=0.5, device=device)
    x = random(2, 32, 5, 6, device=device)
    truth = theirs(x)
    parts = (ours.conv_mask, ours.channel_add_conv, ours.channel_mul_conv)
    mask, add, mul = (tuple(part.parameters()) for part in parts)
    of_the_function = gc_cuda.global_context(x, *mask, add, mul, eps=0.5)
    for out in (ours(x), of_the_function):
        assert_close_to_truth("out", out, truth, truth)
    assert theirs.channel_add_conv[1].eps == 0.5
    default = twins(32, 1 / 4, "att", FUSIONS[-1], device=device)
    for block in default:
        assert not torch.allclose(block(x), truth)


@pytest.mark.parametrize("pooling_type", POOLINGS)
@pytest.mark.parametrize("fusion_types", FUSIONS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(random, dtype, x_dtype, fusion_types, pooling_type, device):
    """The dtypes of eager, also for the other half type, which eager widens to float32 because the two do not
    meet; the values of eager for the x of a half convolution and for a float32 one.
    """
    wide = torch.float64 if x_dtype == torch.float64 else torch.float32
    ours, theirs = twins(64, 1 / 4, pooling_type, fusion_types, dtype=wide, device=device)
    x, grad = (random(2, 64, 9, 14, device=device).to(x_dtype) for _ in range(2))
    truth = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast(device.type, dtype):
        (out, gradients), (eager, of_eager) = run(ours, x, grad), run(theirs, x, grad)
    assert out.dtype == eager.dtype
    for name, gradient in of_eager.items():
        assert gradients[name].dtype == gradient.dtype, name
        assert gradients[name].isfinite().all(), name
        if name != "x":
            assert gradient.dtype == wide
    if x_dtype not in (dtype, torch.float32):
        return
    # fp32 x: both of them compute the transform in the half dtype
    terms = truth.abs() + x.abs().double()
    assert_close_to_truth("out", out, eager, truth, terms, roundings=BLOCK_ROUNDINGS, rounded_to=dtype)
    for name, gradient in of_eager.items():
        # That of a mask's bias is 0 but for eager's roundings.
        slack = 0.01 * float(grad.abs().sum()) if name == "conv_mask.bias" else 0
        assert (gradients[name] - gradient).norm() <= 0.1 * gradient.norm() + slack, name
