"""The operators keep torch's rules: schemas, fake kernels, tracing."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from block_cases import CONFIGURATIONS, WHOLE, draw_inputs
from torch.library import opcheck

import gc_cuda

# Dense, sliced and transposed feature maps: a fake kernel that gets a stride wrong shows here.
VIEWS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: x[:, :, 1:, :-1],
    "cropped channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:, :-1],
    "transposed": lambda x: x.transpose(2, 3),
    "one channel": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :1],
    "one pixel": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, :1, :1],
    "no image": lambda x: x[:0],
}


@pytest.fixture(params=VIEWS)
def view(request):
    return VIEWS[request.param]


def arguments(random, view, dtype):
    """x, a gradient like it, logits, per-channel vectors and mask weights for every operator."""
    x, grad = (view(random(3, 6, 4, 5, dtype=dtype)) for _ in range(2))
    n, c, h, w = x.shape
    companion = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        x,
        grad,
        random(n, h * w, dtype=companion),
        random(n, c, dtype=companion),
        random(1, c, 1, 1, dtype=companion),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_every_operator(random, view, dtype):
    operators = torch.ops.gc_cuda
    x, grad, logits, vector, weight = arguments(random, view, dtype)
    grad_context = vector.to(dtype)

    opcheck(operators.softmax_pool.default, (x, logits))
    _, state = operators.softmax_pool(x, logits)
    opcheck(operators.softmax_pool_backward.default, (grad_context, x, logits, state))

    opcheck(operators.attention_pool.default, (x, weight, None))
    opcheck(operators.attention_pool.default, (x, weight, weight.flatten()[:1]))
    _, logits, state = operators.attention_pool(x, weight, None)
    opcheck(operators.attention_pool_backward.default, (grad_context, x, weight, logits, state))

    opcheck(operators.pixel_sum.default, (x, False))
    opcheck(operators.pixel_sum.default, (x, True))
    opcheck(operators.broadcast.default, (x, None, vector))
    opcheck(operators.broadcast.default, (x, vector, None))
    opcheck(operators.broadcast.default, (x, vector, vector))
    opcheck(operators.broadcast_mul_backward.default, (grad, x, vector))
    opcheck(operators.broadcast_sums.default, (grad, x))


@pytest.mark.parametrize(
    ("configuration", "view", "dtype", "norm"),
    [
        *product(CONFIGURATIONS, ["channels_last"], [torch.float16], [True, False]),
        *product([WHOLE], VIEWS, [torch.float64], [True]),
    ],
    ids=str,
)
def test_operators_of_the_whole_block(random, configuration, view, dtype, norm):
    """Forward, and backward for everything, without x as far as that goes, and for x alone. Without a norm
    there are four tensors to a branch, here with SiLU and the hard sigmoid.
    """
    policy = (0, 0) if norm else (1, 1)
    x, grad = (VIEWS[view](random(3, 6, 4, 5, dtype=dtype)) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = draw_inputs(random, configuration, tuple(x.shape), dtype=wide)
    add, mul = (
        [t for name, t in inputs.items() if name.startswith(branch) and (norm or "norm" not in name)]
        for branch in ("add.", "mul.")
    )
    weight, bias = inputs.get("mask_weight"), inputs.get("mask_bias")
    arguments = (x, weight, bias, add, mul, 1e-5, *policy)
    opcheck(torch.ops.gc_cuda.global_context.default, arguments)
    opcheck(torch.ops.gc_cuda.global_context_kept.default, arguments)

    _, kept = torch.ops.gc_cuda.global_context_kept(*arguments)
    in_branch = [True, True, norm, norm, True, True]
    present = [
        True,
        weight is not None,
        bias is not None,
        *(b and bool(add) for b in in_branch),
        *(b and bool(mul) for b in in_branch),
    ]
    backward = torch.ops.gc_cuda.global_context_backward.default
    opcheck(backward, (grad, x, weight, bias, add, mul, kept, *policy, present))
    without_x = [False, False, False, *present[3:]]
    x_or_none = x if mul else None
    opcheck(backward, (grad, x_or_none, weight, None, add, mul, kept, *policy, without_x))
    if weight is None:
        only_x = [True] + [False] * 14
        opcheck(backward, (grad, x_or_none, None, None, add, mul, kept, *policy, only_x))


def test_functions_trace_under_fake_tensors(random):
    """Shapes and strides are known without running anything."""
    x = random(2, 8, 5, 6, dtype=torch.float16, layout=torch.channels_last).to("meta")
    assert gc_cuda.attention_pool(x, torch.empty(8, device="meta")).dtype == torch.float16
    out = gc_cuda.broadcast_add(x, gc_cuda.average_pool(x))
    assert out.shape == x.shape
    assert out.is_contiguous(memory_format=torch.channels_last)
    out = gc_cuda.ContextBlock(8, 1 / 2).to("meta")(x)
    assert out.shape == x.shape
    assert out.dtype == torch.float16
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_operators_on_inputs_that_need_gradients(random):
    """The operators themselves are below autograd; with such inputs they keep the same rules."""
    x, _, logits, vector, weight = arguments(random, VIEWS["cropped"], torch.float32)
    x, logits, vector, weight = (t.detach().requires_grad_() for t in (x, logits, vector, weight))
    inputs = draw_inputs(random, WHOLE, tuple(x.shape), dtype=torch.float32)
    add, mul = (
        [tensor.requires_grad_() for name, tensor in inputs.items() if name.startswith(branch)]
        for branch in ("add.", "mul.")
    )
    operators = torch.ops.gc_cuda
    for operator, values in (
        (operators.softmax_pool, (x, logits)),
        (operators.attention_pool, (x, weight, None)),
        (operators.pixel_sum, (x, True)),
        (operators.broadcast, (x, vector, vector)),
        (operators.global_context, (x, weight, None, add, mul, 1e-5, 0, 0)),
    ):
        # What tracing with gradients gives is in test_compile.py, through the public functions.
        opcheck(
            operator.default,
            values,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
