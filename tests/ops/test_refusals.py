"""What every operator refuses, with the same error and the same words on every device, and of no images too.

On "dry" the operators' bodies run on meta tensors, with passes that compute nothing
(tests/host/binding/dry.cpp). tests/host/test_binding.py loads it, and there the CUDA passes run on the CPU's
tensors, too.
"""

from __future__ import annotations

import os
import re

import pytest
import torch
from evaluate import missing_gpu

C, H, W, P = 8, 3, 5, 4
S = H * W
NO_GPU = missing_gpu()
NO_DRY = pytest.mark.skipif("GC_CUDA_DRY" not in os.environ, reason="the dry device is not loaded")


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU != "", reason=NO_GPU)]),
        pytest.param("meta", marks=NO_DRY, id="dry"),
    ]
)
def device(request):
    return request.param


def transform(norm=True):
    shapes = [(P, C), (P,), (P,), (P,), (C, P), (C,)]
    return [torch.ones(shape) for i, shape in enumerate(shapes) if norm or i not in (2, 3)]


def valid(operator, n):
    """Arguments by name, in the operator's order."""
    x, grad = torch.ones(n, C, H, W), torch.ones(n, C, H, W)
    logits, state, per_channel = torch.ones(n, S), torch.ones(n, C + 2), torch.ones(n, C)
    weight, bias = torch.ones(C), torch.ones(1)
    kept = torch.ones(n * (C + 2 + S + P + 1))
    block = {"mask_weight": weight, "mask_bias": bias, "add": transform(), "mul": []}
    numbers = {"eps": 1e-5, "activation": 0, "gate": 0}
    return {
        "softmax_pool": {"x": x, "logits": logits},
        "softmax_pool_backward": {"grad_context": per_channel, "x": x, "logits": logits, "state": state},
        "attention_pool": {"x": x, "mask_weight": weight, "mask_bias": bias},
        "attention_pool_backward": {
            "grad_context": per_channel,
            "x": x,
            "mask_weight": weight,
            "logits": logits,
            "state": state,
        },
        "pixel_sum": {"x": x, "mean": True},
        "broadcast": {"x": x, "scale": per_channel, "term": per_channel},
        "broadcast_mul_backward": {"grad": grad, "x": x, "scale": per_channel},
        "broadcast_sums": {"grad": grad, "x": x},
        "global_context": {"x": x, **block, **numbers},
        "global_context_kept": {"x": x, **block, **numbers},
        "global_context_backward": {
            "grad": grad,
            "x": x,
            **block,
            "kept": kept,
            "activation": 0,
            "gate": 0,
            "needed": [True] * 9 + [False] * 6,
        },
    }[operator]


POOLS = ("softmax_pool", "attention_pool", "pixel_sum")
BROADCAST_BACKWARDS = ("broadcast_mul_backward", "broadcast_sums")
BACKWARDS = ("softmax_pool_backward", "attention_pool_backward", *BROADCAST_BACKWARDS)
FORWARD_BLOCKS = ("global_context", "global_context_kept")
BLOCKS = (*FORWARD_BLOCKS, "global_context_backward")
ALL = (*POOLS, *BACKWARDS, "broadcast", *BLOCKS)


def resized(index, shape):
    return lambda branch: [torch.ones(shape) if i == index else one for i, one in enumerate(branch)]


# Operators, the argument, what becomes of it, the error and its words; {n} is the number of images.
REFUSED = [
    (ALL, "x", lambda x: x[:, 0], RuntimeError, "x must have shape [N, C, H, W], got [{n}, 3, 5]"),
    (ALL, "x", lambda x: x.flatten(2), RuntimeError, "x must have shape [N, C, H, W], got [{n}, 8, 15]"),
    (ALL, "x", lambda x: x.long(), TypeError, "x must be float32, float16, bfloat16 or float64, got Long"),
    (ALL, "x", lambda x: x.bool(), TypeError, "x must be float32, float16, bfloat16 or float64, got Bool"),
    (
        ALL,
        "x",
        lambda x: x[:, :0],
        RuntimeError,
        "x must have at least one channel and one pixel, got shape [{n}, 0, 3, 5]",
    ),
    (
        ALL,
        "x",
        lambda x: x[..., :0],
        RuntimeError,
        "x must have at least one channel and one pixel, got shape [{n}, 8, 3, 0]",
    ),
    (
        ("softmax_pool", "softmax_pool_backward", "attention_pool_backward"),
        "logits",
        lambda logits: torch.ones(7),
        RuntimeError,
        "logits must have {ns} elements, got shape [7]",
    ),
    (
        ("softmax_pool",),
        "logits",
        lambda t: t.half(),
        TypeError,
        "logits must be Float like x, or Float, got Half",
    ),
    (
        ("attention_pool", "attention_pool_backward", *BLOCKS),
        "mask_weight",
        lambda t: t[1:],
        RuntimeError,
        "mask_weight must have 8 elements, got shape [7]",
    ),
    (
        ("attention_pool", "attention_pool_backward", *BLOCKS),
        "mask_weight",
        lambda t: t.double(),
        TypeError,
        "mask_weight must be Float like x, or Float, got Double",
    ),
    (
        ("attention_pool", *BLOCKS),
        "mask_bias",
        lambda t: torch.ones(2),
        RuntimeError,
        "mask_bias must have 1 elements, got shape [2]",
    ),
    (BLOCKS, "mask_weight", lambda t: None, RuntimeError, "mask_bias must be None without a mask_weight"),
    (
        ("softmax_pool_backward", "attention_pool_backward"),
        "grad_context",
        lambda t: torch.ones(3),
        RuntimeError,
        "grad_context must have {nc} elements, got shape [3]",
    ),
    (
        ("softmax_pool_backward", "attention_pool_backward"),
        "state",
        lambda t: torch.ones(3),
        RuntimeError,
        "state must have {state} elements, got shape [3]",
    ),
    (
        ("softmax_pool_backward", "attention_pool_backward"),
        "state",
        lambda t: t.double(),
        TypeError,
        "state must be Float like x, or Float, got Double",
    ),
    (
        ("broadcast", "broadcast_mul_backward"),
        "scale",
        lambda t: torch.ones(3),
        RuntimeError,
        "scale must have {nc} elements, got shape [3]",
    ),
    (
        (*BROADCAST_BACKWARDS, "global_context_backward"),
        "grad",
        lambda t: t[:, 1:],
        RuntimeError,
        "grad must have shape [{n}, 8, 3, 5] like x, got [{n}, 7, 3, 5]",
    ),
    (
        (*BROADCAST_BACKWARDS, "global_context_backward"),
        "grad",
        lambda t: t.half(),
        TypeError,
        "grad must be Float like x, got Half",
    ),
    (BLOCKS, "add", lambda t: [], RuntimeError, "the block needs an add or a mul branch, got neither"),
    (
        BLOCKS,
        "add",
        lambda t: t[:3],
        RuntimeError,
        "add must be empty, or hold w1, b1, norm_weight, norm_bias, w2, b2, or those without the norm's two; "
        "got 3 tensors",
    ),
    (BLOCKS, "add", resized(1, (0,)), RuntimeError, "add.b1 must have at least one element, got shape [0]"),
    (
        BLOCKS,
        "add",
        resized(0, (C, P)),
        RuntimeError,
        "add.w1 must have shape [4, 8] or [4, 8, 1, 1], got [8, 4]",
    ),
    (BLOCKS, "add", resized(2, (3,)), RuntimeError, "add.norm_weight must have 4 elements, got shape [3]"),
    (BLOCKS, "add", resized(5, (3,)), RuntimeError, "add.b2 must have 8 elements, got shape [3]"),
    (FORWARD_BLOCKS, "eps", lambda t: -1.0, RuntimeError, "eps must be 0 or more, got -1"),
    (FORWARD_BLOCKS, "eps", lambda t: float("nan"), RuntimeError, "eps must be 0 or more, got nan"),
    (BLOCKS, "activation", lambda t: 3, RuntimeError, "activation must be one of 0 to 2, got 3"),
    (BLOCKS, "activation", lambda t: -1, RuntimeError, "activation must be one of 0 to 2, got -1"),
    (BLOCKS, "gate", lambda t: 2, RuntimeError, "gate must be one of 0 to 1, got 2"),
    (
        ("global_context_backward",),
        "kept",
        lambda t: torch.ones(3),
        RuntimeError,
        "kept must have {kept} elements, got shape [3]",
    ),
    (
        ("global_context_backward",),
        "kept",
        lambda t: torch.stack([t, t], 1)[:, 0],
        RuntimeError,
        "kept must be contiguous, got strides [2]",
    ),
    (
        ("global_context_backward",),
        "x",
        lambda t: None,
        RuntimeError,
        "x must be given for the gradients of x or mask_weight and for a mul branch, got None",
    ),
    (
        ("global_context_backward",),
        "mask_bias",
        lambda t: None,
        RuntimeError,
        "needed[2] asks for the gradient of what is not given",
    ),
    (
        ("global_context_backward",),
        "needed",
        lambda t: [*t[:9], True, *t[10:]],
        RuntimeError,
        "needed[9] asks for the gradient of what is not given",
    ),
    (("global_context_backward",), "kept", lambda t: t.double(), TypeError, "kept must be Float"),
]
# Of half x, what is in neither of the two types that fit, and a state that is not in the accumulation type.
REFUSED_OF_HALVES = [
    (("softmax_pool",), "logits", torch.bfloat16, "logits must be Half like x, or Float, got BFloat16"),
    (
        ("softmax_pool_backward", "attention_pool_backward"),
        "state",
        torch.half,
        "state must be Float, got Half",
    ),
    (("global_context_backward",), "kept", torch.half, "kept must be Float, got Half"),
    (
        ("broadcast", "broadcast_mul_backward"),
        "scale",
        torch.double,
        "scale must be Half like x, or Float, got Double",
    ),
]
CASES = [(operator, *case[1:]) for case in REFUSED for operator in case[0]]


def place(value, device):
    if isinstance(value, list):
        return [place(one, device) for one in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def call(operator, arguments, device):
    return getattr(torch.ops.gc_cuda, operator).default(*(place(one, device) for one in arguments.values()))


def refused(operator, arguments, device, error, words):
    with pytest.raises(error, match=re.escape(words)) as raised:
        call(operator, arguments, device)
    assert raised.type is error


@pytest.mark.parametrize("operator", ALL)
def test_what_fits_is_served(operator, device):
    for n in (2, 0):
        call(operator, valid(operator, n), device)


@pytest.mark.parametrize("n", [2, 0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_refused(case, n, device):
    operator, argument, change, error, words = case
    if n == 0 and "contiguous" in words:
        pytest.skip("what has no elements is contiguous")
    arguments = {name: place(value, device) for name, value in valid(operator, n).items()}
    arguments[argument] = change(arguments[argument])
    sizes = {"n": n, "ns": n * S, "nc": n * C, "state": n * (C + 2), "kept": n * (C + 2 + S + P + 1)}
    for name, value in sizes.items():
        words = words.replace(f"{{{name}}}", str(value))
    refused(operator, arguments, device, error, words)


@pytest.mark.parametrize("case", [(op, *case[1:]) for case in REFUSED_OF_HALVES for op in case[0]], ids=str)
def test_refused_of_halves(case, device):
    operator, argument, dtype, words = case
    arguments = valid(operator, 2)
    for name, value in arguments.items():
        if name in ("x", "grad"):
            arguments[name] = value.half()
    call(operator, arguments, device)
    arguments[argument] = arguments[argument].to(dtype)
    refused(operator, arguments, device, TypeError, words)


def test_a_broadcast_of_nothing(device):
    arguments = valid("broadcast", 2) | {"scale": None, "term": None}
    refused(
        "broadcast", arguments, device, ValueError, "broadcast needs a scale, a term or both, got neither"
    )


@pytest.mark.parametrize("operator", ALL)
def test_a_vector_on_another_device(operator, device):
    """Of two devices, the dispatcher asks CUDA or meta before the CPU."""
    if device == "cpu":
        pytest.skip("any other device is asked first")
    on_cpu = valid(operator, 2)
    arguments = {name: place(value, device) for name, value in on_cpu.items()}
    vectors = [name for name, value in on_cpu.items() if isinstance(value, torch.Tensor) and name != "x"]
    for name in vectors:
        words = f"{name} must be on {arguments['x'].device} like x, got cpu"
        with pytest.raises(RuntimeError, match=re.escape(words)):
            getattr(torch.ops.gc_cuda, operator).default(*(arguments | {name: on_cpu[name]}).values())
