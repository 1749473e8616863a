"""What the public functions demand of their arguments, in the caller's words: name, expected, got.

A valid call costs a few attribute reads; the messages are put together only when they are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gc_cuda import _extension

# The type in which sums over x are kept; the tensors that travel with x may have it too.
_ACCUMULATION = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}


def feature_map(x: Tensor) -> None:
    """Demand a dense floating [N, C, H, W] with channels and pixels, on a device this build serves."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"x must be a dense (torch.strided) tensor, got {x.layout}")
    if x.dtype not in _ACCUMULATION:
        raise TypeError(f"x must be torch.float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x must have shape [N, C, H, W], got {_shape(x)}")
    _, c, h, w = x.shape
    if c == 0 or h == 0 or w == 0:
        raise ValueError(f"x must have at least one channel and one pixel, got shape {_shape(x)}")
    if x.device.type != "cpu":
        _device(x)


def _device(x: Tensor) -> None:
    if x.device.type == "cuda":
        _extension.require_cuda()
    elif x.device.type != "meta":
        raise ValueError(f"x must be on a CPU or CUDA device, got {x.device}")


def logits(tensor: Tensor, x: Tensor) -> None:
    """Demand [N, H*W] or [N, 1, H, W]."""
    _companion(tensor, "logits", x)
    n, _, h, w = x.shape
    if tensor.shape != (n, h * w) and tensor.shape != (n, 1, h, w):
        raise ValueError(
            f"logits must have shape {[n, h * w]} or {[n, 1, h, w]} (N, H and W of x), got {_shape(tensor)}"
        )


def mask_weight(tensor: Tensor, x: Tensor) -> None:
    """Demand C elements, in any shape."""
    _companion(tensor, "mask_weight", x)
    c = x.shape[1]
    if tensor.numel() != c:
        raise ValueError(
            f"mask_weight must have {c} elements (C of x), as in {[c]} or {[1, c, 1, 1]}, "
            f"got shape {_shape(tensor)}"
        )


def mask_bias(tensor: Tensor, x: Tensor) -> None:
    """Demand one element."""
    _companion(tensor, "mask_bias", x)
    if tensor.numel() != 1:
        raise ValueError(f"mask_bias must have 1 element, got shape {_shape(tensor)}")


def per_channel(tensor: Tensor, name: str, x: Tensor) -> None:
    """Demand [N, C] or [N, C, 1, 1]."""
    _companion(tensor, name, x)
    n, c = x.shape[:2]
    if tensor.shape != (n, c) and tensor.shape != (n, c, 1, 1):
        raise ValueError(
            f"{name} must have shape {[n, c]} or {[n, c, 1, 1]} (N and C of x), got {_shape(tensor)}"
        )


def _companion(tensor: Tensor, name: str, x: Tensor) -> None:
    """Demand a dense tensor on x's device, in x's dtype or that of its sums."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (torch.strided) tensor, got {tensor.layout}")
    if tensor.dtype != x.dtype and tensor.dtype != _ACCUMULATION[x.dtype]:
        wide = _ACCUMULATION[x.dtype]
        also = "" if wide == x.dtype else f", or {wide}"
        raise TypeError(f"{name} must be {x.dtype} like x{also}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")


def fits(tensor: Tensor, x: Tensor) -> bool:
    """Whether the dtype of ``tensor`` may travel with ``x``."""
    return tensor.dtype == x.dtype or tensor.dtype == _ACCUMULATION.get(x.dtype)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
