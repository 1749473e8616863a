"""Squeeze-and-Excitation."""

from __future__ import annotations

from torch import Tensor, nn

from gc_cuda import _checks
from gc_cuda._recipe import Branch, Recipe, activation, gate, run


class SEBlock(nn.Module):
    """Squeeze-and-Excitation (https://arxiv.org/abs/1709.01507) on one fused operation.

    out = x * gate(W2 act(W1 mean(x) + b1) + b2). The parameters are ``fc1`` and ``fc2``, as in timm's
    ``SEModule`` and torchvision's ``SqueezeExcitation``, so that a ``state_dict`` passes strictly both ways.

    Args:
        channels: C, the channels of the feature map.
        hidden: the channels between; C / 16, at least one, if None.
        act_layer: nn.ReLU, nn.SiLU or nn.Hardswish.
        gate_layer: nn.Sigmoid or nn.Hardsigmoid.

    Raises:
        ValueError: for another activation or gate.
    """

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        gate_layer: type[nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        hidden = max(channels // 16, 1) if hidden is None else hidden
        self.fc1 = nn.Conv2d(channels, hidden, kernel_size=1)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(hidden, channels, kernel_size=1)
        self.gate = gate_layer()
        self._recipe()

    def _recipe(self) -> Recipe:
        branch = Branch(self.fc1, None, self.fc2)
        return Recipe(None, None, branch, activation(self.act), gate(self.gate))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, dtype and memory format."""
        _checks.feature_map(x)
        return run(self._recipe(), x)
