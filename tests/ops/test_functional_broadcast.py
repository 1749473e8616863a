"""broadcast_add, broadcast_mul and broadcast_mul_add equal the reference, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
from evaluate import HALVES, STRIDED, evaluate, evaluate_all
from tolerance import assert_close_to_truth

import gc_cuda
from gc_cuda import reference

OPERATIONS = ("broadcast_add", "broadcast_mul", "broadcast_mul_add")


def companions(operation, random, n, c, **options):
    """scale and term, those that the operation takes, in that order."""
    count = 2 if operation == "broadcast_mul_add" else 1
    return tuple(random(n, c, **options) for _ in range(count))


def magnitudes(operation, x, companions, grad):
    """The sums of absolute values behind the output and the gradients of x, scale and term."""
    x, grad = x.double().abs(), grad.double().abs()
    first, *rest = (companion.double().abs()[:, :, None, None] for companion in companions)
    of_term = grad.sum((2, 3))
    if operation == "broadcast_add":
        return x + first, [grad, of_term]
    of_scale = (grad * x).sum((2, 3))
    if operation == "broadcast_mul":
        return x * first, [grad * first, of_scale]
    return x * first + rest[0], [grad * first, of_scale, of_term]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_broadcast(random, shape, layout, dtype, device, operation):
    n, c, _, _ = shape
    x = random(*shape, dtype=dtype, device=device, layout=layout)
    inputs = (x, *companions(operation, random, n, c, dtype=dtype, device=device))
    grad = random(*shape, dtype=dtype, device=device, layout=layout)

    ours, eager, truth = evaluate_all(operation, inputs, grad)
    of_out, of_gradients = magnitudes(operation, x, inputs[1:], grad)
    assert_close_to_truth("out", ours.out, eager.out, truth.out, of_out)
    for name, *gradients in zip(
        ("x", "first", "second"), ours.gradients, eager.gradients, truth.gradients, of_gradients
    ):
        assert_close_to_truth(f"grad of {name}", *gradients)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_half_x_with_float32_companions(random, layout, dtype, device, operation):
    n, c, h, w = 2, 96, 9, 14
    x = random(n, c, h, w, dtype=dtype, device=device, layout=layout)
    inputs = (x, *companions(operation, random, n, c, dtype=torch.float32, device=device))
    grad = random(n, c, h, w, dtype=dtype, device=device, layout=layout)

    ours, eager, truth = evaluate_all(operation, inputs, grad)
    of_out, of_gradients = magnitudes(operation, x, inputs[1:], grad)
    assert_close_to_truth("out", ours.out, eager.out, truth.out, of_out)
    for name, *gradients in zip(
        ("x", "first", "second"), ours.gradients, eager.gradients, truth.gradients, of_gradients
    ):
        # the gradient of an added term is a sum over x-like pixels, returned in x's dtype and widened
        # afterwards
        assert_close_to_truth(f"grad of {name}", *gradients, rounded_to=dtype)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_companions_with_unit_pixels(random, device, operation):
    """[N, C, 1, 1] means the same as [N, C], and gets its gradient in that shape."""
    x, grad = random(2, 8, 5, 6, device=device), random(2, 8, 5, 6, device=device)
    flat = companions(operation, random, 2, 8, device=device)
    full = tuple(companion[:, :, None, None] for companion in flat)
    expected = evaluate(getattr(gc_cuda, operation), (x, *flat), grad)
    ours = evaluate(getattr(gc_cuda, operation), (x, *full), grad)
    assert torch.equal(ours.out, expected.out)
    for ours_one, expected_one in zip(ours.gradients[1:], expected.gradients[1:]):
        assert torch.equal(ours_one, expected_one[:, :, None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("view", STRIDED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_strided_inputs_and_gradients(random, operation, view, dtype, device):
    """Any view of x, a companion or the gradient gives the values of its contiguous copy, and is left as it
    was.
    """
    x = STRIDED[view](random(3, 8, 7, 9, dtype=dtype, device=device))
    grad = STRIDED[view](random(3, 8, 7, 9, dtype=dtype, device=device))
    n, c, _, _ = x.shape
    before = x.clone(), grad.clone()
    strided = tuple(
        companion.T for companion in companions(operation, random, c, n, dtype=dtype, device=device)
    )
    dense = tuple(companion.contiguous() for companion in strided)

    ours = evaluate(getattr(gc_cuda, operation), (x, *strided), grad)
    eager = evaluate(getattr(reference, operation), (x, *dense), grad)
    truth = evaluate(getattr(reference, operation), (x, *dense), grad, torch.float64)
    of_out, of_gradients = magnitudes(operation, x, dense, grad)
    assert_close_to_truth("out", ours.out, eager.out, truth.out, of_out)
    for name, *gradients in zip(
        ("x", "first", "second"), ours.gradients, eager.gradients, truth.gradients, of_gradients
    ):
        assert_close_to_truth(f"grad of {name}", *gradients)
    assert torch.equal(x, before[0])
    assert torch.equal(grad, before[1])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradient_in_the_other_layout(random, layout, device, operation):
    """A convolution in another memory format may follow: the gradient then comes in that one."""
    other = torch.contiguous_format if layout == torch.channels_last else torch.channels_last
    x = random(2, 24, 9, 7, device=device, layout=layout)
    inputs = (x, *companions(operation, random, 2, 24, device=device))
    grad = random(2, 24, 9, 7, device=device, layout=other)
    ours = evaluate(getattr(gc_cuda, operation), inputs, grad)
    truth = evaluate(getattr(reference, operation), inputs, grad)
    for ours_one, truth_one in zip(ours.gradients, truth.gradients):
        assert_close_to_truth("gradient", ours_one, truth_one, truth_one)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_the_gradients_asked_for(random, device, operation):
    """Every subset of the inputs may require a gradient."""
    values = (random(2, 8, 5, 6, device=device), *companions(operation, random, 2, 8, device=device))
    grad = random(2, 8, 5, 6, device=device)
    full = evaluate(getattr(reference, operation), values, grad).gradients
    for subset in range(1, 2 ** len(values)):
        inputs = [value.clone().requires_grad_(bool(subset >> i & 1)) for i, value in enumerate(values)]
        getattr(gc_cuda, operation)(*inputs).backward(grad)
        for i, value in enumerate(inputs):
            assert (value.grad is not None) == value.requires_grad
            if value.grad is not None:
                assert_close_to_truth(f"gradient {i} of subset {subset:b}", value.grad, full[i], full[i])


def saved_elements(call):
    """How many elements the autograd graph of a call holds on to."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        call()
    return sum(saved)


def test_addition_saves_no_feature_map(random, device):
    x, term = random(2, 8, 5, 6, device=device, grad=True), random(2, 8, device=device, grad=True)
    assert saved_elements(lambda: gc_cuda.broadcast_add(x, term)) == 0


def test_multiplication_saves_x_only_for_the_gradient_of_scale(random, device):
    x, scale = random(2, 8, 5, 6, device=device, grad=True), random(2, 8, device=device)
    assert saved_elements(lambda: gc_cuda.broadcast_mul(x, scale)) == scale.numel()
    scale.requires_grad_()
    assert saved_elements(lambda: gc_cuda.broadcast_mul(x, scale)) == scale.numel() + x.numel()


def test_both_sums_of_one_read(random, shape, layout, dtype, device):
    """The operator broadcast_sums, of a gradient in NCHW beside an x in either layout."""
    x, grad = (
        random(*shape, dtype=dtype, device=device, layout=layout),
        random(*shape, dtype=dtype, device=device),
    )
    wide_x, wide_grad = x.double(), grad.double()
    of_scale, of_term = torch.ops.gc_cuda.broadcast_sums.default(grad, x)
    products = wide_grad * wide_x
    for name, ours, eager, terms in (
        ("scale", of_scale, (grad * x).sum((2, 3)), products),
        ("term", of_term, grad.sum((2, 3)), wide_grad),
    ):
        assert_close_to_truth(f"grad of {name}", ours, eager, terms.sum((2, 3)), terms.abs().sum((2, 3)))
