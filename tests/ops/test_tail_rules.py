"""bn_context_add_relu keeps the rules: derivatives of both orders, torch's for operators, the compiler's; and
its errors name the argument, what was expected and what it got.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from block_cases import Configuration
from tail_cases import GC_TRAIN, NO_BLOCK, RUNNING, TAILS, Tail, draw_tail, tail_of
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import gc_cuda
from gc_cuda import BatchNorm, Transform, reference

SMALL = (2, 3, 2, 3)


def call_with_fixed_statistics(tail, inputs):
    """The tail as a function that finds the same running statistics in every call, and its inputs."""
    leaves = {name: tensor.requires_grad_(name not in RUNNING) for name, tensor in inputs.items()}
    statistics = {name: leaves.pop(name).detach() for name in RUNNING if name in leaves}

    def call(*tensors):
        copies = {name: value.clone() for name, value in statistics.items()}
        return tail_of(gc_cuda, tail, leaves, copies)(*tensors)

    return call, tuple(leaves.values())


@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_first_and_second_derivatives(random, tail, layout):
    call, leaves = call_with_fixed_statistics(tail, draw_tail(random, tail, SMALL, layout=layout))
    slow = tail.block == TAILS[0].block
    assert gradcheck(call, leaves, fast_mode=not slow)
    for tensor in leaves:
        tensor.requires_grad_(tensor.numel() > 1)  # the bias of a mask has a gradient of 0, without a graph
    assert gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_second_derivatives_are_the_definitions(random, tail):
    """|dL/dinputs|^2 as a loss term, the common use of a double backward."""
    inputs = draw_tail(random, tail, (2, 6, 3, 4))
    found = []
    for library in (gc_cuda, reference):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items() if name not in RUNNING}
        statistics = {name: inputs[name].clone() for name in RUNNING if name in inputs}
        out = tail_of(library, tail, leaves, statistics)(*leaves.values())
        first = torch.autograd.grad((out + 1).square().sum(), list(leaves.values()), create_graph=True)
        sum(g.square().sum() for g in first).backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for name, ours, theirs in zip(leaves, *found):
        zero = torch.zeros(())
        ours, theirs = (zero if t is None else t for t in (ours, theirs))
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8), name


def operands(tail, inputs):
    """The first arguments of the operators in their order: the norm's, and the block's."""
    block = [inputs.get("mask_weight"), inputs.get("mask_bias")]
    for branch in ("add", "mul"):
        block.append(
            [inputs[f"{branch}.{name}"] for name in Transform._fields if f"{branch}.{name}" in inputs]
        )
    return [inputs.get("weight"), inputs.get("bias")], block


VIEWS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: x[:, :, 1:, :-1],
    "transposed": lambda x: x.transpose(2, 3),
    "no image": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("tail", [*TAILS[:4], TAILS[8], TAILS[12], TAILS[-1]], ids=str)
def test_rules_of_operators(random, tail, view, dtype):
    inputs = draw_tail(random, tail, (3, 6, 4, 5), dtype=dtype)
    y, grad = VIEWS[view](inputs["y"]), VIEWS[view](random(3, 6, 4, 5, dtype=dtype))
    identity = VIEWS[view](inputs["identity"]) if tail.identity else None
    norm, block = operands(tail, inputs)
    operators = torch.ops.gc_cuda
    kind = ("folded", "eval", "train").index(tail.mode)
    given = [inputs[name] for name in RUNNING] if tail.mode == "eval" else [None, None]
    arguments = (y, identity, *norm, *given, kind, 1e-5, *block, 1e-5, 0, 0, tail.relu)
    opcheck(operators.bn_context_add_relu.default, arguments)
    out, kept = operators.bn_context_add_relu(*arguments)
    if tail.mode == "train":
        running = [inputs[name].clone() for name in RUNNING]
        moving = (y, identity, *norm, *running, 0.1, 1e-5, *block, 1e-5, 0, 0, tail.relu)
        opcheck(operators.bn_context_add_relu_training.default, moving)
    parameters = [*norm, *block[:2], *(block[2] or [None] * 6), *(block[3] or [None] * 6)]
    needed = [True, tail.identity, *[parameter is not None for parameter in parameters]]
    backward = (grad, y, out if tail.relu else None, *norm, kind, *block, kept, 0, 0, needed)
    opcheck(operators.bn_context_add_relu_backward.default, backward)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("tail", [GC_TRAIN, Tail(Configuration("avg", ("mul",)), "eval")], ids=str)
def test_compiles_into_one_graph(random, fresh_compiler, tail, backend):
    """With sizes that change, gradients, and running statistics that move."""
    shapes = [(2, 8, 5, 6), (3, 8, 7, 4), (4, 8, 6, 6)]
    drawn = [draw_tail(random, tail, size) for size in shapes]

    def function(statistics, *tensors):
        return tail_of(gc_cuda, tail, names, statistics)(*tensors)

    names = [name for name in drawn[0] if name not in RUNNING]
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for inputs in drawn:
        found = []
        for call in (function, compiled):
            leaves = [inputs[name].clone().requires_grad_() for name in names]
            statistics = {name: inputs[name].clone() for name in RUNNING}
            out = call(statistics, *leaves)
            out.square().sum().backward()
            with torch.no_grad():
                again = call(statistics, *leaves)
            found.append([out.detach(), again, *statistics.values(), *[leaf.grad for leaf in leaves]])
        for eager, ours in zip(*found):
            assert torch.allclose(eager, ours, rtol=1e-10, atol=1e-10)


def test_compiled_forward_keeps_the_operators(random, fresh_compiler):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    y = random(2, 4, 3, 3, dtype=torch.float32)
    torch.compile(lambda y: gc_cuda.bn_context_add_relu(y, y, BatchNorm(training=True)), backend=backend)(y)
    assert "gc_cuda.bn_context_add_relu" in graphs[0].print_readable(print_output=False)


def test_exported_program_has_pytorchs_operators_alone(random):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(4)

        def forward(self, y):
            bn = self.norm
            norm = BatchNorm(bn.weight, bn.bias, bn.running_mean, bn.running_var, self.training, 0.1, bn.eps)
            return gc_cuda.bn_context_add_relu(y, y, norm)

    y = random(2, 4, 3, 3, dtype=torch.float32)
    module = Module().eval()
    program = torch.export.export(module, (y,))
    assert "ops.gc_cuda" not in str(program.graph)
    assert "batch_norm" in str(program.graph)
    assert torch.allclose(program.module()(y), module(y), atol=1e-6)
    traced = torch.jit.trace(module, y)
    assert "gc_cuda::" not in str(traced.inlined_graph)


def test_functional_transforms_run_the_definition(random):
    inputs = draw_tail(random, GC_TRAIN, (3, 4, 3, 3))
    statistics = {}
    names = [name for name in inputs if name not in RUNNING]
    call = tail_of(gc_cuda, GC_TRAIN, names, statistics)
    tangent = torch.randn_like(inputs["y"])
    rest = [inputs[name] for name in names[1:]]
    _, ours = torch.func.jvp(lambda y: call(y, *rest), (inputs["y"],), (tangent,))
    definition = tail_of(reference, GC_TRAIN, names, statistics)
    _, theirs = torch.func.jvp(lambda y: definition(y, *rest), (inputs["y"],), (tangent,))
    assert torch.equal(ours, theirs)


# --- errors

C = 4
Y = torch.zeros(2, C, 3, 5)
NORM = BatchNorm(torch.ones(C), torch.zeros(C), torch.zeros(C), torch.ones(C))
BRANCH = Transform(
    torch.zeros(3, C), torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(C, 3), torch.zeros(C)
)
BLOCK = {"mask_weight": torch.zeros(C), "add": BRANCH}

# the arguments beside y, the error
BAD = {
    "y is a list": ({"y": [1]}, TypeError, "y must be a torch.Tensor, got list"),
    "y of integers": (
        {"y": Y.int()},
        TypeError,
        "y must be torch.float32, float16, bfloat16 or float64, got",
    ),
    "y of three": ({"y": Y[0]}, ValueError, "y must have shape [N, C, H, W], got [4, 3, 5]"),
    "y without pixels": ({"y": Y[..., :0]}, ValueError, "y must have at least one channel and one pixel"),
    "identity is a number": (
        {"identity": 1.0},
        TypeError,
        "identity must be a torch.Tensor or None, got float",
    ),
    "identity of one channel": (
        {"identity": Y[:, :1]},
        ValueError,
        "identity must have shape [2, 4, 3, 5] like y, got [2, 1, 3, 5]",
    ),
    "identity of integers": ({"identity": Y.int()}, TypeError, "identity must have a floating dtype, got"),
    "identity elsewhere": (
        {"identity": Y.to("meta")},
        ValueError,
        "identity must be on cpu like y, got meta",
    ),
    "identity is sparse": ({"identity": Y.to_sparse()}, TypeError, "identity must be a dense"),
    "norm is a module": (
        {"norm": torch.nn.BatchNorm2d(C)},
        TypeError,
        "norm must be a gc_cuda.BatchNorm or None, got BatchNorm2d",
    ),
    "norm of two": (
        {"norm": (NORM.weight, NORM.bias)},
        TypeError,
        "norm must be a gc_cuda.BatchNorm or None",
    ),
    "weight of another C": (
        {"norm": NORM._replace(weight=torch.ones(3))},
        ValueError,
        "norm.weight must have 4 elements (C of y), got shape [3]",
    ),
    "bias in double": (
        {"norm": NORM._replace(bias=torch.ones(C).double())},
        TypeError,
        "norm.bias must be torch.float32 like y, got torch.float64",
    ),
    "mean alone": (
        {"norm": NORM._replace(running_var=None)},
        TypeError,
        "norm.running_mean and norm.running_var must both be tensors or both None",
    ),
    "no statistics": (
        {"norm": NORM._replace(running_mean=None, running_var=None)},
        ValueError,
        "norm.running_mean and norm.running_var must be given unless norm.training, got None",
    ),
    "mean elsewhere": (
        {"norm": NORM._replace(running_mean=torch.zeros(C, device="meta"))},
        ValueError,
        "norm.running_mean must be on cpu like y, got meta",
    ),
    "momentum None": (
        {"norm": NORM._replace(momentum=None)},
        TypeError,
        "norm.momentum must be a number, got",
    ),
    "negative eps of the norm": (
        {"norm": NORM._replace(eps=-1.0)},
        ValueError,
        "norm.eps must be 0 or more, got",
    ),
    "eps 0 in training": (
        {"norm": NORM._replace(training=True, eps=0.0)},
        ValueError,
        "norm.eps must be positive in training, got 0.0",
    ),
    "a group": (
        {"norm": NORM._replace(group="world")},
        TypeError,
        "norm.group must be a torch.distributed.ProcessGroup or None, got str",
    ),
    "one value": (
        {"y": Y[:1, :, :1, :1], "norm": NORM._replace(training=True)},
        ValueError,
        "Expected more than 1 value per channel when training, got input size [1, 4, 1, 1]",
    ),
    "a mask without a block": (
        {"mask_weight": torch.zeros(C)},
        ValueError,
        "mask_weight must be None without add and mul, which have no block, got shape [4]",
    ),
    "a block without its mask": (
        {"add": BRANCH},
        ValueError,
        'mask_weight must be given for pooling_type "att"',
    ),
    "unknown pooling": ({"pooling_type": "max"}, ValueError, "pooling_type must be one of"),
    "unknown activation": ({**BLOCK, "activation": "gelu"}, ValueError, "activation must be one of"),
    "unknown gate": ({**BLOCK, "gate": "tanh"}, ValueError, "gate must be one of"),
    "negative eps": ({**BLOCK, "eps": -1.0}, ValueError, "eps must be 0 or more, got -1.0"),
    "a branch of five": ({**BLOCK, "add": BRANCH[:5]}, TypeError, "add must have the tensors w1, b1"),
}


@pytest.mark.parametrize("of_none", [False, True], ids=["two images", "no image"])
@pytest.mark.parametrize("case", BAD)
def test_errors(case, of_none):
    """Also without a single image, where no operator would look."""
    arguments, error, words = BAD[case]
    arguments = {"y": Y, "norm": NORM, **arguments}
    y = arguments.pop("y")
    call = partial(gc_cuda.bn_context_add_relu, **arguments)
    if of_none and isinstance(y, torch.Tensor) and y.dim() == 4 and case != "one value":
        y, words = y[:0], words.replace("[2, ", "[0, ")
        identity = arguments.get("identity")
        if isinstance(identity, torch.Tensor) and not identity.is_sparse:
            call = partial(call, identity=identity[:0])
    with pytest.raises(error, match=re.escape(words)):
        call(y)


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("identity", Y[:, :1], "identity must have shape [2, 4, 3, 5] like x"),
        ("identity", Y.double(), "identity must be Float like x"),
        ("weight", torch.ones(3), "weight must have 4 elements"),
        ("bias", torch.ones(C).double(), "bias must be Float like x"),
        ("mean", None, "mean and variance must be given for norm_kind 1"),
        ("variance", torch.ones(C, device="meta"), "norm.running_var must be on cpu like y, got meta"),
        ("norm_kind", 3, "norm_kind must be one of 0 to 2, got 3"),
        ("norm_kind", 0, "weight and bias must be None without a norm"),
        ("norm_eps", -1.0, "norm_eps must be 0 or more, got -1"),
        ("mask_weight", torch.zeros(C), "mask_weight must be None without an add or a mul branch"),
        ("activation", 3, "activation must be one of 0 to 2, got 3"),
        ("y", Y.int(), "y must be float32, float16, bfloat16 or float64"),
    ],
)
def test_the_operator_refuses_by_itself(argument, value, words):
    arguments = {"y": Y, "identity": Y, "weight": NORM.weight, "bias": NORM.bias, "mean": NORM.running_mean}
    arguments |= {"variance": NORM.running_var, "norm_kind": 1, "norm_eps": 1e-5, "mask_weight": None}
    arguments |= {
        "mask_bias": None,
        "add": [],
        "mul": [],
        "eps": 1e-5,
        "activation": 0,
        "gate": 0,
        "relu": True,
    }
    torch.ops.gc_cuda.bn_context_add_relu(**arguments)
    with pytest.raises((RuntimeError, TypeError, ValueError), match=re.escape(words)):
        torch.ops.gc_cuda.bn_context_add_relu(**{**arguments, argument: value})


@pytest.mark.parametrize("running", [torch.zeros(3), torch.zeros(2 * C)[::2], torch.zeros(C).double()])
def test_running_statistics_that_the_operator_refuses(running):
    block = None, None, [], [], 1e-5, 0, 0, True
    with pytest.raises((RuntimeError, TypeError), match="running_mean must"):
        torch.ops.gc_cuda.bn_context_add_relu_training(
            Y, None, None, None, running, torch.ones(C), 0.1, 1e-5, *block
        )


def test_strided_running_statistics(random):
    """BatchNorm2d's are contiguous; others are served as well."""
    y = random(2, C, 3, 5, dtype=torch.float32)
    moved = []
    for library in (gc_cuda, reference):
        mean, var = torch.zeros(2 * C)[::2], torch.ones(2 * C)[::2]
        library.bn_context_add_relu(y, None, BatchNorm(None, None, mean, var, True))
        moved.append((mean, var))
    for ours, theirs in zip(*moved):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_flops_are_the_blocks(random):
    from torch.utils.flop_counter import FlopCounterMode

    counted = []
    for tail in (Tail(Configuration("att", ("add",)), "train"), Tail(NO_BLOCK, "train")):
        inputs = draw_tail(random, tail, (2, 8, 6, 5))
        leaves = {name: tensor.requires_grad_(name not in RUNNING) for name, tensor in inputs.items()}
        statistics = {name: leaves.pop(name).detach() for name in RUNNING}
        with FlopCounterMode(display=False) as counter:
            tail_of(gc_cuda, tail, leaves, statistics)(*leaves.values()).sum().backward()
        counted.append(counter.get_total_flops())
    pooling, transform = 4 * 2 * 8 * 30, 4 * 2 * 8 * 7
    assert counted == [3 * (pooling + transform), 0]


def test_a_gradient_for_identity_alone_is_that_of_the_relu(random):
    """0 where out is not above 0, whatever comes in there; where out is NaN, what comes in."""
    y, identity = random(2, 3, 4, 5), random(2, 3, 4, 5, grad=True)
    y.view(-1)[:2] = torch.tensor([float("nan"), -1e3])
    grad = random(2, 3, 4, 5)
    grad.view(-1)[1] = float("inf")
    (found,) = torch.autograd.grad(gc_cuda.bn_context_add_relu(y, identity), identity, grad)
    (expected,) = torch.autograd.grad(torch.relu(y + identity), identity, grad)
    assert torch.equal(found, expected)
