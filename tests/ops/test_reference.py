"""The reference itself: against sums written out by hand, and its own promises. Nothing here needs the
extension.
"""

from __future__ import annotations

import math

import pytest
import torch

from gc_cuda import reference


def test_softmax_pool_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[-1.0, 0.0], [5.0, 0.5]]]], dtype=torch.float64)
    logits = torch.tensor([[0.0, math.log(2.0), math.log(3.0), math.log(4.0)]], dtype=torch.float64)
    expected = torch.tensor([[(1 + 4 + 9 + 16) / 10, (-1 + 0 + 15 + 2) / 10]], dtype=torch.float64)
    torch.testing.assert_close(reference.softmax_pool(x, logits), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(
        reference.softmax_pool(x, logits.view(1, 1, 2, 2)), expected, rtol=1e-15, atol=0
    )


def test_attention_pool_is_softmax_pool_of_the_mask_convolution(random):
    x, weight, bias = random(2, 5, 3, 4), random(1, 5, 1, 1), random(1)
    logits = torch.einsum("nchw,c->nhw", x, weight.flatten()).flatten(1) + bias
    expected = torch.einsum("ncs,ns->nc", x.flatten(2), logits.softmax(1))
    torch.testing.assert_close(reference.attention_pool(x, weight, bias), expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        reference.attention_pool(x, weight.flatten()), expected, rtol=1e-13, atol=1e-15
    )


def test_average_pool_is_the_mean(random):
    x = random(2, 5, 3, 4)
    torch.testing.assert_close(reference.average_pool(x), x.mean((2, 3)), rtol=1e-14, atol=1e-16)


def test_broadcasts(random):
    x, scale, term = random(2, 5, 3, 4), random(2, 5), random(2, 5, 1, 1)
    assert torch.equal(reference.broadcast_add(x, term), x + term)
    assert torch.equal(reference.broadcast_mul(x, scale), x * scale[:, :, None, None])
    assert torch.equal(reference.broadcast_mul_add(x, scale, term), x * scale[:, :, None, None] + term)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wider_companions_leave_the_dtype_of_x(random, dtype):
    x, weight, term = random(2, 5, 3, 4, dtype=dtype), random(5, dtype=torch.float32), random(2, 5).float()
    exact = reference.attention_pool(x.double(), weight.double())
    pooled = reference.attention_pool(x, weight)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(reference.broadcast_add(x, term), (x.float() + term[:, :, None, None]).to(dtype))


@pytest.mark.parametrize("pooling_type", ["att", "avg"])
@pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")])
def test_block_is_the_composition_of_the_functions(random, pooling_type, fusion_types):
    torch.manual_seed(0)
    block = reference.ContextBlock(16, 1 / 4, pooling_type, fusion_types).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = random(2, 16, 5, 6)

    if pooling_type == "att":
        context = reference.attention_pool(x, block.conv_mask.weight, block.conv_mask.bias)
    else:
        context = x.mean((2, 3))

    def transform(branch):
        first, norm, _, last = branch
        hidden = context @ first.weight.flatten(1).T + first.bias
        centred = hidden - hidden.mean(1, keepdim=True)
        hidden = centred / (hidden.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        hidden = (hidden * norm.weight.flatten() + norm.bias.flatten()).clamp(min=0)
        return hidden @ last.weight.flatten(1).T + last.bias

    expected = x
    if "channel_mul" in fusion_types:
        expected = reference.broadcast_mul(expected, transform(block.channel_mul_conv).sigmoid())
    if "channel_add" in fusion_types:
        expected = reference.broadcast_add(expected, transform(block.channel_add_conv))
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("pooling_type", ["att", "avg"])
@pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")])
def test_global_context_is_the_block(random, pooling_type, fusion_types):
    """The function and the module of real convolutions and norms are two ways to say the same."""
    torch.manual_seed(0)
    block = reference.ContextBlock(16, 1 / 4, pooling_type, fusion_types, eps=1e-3).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = random(2, 16, 5, 6)
    mask = (block.conv_mask.weight, block.conv_mask.bias) if pooling_type == "att" else (None, None)
    add, mul = (
        None
        if branch is None
        else reference.Transform(*(p for module in branch for p in module.parameters()))
        for branch in (block.channel_add_conv, block.channel_mul_conv)
    )
    out = reference.global_context(x, *mask, add, mul, pooling_type=pooling_type, eps=1e-3)
    torch.testing.assert_close(out, block(x), rtol=1e-12, atol=1e-13)


def test_global_context_of_half_beside_float32_rounds_once(random):
    x, weight = random(2, 5, 3, 4, dtype=torch.float16), random(5, dtype=torch.float32)
    six = reference.Transform(*(random(*s).float() for s in [(3, 5), (3,), (3,), (3,), (5, 3), (5,)]))
    out = reference.global_context(x, weight, None, six)
    assert out.dtype == torch.float16
    assert torch.equal(out, reference.global_context(x.float(), weight, None, six).half())
