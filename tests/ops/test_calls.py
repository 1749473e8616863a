"""What holds of the functions and of the block alike: one operator each way, and a new output."""

from __future__ import annotations

import pytest
import torch
from block_cases import (
    CONFIGURATIONS,
    SQUEEZE_EXCITE,
    Configuration,
    Spy,
    draw_inputs,
    error_scales,
    function_of,
    without_norm,
)
from evaluate import evaluate
from tolerance import assert_close_to_truth
from whole_models import FUSIONS, randomised

import gc_cuda
from gc_cuda import reference

SIZE = (2, 24, 9, 7)


@pytest.mark.parametrize("case", [*CONFIGURATIONS, "no norm", "block", "block under autocast"], ids=str)
def test_one_operator_each_way(random, case, layout, device):
    """No casts, copies, sums or fills around it, of half x beside float32 parameters either. A norm that is
    not there costs nothing, and a block reads no parameter by an operator of its own.
    """
    dtype = torch.float32 if case == "block" else torch.half
    x = random(*SIZE, dtype=dtype, device=device, layout=layout)
    if "block" in str(case):
        block = randomised(gc_cuda.ContextBlock(24, 1 / 4, "att", FUSIONS[-1])).to(device)
        leaves = [x, *block.parameters()]

        def call(x, *parameters):
            with torch.autocast(device.type, torch.float16, enabled=case != "block"):
                return block(x)
    else:
        configuration = SQUEEZE_EXCITE if case == "no norm" else case
        inputs = draw_inputs(random, configuration, SIZE, dtype=torch.float32, device=device) | {"x": x}
        inputs = without_norm(inputs) if case == "no norm" else inputs
        leaves = list(inputs.values())
        activation = "silu" if case == "no norm" else "relu"
        call = function_of(gc_cuda, configuration, inputs, activation=activation)
    for leaf in leaves:
        leaf.requires_grad_()

    with torch.no_grad(), Spy() as alone:
        call(*leaves)
    with Spy() as forward:
        out = call(*leaves)
    grad = torch.ones_like(out)
    with Spy() as backward:
        torch.autograd.grad(out, leaves, grad)
    assert alone.names() == ["gc_cuda::global_context"]
    assert forward.names() == ["gc_cuda::global_context_kept"]
    assert backward.names() == ["gc_cuda::global_context_backward"]
    (computed,) = (one.result for one in backward.calls if one.name == backward.names()[0])
    assert [gradient.shape for gradient in computed] == [leaf.shape for leaf in leaves]


# How many vectors a function takes beside x
BROADCASTS = {"broadcast_add": 1, "broadcast_mul": 1, "broadcast_mul_add": 2}


@pytest.mark.parametrize("case", [*BROADCASTS, *CONFIGURATIONS, *FUSIONS], ids=str)
def test_output_is_new_and_may_be_changed_in_place(random, case, layout, device):
    """mmdetection adds the shortcut to it and applies ReLU in place before the backward pass."""
    x, grad = (random(*SIZE, device=device, layout=layout) for _ in range(2))
    inputs, scales = {"x": x}, {}
    if case in BROADCASTS:
        inputs |= {str(i): random(*SIZE[:2], device=device) for i in range(BROADCASTS[case])}
        calls = [getattr(library, case) for library in (gc_cuda, reference)]
    elif isinstance(case, Configuration):
        inputs = draw_inputs(random, case, SIZE, device=device) | inputs
        scales = error_scales(inputs, grad)[1]
        calls = [function_of(library, case, inputs) for library in (gc_cuda, reference)]
    else:
        blocks = gc_cuda.ContextBlock(24, 1 / 4, "att", case), reference.ContextBlock(24, 1 / 4, "att", case)
        calls = [block.double().to(device) for block in blocks]
        calls[1].load_state_dict(randomised(calls[0]).state_dict())

    out = calls[0](*inputs.values())
    assert out.is_contiguous(memory_format=layout)
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()

    def changed(call):
        return lambda *tensors: torch.relu_(call(*tensors).add_(x))

    before = x.clone()
    ours, truth = (evaluate(changed(call), inputs.values(), grad) for call in calls)
    assert_close_to_truth("out", ours.out, truth.out, truth.out)
    for name, actual, expected in zip(inputs, ours.gradients, truth.gradients):
        if name != "mask_bias":
            assert_close_to_truth(f"grad of {name}", actual, expected, expected, scales.get(name))
    assert torch.equal(x, before)
