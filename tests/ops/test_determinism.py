"""Two runs give identical bits, for any number of CPU threads, wherever tensors lie, forward and backward."""

from __future__ import annotations

import pytest
import torch
from block_cases import CONFIGURATIONS, draw_inputs, function_of
from evaluate import Evaluation, evaluate

import gc_cuda

# Large enough that the work is split over threads, with tails in every dimension.
SIZES = [(1, 67, 100, 83), (3, 512, 25, 42), (5, 33, 31, 37)]

CALLS = {
    "softmax_pool": lambda draw, n, c, s: (draw(n, s),),
    "attention_pool": lambda draw, n, c, s: (draw(c) * c**-0.5, draw(1)),
    "average_pool": lambda draw, n, c, s: (),
    "broadcast_add": lambda draw, n, c, s: (draw(n, c),),
    "broadcast_mul": lambda draw, n, c, s: (draw(n, c),),
    "broadcast_mul_add": lambda draw, n, c, s: (draw(n, c), draw(n, c)),
}


def bits(evaluation):
    """Every tensor of an evaluation, as integers: NaN and -0 count too."""
    tensors = [evaluation.out, *(g for g in evaluation.gradients if g is not None)]
    return [
        t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16).flatten() for t in tensors
    ]


def drawn(random, name, size, dtype, layout, device):
    """The inputs of a call, and a gradient of its output."""
    n, c, h, w = size

    def draw(*shape):
        return random(*shape, dtype=dtype, device=device)

    x = random(*size, dtype=dtype, device=device, layout=layout)
    inputs = (x, *(t.to(dtype) for t in CALLS[name](draw, n, c, h * w)))
    grad = random(*size, dtype=dtype, device=device, layout=layout) if "broadcast" in name else draw(n, c)
    return inputs, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_identical_bits(random, threads, name, size, dtype, layout, device):
    inputs, grad = drawn(random, name, size, dtype, layout, device)
    threads(1)
    expected = bits(evaluate(getattr(gc_cuda, name), inputs, grad))
    for count in (1, 2, 3, 7) if device.type == "cpu" else (1, 1):
        threads(count)
        for actual, one in zip(bits(evaluate(getattr(gc_cuda, name), inputs, grad)), expected):
            assert torch.equal(actual, one), f"with {count} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# The last has more images than threads, and weights that outweigh its pixels.
@pytest.mark.parametrize("size", [(1, 67, 100, 83), (3, 512, 25, 42), (9, 512, 3, 5)], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS[2::3], ids=str)
def test_global_context(random, threads, configuration, size, dtype, layout, device):
    inputs = draw_inputs(
        random, configuration, size, dtype=dtype, parameters=torch.float32, device=device, layout=layout
    )
    function = function_of(gc_cuda, configuration, inputs)
    grad = random(*size, dtype=dtype, device=device, layout=layout)
    threads(1)
    expected = bits(evaluate(function, inputs.values(), grad))
    for count in (1, 2, 3, 7) if device.type == "cpu" else (1, 1):
        threads(count)
        for name, actual, one in zip(
            ["out", *inputs], bits(evaluate(function, inputs.values(), grad)), expected
        ):
            assert torch.equal(actual, one), f"{name} with {count} threads"


@pytest.mark.parametrize("fusion_types", [("channel_add",), ("channel_add", "channel_mul")])
def test_block(random, threads, fusion_types, layout, device):
    torch.manual_seed(0)
    block = gc_cuda.ContextBlock(512, 1 / 16, "att", fusion_types).to(device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = random(2, 512, 25, 42, dtype=torch.float32, device=device, layout=layout)
    threads(1)
    expected = block(x)
    for count in (1, 2, 3, 7) if device.type == "cpu" else (1, 1):
        threads(count)
        assert torch.equal(block(x), expected), f"with {count} threads"


def moved(tensor, offset):
    """The same values and strides, `offset` elements behind the beginning of a storage."""
    room = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    copy = room[offset:].as_strided(tensor.shape, tensor.stride(), offset)
    return copy.copy_(tensor)


def where_it_lies(inputs, offset, device):
    """All tensors elsewhere; on CUDA all but x, which the docstring of gc_cuda.functional excepts."""
    first, *others = inputs
    return [first if device.type == "cuda" else moved(first, offset), *(moved(t, offset) for t in others)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
# The last is written past the caches.
@pytest.mark.parametrize(
    "size", [(2, 33, 9, 13), (3, 512, 7, 7), (1, 67, 100, 83), (2, 192, 90, 80)], ids=str
)
@pytest.mark.parametrize("name", CALLS)
def test_bits_do_not_depend_on_where_tensors_lie(random, name, size, dtype, layout, device):
    inputs, grad = drawn(random, name, size, dtype, layout, device)
    expected = evaluate(getattr(gc_cuda, name), inputs, grad)
    for offset in (1, 2, 3, 5, 8):
        actual = evaluate_in_place(
            getattr(gc_cuda, name),
            where_it_lies(inputs, offset, device),
            grad if device.type == "cuda" else moved(grad, offset),
        )
        assert_same_bits(actual, expected, ["out", "x", "second", "third"], offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32 parameters", "parameters like x"])
@pytest.mark.parametrize("size", [(2, 33, 9, 13), (3, 512, 7, 7)], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS[2::3], ids=str)
def test_bits_of_the_block_do_not_depend_on_where_tensors_lie(
    random, configuration, size, parameters, dtype, layout, device
):
    inputs = draw_inputs(
        random, configuration, size, dtype=dtype, parameters=parameters, device=device, layout=layout
    )
    function = function_of(gc_cuda, configuration, inputs)
    grad = random(*size, dtype=dtype, device=device, layout=layout)
    expected = evaluate(function, inputs.values(), grad)
    for offset in (1, 2, 3, 5, 8):
        actual = evaluate_in_place(
            function,
            where_it_lies(inputs.values(), offset, device),
            grad if device.type == "cuda" else moved(grad, offset),
        )
        assert_same_bits(actual, expected, ["out", *inputs], offset)


def evaluate_in_place(function, inputs, grad):
    """As evaluate() does, of these very tensors: a conversion would move them."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    assert [leaf.data_ptr() for leaf in leaves] == [t.data_ptr() for t in inputs]
    out = function(*leaves)
    return Evaluation(out.detach(), torch.autograd.grad(out, leaves, grad, allow_unused=True))


def assert_same_bits(actual, expected, names, offset):
    for name, one, other in zip(names, *((e.out, *e.gradients) for e in (actual, expected))):
        if other is not None:
            assert torch.equal(one, other), f"{name}, tensors moved by {offset} elements"
