"""global_context equals the reference, and so do its gradients; it computes and keeps what is needed only."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from block_cases import CONFIGURATIONS, WHOLE, Configuration, Spy, draw_inputs, error_scales, function_of
from evaluate import HALVES, LAYOUTS, STRIDED, evaluate
from tolerance import assert_close_to_truth
from torch.profiler import ProfilerActivity, profile

import gc_cuda
from gc_cuda import Transform, reference


def check(configuration, inputs, grad, **options):
    """Output and every gradient against PyTorch in the same dtypes and in float64."""
    names, values = list(inputs), list(inputs.values())
    ours = evaluate(function_of(gc_cuda, configuration, names), values, grad)
    eager = evaluate(function_of(reference, configuration, names), values, grad)
    truth = evaluate(function_of(reference, configuration, names), values, grad, torch.float64)
    of_out, of_gradients = error_scales(inputs, grad)
    assert_close_to_truth("out", ours.out, eager.out, truth.out, of_out, **options)
    for name, *gradients in zip(names, ours.gradients, eager.gradients, truth.gradients):
        if name == "mask_bias":
            assert torch.equal(gradients[0], torch.zeros_like(inputs[name])), "not felt by a softmax"
        else:
            assert_close_to_truth(f"grad of {name}", *gradients, of_gradients[name], **options)
    return ours


def test_whole_block(random, shape, layout, dtype, device):
    inputs = draw_inputs(random, WHOLE, shape, dtype=dtype, device=device, layout=layout)
    grad = random(*shape, dtype=dtype, device=device, layout=layout)
    check(WHOLE, inputs, grad)


# Both have S odd; the second is cut into splits.
@pytest.mark.parametrize("size", [(3, 40, 7, 7), (2, 67, 31, 37)], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_every_configuration(random, configuration, size, layout, dtype, device):
    inputs = draw_inputs(random, configuration, size, dtype=dtype, device=device, layout=layout)
    ours = check(configuration, inputs, random(*size, dtype=dtype, device=device, layout=layout))
    assert ours.out.is_contiguous(memory_format=layout)
    assert ours.gradients[0].is_contiguous(memory_format=layout)


# Outputs of 8 MiB and more are written past the caches on the CPU. NCHW rows here are shorter than a vector,
# short and no multiple of one, short and even, a few vectors long, long, and too long to be written at once.
@pytest.mark.parametrize("pixels", [(3, 3), (7, 7), (8, 8), (25, 42), (46, 47), (2, 33000)], ids=str)
@pytest.mark.parametrize(
    ("configuration", "dtype"),
    [(Configuration("att", ("add",)), torch.float32), (WHOLE, torch.bfloat16)],
    ids=str,
)
def test_outputs_too_large_for_the_caches(random, configuration, pixels, dtype, layout, device):
    channels = 67
    images = 1 + 2**23 // (channels * pixels[0] * pixels[1] * dtype.itemsize)
    size = (images, channels, *pixels)
    inputs = draw_inputs(random, configuration, size, dtype=dtype, device=device, layout=layout)
    check(configuration, inputs, random(*size, dtype=dtype, device=device, layout=layout))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_half_x_with_float32_parameters(random, configuration, layout, dtype, device):
    """As under autocast: the parameters keep their precision, and their gradients their dtype."""
    size = (2, 96, 9, 14)
    inputs = draw_inputs(
        random, configuration, size, dtype=dtype, parameters=torch.float32, device=device, layout=layout
    )
    check(configuration, inputs, random(*size, dtype=dtype, device=device, layout=layout))


@pytest.mark.parametrize("wide", [0, 1], ids=["odd ones wide", "even ones wide"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_each_parameter_in_its_own_dtype(random, dtype, wide, layout, device):
    size = (2, 40, 9, 14)
    inputs = draw_inputs(random, WHOLE, size, dtype=dtype, device=device, layout=layout)
    for name in [name for name in inputs if name != "x"][wide::2]:
        inputs[name] = inputs[name].float()
    check(WHOLE, inputs, random(*size, dtype=dtype, device=device, layout=layout))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_output_is_rounded_once(random, layout, dtype, device):
    """It is the half number nearest to the truth, but for the few pixels next to the middle of two."""
    size = (2, 96, 9, 14)
    inputs = draw_inputs(
        random, WHOLE, size, dtype=dtype, parameters=torch.float32, device=device, layout=layout
    )
    out = function_of(gc_cuda, WHOLE, inputs)(*inputs.values())
    truth = function_of(reference, WHOLE, inputs)(*(tensor.double() for tensor in inputs.values()))
    assert (out == truth.to(dtype)).double().mean() > 0.99


def test_one_hidden_unit(random, layout, device):
    """The norm of one value is norm_bias, whatever the context: what comes before it gets no gradient."""
    c = 6
    x, grad = (random(2, c, 5, 4, device=device, layout=layout) for _ in range(2))
    six = Transform(*(random(*s, device=device) for s in [(1, c), (1,), (1,), (1,), (c, 1), (c,)]))
    six = Transform(*(tensor.requires_grad_() for tensor in six))._replace(norm_bias=torch.ones(1).to(x))
    weight = random(c, device=device, grad=True)
    out = gc_cuda.global_context(x.requires_grad_(), weight, None, six)
    torch.testing.assert_close(out, x + (six.w2.flatten() + six.b2)[:, None, None], rtol=1e-13, atol=1e-13)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad, rtol=1e-11, atol=1e-11)
    for tensor in (six.w1, six.b1, weight):
        torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor), rtol=0, atol=1e-11)


def test_parameters_without_unit_dimensions(random, device):
    """Those of linear layers, the mask weight as a vector: the same numbers, gradients in their shapes."""
    inputs = draw_inputs(random, WHOLE, (2, 24, 5, 6), device=device)
    grad = random(2, 24, 5, 6, device=device)
    full = evaluate(function_of(gc_cuda, WHOLE, inputs), inputs.values(), grad)
    plain = [t if name == "x" else t.squeeze() for name, t in inputs.items()]
    flat = evaluate(function_of(gc_cuda, WHOLE, inputs), plain, grad)
    assert torch.equal(flat.out, full.out)
    for actual, expected, value in zip(flat.gradients, full.gradients, plain):
        assert torch.equal(actual, expected.view(value.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("view", STRIDED)
def test_strided_inputs_and_gradients(random, view, dtype, device):
    """Any view of x, a parameter or the gradient gives the values of its contiguous copy, and is left as it
    was.
    """
    x = STRIDED[view](random(3, 8, 7, 9, dtype=dtype, device=device))
    grad = STRIDED[view](random(3, 8, 7, 9, dtype=dtype, device=device))
    inputs = draw_inputs(random, WHOLE, tuple(x.shape), dtype=dtype, device=device) | {"x": x}
    for name, tensor in inputs.items():
        if name != "x":
            inputs[name] = tensor.unsqueeze(-1).repeat_interleave(2, -1)[..., 0]  # every other number
    inputs["add.w1"] = inputs["add.w1"].flatten(1).T.contiguous().T
    before = {name: tensor.clone() for name, tensor in inputs.items()} | {"grad": grad.clone()}
    check(WHOLE, inputs, grad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in inputs.items())
    assert torch.equal(grad, before["grad"])


@pytest.mark.parametrize("configuration", [WHOLE, Configuration("avg", ("add",))], ids=str)
def test_gradient_in_another_layout(random, configuration, layout, device):
    """A convolution in another memory format may follow, or a sum: the gradient then comes as it likes."""
    other = next(other for other in LAYOUTS.values() if other != layout)
    inputs = draw_inputs(random, configuration, (2, 24, 9, 7), device=device, layout=layout)
    check(configuration, inputs, random(2, 24, 9, 7, device=device, layout=other))
    check(configuration, inputs, random(1, 1, 1, 1, device=device).expand(2, 24, 9, 7))


OPERATOR_ORDER = [
    "x",
    "mask_weight",
    "mask_bias",
    *(f"{branch}.{name}" for branch in ("add", "mul") for name in Transform._fields),
]


def subsets(names):
    """Every one of them; of the 2**15 of both branches: up to two inputs, and all but up to two."""
    if len(names) <= 9:
        sizes = range(1, len(names) + 1)
    else:
        sizes = (1, 2, len(names) - 2, len(names) - 1, len(names))
    return [set(chosen) for size in sizes for chosen in combinations(names, size)]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_only_the_gradients_asked_for(random, configuration, device):
    """They are those of the full backward pass; the others are None, and nobody computed them."""
    inputs = draw_inputs(random, configuration, (2, 8, 3, 5), device=device)
    grad = random(2, 8, 3, 5, device=device)
    call = function_of(gc_cuda, configuration, inputs)
    full = dict(zip(inputs, evaluate(call, inputs.values(), grad).gradients))
    for chosen in subsets(list(inputs)):
        leaves = {name: tensor.detach().requires_grad_(name in chosen) for name, tensor in inputs.items()}
        with Spy() as spy:
            call(*leaves.values()).backward(grad)
        calls = [call for call in spy.calls if call.name == "gc_cuda::global_context_backward"]
        for name, leaf in leaves.items():
            if name in chosen:
                torch.testing.assert_close(leaf.grad, full[name], rtol=1e-12, atol=1e-13)
            else:
                assert leaf.grad is None
        asked = [name in chosen for name in OPERATOR_ORDER]
        ours = [] if chosen == {"mask_bias"} else [asked]  # whose gradient is 0 whatever the tensors
        assert [list(backward.arguments[-1]) for backward in calls] == ours
        for backward in calls:
            assert len(backward.result) == sum(asked)


def saved_by(call):
    """The tensors that the autograd graph of a call holds on to."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = call()
    del out
    return saved


def own_bytes(saved, parameters):
    """Bytes of the saved tensors without the parameters, which the model holds anyway: they are told by their
    storage, and no storage counts twice.
    """
    held = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.numel()}
    return sum(size for pointer, size in storages.items() if pointer not in held)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_saved_bytes(random, configuration, dtype, layout, device):
    """At most 1.01 times x, at the fewest channels for which that is promised, of half numbers too."""
    # S is large enough that the C + 2 sums of an image do not matter beside its S * C pixels.
    size = (1, 256, 50, 84)
    inputs = draw_inputs(random, configuration, size, dtype=dtype, device=device, layout=layout)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    x, *parameters = leaves
    saved = saved_by(lambda: function_of(gc_cuda, configuration, inputs)(*leaves))
    share = own_bytes(saved, parameters) / x.nbytes
    assert share <= 1.01
    kept = any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in saved)
    assert kept == (str(configuration) != "avg+add"), "the gradients of a mean and an addition need no x"
    assert share < 0.01 or kept


def test_x_is_kept_only_where_a_gradient_needs_it(random, device):
    """With add alone: for its own gradient and that of the mask weight under a softmax, and for no other."""

    def keeps_x(configuration, chosen):
        inputs = draw_inputs(random, configuration, (2, 8, 5, 6), device=device)
        leaves = [tensor.requires_grad_(name in chosen) for name, tensor in inputs.items()]
        saved = saved_by(lambda: function_of(gc_cuda, configuration, inputs)(*leaves))
        return any(t.untyped_storage().data_ptr() == leaves[0].untyped_storage().data_ptr() for t in saved)

    att, avg = Configuration("att", ("add",)), Configuration("avg", ("add",))
    branch = {f"add.{name}" for name in Transform._fields}
    assert keeps_x(att, {"x"})
    assert keeps_x(att, {"mask_weight"})
    assert not keeps_x(att, branch | {"mask_bias"})
    assert not keeps_x(avg, branch | {"x"})
    assert not keeps_x(WHOLE, {"mask_bias"})


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_without_gradients_nothing_is_kept(random, configuration, device):
    inputs = draw_inputs(random, configuration, (2, 8, 5, 6), device=device)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    call = function_of(gc_cuda, configuration, inputs)
    expected = call(*leaves).detach()
    with torch.no_grad():
        assert saved_by(lambda: call(*leaves)) == []
        assert call(*leaves).grad_fn is None
    with torch.inference_mode():
        assert torch.equal(call(*leaves), expected)
    assert saved_by(lambda: call(*(leaf.detach() for leaf in leaves))) == []


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_empty_batch(random, configuration, layout, dtype, device):
    """Nothing out, and zeros for the parameters."""
    inputs = draw_inputs(random, configuration, (0, 8, 5, 6), dtype=dtype, device=device, layout=layout)
    call = function_of(gc_cuda, configuration, inputs)
    out, gradients = evaluate(call, inputs.values(), random(0, 8, 5, 6, device=device))
    assert out.shape == (0, 8, 5, 6)
    assert out.dtype == dtype
    for value, gradient in zip(inputs.values(), gradients):
        assert gradient.dtype == value.dtype
        assert torch.equal(gradient, torch.zeros_like(value))


def launches(call):
    """Kernels, fills and copies that the device ran for a call."""
    call()  # what only the first call does is no part of it
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [(torch.float32, torch.float32), (torch.float16, torch.float32)],
    ids=["float32", "float16 beside float32"],
)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_launches(random, configuration, dtype, parameters, layout):
    """At most three forward, and at most three backward, where all the parameters get a gradient."""
    size = (2, 256, 50, 84)
    inputs = draw_inputs(
        random, configuration, size, dtype=dtype, parameters=parameters, device="cuda", layout=layout
    )
    grad = random(*size, dtype=dtype, device="cuda", layout=layout)
    assert len(launches(lambda: grad + grad)) == 1, "the profiler sees every launch, and nothing else"

    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    call = function_of(gc_cuda, configuration, inputs)
    seen = launches(lambda: call(*leaves))
    assert 1 <= len(seen) <= 3, seen

    out = call(*leaves)
    seen = launches(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))
    assert 1 <= len(seen) <= 3, seen
