"""Squeeze-and-Excitation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gc_cuda import _values
from gc_cuda.blocks import _fused
from gc_cuda.blocks._parts import Kind, Look, Recipe, Unserved, activation, gate, squeeze_excite


class SEBlock(nn.Module):
    """Squeeze-and-Excitation (https://arxiv.org/abs/1709.01507) on one fused operation.

    out = x * gate(W2 act(W1 mean(x) + b1) + b2). The parameters are ``fc1`` and ``fc2``, as in timm's
    ``SEModule`` and torchvision's ``SqueezeExcitation``, so that a ``state_dict`` passes strictly both ways.
    The fused operation runs while calling the parts would do nothing but their classes' forwards; else, and
    under ``torch.compile`` (docs/torch-compile.md), the block calls them.

    Args:
        channels: C, the channels of the feature map.
        hidden: the channels between; C / 16, at least one, if None.
        act_layer: nn.ReLU, nn.SiLU or nn.Hardswish.
        gate_layer: nn.Sigmoid or nn.Hardsigmoid.
        bias: False: without b1 and b2.

    Raises:
        TypeError: for a number that is not an integer, or what is not a class of modules.
        ValueError: for another activation or gate, or a number below 1.
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        gate_layer: type[nn.Module] = nn.Sigmoid,
        bias: bool = True,
    ) -> None:
        super().__init__()
        _values.count(channels, "channels")
        if hidden is not None:
            _values.count(hidden, "hidden")
        _values.module_class(act_layer, "act_layer")
        _values.module_class(gate_layer, "gate_layer")
        hidden = max(channels // 16, 1) if hidden is None else hidden
        self.fc1 = nn.Conv2d(channels, hidden, kernel_size=1, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden, channels, kernel_size=1, bias=bias)
        self.gate = gate_layer()
        look = Look()
        for made, name, read, served in (
            (self.act, "act_layer", activation, "nn.ReLU, nn.SiLU or nn.Hardswish"),
            (self.gate, "gate_layer", gate, "nn.Sigmoid or nn.Hardsigmoid"),
        ):
            try:
                read(look, made, name)
            except Unserved:
                raise ValueError(f"{name} must be {served}, got {type(made).__name__}") from None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, dtype and memory format."""
        return _fused.run(self, _read, _eager, x, strict=True)


def _read(look: Look, block: Any) -> Recipe:
    return squeeze_excite(look, block, "fc1", "act", "fc2", "gate")


def _eager(block: SEBlock, x: Tensor) -> Tensor:
    return x * block.gate(block.fc2(block.act(block.fc1(x.mean((2, 3), keepdim=True)))))


KINDS = {"gc_cuda.blocks.squeeze_excite.SEBlock": Kind(_read)}
