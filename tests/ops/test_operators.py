"""What the backward operator of the whole block refuses, which takes what a forward call has kept."""

from __future__ import annotations

import pytest
import torch
from block_cases import Configuration, draw_inputs

N, C, H, W = SIZE = (2, 8, 3, 5)


@pytest.fixture
def arguments(random, device):
    """Of a call that fits, by name and in the operator's order."""
    inputs = draw_inputs(random, Configuration("att", ("add",)), SIZE, dtype=torch.float32, device=device)
    x, weight, bias, *add = inputs.values()
    _, kept = torch.ops.gc_cuda.global_context_kept(x, weight, bias, add, [], 1e-5, 0, 0)
    needed = [True] * 9 + [False] * 6
    return {
        "grad": torch.ones_like(x),
        "x": x,
        "mask_weight": weight,
        "mask_bias": bias,
        "add": add,
        "mul": [],
        "kept": kept,
        "activation": 0,
        "gate": 0,
        "needed": needed,
    }


WRONG = {
    "too little kept": ({"kept": lambda kept: kept[:-1]}, "kept must have"),
    "kept of another type": ({"kept": lambda kept: kept.double()}, "kept must be"),
    "kept in strides": (
        {"kept": lambda kept: torch.stack([kept, kept], 1)[:, 0]},
        "kept must be contiguous, got strides",
    ),
    "a gradient of another shape": ({"grad": lambda grad: grad[:1]}, "grad must have shape"),
    "no x": ({"x": lambda x: None}, "x must be given"),
    "no bias": ({"mask_bias": lambda bias: None}, r"needed\[2\] asks for the gradient of what is not given"),
    "no mul": ({"needed": lambda n: [*n[:9], True, *n[10:]]}, r"needed\[9\] asks for the gradient of what"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_backward_operator_refuses(arguments, case):
    operator = torch.ops.gc_cuda.global_context_backward.default
    operator(*arguments.values())
    changes, message = WRONG[case]
    changed = {name: change(arguments[name]) for name, change in changes.items()}
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        operator(*(arguments | changed).values())
