"""The graph of a module: traced on a copy, for symbolic sizes, by PyTorch's operations before autograd."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from gc_cuda.blocks._parts import Unserved
from gc_cuda.models import swap
from gc_cuda.recognition.structure import Place

# Sizes of the maps that are traced: all different, so that each has a symbol of its own; images, and pixels.
_IMAGES, _PIXELS = (3, 5), (11, 13, 17)


class Traced(NamedTuple):
    """A graph, and what its nodes stand for."""

    graph: fx.Graph
    places: dict[fx.Node, Place]  # of the nodes that are parameters and buffers
    channels: int | None  # that x has to have; None: any number
    complaint: str  # why the graph does not hold for all sizes; "" if it does


def copy_of(block: nn.Module) -> Any:
    """A copy in float64 on the CPU, with its own class, without hooks, whose weights are awake: all random.

    Of a block on the meta device, too. The random state is that of the caller, who forks it.
    """
    return _copy(block, _awake)


def _copy(block: nn.Module, tensor_for: Callable[[Tensor], Tensor]) -> Any:
    # Parameters and buffers are replaced; nothing is copied of their numbers.
    memo: dict[int, Any] = {}
    for tensor in (*block.parameters(), *block.buffers()):
        memo[id(tensor)] = tensor_for(tensor)
    try:
        twin = copy.deepcopy(block, memo)
    except Exception as error:
        raise Unserved(f"it cannot be copied: {type(error).__name__}") from error
    for module in twin.modules():
        module.__class__ = swap.innermost(type(module))
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            vars(module)[hooks].clear()
    return twin


def _awake(tensor: Tensor) -> Tensor:
    """A tensor like it with random numbers, which suit a variance too."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    numbers = torch.rand(tensor.shape, dtype=torch.float64, device="cpu").add_(0.5)
    if isinstance(tensor, nn.Parameter):
        fan_in = max(1, tensor[0].numel() if tensor.dim() > 1 else 1)
        signs = torch.randint(0, 2, tensor.shape, device="cpu").mul_(2).sub_(1)
        return nn.Parameter(numbers * signs * (2 / fan_in**0.5), requires_grad=True)
    return numbers


def sizes(channels: int) -> tuple[int, int, int, int]:
    """N, C, H and W of a map to trace, all different."""
    n = next(size for size in _IMAGES if size != channels)
    h, w, *_ = (size for size in _PIXELS if size != channels)
    return n, channels, h, w


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave the random state as it is, and every mode out."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        torch.default_generator.manual_seed(0)
        yield


def may_give_maps(block: nn.Module, guesses: list[int]) -> list[int]:
    """The numbers of channels of which a map may come out as a map of its size: without numbers, at no cost.

    None is excluded where that takes numbers.
    """
    try:
        twin = _copy(block, _empty).eval()
    except Unserved:
        return guesses
    return [channels for channels in guesses if _may_give_a_map(twin, channels)]


def _may_give_a_map(twin: Any, channels: int) -> bool:
    with torch.no_grad():
        try:
            out = twin.forward(torch.empty(sizes(channels), **_META))
        except Exception as error:
            return isinstance(error, NotImplementedError) or "meta" in str(error)
    return isinstance(out, Tensor) and out.shape == torch.Size(sizes(channels))


_META: Any = {"dtype": torch.float64, "device": "meta"}


def _empty(tensor: Tensor) -> Tensor:
    made = torch.empty(tensor.shape, **_META)
    made = made if tensor.is_floating_point() else made.to(tensor.dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def shape_of(block: Any, channels: int) -> torch.Size | None:
    """The shape of the output for a map of that many channels; None where it is no tensor or fails."""
    with torch.no_grad():
        try:
            out = block.forward(torch.rand(sizes(channels), dtype=torch.float64, device="cpu"))
        except Exception:
            return None
    return out.shape if isinstance(out, Tensor) else None


def trace(block: Any, channels: int, *, of_any_channels: bool = False) -> Traced:
    """The graph of ``block``, a copy, for that many channels; of_any_channels: for others too, if it can be.

    Raises:
        Unserved: if it cannot be traced.
    """
    from torch.fx.experimental import proxy_tensor  # it takes a second, and few need it

    names: dict[int, Place] = {}
    for path, module in block.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            names.setdefault(id(tensor), (path, name))

    def forward(x: Tensor) -> Any:
        if not of_any_channels:
            assert x.shape[1] == channels  # from now on it is a number, and no symbol
        return block.forward(x)

    x = torch.rand(sizes(channels), dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            traced = proxy_tensor.make_fx(
                forward, tracing_mode="symbolic", pre_dispatch=True, _allow_non_fake_inputs=True
            )(x)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise Unserved(f"it cannot be traced: {type(error).__name__}: {first[:120]}") from error
    places = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(traced, node.target)
            if id(tensor) not in names:
                raise Unserved("it reads a tensor that is neither a parameter nor a buffer")
            places[node] = names[id(tensor)]
    return Traced(traced.graph, places, *_held_for(traced.graph, channels))


def _held_for(graph: fx.Graph, channels: int) -> tuple[int | None, str]:
    """The channels that the graph holds for, and why it does not hold for all batches and pixels."""
    (x,) = (node for node in graph.nodes if node.op == "placeholder")
    value = x.meta["val"]
    n, c, h, w = map(_expression, value.shape)
    for size in (n, h, w):
        if size.isdigit():
            return channels, f"its graph is for one size alone: {size}"
    own, is_any = {n, h, w}, not c.isdigit()
    for guard in value.fake_mode.shape_env.guards:
        if {str(symbol) for symbol in guard.expr.free_symbols} & own:
            names = str(guard.expr)
            for letter, size in zip("NHW", (n, h, w)):
                names = names.replace(size, letter)
            return channels, f"its graph depends on the size of the map: {names}"
        is_any = False
    return (None if is_any else channels), ""


def _expression(size: Any) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)
