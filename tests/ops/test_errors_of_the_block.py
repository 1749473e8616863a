"""Bad input of the whole block: the function's errors, and what its operator rejects by itself."""

from __future__ import annotations

import re

import numpy
import pytest
import torch
from error_cases import BAD_X, BIAS, DENSE, NESTED, TRANSFORM, WEIGHT, X
from torch.utils._python_dispatch import TorchDispatchMode

import gc_cuda
from gc_cuda import Transform

TRANSFORM_OF_5 = Transform(
    torch.zeros(3, 5), torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(5, 3), torch.zeros(5)
)
DOUBLE, HALF = (
    Transform(*(tensor.to(dtype) for tensor in TRANSFORM)) for dtype in (torch.float64, torch.float16)
)
ELSEWHERE = Transform(*(tensor.to("meta") for tensor in TRANSFORM))

VALID = {"mask_weight": WEIGHT, "mask_bias": BIAS, "add": TRANSFORM, "mul": TRANSFORM}
NO_MASK = {"pooling_type": "avg", "mask_weight": None, "mask_bias": None}

POOLING = "pooling_type must be one of ('avg', 'att'), got"
ACTIVATION = "activation must be one of ('relu', 'silu', 'hardswish'), got"
GATE = "gate must be one of ('sigmoid', 'hardsigmoid'), got"
EPS = "eps must be a float or an int, got"
SIX = "must have the tensors w1, b1, norm_weight, norm_bias, w2, b2, got"
W1 = "must have shape [3, 4] (P of b1, C of x) or [3, 4, 1, 1], got"
LIKE_X = "must be torch.float32 like x, got"
HERE = "must be on cpu like x, got meta"

# the arguments that differ from the valid ones, the error
BAD_BLOCKS = {
    "unknown pooling": ({"pooling_type": "max"}, ValueError, f"{POOLING} 'max'"),
    "pooling, a list": ({"pooling_type": ["att"]}, ValueError, f"{POOLING} ['att']"),
    "pooling, an array": (
        {"pooling_type": numpy.array(["att", "avg"])},
        ValueError,
        f"{POOLING} array(['att', 'avg']",
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
    "two biases": ({"mask_bias": torch.zeros(2)}, ValueError, "mask_bias must have 1 element, got shape [2]"),
    "nested mask_weight": ({"mask_weight": NESTED}, TypeError, f"mask_weight {DENSE} a nested one"),
    "nested mask_bias": ({"mask_bias": NESTED}, TypeError, f"mask_bias {DENSE} a nested one"),
    "negative eps": ({"eps": -1e-5}, ValueError, "eps must be 0 or more, got -1e-05"),
    "eps, a NaN": ({"eps": float("nan")}, ValueError, "eps must be 0 or more, got nan"),
    "eps, a tensor": ({"eps": BIAS}, TypeError, f"{EPS} Tensor"),
    "eps, a string": ({"eps": "1e-5"}, TypeError, f"{EPS} str '1e-5'"),
    "eps, a boolean": ({"eps": True}, TypeError, f"{EPS} bool True"),
    "eps, none": ({"eps": None}, TypeError, f"{EPS} NoneType"),
    "large eps": ({"eps": 10**400}, ValueError, "eps must be within the range of a float, got 1e400 or so"),
    "eps of more digits than Python prints": (
        {"eps": -(10**5000)},
        ValueError,
        "eps must be 0 or more, got -1e5",
    ),
    "unknown activation": ({"activation": "gelu"}, ValueError, f"{ACTIVATION} 'gelu'"),
    "activation, a list": ({"activation": ["relu"]}, ValueError, f"{ACTIVATION} ['relu']"),
    "activation, an array": (
        {"activation": numpy.array(["relu", "silu"])},
        ValueError,
        f"{ACTIVATION} array(['relu', 'silu'], dtype='<U4')",
    ),
    "activation, a module": ({"activation": torch.nn.ReLU()}, ValueError, f"{ACTIVATION} ReLU()"),
    "unknown gate": ({"gate": "tanh"}, ValueError, f"{GATE} 'tanh'"),
    "gate, a set": ({"gate": {"sigmoid"}}, ValueError, f"{GATE} {{'sigmoid'}}"),
    "gate, none": ({"gate": None}, ValueError, f"{GATE} None"),
    "half a norm": (
        {"add": TRANSFORM._replace(norm_bias=None)},
        TypeError,
        "add.norm_weight and add.norm_bias must both be tensors or both None (no layer norm), got Tensor and "
        "NoneType",
    ),
    "x of other channels than all": (
        {"mask_weight": torch.zeros(5), "add": None, "mul": TRANSFORM_OF_5},
        ValueError,
        "x must have 5 channels (as mask_weight and mul), got shape [2, 4, 3, 5]",
    ),
    "x of other channels than both branches": (
        {**NO_MASK, "add": TRANSFORM_OF_5, "mul": TRANSFORM_OF_5},
        ValueError,
        "x must have 5 channels (as add and mul), got shape [2, 4, 3, 5]",
    ),
    "x of other channels than all but one": (
        {"add": TRANSFORM_OF_5, "mul": TRANSFORM_OF_5},
        ValueError,
        f"add.w1 {W1} [3, 5]",
    ),
    "x of another dtype than all": (
        {"mask_weight": WEIGHT.double(), "add": DOUBLE, "mul": None, "mask_bias": None},
        TypeError,
        "x must be torch.float64 like mask_weight and add, got torch.float32",
    ),
    "half parameters": (
        {**NO_MASK, "add": None, "mul": HALF},
        TypeError,
        "x must be torch.float16 like mul, got torch.float32",
    ),
    "a tensor": ({"add": WEIGHT}, TypeError, "add must be a gc_cuda.Transform or None, got Tensor"),
    "an iterator": (
        {"add": iter(TRANSFORM)},
        TypeError,
        "add must be a gc_cuda.Transform or None, got tuple_iterator",
    ),
    "mul of five tensors": ({"mul": TRANSFORM[:5]}, TypeError, f"mul {SIX} 5 of them"),
    "five and seven": (
        {"add": TRANSFORM[:5], "mul": TRANSFORM[5:] + TRANSFORM},
        TypeError,
        f"add {SIX} 5 of them",
    ),
    "add, an empty tuple": ({"add": ()}, TypeError, f"add {SIX} 0 of them"),
    "six times nothing": ({"add": (None,) * 6}, TypeError, "add.w1 must be a torch.Tensor, got NoneType"),
    "mask_weight elsewhere": ({"mask_weight": WEIGHT.to("meta")}, ValueError, f"mask_weight {HERE}"),
    "mask_bias elsewhere": ({"mask_bias": BIAS.to("meta")}, ValueError, f"mask_bias {HERE}"),
    "all but x elsewhere": (
        {"mask_weight": WEIGHT.to("meta"), "mask_bias": None, "add": ELSEWHERE, "mul": None},
        ValueError,
        f"mask_weight {HERE}",
    ),
}

# the field of the transform, its value, the error without the field's name
BAD_FIELDS = {
    "transposed w1": ("w1", torch.zeros(4, 3), ValueError, f"{W1} [4, 3]"),
    "w1 of another C": ("w1", torch.zeros(3, 5, 1, 1), ValueError, f"{W1} [3, 5, 1, 1]"),
    "w1 of a larger convolution": ("w1", torch.zeros(3, 4, 3, 3), ValueError, f"{W1} [3, 4, 3, 3]"),
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
    "norm of another P": (
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
    "w2, an array": ("w2", numpy.zeros((4, 3)), TypeError, "must be a torch.Tensor, got ndarray"),
    "double b1": ("b1", torch.zeros(3).double(), TypeError, f"{LIKE_X} torch.float64"),
    "half w2": ("w2", torch.zeros(4, 3).half(), TypeError, f"{LIKE_X} torch.float16"),
    "sparse w1": ("w1", torch.zeros(3, 4).to_sparse(), TypeError, f"{DENSE} torch.sparse_coo"),
    "nested w1": ("w1", NESTED, TypeError, f"{DENSE} a nested one"),
    "nested b1": ("b1", NESTED, TypeError, f"{DENSE} a nested one"),
    "nested norm_bias": ("norm_bias", NESTED, TypeError, f"{DENSE} a nested one"),
    "norm_weight elsewhere": ("norm_weight", torch.zeros(3, device="meta"), ValueError, HERE),
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
