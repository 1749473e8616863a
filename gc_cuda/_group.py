"""Batches that are spread over the processes of a torch.distributed group, and their normalization."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def is_group(value: Any) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def exchanging(group: Any, training: bool) -> Any:
    """The group whose processes exchange statistics; None without another process, or with given ones."""
    return group if training and group is not None and group.size() > 1 else None


class _Sum(Function):
    """Of all processes' tensors. Its gradient is the sum of all processes' gradients, and so on."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(grad, ctx.group), None


def batch_norm(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """torch.nn.functional.batch_norm in training, with mean and variance of all processes' y.

    It is the definition: two exchanges forward, two backward, and derivatives of every order. y may have no
    image. The gradients of weight and bias are those of this process's out.
    """
    n, c, h, w = y.shape
    over = 0, 2, 3
    x = y if y.dtype == torch.float64 else y.float()
    here = torch.full((1,), n * h * w, dtype=torch.float64, device=y.device)
    total = _Sum.apply(torch.cat([x.sum(over, dtype=torch.float64), here]), group)
    count = total[c:].detach()
    if count.is_cpu and count.item() == 1:  # a number on another device would be waited for
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 in all processes of the group"
        )
    mean = total[:c] / count.clamp(min=1)
    centred = x - _spread(mean.to(x.dtype))
    squares = _Sum.apply(centred.square().sum(over, dtype=torch.float64), group)
    slope = (squares / count.clamp(min=1) + eps).rsqrt().to(x.dtype)
    slope = slope if weight is None else slope * weight.to(x.dtype)
    out = centred * _spread(slope)
    out = out if bias is None else out + _spread(bias.to(x.dtype))
    with torch.no_grad():
        for running, of_batch in ((running_mean, mean), (running_var, squares / (count - 1))):
            if running is not None:
                moved = momentum * of_batch + (1 - momentum) * running
                running.copy_(torch.where(count > 0, moved, running.double()))
    return out.to(y.dtype)


def _spread(vector: Tensor) -> Tensor:
    return vector[:, None, None]
