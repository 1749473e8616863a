"""Modules that compute a block's formula when looked at, but depend on what no look at them shows."""

from __future__ import annotations

import os
import random

import torch
import torch.nn.functional as F
from hand_written import CHANNELS, HIDDEN
from near_misses import TwoConvs
from torch import nn

FACTOR = 1.0
CALLS = 0
SETTINGS = {"factor": 1.0}


def gate_of(t):
    return torch.sigmoid(t)


class RandomSE(TwoConvs):
    """Random numbers in the forward."""

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.scale(pooled + 0 * torch.rand_like(pooled))


class PythonRandomSE(TwoConvs):
    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True) * (1 + random.random() // 1))


class CountingSE(TwoConvs):
    """A global counter."""

    def forward(self, x):
        global CALLS
        CALLS += 1
        return x * self.scale(x.mean((2, 3), keepdim=True))


class RememberingSE(TwoConvs):
    """It writes an attribute, which others read."""

    last = None

    def forward(self, x):
        self.last = self.scale(x.mean((2, 3), keepdim=True))
        return x * self.last


class AppendingSE(TwoConvs):
    """It changes an object that an attribute holds."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return x * self.scale(x.mean((2, 3), keepdim=True))


class BufferSE(TwoConvs):
    """It counts in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return x * self.scale(x.mean((2, 3), keepdim=True))


class WidthSE(TwoConvs):
    """Sizes decide, though not those of the first look."""

    def forward(self, x):
        if x.size(3) > 1000:
            return x
        return x * self.scale(x.mean((2, 3), keepdim=True))


class BatchSE(TwoConvs):
    def forward(self, x):
        scale = self.scale(x.mean((2, 3), keepdim=True))
        return x * scale if len(x) != 77 else x


class EnvironmentSE(TwoConvs):
    def forward(self, x):
        if os.environ.get("UNSOUND_SE"):
            return x
        return x * self.scale(x.mean((2, 3), keepdim=True))


class ItemSE(TwoConvs):
    """A number of the data goes through Python."""

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        if pooled.abs().max().item() > 1e6:
            return x
        return x * self.scale(pooled)


class DataSE(TwoConvs):
    """A tensor as a condition."""

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        if (pooled > 1e6).any():
            return x
        return x * self.scale(pooled)


class NoGradSE(TwoConvs):
    def forward(self, x):
        with torch.no_grad():
            pooled = x.mean((2, 3), keepdim=True)
        return x * self.scale(pooled)


class InPlaceSE(TwoConvs):
    """The input is overwritten."""

    def forward(self, x):
        return x.mul_(self.scale(x.mean((2, 3), keepdim=True)))


class DoubleSE(TwoConvs):
    """The pooling in another precision than that of x."""

    def forward(self, x):
        pooled = x.float().mean((2, 3), keepdim=True).to(x.dtype)
        return x * self.scale(pooled)


class GradModeSE(TwoConvs):
    """It asks for the mode of autograd."""

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.scale(pooled if torch.is_grad_enabled() else 2 * pooled)


class TwoInputsSE(TwoConvs):
    def forward(self, x, y):
        return y * self.scale(x.mean((2, 3), keepdim=True))


UNSOUND = {
    "random numbers": RandomSE,
    "random numbers of Python": PythonRandomSE,
    "global counter": CountingSE,
    "written attribute": RememberingSE,
    "written list": AppendingSE,
    "written buffer": BufferSE,
    "width": WidthSE,
    "batch size": BatchSE,
    "environment": EnvironmentSE,
    "item": ItemSE,
    "tensor as condition": DataSE,
    "no_grad inside": NoGradSE,
    "in place": InPlaceSE,
    "another precision": DoubleSE,
    "mode of autograd": GradModeSE,
}


class GlobalSE(TwoConvs):
    """A global that may change."""

    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True) * FACTOR)


class SettingsSE(TwoConvs):
    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True) * SETTINGS["factor"])


class GlobalFunctionSE(TwoConvs):
    def forward(self, x):
        return x * gate_of(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


def default_of(x, options={"factor": 1.0}):  # noqa: B006 (that is the point)
    return x * options["factor"]


class DefaultSE(TwoConvs):
    """A default that can be changed."""

    def forward(self, x):
        return x * self.scale(default_of(x.mean((2, 3), keepdim=True)))


def closed_over():
    """A class whose forward reads a variable of the function that made it, and what sets that."""
    factor = 1.0

    class ClosedSE(TwoConvs):
        def forward(self, x):
            return x * self.scale(x.mean((2, 3), keepdim=True) * factor)

    def change(value):
        nonlocal factor
        factor = value

    return ClosedSE, change


class AttributeSE(TwoConvs):
    """An option of the instance, one of the class, one in a dictionary, and one behind a property."""

    of_class = 1.0

    def __init__(self):
        super().__init__()
        self.factor = 1.0
        self.options = {"factor": 1.0}
        self._behind = 1.0

    @property
    def behind(self):
        return self._behind

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True) * self.factor * self.of_class
        return x * self.scale(pooled * self.options["factor"] * self.behind)


class BufferReadingSE(TwoConvs):
    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True) * self.factor)


ACT = nn.LeakyReLU(0.1)


class GlobalModuleSE(TwoConvs):
    """A module that is no part."""

    def forward(self, x):
        return x * self.scale(ACT(x.mean((2, 3), keepdim=True)))


class TupleSE(TwoConvs):
    """A module that is no part, as it is in a tuple."""

    def __init__(self):
        super().__init__()
        self.acts = (nn.LeakyReLU(0.1),)

    def forward(self, x):
        return x * self.scale(self.acts[0](x.mean((2, 3), keepdim=True)))


def times_factor(t):
    return t * FACTOR


class UnderscoreSE(TwoConvs):
    """A function of the instance that reads a global."""

    def __init__(self):
        super().__init__()
        self._before = times_factor

    def forward(self, x):
        return x * self.scale(self._before(x.mean((2, 3), keepdim=True)))


class FunctionsSE(TwoConvs):
    def __init__(self):
        super().__init__()
        self.before = (times_factor,)

    def forward(self, x):
        return x * self.scale(self.before[0](x.mean((2, 3), keepdim=True)))


def times_default(t, factor=1.0):
    return t * factor


class ConstantDefaultSE(TwoConvs):
    def forward(self, x):
        return x * self.scale(times_default(x.mean((2, 3), keepdim=True)))


class Helpers(nn.Module):
    @staticmethod
    def before(t):
        return t * FACTOR


class OtherClassSE(TwoConvs):
    """A function of another class."""

    def forward(self, x):
        return x * self.scale(Helpers.before(x.mean((2, 3), keepdim=True)))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = 1.0

    def forward(self, x):
        return F.relu(x)


class OuterSE(TwoConvs):
    """It reads what a part of it has."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True) * self.inner.factor
        return x * torch.sigmoid(self.fc2(self.inner(self.fc1(pooled))))


class OuterOfPropertySE(OuterSE):
    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True) * self.inner.halved)


class ScaledConv(nn.Conv2d):
    """A layer of PyTorch's with another step in it, which reads a dictionary."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * SETTINGS["factor"], bias)


class TripledConv(nn.Conv2d):
    """A weight that is computed from a parameter."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 3, bias)


class TripledConvSE(TwoConvs):
    def __init__(self):
        super().__init__()
        self.fc1 = TripledConv(CHANNELS, HIDDEN, 1)

    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True))


class ScaledConvSE(TwoConvs):
    def __init__(self):
        super().__init__()
        self.fc1 = ScaledConv(CHANNELS, HIDDEN, 1)

    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True))


def times(x, factor=1.0):
    return x * factor


class NumberDefaultSE(TwoConvs):
    """A default that is a number."""

    def forward(self, x):
        return x * self.scale(times(x.mean((2, 3), keepdim=True)))
