"""What constructors and functions demand of arguments other than tensors: name, expected, got."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable
from typing import SupportsFloat

from torch import nn


def one_of(value: object, name: str, choices: Iterable[str]) -> None:
    """Demand one of the names."""
    if not is_one_of(value, choices):
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {_shown(value)}")


def is_one_of(value: object, choices: Iterable[str]) -> bool:
    """Whether it is one; the value may be what cannot be hashed or compared by ==, such as an array."""
    return isinstance(value, str) and value in choices


def count(value: object, name: str) -> None:
    """Demand a positive integer."""
    try:
        number = operator.index(value)  # type: ignore[arg-type] # NumPy's integers too
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {_typed(value)}")
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {_shown(number)}")
    if number > sys.maxsize:
        raise ValueError(f"{name} must fit a 64-bit integer, got {_shown(number)}")


def ratio(value: object, name: str = "ratio") -> None:
    """Demand a finite number."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be a number, got {_typed(value)}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    except (TypeError, ValueError, RuntimeError):  # an array
        raise TypeError(f"{name} must be a number, got {_typed(value)}") from None
    if not finite:
        raise ValueError(f"{name} must be finite, got {_shown(value)}")


def epsilon(value: object, name: str = "eps") -> None:
    """Demand a float, or an integer that can be one, that is not negative."""
    if type(value) is float and value >= 0:
        return  # in every call of the whole block
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or an int, got {_typed(value)}")
    if not value >= 0:  # NaN too
        raise ValueError(f"{name} must be 0 or more, got {_shown(value)}")
    if isinstance(value, int) and value > sys.float_info.max:
        raise ValueError(f"{name} must be within the range of a float, got {_shown(value)}")


def module(value: object, name: str) -> None:
    """Demand a module and not a class."""
    if not isinstance(value, nn.Module):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name} must be a torch.nn.Module, got {got}")


def module_class(value: object, name: str) -> None:
    """Demand what makes a module when it is called without arguments."""
    if isinstance(value, nn.Module):
        raise TypeError(
            f"{name} must be a class, as torch.nn.ReLU, got an instance of {type(value).__name__}"
        )
    if not callable(value):
        raise TypeError(f"{name} must be a class, as torch.nn.ReLU, got {_typed(value)}")


def names(value: object, name: str) -> list[str]:
    """Demand several names, and return them; a string alone would be taken for its letters."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list or tuple of names, got {_typed(value)}")
    found = list(value)
    for one in found:
        if not isinstance(one, str):
            raise TypeError(f"{name} must be a list or tuple of names, got {_typed(one)} among them")
    return found


def _typed(value: object) -> str:
    """Its type, and its value where that is short."""
    kind = type(value).__name__
    return f"{kind} {_shown(value)}" if isinstance(value, (bool, int, float, complex, str)) else kind


def _shown(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 128:  # Python writes no integer of 4,300 digits
        return f"{'-' if value < 0 else ''}1e{int(value.bit_length() * math.log10(2))} or so"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
