"""What the tests of gc_cuda.ops.around share: middles, what is right, and the sweeps over the map."""

from __future__ import annotations

import copy

import torch
from block_cases import Spy
from torch import Tensor, nn
from torch.nn import functional

N, C, HIDDEN = 4, 12, 5
SIZE = (N, C, 5, 7)


class Eca(nn.Module):
    """A convolution over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, context):
        return self.conv(context[:, None])[:, 0].sigmoid(), None


class EffectiveSE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(C, C, 1)

    def forward(self, context):
        return functional.relu6(self.fc(context[:, :, None, None]) + 3) / 6, None


class NormalizedSE(nn.Module):
    """With a batch norm between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = (
            nn.Conv2d(C, HIDDEN, 1, bias=False),  # which a norm would take away again
            nn.BatchNorm2d(HIDDEN),
            nn.Conv2d(HIDDEN, C, 1),
        )

    def forward(self, context):
        hidden = self.norm(self.fc1(context[:, :, None, None])).relu()
        return self.fc2(hidden).sigmoid(), None


class GeluTanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(C, HIDDEN), nn.Linear(HIDDEN, C, bias=False)

    def forward(self, context):
        return 1 + self.fc2(functional.gelu(self.fc1(context))).tanh(), None


class Additive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)

    def forward(self, context):
        return None, self.fc(context)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mul, self.add = nn.Linear(C, C), nn.Conv2d(C, C, 1)

    def forward(self, context):
        return self.mul(context).sigmoid(), self.add(context[:, :, None, None])


MIDDLES = {kind.__name__: kind for kind in (Eca, EffectiveSE, NormalizedSE, GeluTanh, Additive, Both)}


def eager(x, middle):
    """What is right: in plain PyTorch."""
    scale, term = middle(x.mean((2, 3)))
    out = x if scale is None else x * scale.reshape(*scale.shape[:2], 1, 1)
    return out if term is None else out + term.reshape(*term.shape[:2], 1, 1)


def results(run, x, middle, grad):
    """The output, and the gradients of x and of the middle's parameters, which is a copy."""
    x, middle = x.detach().requires_grad_(), copy.deepcopy(middle)
    out = run(x, middle)
    gradients = torch.autograd.grad(out, [x, *middle.parameters()], grad.to(out.dtype))
    return [out.detach(), *gradients]


def names_of(middle):
    return ["out", "x", *(name for name, _ in middle.named_parameters())]


def assert_same(got, expected, tolerance=1e-12):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def sweeps(spy: Spy, size=SIZE) -> list[str]:
    """The operators that read or wrote the numbers of a map, in order."""
    found = []
    for call in spy.calls:
        given = [one for one in (*call.arguments, call.result) if isinstance(one, Tensor)]
        view = call.name in ("aten::detach", "aten::expand", "aten::view", "aten::new_empty")
        if not view and any(one.shape == size for one in given):
            found.append(call.name.removeprefix("gc_cuda::"))
    return found
