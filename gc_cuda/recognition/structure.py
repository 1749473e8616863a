"""The structure of a module: its parts, what they are set to, and where its tensors are.

Modules of one structure compute the same with their own tensors, so that one trace and one proof stand for
all. The structure is read again in a call only if the notes of it (csrc/python/reading.h) no longer hold.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gc_cuda.blocks._parts import Look, Unserved
from gc_cuda.models import swap
from gc_cuda.recognition import source
from gc_cuda.recognition.candidates import MOST_PARTS

# A tensor of the block: the path of the part that has it, "" for the block itself, and its name there.
Place = tuple[str, str]

_codes: dict[Any, source.Code] = {}


def read(look: Look, block: nn.Module, training: bool | None = None) -> Any:
    """What decides on the graph, equal for blocks of one structure; everything looked at is noted.

    training: what it would be with all parts in that mode.

    Raises:
        Unserved: if what its code reads could change unseen, or calling a part does more than its forward.
    """
    signature: list[Any] = []
    numbers: dict[int, int] = {}  # of parts and tensors, so that what is shared tells
    code = _code([module for _, module in parts(block)])
    for path, module in parts(block):
        kind = swap.innermost(type(module))
        if path:
            look.plain(module, path)
        elif "forward" in vars(module):
            raise Unserved("the instance has a forward of its own")
        _demand_plain_calls(kind)
        if parametrize.is_parametrized(module):
            raise Unserved(f"{path or 'it'} is parametrized")
        look.children(module)
        for name, value in _attributes(look, module, code):
            if name == "training" and training is not None:
                value = training
            signature.append((name, type(value), value))
        tensors = _tensors(module)
        held = tuple(
            (name, numbers.setdefault(id(part), len(numbers))) for name, part in module._modules.items()
        )
        shapes = tuple(
            (name, numbers.setdefault(id(tensor), len(numbers)), *_shape(tensor)) for name, tensor in tensors
        )
        signature.append((path, kind, held, shapes))
    if code.complaint is not None:
        raise type(code.complaint)(str(code.complaint))  # raised itself, it would keep the block
    for entry in code.globals:
        look.entry(entry.dictionary, entry.name)
        signature.append((entry.name, type(entry.value), entry.value))
    for function, *instructions in code.functions:
        look.function(function)
        signature.append(repr(instructions[1:]))
        signature.append(instructions[0])
    return tuple(signature)


def parts(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The block and everything in it by path, each module once, a parent before its children."""
    for number, (path, module) in enumerate(block.named_modules()):
        if number == MOST_PARTS:
            raise Unserved(f"it has more than {MOST_PARTS} parts")
        yield path, module


def _code(modules: list[nn.Module]) -> source.Code:
    """What the code of these modules reads that is not PyTorch's own."""
    kinds = dict.fromkeys(swap.innermost(type(module)) for module in modules)
    own_kinds = tuple(kind for kind in kinds if not source.is_of_torch(kind.__module__))
    functions = tuple(_functions_in(value for module in modules for value in vars(module).values()))
    key = own_kinds, functions
    if key not in _codes or not _codes[key].holds():
        _codes[key] = source.code_of(*key)
    return _codes[key]


def _functions_in(values: Iterable[Any]) -> Iterator[types.FunctionType]:
    for value in values:
        if isinstance(value, types.FunctionType):
            yield value
        elif isinstance(value, (tuple, frozenset)):
            yield from _functions_in(value)


def _attributes(look: Look, module: nn.Module, code: source.Code) -> Iterator[tuple[str, Any]]:
    """Everything that a forward may read of the module beside tensors and parts."""
    own = vars(module)
    names = {*code.attributes, "training"}
    if source.is_of_torch(swap.innermost(type(module)).forward.__module__):
        names.update(name for name in own if not name.startswith("_"))
    for name in sorted(names):
        if name in module._modules or name in module._parameters or name in module._buffers:
            continue
        look.noted(module, name)
        if name not in own:
            continue
        value = own[name]
        if isinstance(value, Tensor):
            raise Unserved(f"it reads {name}, a tensor that is neither a parameter nor a buffer")
        if not _is_fixed(value):
            raise Unserved(f"it reads {name}, a {type(value).__name__} that may change unseen")
        yield name, value


def _is_fixed(value: Any) -> bool:
    """Whether its identity says what it is."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_fixed, value))
    if value is None or isinstance(value, (int, float, str, types.FunctionType)):
        return True
    return source.is_torchs(value)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [*module._parameters.items(), *module._buffers.items()]


def _shape(tensor: Tensor | None) -> tuple[Any, ...]:
    return (None,) if tensor is None else (tuple(tensor.shape), tensor.is_floating_point())


def _demand_plain_calls(kind: type[nn.Module]) -> None:
    """Demand that the class calls its forward and finds its attributes as nn.Module does."""
    for name in ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"):
        if getattr(kind, name, None) is not getattr(nn.Module, name, None):
            raise Unserved(f"{kind.__name__} has a {name} of its own")
    if kind.__getattribute__ is not object.__getattribute__:
        raise Unserved(f"{kind.__name__} has a __getattribute__ of its own")
