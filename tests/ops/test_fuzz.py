"""Whatever shape, stride, dtype, layout, pooling, fusion and choice of gradients: the reference's numbers.

2,000 examples a run, the same ones each time. GC_CUDA_FUZZ=50000 asks for that many, new ones in every run;
a failing example is printed small, with the line that repeats it.
"""

from __future__ import annotations

import os

import pytest
import torch
from block_cases import Configuration, error_scales, function_of
from tolerance import assert_close_to_truth

import gc_cuda
from gc_cuda import Transform, reference

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

WANTED = int(os.environ.get("GC_CUDA_FUZZ", "0"))
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WIDE = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in DTYPES}
# Sums and products of the inputs are kept wide; what a gradient in half rounds on its way are the pieces that
# the public functions exchange: context, term, scale.
ROUNDINGS = 3


def examples(share):
    """This share of the examples of a run."""
    return settings(
        max_examples=max(1, int((WANTED or 2000) * share)),
        derandomize=not WANTED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors; test_determinism.py shows that more threads give the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


# A feature map of the wanted size out of a larger one, by memory layout.
VIEWS = {
    "nchw": lambda x: x[:, :, 2:, 3:].contiguous(),
    "channels_last": lambda x: channels_last(x[:, :, 2:, 3:]),
    "cropped": lambda x: x[:, :, 2:, 3:],
    "cropped channels_last": lambda x: channels_last(x)[:, :, 2:, 3:],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)[:, :, 2:, 3:],
    "every other pixel": lambda x: x.repeat_interleave(2, 3)[..., ::2][:, :, 2:, 3:],
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2, 2:, 3:],
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)[:, :, 2:, 3:],
    "one image for all": lambda x: x[:1, :, 2:, 3:].expand(x.shape[0], -1, -1, -1),
    "one number a channel": lambda x: x[:, :, :1, :1].expand(-1, -1, x.shape[2] - 2, x.shape[3] - 3),
    "offset by one element": lambda x: x.flatten()[1 : 1 + x[:, :, 2:, 3:].numel()].view(
        x[:, :, 2:, 3:].shape
    ),
}

sizes = st.tuples(
    st.integers(0, 3), st.integers(1, 24), st.integers(1, 8), st.integers(1, 8) | st.integers(30, 40)
)
views = st.sampled_from(sorted(VIEWS))
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)


class Numbers:
    """Normal tensors from a seed, in any view of a feature map."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *size, dtype=torch.float64):
        return torch.randn(size, generator=self.generator, dtype=torch.float64).to(dtype)

    def map(self, size, view, dtype):
        n, c, h, w = size
        return VIEWS[view](self(n, c, h + 2, w + 3, dtype=dtype))


def evaluate(function, inputs, needing, grad, dtype=None):
    """The output, and the gradients by name of the inputs that need one."""
    leaves = {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in inputs.items()}
    for name in needing:
        leaves[name].requires_grad_()
    out = function(*leaves.values())
    if needing:
        out.backward(grad.to(out.dtype))
    assert all(leaf.grad is None for name, leaf in leaves.items() if name not in needing)
    return out.detach(), {name: leaves[name].grad for name in needing}


def compare(ours, plain, inputs, needing, grad, of_out, of_gradients):
    """Both functions on the same values; PyTorch in float64 is the truth."""
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    out, gradients = evaluate(ours, inputs, needing, grad)
    eager, eager_gradients = evaluate(plain, inputs, needing, grad)
    truth, true_gradients = evaluate(plain, inputs, needing, grad, torch.float64)
    assert_close_to_truth("out", out, eager, truth, of_out, roundings=ROUNDINGS)
    for name in needing:
        if name == "mask_bias":
            assert torch.equal(gradients[name], torch.zeros_like(inputs[name]))
            continue
        three = (gradients[name], eager_gradients[name], true_gradients[name])
        assert_close_to_truth(f"grad of {name}", *three, of_gradients[name], roundings=ROUNDINGS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.items()), "an input was changed"
    return out


@examples(0.65)
@given(data=st.data(), size=sizes, view=views, dtype=dtypes, seed=seeds)
def test_global_context(data, size, view, dtype, seed):
    numbers = Numbers(seed)
    configuration = Configuration(
        data.draw(st.sampled_from(["att", "avg"]), "pooling"),
        data.draw(st.sampled_from([("add",), ("mul",), ("add", "mul")]), "branches"),
    )
    c = size[1]
    inputs = {"x": numbers.map(size, view, dtype)}
    if configuration.pooling_type == "att":
        inputs["mask_weight"] = numbers(1, c, 1, 1) * 2 / c**0.5
        if data.draw(st.booleans(), "bias"):
            inputs["mask_bias"] = numbers(1)
    for branch in configuration.branches:
        p = data.draw(st.integers(5, 24), f"hidden units of {branch}")
        six = Transform(
            numbers(p, c, 1, 1) / c**0.5,
            numbers(p),
            1 + numbers(p, 1, 1) / 2,
            numbers(p, 1, 1) / 2,
            numbers(c, p) / p**0.5,
            numbers(c),
        )
        inputs |= {f"{branch}.{name}": tensor for name, tensor in six._asdict().items()}
    parameters = data.draw(st.sampled_from(sorted({dtype, WIDE[dtype]}, key=str)), "parameters")
    inputs = {name: t if name == "x" else t.to(parameters) for name, t in inputs.items()}
    needing = data.draw(st.sets(st.sampled_from(list(inputs))), "needing")
    grad = numbers.map(size, data.draw(views, "gradient"), dtype)
    event(f"{configuration}")

    names = list(inputs)
    scales = error_scales(inputs, grad)
    out = compare(
        function_of(gc_cuda, configuration, names),
        function_of(reference, configuration, names),
        inputs,
        needing,
        grad,
        *scales,
    )
    assert out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)


def of_pool(x, attention, grad, weight=None):
    """The scales of error of a pooling's context and gradients, as in block_cases.error_scales."""
    pixels, grad = x.double().abs().flatten(2), grad.double().abs()
    context = torch.einsum("ncs,ns->nc", pixels, attention)
    products = torch.einsum("nc,ncs->ns", grad, pixels) + (grad * context).sum(1, keepdim=True)
    of_logits = attention * products
    of_x = grad[:, :, None] * attention[:, None]
    of_weight = None
    if weight is not None:
        of_x = of_x + of_logits[:, None] * weight.double().abs().flatten()[:, None]
        of_weight = torch.einsum("ns,ncs->c", of_logits, pixels)
    return context, {"x": of_x.view(x.shape), "logits": of_logits, "mask_weight": of_weight}


@examples(0.2)
@given(
    data=st.data(),
    name=st.sampled_from(["softmax_pool", "attention_pool", "average_pool"]),
    size=sizes,
    view=views,
    dtype=dtypes,
    seed=seeds,
)
def test_pooling(data, name, size, view, dtype, seed):
    numbers = Numbers(seed)
    n, c, h, w = size
    inputs = {"x": numbers.map(size, view, dtype)}
    companion = data.draw(st.sampled_from(sorted({dtype, WIDE[dtype]}, key=str)), "companions")
    if name == "softmax_pool":
        inputs["logits"] = (3 * numbers(n, h * w)).to(companion)
        attention = inputs["logits"].double().softmax(1)
    elif name == "attention_pool":
        inputs["mask_weight"] = (numbers(c) * 2 / c**0.5).to(companion)
        if data.draw(st.booleans(), "bias"):
            inputs["mask_bias"] = numbers(1).to(companion)
        logits = torch.einsum("nchw,c->nhw", inputs["x"].double(), inputs["mask_weight"].double())
        attention = logits.flatten(1).softmax(1)
    else:
        attention = torch.full((n, h * w), 1 / (h * w), dtype=torch.float64)
    needing = data.draw(st.sets(st.sampled_from(list(inputs))), "needing")
    grad = numbers(n, c, dtype=dtype)
    event(name)
    compare(
        getattr(gc_cuda, name),
        getattr(reference, name),
        inputs,
        needing,
        grad,
        *of_pool(inputs["x"], attention, grad, inputs.get("mask_weight")),
    )


@examples(0.15)
@given(
    data=st.data(),
    name=st.sampled_from(["broadcast_add", "broadcast_mul", "broadcast_mul_add"]),
    size=sizes,
    view=views,
    dtype=dtypes,
    seed=seeds,
)
def test_broadcast(data, name, size, view, dtype, seed):
    numbers = Numbers(seed)
    companions = {"broadcast_add": ["term"], "broadcast_mul": ["scale"]}.get(name, ["scale", "term"])
    inputs = {"x": numbers.map(size, view, dtype)}
    for companion in companions:
        kind = data.draw(st.sampled_from(sorted({dtype, WIDE[dtype]}, key=str)), companion)
        inputs[companion] = numbers(*size[:2], dtype=kind)
    needing = data.draw(st.sets(st.sampled_from(list(inputs))), "needing")
    grad = numbers.map(size, data.draw(views, "gradient"), dtype)
    x, scale, term = (
        inputs[key].double().abs() if key in inputs else torch.ones(size[:2]).double()
        for key in ("x", "scale", "term")
    )
    scales = {
        "x": grad.double().abs() * scale[:, :, None, None],
        "scale": (grad.double().abs() * x).sum((2, 3)),
        "term": grad.double().abs().sum((2, 3)),
    }
    event(name)
    of_out = x * scale[:, :, None, None] + term[:, :, None, None]
    compare(getattr(gc_cuda, name), getattr(reference, name), inputs, needing, grad, of_out, scales)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30, 1e-40, -1e-40, 65504.0, 7e4]


@examples(0.1)  # besides the 2,000
@given(
    data=st.data(),
    name=st.sampled_from(["softmax_pool", "average_pool", "broadcast_mul_add"]),
    size=sizes.filter(lambda size: size[0] > 0),
    view=views,
    dtype=dtypes,
    seed=seeds,
)
def test_extreme_values(data, name, size, view, dtype, seed):
    """Any of them anywhere, also everywhere: NaN, infinity and numbers stand where they do in PyTorch."""
    numbers = Numbers(seed)
    n, c, h, w = size
    special = st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=3)

    def spoiled(tensor, label):
        tensor = tensor.clone(memory_format=torch.preserve_format)

        def rounded(value):  # torch 2.4 assigns no number that overflows
            return torch.tensor(value, dtype=torch.float64).to(tensor.dtype)

        if data.draw(st.booleans(), f"all of {label}"):
            tensor[:1] = rounded(data.draw(st.sampled_from(SPECIAL)))
        for value in data.draw(special, label):
            place = data.draw(st.integers(0, tensor.numel() - 1))
            index = torch.unravel_index(torch.tensor(place), tensor.shape)
            tensor[tuple(int(i) for i in index)] = rounded(value)
        return tensor

    inputs = [spoiled(numbers.map(size, view, dtype), "x")]
    if name == "softmax_pool":
        inputs.append(spoiled(numbers(n, h * w).to(dtype), "logits"))
    elif name == "broadcast_mul_add":
        inputs += [spoiled(numbers(n, c).to(dtype), label) for label in ("scale", "term")]
    out = getattr(gc_cuda, name)(*inputs)
    # PyTorch may overflow on the way (a product before its sum, a sum in half), ours is rounded at the end
    # only: the yardstick is PyTorch's float64.
    expected = getattr(reference, name)(*(tensor.double() for tensor in inputs)).to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    finite = expected.isfinite()
    scale = max([1.0, *(float(t[t.isfinite()].abs().max()) for t in inputs if t.isfinite().any())])
    tolerance = 8 * torch.finfo(dtype).eps
    limit = float(expected[finite].abs().max()) if finite.any() else 0.0
    torch.testing.assert_close(
        out[finite], expected[finite], rtol=tolerance, atol=tolerance * min(scale, max(1.0, limit))
    )
