"""bn_context_add_relu equals its definition in float64, whatever the shape, strides, mode, parts and needs.

400 examples a run, the same ones each time; GC_CUDA_FUZZ=50000 asks for 10,000, new ones in every run.
"""

from __future__ import annotations

import pytest
import torch
from block_cases import CONFIGURATIONS
from tail_cases import MODES, NO_BLOCK, RUNNING, Tail, draw_tail, run_tail

import gc_cuda
from gc_cuda import reference

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import Numbers, examples, seeds, sizes, views

tails = st.builds(
    Tail,
    st.sampled_from([*CONFIGURATIONS, NO_BLOCK]),
    st.sampled_from(MODES),
    relu=st.booleans(),
    identity=st.booleans(),
)


def has_statistics(size):
    """A variance needs two values, and the gradient of a tiny one is a difference of large numbers."""
    n, _, h, w = size
    return n == 0 or n * h * w >= 6


@examples(0.2)
@given(data=st.data(), tail=tails, size=sizes.filter(has_statistics), view=views, seed=seeds)
def test_tail(data, tail, size, view, seed):
    numbers = Numbers(seed)

    def random(*shape, dtype=torch.float64, device="cpu", layout=torch.contiguous_format):
        drawn = numbers(*shape, dtype=dtype)
        return drawn.contiguous(memory_format=layout) if drawn.dim() == 4 else drawn

    inputs = draw_tail(random, tail, size)
    inputs["y"] = numbers.map(size, view, torch.float64)
    if tail.identity:
        inputs["identity"] = numbers.map(size, data.draw(views, "identity"), torch.float64)
    for name in ("weight", "bias", "mask_bias"):
        if name in inputs and data.draw(st.booleans(), f"without {name}"):
            del inputs[name]
    possible = [name for name in inputs if name not in RUNNING]
    needs = data.draw(st.sets(st.sampled_from(possible), min_size=1), "needing")
    if not tail.identity:
        needs |= {"y"}  # or out has no graph
    grad = numbers.map(size, data.draw(views, "gradient"), torch.float64)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    ours, theirs = (run_tail(library, tail, inputs, grad, needs=needs) for library in (gc_cuda, reference))
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items()), "an input was changed"
    assert ours.out.is_contiguous() or ours.out.is_contiguous(memory_format=torch.channels_last)
    for name, expected in {"out": theirs.out, **theirs.results}.items():
        actual = ours.out if name == "out" else ours.results[name]
        torch.testing.assert_close(
            actual, expected, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
