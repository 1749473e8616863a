"""Modules that look like a block and compute something else."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from hand_written import CHANNELS, HIDDEN
from torch import nn


class TwoConvs(nn.Module):
    """What the near misses share; not a block."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(CHANNELS, HIDDEN, 1), nn.Conv2d(HIDDEN, CHANNELS, 1)

    def scale(self, pooled):
        return torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))


class MaxSE(TwoConvs):
    def forward(self, x):
        return x * self.scale(F.adaptive_max_pool2d(x, 1))


class BothPoolsSE(TwoConvs):
    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True) + x.amax((2, 3), keepdim=True))


class ChannelSoftmax(nn.Module):
    """The softmax is over the one channel of the mask, where it is 1, and not over the pixels."""

    def __init__(self):
        super().__init__()
        self.mask, self.fc = nn.Conv2d(CHANNELS, 1, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        mask = self.mask(x).view(n, 1, h * w).softmax(1)
        pooled = torch.matmul(x.view(n, c, h * w), mask.transpose(1, 2)).unsqueeze(-1)
        return x + self.fc(pooled)


class ResidualSE(TwoConvs):
    def forward(self, x):
        return x + x * self.scale(x.mean((2, 3), keepdim=True))


class ScaledSE(TwoConvs):
    def forward(self, x):
        return 0.5 * x * self.scale(x.mean((2, 3), keepdim=True))


class DropoutSE(TwoConvs):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return x * self.scale(self.drop(x.mean((2, 3), keepdim=True)))


class SpatialAttention(nn.Module):
    """As CBAM's: one map for all channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(maps))


class FixedPoolSE(TwoConvs):
    """The mean over all pixels of one size alone."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(7)

    def forward(self, x):
        return x * self.scale(self.pool(x))


class RowSE(TwoConvs):
    """The mean over the rows alone; coordinate attention begins so."""

    def forward(self, x):
        return x * self.scale(x.mean(2, keepdim=True))


class BatchMeanSE(TwoConvs):
    """The mean over the pixels of all images."""

    def forward(self, x):
        return x * self.scale(x.mean((0, 2, 3), keepdim=True))


class SizeDependentSE(TwoConvs):
    def forward(self, x):
        pooled = x.mean((2, 3), keepdim=True)
        if x.size(2) > 7:
            pooled = pooled * 2
        return x * self.scale(pooled)


class SumSE(TwoConvs):
    """The sum over the pixels in place of the mean."""

    def forward(self, x):
        return x * self.scale(x.sum((2, 3), keepdim=True))


class SquaredSE(TwoConvs):
    def forward(self, x):
        return x * self.scale(x.square().mean((2, 3), keepdim=True))


class ImageSE(TwoConvs):
    """One scale for all channels of an image."""

    def forward(self, x):
        return x * self.scale(x.mean((2, 3), keepdim=True)).mean(1, keepdim=True)


class NearMiss(NamedTuple):
    make: type[nn.Module]
    reason: str  # a pattern of what the report has to say; it names the point
    size: tuple[int, int] = (9, 7)  # of the pixels


NEAR_MISSES = {
    "maximum": NearMiss(MaxSE, "max"),
    "maximum and mean": NearMiss(BothPoolsSE, "max"),
    "softmax over channels": NearMiss(ChannelSoftmax, "softmax"),
    "residual": NearMiss(ResidualSE, "add"),
    "scaled output": NearMiss(ScaledSE, "mul|0\\.5|scale"),
    "dropout": NearMiss(DropoutSE, "dropout|random"),
    "spatial attention": NearMiss(SpatialAttention, "mean|channels|max"),
    "fixed kernel": NearMiss(FixedPoolSE, "avg_pool", (7, 7)),
    "one dimension": NearMiss(RowSE, "mean"),
    "mean over the batch": NearMiss(BatchMeanSE, "mean"),
    "a size decides": NearMiss(SizeDependentSE, "size"),
    "sum": NearMiss(SumSE, "sum"),
    "one scale an image": NearMiss(ImageSE, "mul"),
    "mean of squares": NearMiss(SquaredSE, "square|pow|mean"),
}
