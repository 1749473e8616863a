"""The tail of a ResNet's bottleneck in all its variants, and backbones of such bottlenecks; no framework.

    variant           batch norm, block, += identity, relu
    without blocks    eager, no block: the tail of a plain ResNet
    as it is          eager, the block too
    block only        eager, but the block is gc_cuda.global_context
    accelerated       gc_cuda.bn_context_add_relu

The backbones have torchvision's structure and give c2 to c5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from models import BARE, BLOCK, FUSED, PLAIN
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gc_cuda
from gc_cuda import BatchNorm, Transform, reference

VARIANTS = (PLAIN, BLOCK, FUSED, BARE)
GC, SE = "GC", "SE"
BOTTLENECKS = {"R50": (3, 4, 6, 3), "R101": (3, 4, 23, 3)}
WIDTHS = (64, 128, 256, 512)
EXPANSION = 4
PYRAMID = 256  # channels of an FPN


class Context(nn.Module):
    """The parameters of a block: GCNet's, attention and "channel_add", or squeeze-and-excitation's."""

    def __init__(self, kind: str, channels: int, ratio: float = 1 / 16) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.kind = kind
        if kind == GC:
            self.mask_weight = nn.Parameter(torch.randn(channels) * channels**-0.5)
            self.mask_bias = nn.Parameter(torch.zeros(1))
            self.norm_weight = nn.Parameter(torch.ones(hidden))
            self.norm_bias = nn.Parameter(torch.zeros(hidden))
        self.w1 = nn.Parameter(torch.randn(hidden, channels) * channels**-0.5)
        self.b1 = nn.Parameter(torch.zeros(hidden))
        self.w2 = nn.Parameter(torch.randn(channels, hidden) * hidden**-0.5)
        self.b2 = nn.Parameter(torch.zeros(channels))

    def options(self) -> dict[str, Any]:
        """The arguments of `global_context` and of `bn_context_add_relu`."""
        if self.kind == SE:
            return {"mul": Transform(self.w1, self.b1, None, None, self.w2, self.b2), "pooling_type": "avg"}
        add = Transform(self.w1, self.b1, self.norm_weight, self.norm_bias, self.w2, self.b2)
        return {"mask_weight": self.mask_weight, "mask_bias": self.mask_bias, "add": add}


def tail(variant: str, y: Tensor, identity: Tensor, norm: nn.BatchNorm2d, context: Context | None) -> Tensor:
    """What follows the last convolution; `num_batches_tracked` is left alone."""
    momentum = 0.1 if norm.momentum is None else norm.momentum
    given = norm.weight, norm.bias, norm.running_mean, norm.running_var
    options = {} if context is None else context.options()
    if variant == FUSED:
        of_norm = BatchNorm(*given, norm.training, momentum, norm.eps)
        return gc_cuda.bn_context_add_relu(y, identity, of_norm, **options)
    weight, bias, mean, var = given
    x = functional.batch_norm(y, mean, var, weight, bias, norm.training, momentum, norm.eps)
    if variant != BARE:
        block = reference.global_context if variant == PLAIN else gc_cuda.global_context
        x = block(x, **options)
    x += identity
    return x.relu_()


class Bottleneck(nn.Module):
    """With a block before the addition, unless context is None. `with_cp` is mmdetection's, in its places."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            convolution = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out))
        self.context: Context | None = None
        self.variant, self.with_cp, self.with_bits = BARE, False, False

    def stem(self, x: Tensor) -> Tensor:
        """y, which the tail begins with."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.conv3(out)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.with_cp and x.requires_grad):
            return self._tail(self.stem(x), self._identity(x))
        if self.variant == FUSED:
            return checkpoint(self._whole, x, use_reentrant=True)
        return self.relu(checkpoint(self._before_relu, x, use_reentrant=True))

    def _identity(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def _whole(self, x: Tensor) -> Tensor:
        return self._tail(self.stem(x), self._identity(x))

    def _before_relu(self, x: Tensor) -> Tensor:
        out = self.bn3(self.stem(x))
        if self.context is not None:
            block = reference.global_context if self.variant == PLAIN else gc_cuda.global_context
            out = block(out, **self.context.options())
        out += self._identity(x)
        return out

    def _tail(self, y: Tensor, identity: Tensor) -> Tensor:
        context = self.context
        if context is None:
            return tail(BARE, y, identity, self.bn3, None)
        if not self.with_bits:
            return tail(self.variant, y, identity, self.bn3, context)
        norm = self.bn3
        given = norm.weight, norm.bias, norm.running_mean, norm.running_var
        of_norm = BatchNorm(*given, norm.training, norm.momentum or 0.1, norm.eps)
        out = gc_cuda.bn_context_add_relu(y, identity, of_norm, relu=False, **context.options())
        return KeptAsBits.apply(out)


class KeptAsBits(torch.autograd.Function):
    """A ReLU that keeps a bit for each element in place of its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.relu()
        passes = functional.pad((out > 0).flatten(), (0, -x.numel() % 8)).view(-1, 8)
        ctx.save_for_backward((passes * _places(x)).sum(1, dtype=torch.uint8))
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (bits,) = ctx.saved_tensors
        passes = (bits[:, None] & _places(grad)).flatten()[: grad.numel()] != 0
        return grad * passes.view(ctx.shape)


def _places(x: Tensor) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)


class Backbone(nn.Module):
    """A ResNet up to c5; `make` makes a bottleneck of channels, width and stride. With an FPN, if wanted."""

    def __init__(
        self, depth: str, make: Callable[[int, int, int], nn.Module] = Bottleneck, pyramid: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = 64
        for number, (width, count) in enumerate(zip(WIDTHS, BOTTLENECKS[depth]), 1):
            layers = []
            for i in range(count):
                layers.append(make(channels, width, 2 if number > 1 and i == 0 else 1))
                channels = EXPANSION * width
            self.add_module(f"layer{number}", nn.Sequential(*layers))
        self.pyramid = Pyramid() if pyramid else None

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        outs = []
        for number in range(1, 5):
            x = self.get_submodule(f"layer{number}")(x)
            outs.append(x)
        return outs if self.pyramid is None else self.pyramid(outs)


class Pyramid(nn.Module):
    """mmdetection's FPN: lateral convolutions, a way down, and convolutions of what that gives."""

    def __init__(self) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(EXPANSION * width, PYRAMID, 1) for width in WIDTHS)
        self.convolutions = nn.ModuleList(nn.Conv2d(PYRAMID, PYRAMID, 3, padding=1) for _ in WIDTHS)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        found = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        for i in reversed(range(1, len(found))):
            size = found[i - 1].shape[2:]
            found[i - 1] = found[i - 1] + functional.interpolate(found[i], size=size, mode="nearest")
        return [convolution(x) for convolution, x in zip(self.convolutions, found)]


class Setting(NamedTuple):
    """A backbone in training: with batch statistics, or as mmdetection's, norm_eval and one stage frozen."""

    kind: str  # of the blocks; GC: in c3 to c5, SE: everywhere
    depth: str
    norm_eval: bool

    @property
    def name(self) -> str:
        mode = "norm_eval, frozen_stages=1" if self.norm_eval else "batch statistics"
        return f"{self.kind} {self.depth} backbone, {mode}"


SETTINGS = (
    *(Setting(GC, depth, norm_eval) for norm_eval in (True, False) for depth in BOTTLENECKS),
    *(Setting(SE, depth, False) for depth in BOTTLENECKS),
)


def backbone(
    setting: Setting, variant: str, *, pyramid: bool = False, with_cp: bool = False, with_bits: bool = False
) -> Backbone:
    """Under torch.device("meta"), it takes no memory."""
    model = Backbone(setting.depth, pyramid=pyramid)
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck):
            module.with_cp, module.with_bits, module.variant = with_cp, with_bits, variant
            if variant != BARE and (setting.kind == SE or not name.startswith("layer1")):
                module.context = Context(setting.kind, module.conv3.out_channels)
    prepare(model, setting)
    return model


def prepare(model: nn.Module, setting: Setting) -> None:
    """Its mode, and what of it is frozen."""
    model.train()
    if setting.norm_eval:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(("conv1.", "bn1.", "layer1.")))
