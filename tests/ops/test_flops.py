"""torch.utils.flop_counter gives the fused operations as many as their eager form."""

from __future__ import annotations

import pytest
import torch
from block_cases import CONFIGURATIONS, draw_inputs, function_of
from torch.utils.flop_counter import FlopCounterMode

import gc_cuda
from gc_cuda import reference


def count(call, leaves):
    with FlopCounterMode(display=False) as forward:
        out = call(*leaves)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), leaves)
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_whole_block(random, configuration):
    inputs = draw_inputs(random, configuration, (2, 24, 9, 7))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    ours, eager = (
        count(function_of(library, configuration, inputs), leaves) for library in (gc_cuda, reference)
    )
    assert ours == eager
    assert ours[0] > 0


@pytest.mark.parametrize("name", ["softmax_pool", "attention_pool"])
def test_pooling(random, name):
    x = random(2, 24, 9, 7, grad=True)
    companion = random(2, 63, grad=True) if name == "softmax_pool" else random(24, grad=True)
    ours, eager = (count(getattr(library, name), [x, companion]) for library in (gc_cuda, reference))
    assert ours == eager
