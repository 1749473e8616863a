"""The definition of what is right: the global context block in plain PyTorch.

These are the operations that eager PyTorch runs for mmcv's ``ContextBlock`` (a 1x1 convolution, a softmax
over the pixels, a matrix product, two broadcasts), with the signatures of the fused ones. They work in every
floating dtype, on every device and with every stride, they can be differentiated twice, and they are the
eager peer of the benchmark.

Where a companion of ``x`` (``logits``, ``mask_weight``, ``scale``, ``term``) has a wider dtype, the result is
computed in that dtype and rounded to that of ``x`` at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning, is_tracing
from torch.nn import functional

from gc_cuda import _group, _values

POOLING_TYPES = ("avg", "att")
FUSION_TYPES = ("channel_add", "channel_mul")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": functional.hardsigmoid,
}


class Transform(NamedTuple):
    """The parameters of t(context) = W2 act(LN(W1 context + b1)) + b2 with P hidden units.

    norm_weight and norm_bias both None: there is no layer norm, t(context) = W2 act(W1 context + b1) + b2.
    Trailing dimensions of size 1 do not matter: the weights of 1x1 convolutions and of a layer norm over
    [P, 1, 1] fit as they are.
    """

    w1: Tensor  # [P, C]
    b1: Tensor  # [P]
    norm_weight: Tensor | None  # [P]
    norm_bias: Tensor | None  # [P]
    w2: Tensor  # [C, P]
    b2: Tensor  # [C]


class BatchNorm(NamedTuple):
    """Batch normalization of y [N, C, H, W]: weight * (y - mean) / sqrt(var + eps) + bias for each channel.

    training: mean and (biased) variance are those of the batch, and running_mean and running_var (unbiased)
    move towards them, in place: running = (1 - momentum) * running + momentum * of_batch. Else they are
    running_mean and running_var.
    """

    weight: Tensor | None = None  # [C]; None: 1
    bias: Tensor | None = None  # [C]; None: 0
    running_mean: Tensor | None = None  # [C]; both may be None in training
    running_var: Tensor | None = None  # [C]
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    group: Any = None  # a torch.distributed.ProcessGroup, whose batches count as one; None: this process's


def softmax_pool(x: Tensor, logits: Tensor) -> Tensor:
    """context[n, c] = sum_s softmax(logits[n])[s] * x[n, c, s].

    Args:
        x: [N, C, H, W].
        logits: [N, H*W] or [N, 1, H, W].

    Returns:
        [N, C] in the dtype of ``x``.
    """
    n, c, h, w = x.shape
    dtype = _promoted(x.dtype, logits.dtype)
    attention = functional.softmax(logits.to(dtype).reshape(n, 1, h * w), dim=2).unsqueeze(-1)  # [N, 1, S, 1]
    pixels = x.to(dtype).reshape(n, c, h * w).unsqueeze(1)  # [N, 1, C, S]
    return torch.matmul(pixels, attention).reshape(n, c).to(x.dtype)


def attention_pool(x: Tensor, mask_weight: Tensor, mask_bias: Tensor | None = None) -> Tensor:
    """:func:`softmax_pool` with logits[n, s] = sum_c mask_weight[c] * x[n, c, s] + mask_bias.

    Args:
        x: [N, C, H, W].
        mask_weight: C elements, as in [C] or [1, C, 1, 1].
        mask_bias: one element, or None.

    Returns:
        [N, C] in the dtype of ``x``.
    """
    c = x.shape[1]
    dtype = _promoted(x.dtype, mask_weight.dtype)
    bias = None if mask_bias is None else mask_bias.to(dtype).reshape(1)
    logits = functional.conv2d(x.to(dtype), mask_weight.to(dtype).reshape(1, c, 1, 1), bias)
    return softmax_pool(x, logits)


def average_pool(x: Tensor) -> Tensor:
    """context[n, c] = mean of x[n, c] over the pixels; [N, C, H, W] -> [N, C]."""
    return functional.adaptive_avg_pool2d(x, 1).flatten(1)


def broadcast_add(x: Tensor, term: Tensor) -> Tensor:
    """out[n, c, s] = x[n, c, s] + term[n, c]; ``term`` is [N, C] or [N, C, 1, 1]."""
    return (x + _per_channel(term)).to(x.dtype)


def broadcast_mul(x: Tensor, scale: Tensor) -> Tensor:
    """out[n, c, s] = x[n, c, s] * scale[n, c]; ``scale`` is [N, C] or [N, C, 1, 1]."""
    return (x * _per_channel(scale)).to(x.dtype)


def broadcast_mul_add(x: Tensor, scale: Tensor, term: Tensor) -> Tensor:
    """out[n, c, s] = x[n, c, s] * scale[n, c] + term[n, c]; both are [N, C] or [N, C, 1, 1]."""
    return (x * _per_channel(scale) + _per_channel(term)).to(x.dtype)


def _per_channel(tensor: Tensor) -> Tensor:
    return tensor.reshape(*tensor.shape[:2], 1, 1)


def transform(context: Tensor, branch: Transform, eps: float = 1e-5, activation: str = "relu") -> Tensor:
    """t = W2 act(LN(W1 context + b1)) + b2: [N, C] -> [N, C], in the widest dtype of the arguments.

    Without norm_weight and norm_bias there is no LN.
    """
    dtype = _widest((context, *branch))
    w1, b1, norm_weight, norm_bias, w2, b2 = (None if t is None else t.to(dtype) for t in branch)
    assert w1 is not None and b1 is not None and w2 is not None and b2 is not None
    hidden = functional.linear(context.to(dtype), w1.flatten(1), b1.flatten())
    if norm_weight is not None and norm_bias is not None:
        norm_weight, norm_bias = norm_weight.flatten(), norm_bias.flatten()
        hidden = functional.layer_norm(hidden, (_count(b1),), norm_weight, norm_bias, eps)
    return functional.linear(ACTIVATIONS[activation](hidden), w2.flatten(1), b2.flatten())


def global_context(
    x: Tensor,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    add: Transform | None = None,
    mul: Transform | None = None,
    *,
    pooling_type: str = "att",
    activation: str = "relu",
    gate: str = "sigmoid",
    eps: float = 1e-5,
) -> Tensor:
    """out = x * gate(t_mul(context)) if ``mul``, then + t_add(context) if ``add``.

    context = attention_pool(x, mask_weight, mask_bias), or average_pool(x) for pooling_type "avg"; for t see
    :func:`transform`.

    Args:
        x: [N, C, H, W].
        mask_weight: C elements; None for "avg".
        mask_bias: one element, or None.
        add: the parameters of t_add, or None.
        mul: the parameters of t_mul, or None.
        pooling_type: "att" or "avg".
        activation: of the transforms, one of ``ACTIVATIONS``.
        gate: one of ``GATES``.
        eps: of the layer norms.

    Returns:
        [N, C, H, W] in the dtype of ``x``.
    """
    out = x.to(_widest((x, mask_weight, mask_bias, *(add or ()), *(mul or ()))))
    if pooling_type == "att":
        assert mask_weight is not None, 'pooling_type "att" needs a mask_weight'
        context = attention_pool(out, mask_weight, mask_bias)
    else:
        context = average_pool(out)
    if mul is not None:
        out = broadcast_mul(out, GATES[gate](transform(context, mul, eps, activation)))
    if add is not None:
        out = broadcast_add(out, transform(context, add, eps, activation))
    return out.to(x.dtype)


def bn_context_add_relu(
    y: Tensor,
    identity: Tensor | None = None,
    norm: BatchNorm | None = None,
    mask_weight: Tensor | None = None,
    mask_bias: Tensor | None = None,
    add: Transform | None = None,
    mul: Transform | None = None,
    *,
    image_factor: Tensor | None = None,
    relu: bool = True,
    pooling_type: str = "att",
    activation: str = "relu",
    gate: str = "sigmoid",
    eps: float = 1e-5,
) -> Tensor:
    """out = relu(global_context(batch_norm(y)) + identity), as the end of a ResNet's bottleneck computes it.

    Without ``norm`` there is no batch normalization, without ``add`` and ``mul`` no global context block,
    without ``identity`` no addition, and without ``relu`` no ReLU.

    Args:
        y: [N, C, H, W].
        identity: like y, in any dtype, or None.
        norm: a BatchNorm, or None. Its running_mean and running_var are changed in training.
        mask_weight: see :func:`global_context`, as for the other arguments.
        mask_bias: one element, or None.
        add: the parameters of t_add, or None.
        mul: the parameters of t_mul, or None.
        image_factor: N elements, by which the block's output is multiplied for each image, or None.
        relu: whether a ReLU ends it.
        pooling_type: "att" or "avg"; of no meaning without a block.
        activation: of the transforms, one of ``ACTIVATIONS``.
        gate: one of ``GATES``.
        eps: of the layer norms.

    Returns:
        [N, C, H, W] in the dtype of ``y``.
    """
    out = y
    if norm is not None:
        weight, bias, mean, var, training, momentum, norm_eps, group = norm
        group = _group.exchanging(group, training)
        if group is None:
            out = functional.batch_norm(y, mean, var, weight, bias, training, momentum, norm_eps)
        else:
            out = _group.batch_norm(y, mean, var, weight, bias, momentum, norm_eps, group)
    if add is not None or mul is not None:
        options: Any = {"pooling_type": pooling_type, "activation": activation, "gate": gate, "eps": eps}
        out = global_context(out, mask_weight, mask_bias, add, mul, **options)
    if image_factor is not None:
        out = (out * image_factor.detach().reshape(-1, 1, 1, 1)).to(y.dtype)
    if identity is not None:
        out = (out + identity).to(y.dtype)
    return functional.relu(out) if relu else out


def _widest(tensors: Iterable[Tensor | None]) -> torch.dtype:
    return reduce(_promoted, (tensor.dtype for tensor in tensors if tensor is not None))


def _promoted(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """torch.promote_types, which torch.export would write into the graph as an operator."""
    return one if one == other else torch.promote_types(one, other)


def _count(parameter: Tensor) -> int:
    """How many elements it has: a plain number in a recorded trace, too, where ONNX demands one."""
    if not is_tracing():
        return parameter.numel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TracerWarning)
        return int(parameter.numel())


class ContextBlock(nn.Module):
    """GCNet's context block (https://arxiv.org/abs/1904.11492) with mmcv's parameters, in eager PyTorch.

    context = attention_pool(x) or average_pool(x); t(context) = W2 ReLU(LN(W1 context + b1)) + b2 with
    int(in_channels * ratio) hidden units; out = x * sigmoid(t_mul(context)) for "channel_mul", then out +
    t_add(context) for "channel_add". A new block is the identity (times one half for "channel_mul", as in
    mmcv): the last convolution of each branch starts at zero.

    Args:
        in_channels: C, the channels of the feature map.
        ratio: hidden units per channel.
        pooling_type: "att" or "avg".
        fusion_types: a list or tuple of "channel_add" and "channel_mul", at least one.
        eps: of the layer norms.

    Raises:
        AssertionError: for an unknown pooling or fusion, or fusion types that are not a list or tuple.
        ValueError: when no hidden unit is left, or for a number out of range.
        TypeError: for in_channels that are not an integer, or a ratio or eps that is not a number.
    """

    _abbr_ = "context_block"  # the attribute name under which mmdetection's backbones hold the block

    conv_mask: nn.Conv2d | None
    softmax: nn.Softmax  # with pooling_type "att"
    avg_pool: nn.AdaptiveAvgPool2d  # with pooling_type "avg"
    channel_add_conv: nn.Sequential | None
    channel_mul_conv: nn.Sequential | None

    def __init__(
        self,
        in_channels: int,
        ratio: float,
        pooling_type: str = "att",
        fusion_types: Sequence[str] = ("channel_add",),
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _check_block_arguments(in_channels, ratio, pooling_type, fusion_types, eps)
        self.in_channels = in_channels
        self.ratio = ratio
        self.planes = int(in_channels * ratio)
        self.pooling_type = pooling_type
        self.fusion_types = fusion_types
        self.eps = eps
        # The order of construction is mmcv's, so that one random seed gives both the same parameters.
        self.conv_mask = nn.Conv2d(in_channels, 1, kernel_size=1) if pooling_type == "att" else None
        self._add_pooling()
        self.channel_add_conv = self._new_transform() if "channel_add" in fusion_types else None
        self.channel_mul_conv = self._new_transform() if "channel_mul" in fusion_types else None
        self.reset_parameters()

    def _add_pooling(self) -> None:
        """The parts without parameters, under mmcv's names: a hook on ``softmax`` gets the attention."""
        if self.conv_mask is not None:
            self.softmax = nn.Softmax(dim=2)
        else:
            self.avg_pool = nn.AdaptiveAvgPool2d(1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "softmax" not in self._modules and "avg_pool" not in self._modules:
            self._add_pooling()  # pickled by gc_cuda 0.1.0, which had no such parts

    def _new_transform(self) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(self.in_channels, self.planes, kernel_size=1),
            nn.LayerNorm([self.planes, 1, 1], eps=self.eps),
            nn.ReLU(inplace=True),
            nn.Conv2d(self.planes, self.in_channels, kernel_size=1),
        )

    def reset_parameters(self) -> None:
        """mmcv's initialisation: Kaiming-normal mask convolution without bias, last convolutions zero."""
        if self.conv_mask is not None:
            nn.init.kaiming_normal_(self.conv_mask.weight, a=0, mode="fan_in", nonlinearity="relu")
            _zero(self.conv_mask.bias)
        for transform in (self.channel_add_conv, self.channel_mul_conv):
            if transform is not None:
                last = transform[-1]
                assert isinstance(last, nn.Conv2d)
                _zero(last.weight)
                _zero(last.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, ratio={self.ratio:g}, pooling_type={self.pooling_type!r}, "
            f"fusion_types={tuple(self.fusion_types)!r}, eps={self.eps:g}"
        )

    def spatial_pool(self, x: Tensor) -> Tensor:
        """The context: [N, C, H, W] -> [N, C, 1, 1]."""
        if self.conv_mask is None:
            return self.avg_pool(x)
        attention = self.softmax(self.conv_mask(x).flatten(2)).unsqueeze(-1)  # [N, 1, S, 1]
        context = torch.matmul(x.flatten(2).unsqueeze(1), attention)  # [N, 1, C, 1]
        return context.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape and dtype."""
        context = self.spatial_pool(x)
        out = x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out


def _zero(parameter: Tensor | None) -> None:
    if parameter is not None:
        nn.init.zeros_(parameter)


def _check_block_arguments(
    in_channels: int, ratio: float, pooling_type: str, fusion_types: Sequence[str], eps: float
) -> None:
    # Raised by hand: mmcv's callers expect AssertionError, and `python -O` would drop an assert.
    if not _values.is_one_of(pooling_type, POOLING_TYPES):
        raise AssertionError(f"pooling_type must be one of {POOLING_TYPES}, got {pooling_type!r}")
    if not isinstance(fusion_types, (list, tuple)):
        raise AssertionError(
            f"fusion_types must be a list or tuple of {FUSION_TYPES}, "
            f"got {type(fusion_types).__name__} {fusion_types!r}"
        )
    if not fusion_types:
        raise AssertionError(f"fusion_types must name at least one of {FUSION_TYPES}, got {fusion_types!r}")
    unknown = [fusion for fusion in fusion_types if not _values.is_one_of(fusion, FUSION_TYPES)]
    if unknown:
        raise AssertionError(f"fusion_types must be among {FUSION_TYPES}, got {unknown[0]!r}")
    _values.count(in_channels, "in_channels")
    _values.ratio(ratio)
    _values.epsilon(eps)
    _values.ratio(in_channels * ratio, "in_channels * ratio")
    hidden = int(in_channels * ratio)
    if hidden < 1:
        raise ValueError(
            f"ratio must leave at least one hidden unit: int(in_channels * ratio) is {hidden} "
            f"for in_channels {in_channels} and ratio {ratio}"
        )
    _values.count(hidden, "int(in_channels * ratio)")
