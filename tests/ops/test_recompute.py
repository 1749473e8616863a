"""A batch norm, an activation and a block, computed again in the backward pass: results, and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from gc_cuda import reference
from gc_cuda.ops import recompute
from gc_cuda.ops.operands import tensors_of
from gc_cuda.ops.whole_block import policy_of
from gc_cuda.reference import BatchNorm, Transform

C, HIDDEN = 12, 5
NORM_EPS, MOMENTUM = 1e-3, 0.3
KINDS = {
    "squeeze-and-excitation": ("avg", ("mul",), False),
    "mean, both": ("avg", ("add", "mul"), True),
    "attention, add": ("att", ("add",), True),
    "attention, mul": ("att", ("mul",), True),
}


class Case:
    """The tensors of a middle, and both ways to compute it."""

    def __init__(self, random, kind, act, training, layout=torch.contiguous_format, size=(3, C, 7, 6)):
        self.pooling_type, branches, with_norm = KINDS[kind]
        self.act, self.training = act, training
        self.y = random(*size, layout=layout, grad=True)
        self.grad = random(*size, layout=layout)
        self.weight, self.bias = (random(C).requires_grad_() for _ in range(2))
        self.mask_weight = random(C).requires_grad_() if self.pooling_type == "att" else None
        self.mask_bias = random(1).requires_grad_() if self.pooling_type == "att" else None
        self.branches = {}
        for name in branches:
            norm = [random(HIDDEN) for _ in range(2)] if with_norm else [None, None]
            parts = random(HIDDEN, C), random(HIDDEN), *norm, random(C, HIDDEN), random(C)
            self.branches[name] = Transform(*(p if p is None else p.requires_grad_() for p in parts))

    @property
    def leaves(self):
        parts = [one for branch in self.branches.values() for one in branch]
        leaves = [self.y, self.weight, self.bias, self.mask_weight, self.mask_bias, *parts]
        return [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]

    def norm(self):
        mean, var = torch.linspace(-1, 1, C).double(), torch.linspace(0.5, 2, C).double()
        return BatchNorm(self.weight, self.bias, mean, var, self.training, MOMENTUM, NORM_EPS)

    def eager(self, norm):
        weight, bias, mean, var, *_ = norm
        z = functional.batch_norm(self.y, mean, var, weight, bias, self.training, MOMENTUM, NORM_EPS)
        x = reference.ACTIVATIONS[self.act](z)
        options = {"pooling_type": self.pooling_type, "activation": "silu"}
        return reference.global_context(x, self.mask_weight, self.mask_bias, **self.branches, **options)

    def ours(self, norm):
        add, mul = (tensors_of(self.branches.get(name)) for name in ("add", "mul"))
        block = policy_of("silu", "sigmoid", 1e-5)
        return recompute.bn_act_context(
            self.y, norm, self.act, self.mask_weight, self.mask_bias, add, mul, block
        )

    def run(self, way):
        norm = self.norm()
        out = way(norm)
        gradients = torch.autograd.grad(out, self.leaves, self.grad)
        return [out.detach(), norm.running_mean, norm.running_var, *gradients]


def assert_close(actual, expected):
    for one, other in zip(actual, expected):
        scale = max(float(other.detach().abs().max()), 1e-3)
        assert float((one - other).detach().abs().max()) <= 1e-11 * scale


ACTS = pytest.mark.parametrize("act", recompute.ACTIVATIONS)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "given"])
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


@ACTS
@TRAINING
@EACH_KIND
def test_eager_results(random, kind, act, training, layout):
    """Output, running statistics, and every gradient."""
    case = Case(random, kind, act, training, layout)
    actual, expected = case.run(case.ours), case.run(case.eager)
    assert actual[3].stride() == expected[3].stride()
    assert_close(actual, expected)


@ACTS
@TRAINING
@EACH_KIND
def test_second_derivatives(random, kind, act, training):
    """Of all gradients together; those of the mask's bias are zero."""
    case = Case(random, kind, act, training, size=(2, C, 3, 2))
    found = []
    for way in (case.ours, case.eager):
        norm = case.norm()
        first = torch.autograd.grad(way(norm), case.leaves, case.grad, create_graph=True)
        weights = [torch.linspace(0.5, 1.5, one.numel()).double().view(one.shape) for one in first]
        total = sum((one * weight).sum() for one, weight in zip(first, weights))
        second = torch.autograd.grad(total, case.leaves, allow_unused=True)
        found.append([*first, *(torch.zeros(()) if one is None else one for one in second)])
        assert not torch.equal(norm.running_mean, case.norm().running_mean) or not training
    assert_close(*found)


@EACH_KIND
def test_frozen_parts_get_no_gradient(random, kind):
    case = Case(random, kind, "silu", True)
    everything = case.leaves
    for kept in range(len(everything)):
        for place, leaf in enumerate(everything):
            leaf.requires_grad_(place == kept)
        assert_close(case.run(case.ours), case.run(case.eager))


@ACTS
def test_y_and_vectors_are_kept(random, act):
    case = Case(random, "squeeze-and-excitation", act, True, size=(3, C, 30, 30))
    own = {leaf.untyped_storage()._cdata for leaf in case.leaves}
    saved = {}

    def pack(tensor):
        saved.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.ours(case.norm())
    assert case.y.untyped_storage()._cdata in saved
    assert sum(storage.nbytes() for key, storage in saved.items() if key not in own) < case.y.nbytes / 10


def test_what_eager_does_not_read_may_change_before_the_backward_pass(random):
    case = Case(random, "attention, add", "hardswish", False)
    norm = case.norm()
    expected = torch.autograd.grad(case.ours(norm), case.leaves, case.grad)
    out = case.ours(norm)
    with torch.no_grad():
        case.bias.add_(1)
        norm.running_mean.add_(1)
        norm.running_var.mul_(2)
    assert all(map(torch.equal, torch.autograd.grad(out, case.leaves, case.grad), expected))
    out = case.ours(norm)
    with torch.no_grad():
        case.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        torch.autograd.grad(out, case.leaves, case.grad)


@ACTS
def test_the_same_bits_again(random, act):
    """So that a ReLU's gradient is zero where its output was."""
    case = Case(random, "squeeze-and-excitation", act, True)
    norm = nn.BatchNorm2d(C).double()
    policy = recompute.MiddlePolicy(True, 0.1, norm.eps, act, policy_of("relu", "sigmoid", 1e-5), 0)
    vectors = case.weight, case.bias, torch.zeros(C).double(), torch.ones(C).double()
    with torch.no_grad():
        (_, x), (_, again) = (recompute._again(policy, case.y, *vectors) for _ in range(2))
    assert torch.equal(x, again)
