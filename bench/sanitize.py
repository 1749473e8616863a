"""Runs every operation forward and backward on small CUDA tensors, for compute-sanitizer to watch.

The shapes are small because the sanitizers slow a kernel down a hundredfold, and odd because that is where a
tile ends inside a vector. What comes out is compared loosely (the tests do it exactly), with the reference on
the CPU, so that hardly any kernels but ours are watched. PYTORCH_NO_CUDA_MEMORY_CACHING=1 makes every tensor
an allocation of its own, past whose end memcheck can see.
"""

from __future__ import annotations

import itertools
import sys
from types import ModuleType

import torch

import gc_cuda
from gc_cuda import reference

SHAPES = (
    (2, 8, 4, 4),  # every vector and tile full
    (1, 3, 5, 7),  # every tail at once
    (2, 67, 13, 11),  # no vector width divides C, H or W
    (1, 32, 40, 67),  # several splits to an image, merged by the last block
    (3, 260, 7, 7),  # more channels than threads in a block
)
OPERATIONS = (
    "softmax_pool",
    "attention_pool",
    "average_pool",
    "broadcast_add",
    "broadcast_mul",
    "broadcast_mul_add",
    "global_context",
    "squeeze_excite",
)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Relative to the largest value; a rounding of the result, with room for sums in another order. In float64 the
# reference itself is off by 3e-8: PyTorch's hardsigmoid has a float32 1/6 in its backward.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def companions(name: str, n: int, c: int, h: int, w: int) -> list[tuple[int, ...]]:
    """The shapes of what the operation takes besides x."""
    shapes: dict[str, list[tuple[int, ...]]] = {
        "softmax_pool": [(n, h * w)],
        "attention_pool": [(c,)],
        "average_pool": [],
        "broadcast_add": [(n, c)],
        "broadcast_mul": [(n, c)],
        "broadcast_mul_add": [(n, c), (n, c)],
        "global_context": [(c,), (1,), *transform(c, max(c // 4, 1)), *transform(c, max(c // 3, 1))],
        "squeeze_excite": [(max(c // 4, 1), c), (max(c // 4, 1),), (c, max(c // 4, 1)), (c,)],
    }
    return shapes[name]


def transform(c: int, p: int) -> list[tuple[int, ...]]:
    """The shapes of one branch with p hidden units."""
    return [(p, c), (p,), (p,), (p,), (c, p), (c,)]


def call(module: ModuleType, name: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The operation; a whole block takes its tensors as two branches, or as one without a norm."""
    if name == "squeeze_excite":
        x, w1, b1, w2, b2 = tensors
        mul = gc_cuda.Transform(w1, b1, None, None, w2, b2)
        return module.global_context(x, mul=mul, pooling_type="avg", activation="silu", gate="hardsigmoid")
    if name != "global_context":
        return getattr(module, name)(*tensors)
    x, mask_weight, mask_bias, *branches = tensors
    add, mul = gc_cuda.Transform(*branches[:6]), gc_cuda.Transform(*branches[6:])
    return module.global_context(x, mask_weight, mask_bias, add, mul)


def evaluate(module: ModuleType, name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The operation's result and the gradients of its sum."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = call(module, name, leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def largest_deviation(name: str, tensors: list[torch.Tensor]) -> float:
    """From the reference in float64, relative to the largest value of each result."""
    ours = [result.cpu().double() for result in evaluate(gc_cuda, name, [t.cuda() for t in tensors])]
    exact = evaluate(reference, name, [t.double() for t in tensors])
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in zip(ours, exact))


def main() -> int:
    if not torch.cuda.is_available():
        print("bench/sanitize.py needs a CUDA device, and none is visible", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    runs, wrong = 0, 0
    for name, shape, dtype, layout in itertools.product(OPERATIONS, SHAPES, TOLERANCE, LAYOUTS):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
        others = [torch.randn(size) for size in companions(name, *shape)]
        if name in (
            "global_context",
            "squeeze_excite",
        ):  # weights as a network has: the norm must not blow up roundings
            others = [other / other.shape[-1] ** 0.5 for other in others]
        others = [other.to(dtype) for other in others]
        deviation = largest_deviation(name, [x, *others])
        runs += 1
        if not deviation <= TOLERANCE[dtype]:
            wrong += 1
            print(f"{name} {shape} {dtype} {layout}: deviates by {deviation:.3g}")
    torch.cuda.synchronize()
    print(f"{runs} runs, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
