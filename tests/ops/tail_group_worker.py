"""A process of test_tail_group.py: bn_context_add_relu on this process's images of a batch, with a group of
all processes, against the whole batch in one process.

torchrun --nproc-per-node 2 tests/ops/tail_group_worker.py
"""

from __future__ import annotations

from itertools import accumulate, product
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from block_cases import Configuration
from evaluate import LAYOUTS
from process_group import end_process_group
from tail_cases import GC_TRAIN, NO_BLOCK, RUNNING, Tail, draw_tail, run_tail, tail_of
from torch import Tensor

import gc_cuda
from gc_cuda import BatchNorm, reference

TAILS = [
    GC_TRAIN,
    Tail(Configuration("att", ("add", "mul"))),
    Tail(Configuration("avg", ("mul",))),
    Tail(Configuration("avg", ("add", "mul"))),
    Tail(NO_BLOCK),
    GC_TRAIN._replace(identity=False),
    Tail(Configuration("avg", ("mul",)), relu=False),
]
# The images of each process.
PARTS = {2: [(2, 3), (0, 5), (5, 0)], 3: [(2, 0, 3), (1, 3, 1)]}
PIXELS = [(5, 7), (1, 1)]  # the latter with parts of one image: one value for each channel
OF_IMAGES = "y", "identity"
LIBRARIES = gc_cuda, reference
CLOSE = 1e-11


GENERATOR = torch.Generator().manual_seed(20190425)  # every process draws the same


def draw(*size, dtype=torch.float64, device="cpu", layout=torch.contiguous_format):
    tensor = torch.randn(size, generator=GENERATOR, dtype=torch.float64).to(device, dtype)
    return tensor.contiguous(memory_format=layout) if len(size) == 4 else tensor


def part(tensor: Tensor, images: tuple[int, ...]) -> Tensor:
    ends = list(accumulate(images))
    rank = dist.get_rank()
    return tensor[ends[rank] - images[rank] : ends[rank]]


def mine(inputs: dict[str, Tensor], images: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: part(t, images) if name in OF_IMAGES else t for name, t in inputs.items()}


def check(name: str, found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape, name
    largest = max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    assert torch.allclose(found, expected, rtol=0, atol=CLOSE * largest), name


def check_part(name: str, found: Tensor, whole: Tensor, images: tuple[int, ...]) -> None:
    """What is of images is this process's; what is a sum over all is the processes' sum. A softmax does not
    feel the bias of its mask.
    """
    if name in OF_IMAGES:
        return check(name, found, part(whole, images))
    if name == "mask_bias":
        return None
    if name not in RUNNING:
        found = found.clone()
        dist.all_reduce(found)
    return check(name, found, whole)


def compare(
    library: ModuleType, tail: Tail, inputs: dict[str, Tensor], grad: Tensor, images: tuple[int, ...]
):
    whole = run_tail(reference, tail, inputs, grad)
    ours = run_tail(library, tail, mine(inputs, images), part(grad, images), group=dist.group.WORLD)
    check("out", ours.out, part(whole.out, images))
    for name, expected in whole.results.items():
        check_part(name, ours.results[name], expected, images)


def compare_second_derivatives(library: ModuleType, tail: Tail, inputs, images: tuple[int, ...]) -> None:
    """Of a loss that has the gradients of y and identity, whose square is a sum over the processes."""
    found = []
    for values, group in ((inputs, None), (mine(inputs, images), dist.group.WORLD)):
        leaves = {name: t.clone().requires_grad_() for name, t in values.items() if name not in RUNNING}
        norm = {name: inputs[name].clone() for name in RUNNING}
        out = tail_of(library if group else reference, tail, leaves, norm, group=group)(*leaves.values())
        moved = {name: value.clone() for name, value in norm.items()}
        of_images = [leaves[name] for name in OF_IMAGES if name in leaves]
        first = torch.autograd.grad((out + 1).square().sum(), of_images, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        assert all(torch.equal(value, norm[name]) for name, value in moved.items())
        zero = torch.zeros(())
        found.append({name: zero if leaf.grad is None else leaf.grad for name, leaf in leaves.items()})
    whole, ours = found
    for name, expected in whole.items():
        check_part(name, ours[name], expected, images)


def same_bits(images: tuple[int, ...]) -> None:
    """All processes move to the same running statistics, whatever the rounding."""
    inputs = draw_tail(draw, GC_TRAIN, (sum(images), 67, 3, 5), dtype=torch.float32, mean=100)
    norm = {name: inputs.pop(name) for name in RUNNING}
    call = tail_of(gc_cuda, GC_TRAIN, inputs, norm, group=dist.group.WORLD)
    call(*mine(inputs, images).values())
    for name in RUNNING:
        all_of_them = [torch.empty_like(norm[name]) for _ in images]
        dist.all_gather(all_of_them, norm[name])
        assert all(torch.equal(one, norm[name]) for one in all_of_them)


def one_value_in_all(count: int) -> None:
    y = draw(1, 4, 1, 1)[: dist.get_rank() == 0]
    for library in LIBRARIES:
        with pytest.raises(
            ValueError, match="Expected more than 1 value per channel when training, got 1 in all"
        ):
            library.bn_context_add_relu(y, None, BatchNorm(training=True, group=dist.group.WORLD))


def no_value_in_all() -> None:
    """Nothing to compute, and statistics stay where they are."""
    y = torch.zeros(0, 4, 3, 3, dtype=torch.float64)
    for library in LIBRARIES:
        mean, var = torch.ones(2, 4, dtype=torch.float64)
        norm = BatchNorm(None, None, mean, var, True, group=dist.group.WORLD)
        assert library.bn_context_add_relu(y, None, norm).shape == y.shape
        assert (mean == 1).all() and (var == 1).all()


def groups_of_one() -> None:
    """Each process alone: as without a group."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    inputs = draw_tail(draw, GC_TRAIN, (2, 8, 3, 5))
    inputs["y"] = inputs["y"] + dist.get_rank()
    grad = draw(2, 8, 3, 5)
    alone = run_tail(gc_cuda, GC_TRAIN, inputs, grad)
    ours = run_tail(gc_cuda, GC_TRAIN, inputs, grad, group=groups[dist.get_rank()])
    assert torch.equal(alone.out, ours.out)
    assert all(torch.equal(alone.results[name], value) for name, value in ours.results.items())
    with pytest.raises(
        TypeError, match=r"norm.group must be .* got int .of a group that this process is not in"
    ):
        other = groups[dist.get_rank() - 1]
        gc_cuda.bn_context_add_relu(inputs["y"], None, BatchNorm(training=True, group=other))


def given_statistics_ignore_the_group() -> None:
    """One process may call it without the others."""
    tail = GC_TRAIN._replace(mode="eval")
    inputs = draw_tail(draw, tail, (2, 8, 3, 5))
    grad = draw(2, 8, 3, 5)
    alone = run_tail(gc_cuda, tail, inputs, grad)
    if dist.get_rank() == 0:
        ours = run_tail(gc_cuda, tail, inputs, grad, group=dist.group.WORLD)
        assert torch.equal(alone.out, ours.out)
        assert all(torch.equal(alone.results[name], value) for name, value in ours.results.items())


def where_it_is_refused() -> None:
    y, norm = draw(2, 4, 3, 3), BatchNorm(training=True, group=dist.group.WORLD)

    def call(y: Tensor) -> Tensor:
        return gc_cuda.bn_context_add_relu(y, None, norm)

    with pytest.raises(ValueError, match=r"norm.group must be None .* got a group of \d"):
        torch.func.jvp(call, (y,), (y,))


def compiled(images: tuple[int, ...]) -> None:
    """Outside of the graphs."""
    inputs = draw_tail(draw, GC_TRAIN, (sum(images), 8, 3, 5))
    norm = {name: inputs.pop(name) for name in RUNNING}
    call = tail_of(gc_cuda, GC_TRAIN, inputs, norm, group=dist.group.WORLD)
    tensors = list(mine(inputs, images).values())
    assert torch.equal(torch.compile(call, backend="eager")(*tensors), call(*tensors))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for tail, layout, pixels in product(TAILS, LAYOUTS.values(), PIXELS):
        for images in PARTS[dist.get_world_size()]:
            size = (sum(images), 12, *pixels)
            inputs = draw_tail(draw, tail, size, layout=layout, mean=3)
            grad = draw(*size, layout=layout)
            for library in LIBRARIES:
                compare(library, tail, inputs, grad, images)
                if pixels != (1, 1):
                    compare_second_derivatives(library, tail, inputs, images)
    for images in PARTS[dist.get_world_size()]:
        same_bits(images)
    compiled(PARTS[dist.get_world_size()][0])
    one_value_in_all(dist.get_world_size())
    no_value_in_all()
    groups_of_one()
    given_statistics_ignore_the_group()
    where_it_is_refused()
    dist.barrier()
    print("compared")
    end_process_group()


if __name__ == "__main__":
    main()
