"""Blocks as repositories contain them, written anew under names of their own: none is known by its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS, HIDDEN = 16, 6
FUSED, AROUND = "fused", "around"  # one operation; the block's own middle between pooling and broadcast


class ContextBlock2d(nn.Module):
    """As in forks of detectors: planes or a ratio of them, and the attention by views and a product."""

    def __init__(self, inplanes, planes=None, ratio=1 / 4, pool="att", fusions=("channel_add",)):
        super().__init__()
        self.inplanes, self.planes = inplanes, int(inplanes * ratio) if planes is None else planes
        self.pool, self.fusions = pool, list(fusions)
        if "att" in pool:
            self.conv_mask = nn.Conv2d(inplanes, 1, kernel_size=1)
            self.softmax = nn.Softmax(dim=2)
        else:
            self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.channel_add_conv = self.transform() if "channel_add" in fusions else None
        self.channel_mul_conv = self.transform() if "channel_mul" in fusions else None

    def transform(self):
        return nn.Sequential(
            nn.Conv2d(self.inplanes, self.planes, kernel_size=1),
            nn.LayerNorm([self.planes, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(self.planes, self.inplanes, kernel_size=1),
        )

    def spatial_pool(self, x):
        batch, channel, height, width = x.size()
        if self.pool == "att":
            input_x = x.view(batch, channel, height * width).unsqueeze(1)
            context_mask = self.conv_mask(x).view(batch, 1, height * width)
            context_mask = self.softmax(context_mask).unsqueeze(3)
            return torch.matmul(input_x, context_mask).view(batch, channel, 1, 1)
        return self.avg_pool(x)

    def forward(self, x):
        context = self.spatial_pool(x)
        out = x
        if self.channel_mul_conv is not None:
            out = x * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out


class LinearSE(nn.Module):
    def __init__(self, channel=CHANNELS, reduction=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class ConvSE(nn.Module):
    """The mean is a method; names that no framework uses."""

    def __init__(self, bias=True, act=nn.ReLU):
        super().__init__()
        self.squeeze = nn.Conv2d(CHANNELS, HIDDEN, 1, bias=bias)
        self.nonlinear = act()
        self.excite = nn.Conv2d(HIDDEN, CHANNELS, 1, bias=bias)

    def forward(self, feature):
        weights = feature.mean([2, 3], keepdim=True)
        weights = self.excite(self.nonlinear(self.squeeze(weights)))
        return feature * weights.sigmoid()


class SequentialSE(nn.Module):
    """All in one Sequential, the pooling too."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Conv2d(CHANNELS, HIDDEN, kernel_size=1),
            nn.SiLU(),
            nn.Conv2d(HIDDEN, CHANNELS, kernel_size=1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.attention(x) * x


class ViewSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(CHANNELS, HIDDEN), nn.Linear(HIDDEN, CHANNELS)

    def forward(self, x):
        b, c = x.shape[0], x.shape[1]
        s = x.reshape(b, c, -1).mean(-1)
        s = torch.sigmoid(self.up(F.relu(self.down(s), inplace=True)))
        return x * s[:, :, None, None]


class FunctionalSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, HIDDEN, 1)
        self.conv2 = nn.Conv2d(HIDDEN, CHANNELS, 1)

    def forward(self, x):
        out = F.adaptive_avg_pool2d(x, 1)
        out = F.relu(self.conv1(out))
        return x * F.sigmoid(self.conv2(out))


class TorchSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(CHANNELS, HIDDEN), nn.Linear(HIDDEN, CHANNELS)
        self.act = nn.ReLU()

    def forward(self, x):
        s = torch.mean(x, dim=(2, 3))
        s = torch.sigmoid(self.b(self.act(self.a(s))))
        return torch.mul(x, s.unsqueeze(2).unsqueeze(3))


class HardSigmoidOfRelu6(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(x + 3) / 6


class HardSE(nn.Module):
    """As in the first implementations of MobileNetV3."""

    def __init__(self):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(CHANNELS, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(HIDDEN, CHANNELS),
            HardSigmoidOfRelu6(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)


class GlobalAverageSE(nn.Module):
    """The mean over the flattened pixels, as a submodule of its own."""

    def __init__(self):
        super().__init__()
        self.pool = FlatMean()
        self.first, self.second = nn.Conv2d(CHANNELS, HIDDEN, 1), nn.Conv2d(HIDDEN, CHANNELS, 1)
        self.relu, self.gate = nn.ReLU(inplace=True), nn.Hardsigmoid()

    def forward(self, x):
        return x.mul(self.gate(self.second(self.relu(self.first(self.pool(x))))))


class FlatMean(nn.Module):
    def forward(self, x):
        return torch.flatten(x, 2).mean(2).view(x.size(0), x.size(1), 1, 1)


class TanhSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(CHANNELS, HIDDEN), nn.Linear(HIDDEN, CHANNELS)

    def forward(self, x):
        gate = torch.tanh(self.b(torch.relu(self.a(x.mean((2, 3))))))
        return x * ((gate + 1) / 2)[..., None, None]


class ECALayer(nn.Module):
    """A convolution over the channels."""

    def __init__(self, k_size=3):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size=k_size, padding=(k_size - 1) // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        y = self.avg_pool(x)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * self.sigmoid(y).expand_as(x)


class OneLayerSE(nn.Module):
    """Effective squeeze-and-excitation: as many hidden units as channels, and no second layer."""

    def __init__(self):
        super().__init__()
        self.fc, self.gate = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Hardsigmoid(inplace=True)

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc(s))


class NormedSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.middle = nn.Sequential(
            nn.Conv2d(CHANNELS, HIDDEN, 1), nn.BatchNorm2d(HIDDEN), nn.ReLU(), nn.Conv2d(HIDDEN, CHANNELS, 1)
        )

    def forward(self, x):
        return x * torch.sigmoid(self.middle(self.pool(x)))


class AddedSE(nn.Module):
    """It adds its term, ungated."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(CHANNELS, HIDDEN), nn.Linear(HIDDEN, CHANNELS)

    def forward(self, x):
        n, c, _, _ = x.shape
        return x + self.b(F.relu(self.a(x.mean(dim=(2, 3))))).view(n, c, 1, 1)


class GatedSE(ConvSE):
    """With a gate that is given."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, feature):
        pooled = feature.mean([2, 3], keepdim=True)
        return feature * self.gate(self.excite(self.nonlinear(self.squeeze(pooled))))


def half_sigmoid(t):
    """The other convention of a hard sigmoid."""
    return torch.clamp((t + 1) / 2, 0, 1)


def one_and_tanh(t):
    return 1 + torch.tanh(t)


def same(t):
    return t


class MixingSE(ConvSE):
    """Images of a batch meet in the middle, as in a batch norm."""

    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(
            self.excite(self.nonlinear(self.squeeze(pooled - pooled.mean(0, keepdim=True))))
        )


class DetachedSE(ConvSE):
    """No gradient passes through the pooling."""

    def forward(self, x):
        return x * torch.sigmoid(
            self.excite(self.nonlinear(self.squeeze(x.mean((2, 3), keepdim=True).detach())))
        )


class Residual(nn.Module):
    """A small net around a block, as a residual block is."""

    def __init__(self, block):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.attention = block
        self.head = nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head((self.attention(x) + x).relu())


class Block(NamedTuple):
    """How it is made, and how it has to be served."""

    make: Callable[[], nn.Module]
    way: str


def context(pool, *fusions, **options):
    return lambda: ContextBlock2d(CHANNELS, pool=pool, fusions=fusions, **options)


BLOCKS = {
    "context, attention, add": Block(context("att", "channel_add"), FUSED),
    "context, attention, both, planes": Block(context("att", "channel_add", "channel_mul", planes=5), FUSED),
    "context, mean, mul": Block(context("avg", "channel_mul"), FUSED),
    "linear without bias": Block(LinearSE, FUSED),
    "convolutions": Block(ConvSE, FUSED),
    "convolutions without bias": Block(lambda: ConvSE(bias=False), FUSED),
    "one sequential": Block(SequentialSE, FUSED),
    "view": Block(ViewSE, FUSED),
    "functional": Block(FunctionalSE, FUSED),
    "torch.mean": Block(TorchSE, FUSED),
    "hard sigmoid of relu6": Block(HardSE, FUSED),
    "pool as a module": Block(GlobalAverageSE, FUSED),
    "add": Block(AddedSE, FUSED),
    "tanh": Block(TanhSE, AROUND),
    "leaky relu": Block(lambda: ConvSE(act=nn.LeakyReLU), AROUND),
    "gelu": Block(lambda: ConvSE(act=nn.GELU), AROUND),
    "convolution over channels": Block(ECALayer, AROUND),
    "one layer": Block(OneLayerSE, AROUND),
    "batch norm": Block(NormedSE, AROUND),
    "other hard sigmoid": Block(lambda: GatedSE(half_sigmoid), AROUND),
    "1 + tanh": Block(lambda: GatedSE(one_and_tanh), AROUND),
    "no gate": Block(lambda: GatedSE(same), AROUND),
    "mixed batch": Block(MixingSE, AROUND),
    "detached": Block(DetachedSE, AROUND),
}
