"""bn_context_add_relu with a factor for each image, as of stochastic depth: derivatives, rules, errors."""

from __future__ import annotations

import re

import pytest
import torch
from tail_cases import GC_TRAIN, RUNNING, TAILS, Tail, draw_tail, run_tail, tail_of
from test_tail import FLOAT64, errors
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import gc_cuda
from gc_cuda import reference

# one image dropped, the others at another scale each
FACTOR = torch.tensor([0.0, 1.25, -2.0], dtype=torch.float64)


@pytest.mark.parametrize("size", [(3, 12, 5, 7), (3, 67, 31, 37)], ids=str)
@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_equals_its_definition(random, tail, size, layout):
    inputs = draw_tail(random, tail, size, layout=layout)
    grad = random(*size, layout=layout)
    ours = run_tail(gc_cuda, tail, inputs, grad, image_factor=FACTOR)
    theirs = run_tail(reference, tail, inputs, grad, image_factor=FACTOR)
    for name, error in errors(ours, theirs).items():
        assert error < FLOAT64, name


@pytest.mark.parametrize("tail", [GC_TRAIN, Tail(GC_TRAIN.block, "eval")], ids=str)
def test_the_definition_is_eagers(random, tail):
    """A dropped image is its identity; the others are scaled before the addition."""
    inputs = draw_tail(random, tail, (3, 8, 5, 7))
    statistics = {name: inputs.pop(name) for name in RUNNING}
    alone = tail._replace(relu=False, identity=False)
    rest = {name: tensor for name, tensor in inputs.items() if name != "identity"}
    copies = {name: value.clone() for name, value in statistics.items()}
    block = tail_of(reference, alone, rest, copies)(*rest.values())
    expected = (block * FACTOR[:, None, None, None] + inputs["identity"]).relu()
    for library in (gc_cuda, reference):
        copies = {name: value.clone() for name, value in statistics.items()}
        out = tail_of(library, tail, inputs, copies, image_factor=FACTOR)(*inputs.values())
        assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(out[0], inputs["identity"][0].relu())


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_shapes(random, dtype, shape):
    inputs = draw_tail(random, GC_TRAIN, (3, 16, 9, 7), dtype=dtype, parameters=torch.float32)
    grad = random(3, 16, 9, 7, dtype=dtype)
    factors = [FACTOR.to(kind).view(shape) for kind in {dtype, torch.float32}]
    found = [run_tail(gc_cuda, GC_TRAIN, inputs, grad, image_factor=factor) for factor in factors]
    truth = run_tail(reference, GC_TRAIN, inputs, grad, torch.float64, image_factor=FACTOR)
    for one in found:
        assert all(torch.equal(value, one.results[name]) for name, value in found[0].results.items())
        assert one.out.dtype == dtype
        bound = 1e-4 if dtype == torch.float32 else 2e-2
        assert errors(one, truth)["y"] < bound and errors(one, truth)["weight"] < bound


@pytest.mark.parametrize("tail", [TAILS[1], TAILS[4], TAILS[9], TAILS[-1]], ids=str)
def test_first_and_second_derivatives(random, tail, layout):
    inputs = draw_tail(random, tail, (2, 3, 2, 3), layout=layout)
    leaves = {name: tensor.requires_grad_(name not in RUNNING) for name, tensor in inputs.items()}
    statistics = {name: leaves.pop(name).detach() for name in RUNNING if name in leaves}

    def call(*tensors):
        copies = {name: value.clone() for name, value in statistics.items()}
        return tail_of(gc_cuda, tail, leaves, copies, image_factor=FACTOR[1:])(*tensors)

    assert gradcheck(call, tuple(leaves.values()))
    for tensor in leaves.values():
        tensor.requires_grad_(tensor.numel() > 1)  # the bias of a mask has a gradient of 0, without a graph
    assert gradgradcheck(call, tuple(leaves.values()), fast_mode=True)


def test_rules_of_operators(random):
    y = random(3, 6, 4, 5)
    arguments = (y, y, None, None, None, None, 2, 1e-5, None, None, [], [], 1e-5, 0, 0, True, "", 1, FACTOR)
    opcheck(torch.ops.gc_cuda.bn_context_add_relu.default, arguments)
    out, kept = torch.ops.gc_cuda.bn_context_add_relu(*arguments)
    needed = [True, True] + [False] * 16
    backward = (y, y, out, None, None, 2, None, None, [], [], kept, 0, 0, needed, "", 1, FACTOR)
    opcheck(torch.ops.gc_cuda.bn_context_add_relu_backward.default, backward)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(random, backend):
    torch.compiler.reset()
    y = random(3, 6, 4, 5)

    def call(y, factor):
        return gc_cuda.bn_context_add_relu(y, 2 * y, gc_cuda.BatchNorm(training=True), image_factor=factor)

    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend=backend)):
        leaf = y.clone().requires_grad_()
        function(leaf, FACTOR).square().sum().backward()
        found.append(leaf.grad)
    assert torch.allclose(*found, rtol=1e-10, atol=1e-10)
    torch.compiler.reset()


Y = torch.zeros(3, 4, 3, 5)
BAD = {
    "of two images": (torch.ones(2), ValueError, "image_factor must have 3 elements (N of y), got shape [2]"),
    "a number": (0.5, TypeError, "image_factor must be a torch.Tensor, got float"),
    "in double": (FACTOR, TypeError, "image_factor must be torch.float32 like y, got torch.float64"),
    "elsewhere": (torch.ones(3, device="meta"), ValueError, "image_factor must be on cpu like y, got meta"),
    "trained": (torch.ones(3, requires_grad=True), ValueError, "image_factor must not require a gradient"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    factor, error, words = BAD[case]
    with pytest.raises(error, match=re.escape(words)):
        gc_cuda.bn_context_add_relu(Y, image_factor=factor)


def test_no_image():
    out = gc_cuda.bn_context_add_relu(Y[:0], Y[:0], image_factor=torch.ones(0))
    assert out.shape == (0, 4, 3, 5)
