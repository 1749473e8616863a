"""What the public functions demand of their tensors, in the caller's words: name, expected, got.

Most functions run their checks first, at the cost of a few attribute reads. The whole block takes up to 15
tensors: only :func:`unseen_by_the_operator` runs before it, and the other checks after an error, for the
words. What they reject the operator rejects by itself (csrc/ops, and gc_cuda/ops/fake.py for meta tensors);
tests of the errors hold it to that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gc_cuda import _extension, _group
from gc_cuda._values import epsilon, one_of
from gc_cuda.ops.operands import ACCUMULATION, ACTIVATIONS, GATES, Tensors, transform_of
from gc_cuda.reference import POOLING_TYPES, BatchNorm, Transform

if TYPE_CHECKING:
    from typing_extensions import TypeGuard  # typing has it from Python 3.10 on


def global_context(
    x: Tensor,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Transform | None,
    mul: Transform | None,
    pooling_type: str,
    activation: str,
    gate: str,
    eps: float,
) -> None:
    """Demand all that :func:`gc_cuda.global_context` does."""
    feature_map(x)
    pooling(pooling_type, mask_weight, mask_bias)
    parameters(x, mask_weight, mask_bias, add, mul)
    one_of(activation, "activation", ACTIVATIONS)
    one_of(gate, "gate", GATES)
    epsilon(eps)


def operands(
    x: Tensor, mask_weight: Tensor | None, mask_bias: Tensor | None, add: Tensors, mul: Tensors, eps: float
) -> None:
    """Demand what the operator of the whole block does, but for its numbers of activation and gate."""
    feature_map(x)
    parameters(x, mask_weight, mask_bias, transform_of(add), transform_of(mul))
    epsilon(eps)


def bn_context_add_relu(
    y: Tensor,
    identity: Tensor | None,
    norm: BatchNorm | None,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    add: Transform | None,
    mul: Transform | None,
    image_factor: Tensor | None,
    pooling_type: str,
    activation: str,
    gate: str,
    eps: float,
) -> None:
    """Demand all that :func:`gc_cuda.bn_context_add_relu` does."""
    feature_map(y, "y")
    if identity is not None:
        _identity(identity, y)
    if norm is not None:
        batch_norm(norm, y)
    one_of(pooling_type, "pooling_type", POOLING_TYPES)
    if add is not None or mul is not None:
        pooling(pooling_type, mask_weight, mask_bias)
        parameters(y, mask_weight, mask_bias, add, mul)
    else:
        for name, tensor in (("mask_weight", mask_weight), ("mask_bias", mask_bias)):
            if tensor is not None:
                raise ValueError(
                    f"{name} must be None without add and mul, which have no block, got {_described(tensor)}"
                )
    if image_factor is not None:
        _companion(image_factor, "image_factor", y, "y")
        _vector(image_factor, "image_factor", y.shape[0], "N of y")
        if image_factor.requires_grad:
            raise ValueError("image_factor must not require a gradient: detach() it")
    one_of(activation, "activation", ACTIVATIONS)
    one_of(gate, "gate", GATES)
    epsilon(eps)


def _identity(identity: Tensor, y: Tensor) -> None:
    if not isinstance(identity, Tensor):
        raise TypeError(f"identity must be a torch.Tensor or None, got {type(identity).__name__}")
    if identity.layout is not torch.strided or _is_nested(identity):
        raise TypeError("identity must be a dense (torch.strided) tensor")
    if not identity.dtype.is_floating_point:
        raise TypeError(f"identity must have a floating dtype, got {identity.dtype}")
    if identity.shape != y.shape:
        raise ValueError(f"identity must have shape {_shape(y)} like y, got {_shape(identity)}")
    if identity.device != y.device:
        raise ValueError(f"identity must be on {y.device} like y, got {identity.device}")


def batch_norm(norm: BatchNorm, y: Tensor) -> None:
    """Demand tensors of C elements, and statistics where they are not those of the batch."""
    if not isinstance(norm, (tuple, list)) or len(norm) != len(BatchNorm._fields):
        raise TypeError(f"norm must be a gc_cuda.BatchNorm or None, got {type(norm).__name__}")
    weight, bias, mean, var, training, momentum, eps, group = norm
    process_group(group)
    c = y.shape[1]
    for name, tensor in (("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)):
        if tensor is not None:
            _companion(tensor, f"norm.{name}", y, "y")
            _vector(tensor, f"norm.{name}", c, "C of y")
    if (mean is None) != (var is None):
        raise TypeError("norm.running_mean and norm.running_var must both be tensors or both None")
    if mean is None and not training:
        raise ValueError(
            "norm.running_mean and norm.running_var must be given unless norm.training, got None"
        )
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"norm.momentum must be a number, got {type(momentum).__name__}")
    epsilon(eps, "norm.eps")
    if training and not eps > 0:
        raise ValueError(f"norm.eps must be positive in training, got {eps}")
    n, _, h, w = y.shape
    if training and n * h * w == 1 and _group.exchanging(group, training) is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {_shape(y)}")


def process_group(group: object) -> None:
    """Demand a group of torch.distributed that this process is in, or None."""
    if group is None or _group.is_group(group):
        return
    name = type(group).__name__
    outside = " (of a group that this process is not in?)" if isinstance(group, int) else ""
    raise TypeError(f"norm.group must be a torch.distributed.ProcessGroup or None, got {name}{outside}")


def no_exchange(norm: BatchNorm | None) -> None:
    """Demand that the batch is that of this process alone, or that its statistics are given."""
    if not isinstance(norm, (tuple, list)) or len(norm) != len(BatchNorm._fields):
        return
    *_, training, _, _, group = norm
    process_group(group)
    if _group.exchanging(group, training) is not None:
        raise ValueError(
            f"norm.group must be None or of one process in torch.func's transforms, in forward-mode AD, for "
            f"subclasses of Tensor, and while a graph is exported or traced, got a group of {group.size()}"
        )


def unseen_by_the_operator(x: Tensor, mask_weight: Tensor | None, pooling_type: str, eps: float) -> None:
    """Demand what the operator of the whole block cannot: it is told no pooling type, would take a tensor of
    one element for eps, and may run for another kind of device on the CPU, by that device's fallback.
    """
    if not isinstance(x, Tensor) or not (x.is_cpu or x.is_cuda or x.is_meta):
        feature_map(x)
    if pooling_type != ("avg" if mask_weight is None else "att"):
        pooling(pooling_type, mask_weight, None)
    epsilon(eps)


def unseen_by_the_tail(
    y: Tensor,
    identity: Tensor | None,
    norm: BatchNorm | None,
    mask_weight: Tensor | None,
    mask_bias: Tensor | None,
    no_block: bool,
    image_factor: Tensor | None,
    pooling_type: str,
    eps: float,
) -> None:
    """Demand what the operator of the residual tail cannot, as :func:`unseen_by_the_operator`."""
    if not isinstance(y, Tensor) or not (y.is_cpu or y.is_cuda or y.is_meta):
        feature_map(y, "y")
    if identity is not None and (not isinstance(identity, Tensor) or identity.dtype != y.dtype):
        _identity(identity, y)
    if norm is not None:
        if not isinstance(norm, (tuple, list)) or len(norm) != len(BatchNorm._fields):
            batch_norm(norm, y)
        _, _, mean, var, training, momentum, norm_eps, group = norm
        epsilon(norm_eps, "norm.eps")
        odd_statistics = (mean is None) != (var is None) or (training and norm_eps == 0)
        if odd_statistics or group is not None or type(momentum) is not float:
            batch_norm(norm, y)
    if image_factor is not None and (not isinstance(image_factor, Tensor) or image_factor.requires_grad):
        raise ValueError  # bn_context_add_relu says what is wrong
    if no_block:
        one_of(pooling_type, "pooling_type", POOLING_TYPES)
    elif pooling_type != ("avg" if mask_weight is None else "att"):
        pooling(pooling_type, mask_weight, mask_bias)
    epsilon(eps)


def feature_map(x: Tensor, name: str = "x") -> None:
    """Demand a dense floating [N, C, H, W] with channels and pixels, on a device this build serves."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (torch.strided) tensor, got {x.layout}")
    if _is_nested(x):
        raise TypeError(f"{name} must be a dense (torch.strided) tensor, got a nested one")
    if x.dtype not in ACCUMULATION:
        raise TypeError(f"{name} must be torch.float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape [N, C, H, W], got {_shape(x)}")
    _, c, h, w = x.shape
    if c == 0 or h == 0 or w == 0:
        raise ValueError(f"{name} must have at least one channel and one pixel, got shape {_shape(x)}")
    if x.device.type != "cpu":
        _device(x, name)


def _device(x: Tensor, name: str) -> None:
    if x.device.type == "cuda":
        _extension.require_cuda()
    elif x.device.type != "meta":
        raise ValueError(f"{name} must be on a CPU or CUDA device, got {x.device}")


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


def channels(x: Tensor, count: int, meaning: str) -> None:
    """Demand that many channels of a feature map."""
    if x.shape[1] != count:
        raise ValueError(f"x must have {count} channels ({meaning}), got shape {_shape(x)}")


def _agreement(x: Tensor, mask_weight: Tensor | None, add: Transform | None, mul: Transform | None) -> None:
    """Demand of x the channels and the dtype of the parameters, where two or more of them agree on another:
    then x is the odd one out, and what is said of the first parameter would lead astray.

    What is wrong with a parameter by itself, or keeps them from being compared, is for the other checks.
    """
    said: dict[str, tuple[int, torch.dtype]] = {}
    if _is_plain(mask_weight):
        said["mask_weight"] = mask_weight.numel(), mask_weight.dtype
    for name, branch in (("add", add), ("mul", mul)):
        if isinstance(branch, (tuple, list)) and len(branch) == len(Transform._fields):
            w1, _, _, _, w2, b2 = branch
            if _is_plain(w1) and _is_plain(w2) and _is_plain(b2) and w1.dim() > 1 and w2.dim() > 0:
                said[f"{name}.w1"] = w1.shape[1], w1.dtype
                said[f"{name}.w2"] = w2.shape[0], w2.dtype
                said[f"{name}.b2"] = b2.numel(), b2.dtype
    if len(said) < 2:
        return
    (c, dtype), *others = said.values()
    arguments = " and ".join(dict.fromkeys(name.partition(".")[0] for name in said))
    if x.shape[1] != c and all(other == c for other, _ in others):
        channels(x, c, f"as {arguments}")
    if dtype not in (x.dtype, ACCUMULATION[x.dtype]) and all(other == dtype for _, other in others):
        raise TypeError(f"x must be {dtype} like {arguments}, got {x.dtype}")


def _is_plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return isinstance(tensor, Tensor) and tensor.layout is torch.strided and not _is_nested(tensor)


def pooling(pooling_type: str, weight: Tensor | None, bias: Tensor | None) -> None:
    """Demand a pooling that there is, and a mask for "att" alone."""
    one_of(pooling_type, "pooling_type", POOLING_TYPES)
    if pooling_type == "avg":
        for name, tensor in (("mask_weight", weight), ("mask_bias", bias)):
            if tensor is not None:
                raise ValueError(
                    f'{name} must be None for pooling_type "avg", which has no mask, got '
                    f'{_described(tensor)}; leave it out, or use pooling_type "att"'
                )
    elif weight is None:
        raise ValueError(
            'mask_weight must be given for pooling_type "att", got None; pass the C weights of the mask, or '
            'use pooling_type "avg"'
        )


def parameters(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Transform | None,
    mul: Transform | None,
) -> None:
    """Demand parameters of the whole block that fit the feature map."""
    _agreement(x, weight, add, mul)
    if weight is not None:
        mask_weight(weight, x)
    elif bias is not None:
        raise ValueError(f"mask_bias must be None without a mask_weight, got {_described(bias)}")
    if bias is not None:
        mask_bias(bias, x)
    if add is None and mul is None:
        raise ValueError("add or mul must be given, got None for both; pass a Transform for one of them")
    for name, branch in (("add", add), ("mul", mul)):
        if branch is not None:
            _transform(branch, name, x)


def _transform(branch: Transform, name: str, x: Tensor) -> None:
    """Demand six tensors, or None for those of the norm: P from b1, C from x."""
    if not isinstance(branch, (tuple, list)):
        raise TypeError(f"{name} must be a gc_cuda.Transform or None, got {type(branch).__name__}")
    if len(branch) != len(Transform._fields):
        raise TypeError(
            f"{name} must have the tensors {', '.join(Transform._fields)}, got {len(branch)} of them"
        )
    w1, b1, norm_weight, norm_bias, w2, b2 = branch
    if (norm_weight is None) != (norm_bias is None):
        raise TypeError(
            f"{name}.norm_weight and {name}.norm_bias must both be tensors or both None (no layer norm), got "
            f"{type(norm_weight).__name__} and {type(norm_bias).__name__}"
        )
    for tensor, field in zip(branch, Transform._fields):
        if tensor is not None or field not in ("norm_weight", "norm_bias"):
            _companion(tensor, f"{name}.{field}", x)
    c, p = x.shape[1], b1.numel()
    if p == 0:
        raise ValueError(f"{name}.b1 must have at least one element (a hidden unit), got shape {_shape(b1)}")
    _matrix(w1, f"{name}.w1", p, c, "P of b1, C of x")
    _matrix(w2, f"{name}.w2", c, p, "C of x, P of b1")
    if norm_weight is not None and norm_bias is not None:
        _vector(norm_weight, f"{name}.norm_weight", p, "P of b1")
        _vector(norm_bias, f"{name}.norm_bias", p, "P of b1")
    _vector(b2, f"{name}.b2", c, "C of x")


def _matrix(tensor: Tensor, name: str, rows: int, columns: int, meaning: str) -> None:
    if tensor.shape[:2] != (rows, columns) or tensor.numel() != rows * columns:
        raise ValueError(
            f"{name} must have shape {[rows, columns]} ({meaning}) or {[rows, columns, 1, 1]}, "
            f"got {_shape(tensor)}"
        )


def _vector(tensor: Tensor, name: str, count: int, meaning: str) -> None:
    if tensor.numel() != count:
        raise ValueError(f"{name} must have {count} elements ({meaning}), got shape {_shape(tensor)}")


def _companion(tensor: Tensor | None, name: str, x: Tensor, of: str = "x") -> None:
    """Demand a dense tensor on x's device, in x's dtype or that of its sums. of: the name of x."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (torch.strided) tensor, got {tensor.layout}")
    if _is_nested(tensor):
        raise TypeError(f"{name} must be a dense (torch.strided) tensor, got a nested one")
    if not fits(tensor, x):
        wide = ACCUMULATION[x.dtype]
        also = "" if wide == x.dtype else f", or {wide}"
        raise TypeError(f"{name} must be {x.dtype} like {of}{also}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like {of}, got {tensor.device}")


def _is_nested(tensor: Tensor) -> bool:
    """Of the old kind, which says that it is strided and has no sizes. Compilers do not trace it."""
    return not torch.compiler.is_compiling() and tensor.is_nested


def fits(tensor: Tensor, x: Tensor) -> bool:
    """Whether the dtype of ``tensor`` may travel with ``x``."""
    return tensor.dtype == x.dtype or tensor.dtype == ACCUMULATION.get(x.dtype)


def _described(value: object) -> str:
    return f"shape {_shape(value)}" if isinstance(value, Tensor) else type(value).__name__


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
