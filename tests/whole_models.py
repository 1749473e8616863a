"""What the tests of whole models share: weights that leave no part idle, and a comparison of two models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gc_cuda

POOLINGS = ["att", "avg"]
FUSIONS = [("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")]

# Relative to the largest value, through some fifty layers. PyTorch's double hard sigmoid is differentiated
# with one sixth in float32.
FLOAT64, FLOAT32_CONSTANT = 1e-10, 1e-6


def randomised(block):
    """The block with parameters that a training could have left: none is zero, every branch matters."""
    torch.manual_seed(1)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.5)
    return block


def run(block, x, grad):
    """The output, and the gradients of x and of every parameter by name."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    out = block(x)
    out.backward(grad.to(out.dtype))
    return out.detach(), {"x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}


def awake(model: nn.Module) -> nn.Module:
    """The model with no branch that starts at zero, in float64."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            deviation = parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=deviation, generator=generator)
        elif name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.double()


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {"output": out.detach(), "gradient of x": x.grad, **gradients}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = FLOAT64) -> None:
    assert list(actual) == list(expected)
    for name, truth in expected.items():
        largest = truth.abs().max()
        if name.endswith(("conv_mask.bias", "conv_attn.bias")):
            largest = largest.clamp(min=1)  # zero, but for what PyTorch's roundings leave of it
        error = (actual[name] - truth).abs().max()
        assert error <= relative * largest + 1e-300, f"{name}: {error:.3g} of {largest:.3g}"
        assert actual[name].dtype == truth.dtype


def check_accelerated(model: nn.Module, x: Tensor, blocks: int, relative: float = FLOAT64) -> gc_cuda.Report:
    """Before, while and after a model is accelerated: outputs, gradients, keys, objects, classes."""
    model = awake(model)
    expected = step(model, x)
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    objects = [*model.modules(), *model.parameters(), *model.buffers()]

    report = gc_cuda.accelerate(model)
    assert len(report.accelerated) == blocks, str(report)
    assert not report.left_alone, str(report)
    assert list(model.state_dict()) == keys
    now = [*model.modules(), *model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(now, objects)) and len(now) == len(objects)
    for name in report.accelerated:
        assert_runs_fused(model.get_submodule(name))
    assert_same(step(model, x), expected, relative)
    twin = copy.deepcopy(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]

    gc_cuda.restore(model)
    assert [type(module) for module in model.modules()] == kinds
    restored = step(model, x)
    assert all(torch.equal(restored[name], tensor) for name, tensor in expected.items())
    return report


def assert_runs_fused(block: nn.Module) -> None:
    assert type(block).__name__.startswith("Accelerated")
    assert isinstance(block, type(block).__mro__[2])


def check_inserted(resnet: nn.Module, place: str, x: Tensor) -> None:
    """Blocks in a ResNet of 50 layers: where, how many numbers, what its checkpoint finds, and only once."""
    checkpoint, expected = copy.deepcopy(resnet.state_dict()), resnet(x)
    before = sum(parameter.numel() for parameter in resnet.parameters())
    names = gc_cuda.insert(resnet)
    assert len(names) == 13
    assert names[0] == f"layer2.0.{place}"
    assert torch.equal(resnet(x), expected), "a new block is the identity"
    missing, unexpected = resnet.load_state_dict(checkpoint, strict=False)
    assert unexpected == []
    assert all(f".{place}." in key for key in missing)
    added = sum(parameter.numel() for parameter in resnet.parameters()) - before
    assert added == 2_521_741, "the published 2.522 M"
    with pytest.raises(ValueError, match=rf"layer2\.0\.{place} is taken by a ContextBlock"):
        gc_cuda.insert(resnet)


def check_inserted_after_the_norm(bottleneck: nn.Module, place: str, x: Tensor) -> None:
    b = awake(bottleneck)
    normed = b.bn3(b.conv3(b.bn2(b.conv2(b.bn1(b.conv1(x)).relu())).relu()))
    shortcut = x if b.downsample is None else b.downsample(x)
    expected = (b.get_submodule(place)(normed) + shortcut).relu()
    torch.testing.assert_close(b(x), expected, rtol=1e-12, atol=1e-12)
