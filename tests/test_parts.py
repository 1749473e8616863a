"""A block never bypasses its parts: whatever is done to one, it computes what plain PyTorch would."""

from __future__ import annotations

import copy

import pytest
import torch
from block_cases import Spy
from part_cases import BLOCKS, CHANNELS, EVERYWHERE, MANIPULATIONS, not_in_place
from torch import nn
from whole_models import awake

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(params=BLOCKS)
def kind(request):
    return BLOCKS[request.param]


def run(block, forward, x):
    """Two steps of training: outputs, the gradients of x and of every parameter, what hooks have seen."""
    results = {}
    for step in range(2):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        out.square().mean().backward()
        results |= {f"output {step}": out.detach(), f"x {step}": leaf.grad}
        for name, parameter in block.named_parameters():
            # the mask's bias has no effect: what is left of its gradient in PyTorch is rounding
            if parameter.grad is not None and not name.endswith(("conv_mask.bias", "conv_attn.bias")):
                results[f"{name} {step}"] = parameter.grad.clone()
    seen = {
        name: torch.tensor(module.seen) for name, module in block.named_modules() if hasattr(module, "seen")
    }
    return results | seen


def runs_fused(block, x):
    with torch.no_grad(), Spy() as spy:
        block(x)
    return any(name.startswith("gc_cuda::") for name in spy.names())


def applies(block, kinds):
    return any(isinstance(part, kinds) for part in block.modules())


@pytest.mark.parametrize("manipulation", MANIPULATIONS)
def test_what_is_done_to_a_part_counts(kind, manipulation, random):
    """After the block has run once, and its reader has taken notes."""
    manipulate, fused, kinds = MANIPULATIONS[manipulation]
    block, x = awake(kind.make()), random(2, CHANNELS, 4, 3)
    twin = copy.deepcopy(block)
    assert runs_fused(block, x)
    fused = fused or not applies(block, kinds)
    for one in (block, twin):
        torch.manual_seed(0)
        manipulate(one)
        one.double()
    expected = run(twin, lambda leaf: kind.eager(twin, leaf), x)
    actual = run(block, block, x)
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert runs_fused(block, x) == fused


@pytest.mark.parametrize("what", EVERYWHERE)
def test_what_is_done_to_all_modules_counts_while_it_lasts(kind, what, random):
    block, x = awake(kind.make()), random(2, CHANNELS, 4, 3)
    block.apply(not_in_place)
    twin = copy.deepcopy(block)
    before = run(block, block, x)
    concerned = {"activation's forward": nn.ReLU, "norm's forward": nn.LayerNorm}.get(what, nn.Conv2d)
    with EVERYWHERE[what]():
        # The hooks of the block itself run with ours: call both by their forwards.
        expected = run(twin, lambda leaf: kind.eager(twin, leaf), x)
        actual = run(block, block.forward, x)
        assert runs_fused(block, x) == (not applies(block, concerned))
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert runs_fused(block, x)
    after = run(block, block, x)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
