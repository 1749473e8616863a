"""First and second derivatives against finite differences in float64, and second derivatives against the
reference.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import gc_cuda
from gc_cuda import reference

# name -> the shapes of its arguments beside x, for x of this [N, C, H, W]
SIZE = (2, 3, 2, 2)
COMPANIONS = {
    "softmax_pool": [(2, 4)],
    "attention_pool": [(1, 3, 1, 1), (1,)],
    "average_pool": [],
    "broadcast_add": [(2, 3)],
    "broadcast_mul": [(2, 3, 1, 1)],
    "broadcast_mul_add": [(2, 3), (2, 3)],
}


def subsets():
    """Every operation with every non-empty choice of the inputs that require a gradient."""
    return [
        pytest.param(name, chosen, id=f"{name}-{''.join('.g'[needed] for needed in chosen)}")
        for name, shapes in COMPANIONS.items()
        for chosen in product([True, False], repeat=1 + len(shapes))
        if any(chosen)
    ]


def make_inputs(random, name, chosen, layout, device):
    x = random(*SIZE, device=device, layout=layout)
    companions = [random(*shape, device=device) for shape in COMPANIONS[name]]
    return [tensor.requires_grad_(needed) for tensor, needed in zip([x, *companions], chosen)]


@pytest.mark.parametrize(("name", "chosen"), subsets())
def test_first_derivatives(random, name, chosen, layout, device):
    assert gradcheck(getattr(gc_cuda, name), make_inputs(random, name, chosen, layout, device))


@pytest.mark.parametrize(("name", "chosen"), subsets())
def test_second_derivatives(random, name, chosen, layout, device):
    inputs = make_inputs(random, name, chosen, layout, device)
    assert gradgradcheck(getattr(gc_cuda, name), inputs, fast_mode=not all(chosen))


@pytest.mark.parametrize("name", COMPANIONS)
def test_gradient_penalty_equals_the_references(random, name, layout, device):
    """|dL/dinputs|^2 as a loss term, the common use of a double backward."""

    def penalty(library):
        inputs = make_inputs(random, name, [True] * (1 + len(COMPANIONS[name])), layout, device)
        inputs = [
            torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape).to(device).requires_grad_()
            for t in inputs
        ]
        loss = getattr(library, name)(*inputs).pow(3).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first) + loss, inputs)
        return [*first, *second]

    for ours, expected in zip(penalty(gc_cuda), penalty(reference)):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


def test_second_derivatives_where_one_input_depends_on_another(random, device):
    """Logits computed from x: the gradient of x must count its direct path once."""
    x, weight = random(*SIZE, device=device, grad=True), random(3, device=device, grad=True)

    def penalty(library):
        logits = torch.einsum("nchw,c->nhw", x, weight).tanh().flatten(1)
        loss = library.softmax_pool(x, logits).pow(2).sum()
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))]

    for ours, expected in zip(penalty(gc_cuda), penalty(reference)):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("pooling_type", ["att", "avg"])
@pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_mul",), ("channel_add", "channel_mul")])
def test_block(random, pooling_type, fusion_types, layout, device):
    torch.manual_seed(0)
    block = gc_cuda.ContextBlock(4, 0.5, pooling_type, fusion_types).double().to(device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = random(2, 4, 3, 2, device=device, layout=layout, grad=True)
    # Not the mask bias: its gradient is constant, on which the fast mode fails in torch itself; it is covered
    # by the derivatives of attention_pool.
    names, parameters = zip(*((name, p) for name, p in block.named_parameters() if name != "conv_mask.bias"))

    def run(x, *values):
        return torch.func.functional_call(block, dict(zip(names, values)), (x,))

    # Along one random direction of the inputs and outputs: all of them would take a minute.
    assert gradcheck(run, (x, *parameters), fast_mode=True)
    assert gradgradcheck(run, (x, *parameters), fast_mode=True)


def test_gradients_accumulate_over_two_uses(random, device):
    """A weight shared by two calls gets the sum of both gradients."""
    x, y = random(*SIZE, device=device), random(*SIZE, device=device)
    weight = random(3, device=device, grad=True)
    (gc_cuda.attention_pool(x, weight).sum() + gc_cuda.attention_pool(y, weight).sum()).backward()
    both = weight.grad.clone()
    weight.grad = None
    (reference.attention_pool(x, weight).sum() + reference.attention_pool(y, weight).sum()).backward()
    torch.testing.assert_close(both, weight.grad, rtol=1e-12, atol=1e-14)
