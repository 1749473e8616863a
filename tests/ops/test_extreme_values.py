"""NaN and infinity come out where PyTorch's softmax puts them, and nowhere else; what need not overflow does
not.
"""

from __future__ import annotations

import pytest
import torch
from block_cases import CONFIGURATIONS, WHOLE, Configuration, draw_inputs, error_scales, function_of
from evaluate import evaluate, evaluate_all
from tolerance import assert_close_to_truth

import gc_cuda
from gc_cuda import Transform, reference

INF, NAN = float("inf"), float("nan")
# One image that fits a tile, and one that is cut into several splits.
SIZES = [(3, 8, 7, 7), (3, 16, 64, 80)]
SEVERAL_TILES = (3, 16, 31, 37)


def compare(function, inputs, grad):
    """Value, gradients, and the places of their NaNs and infinities agree with the reference."""
    ours, eager, truth = evaluate_all(function, inputs, grad)
    magnitude = torch.ones((), dtype=torch.float64)  # everything here is of order one
    assert_close_to_truth("out", ours.out, eager.out, truth.out, magnitude)
    for i, gradients in enumerate(zip(ours.gradients, eager.gradients, truth.gradients)):
        assert_close_to_truth(f"gradient {i}", *gradients, magnitude)
    return ours.out


@pytest.fixture(params=SIZES, ids=str)
def size(request):
    return request.param


def pixels(size, fraction):
    """The first pixels of an image."""
    return int(size[2] * size[3] * fraction)


def test_image_of_minus_infinities_is_nan(random, size, layout, device):
    """The softmax of nothing but -inf is NaN in PyTorch; the other images do not notice."""
    x = random(*size, dtype=torch.float32, device=device, layout=layout)
    logits = random(size[0], size[2] * size[3], dtype=torch.float32, device=device)
    logits[1] = -INF
    out = compare("softmax_pool", (x, logits), random(*size[:2], dtype=torch.float32, device=device))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_masked_pixels_weigh_nothing(random, size, layout, device):
    """-inf on half of the image, so that whole splits are masked, and on all of it but one pixel."""
    x = random(*size, dtype=torch.float32, device=device, layout=layout)
    logits = random(size[0], size[2] * size[3], dtype=torch.float32, device=device)
    logits[0, : pixels(size, 0.5)] = -INF
    logits[1, pixels(size, 0.5) :] = -INF
    logits[2] = -INF
    logits[2, pixels(size, 0.7)] = -3.0
    out = compare("softmax_pool", (x, logits), random(*size[:2], dtype=torch.float32, device=device))
    assert torch.equal(out[2], x.flatten(2)[2, :, pixels(size, 0.7)])


@pytest.mark.parametrize("value", [INF, NAN])
def test_one_bad_logit_spoils_its_image_only(random, size, value, layout, device):
    x = random(*size, dtype=torch.float32, device=device, layout=layout)
    logits = random(size[0], size[2] * size[3], dtype=torch.float32, device=device)
    logits[1, pixels(size, 0.8)] = value
    out = compare("softmax_pool", (x, logits), random(*size[:2], dtype=torch.float32, device=device))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_non_finite_pixel(random, size, value, layout, device):
    """An infinite value passes into its channel, not into others: the weights there are given."""
    x = random(*size, dtype=torch.float32, device=device, layout=layout)
    x[1, 3, 2, 4] = value
    logits = random(size[0], size[2] * size[3], dtype=torch.float32, device=device)
    context = gc_cuda.softmax_pool(x, logits)
    expected = reference.softmax_pool(x, logits)
    assert torch.equal(context.isfinite(), expected.isfinite())
    torch.testing.assert_close(context[1, 3], torch.tensor(value, device=device), equal_nan=True)
    assert context.isfinite().sum() == context.numel() - 1
    torch.testing.assert_close(
        gc_cuda.average_pool(x)[1, 3], torch.tensor(value, device=device), equal_nan=True
    )


def test_weight_of_zero_times_infinity_is_nan(random, size, layout, device):
    """No pixel is skipped because its weight is 0."""
    x = random(*size, dtype=torch.float32, device=device, layout=layout)
    x[1, 3, 2, 4] = INF
    logits = random(size[0], size[2] * size[3], dtype=torch.float32, device=device)
    logits.view(size[0], *size[2:])[1, 2, 4] = -INF
    context = gc_cuda.softmax_pool(x, logits)
    assert context[1, 3].isnan()
    assert context.isfinite().sum() == context.numel() - 1
    assert torch.equal(context.isnan(), reference.softmax_pool(x, logits).isnan())


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_non_finite_pixel_under_the_mask_convolution(random, size, value, layout, device):
    """Here it makes the logit infinite or NaN as well, and PyTorch decides what that means."""
    x = random(*size, dtype=torch.float32, device=device, layout=layout)
    x[1, 3, 2, 4] = value
    weight = torch.linspace(0.1, 1, size[1], device=device)
    context, expected = gc_cuda.attention_pool(x, weight), reference.attention_pool(x, weight)
    assert torch.equal(context.isnan(), expected.isnan())
    assert torch.equal(context.isinf(), expected.isinf())
    torch.testing.assert_close(context, expected, equal_nan=True)


def test_large_logits_do_not_overflow(random, size, layout, device):
    """exp is taken of differences from the maximum only, whichever split holds it."""
    x = random(*size, dtype=torch.float32, device=device, layout=layout)
    logits = 1e4 * random(size[0], size[2] * size[3], dtype=torch.float32, device=device)
    logits[0] += 3e38
    logits[1] -= 3e38
    out = compare("softmax_pool", (x, logits), random(*size[:2], dtype=torch.float32, device=device))
    assert out.isfinite().all()


def test_logits_beyond_half_range(random, layout, device):
    """w . x of half tensors may exceed 65504, where PyTorch's convolution gives inf and NaN; ours stays
    float32.
    """
    x = 30 + random(2, 256, 7, 7, device=device, layout=layout)
    x = x.half()
    weight = (20 + random(256, device=device)).half()
    truth = reference.attention_pool(x.double(), weight.double())
    out = gc_cuda.attention_pool(x, weight)
    assert reference.attention_pool(x, weight).isnan().any(), (
        "PyTorch overflows here: that is why this test exists"
    )
    torch.testing.assert_close(out.double(), truth, rtol=2e-3, atol=0)


def test_sums_beyond_half_range(layout, device):
    """The mean of pixels of 60000 is 60000, though their sum is no half; likewise with weights."""
    x = torch.full((2, 8, 9, 14), 60000.0, dtype=torch.half, device=device).contiguous(memory_format=layout)
    expected = torch.full((2, 8), 60000.0, dtype=torch.half, device=device)
    assert torch.equal(gc_cuda.average_pool(x), expected)
    assert torch.equal(
        gc_cuda.softmax_pool(x, torch.zeros(2, 126, dtype=torch.half, device=device)), expected
    )


def test_scaling_overflows_only_at_the_end(layout, device):
    """x * scale + term is rounded once: an intermediate value beyond the half range is no infinity."""
    x = torch.full((1, 8, 4, 6), 60000.0, dtype=torch.half, device=device).contiguous(memory_format=layout)
    scale = torch.full((1, 8), 1.5, dtype=torch.half, device=device)
    term = torch.full((1, 8), -40000.0, dtype=torch.half, device=device)
    assert torch.equal(gc_cuda.broadcast_mul_add(x, scale, term), torch.full_like(x, 50000.0))
    assert torch.equal(gc_cuda.broadcast_mul(x, scale), torch.full_like(x, INF))


def compare_block(configuration, inputs, grad):
    """Value and gradients agree with the reference: NaN and infinity in the output, in the gradients what is
    not finite. Of infinite terms a norm's gradient makes infinity or NaN as its formula is arranged, and
    PyTorch arranges it in several ways.
    """
    ours, eager, truth = (
        evaluate(function_of(library, configuration, inputs), inputs.values(), grad, dtype)
        for library, dtype in ((gc_cuda, None), (reference, None), (reference, torch.float64))
    )
    magnitude = torch.full((), 1e3, dtype=torch.float64)  # of the sums over pixels here
    assert_close_to_truth("out", ours.out, eager.out, truth.out, magnitude)
    for name, *gradients in zip(inputs, ours.gradients, eager.gradients, truth.gradients):
        if name == "mask_bias":
            assert torch.equal(gradients[0], torch.zeros_like(inputs[name])), "exact, whatever else is NaN"
        else:
            for gradient in gradients:
                gradient[~gradient.isfinite()] = NAN
            assert_close_to_truth(f"grad of {name}", *gradients, magnitude)
    return ours


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_non_finite_pixel_in_the_block(random, configuration, value, layout, device):
    """It spoils its own image, and the gradients that sum over the images."""
    size = SEVERAL_TILES
    inputs = draw_inputs(random, configuration, size, dtype=torch.float32, device=device, layout=layout)
    inputs["x"][1, 3, 2, 4] = value
    if "mask_weight" in inputs:
        inputs["mask_weight"].abs_()  # +inf makes a logit of +inf, -inf one of -inf, which only masks
    grad = random(*size, dtype=torch.float32, device=device, layout=layout)
    ours = compare_block(configuration, inputs, grad)
    assert ours.out[1].isnan().any()
    assert ours.out[[0, 2]].isfinite().all()
    assert ours.gradients[0][[0, 2]].isfinite().all()


@pytest.mark.parametrize("branches", [("add",), ("mul",), ("add", "mul")], ids=str)
def test_block_of_minus_infinite_logits_is_nan(random, branches, layout, device):
    """An infinite mask weight over positive pixels: the softmax of nothing but -inf."""
    size = SEVERAL_TILES
    configuration = Configuration("att", branches)
    inputs = draw_inputs(random, configuration, size, dtype=torch.float32, device=device, layout=layout)
    inputs["x"].abs_().add_(0.1)
    inputs["mask_weight"][0, 2] = -INF
    ours = compare_block(configuration, inputs, random(*size, dtype=torch.float32, device=device))
    assert ours.out.isnan().all()


@pytest.mark.parametrize("name", ["add.w1", "add.norm_bias", "add.w2", "mul.b1", "mul.norm_weight", "mul.b2"])
@pytest.mark.parametrize("value", [INF, NAN])
def test_non_finite_parameter(random, name, value, device):
    """A NaN passes through ReLU, an infinity through the sigmoid, as they do in PyTorch."""
    size = SIZES[0]
    inputs = draw_inputs(random, WHOLE, size, dtype=torch.float32, device=device)
    inputs[name].view(-1)[1] = value
    compare_block(WHOLE, inputs, random(*size, dtype=torch.float32, device=device))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("branch", ["add", "mul"])
@pytest.mark.parametrize("of", ["norm_weight", "norm_bias", "w1", "w2", "b1", "b2", "x", "grad"])
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_layer_norm_gradients_of_infinity(random, of, several, branch, activation, layout, device):
    """No infinity where PyTorch's layer norm has NaN on the CPU, and what is finite is so in both."""
    size = (3, 16, 5, 6)
    configuration = Configuration("att", (branch,))
    inputs = draw_inputs(random, configuration, size, dtype=torch.float32, device=device, layout=layout)
    grad = random(*size, dtype=torch.float32, device=device, layout=layout)
    tensor = grad if of == "grad" else inputs.get(f"{branch}.{of}", inputs["x"])
    places = [(1, 2, 3, 4), (1, 0, 2, 2)] if tensor.dim() == 4 and of in ("x", "grad") else [1, 4]
    for k, place in enumerate(places if several else places[:1]):
        if isinstance(place, tuple):
            tensor[place] = INF
        else:
            tensor.view(-1)[place] = -INF if k else INF
    # PyTorch's CUDA layer norm arranges the formula in another way.
    on_cpu = {name: tensor.cpu() for name, tensor in inputs.items()}

    def call(library, *tensors):
        given = dict(zip(inputs, tensors))
        six = Transform(*(given[f"{branch}.{name}"] for name in Transform._fields))
        return library.global_context(
            given["x"], given["mask_weight"], given["mask_bias"], **{branch: six}, activation=activation
        )

    ours = evaluate(lambda *tensors: call(gc_cuda, *tensors), inputs.values(), grad)
    eager = evaluate(lambda *tensors: call(reference, *tensors), on_cpu.values(), grad.cpu())
    for name, actual, expected in zip(inputs, ours.gradients, eager.gradients):
        if name == "mask_bias":
            continue
        actual = actual.cpu()
        assert torch.equal(actual.isfinite(), expected.isfinite()), f"grad of {name}"
        assert not (expected.isnan() & ~actual.isnan()).any(), (
            f"grad of {name}: an infinity in place of a NaN"
        )


def test_block_beyond_half_range_on_the_way(random, layout, device):
    """Logits and hidden values may exceed 65504, where PyTorch's half block gives inf and NaN."""
    inputs = draw_inputs(random, WHOLE, (2, 256, 7, 7), device=device, layout=layout)
    inputs["x"] = 30 + inputs["x"]
    inputs["mask_weight"] = 20 + inputs["mask_weight"]
    inputs["add.w1"] *= 30000
    inputs["mul.w1"] *= 30000
    inputs = {name: tensor.half() for name, tensor in inputs.items()}
    out = function_of(gc_cuda, WHOLE, inputs)(*inputs.values())
    eager = function_of(reference, WHOLE, inputs)(*inputs.values())
    assert eager.isnan().any(), "PyTorch overflows here: that is why this test exists"
    truth = function_of(reference, WHOLE, inputs)(*(tensor.double() for tensor in inputs.values()))
    torch.testing.assert_close(out.double(), truth, rtol=2e-3, atol=2e-3)


def test_block_overflows_only_at_the_end(random, layout, device):
    """x * scale + t is rounded once; what exceeds the half range in the end is an infinity, as in PyTorch."""
    inputs = draw_inputs(random, WHOLE, (1, 8, 4, 6), device=device, layout=layout)
    inputs["x"] = torch.full_like(inputs["x"], 60000.0)
    for name in ("add.w2", "mul.w2"):
        inputs[name].zero_()
    inputs["mul.b2"].fill_(20.0)  # a scale of 1 - 2e-9
    for term, expected in ((10000.0, INF), (-40000.0, 20000.0)):
        inputs["add.b2"].fill_(term)
        halves = [tensor.half() for tensor in inputs.values()]
        out = function_of(gc_cuda, WHOLE, inputs)(*halves)
        assert torch.equal(out, torch.full_like(out, expected))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_a_variance_that_overflows_is_nan(random, configuration, layout, device):
    """As PyTorch's layer norm has it on the CPU, and not the bias of the norm, which looks like a result.

    PyTorch's CUDA layer norm gives that bias, without a word; it is not followed there.
    """
    inputs = draw_inputs(
        random, configuration, (2, 16, 5, 6), dtype=torch.float32, device=device, layout=layout
    )
    inputs["x"][1] *= 1e25
    out = function_of(gc_cuda, configuration, inputs)(*inputs.values())
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    if device.type == "cpu":
        expected = function_of(reference, configuration, inputs)(*inputs.values())
        assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, 1e-40, 1e15, -1e15], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_constant_map(random, configuration, value, layout, device):
    """Every pixel weighs the same: the attention's gradients vanish, and what is left is PyTorch's."""
    inputs = draw_inputs(random, configuration, SIZES[0], dtype=torch.float32, device=device, layout=layout)
    inputs["x"] = torch.full_like(inputs["x"], value)
    grad = random(*SIZES[0], dtype=torch.float32, device=device, layout=layout)
    names, values = list(inputs), list(inputs.values())
    ours, eager, truth = (
        evaluate(function_of(library, configuration, names), values, grad, dtype)
        for library, dtype in ((gc_cuda, None), (reference, None), (reference, torch.float64))
    )
    of_out, of_gradients = error_scales(inputs, grad)
    assert_close_to_truth("out", ours.out, eager.out, truth.out, of_out)
    for name, *gradients in zip(names, ours.gradients, eager.gradients, truth.gradients):
        if name != "mask_bias":
            assert_close_to_truth(f"grad of {name}", *gradients, of_gradients[name])


@pytest.fixture
def denormals_are_kept(threads):
    """Libraries that Inductor of torch 2.4 has compiled flush them to zero in the thread that loads them and
    in those that it starts, for everything that they compute afterwards.
    """
    in_all_threads = torch.full((2**20,), 1e-40) * 1
    if not in_all_threads.all():
        torch.set_flush_denormal(False)  # for this thread
        threads(1)


@pytest.mark.usefixtures("denormals_are_kept")
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30], ids=str)
def test_denormal_and_huge_pixels(random, scale, size, layout, device):
    """Sums of them are neither flushed to zero nor lost: attention, where huge ones make it one pixel's."""
    x = scale * random(*size, dtype=torch.float32, device=device, layout=layout)
    weight = random(size[1], dtype=torch.float32, device=device)
    # Of order one. Divided in float64: instead of dividing by a number PyTorch's CUDA kernels multiply by its
    # reciprocal, and that of 1e-40 is infinite in float32.
    mean = (x.double().mean((2, 3)) / scale).float()
    for call in (
        lambda library, x, w: library.attention_pool(x, w),
        lambda library, x, w: library.average_pool(x),
        lambda library, x, w: library.broadcast_mul_add(x, mean.to(x.dtype), x.amax((2, 3))),
    ):
        out, eager = call(gc_cuda, x, weight), call(reference, x, weight)
        truth = call(reference, x.double(), weight.double())
        # Relative to the largest pixel, down to the step of denormal numbers.
        magnitude = x.double().abs().max() + 2.0**-126
        assert_close_to_truth("out", out, eager, truth, magnitude)
        assert out.abs().max() > 0
