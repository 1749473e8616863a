"""Bad input: the error names the argument, what was expected and what it got, and nothing is touched."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from error_cases import BAD_X, BIAS, DENSE, LOGITS, NESTED, NESTED_X, PER_CHANNEL, TRANSFORM, WEIGHT, X
from torch._subclasses.fake_tensor import FakeTensorMode

import gc_cuda
from gc_cuda import _extension

CALLS = {
    "softmax_pool": (gc_cuda.softmax_pool, (LOGITS,)),
    "attention_pool": (gc_cuda.attention_pool, (WEIGHT, BIAS)),
    "average_pool": (gc_cuda.average_pool, ()),
    "broadcast_add": (gc_cuda.broadcast_add, (PER_CHANNEL,)),
    "broadcast_mul": (gc_cuda.broadcast_mul, (PER_CHANNEL,)),
    "broadcast_mul_add": (gc_cuda.broadcast_mul_add, (PER_CHANNEL, PER_CHANNEL)),
    "global_context": (gc_cuda.global_context, (WEIGHT, BIAS, TRANSFORM, TRANSFORM)),
    "ContextBlock": (gc_cuda.ContextBlock(4, 1 / 2), ()),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bad", BAD_X)
def test_x(call, bad):
    function, companions = CALLS[call]
    x, error, message = BAD_X[bad]
    with pytest.raises(error, match=re.escape(message)):
        function(x, *companions)


@pytest.mark.parametrize("call", CALLS)
def test_nested_x(call):
    function, companions = CALLS[call]
    with pytest.raises(TypeError, match=re.escape(f"x {DENSE} a nested one")):
        function(NESTED_X, *companions)


PER_CHANNEL_SHAPES = "must have shape [2, 4] or [2, 4, 1, 1] (N and C of x), got"
LOGITS_SHAPES = "logits must have shape [2, 15] or [2, 1, 3, 5] (N, H and W of x), got"
WEIGHT_SHAPE = "mask_weight must have 4 elements (C of x), as in [4] or [1, 4, 1, 1], got shape"
LIKE_X = "must be torch.float32 like x, got"

# what is called, the place of the bad argument among those after x, its value, the error
BAD_COMPANIONS = {
    "logits of another N": ("softmax_pool", 0, LOGITS[:1], ValueError, f"{LOGITS_SHAPES} [1, 15]"),
    "logits of another S": ("softmax_pool", 0, LOGITS[:, :14], ValueError, f"{LOGITS_SHAPES} [2, 14]"),
    "swapped logits": (
        "softmax_pool",
        0,
        torch.zeros(2, 1, 5, 3),
        ValueError,
        f"{LOGITS_SHAPES} [2, 1, 5, 3]",
    ),
    "logits of rank 3": ("softmax_pool", 0, torch.zeros(2, 3, 5), ValueError, f"{LOGITS_SHAPES} [2, 3, 5]"),
    "integer logits": ("softmax_pool", 0, LOGITS.long(), TypeError, f"logits {LIKE_X} torch.int64"),
    "double logits": ("softmax_pool", 0, LOGITS.double(), TypeError, f"logits {LIKE_X} torch.float64"),
    "logits elsewhere": (
        "softmax_pool",
        0,
        LOGITS.to("meta"),
        ValueError,
        "logits must be on cpu like x, got meta",
    ),
    "nested logits": ("softmax_pool", 0, NESTED, TypeError, f"logits {DENSE} a nested one"),
    "mask_weight of another C": (
        "attention_pool",
        0,
        torch.zeros(1, 5, 1, 1),
        ValueError,
        f"{WEIGHT_SHAPE} [1, 5, 1, 1]",
    ),
    "no mask_weight": (
        "attention_pool",
        0,
        None,
        TypeError,
        "mask_weight must be a torch.Tensor, got NoneType",
    ),
    "nested mask_weight": ("attention_pool", 0, NESTED, TypeError, f"mask_weight {DENSE} a nested one"),
    "two biases": (
        "attention_pool",
        1,
        torch.zeros(2),
        ValueError,
        "mask_bias must have 1 element, got shape [2]",
    ),
    "mask_bias, a number": (
        "attention_pool",
        1,
        0.5,
        TypeError,
        "mask_bias must be a torch.Tensor, got float",
    ),
    "nested mask_bias": ("attention_pool", 1, NESTED, TypeError, f"mask_bias {DENSE} a nested one"),
    "term of another N": (
        "broadcast_add",
        0,
        torch.zeros(1, 4),
        ValueError,
        f"term {PER_CHANNEL_SHAPES} [1, 4]",
    ),
    "term of another C": (
        "broadcast_add",
        0,
        torch.zeros(2, 3),
        ValueError,
        f"term {PER_CHANNEL_SHAPES} [2, 3]",
    ),
    "term of x's shape": ("broadcast_add", 0, X, ValueError, f"term {PER_CHANNEL_SHAPES} [2, 4, 3, 5]"),
    "term of rank 1": ("broadcast_add", 0, torch.zeros(4), ValueError, f"term {PER_CHANNEL_SHAPES} [4]"),
    "scale of another C": (
        "broadcast_mul",
        0,
        torch.zeros(2, 8),
        ValueError,
        f"scale {PER_CHANNEL_SHAPES} [2, 8]",
    ),
    "sparse scale": (
        "broadcast_mul",
        0,
        PER_CHANNEL.to_sparse(),
        TypeError,
        f"scale {DENSE} torch.sparse_coo",
    ),
    "half scale": ("broadcast_mul_add", 0, PER_CHANNEL.half(), TypeError, f"scale {LIKE_X} torch.float16"),
    "nested term": ("broadcast_mul_add", 1, NESTED, TypeError, f"term {DENSE} a nested one"),
    "term elsewhere": (
        "broadcast_mul_add",
        1,
        PER_CHANNEL.to("meta"),
        ValueError,
        "term must be on cpu like x, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD_COMPANIONS)
def test_companions(case):
    name, place, value, error, message = BAD_COMPANIONS[case]
    function, companions = CALLS[name]
    arguments = [*companions]
    arguments[place] = value
    before = X.clone()
    with pytest.raises(error, match=re.escape(message)):
        function(X, *arguments)
    assert torch.equal(X, before)


def test_half_x_names_both_dtypes_that_fit():
    with pytest.raises(
        TypeError, match=r"term must be torch\.float16 like x, or torch\.float32, got torch\.bfloat16"
    ):
        gc_cuda.broadcast_add(X.half(), PER_CHANNEL.bfloat16())


@pytest.mark.parametrize("call", CALLS)
def test_an_error_leaves_autograd_and_the_library_usable(call):
    function, companions = CALLS[call]
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="x must have shape"):
        function(x[0], *companions)
    function(x, *companions).sum().backward()
    assert x.grad.shape == x.shape
    assert x._version == 0


def test_empty_batch_is_no_error():
    x = torch.empty(0, 4, 3, 5, requires_grad=True)
    assert gc_cuda.softmax_pool(x, torch.empty(0, 15)).shape == (0, 4)
    assert gc_cuda.attention_pool(x, WEIGHT, BIAS).shape == (0, 4)
    assert gc_cuda.average_pool(x).shape == (0, 4)
    assert gc_cuda.broadcast_mul_add(x, torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 4, 3, 5)
    block = gc_cuda.ContextBlock(4, 1 / 2)
    out = block(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(block.conv_mask.weight.grad, torch.zeros(1, 4, 1, 1))


def test_integers_are_no_feature_map_under_autocast_either():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"float64, got torch\.int64"),
    ):
        gc_cuda.ContextBlock(4, 1 / 2)(X.long())


@pytest.mark.parametrize("call", CALLS)
def test_unsupported_device_is_named(call):
    function, companions = CALLS[call]
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 4, 3, 5, device="xpu")
        with pytest.raises(ValueError, match="x must be on a CPU or CUDA device, got xpu:0"):
            function(x, *companions)


@pytest.mark.skipif(_extension.has_cuda(), reason="this build has the CUDA kernels")
@pytest.mark.parametrize("call", CALLS)
def test_cuda_tensor_on_a_cpu_build_says_what_to_run(call):
    function, companions = CALLS[call]
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 4, 3, 5, device="cuda")
        with pytest.raises(ImportError, match=r"FORCE_CUDA=1 \./compile\.sh"):
            function(x, *companions)


def test_without_the_extension_the_import_works_and_a_call_says_what_to_run():
    program = """
import sys
sys.modules["gc_cuda._C"] = None  # import of it raises ModuleNotFoundError
import torch, gc_cuda
x = torch.ones(1, 4, 2, 2)
assert torch.equal(gc_cuda.reference.average_pool(x), torch.ones(1, 4))
try:
    gc_cuda.average_pool(x)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "run ./compile.sh" in done.stdout
