"""A double of GCNet's own block, which is in no package that installs."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from gc_cuda import reference

MODULE = "mmdet.ops.gcb.context_block"


class ContextBlock(reference.ContextBlock):
    """The attributes of GCNet's own, which it calls as modules."""

    def __init__(self, inplanes, ratio, pooling_type="att", fusion_types=("channel_add",)):
        super().__init__(inplanes, ratio, pooling_type, fusion_types)
        if pooling_type == "att":
            self.softmax = nn.Softmax(dim=2)
        else:
            self.avg_pool = nn.AdaptiveAvgPool2d(1)

    def spatial_pool(self, x):
        if self.pooling_type == "avg":
            return self.avg_pool(x)
        attention = self.softmax(self.conv_mask(x).flatten(2))
        return torch.einsum("ncs,nks->nck", x.flatten(2), attention).unsqueeze(-1)

    def forward(self, x):
        context, out = self.spatial_pool(x), x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out


ContextBlock.__module__ = MODULE


@pytest.fixture(autouse=True)
def gcnet(monkeypatch):
    """GCNet's module, as if it were installed: pickle looks the class up there."""
    for dots in range(MODULE.count(".") + 1):
        name = ".".join(MODULE.split(".")[: dots + 1])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[MODULE].ContextBlock = ContextBlock
