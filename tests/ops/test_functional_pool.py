"""softmax_pool, attention_pool and average_pool equal the reference, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
from evaluate import HALVES, STRIDED, evaluate, evaluate_all
from tolerance import assert_close_to_truth

import gc_cuda


def mask(random, c, **options):
    """Mask weights and bias that spread the logits over a few units: neither a flat nor a one-hot softmax."""
    return (random(1, c, 1, 1) * 2 / c**0.5).to(**options), random(1, **options)


def magnitudes(x, logits, grad, weight=None):
    """Sums of absolute values behind the context and the gradients of x and of the logits or mask weight."""
    pixels, attention = x.double().abs().flatten(2), logits.double().flatten(1).softmax(1)
    grad = grad.double().abs()
    context = torch.einsum("ncs,ns->nc", pixels, attention)
    # d logit = a * (grad . x - grad . context), a difference of two sums
    products = torch.einsum("nc,ncs->ns", grad, pixels) + torch.einsum("nc,nc->n", grad, context)[:, None]
    of_logits = attention * products
    of_x = grad[:, :, None] * attention[:, None]
    if weight is None:
        return context, of_x.view(x.shape), of_logits
    of_x = of_x + of_logits[:, None] * weight.double().abs().flatten()[:, None]
    return context, of_x.view(x.shape), torch.einsum("ns,ncs->c", of_logits, pixels)


def test_softmax_pool(random, shape, layout, dtype, device):
    n, c, h, w = shape
    x = random(*shape, dtype=dtype, device=device, layout=layout)
    logits = 3 * random(n, h * w, dtype=dtype, device=device)
    grad = random(n, c, dtype=dtype, device=device)

    ours, eager, truth = evaluate_all("softmax_pool", (x, logits), grad)
    of_context, of_x, of_logits = magnitudes(x, logits, grad)
    assert_close_to_truth("context", ours.out, eager.out, truth.out, of_context)
    assert_close_to_truth("grad_x", ours.gradients[0], eager.gradients[0], truth.gradients[0], of_x)
    assert_close_to_truth("grad_logits", ours.gradients[1], eager.gradients[1], truth.gradients[1], of_logits)


def test_attention_pool(random, shape, layout, dtype, device):
    n, c, _, _ = shape
    x = random(*shape, dtype=dtype, device=device, layout=layout)
    weight, bias = mask(random, c, dtype=dtype, device=device)
    grad = random(n, c, dtype=dtype, device=device)

    ours, eager, truth = evaluate_all("attention_pool", (x, weight, bias), grad)
    logits = torch.einsum("nchw,c->nhw", x.double(), weight.double().flatten())
    of_context, of_x, of_weight = magnitudes(x, logits, grad, weight)
    assert_close_to_truth("context", ours.out, eager.out, truth.out, of_context)
    assert_close_to_truth("grad_x", ours.gradients[0], eager.gradients[0], truth.gradients[0], of_x)
    of_weight = of_weight.view(1, c, 1, 1)
    assert_close_to_truth("grad_weight", ours.gradients[1], eager.gradients[1], truth.gradients[1], of_weight)
    assert torch.equal(ours.gradients[2], torch.zeros_like(bias)), "the softmax does not feel the bias"


def test_average_pool(random, shape, layout, dtype, device):
    n, c, _, _ = shape
    x = random(*shape, dtype=dtype, device=device, layout=layout)
    grad = random(n, c, dtype=dtype, device=device)

    ours, eager, truth = evaluate_all("average_pool", (x,), grad)
    assert_close_to_truth("context", ours.out, eager.out, truth.out, x.double().abs().mean((2, 3)))
    assert_close_to_truth("grad_x", ours.gradients[0], eager.gradients[0], truth.gradients[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_half_x_with_float32_companions(random, layout, dtype, device):
    """As under autocast: the logits and the weights keep their precision, and their gradients their dtype."""
    n, c, h, w = 2, 96, 9, 14
    x = random(n, c, h, w, dtype=dtype, device=device, layout=layout)
    weight, bias = mask(random, c, dtype=torch.float32, device=device)
    grad = random(n, c, dtype=dtype, device=device)

    ours, eager, truth = evaluate_all("attention_pool", (x, weight, bias), grad)
    logits = torch.einsum("nchw,c->nhw", x.double(), weight.double().flatten())
    of_context, of_x, of_weight = magnitudes(x, logits, grad, weight)
    assert_close_to_truth("context", ours.out, eager.out, truth.out, of_context)
    assert_close_to_truth("grad_x", ours.gradients[0], eager.gradients[0], truth.gradients[0], of_x)
    of_weight = of_weight.view(1, c, 1, 1)
    # float32 values, rounded nowhere to half on the way
    assert_close_to_truth("grad_weight", ours.gradients[1], eager.gradients[1], truth.gradients[1], of_weight)

    logits = logits.flatten(1).float()
    ours, eager, truth = evaluate_all("softmax_pool", (x, logits), grad)
    of_logits = magnitudes(x, logits, grad)[2]
    assert_close_to_truth("context", ours.out, eager.out, truth.out, of_context)
    assert_close_to_truth("grad_logits", ours.gradients[1], eager.gradients[1], truth.gradients[1], of_logits)


def test_logits_of_a_convolution(random, device):
    """[N, 1, H, W] means the same as [N, H*W], and gets its gradient in that shape."""
    x, logits, grad = (
        random(2, 8, 5, 6, device=device),
        random(2, 1, 5, 6, device=device),
        random(2, 8, device=device),
    )
    flat = evaluate(gc_cuda.softmax_pool, (x, logits.flatten(1)), grad)
    full = evaluate(gc_cuda.softmax_pool, (x, logits), grad)
    assert torch.equal(full.out, flat.out)
    assert torch.equal(full.gradients[1], flat.gradients[1].view(2, 1, 5, 6))


def test_mask_weight_in_any_shape(random, device):
    x, weight, grad = random(2, 8, 5, 6, device=device), random(8, device=device), random(2, 8, device=device)
    flat = evaluate(gc_cuda.attention_pool, (x, weight, None), grad)
    for shape in [(1, 8), (1, 8, 1, 1)]:
        full = evaluate(gc_cuda.attention_pool, (x, weight.view(shape), None), grad)
        assert torch.equal(full.out, flat.out)
        assert torch.equal(full.gradients[1], flat.gradients[1].view(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("view", STRIDED)
def test_strided_inputs_and_gradients(random, view, dtype, device):
    """Any view gives the bits of its contiguous copy in the same memory format, and is left as it was."""
    x = STRIDED[view](random(3, 8, 7, 9, dtype=dtype, device=device))
    before = x.clone()
    n, c, h, w = x.shape
    channels_last = x.stride(1) == 1 and x.stride(3) != 0 and c > 1
    dense = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    weight, bias = mask(random, c, dtype=dtype, device=device)
    wide = random(n, 2 * c, dtype=dtype, device=device)
    grad = wide[:, ::2]

    ours = evaluate(gc_cuda.attention_pool, (x, weight, bias), grad)
    expected = evaluate(gc_cuda.attention_pool, (dense, weight, bias), grad.contiguous())
    assert torch.equal(ours.out, expected.out)
    assert torch.equal(ours.gradients[0], expected.gradients[0])
    assert torch.equal(ours.gradients[1], expected.gradients[1])
    assert torch.equal(x, before)

    strided_weight = weight.flatten().repeat_interleave(2)[::2]
    assert torch.equal(gc_cuda.attention_pool(x, strided_weight, bias), expected.out)
    logits = random(n, w, h, dtype=dtype, device=device).transpose(1, 2).unsqueeze(1)
    assert torch.equal(gc_cuda.softmax_pool(x, logits), gc_cuda.softmax_pool(dense, logits.contiguous()))
    assert torch.equal(gc_cuda.average_pool(x), gc_cuda.average_pool(dense))


def test_backward_of_a_sum_passes_an_expanded_gradient(random, device):
    x, weight = random(2, 8, 5, 6, device=device, grad=True), random(8, device=device, grad=True)
    gc_cuda.attention_pool(x, weight).sum().backward()
    grads = x.grad.clone(), weight.grad.clone()
    expected = evaluate(gc_cuda.attention_pool, (x, weight), torch.ones(2, 8, dtype=x.dtype, device=device))
    assert torch.equal(grads[0], expected.gradients[0])
    assert torch.equal(grads[1], expected.gradients[1])


def test_only_the_gradients_asked_for(random, device):
    """Every subset of the inputs may require a gradient."""
    values = random(2, 8, 5, 6, device=device), random(8, device=device), random(1, device=device)
    grad = random(2, 8, device=device)
    full = evaluate(gc_cuda.attention_pool, values, grad).gradients
    for subset in range(1, 8):
        inputs = [value.clone().requires_grad_(bool(subset >> i & 1)) for i, value in enumerate(values)]
        gc_cuda.attention_pool(*inputs).backward(grad)
        for i, value in enumerate(inputs):
            assert (value.grad is not None) == value.requires_grad
            assert value.grad is None or torch.equal(value.grad, full[i])


def test_without_gradients_nothing_is_recorded(random, device):
    x, weight = random(2, 8, 5, 6, device=device, grad=True), random(8, device=device, grad=True)
    expected = gc_cuda.attention_pool(x, weight).detach()
    with torch.no_grad():
        assert gc_cuda.attention_pool(x, weight).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(gc_cuda.attention_pool(x, weight), expected)
