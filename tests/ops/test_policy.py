"""Activations, gates and branches without a layer norm: Squeeze-and-Excitation and its kin."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from block_cases import CONFIGURATIONS, SQUEEZE_EXCITE, draw_inputs, function_of, without_norm
from evaluate import HALVES, evaluate
from tolerance import assert_close_to_truth

import gc_cuda
from gc_cuda import Transform, reference

ACTIVATIONS, GATES = tuple(reference.ACTIVATIONS), tuple(reference.GATES)
SIZE = (2, 67, 13, 11)

# As many more roundings as there are steps between x and a gradient, beside the one that a result may have.
ROUNDINGS = 8
# PyTorch's hard sigmoid is differentiated with one sixth in float32, in float64 too.
ONE_SIXTH = 1e-7


def check(configuration, inputs, grad, **policy):
    names, values = list(inputs), list(inputs.values())
    ours, eager = (
        evaluate(function_of(library, configuration, names, **policy), values, grad)
        for library in (gc_cuda, reference)
    )
    # On the CPU: PyTorch's CUDA kernels of hardswish have a float32 sixth, whose error a norm may enlarge.
    on_cpu = [None if value is None else value.cpu() for value in values]
    truth = evaluate(
        function_of(reference, configuration, names, **policy), on_cpu, grad.cpu(), torch.float64
    )
    results = zip(
        ("x", *names),
        (ours.out, *ours.gradients),
        (eager.out, *eager.gradients),
        (truth.out, *truth.gradients),
    )
    for name, actual, theirs, exact in results:
        if name == "mask_bias":
            assert torch.equal(actual, torch.zeros_like(actual))
            continue
        if exact.dtype == actual.dtype:
            bound = ONE_SIXTH if policy.get("gate") == "hardsigmoid" else 1e-11
            assert (actual.cpu() - exact).abs().max() <= bound * exact.abs().max(), name
            continue
        # a sum over pixels and images may cancel: its terms are as large as its largest result, or larger
        terms = 30 * exact.abs().max()
        assert_close_to_truth(name, actual, theirs, exact, terms, roundings=ROUNDINGS)


@pytest.mark.parametrize(("activation", "gate"), list(product(ACTIVATIONS, GATES)))
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_every_policy(random, configuration, norm, activation, gate, layout, device):
    inputs = draw_inputs(random, configuration, SIZE, device=device, layout=layout)
    inputs = inputs if norm else without_norm(inputs)
    grad = random(*SIZE, device=device, layout=layout)
    check(configuration, inputs, grad, activation=activation, gate=gate)


@pytest.mark.parametrize(("activation", "gate"), list(product(ACTIVATIONS, GATES)))
def test_squeeze_excite(random, activation, gate, dtype, layout, device):
    inputs = without_norm(
        draw_inputs(random, SQUEEZE_EXCITE, SIZE, dtype=dtype, device=device, layout=layout)
    )
    grad = random(*SIZE, dtype=dtype, device=device, layout=layout)
    check(SQUEEZE_EXCITE, inputs, grad, activation=activation, gate=gate)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_x_beside_float32_parameters(random, dtype, layout, device):
    inputs = without_norm(
        draw_inputs(
            random, SQUEEZE_EXCITE, SIZE, dtype=dtype, parameters=torch.float32, device=device, layout=layout
        )
    )
    check(SQUEEZE_EXCITE, inputs, random(*SIZE, dtype=dtype, device=device, layout=layout), activation="silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", GATES)
def test_edges_as_in_pytorch(activation, gate, device):
    """At the corners of the piecewise functions, far outside, and for NaN and infinity."""
    # releases of PyTorch differ in hardswish's derivative at -3 and 3 themselves
    corner = 3.001 if activation == "hardswish" else 3.0
    t = torch.tensor(
        [-1e4, -3.1, -corner, -2.9, 0.0, 2.9, corner, 3.1, 1e4], dtype=torch.float64, device=device
    )
    c = len(t)
    x = torch.ones(1, c, 1, 1, dtype=torch.float64, device=device)
    eye, zero = torch.eye(c).to(t), torch.zeros(c).to(t)
    corner_of_the_gate = (x, eye, zero, eye, t)  # t = b2: act(x) is a constant that the bias outweighs
    corner_of_the_activation = (x, eye, t - 1, eye, zero)

    def result(library, x, w1, b1, w2, b2):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, w1, b1, w2, b2)]
        mul = Transform(leaves[1], leaves[2], None, None, leaves[3], leaves[4])
        out = library.global_context(leaves[0], mul=mul, pooling_type="avg", activation=activation, gate=gate)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    w2_off = (corner_of_the_gate[0], eye, zero, 0 * eye, t)
    for case in (corner_of_the_gate, corner_of_the_activation, w2_off):
        for actual, expected in zip(result(gc_cuda, *case), result(reference, *case)):
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    for bad in (float("nan"), float("inf"), -float("inf")):
        poisoned = x.clone()
        poisoned[0, 3] = bad
        out, expected = (result(library, poisoned, *w2_off[1:])[0] for library in (gc_cuda, reference))
        assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_second_derivatives(random, configuration):
    inputs = without_norm(draw_inputs(random, configuration, (2, 4, 3, 2)))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    call = function_of(gc_cuda, configuration, inputs, activation="silu")
    assert torch.autograd.gradgradcheck(call, leaves, atol=1e-6)
