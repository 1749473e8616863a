"""What the Python code of a forward reads besides its arguments, from its bytecode.

A traced graph is what the code did once. It stands for later calls only if what the code reads is the same
then. So whatever could change without being seen, or is not in the graph at all, makes the module unserved.
"""

from __future__ import annotations

import builtins
import dis
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gc_cuda.blocks._parts import Unserved

# Functions of Python that depend on nothing but their arguments.
_BUILTIN_NAMES = """
    abs all any bool dict divmod enumerate float int isinstance issubclass len list map max min pow range
    reversed round set slice sorted str sum super tuple zip AssertionError NotImplementedError RuntimeError
    TypeError ValueError NotImplemented
"""
_BUILTINS = frozenset(_BUILTIN_NAMES.split())

# Attributes by which code asks a tensor, or torch, for something that a graph does not record.
_QUESTION_NAMES = """
    dtype device requires_grad grad grad_fn layout stride storage_offset data_ptr storage untyped_storage
    element_size itemsize nbytes get_device item tolist numpy data retain_grad backward register_hook
    requires_grad_ type to cpu cuda half float double bfloat16 no_grad enable_grad inference_mode
    set_grad_enabled autocast amp default_dtype get_default_dtype set_default_dtype seed manual_seed
    initial_seed rand randn rand_like randn_like randint randperm bernoulli bernoulli_ uniform_ normal_ normal
    random_ environ getenv version backends __version__ __dict__ __class__ _version names grad_mode
"""
_QUESTIONS = frozenset(_QUESTION_NAMES.split())
# … except these, which ask what runs PyTorch's own modules anyway.
_HARMLESS = frozenset(("is_scripting", "is_tracing", "is_exporting", "is_compiling"))

_WRITES = tuple(
    f"{how}_{what}" for how in ("STORE", "DELETE") for what in ("ATTR", "GLOBAL", "SUBSCR", "DEREF")
)
# Methods of a layer that calling it does not run.
_NOT_IN_A_CALL = ("__init__", "extra_repr", "reset_parameters", "init_weights")
_SIMPLE = (int, float, str, bytes, type(None), type(Ellipsis))


_ABSENT = object()


class Global(NamedTuple):
    """A global that is read: in which dictionary, and what was there, if not one of Python's own."""

    dictionary: dict[str, Any]
    name: str
    value: Any


class Unsafe(Unserved):
    """It may change something outside of the module: so it is not even traced."""


# Of a function: the function, its instructions, its defaults
Instructions = tuple[types.FunctionType, types.CodeType, Any, Any]


class Code(NamedTuple):
    """What the code of some classes reads."""

    attributes: frozenset[str]  # names of attributes, of whatever object
    globals: tuple[Global, ...]
    members: tuple[tuple[type, str, Any], ...]  # of the classes and their bases
    functions: tuple[Instructions, ...]
    complaint: Unserved | None  # why a graph does not stand for it

    def holds(self) -> bool:
        """Whether all that was read is as it was."""
        return (
            all(entry.dictionary.get(entry.name, _ABSENT) is entry.value for entry in self.globals)
            and all(vars(base).get(name, _ABSENT) is value for base, name, value in self.members)
            and all(_instructions(one[0]) == one for one in self.functions)
        )


def code_of(kinds: Sequence[type[nn.Module]], functions: Sequence[types.FunctionType]) -> Code:
    """What the forwards of the classes of a block's parts read, and those functions, with all that they call.

    An attribute may be of any part, whichever code reads it.
    """
    return _Reader(kinds).result(functions)


class _Reader:
    def __init__(self, kinds: Sequence[type[nn.Module]]) -> None:
        self.kinds = kinds
        self.attributes: set[str] = set()
        self.globals: dict[tuple[int, str], Global] = {}
        self.members: list[tuple[type, str, Any]] = []
        self.seen: dict[int, types.FunctionType] = {}

    def result(self, functions: Sequence[Any]) -> Code:
        complaint = None
        try:
            for kind in self.kinds:
                self.forward(kind)
            for function in functions:
                self.function(function)
        except Unserved as unserved:
            complaint = unserved
        codes = tuple(map(_instructions, self.seen.values()))
        return Code(
            frozenset(self.attributes), tuple(self.globals.values()), tuple(self.members), codes, complaint
        )

    def forward(self, kind: type[nn.Module]) -> None:
        """The forward of a class; of a layer on top of one of PyTorch's, what that may call, too."""
        self.members.append((kind, "forward", vars(kind).get("forward", _ABSENT)))
        self.function(kind.forward)
        if not is_of_torch(kind.forward.__module__):
            return
        for base in kind.__mro__:
            if is_of_torch(base.__module__):
                break
            for name, found in vars(base).items():
                if isinstance(found, types.FunctionType) and name not in _NOT_IN_A_CALL:
                    self.function(found)

    def function(self, function: Any) -> None:
        if not isinstance(function, types.FunctionType):
            raise Unserved(f"{getattr(function, '__qualname__', function)!s} is not a plain Python function")
        if id(function) in self.seen or is_of_torch(function.__module__):
            return
        self.seen[id(function)] = function
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or ()):
            if name != "__class__":
                raise Unserved(f"{function.__name__} reads {name} of the function that it was made in")
            assert isinstance(cell.cell_contents, type)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not _is_constant(value):
                raise Unserved(f"{function.__name__} has a default that may change")
        self.code(function.__code__, function)

    def code(self, code: types.CodeType, function: types.FunctionType) -> None:
        for instruction in dis.get_instructions(code):
            name, kind = instruction.argval, instruction.opname
            if kind in _WRITES:
                failure = Unsafe if "GLOBAL" in kind else Unserved
                raise failure(f"{function.__name__} writes {_shown(name, kind)}")
            if kind in ("IMPORT_NAME", "IMPORT_FROM"):
                raise Unserved(f"{function.__name__} imports {name}")
            if kind in ("LOAD_GLOBAL", "LOAD_NAME"):
                self.a_global(name, function)
            elif "ATTR" in kind or "METHOD" in kind:
                if isinstance(name, str):
                    self.attribute(name, function)
            elif kind in ("SETUP_FINALLY", "PUSH_EXC_INFO", "SETUP_EXCEPT"):
                raise Unserved(f"{function.__name__} handles exceptions, or has a context")
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.code(constant, function)

    def attribute(self, name: str, function: types.FunctionType) -> None:
        asks = name in _QUESTIONS or (
            name.startswith("is_") and (hasattr(Tensor, name) or hasattr(torch, name))
        )
        if asks and name not in _HARMLESS:
            raise Unserved(f"{function.__name__} reads {name}, which no graph records")
        if name in self.attributes:
            return
        self.attributes.add(name)
        for base in dict.fromkeys(base for kind in self.kinds for base in kind.__mro__):
            if base is not object and base is not nn.Module:
                self.members.append((base, name, vars(base).get(name, _ABSENT)))
            if (
                name not in vars(base)
                or base is object
                or (base is not nn.Module and is_of_torch(base.__module__))
            ):
                continue
            if base is nn.Module:
                if name == "forward":  # of super()
                    continue
                raise Unserved(f"{function.__name__} uses {name} of torch.nn.Module")
            found = vars(base)[name]
            if isinstance(found, (staticmethod, classmethod)):
                found = found.__func__
            if isinstance(found, types.FunctionType):
                self.function(found)
            elif not _is_constant(found):
                raise Unserved(
                    f"{function.__name__} reads {name} of the class {base.__name__}, a {_kind(found)}"
                )

    def a_global(self, name: str, function: types.FunctionType) -> None:
        dictionary = function.__globals__
        if name not in dictionary:
            if name not in _BUILTINS or not hasattr(builtins, name):
                raise Unserved(f"{function.__name__} uses {name}")
            self.globals[id(dictionary), name] = Global(dictionary, name, _ABSENT)
            return
        value = dictionary[name]
        self.globals[id(dictionary), name] = Global(dictionary, name, value)
        if isinstance(value, types.ModuleType):
            if value.__name__ != "math" and not is_of_torch(value.__name__):
                raise Unsafe(f"{function.__name__} reads the module {value.__name__}")
        elif isinstance(value, types.FunctionType):
            self.function(value)
        elif isinstance(value, type):
            is_own = any(value in kind.__mro__ for kind in self.kinds)  # for super()
            if not (is_of_torch(value.__module__) or value.__module__ == "builtins" or is_own):
                raise Unserved(f"{function.__name__} uses the class {value.__name__}")
        elif not (_is_constant(value) or is_torchs(value)):
            raise Unserved(f"{function.__name__} reads the global {name}, a {_kind(value)}")


def _instructions(function: types.FunctionType) -> Instructions:
    by_name = tuple(sorted((function.__kwdefaults__ or {}).items()))
    return function, function.__code__, function.__defaults__, by_name


def is_torchs(value: Any) -> bool:
    """Whether it is a function or a constant of PyTorch's."""
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return True
    if isinstance(value, types.BuiltinFunctionType):
        return any(getattr(home, value.__name__, None) is value for home in (torch, nn.functional))
    return isinstance(value, types.FunctionType) and is_of_torch(value.__module__)


def is_of_torch(module: str | None) -> bool:
    return isinstance(module, str) and (module == "torch" or module.startswith("torch."))


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    return isinstance(value, _SIMPLE)


def _kind(value: Any) -> str:
    return type(value).__name__


def _shown(name: Any, kind: str) -> str:
    return f"{name}" if isinstance(name, str) else "into a container" if "SUBSCR" in kind else "a name"
