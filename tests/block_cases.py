"""What the tests of gc_cuda.global_context share: its configurations, inputs by name, and the scale of each
result's error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gc_cuda
from gc_cuda import Transform


class Configuration(NamedTuple):
    """A pooling and the branches that are there."""

    pooling_type: str
    branches: tuple[str, ...]

    def __str__(self) -> str:
        return "+".join((self.pooling_type, *self.branches))


CONFIGURATIONS = [
    Configuration(pooling_type, branches)
    for pooling_type in ("att", "avg")
    for branches in (("add",), ("mul",), ("add", "mul"))
]
WHOLE = Configuration("att", ("add", "mul"))
SQUEEZE_EXCITE = Configuration("avg", ("mul",))


# Each with other arguments that depend on x
FUNCTIONS = {
    "softmax_pool": lambda x: gc_cuda.softmax_pool(x, x.mean(1, keepdim=True)),
    "attention_pool": lambda x: gc_cuda.attention_pool(x, x.mean((0, 2, 3)), x.mean().reshape(1)),
    "average_pool": gc_cuda.average_pool,
    "broadcast_add": lambda x: gc_cuda.broadcast_add(x, x.amax((2, 3))),
    "broadcast_mul": lambda x: gc_cuda.broadcast_mul(x, x.amax((2, 3))),
    "broadcast_mul_add": lambda x: gc_cuda.broadcast_mul_add(x, x.amax((2, 3)), x.amin((2, 3))),
}


def hidden_units(branch: str, channels: int) -> int:
    """P: another for each branch, odd while C is small, and never so few that the layer norm degenerates."""
    return max(7, channels // 16) if branch == "add" else max(5, channels // 32)


def draw_inputs(
    random: Callable[..., Tensor],
    configuration: Configuration,
    size: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layout: torch.memory_format = torch.contiguous_format,
) -> dict[str, Tensor]:
    """Every tensor of a call by its name, as in "x" and "add.w1"; each step of the block is of order one."""
    c = size[1]
    inputs = {"x": random(*size, device=device, layout=layout)}
    if configuration.pooling_type == "att":
        # logits that spread over a few units: neither a flat nor a one-hot softmax
        inputs |= {"mask_weight": random(1, c, 1, 1, device=device) * 2 / c**0.5, "mask_bias": random(1)}
    for branch in configuration.branches:
        p = hidden_units(branch, c)
        six = Transform(
            random(p, c, 1, 1) / c**0.5,
            random(p),
            1 + random(p, 1, 1) / 2,
            random(p, 1, 1) / 2,
            random(c, p, 1, 1) / p**0.5,
            random(c),
        )
        inputs |= {f"{branch}.{name}": tensor for name, tensor in six._asdict().items()}
    return {
        name: tensor.to(device, dtype if name == "x" else parameters or dtype)
        for name, tensor in inputs.items()
    }


def without_norm(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if "norm" not in name}


def function_of(
    library: ModuleType, configuration: Configuration, names: Iterable[str], **options: Any
) -> Callable[..., Tensor]:
    """library.global_context as a function of tensors in the order of ``names``; what is missing is None."""
    names = list(names)

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors))
        branches = {
            branch: Transform(*(given.get(f"{branch}.{name}") for name in Transform._fields))
            for branch in configuration.branches
        }
        return library.global_context(
            given["x"],
            given.get("mask_weight"),
            given.get("mask_bias"),
            **branches,
            pooling_type=configuration.pooling_type,
            **options,
        )

    return call


def every_function(
    random: Callable[..., Tensor],
    device: torch.device | str,
    size: tuple[int, int, int, int] = (2, 24, 9, 11),
) -> list[Callable[[], list[Tensor]]]:
    """Calls forward and backward, one for each function and configuration, with inputs of their own."""
    n, c, h, w = size
    x, grad = (random(*size, dtype=torch.float32, device=device) for _ in range(2))
    scale, weight, logits = (
        random(*shape, dtype=torch.float32, device=device) for shape in ((n, c), (c,), (n, h * w))
    )
    bias = torch.zeros(1, device=device)
    calls = [
        (gc_cuda.softmax_pool, (x, logits)),
        (gc_cuda.attention_pool, (x, weight, bias)),
        (gc_cuda.average_pool, (x,)),
        (gc_cuda.broadcast_add, (x, scale)),
        (gc_cuda.broadcast_mul, (x, scale)),
        (gc_cuda.broadcast_mul_add, (x, scale, scale)),
    ]
    for configuration in CONFIGURATIONS:
        inputs = draw_inputs(random, configuration, size, dtype=torch.float32, device=device)
        calls.append((function_of(gc_cuda, configuration, inputs), tuple(inputs.values())))

    def bound(function, tensors):
        def run():
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            out = function(*leaves)
            like_out = grad[:, :, 0, 0] if out.dim() == 2 else grad
            return [out.detach(), *torch.autograd.grad(out, leaves, like_out)]

        return run

    return [bound(*call) for call in calls]


def error_scales(
    inputs: Mapping[str, Tensor], grad: Tensor, eps: float = 1e-5
) -> tuple[Tensor, dict[str, Tensor]]:
    """The error of the output and of each gradient that one relative rounding in every sum could make.

    A sum has that of its terms' absolute values, a product is as wrong as its factors, and what depends on an
    earlier result inherits its error, through the division by the deviation as well: that is the first-order
    error analysis of the formulas in global_context and their derivatives. ``of_q`` is the scale of q.
    """
    inputs = {name: tensor.detach().double().cpu() for name, tensor in inputs.items()}
    pixels, grad = inputs["x"].flatten(2), grad.detach().double().cpu().flatten(2)
    n, _, s = pixels.shape
    mask = inputs["mask_weight"].flatten() if "mask_weight" in inputs else None
    if mask is None:
        attention = torch.full((n, s), 1 / s, dtype=torch.float64)
    else:
        attention = torch.einsum("ncs,c->ns", pixels, mask).softmax(1)
    context = torch.einsum("ncs,ns->nc", pixels, attention)
    of_context = torch.einsum("ncs,ns->nc", pixels.abs(), attention)

    def grad_term(t: Tensor, of_t: Tensor) -> tuple[Tensor, Tensor]:
        return grad.sum(2), grad.abs().sum(2)

    def grad_gate(t: Tensor, of_t: Tensor) -> tuple[Tensor, Tensor]:
        slope = t.sigmoid() * (1 - t.sigmoid())
        dt = (grad * pixels).sum(2) * slope
        return dt, (grad * pixels).abs().sum(2) * slope + dt.abs() * of_t

    of_term, of_scale = torch.zeros_like(context), torch.ones_like(context)
    of_grad_context, of_gradients = torch.zeros_like(context), {}
    for branch, output_gradient in (("add", grad_term), ("mul", grad_gate)):
        if f"{branch}.w1" not in inputs:
            continue
        six = Transform(*(inputs[f"{branch}.{name}"] for name in Transform._fields))
        t, of_t, of_share, of_six = _transform_scales(six, context, of_context, output_gradient, eps)
        of_grad_context = of_grad_context + of_share
        of_gradients |= {f"{branch}.{name}": of_one for name, of_one in of_six._asdict().items()}
        if branch == "add":
            of_term = of_t
        else:
            of_scale = t.sigmoid() + t.sigmoid() * (1 - t.sigmoid()) * of_t

    of_out = pixels.abs() * of_scale[:, :, None] + of_term[:, :, None]
    of_grad_x = grad.abs() * of_scale[:, :, None] + attention[:, None] * of_grad_context[:, :, None]
    if mask is not None:
        products = torch.einsum("nc,ncs->ns", of_grad_context, pixels.abs())
        of_logits = attention * (products + (of_grad_context * of_context).sum(1, keepdim=True))
        of_grad_x = of_grad_x + of_logits[:, None] * mask.abs()[:, None]
        of_gradients["mask_weight"] = torch.einsum("ns,ncs->c", of_logits, pixels.abs())
    of_gradients["x"] = of_grad_x
    return of_out.view(inputs["x"].shape), {
        name: of_one.reshape(inputs[name].shape) for name, of_one in of_gradients.items()
    }


def _transform_scales(
    six: Transform,
    context: Tensor,
    of_context: Tensor,
    output_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Transform]:
    """t, the scales of its error and of the gradient of the context, and those of the parameters' gradients.

    ``output_gradient`` gives the gradient of t and its scale.
    """
    w1, w2 = six.w1.flatten(1), six.w2.flatten(1)
    b1, norm_weight, norm_bias, b2 = (
        tensor.flatten() for tensor in (six.b1, six.norm_weight, six.norm_bias, six.b2)
    )

    def mean(tensor: Tensor) -> Tensor:
        return tensor.mean(1, keepdim=True)

    h, of_h = context @ w1.T + b1, of_context @ w1.T.abs() + b1.abs()
    inverse = 1 / (mean((h - mean(h)).square()) + eps).sqrt()
    normalized = (h - mean(h)) * inverse
    of_centred = (of_h + mean(of_h)) * inverse
    of_inverse = mean(normalized.abs() * of_centred)  # relative
    of_normalized = of_centred + normalized.abs() * of_inverse
    y = (normalized * norm_weight + norm_bias).relu()
    active = (y > 0).double()
    of_y = active * (of_normalized * norm_weight.abs() + norm_bias.abs())
    t, of_t = y @ w2.T + b2, of_y @ w2.T.abs() + b2.abs()

    dt, of_dt = output_gradient(t, of_t)
    dy, of_dy = active * (dt @ w2), active * (of_dt @ w2.abs())
    dn, of_dn = dy * norm_weight, of_dy * norm_weight.abs()
    along, of_along = mean(dn * normalized), mean(of_dn * normalized.abs() + dn.abs() * of_normalized)
    dh = inverse * (dn - mean(dn) - normalized * along)
    of_dh = inverse * (of_dn + mean(of_dn) + normalized.abs() * of_along + of_normalized * along.abs())
    of_dh = of_dh + dh.abs() * of_inverse
    of_six = Transform(
        of_dh.T @ context.abs() + dh.abs().T @ of_context,
        of_dh.sum(0),
        (of_dy * normalized.abs() + dy.abs() * of_normalized).sum(0),
        of_dy.sum(0),
        of_dt.T @ y + dt.abs().T @ of_y,
        of_dt.sum(0),
    )
    return t, of_t, of_dh @ w1.abs(), of_six


class OperatorCall(NamedTuple):
    """An operator that ran."""

    name: str
    arguments: tuple[Any, ...]
    result: Any


class Spy(TorchDispatchMode):
    """Within it, ``calls`` gathers every operator that runs, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OperatorCall] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append(OperatorCall(operator.name().partition(".")[0], args, result))
        return result

    def names(self) -> list[str]:
        """Of the operators that touch numbers, sorted; autograd's detached views cost nothing."""
        return sorted(call.name for call in self.calls if call.name != "aten::detach")
