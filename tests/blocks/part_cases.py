"""What test_parts.py goes through: blocks of every kind, and what people do to a part of one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import gc_cuda
from gc_cuda import blocks, reference
from gc_cuda.models import swap

CHANNELS = 8


class Block(NamedTuple):
    """A kind of block: how one is made, and its forward in plain PyTorch, which calls every part."""

    make: Callable[[], nn.Module]
    eager: Callable[[nn.Module, Tensor], Tensor]


def _simplified(block: Any, x: Tensor) -> Tensor:
    attention = torch.softmax(block.conv_mask(x).flatten(2), dim=2)
    context = torch.einsum("ncs,nks->nck", x.flatten(2), attention).unsqueeze(-1)
    return x + block.conv_value(context)


def _squeeze_excite(block: Any, x: Tensor) -> Tensor:
    return x * block.gate(block.fc2(block.act(block.fc1(x.mean((2, 3), keepdim=True)))))


def concatenation(block: Any, x: Tensor) -> Tensor:
    """The forward of a NonLocalBlock of that mode."""
    g, phi, theta = (part(x).flatten(2) for part in (block.g, block.phi, block.theta))
    n, p, s = theta.shape
    pairs = torch.cat([theta[..., None].expand(n, p, s, s), phi[:, :, None].expand(n, p, s, s)], dim=1)
    weights = torch.relu(block.concat_project(pairs)).squeeze(1) / s
    return x + block.conv_out(torch.einsum("nps,nts->npt", g, weights).unflatten(2, x.shape[2:]))


def _registered() -> nn.Module:
    pytest.importorskip("mmcv")
    from gc_cuda.integrations.mmcv import ContextBlock

    return ContextBlock(in_channels=CHANNELS, ratio=1 / 2, fusion_types=("channel_add", "channel_mul"))


def _accelerated(make: Callable[[], nn.Module]) -> Block:
    def accelerated() -> nn.Module:
        block = make()
        assert gc_cuda.accelerate(block).accelerated == [""]
        return block

    return Block(accelerated, lambda block, x: swap.original(type(block)).forward(block, x))


def _mmcv() -> nn.Module:
    bricks = pytest.importorskip("mmcv.cnn.bricks")
    return bricks.ContextBlock(CHANNELS, 1 / 2, fusion_types=("channel_add", "channel_mul"))


def _timm() -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    return layers.GlobalContext(CHANNELS, fuse_add=True, fuse_scale=True, rd_channels=4)


def _timm_squeeze_excite() -> nn.Module:
    return pytest.importorskip("timm.layers").SEModule(CHANNELS, rd_channels=4)


def _torchvision() -> nn.Module:
    return pytest.importorskip("torchvision.ops").SqueezeExcitation(CHANNELS, 4)


BLOCKS = {
    "att": Block(
        lambda: gc_cuda.ContextBlock(CHANNELS, 1 / 2, fusion_types=("channel_add", "channel_mul")),
        reference.ContextBlock.forward,
    ),
    "avg": Block(lambda: gc_cuda.ContextBlock(CHANNELS, 1 / 2, "avg"), reference.ContextBlock.forward),
    "SEBlock": Block(lambda: blocks.SEBlock(CHANNELS, 4), _squeeze_excite),
    "simplified": Block(lambda: blocks.SimplifiedNonLocalBlock(CHANNELS), _simplified),
    "mmcv registry": Block(_registered, reference.ContextBlock.forward),
    "accelerated mmcv": _accelerated(_mmcv),
    "accelerated timm": _accelerated(_timm),
    "accelerated timm SE": _accelerated(_timm_squeeze_excite),
    "accelerated torchvision": _accelerated(_torchvision),
}


def parts(block: nn.Module, *kinds: type[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Of these classes, or all: the module that holds the part, its name there, the part."""
    found = []
    for parent in block.modules():
        for name, part in parent.named_children():
            if not kinds or isinstance(part, kinds):
                found.append((parent, name, part))
    return found


def _exchange(*kinds: type[nn.Module], by: Callable[[Any], nn.Module]) -> Callable[[nn.Module], None]:
    def manipulate(block: nn.Module) -> None:
        for parent, name, part in parts(block, *kinds):
            setattr(parent, name, by(part).double())

    return manipulate


def _each(*kinds: type[nn.Module], do: Callable[[Any], object]) -> Callable[[nn.Module], None]:
    def manipulate(block: nn.Module) -> None:
        for _, _, part in parts(block, *kinds):
            do(part)

    return manipulate


class Standardised(nn.Conv2d):
    """Overrides only what nn.Conv2d.forward calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(1, keepdim=True), bias)


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Conv2d):
    """Its weight is not what is stored under that name."""

    weight = property(lambda self: self._parameters["weight"] * 3)


class Adapter(nn.Module):
    """As PEFT's LoRA layers: the base layer's weight is seen through it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.delta = base, nn.Conv2d(base.in_channels, base.out_channels, 1)
        nn.init.normal_(self.delta.weight)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.delta(x)


def _as(kind: type[nn.Module]) -> Callable[[Any], nn.Module]:
    def convert(conv: Any) -> nn.Module:
        conv.__class__ = kind
        return conv

    return convert


class Rounding(nn.Module):
    """Stands for a fake quantisation, of which PyTorch's has no float64."""

    def __init__(self, **options: Any) -> None:
        super().__init__()

    def forward(self, weight):
        return weight + (torch.round(weight * 16) / 16 - weight).detach()


def _quantisation_aware(conv: Any) -> nn.Module:
    qat = pytest.importorskip("torch.ao.nn.qat")
    conv.qconfig = pytest.importorskip("torch.ao.quantization").QConfig(nn.Identity, Rounding)
    made = qat.Conv2d.from_float(conv)
    del conv.qconfig
    return made


def _observed(block: nn.Module) -> None:
    """As torch.ao.quantization.prepare: a child that watches the output, called by a hook."""

    def observe(part: Any) -> None:
        part.register_forward_hook(lambda module, args, out: module.activation_post_process(out))
        part.activation_post_process = Rounding()

    _each(nn.Conv2d, do=observe)(block)


def _offload(part: Any) -> None:
    """As accelerate's hooks do: a forward in the instance, which brings the weights and runs the old one."""
    old = part.forward

    def forward(*args, **kwargs):
        return old(*args, **kwargs) * 1.5

    part.forward = forward


def _gradient_of_each_sample(block: nn.Module) -> None:
    """As Opacus does: activations by a forward hook, per-sample gradients by a backward hook."""

    def backward(module, grad_in, grad_out):
        module.seen.append(grad_out[0].flatten(1).norm(dim=1).sum().item())

    block.apply(not_in_place)
    for _, _, part in parts(block, nn.Conv2d):
        part.seen = []
        part.register_forward_hook(lambda module, args, out: module.seen.append(args[0].sum().item()))
        part.register_full_backward_hook(backward)


def _structured(block: nn.Module) -> None:
    """Hidden units cut out in place, as torch-pruning does it; the numbers in the modules stay or follow."""
    for parent in list(block.modules()):
        hidden = [part for part in parent.children() if isinstance(part, nn.Conv2d)]
        if len(hidden) != 2 or hidden[0].out_channels != 4:
            continue
        first, last = hidden
        first.weight, first.bias = nn.Parameter(first.weight.data[:3]), nn.Parameter(first.bias.data[:3])
        last.weight = nn.Parameter(last.weight.data[:, :3])
        for norm in parent.children():
            if isinstance(norm, nn.LayerNorm):
                norm.weight = nn.Parameter(norm.weight.data[:3])
                norm.bias = nn.Parameter(norm.bias.data[:3])
                norm.normalized_shape = (3, *norm.normalized_shape[1:])


def _append(block: nn.Module) -> None:
    for part in block.modules():
        if type(part) is nn.Sequential:
            part.append(nn.Tanh())


def _swap_middle(block: nn.Module) -> None:
    """The same parts, in another order: the dictionary of a Sequential decides about it."""
    for part in block.modules():
        if type(part) is nn.Sequential:
            held = list(part._modules.items())
            part._modules.clear()
            part._modules.update([held[0], held[2], held[1], held[3]])


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return weight / 2


class Manipulation(NamedTuple):
    """What is done to the parts of a block."""

    do: Callable[[nn.Module], object]
    fused: bool = False  # whether the block may still run fused
    kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)  # of parts; a block without any stays as it is


def _on(*kinds: type[nn.Module], do: Callable[[Any], object], fused: bool = False) -> Manipulation:
    return Manipulation(_each(*kinds, do=do), fused, kinds)


def _instead(*kinds: type[nn.Module], by: Callable[[Any], nn.Module]) -> Manipulation:
    return Manipulation(_exchange(*kinds, by=by), False, kinds)


def _hook(register: str, hook: Callable[..., Any]) -> Manipulation:
    def do(part: Any) -> None:
        not_in_place(part)
        getattr(part, register)(hook)

    return Manipulation(_each(do=do))


def not_in_place(part: Any) -> None:
    """PyTorch has no backward hooks beside it."""
    if isinstance(part, nn.ReLU):
        part.inplace = False


def _grouped(conv: Any) -> nn.Module:
    if conv.out_channels == 1:
        return conv
    return nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=2, bias=conv.bias is not None)


def _parametrize(name: str) -> Callable[[Any], object]:
    def register(part: Any) -> None:
        if getattr(part, name) is not None:
            parametrize.register_parametrization(part, name, Halved())

    return register


def _double_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.conv2d(x, weight * 2, bias)


MANIPULATIONS: dict[str, Manipulation] = {
    "nothing": Manipulation(lambda block: None, fused=True),
    "forward hook": _hook("register_forward_hook", lambda module, args, out: out * 1.1),
    "forward pre-hook": _hook("register_forward_pre_hook", lambda module, args: (args[0] * 1.1,)),
    "backward hook": _hook(
        "register_full_backward_hook", lambda module, grad_in, grad_out: tuple(g * 2 for g in grad_in)
    ),
    "backward pre-hook": _hook(
        "register_full_backward_pre_hook", lambda module, grad_out: (grad_out[0] * 2,)
    ),
    "another activation": _instead(nn.ReLU, by=lambda part: nn.LeakyReLU(0.3)),
    "another gate": _instead(nn.Sigmoid, by=lambda part: nn.Tanh()),
    "another norm": _instead(nn.LayerNorm, by=lambda part: nn.GroupNorm(2, part.normalized_shape[0])),
    "no norm": _instead(nn.LayerNorm, by=lambda part: nn.Identity()),
    "norm without weights": _instead(
        nn.LayerNorm, by=lambda part: nn.LayerNorm([part.normalized_shape[0], 1, 1], elementwise_affine=False)
    ),
    "another dropout": _instead(nn.Dropout, by=lambda part: Halved()),  # which has no p
    "eps": _on(nn.LayerNorm, do=lambda part: setattr(part, "eps", 0.5), fused=True),
    "softmax over images": _on(nn.Softmax, do=lambda part: setattr(part, "dim", 0)),
    "convolution's _conv_forward": _instead(nn.Conv2d, by=_as(Standardised)),
    "convolution's forward": _instead(nn.Conv2d, by=_as(Doubling)),
    "convolution's weight": _instead(nn.Conv2d, by=_as(Scaled)),
    "grouped convolution": _instead(nn.Conv2d, by=_grouped),
    "instance's _conv_forward": _on(
        nn.Conv2d, do=lambda part: setattr(part, "_conv_forward", _double_weight)
    ),
    "another value of a weight": _on(nn.Conv2d, do=lambda part: nn.init.normal_(part.weight), fused=True),
    "another weight": _on(
        nn.Conv2d,
        do=lambda part: setattr(part, "weight", nn.Parameter(part.weight.detach() * 2)),
        fused=True,
    ),
    "adapter": _instead(nn.Conv2d, by=Adapter),
    "pruning": _on(nn.Conv2d, do=lambda part: prune.l1_unstructured(part, "weight", 0.5)),
    "pruning of channels": _on(
        nn.Conv2d, do=lambda part: prune.ln_structured(part, "weight", 0.5, n=2, dim=1)
    ),
    "pruning, made permanent": _on(
        nn.Conv2d,
        do=lambda part: (prune.l1_unstructured(part, "weight", 0.5), prune.remove(part, "weight")),
        fused=True,
    ),
    "hidden units cut out": Manipulation(_structured, fused=True),
    "old weight norm": _on(nn.Conv2d, do=nn.utils.weight_norm),
    "old spectral norm": _on(nn.Conv2d, do=nn.utils.spectral_norm),
    "weight norm": _on(nn.Conv2d, do=parametrizations.weight_norm, fused=True),
    "spectral norm": _on(nn.Conv2d, do=parametrizations.spectral_norm, fused=True),
    "parametrized bias": _on(nn.Conv2d, do=_parametrize("bias"), fused=True),
    "parametrized norm": _on(nn.LayerNorm, do=_parametrize("weight"), fused=True),
    "quantisation-aware": _instead(nn.Conv2d, by=_quantisation_aware),
    "observed": Manipulation(_observed),
    "offloading": _on(nn.Conv2d, do=_offload),
    "per-sample gradients": Manipulation(_gradient_of_each_sample),
    "appended": Manipulation(_append, kinds=(nn.Sequential,)),
    "another order": Manipulation(_swap_middle, kinds=(nn.Sequential,)),
    "compiled by itself": _on(nn.Conv2d, do=lambda part: part.compile(backend="eager")),
}


@contextlib.contextmanager
def _global(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _replaced(kind: type, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    old = getattr(kind, name)
    setattr(kind, name, make(old))
    try:
        yield
    finally:
        setattr(kind, name, old)


def _tripled(old: Any) -> Any:
    return lambda self, *args: old(self, *args) * 3


_module = nn.modules.module
# What is done to all modules for a while, or to a class.
EVERYWHERE: dict[str, Callable[[], Any]] = {
    "forward hook": lambda: _global(
        _module.register_module_forward_hook,
        lambda module, args, out: out * 1.1 if isinstance(module, nn.Conv2d) else None,
    ),
    "forward pre-hook": lambda: _global(
        _module.register_module_forward_pre_hook,
        lambda module, args: (args[0] * 1.1,) if isinstance(module, nn.Conv2d) else None,
    ),
    "backward hook": lambda: _global(
        _module.register_module_full_backward_hook,
        lambda module, grad_in, grad_out: tuple(g if g is None else g * 2 for g in grad_in),
    ),
    "backward pre-hook": lambda: _global(
        _module.register_module_full_backward_pre_hook, lambda module, grad_out: (grad_out[0] * 2,)
    ),
    "convolution's forward": lambda: _replaced(nn.Conv2d, "forward", _tripled),
    "convolution's _conv_forward": lambda: _replaced(nn.Conv2d, "_conv_forward", _tripled),
    "activation's forward": lambda: _replaced(nn.ReLU, "forward", _tripled),
    "norm's forward": lambda: _replaced(nn.LayerNorm, "forward", _tripled),
    "every call": lambda: _replaced(
        nn.Module,
        "__call__",
        lambda old: lambda self, *args: old(self, *args) * (3 if isinstance(self, nn.Conv2d) else 1),
    ),
}
