"""Pooling and broadcasting around a middle: autograd's uses, and what is left to plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from around_cases import (
    MIDDLES,
    SIZE,
    Additive,
    Both,
    C,
    N,
    NormalizedSE,
    assert_same,
    eager,
    names_of,
    results,
    sweeps,
)
from block_cases import Spy
from evaluate import STRIDED
from tolerance import assert_close_to_truth
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from gc_cuda.ops.around import around


@pytest.fixture(params=MIDDLES)
def middle(request):
    torch.manual_seed(2)
    return MIDDLES[request.param]().double()


class TestAutograd:
    def test_backward_twice(self, middle, random):
        x, grad = random(*SIZE, grad=True), random(*SIZE)
        inputs = [x, *middle.parameters()]
        out = around(x, middle)
        first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(out, inputs, grad)))

    def test_x_changed_in_place(self, middle, random):
        """An error where eager has one: a sum reads no x."""
        for run in (around, eager):
            x = random(*SIZE, grad=True) + 0
            out = run(x, middle)
            x.mul_(2)
            if isinstance(middle, Additive):
                out.sum().backward()
                continue
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()

    def test_the_output_changed_in_place(self, middle, random):
        x, grad, other = random(*SIZE), random(*SIZE), random(*SIZE)
        got = results(lambda x, middle: around(x, middle).add_(other).mul_(2), x, middle, grad)
        assert_same(got, results(lambda x, middle: (eager(x, middle) + other) * 2, x, middle, grad))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointed(self, middle, random, reentrant):
        x, grad = random(*SIZE, grad=True), random(*SIZE)
        checkpoint(around, x, middle, use_reentrant=reentrant).backward(grad)
        got = [one.grad for one in (x, *middle.parameters())]
        assert_same(got, torch.autograd.grad(eager(x, middle), [x, *middle.parameters()], grad))

    def test_transforms(self, middle, random):
        """Of torch.func, and forward mode: plain PyTorch, and no operator."""
        if isinstance(middle, NormalizedSE):
            middle.eval()  # a batch norm that moves its statistics cannot be transformed
        x, tangent = random(*SIZE), random(*SIZE)
        for transform in (
            lambda run: torch.func.grad(lambda x: run(x, middle).square().sum())(x),
            lambda run: torch.func.vmap(lambda one: run(one[None], middle))(x),
            lambda run: _forward_mode(run, x, tangent, middle),
        ):
            with Spy() as spy:
                got = transform(around)
            assert not any(call.name.startswith("gc_cuda") for call in spy.calls)
            assert_same([got], [transform(eager)])

    def test_under_the_compiler(self, middle, random):
        x, grad = random(*SIZE), random(*SIZE)
        compiled = torch.compile(around, backend="eager", fullgraph=True)
        assert_same(results(compiled, x, middle, grad), results(eager, x, middle, grad))


def _forward_mode(run, x, tangent, middle):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent), middle)).tangent


class Foreign(Tensor):
    """Means more than its numbers."""


class TestLeftToPlainPytorch:
    @pytest.mark.parametrize("view", STRIDED)
    def test_other_strides(self, random, view):
        x = STRIDED[view](random(3, 8, 7, 9))
        weight = random(x.shape[1])
        middle = lambda context: (context * weight, context + weight)  # noqa: E731
        leaf, other = x.detach().requires_grad_(), x.detach().requires_grad_()
        out, expected = around(leaf, middle), eager(other, middle)
        assert_same([out], [expected])
        grad = random(*out.shape)
        assert_same(torch.autograd.grad(out, leaf, grad), torch.autograd.grad(expected, other, grad))
        assert out.stride() == expected.stride()

    @pytest.mark.parametrize(
        "x",
        [
            torch.ones(2, C, 3, 4, dtype=torch.complex64),
            torch.ones(2, C, 3, 0),
            torch.ones(2, C, 3, 4, dtype=torch.float32).as_subclass(Foreign),
        ],
        ids=["complex", "no pixels", "foreign"],
    )
    def test_what_is_not_served(self, x):
        middle = lambda context: (context * 2, context)  # noqa: E731
        with Spy() as spy:
            out = around(x, middle)
        assert not any(call.name.startswith("gc_cuda") for call in spy.calls)
        expected = eager(x, middle)
        assert type(out) is type(expected)
        torch.testing.assert_close(out, expected, equal_nan=True)

    @pytest.mark.parametrize("shape", [(1, C), (N, 1), (1, C, 1, 1)])
    def test_a_scale_of_another_shape(self, random, shape):
        x, scale = random(*SIZE), random(*shape)
        middle = lambda context: (scale + context.mean(), context)  # noqa: E731
        got, expected = (
            torch.autograd.grad(run(leaf, middle).square().sum(), leaf)
            for run in (around, eager)
            for leaf in [x.detach().requires_grad_()]
        )
        assert_same(got, expected)

    @pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
    def test_a_scale_wider_than_x(self, random, low):
        """The output is then as wide, as in eager."""
        x, grad, middle = random(*SIZE, dtype=low), random(*SIZE, dtype=torch.float32), Both()
        run = lambda run: lambda x, middle: run(x, lambda context: middle(context.float()))  # noqa: E731
        got, expected = (results(run(one), x, middle, grad) for one in (around, eager))
        truth = results(run(eager), x.double(), middle, grad)
        for name, one, other, exact in zip(names_of(middle), got, expected, truth, strict=True):
            assert_close_to_truth(name, one, other, exact, roundings=4, rounded_to=low)

    def test_neither_scale_nor_term(self, random):
        for x in (random(*SIZE), random(*SIZE)[:, :, ::2]):
            with pytest.raises(ValueError, match="middle must give a scale, a term or both, got neither"):
                around(x, lambda _: (None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(middle, random, dtype, layout):
    """A float32 map beside a scale in bfloat16 is served; out has the dtype that it has in eager."""
    middle = middle.float()
    x, grad = random(*SIZE, dtype=dtype, layout=layout), random(*SIZE, dtype=torch.float32, layout=layout)

    def under_autocast(run):
        def call(x, middle):
            with torch.autocast("cpu", torch.bfloat16):
                return run(x, middle)

        return call

    ours, theirs = (results(under_autocast(run), x, middle, grad) for run in (around, eager))
    truth = results(eager, x.double(), copy.deepcopy(middle).double(), grad.double())
    for name, *three in zip(names_of(middle), ours, theirs, truth, strict=True):
        assert_close_to_truth(name, *three, roundings=4, rounded_to=torch.bfloat16)
    with torch.no_grad(), Spy() as spy:
        under_autocast(around)(x, middle)
    if dtype == torch.float32:
        assert sweeps(spy) == ["pixel_sum", "broadcast"]
