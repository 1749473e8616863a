"""Bad input: the error names the argument, what was expected and what it got, and nothing is touched."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gc_cuda
from gc_cuda import Transform, _extension

X = torch.arange(2 * 4 * 3 * 5, dtype=torch.float32).view(2, 4, 3, 5)
LOGITS, WEIGHT, BIAS, PER_CHANNEL = torch.zeros(2, 15), torch.zeros(4), torch.zeros(1), torch.zeros(2, 4)
# C = 4 channels and P = 3 hidden units
TRANSFORM = Transform(
    torch.zeros(3, 4, 1, 1),
    torch.zeros(3),
    torch.zeros(3, 1, 1),
    torch.zeros(3, 1, 1),
    torch.zeros(4, 3, 1, 1),
    torch.zeros(4),
)

TRANSFORM_OF_5 = Transform(
    torch.zeros(3, 5), torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(5, 3), torch.zeros(5)
)
DOUBLE, HALF = (
    Transform(*(tensor.to(dtype) for tensor in TRANSFORM)) for dtype in (torch.float64, torch.float16)
)

DENSE = "must be a dense (torch.strided) tensor, got"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a prototype, says PyTorch
    NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(2)])
    NESTED_X = torch.nested.nested_tensor([X[0], X[1]])

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

BAD_X = {
    "no tensor": ([[1.0]], TypeError, "x must be a torch.Tensor, got list"),
    "rank 3": (X[0], ValueError, "x must have shape [N, C, H, W], got [4, 3, 5]"),
    "rank 5": (X[None], ValueError, "x must have shape [N, C, H, W], got [1, 2, 4, 3, 5]"),
    "integers": (
        X.long(),
        TypeError,
        "x must be torch.float32, float16, bfloat16 or float64, got torch.int64",
    ),
    "booleans": (X > 0, TypeError, "x must be torch.float32, float16, bfloat16 or float64, got torch.bool"),
    "complex": (
        X + 0j,
        TypeError,
        "x must be torch.float32, float16, bfloat16 or float64, got torch.complex64",
    ),
    "sparse": (X.to_sparse(), TypeError, "x must be a dense (torch.strided) tensor, got torch.sparse_coo"),
    "an array": (X.numpy(), TypeError, "x must be a torch.Tensor, got ndarray"),
    "none": (None, TypeError, "x must be a torch.Tensor, got NoneType"),
    "no rows": (
        X[:, :, :0],
        ValueError,
        "x must have at least one channel and one pixel, got shape [2, 4, 0, 5]",
    ),
    "no columns": (
        X[..., :0],
        ValueError,
        "x must have at least one channel and one pixel, got shape [2, 4, 3, 0]",
    ),
    "no channels": (
        X[:, :0],
        ValueError,
        "x must have at least one channel and one pixel, got shape [2, 0, 3, 5]",
    ),
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

# what is called, the place of the bad argument among those after x, its value, the error
BAD_COMPANIONS = {
    "logits of another N": ("softmax_pool", 0, LOGITS[:1], ValueError, f"{LOGITS_SHAPES} [1, 15]"),
    "logits of another S": ("softmax_pool", 0, LOGITS[:, :14], ValueError, f"{LOGITS_SHAPES} [2, 14]"),
    "logits with H and W swapped": (
        "softmax_pool",
        0,
        torch.zeros(2, 1, 5, 3),
        ValueError,
        f"{LOGITS_SHAPES} [2, 1, 5, 3]",
    ),
    "logits of rank 3": ("softmax_pool", 0, torch.zeros(2, 3, 5), ValueError, f"{LOGITS_SHAPES} [2, 3, 5]"),
    "integer logits": (
        "softmax_pool",
        0,
        LOGITS.long(),
        TypeError,
        "logits must be torch.float32 like x, got torch.int64",
    ),
    "logits of another dtype": (
        "softmax_pool",
        0,
        LOGITS.double(),
        TypeError,
        "logits must be torch.float32 like x, got torch.float64",
    ),
    "mask_weight of another C": (
        "attention_pool",
        0,
        torch.zeros(1, 5, 1, 1),
        ValueError,
        "mask_weight must have 4 elements (C of x), as in [4] or [1, 4, 1, 1], got shape [1, 5, 1, 1]",
    ),
    "no mask_weight": (
        "attention_pool",
        0,
        None,
        TypeError,
        "mask_weight must be a torch.Tensor, got NoneType",
    ),
    "mask_bias with two elements": (
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
        "scale must be a dense (torch.strided) tensor, got torch.sparse_coo",
    ),
    "nested logits": ("softmax_pool", 0, NESTED, TypeError, f"logits {DENSE} a nested one"),
    "nested mask_weight": ("attention_pool", 0, NESTED, TypeError, f"mask_weight {DENSE} a nested one"),
    "nested mask_bias": ("attention_pool", 1, NESTED, TypeError, f"mask_bias {DENSE} a nested one"),
    "nested term": ("broadcast_mul_add", 1, NESTED, TypeError, f"term {DENSE} a nested one"),
    "half scale for float32 x": (
        "broadcast_mul_add",
        0,
        PER_CHANNEL.half(),
        TypeError,
        "scale must be torch.float32 like x, got torch.float16",
    ),
    "term on another device": (
        "broadcast_mul_add",
        1,
        PER_CHANNEL.to("meta"),
        ValueError,
        "term must be on cpu like x, got meta",
    ),
    "logits on another device": (
        "softmax_pool",
        0,
        LOGITS.to("meta"),
        ValueError,
        "logits must be on cpu like x, got meta",
    ),
}


VALID = {"mask_weight": WEIGHT, "mask_bias": BIAS, "add": TRANSFORM, "mul": TRANSFORM}

# the arguments that differ from the valid ones, the error
BAD_BLOCKS = {
    "unknown pooling": (
        {"pooling_type": "max"},
        ValueError,
        "pooling_type must be one of ('avg', 'att'), got 'max'",
    ),
    "att without weight": (
        {"mask_weight": None},
        ValueError,
        'mask_weight must be given for pooling_type "att", got None; pass the C weights of the mask, or use '
        'pooling_type "avg"',
    ),
    "avg with weight": (
        {"pooling_type": "avg"},
        ValueError,
        'mask_weight must be None for pooling_type "avg", which has no mask, got shape [4]; leave it out',
    ),
    "avg with bias": (
        {"pooling_type": "avg", "mask_weight": None},
        ValueError,
        'mask_bias must be None for pooling_type "avg", which has no mask, got shape [1]; leave it out',
    ),
    "no branch": (
        {"add": None, "mul": None},
        ValueError,
        "add or mul must be given, got None for both; pass a Transform for one of them",
    ),
    "mask_weight of another C": (
        {"mask_weight": torch.zeros(5)},
        ValueError,
        "mask_weight must have 4 elements (C of x), as in [4] or [1, 4, 1, 1], got shape [5]",
    ),
    "mask_bias with two elements": (
        {"mask_bias": torch.zeros(2)},
        ValueError,
        "mask_bias must have 1 element, got shape [2]",
    ),
    "negative eps": ({"eps": -1e-5}, ValueError, "eps must be 0 or more, got -1e-05"),
    "eps, a NaN": ({"eps": float("nan")}, ValueError, "eps must be 0 or more, got nan"),
    "unknown activation": (
        {"activation": "gelu"},
        ValueError,
        "activation must be one of ('relu', 'silu', 'hardswish'), got 'gelu'",
    ),
    "unknown gate": (
        {"gate": "tanh"},
        ValueError,
        "gate must be one of ('sigmoid', 'hardsigmoid'), got 'tanh'",
    ),
    "half a norm": (
        {"add": TRANSFORM._replace(norm_bias=None)},
        TypeError,
        "add.norm_weight and add.norm_bias must both be tensors or both None (no layer norm), got Tensor and "
        "NoneType",
    ),
    "eps, a tensor": ({"eps": BIAS}, TypeError, "eps must be a float or an int, got Tensor"),
    "eps, a string": ({"eps": "1e-5"}, TypeError, "eps must be a float or an int, got str '1e-5'"),
    "eps, a boolean": ({"eps": True}, TypeError, "eps must be a float or an int, got bool True"),
    "eps, none": ({"eps": None}, TypeError, "eps must be a float or an int, got NoneType"),
    "eps beyond a float": (
        {"eps": 10**400},
        ValueError,
        "eps must be within the range of a float, got 1e400 or so",
    ),
    "eps of more digits than Python prints": (
        {"eps": -(10**5000)},
        ValueError,
        "eps must be 0 or more, got -1e5",
    ),
    "activation, a list": (
        {"activation": ["relu"]},
        ValueError,
        "activation must be one of ('relu', 'silu', 'hardswish'), got ['relu']",
    ),
    "activation, an array": (
        {"activation": numpy.array(["relu", "silu"])},
        ValueError,
        "activation must be one of ('relu', 'silu', 'hardswish'), got array(['relu', 'silu'], dtype='<U4')",
    ),
    "activation, a module": (
        {"activation": torch.nn.ReLU()},
        ValueError,
        "activation must be one of ('relu', 'silu', 'hardswish'), got ReLU()",
    ),
    "gate, a set": (
        {"gate": {"sigmoid"}},
        ValueError,
        "gate must be one of ('sigmoid', 'hardsigmoid'), got {'sigmoid'}",
    ),
    "gate, none": ({"gate": None}, ValueError, "gate must be one of ('sigmoid', 'hardsigmoid'), got None"),
    "pooling, a list": (
        {"pooling_type": ["att"]},
        ValueError,
        "pooling_type must be one of ('avg', 'att'), got ['att']",
    ),
    "pooling, an array": (
        {"pooling_type": numpy.array(["att", "avg"])},
        ValueError,
        "pooling_type must be one of ('avg', 'att'), got array(['att', 'avg']",
    ),
    "nested mask_weight": ({"mask_weight": NESTED}, TypeError, f"mask_weight {DENSE} a nested one"),
    "nested mask_bias": ({"mask_bias": NESTED}, TypeError, f"mask_bias {DENSE} a nested one"),
    "x of other channels than all": (
        {"mask_weight": torch.zeros(5), "add": None, "mul": TRANSFORM_OF_5},
        ValueError,
        "x must have 5 channels (as mask_weight and mul), got shape [2, 4, 3, 5]",
    ),
    "x of other channels than both branches": (
        {
            "pooling_type": "avg",
            "mask_weight": None,
            "mask_bias": None,
            "add": TRANSFORM_OF_5,
            "mul": TRANSFORM_OF_5,
        },
        ValueError,
        "x must have 5 channels (as add and mul), got shape [2, 4, 3, 5]",
    ),
    "x of other channels than all but one": (
        {"add": TRANSFORM_OF_5, "mul": TRANSFORM_OF_5},
        ValueError,
        "add.w1 must have shape [3, 4] (P of b1, C of x) or [3, 4, 1, 1], got [3, 5]",
    ),
    "x of another dtype than all": (
        {"mask_weight": WEIGHT.double(), "add": DOUBLE, "mul": None, "mask_bias": None},
        TypeError,
        "x must be torch.float64 like mask_weight and add, got torch.float32",
    ),
    "half parameters": (
        {"mask_weight": None, "mask_bias": None, "pooling_type": "avg", "add": None, "mul": HALF},
        TypeError,
        "x must be torch.float16 like mul, got torch.float32",
    ),
    "add, a tensor": ({"add": WEIGHT}, TypeError, "add must be a gc_cuda.Transform or None, got Tensor"),
    "mul of five tensors": (
        {"mul": TRANSFORM[:5]},
        TypeError,
        "mul must have the tensors w1, b1, norm_weight, norm_bias, w2, b2, got 5 of them",
    ),
    "five tensors and seven": (
        {"add": TRANSFORM[:5], "mul": TRANSFORM[5:] + TRANSFORM},
        TypeError,
        "add must have the tensors w1, b1, norm_weight, norm_bias, w2, b2, got 5 of them",
    ),
    "add of six times nothing": (
        {"add": (None,) * 6},
        TypeError,
        "add.w1 must be a torch.Tensor, got NoneType",
    ),
    "add, an empty tuple": (
        {"add": ()},
        TypeError,
        "add must have the tensors w1, b1, norm_weight, norm_bias, w2, b2, got 0 of them",
    ),
    "add, an iterator": (
        {"add": iter(TRANSFORM)},
        TypeError,
        "add must be a gc_cuda.Transform or None, got tuple_iterator",
    ),
    "mask_weight on another device": (
        {"mask_weight": WEIGHT.to("meta")},
        ValueError,
        "mask_weight must be on cpu like x, got meta",
    ),
    "mask_bias on another device": (
        {"mask_bias": BIAS.to("meta")},
        ValueError,
        "mask_bias must be on cpu like x, got meta",
    ),
    "all but x on another device": (
        {
            "mask_weight": WEIGHT.to("meta"),
            "mask_bias": None,
            "add": Transform(*(tensor.to("meta") for tensor in TRANSFORM)),
            "mul": None,
        },
        ValueError,
        "mask_weight must be on cpu like x, got meta",
    ),
}

# the field of the transform, its value, the error without the field's name
BAD_FIELDS = {
    "transposed w1": (
        "w1",
        torch.zeros(4, 3),
        ValueError,
        "must have shape [3, 4] (P of b1, C of x) or [3, 4, 1, 1], got [4, 3]",
    ),
    "w1 of another C": (
        "w1",
        torch.zeros(3, 5, 1, 1),
        ValueError,
        "must have shape [3, 4] (P of b1, C of x) or [3, 4, 1, 1], got [3, 5, 1, 1]",
    ),
    "w1 of a larger convolution": (
        "w1",
        torch.zeros(3, 4, 3, 3),
        ValueError,
        "must have shape [3, 4] (P of b1, C of x) or [3, 4, 1, 1], got [3, 4, 3, 3]",
    ),
    "transposed w2": (
        "w2",
        torch.zeros(3, 4, 1, 1),
        ValueError,
        "must have shape [4, 3] (C of x, P of b1) or [4, 3, 1, 1], got [3, 4, 1, 1]",
    ),
    "no hidden unit": (
        "b1",
        torch.zeros(0),
        ValueError,
        "must have at least one element (a hidden unit), got shape [0]",
    ),
    "norm_weight of another P": (
        "norm_weight",
        torch.zeros(2),
        ValueError,
        "must have 3 elements (P of b1), got shape [2]",
    ),
    "norm_bias of another P": (
        "norm_bias",
        torch.zeros(4, 1, 1),
        ValueError,
        "must have 3 elements (P of b1), got shape [4, 1, 1]",
    ),
    "b2 of another C": ("b2", torch.zeros(3), ValueError, "must have 4 elements (C of x), got shape [3]"),
    "no b2": ("b2", None, TypeError, "must be a torch.Tensor, got NoneType"),
    "double b1": (
        "b1",
        torch.zeros(3).double(),
        TypeError,
        "must be torch.float32 like x, got torch.float64",
    ),
    "half w2": ("w2", torch.zeros(4, 3).half(), TypeError, "must be torch.float32 like x, got torch.float16"),
    "sparse w1": (
        "w1",
        torch.zeros(3, 4).to_sparse(),
        TypeError,
        "must be a dense (torch.strided) tensor, got torch.sparse_coo",
    ),
    "nested w1": ("w1", NESTED, TypeError, f"{DENSE} a nested one"),
    "nested b1": ("b1", NESTED, TypeError, f"{DENSE} a nested one"),
    "nested norm_bias": ("norm_bias", NESTED, TypeError, f"{DENSE} a nested one"),
    "w2, an array": ("w2", numpy.zeros((4, 3)), TypeError, "must be a torch.Tensor, got ndarray"),
    "norm_weight on another device": (
        "norm_weight",
        torch.zeros(3, device="meta"),
        ValueError,
        "must be on cpu like x, got meta",
    ),
}


@pytest.fixture(params=[True, False], ids=["gradients", "no gradients"])
def gradients(request):
    """The operator is called inside an autograd.Function, or directly."""
    with torch.set_grad_enabled(request.param):
        yield


@pytest.mark.parametrize("case", BAD_BLOCKS)
def test_global_context(case, gradients):
    arguments, error, message = BAD_BLOCKS[case]
    with pytest.raises(error, match=re.escape(message)) as raised:
        gc_cuda.global_context(X, **VALID | arguments)
    assert raised.value.__suppress_context__, "without the operator's own error"


@pytest.mark.parametrize("branch", ["add", "mul"])
@pytest.mark.parametrize("case", BAD_FIELDS)
def test_transform(case, branch, gradients):
    field, value, error, message = BAD_FIELDS[case]
    with pytest.raises(error, match=re.escape(f"{branch}.{field} {message}")):
        gc_cuda.global_context(X, **VALID | {branch: TRANSFORM._replace(**{field: value})})


def test_the_first_of_two_errors_is_told():
    with pytest.raises(ValueError, match="x must have shape"):
        gc_cuda.global_context(X[0], pooling_type="max", eps=-1)


def test_an_error_that_no_argument_explains_stays_what_it_is(gradients):
    class OutOfMemory(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise MemoryError("no memory for the output")

    with OutOfMemory(), pytest.raises(MemoryError, match="no memory for the output"):
        gc_cuda.global_context(X, **VALID)


# The checks run only when the operator has failed: it must reject by itself what they reject.
# The arguments that differ from the valid ones, in its own terms:
OPERANDS = {
    "x": X,
    "mask_weight": WEIGHT,
    "mask_bias": BIAS,
    "add": list(TRANSFORM),
    "mul": list(TRANSFORM),
    "eps": 1e-5,
    "activation": 0,
    "gate": 0,
}
BAD_OPERANDS = {
    **{f"x: {case}": {"x": value} for case, (value, *_) in BAD_X.items()},
    **{
        f"{branch}.{field}: {case}": {branch: list(TRANSFORM._replace(**{field: value}))}
        for case, (field, value, *_) in BAD_FIELDS.items()
        for branch in ("add", "mul")
    },
    **{
        f"{branch}.{field}: None": {branch: list(TRANSFORM._replace(**{field: None}))}
        for field in Transform._fields
        for branch in ("add", "mul")
    },
    "x: None": {"x": None},
    "mask_weight of another C": {"mask_weight": torch.zeros(5)},
    "half mask_weight": {"mask_weight": WEIGHT.half()},
    "sparse mask_weight": {"mask_weight": WEIGHT.to_sparse()},
    "mask_weight, a list": {"mask_weight": [1.0] * 4},
    "mask_weight on another device": {"mask_weight": WEIGHT.to("meta")},
    "mask_bias with two elements": {"mask_bias": torch.zeros(2)},
    "mask_bias, a number": {"mask_bias": 0.5},
    "double mask_bias": {"mask_bias": BIAS.double()},
    "mask_bias on another device": {"mask_bias": BIAS.to("meta")},
    "mask_bias alone": {"mask_weight": None},
    "no branch": {"add": [], "mul": []},
    "add of three tensors": {"add": list(TRANSFORM[:3])},
    "mul of five tensors": {"mul": list(TRANSFORM[:5])},
    "mul, no list": {"mul": None},
    "negative eps": {"eps": -1e-5},
    "eps, a NaN": {"eps": float("nan")},
    "unknown activation": {"activation": 3},
    "negative activation": {"activation": -1},
    "unknown gate": {"gate": 2},
    "negative gate": {"gate": -1},
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_the_operator_rejects(case, device):
    def place(value):
        if isinstance(value, list):
            return [place(one) for one in value]
        if not isinstance(value, torch.Tensor) or device == "cpu":
            return value
        return value.to("cpu" if value.is_meta else "meta")

    operator = torch.ops.gc_cuda.global_context.default
    operator(*map(place, OPERANDS.values()))
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        operator(*map(place, (OPERANDS | BAD_OPERANDS[case]).values()))


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
