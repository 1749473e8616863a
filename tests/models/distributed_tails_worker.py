"""A process of test_distributed.py: DDP over gloo of a model with tails, on this process's half of a batch.

Where the batch norms train, every process has statistics of its own half, so that it is compared with DDP of
the model that is not accelerated; where they do not, with one process and the whole batch.

torchrun --nproc-per-node 2 tests/models/distributed_tails_worker.py
"""

from __future__ import annotations

import copy
import sys
import warnings

import torch
import torch.distributed as dist
from bottlenecks import MMDET, TORCHVISION, new_net, stand_ins
from process_group import end_process_group
from small_steps import STEPS, assert_same_steps, steps
from torch import Tensor, nn

import gc_cuda

BATCH = 4
TRAINING = (
    (TORCHVISION, {}, {"static_graph": True}),
    (TORCHVISION, {}, {"find_unused_parameters": True}),
    (TORCHVISION, {}, {"broadcast_buffers": False}),
    (MMDET, {"with_cp": True}, {"static_graph": True}),
)


def images() -> Tensor:
    return torch.randn(BATCH, 3, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ddp_steps(net: nn.Module, mine: slice, **options: bool) -> list[dict[str, Tensor]]:
    model = nn.parallel.DistributedDataParallel(net, **options)
    return [without_module(one) for one in steps(model, images()[mine])]


def without_module(step: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("module.", ""): tensor for name, tensor in step.items()}


def mean_steps(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """The gradients of a mean over the batch, as DDP makes one of the processes', and the state after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        gradients = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found.append(without_module({**gradients, **state}))
    return found


def norm_eval(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def compare() -> None:
    per_rank = BATCH // dist.get_world_size()
    mine = slice(dist.get_rank() * per_rank, (dist.get_rank() + 1) * per_rank)
    for framework, settings, options in TRAINING:
        plain = new_net(framework, **settings)
        ours = copy.deepcopy(plain)
        assert len(gc_cuda.accelerate(ours).tails) == 2
        assert_same_steps(ddp_steps(ours, mine, **options), ddp_steps(plain, mine, **options))

    alone = norm_eval(new_net())
    ours = copy.deepcopy(alone)
    assert len(gc_cuda.accelerate(ours).tails) == 2
    model = nn.parallel.DistributedDataParallel(ours, static_graph=True)
    expected, actual = mean_steps(alone, images()), mean_steps(model, images()[mine])
    assert_same_steps(actual, expected)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # DDP's advice about options that a small model does not need
    sys.modules |= stand_ins()
    dist.init_process_group("gloo")
    compare()
    print("compared")
    end_process_group()


if __name__ == "__main__":
    main()
