"""What the tests of gc_cuda.global_context share: its configurations, inputs by name, and how large an error of
each result is in proportion to one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

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


def hidden_units(branch: str, channels: int) -> int:
    """P: another for each branch, odd while C is small, and never so few that the layer norm degenerates."""
    return max(7, channels // 4) if branch == "add" else max(5, channels // 16)


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
    x, *small = (
        tensor.to(device, dtype if i == 0 else parameters or dtype)
        for i, tensor in enumerate(inputs.values())
    )
    return dict(zip(inputs, (x, *small)))


def function_of(
    library: ModuleType, configuration: Configuration, names: Iterable[str]
) -> Callable[..., Tensor]:
    """library.global_context as a function of tensors in the order of ``names``."""
    names = list(names)

    def call(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors))
        branches = {
            branch: Transform(*(given[f"{branch}.{name}"] for name in Transform._fields))
            for branch in configuration.branches
        }
        return library.global_context(
            given["x"],
            given.get("mask_weight"),
            given.get("mask_bias"),
            **branches,
            pooling_type=configuration.pooling_type,
        )

    return call


def error_scales(
    inputs: Mapping[str, Tensor], grad: Tensor, eps: float = 1e-5
) -> tuple[Tensor, dict[str, Tensor]]:
    """The error of the output and of each gradient that one relative rounding in every sum could make.

    A sum has that of its terms' absolute values, a product is as wrong as its factors, and what depends on an
    earlier result inherits its error, through the division by the deviation as well: that is first-order error
    analysis of the formulas in gc_cuda.global_context and their derivatives. ``of_q`` is the scale of q.
    """
    inputs = {name: tensor.detach().double().cpu() for name, tensor in inputs.items()}
    pixels, grad = inputs["x"].flatten(2), grad.detach().double().cpu().flatten(2)
    n, c, s = pixels.shape
    if "mask_weight" in inputs:
        mask = inputs["mask_weight"].flatten()
        attention = torch.einsum("ncs,c->ns", pixels, mask).softmax(1)
    else:
        mask = torch.zeros(c, dtype=torch.float64)
        attention = torch.full((n, s), 1 / s, dtype=torch.float64)
    context = torch.einsum("ncs,ns->nc", pixels, attention)
    of_context = torch.einsum("ncs,ns->nc", pixels.abs(), attention)

    scale, of_scale = torch.ones(n, c, dtype=torch.float64), torch.ones(n, c, dtype=torch.float64)
    of_out, of_gradients, of_grad_context = (
        torch.zeros_like(pixels),
        {},
        torch.zeros(n, c, dtype=torch.float64),
    )
    grad_context = torch.zeros_like(of_grad_context)
    for branch in ("mul", "add"):
        if f"{branch}.w1" not in inputs:
            continue
        w1, b1, norm_weight, norm_bias, w2, b2 = (
            inputs[f"{branch}.{name}"].flatten(1)
            if name in ("w1", "w2")
            else inputs[f"{branch}.{name}"].flatten()
            for name in Transform._fields
        )
        # forward
        h = context @ w1.T + b1
        of_h = of_context @ w1.T.abs() + b1.abs()
        inverse = 1 / (h.var(1, keepdim=True, unbiased=False) + eps).sqrt()
        normalized = (h - h.mean(1, keepdim=True)) * inverse
        of_centred = (of_h + of_h.mean(1, keepdim=True)) * inverse
        of_inverse = (normalized.abs() * of_centred).mean(1, keepdim=True)  # relative
        of_normalized = of_centred + normalized.abs() * of_inverse
        y = (normalized * norm_weight + norm_bias).relu()
        active = (y > 0).double()
        of_y = active * (of_normalized * norm_weight.abs() + norm_bias.abs())
        t, of_t = y @ w2.T + b2, of_y @ w2.T.abs() + b2.abs()
        # backward
        dt, of_dt = grad.sum(2), grad.abs().sum(2)
        if branch == "mul":
            scale, slope = t.sigmoid(), t.sigmoid() * (1 - t.sigmoid())
            of_scale = scale + slope * of_t
            dt = (grad * pixels).sum(2) * slope
            of_dt = (grad * pixels).abs().sum(2) * slope + dt.abs() * of_t
        else:
            of_out = of_out + of_t[:, :, None]
        dy, of_dy = active * (dt @ w2), active * (of_dt @ w2.abs())
        dn, of_dn = dy * norm_weight, of_dy * norm_weight.abs()
        along, of_along = (
            (dn * normalized).mean(1, keepdim=True),
            of_dn * normalized.abs() + dn.abs() * of_normalized,
        )
        dh = inverse * (dn - dn.mean(1, keepdim=True) - normalized * along)
        of_dh = inverse * (
            of_dn
            + of_dn.mean(1, keepdim=True)
            + normalized.abs() * of_along.mean(1, keepdim=True)
            + of_normalized * along.abs()
        )
        of_dh = of_dh + dh.abs() * of_inverse
        grad_context, of_grad_context = grad_context + dh @ w1, of_grad_context + of_dh @ w1.abs()
        of_six = Transform(
            of_dh.T @ context.abs() + dh.abs().T @ of_context,
            of_dh.sum(0),
            (of_dy * normalized.abs() + dy.abs() * of_normalized).sum(0),
            of_dy.sum(0),
            of_dt.T @ y + dt.abs().T @ of_y,
            of_dt.sum(0),
        )
        of_gradients |= {f"{branch}.{name}": of_one for name, of_one in of_six._asdict().items()}

    of_out = of_out + pixels.abs() * of_scale[:, :, None]
    of_grad_x = grad.abs() * of_scale[:, :, None] + attention[:, None] * of_grad_context[:, :, None]
    if "mask_weight" in inputs:
        products = torch.einsum("nc,ncs->ns", of_grad_context, pixels.abs())
        of_logits = attention * (products + (of_grad_context * of_context).sum(1, keepdim=True))
        of_grad_x = of_grad_x + of_logits[:, None] * mask.abs()[:, None]
        of_gradients["mask_weight"] = torch.einsum("ns,ncs->c", of_logits, pixels.abs())
    of_gradients["x"] = of_grad_x
    return of_out.view(inputs["x"].shape), {
        name: of_one.reshape(inputs[name].shape) for name, of_one in of_gradients.items()
    }
