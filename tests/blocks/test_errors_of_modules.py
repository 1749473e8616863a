"""Bad arguments of constructors and of functions on models: named, with what was expected and what it got."""

from __future__ import annotations

import re
from fractions import Fraction
from math import inf, nan

import numpy
import pytest
import torch

import gc_cuda
from gc_cuda import _values, blocks

X, WEIGHT = torch.zeros(2, 4, 3, 5), torch.zeros(4)


def test_block_with_other_channels():
    with pytest.raises(
        ValueError, match=re.escape("x must have 8 channels (as mask_weight and add), got shape [2, 4,")
    ):
        gc_cuda.ContextBlock(8, 1 / 2)(X)


@pytest.mark.parametrize("library", [gc_cuda, gc_cuda.reference], ids=["fused", "reference"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pooling_type": "max"}, AssertionError, "pooling_type must be one of ('avg', 'att'), got 'max'"),
        (
            {"fusion_types": ("channel_sub",)},
            AssertionError,
            "fusion_types must be among ('channel_add', 'channel_mul'), got 'channel_sub'",
        ),
        (
            {"fusion_types": "channel_add"},
            AssertionError,
            "fusion_types must be a list or tuple of ('channel_add', 'channel_mul'), got str 'channel_add'",
        ),
        (
            {"fusion_types": []},
            AssertionError,
            "fusion_types must name at least one of ('channel_add', 'channel_mul'), got []",
        ),
        (
            {"pooling_type": ["att"]},
            AssertionError,
            "pooling_type must be one of ('avg', 'att'), got ['att']",
        ),
        (
            {"fusion_types": [["channel_add"]]},
            AssertionError,
            "fusion_types must be among ('channel_add', 'channel_mul'), got ['channel_add']",
        ),
        (
            {"fusion_types": [numpy.array(["channel_add"] * 2)]},
            AssertionError,
            "fusion_types must be among ('channel_add', 'channel_mul'), got array(['channel_add'",
        ),
        (
            {"ratio": 1 / 32},
            ValueError,
            "ratio must leave at least one hidden unit: int(in_channels * ratio) is 0 for in_channels 16",
        ),
        (
            {"ratio": -1},
            ValueError,
            "ratio must leave at least one hidden unit: int(in_channels * ratio) is -16 for in_channels 16",
        ),
        *(
            ({"ratio": value}, ValueError, f"ratio must be finite, got {words}")
            for value, words in ((nan, "nan"), (inf, "inf"), (-inf, "-inf"), (10**400, "1e400 or so"))
        ),
        ({"ratio": 1e308}, ValueError, "in_channels * ratio must be finite, got inf"),
        ({"ratio": 1e30}, ValueError, "int(in_channels * ratio) must fit a 64-bit integer, got 1600"),
        ({"ratio": "0.25"}, TypeError, "ratio must be a number, got str '0.25'"),
        ({"ratio": None}, TypeError, "ratio must be a number, got NoneType"),
        ({"ratio": True}, TypeError, "ratio must be a number, got bool True"),
        ({"ratio": 1j}, TypeError, "ratio must be a number, got complex 1j"),
        ({"ratio": [0.5]}, TypeError, "ratio must be a number, got list"),
        ({"ratio": torch.ones(2)}, TypeError, "ratio must be a number, got Tensor"),
        ({"in_channels": 16.0}, TypeError, "in_channels must be an integer, got float 16.0"),
        ({"in_channels": True}, TypeError, "in_channels must be an integer, got bool True"),
        ({"in_channels": "16"}, TypeError, "in_channels must be an integer, got str '16'"),
        ({"in_channels": None}, TypeError, "in_channels must be an integer, got NoneType"),
        ({"in_channels": 0}, ValueError, "in_channels must be 1 or more, got 0"),
        ({"in_channels": -1}, ValueError, "in_channels must be 1 or more, got -1"),
        ({"in_channels": 10**400}, ValueError, "in_channels must fit a 64-bit integer, got 1e400 or so"),
        ({"eps": -1}, ValueError, "eps must be 0 or more, got -1"),
        ({"eps": nan}, ValueError, "eps must be 0 or more, got nan"),
        ({"eps": 10**400}, ValueError, "eps must be within the range of a float, got 1e400 or so"),
        ({"eps": "1e-5"}, TypeError, "eps must be a float or an int, got str '1e-5'"),
    ],
    ids=lambda value: "" if not isinstance(value, dict) else str(value),
)
def test_constructor(library, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        library.ContextBlock(**{"in_channels": 16, "ratio": 1 / 4, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": numpy.int64(16)},
        {"ratio": 1},
        {"ratio": numpy.float32(0.5)},
        {"ratio": Fraction(1, 4)},
        {"ratio": torch.tensor(0.25)},
        {"eps": 0},
        {"eps": inf},
        {"eps": numpy.float64(1e-6)},
        {"fusion_types": ["channel_add", "channel_add"]},
    ],
    ids=str,
)
def test_constructor_takes_every_kind_of_number(arguments):
    x = torch.randn(1, 16, 2, 2)
    assert torch.equal(gc_cuda.ContextBlock(**{"in_channels": 16, "ratio": 1 / 4, **arguments})(x), x)


# The checks that the blocks and the functions on models share: the check, a bad value, the error
BAD_VALUES = {
    "a number for a module": (_values.module, 5, TypeError, "it must be a torch.nn.Module, got int"),
    "none for a module": (_values.module, None, TypeError, "it must be a torch.nn.Module, got NoneType"),
    "a class for a module": (
        _values.module,
        torch.nn.ReLU,
        TypeError,
        "it must be a torch.nn.Module, got the class ReLU",
    ),
    "a module for a class": (
        _values.module_class,
        torch.nn.ReLU(),
        TypeError,
        "it must be a class, as torch.nn.ReLU, got an instance of ReLU",
    ),
    "a name for a class": (
        _values.module_class,
        "relu",
        TypeError,
        "it must be a class, as torch.nn.ReLU, got str 'relu'",
    ),
    "one name for several": (
        _values.names,
        "layer1",
        TypeError,
        "it must be a list or tuple of names, got str 'layer1'",
    ),
    "a number for names": (_values.names, 5, TypeError, "it must be a list or tuple of names, got int 5"),
    "a number among names": (
        _values.names,
        ["layer1", 2],
        TypeError,
        "it must be a list or tuple of names, got int 2 among them",
    ),
    "a float for a count": (_values.count, 8.0, TypeError, "it must be an integer, got float 8.0"),
    "zero for a count": (_values.count, 0, ValueError, "it must be 1 or more, got 0"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values(case):
    check, value, error, message = BAD_VALUES[case]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check(value, "it")


# what is called, with what, the error
BAD_MODEL_CALLS = {
    "insert into a number": (gc_cuda.insert, (5,), TypeError, "model must be a torch.nn.Module, got int"),
    "insert into a class": (
        gc_cuda.insert,
        (torch.nn.Sequential,),
        TypeError,
        "model must be a torch.nn.Module, got the class Sequential",
    ),
    "insert with one stage": (
        gc_cuda.insert,
        (torch.nn.Sequential(), "layer1"),
        TypeError,
        "stages must be a list or tuple of names, got str 'layer1'",
    ),
    "convert a list": (
        gc_cuda.convert_state_dict,
        ([1], "mmcv"),
        TypeError,
        "state_dict must map names to tensors, got list",
    ),
    "convert none": (
        gc_cuda.convert_state_dict,
        (None, "mmcv"),
        TypeError,
        "state_dict must map names to tensors, got NoneType",
    ),
    "convert a module": (
        gc_cuda.convert_state_dict,
        (torch.nn.ReLU(), "mmcv"),
        TypeError,
        "state_dict must map names to tensors, got ReLU; pass its state_dict()",
    ),
    "convert numbers": (
        gc_cuda.convert_state_dict,
        ({1: WEIGHT}, "mmcv"),
        TypeError,
        "state_dict must have names for keys, got int 1",
    ),
    "convert a norm that is no tensor": (
        gc_cuda.convert_state_dict,
        ({"a.channel_add_conv.1.weight": [1.0]}, "mmcv"),
        TypeError,
        "state_dict['a.channel_add_conv.1.weight'] must be a torch.Tensor, got list",
    ),
    "convert a mask that is no tensor": (
        gc_cuda.convert_state_dict,
        ({"conv_mask.bias": None}, "mmcv"),
        TypeError,
        "state_dict['conv_mask.bias'] must be a torch.Tensor, got NoneType",
    ),
    "convert a whole checkpoint": (
        gc_cuda.convert_state_dict,
        ({"epoch": 3, "state_dict": {"conv_mask.weight": WEIGHT}}, "mmcv"),
        ValueError,
        "got 2 others; are they in state_dict['state_dict']?",
    ),
    "convert from a list": (
        gc_cuda.convert_state_dict,
        ({}, ["timm"]),
        ValueError,
        "source must be one of ('gc_cuda', 'mmcv', 'gcnet', 'timm'), got ['timm']",
    ),
    "convert to none": (
        gc_cuda.convert_state_dict,
        ({}, "timm", None),
        ValueError,
        "target must be one of ('gc_cuda', 'mmcv', 'gcnet', 'timm'), got None",
    ),
}


@pytest.mark.parametrize("case", BAD_MODEL_CALLS)
def test_models(case):
    function, arguments, error, message = BAD_MODEL_CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments)


@pytest.mark.parametrize("function", [gc_cuda.accelerate, gc_cuda.restore], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("value", "got"),
    [(5, "int"), (None, "NoneType"), (torch.nn.ReLU, "the class ReLU"), ([torch.nn.ReLU()], "list")],
    ids=["a number", "none", "a class", "a list"],
)
def test_what_is_no_model(function, value, got):
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got {got}"):
        function(value)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (blocks.SEBlock, {"channels": 8.0}, TypeError, "channels must be an integer, got float 8.0"),
        (blocks.SEBlock, {"channels": 0}, ValueError, "channels must be 1 or more, got 0"),
        (blocks.SEBlock, {"channels": 8, "hidden": 0}, ValueError, "hidden must be 1 or more, got 0"),
        (blocks.SEBlock, {"channels": 8, "hidden": "2"}, TypeError, "hidden must be an integer, got str '2'"),
        (
            blocks.SEBlock,
            {"channels": 8, "act_layer": torch.nn.ReLU()},
            TypeError,
            "act_layer must be a class, as torch.nn.ReLU, got an instance of ReLU",
        ),
        (
            blocks.SEBlock,
            {"channels": 8, "gate_layer": 5},
            TypeError,
            "gate_layer must be a class, as torch.nn.ReLU, got int 5",
        ),
        (blocks.NonLocalBlock, {"in_channels": True}, TypeError, "in_channels must be an integer, got bool"),
        (
            blocks.NonLocalBlock,
            {"in_channels": 8, "reduction": 0},
            ValueError,
            "reduction must be 1 or more, got 0",
        ),
        (
            blocks.NonLocalBlock,
            {"in_channels": 8, "mode": ["gaussian"]},
            ValueError,
            "mode must be one of ('gaussian', 'embedded_gaussian', 'dot_product', 'concatenation'), got [",
        ),
        (blocks.SimplifiedNonLocalBlock, {"in_channels": -1}, ValueError, "in_channels must be 1 or more"),
    ],
    ids=lambda value: "" if not isinstance(value, dict) else str(value),
)
def test_constructors_of_the_relatives(kind, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kind(**arguments)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X[0], ValueError, "x must have shape [N, C, H, W], got [4, 3, 5]"),
        (X.long(), TypeError, "x must be torch.float32, float16, bfloat16 or float64, got torch.int64"),
        (X, ValueError, "x must have 8 channels (as the parameters), got shape [2, 4, 3, 5]"),
    ],
    ids=["rank", "integers", "channels"],
)
def test_maps_into_a_simplified_block(x, error, message):
    with pytest.raises(error, match=re.escape(message)):
        blocks.SimplifiedNonLocalBlock(8)(x)
