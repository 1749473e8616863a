"""First and second derivatives against finite differences in float64, and second derivatives against the
reference.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from block_cases import CONFIGURATIONS, Configuration, draw_inputs, function_of
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


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_global_context(random, configuration, layout, device):
    inputs = draw_inputs(random, configuration, (2, 3, 2, 3), device=device, layout=layout)
    function = function_of(gc_cuda, configuration, inputs)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    assert gradcheck(function, leaves)
    # Every entry in one layout; the fast mode fails in torch itself on a gradient that is constant, as the
    # mask bias's is.
    if layout == torch.contiguous_format:
        assert gradgradcheck(function, leaves)
    else:
        leaves = [leaf.detach() if name == "mask_bias" else leaf for name, leaf in zip(inputs, leaves)]
        assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("configuration", "frozen"),
    [
        (Configuration("att", ("add",)), ["x"]),
        (Configuration("att", ("add",)), ["x", "mask_weight"]),  # x is not saved then
        (Configuration("att", ("add", "mul")), ["x", "mask_weight"]),
        (Configuration("avg", ("add",)), ["x"]),
        (Configuration("avg", ("add",)), ["add.w1", "add.b1", "add.norm_weight", "add.norm_bias", "add.w2"]),
        (Configuration("avg", ("add", "mul")), ["x"]),
    ],
    # The same in every process: a set's order, and so its name, would change with the seed of its hashes.
    ids=str,
)
def test_second_derivatives_of_global_context_with_frozen_inputs(random, configuration, frozen, device):
    inputs = draw_inputs(random, configuration, (2, 3, 2, 3), device=device)
    leaves = [tensor.requires_grad_(name not in {*frozen, "mask_bias"}) for name, tensor in inputs.items()]
    assert gradgradcheck(function_of(gc_cuda, configuration, inputs), leaves, fast_mode=True)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_gradient_penalty_of_global_context(random, configuration, layout, device):
    """As a loss term beside the loss itself: first and second derivatives meet in one backward pass."""
    inputs = draw_inputs(random, configuration, (2, 8, 3, 4), device=device, layout=layout)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def penalty(library):
        loss = function_of(library, configuration, inputs)(*leaves).pow(3).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first) + loss, leaves)]

    for name, ours, expected in zip([*inputs, *inputs], penalty(gc_cuda), penalty(reference)):
        # relative to the largest: PyTorch's own gradient of the mask bias is the rounding of large terms
        slack = 1e-9 if name == "mask_bias" else 1e-11 * float(expected.detach().abs().max())
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=slack)


def test_second_derivatives_where_parameters_depend_on_x(random, device):
    """The gradient of x counts its direct path once, with x saved and without."""
    for configuration in CONFIGURATIONS:
        inputs = draw_inputs(random, configuration, (2, 8, 3, 4), device=device)
        x = inputs["x"].requires_grad_()

        def penalty(library, configuration=configuration, inputs=inputs, x=x):
            given = {name: t * x.mean() if name.endswith("b2") else t for name, t in inputs.items()}
            out = function_of(library, configuration, given)(*given.values())
            (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            return [first, *torch.autograd.grad(first.square().sum(), x)]

        for ours, expected in zip(penalty(gc_cuda), penalty(reference)):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-11)


def test_gradients_accumulate_over_two_uses(random, device):
    """A weight shared by two calls gets the sum of both gradients."""
    x, y = random(*SIZE, device=device), random(*SIZE, device=device)
    weight = random(3, device=device, grad=True)
    (gc_cuda.attention_pool(x, weight).sum() + gc_cuda.attention_pool(y, weight).sum()).backward()
    both = weight.grad.clone()
    weight.grad = None
    (reference.attention_pool(x, weight).sum() + reference.attention_pool(y, weight).sum()).backward()
    torch.testing.assert_close(both, weight.grad, rtol=1e-12, atol=1e-14)
