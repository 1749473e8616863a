"""A block in a graph of torch.fx: one node that calls it, so that the graph runs what the block runs."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.nn.modules import module as all_modules

_HOOKS_ON_ALL_MODULES = (all_modules._global_forward_pre_hooks, all_modules._global_forward_hooks)


def node_of(block: Any, x: Proxy) -> Any:
    """The call of the block as one node of the graph, as torch.fx makes it for modules of torch.nn.

    None where the block has to be traced inside: it is itself what is traced, which has no name in the graph;
    or its call does more than our forward. torch.fx has run that already, and the node would once more.
    """
    if not _is_all_of_the_call(block):
        return None
    try:
        path = x.tracer.path_of_module(block)  # type: ignore[attr-defined]
    except (AttributeError, NameError):  # a tracer without modules; a module that is not in the traced one
        return None
    return x.tracer.create_proxy("call_module", path, (x,), {}) if path else None


def _is_all_of_the_call(block: Any) -> bool:
    """Whether calling the block runs our forward and nothing around it: no hook, no subclass's forward."""
    if any((*_HOOKS_ON_ALL_MODULES, block._forward_pre_hooks, block._forward_hooks)):
        return False
    if "forward" in block.__dict__ or type(block).__call__ is not nn.Module.__call__:
        return False
    definer = next(base for base in type(block).__mro__ if "forward" in base.__dict__)
    # The latter is a class of gc_cuda.models.swap.
    return definer.__module__.startswith("gc_cuda.") or "_gc_derivation" in definer.__dict__
