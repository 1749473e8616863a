"""gc_cuda.ops.operands says what the operators take and keep: held against the operators themselves."""

from __future__ import annotations

import pytest
import torch

from gc_cuda import Transform, reference
from gc_cuda.ops.operands import (
    ACTIVATIONS,
    GATES,
    STATISTICS,
    Kept,
    context_in,
    in_places,
    tensors_of,
    transform_of,
)

N, C, H, W = 3, 8, 5, 4
HIDDEN = {"add": 2, "mul": 6}


def drawn(hidden: int, norm: bool) -> Transform:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    norm_weight, norm_bias = (draw(hidden), draw(hidden)) if norm else (None, None)
    return Transform(draw(hidden, C), draw(hidden), norm_weight, norm_bias, draw(C, hidden), draw(C))


def test_there_is_a_number_for_every_name():
    assert set(ACTIVATIONS) == set(reference.ACTIVATIONS)
    assert set(GATES) == set(reference.GATES)


@pytest.mark.parametrize("name", [*ACTIVATIONS, *GATES])
def test_the_operator_knows_the_name_by_its_number(name):
    x, mul = torch.randn(N, C, H, W, dtype=torch.float64), drawn(4, norm=True)
    policy = {"activation": "relu", "gate": "sigmoid"} | {"gate" if name in GATES else "activation": name}
    numbers = ACTIVATIONS[policy["activation"]], GATES[policy["gate"]]
    out = torch.ops.gc_cuda.global_context(x, None, None, (), mul, 1e-5, *numbers)
    expected = reference.global_context(x, mul=mul, pooling_type="avg", **policy)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [True, False])
def test_a_branch_is_converted_both_ways(norm):
    transform = drawn(2, norm)
    tensors = tensors_of(transform)
    assert len(tensors) == (6 if norm else 4) and all(tensor is not None for tensor in tensors)
    for one, other in zip(transform_of(tensors), transform):
        assert one is other
    assert in_places(range(len(tensors)), -1) == ((0, 1, 2, 3, 4, 5) if norm else (0, 1, -1, -1, 2, 3))


def test_no_branch_is_converted_both_ways():
    assert tensors_of(None) == () and transform_of(()) is None
    assert in_places((), False) == (False,) * 6


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("branches", [("add",), ("mul",), ("add", "mul")], ids="+".join)
@pytest.mark.parametrize("attends", [True, False])
def test_the_parts_of_what_is_kept(attends, branches, norm):
    x = torch.randn(N, C, H, W, dtype=torch.float64)
    weight, bias = (torch.randn(C).double(), torch.randn(1).double()) if attends else (None, None)
    transforms = {name: drawn(HIDDEN[name], norm) for name in branches}
    add, mul = (tensors_of(transforms.get(name)) for name in ("add", "mul"))
    _, kept = torch.ops.gc_cuda.global_context_kept(x, weight, bias, add, mul, 1e-5, 0, 0)
    sizes = Kept.sizes(x, attends=attends, add=add, mul=mul)
    assert kept.numel() == sum(sizes)
    parts = Kept(*kept.split(list(sizes)))

    context = reference.attention_pool(x, weight, bias) if attends else reference.average_pool(x)
    torch.testing.assert_close(context_in(kept, x.shape), context, rtol=1e-10, atol=1e-12)
    assert parts.state.numel() == N * (STATISTICS + C)
    assert parts.logits.numel() == (N * H * W if attends else 0)
    if attends:
        logits = torch.einsum("nchw,c->nhw", x, weight) + bias
        torch.testing.assert_close(parts.logits.view(N, H, W), logits, rtol=1e-10, atol=1e-12)
    hidden = [context @ branch.w1.T + branch.b1 for branch in transforms.values()]
    if norm:
        deviation = torch.cat([(h.var(1, correction=0) + 1e-5).rsqrt() for h in hidden])
        torch.testing.assert_close(parts.inverse_deviation, deviation, rtol=1e-10, atol=1e-12)
        hidden = [torch.nn.functional.layer_norm(h, h.shape[1:]) for h in hidden]
    normalized = torch.cat([h.flatten() for h in hidden])
    torch.testing.assert_close(parts.normalized, normalized, rtol=1e-9, atol=1e-11)
    assert parts.inverse_deviation.numel() == N * len(branches)
    if mul:
        scale = torch.sigmoid(reference.transform(context, transforms["mul"]))
        torch.testing.assert_close(parts.scale.view(N, C), scale, rtol=1e-10, atol=1e-12)
    else:
        assert parts.scale.numel() == 0
