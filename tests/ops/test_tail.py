"""bn_context_add_relu equals its definition: out, every gradient and the running statistics; it computes and
keeps what is needed only.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from block_cases import Configuration, Spy
from evaluate import HALVES
from tail_cases import GC_TRAIN, NO_BLOCK, RUNNING, TAILS, Tail, away_from_zero, draw_tail, run_tail, tail_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import gc_cuda
from gc_cuda import BatchNorm, reference

# Channels that fill no vector, with one split; rows that are cut into splits; one row longer than a piece.
SIZES = [(3, 12, 5, 7), (2, 67, 31, 37), (2, 3, 2, 1100)]
FLOAT64 = 1e-11
# PyTorch's own error (of a chain of roundings in the same dtype) may be luck, ours too: both within this many
# times the other's, and so many units of the largest value.
FACTOR, UNITS = 2, 4


def errors(found, truth):
    """Of every result, relative to the largest value; exact zeros have none."""
    of_all = {"out": (found.out, truth.out)} | {
        name: (found.results[name], exact) for name, exact in truth.results.items()
    }
    return {
        name: float((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
        for name, (value, exact) in of_all.items()
        if name != "mask_bias" and exact.numel()
    }


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_equals_its_definition(random, tail, size, layout):
    inputs = draw_tail(random, tail, size, layout=layout)
    grad = random(*size, layout=layout)
    ours = run_tail(gc_cuda, tail, inputs, grad)
    theirs = run_tail(reference, tail, inputs, grad)
    for name, error in errors(ours, theirs).items():
        assert error < FLOAT64, name
    assert ours.out.is_contiguous(memory_format=layout)
    assert set(ours.results) == set(theirs.results)
    if "mask_bias" in inputs:
        assert not ours.results["mask_bias"].any(), "a softmax does not feel it"


@pytest.mark.parametrize("shape_of", [(2, 6, 1, 1), (1, 5, 1, 2), (9, 2, 2, 2), (1, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("tail", TAILS[:16], ids=str)
def test_tiny_maps(random, tail, shape_of, layout):
    inputs = draw_tail(random, tail, shape_of, layout=layout)
    grad = random(*shape_of, layout=layout)
    ours, theirs = (run_tail(library, tail, inputs, grad) for library in (gc_cuda, reference))
    for name, error in errors(ours, theirs).items():
        assert error < 1e-9, name


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_many_channels(random, mode, layout):
    """More than a block of a GPU's kernels holds."""
    size = (2, 9000, 1, 3)
    tail = Tail(Configuration("att", ("add",)), mode)
    inputs = draw_tail(random, tail, size, layout=layout)
    grad = random(*size, layout=layout)
    ours, theirs = (run_tail(library, tail, inputs, grad) for library in (gc_cuda, reference))
    assert all(error < FLOAT64 for error in errors(ours, theirs).values())


@pytest.mark.parametrize("identity", ["channels_last", "nchw", "expanded", "cropped", "transposed"])
@pytest.mark.parametrize("tail", [GC_TRAIN, Tail(NO_BLOCK, "eval")], ids=str)
def test_strides_of_identity_and_gradient(random, tail, identity, layout):
    """out has the layout of y, whatever that of identity and of the gradient."""
    size = (2, 8, 6, 5)
    inputs = draw_tail(random, tail, size, layout=layout)
    inputs["identity"] = {
        "channels_last": lambda: random(*size, layout=torch.channels_last),
        "nchw": lambda: random(*size),
        "expanded": lambda: random(2, 8, 1, 1).expand(size),
        "cropped": lambda: random(2, 8, 8, 9)[:, :, 1:-1, 2:-2],
        "transposed": lambda: random(2, 8, 5, 6).transpose(2, 3),
    }[identity]()
    grad = random(2, 8, 5, 6).transpose(2, 3)
    ours, theirs = (run_tail(library, tail, inputs, grad) for library in (gc_cuda, reference))
    assert all(error < FLOAT64 for error in errors(ours, theirs).values())
    assert ours.out.stride() == inputs["y"].stride()


@pytest.mark.parametrize("mean", [0, 10, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "tail",
    [tail for tail in TAILS if tail.mode != "folded" and tail.relu and tail.identity],
    ids=str,
)
def test_error_does_not_grow_with_the_mean(random, tail, dtype, mean):
    """Largest errors over several draws: PyTorch's of a single one may be luck."""
    worst = {}
    for draw in range(6):
        size = [(2, 64, 13, 21), (1, 67, 31, 37), (2, 128, 7, 7)][draw % 3]
        layout = [torch.contiguous_format, torch.channels_last][draw // 3]
        inputs = draw_tail(
            random, tail, size, dtype=dtype, parameters=torch.float32, layout=layout, mean=mean
        )
        inputs = away_from_zero(reference, tail, inputs, activation="silu")
        grad = random(*size, dtype=dtype, layout=layout)
        truth = run_tail(reference, tail, inputs, grad, torch.float64, activation="silu")
        for library in (gc_cuda, reference):
            found = errors(run_tail(library, tail, inputs, grad, activation="silu"), truth)
            for name, error in found.items():
                key = name, library
                worst[key] = max(worst.get(key, 0.0), error)
    for name in {name for name, _ in worst}:
        ours, theirs = worst[name, gc_cuda], worst[name, reference]
        # A sum of numbers that cancel is small beside its terms: the gradient of the mask is one, and the
        # transform has a chain of them.
        units = 4 * UNITS if "." in name or name == "mask_weight" else UNITS
        assert ours <= FACTOR * theirs + units * 2.0**-24, f"{name}: {ours:.3g}, PyTorch's {theirs:.3g}"


@pytest.mark.parametrize(
    ("mode", "dtype"), [("eval", torch.float32), ("train", torch.float32), ("train", torch.bfloat16)]
)
def test_large_outputs(random, mode, dtype, layout):
    """8 MiB and more are written past the caches, in pieces that begin at a line of memory."""
    tail = Tail(Configuration("att", ("add", "mul")), mode)
    for height, width in ((25, 42), (2, 9001), (7, 7)):
        size = (1 + 2**23 // (67 * height * width * dtype.itemsize), 67, height, width)
        inputs = draw_tail(random, tail, size, dtype=dtype, parameters=torch.float32, layout=layout)
        inputs = away_from_zero(reference, tail, inputs, activation="silu")
        grad = random(*size, dtype=dtype, layout=layout)
        ours, theirs = (
            run_tail(library, tail, inputs, grad, activation="silu") for library in (gc_cuda, reference)
        )
        truth = run_tail(reference, tail, inputs, grad, torch.float64, activation="silu")
        eager = errors(theirs, truth)
        for name, error in errors(ours, truth).items():
            assert error <= FACTOR * eager[name] + 16 * UNITS * 2.0**-24, name


@pytest.mark.parametrize("parameters", ["float32", "own"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dtypes_of_half_models(random, dtype, parameters):
    """Of a model in half, and of one with a batch norm in float32, as under autocast."""
    wide = torch.float32 if parameters == "float32" else dtype
    inputs = draw_tail(random, GC_TRAIN, (2, 16, 9, 7), dtype=dtype, parameters=wide)
    grad = random(2, 16, 9, 7, dtype=dtype)
    ours, theirs = (run_tail(library, GC_TRAIN, inputs, grad) for library in (gc_cuda, reference))
    assert ours.out.dtype == theirs.out.dtype == dtype
    for name, value in theirs.results.items():
        assert ours.results[name].dtype == value.dtype == (wide if name not in ("y", "identity") else dtype)


@pytest.mark.parametrize("of_identity", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("of_y", [torch.float32, torch.bfloat16], ids=str)
def test_identity_of_another_dtype(random, of_y, of_identity):
    """x += identity gives x's dtype; each gradient has its input's."""
    y, identity = random(2, 4, 3, 3, dtype=of_y), random(2, 4, 3, 3, dtype=of_identity)
    y.requires_grad_(), identity.requires_grad_()
    out = gc_cuda.bn_context_add_relu(y, identity, BatchNorm(training=True))
    out.sum().backward()
    eager = torch.nn.functional.batch_norm(y.detach().float(), None, None, training=True).to(of_y)
    eager += identity.detach()
    assert out.dtype == of_y and y.grad.dtype == of_y and identity.grad.dtype == of_identity
    assert torch.allclose(out.float(), eager.relu_().float(), atol=3e-2 if of_y != torch.float32 else 2e-3)


def test_three_steps_of_training_equal_eager(random):
    """The running statistics too, with a momentum of each kind."""
    for momentum in (0.1, 1.0, 0.0):
        statistics = {}
        for library in (gc_cuda, reference):
            torch.manual_seed(1)
            norm = nn.BatchNorm2d(12, momentum=momentum).double()
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
            optimizer = torch.optim.SGD(norm.parameters(), 0.1)
            for _ in range(3):
                y, identity = torch.randn(2, 3, 12, 5, 7, dtype=torch.float64)
                given = BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, True, momentum)
                optimizer.zero_grad()
                library.bn_context_add_relu(y, identity, given).square().sum().backward()
                optimizer.step()
            statistics[library] = [*norm.state_dict().values()]
        for ours, theirs in zip(*statistics.values()):
            assert torch.allclose(ours.double(), theirs.double(), rtol=1e-12, atol=1e-12)


def test_zero_weight_is_exact(random, layout):
    """A new bottleneck begins with a norm of weight 0: x is the bias, and out is identity's ReLU."""
    for mode in ("eval", "train"):
        tail = Tail(Configuration("att", ("add", "mul")), mode)
        inputs = draw_tail(random, tail, (2, 8, 6, 5), layout=layout)
        inputs["weight"].zero_()
        grad = random(2, 8, 6, 5, layout=layout)
        ours, theirs = (run_tail(library, tail, inputs, grad) for library in (gc_cuda, reference))
        assert all(
            error < FLOAT64
            for name, error in errors(ours, theirs).items()
            if name not in ("y", "mask_weight")
        )
        assert not ours.results["y"].any()
        assert ours.results["weight"].any()


def test_empty_batch(random):
    for tail in TAILS:
        inputs = draw_tail(random, tail, (0, 8, 4, 4))
        before = {name: inputs[name].clone() for name in RUNNING if name in inputs}
        ours = run_tail(gc_cuda, tail, inputs, random(0, 8, 4, 4))
        assert ours.out.shape == (0, 8, 4, 4)
        for name, value in ours.results.items():
            expected = before[name] if name in before else torch.zeros_like(inputs[name])
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_what_is_not_finite(random, value, layout):
    """It comes out where PyTorch has it."""
    for tail in [tail for tail in TAILS if tail.mode != "folded"]:
        inputs = draw_tail(random, tail, (3, 6, 5, 7), dtype=torch.float32, layout=layout)
        inputs["y"][1, 2, 3, 4] = value
        grad = random(3, 6, 5, 7, dtype=torch.float32, layout=layout)
        ours, theirs = (run_tail(library, tail, inputs, grad) for library in (gc_cuda, reference))
        assert torch.equal(ours.out.isnan(), theirs.out.isnan()), tail
        assert torch.equal(ours.out.isinf(), theirs.out.isinf()), tail
        for name in ("running_mean", "running_var"):
            assert torch.equal(ours.results[name].isfinite(), theirs.results[name].isfinite()), (tail, name)


@pytest.mark.parametrize("factor", [1e18, 1e25, 1e-18], ids=str)
def test_squares_that_overflow_or_vanish(random, factor, layout):
    """Those of the deviations do not fit a float32; PyTorch itself gives zeros for the largest."""
    y = random(2, 5, 8, 9, dtype=torch.float32, layout=layout) * factor
    norm = BatchNorm(training=True, eps=1e-5 if factor > 1 else 1e-37)
    ours = gc_cuda.bn_context_add_relu(y, None, norm)
    truth = reference.bn_context_add_relu(y.double(), None, norm)
    assert torch.allclose(ours.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "needs", [("y",), ("identity",), ("weight",), ("bias",), ("mask_weight",), ("mul.w2",)], ids=str
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_frozen_parameters(random, mode, needs):
    """Each gradient alone: that of y with a frozen norm, that of the weight with a frozen y."""
    tail = Tail(Configuration("att", ("add", "mul")), mode)
    inputs = draw_tail(random, tail, (2, 8, 6, 5))
    grad = random(2, 8, 6, 5)
    ours, theirs = (run_tail(library, tail, inputs, grad, needs=needs) for library in (gc_cuda, reference))
    assert all(error < FLOAT64 for error in errors(ours, theirs).values())


def kept(function):
    """The sizes of the tensors that autograd keeps."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        out = function()
    return out, sizes


def test_keeps_y_and_out_only(random):
    for tail in TAILS:
        inputs = draw_tail(random, tail, (2, 8, 16, 16))
        leaves = {name: tensor.requires_grad_(name not in RUNNING) for name, tensor in inputs.items()}
        statistics = {name: leaves.pop(name).detach() for name in RUNNING if name in leaves}
        _, sizes = kept(partial(tail_of(gc_cuda, tail, leaves, statistics), *leaves.values()))
        large = sum(size == inputs["y"].numel() for size in sizes)
        assert large == 1 + tail.relu, tail
        assert sum(sizes) - large * inputs["y"].numel() < 0.4 * inputs["y"].numel(), tail


def test_only_identity_needs_a_gradient(random):
    y, identity = random(2, 4, 3, 3), random(2, 4, 3, 3).requires_grad_()
    out, sizes = kept(lambda: gc_cuda.bn_context_add_relu(y, identity, BatchNorm(training=True)))
    assert sizes == [y.numel()]
    (first,) = torch.autograd.grad(out.square().sum(), identity, create_graph=True)
    assert torch.equal(first, 2 * out)
    assert torch.equal(torch.autograd.grad(first.sum(), identity)[0], 2.0 * (out > 0))


def test_one_operator_each_way(random):
    for tail in TAILS:
        inputs = draw_tail(random, tail, (2, 8, 6, 5))
        with Spy() as spy:
            run_tail(gc_cuda, tail, inputs, random(2, 8, 6, 5))
        ours = [name for name in spy.names() if "bn_context" in name]
        assert len(ours) == 2, spy.names()
        assert not [
            name for name in spy.names() if "batch_norm" in name or "relu" in name.replace("add_relu", "")
        ]


def test_out_changed_in_place_is_an_error_as_in_eager(random):
    y = random(2, 4, 3, 3).requires_grad_()
    for library in (gc_cuda, reference):
        out = library.bn_context_add_relu(y, None, BatchNorm(training=True))
        out += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    without = gc_cuda.bn_context_add_relu(y, None, BatchNorm(training=True), relu=False)
    without += 1
    without.sum().backward()


def test_bias_of_the_norm_changed_before_the_backward_pass(random):
    """Eager needs its shape alone."""
    tail = Tail(Configuration("avg", ("mul",)), "train")
    inputs = draw_tail(random, tail, (2, 8, 6, 5))
    grad = random(2, 8, 6, 5)
    gradients = []
    for change in (False, True):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items() if name not in RUNNING}
        out = tail_of(gc_cuda, tail, leaves, {})(*leaves.values())
        if change:
            with torch.no_grad():
                leaves["bias"] += 1
        out.backward(grad)
        gradients.append([leaf.grad for leaf in leaves.values()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_moves_statistics_as_often_as_eager(random, reentrant):
    inputs = draw_tail(random, GC_TRAIN, (2, 8, 6, 5))
    moved = {}
    for library in (gc_cuda, reference):
        leaves = {name: tensor.clone() for name, tensor in inputs.items()}
        statistics = {name: leaves.pop(name) for name in RUNNING}
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        call = tail_of(library, GC_TRAIN, leaves, statistics)
        checkpoint(call, *leaves.values(), use_reentrant=reentrant).sum().backward()
        moved[library] = [*statistics.values(), *[leaf.grad for leaf in leaves.values()]]
    for name, ours, theirs in zip([*RUNNING, *inputs], *moved.values()):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9), name


def test_second_derivatives_do_not_move_statistics(random):
    inputs = draw_tail(random, GC_TRAIN, (2, 4, 3, 3))
    leaves = {name: tensor.requires_grad_(name not in RUNNING) for name, tensor in inputs.items()}
    statistics = {name: leaves.pop(name) for name in RUNNING}
    out = tail_of(gc_cuda, GC_TRAIN, leaves, statistics)(*leaves.values())
    after_forward = [value.clone() for value in statistics.values()]
    (first,) = torch.autograd.grad(out.square().sum(), leaves["y"], create_graph=True)
    first.square().sum().backward()
    assert all(map(torch.equal, after_forward, statistics.values()))
    assert leaves["y"].grad.any()


def test_bits_do_not_depend_on_threads(random, threads, layout):
    for tail in (
        GC_TRAIN,
        Tail(Configuration("avg", ("mul",)), "train"),
        Tail(Configuration("att", ("add",)), "eval"),
    ):
        for size in ((3, 64, 25, 42), (1, 12, 100, 168)):
            inputs = draw_tail(random, tail, size, dtype=torch.float32, layout=layout)
            grad = random(*size, dtype=torch.float32, layout=layout)
            found = []
            for count in (1, 2, 3, 7):
                threads(count)
                found.append(run_tail(gc_cuda, tail, inputs, grad))
            for other in found[1:]:
                assert torch.equal(other.out, found[0].out)
                assert all(
                    torch.equal(other.results[name], value) for name, value in found[0].results.items()
                )
