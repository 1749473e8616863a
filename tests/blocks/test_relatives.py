"""The relatives of the context block against what they are defined by, and the real ones where they exist."""

from __future__ import annotations

import pytest
import torch
from block_cases import Spy
from torch import nn
from torch.nn import functional
from whole_models import assert_same, awake, step

from gc_cuda.blocks import NonLocalBlock, SEBlock, SimplifiedNonLocalBlock
from gc_cuda.blocks.non_local import MODES


def convolve(module, x):
    return functional.conv2d(x, module.weight, module.bias)


class SEReference(nn.Module):
    """Squeeze-and-Excitation in plain PyTorch, with the parameters of another block."""

    def __init__(self, block):
        super().__init__()
        self.fc1, self.act, self.fc2, self.gate = block.fc1, block.act, block.fc2, block.gate

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class SimplifiedReference(nn.Module):
    """W_v at every pixel, before the sum, as in the paper's figure."""

    def __init__(self, block):
        super().__init__()
        self.conv_mask, self.conv_value = block.conv_mask, block.conv_value

    def forward(self, x):
        attention = self.conv_mask(x).flatten(2).softmax(2)
        values = self.conv_value(x).flatten(2)
        return x + torch.einsum("ncs,nks->nc", values, attention)[:, :, None, None]


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Hardswish], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid], ids=lambda kind: kind.__name__)
def test_squeeze_excite(random, act, gate, layout):
    block = awake(SEBlock(24, 5, act, gate))
    x = random(2, 24, 7, 9, layout=layout)
    assert_same(step(block, x), step(SEReference(block), x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_squeeze_excite_without_biases(random, dtype):
    """Fused, with zeros in their place; one that comes later counts, and one that goes again does not."""
    block = awake(SEBlock(24, 5, bias=False)).to(dtype)
    assert list(block.state_dict()) == ["fc1.weight", "fc2.weight"]
    x, relative = random(2, 24, 7, 9).to(dtype), 1e-10 if dtype == torch.float64 else 3e-2
    for first in (None, nn.Parameter(torch.ones(5, dtype=dtype)), None):
        block.fc1.bias = first
        with Spy() as spy:
            assert_same(step(block, x), step(SEReference(block), x), relative)
        assert "gc_cuda::global_context_backward" in spy.names()
        with torch.no_grad():
            torch.testing.assert_close(block(x), SEReference(block)(x), rtol=relative, atol=relative)
    with torch.inference_mode():
        SEBlock(24, 11, bias=False).to(dtype)(x)  # its zeros are made here, and serve training, too
    step(awake(SEBlock(24, 11, bias=False)).to(dtype), x)


def test_squeeze_excite_refuses():
    assert SEBlock(32).fc1.out_channels == 2
    with pytest.raises(ValueError, match=r"act_layer must be .*Hardswish, got GELU"):
        SEBlock(32, act_layer=nn.GELU)
    with pytest.raises(ValueError, match=r"gate_layer must be .*Hardsigmoid, got Tanh"):
        SEBlock(32, gate_layer=nn.Tanh)


def test_simplified_non_local(random, layout):
    block = SimplifiedNonLocalBlock(24)
    x = random(2, 24, 7, 9, layout=layout)
    assert torch.equal(block.double()(x), x), "a new block is the identity"
    awake(block)
    assert_same(step(block, x), step(SimplifiedReference(block), x))


@pytest.mark.parametrize("sub_sample", [False, True], ids=["all pixels", "sub-sampled"])
@pytest.mark.parametrize("mode", MODES)
def test_non_local_like_mmcv(random, mode, sub_sample):
    """The same parameters from the same seed, strictly, and the same results."""
    cnn = pytest.importorskip("mmcv.cnn", reason="mmcv-lite is not installed")
    torch.manual_seed(0)
    theirs = cnn.NonLocal2d(12, sub_sample=sub_sample, reduction=3, mode=mode)
    torch.manual_seed(0)
    ours = NonLocalBlock(12, sub_sample=sub_sample, reduction=3, mode=mode)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    if mode == "gaussian":
        # it multiplies pixels of C channels, and g has C // reduction
        theirs = cnn.NonLocal2d(12, sub_sample=sub_sample, reduction=1, mode=mode)
        ours = NonLocalBlock(12, sub_sample=sub_sample, reduction=1, mode=mode)
    x = random(2, 12, 6, 8)
    assert torch.equal(ours.double()(x), x), "a new block is the identity"
    awake(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if mode == "concatenation":  # mmcv's divides in place what its ReLU has saved, and cannot be trained
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-11, atol=1e-11)
        assert torch.autograd.gradcheck(ours, x[:1, :, :2, :4].clone().requires_grad_())
        return
    actual, expected = step(ours, x), step(theirs, x)
    # some gradients are zero, as a softmax does not feel a shift: what they are compared with is the largest
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-10, atol=1e-12 * largest, msg=name)


def test_non_local_without_scale(random):
    block = awake(NonLocalBlock(8, use_scale=False, reduction=1))
    x = random(1, 8, 4, 5)
    theta, phi, g = (convolve(m.conv, x).flatten(2) for m in (block.theta, block.phi, block.g))
    y = torch.matmul(g, torch.matmul(theta.transpose(1, 2), phi).softmax(2).transpose(1, 2))
    expected = x + convolve(block.conv_out.conv, y.view_as(x))
    torch.testing.assert_close(block(x), expected, rtol=1e-11, atol=1e-11)


def test_non_local_refuses():
    with pytest.raises(ValueError, match=r"mode must be one of .* got 'cosine'"):
        NonLocalBlock(8, mode="cosine")
