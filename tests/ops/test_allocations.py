"""How often a block asks for memory: on a small map that is a good part of what a call takes."""

from __future__ import annotations

import pytest
import torch
from block_cases import CONFIGURATIONS, draw_inputs, function_of
from torch.profiler import ProfilerActivity, profile

import gc_cuda

SIZE = (2, 16, 6, 5)


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def dtype(request):
    return request.param


def allocations(device, call):
    """How many allocations a call makes on the device, and what it returns."""
    if device.type == "cuda":
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.memory_stats(device)["allocation.all.allocated"] - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sum(event.nbytes() > 0 for event in events), result


@pytest.fixture(params=CONFIGURATIONS, ids=str)
def configuration(request):
    return request.param


@pytest.fixture
def block(random, configuration, dtype, layout, device):
    """The block as a function of its tensors, those, all of which need a gradient, and a gradient for it."""
    inputs = draw_inputs(random, configuration, SIZE, dtype=dtype, device=device, layout=layout)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    call = function_of(gc_cuda, configuration, inputs)
    call(*leaves.values()).sum().backward()  # what is allocated once in a process is not counted
    return call, leaves, random(*SIZE, dtype=dtype, device=device, layout=layout)


def test_forward_without_gradients(block, device):
    """out, and one piece of scratch memory."""
    call, leaves, _ = block
    with torch.no_grad():
        count, _ = allocations(device, lambda: call(*leaves.values()))
    assert count == 2


def test_a_step(block, device):
    """Forward: out, what is kept, scratch memory. Backward: scratch memory and a gradient for each that needs
    one, which shares its memory with none.
    """
    call, leaves, grad = block
    tensors = list(leaves.values())
    forward, out = allocations(device, lambda: call(*tensors))
    assert forward == 3
    backward, gradients = allocations(device, lambda: torch.autograd.grad(out, tensors, grad))
    assert backward == 1 + len(tensors)
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == len(tensors)


def test_nothing_for_gradients_that_nobody_asked_for(block, device):
    call, leaves, grad = block
    for chosen in leaves:
        out = call(*[tensor.detach().requires_grad_(name == chosen) for name, tensor in leaves.items()])
        count, _ = allocations(device, lambda out=out: out.backward(grad))
        assert count == (1 if chosen == "mask_bias" else 2), chosen
