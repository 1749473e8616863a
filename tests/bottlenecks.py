"""Doubles of torchvision's and mmdetection's bottlenecks, for the tests of tails where neither is installed.

They stand in sys.modules under the names of the real ones, by which accelerate and insert know them. What is
like the real ones is what gc_cuda reads: the names, the order of the calls, and mmdetection's with_cp. The
real ones are in tests/integrations.
"""

from __future__ import annotations

import types

import torch
from torch import nn
from torch.utils import checkpoint
from whole_models import awake

import gc_cuda

TORCHVISION, MMDET = "torchvision.models.resnet", "mmdet.models.backbones.resnet"
CHANNELS = 16  # of the output: four times those between the convolutions


class TorchvisionBottleneck(nn.Module):
    def __init__(self, channels, downsample=None):
        super().__init__()
        between = CHANNELS // 4
        self.conv1 = nn.Conv2d(channels, between, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(between)
        self.conv2 = nn.Conv2d(between, between, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(between)
        self.conv3 = nn.Conv2d(between, CHANNELS, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class MmdetBottleneck(TorchvisionBottleneck):
    """With the plugins that are given, by name, after conv2 and after conv3."""

    def __init__(self, channels, downsample=None, with_cp=False, after_conv2=(), after_conv3=()):
        super().__init__(channels, downsample)
        self.norm1_name, self.norm2_name, self.norm3_name = "bn1", "bn2", "bn3"
        self.with_cp, self.with_plugins = with_cp, bool(after_conv2 or after_conv3)
        self.after_conv1_plugin_names = []
        self.after_conv2_plugin_names = [self._plugin(*one) for one in after_conv2]
        self.after_conv3_plugin_names = [self._plugin(*one) for one in after_conv3]

    def _plugin(self, name, module):
        self.add_module(name, module)
        return name

    norm1 = property(lambda self: getattr(self, self.norm1_name))
    norm2 = property(lambda self: getattr(self, self.norm2_name))
    norm3 = property(lambda self: getattr(self, self.norm3_name))

    def forward_plugin(self, x, names):
        for name in names:
            x = getattr(self, name)(x)
        return x

    def forward(self, x):
        def inner(x):
            out = self.relu(self.norm1(self.conv1(x)))
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv1_plugin_names)
            out = self.relu(self.norm2(self.conv2(out)))
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv2_plugin_names)
            out = self.norm3(self.conv3(out))
            if self.with_plugins:
                out = self.forward_plugin(out, self.after_conv3_plugin_names)
            identity = x if self.downsample is None else self.downsample(x)
            out += identity
            return out

        out = checkpoint.checkpoint(inner, x) if self.with_cp and x.requires_grad else inner(x)
        return self.relu(out)


_DOUBLES = {TORCHVISION: TorchvisionBottleneck, MMDET: MmdetBottleneck}
for module, double in _DOUBLES.items():
    double.__module__ = double.forward.__module__ = module
    double.__name__ = double.__qualname__ = "Bottleneck"


def stand_ins():
    """Modules by name, as if both were installed: pickle looks the classes up there."""
    found = {}
    for module, double in _DOUBLES.items():
        for dots in range(module.count(".") + 1):
            name = ".".join(module.split(".")[: dots + 1])
            found[name] = types.ModuleType(name)
        found[module].Bottleneck = double
    return found


def downsampling(channels):
    return nn.Sequential(nn.Conv2d(channels, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS))


def new_net(framework=TORCHVISION, pooling_type="att", fusion_types=("channel_add",), **options):
    """Two bottlenecks, the first one with a downsampling, behind a convolution; in float64."""
    torch.manual_seed(0)
    options |= {"pooling_type": pooling_type, "fusion_types": fusion_types}
    if framework == TORCHVISION:
        stage = nn.Sequential(TorchvisionBottleneck(8, downsampling(8)), TorchvisionBottleneck(CHANNELS))
        net = nn.Sequential(nn.Conv2d(3, 8, 3), stage)
        gc_cuda.insert(net, ["1"], ratio=1 / 4, **options)
    else:
        with_cp = options.pop("with_cp", False)
        blocks = [gc_cuda.ContextBlock(CHANNELS, 1 / 4, **options) for _ in range(2)]
        stage = nn.Sequential(
            MmdetBottleneck(8, downsampling(8), with_cp, after_conv3=[("context_block", blocks[0])]),
            MmdetBottleneck(CHANNELS, None, with_cp, after_conv3=[("context_block", blocks[1])]),
        )
        net = nn.Sequential(nn.Conv2d(3, 8, 3), stage)
    return awake(net)
