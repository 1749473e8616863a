"""The relatives from which the global context block comes: non-local, and its simplified form."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional

from gc_cuda import _values
from gc_cuda.blocks import _fused, _graphs
from gc_cuda.blocks._parts import Look, Unserved, Weights, convolution
from gc_cuda.ops import checks
from gc_cuda.ops.functional import attention_pool, broadcast_add

MODES = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def _convolution(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Sequential:
    """A 1x1 convolution under the name that mmcv's ConvModule gives it."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=bias)))


class NonLocalBlock(nn.Module):
    """The non-local block (https://arxiv.org/abs/1711.07971) with mmcv's ``NonLocal2d`` parameters.

    out = x + conv_out(A g(x)), where A has a row of S weights for each of the S pixels:

        gaussian           softmax(x^T x)
        embedded_gaussian  softmax(theta(x)^T phi(x) / sqrt(P)), P = in_channels // reduction
        dot_product        theta(x)^T phi(x) / S
        concatenation      relu(w . [theta(x), phi(x)]) / S

    The softmax modes run through ``scaled_dot_product_attention``, which can do without the S x S matrix;
    ``dot_product`` is computed as theta^T (phi g^T) / S, which does, too; ``concatenation`` writes it.
    A new block is the identity.

    Args:
        in_channels: C, the channels of the feature map.
        sub_sample: pool g and phi by the maximum of 2x2 pixels.
        reduction: C // reduction channels inside, at least one.
        use_scale: divide by sqrt(P) in "embedded_gaussian".
        mode: one of the four.

    Raises:
        ValueError: for another mode.
    """

    _abbr_ = "nonlocal_block"

    def __init__(
        self,
        in_channels: int,
        sub_sample: bool = False,
        reduction: int = 2,
        use_scale: bool = True,
        mode: str = "embedded_gaussian",
    ) -> None:
        super().__init__()
        _values.count(in_channels, "in_channels")
        _values.count(reduction, "reduction")
        _values.one_of(mode, "mode", MODES)
        self.in_channels = in_channels
        self.inter_channels = max(in_channels // reduction, 1)
        self.sub_sample = sub_sample
        self.use_scale = use_scale
        self.mode = mode
        # The order of construction and the names are mmcv's.
        self.g: nn.Module = _convolution(in_channels, self.inter_channels)
        self.conv_out = _convolution(self.inter_channels, in_channels)
        self.phi: nn.Module = nn.Identity()
        if mode != "gaussian":
            self.theta = _convolution(in_channels, self.inter_channels)
            self.phi = _convolution(in_channels, self.inter_channels)
        if mode == "concatenation":
            self.concat_project = _convolution(2 * self.inter_channels, 1, bias=False)
        if sub_sample:
            pool = nn.MaxPool2d(kernel_size=2)
            self.g = nn.Sequential(self.g, pool)
            self.phi = pool if mode == "gaussian" else nn.Sequential(self.phi, pool)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.01) -> None:
        """mmcv's initialisation: normal convolutions without bias, and zero for the last."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name.startswith("conv_out"):
                nn.init.zeros_(parameter)
            elif not name.startswith("concat_project"):
                nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape and dtype."""
        g = self.g(x).flatten(2)  # [N, P, S'], S' pixels after sub-sampling
        phi = self.phi(x).flatten(2)  # [N, P or C, S']
        theta = (x if self.mode == "gaussian" else self.theta(x)).flatten(2)  # [N, P or C, S]
        y = self._attend(theta, phi, g).unflatten(2, x.shape[2:])
        out: Tensor = x + self.conv_out(y)
        return out

    def _attend(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """[N, P, S]"""
        if self.mode == "dot_product":
            return torch.matmul(torch.matmul(g, phi.transpose(1, 2)), theta) / phi.shape[2]
        if self.mode == "concatenation":
            weights = functional.relu(self._project(theta, phi)) / phi.shape[2]  # [N, S, S']
            return torch.matmul(g, weights.transpose(1, 2))
        scaled = self.mode == "embedded_gaussian" and self.use_scale
        query, key, value = (tensor.transpose(1, 2).unsqueeze(1) for tensor in (theta, phi, g))
        scale = None if scaled else 1.0  # None: 1 / sqrt(P)
        y = functional.scaled_dot_product_attention(query, key, value, scale=scale)
        return y.squeeze(1).transpose(1, 2)

    def _project(self, theta: Tensor, phi: Tensor) -> Tensor:
        """w . [theta, phi]: [N, S, S']."""
        parameters = _fused.parameters(self, _read_projection, theta)
        if parameters is None:
            n, p, s = theta.shape
            pairs = [
                theta[:, :, :, None].expand(n, p, s, phi.shape[2]),
                phi[:, :, None].expand(n, p, s, phi.shape[2]),
            ]
            return self.concat_project(torch.cat(pairs, dim=1)).squeeze(1)
        # It is a sum of two products, so that the 2P x S x S' tensor is never made.
        weight, bias = parameters
        of_theta, of_phi = (
            torch.einsum("nps,p->ns", part, w.to(part.dtype))
            for part, w in zip((theta, phi), weight.flatten().chunk(2))
        )
        projected = of_theta[:, :, None] + of_phi[:, None, :]
        return projected if bias is None else projected + bias.to(projected.dtype)


def _read_projection(look: Look, block: Any) -> Weights:
    project = look.child(block, "concat_project")
    look.plain(project, "concat_project", nn.Sequential)
    parts = look.children(project)
    if len(parts) != 1:
        raise Unserved("concat_project is more than a convolution")
    conv = convolution(look, parts[0], "concat_project.conv")
    return Weights(((conv, "weight"), (conv, "bias")))


class SimplifiedNonLocalBlock(nn.Module):
    """GCNet's simplified non-local block (https://arxiv.org/abs/1904.11492, figure 4b), on fused pooling.

    out = x + W_v sum_s softmax(w_k . x)[s] x[:, s]: one attention map for all the pixels, and W_v after the
    sum, which is the same as before it. The parameters are ``conv_mask`` (w_k) and ``conv_value`` (W_v). A
    new block is the identity.

    Args:
        in_channels: C, the channels of the feature map.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        _values.count(in_channels, "in_channels")
        self.in_channels = in_channels
        self.conv_mask = nn.Conv2d(in_channels, 1, kernel_size=1)
        self.conv_value = nn.Conv2d(in_channels, in_channels, kernel_size=1, bias=False)
        nn.init.kaiming_normal_(self.conv_mask.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.conv_value.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, dtype and memory format."""
        parameters = _fused.parameters(self, _read, x)
        if parameters is not None:
            mask_weight, mask_bias, value, bias = parameters
            checks.feature_map(x)
            checks.channels(x, mask_weight.shape[1], "as the parameters")
            context = attention_pool(x, mask_weight, mask_bias)
            # As a convolution, whose weight gets a gradient of its own strides.
            return broadcast_add(x, functional.conv2d(context[:, :, None, None], value, bias))
        if isinstance(x, Proxy) and (node := _graphs.node_of(self, x)) is not None:
            return node
        attention = self.conv_mask(x).flatten(2).softmax(2).transpose(1, 2)  # [N, S, 1]
        context = torch.matmul(x.flatten(2), attention)  # [N, C, 1]
        return x + self.conv_value(context.unsqueeze(-1))


def _read(look: Look, block: Any) -> Weights:
    mask = convolution(look, look.child(block, "conv_mask"), "conv_mask")
    value = convolution(look, look.child(block, "conv_value"), "conv_value")
    return Weights(((mask, "weight"), (mask, "bias"), (value, "weight"), (value, "bias")))
