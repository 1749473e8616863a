"""A process of test_distributed.py: tails whose norm is a SyncBatchNorm, on this process's images of a batch,
against one process with the whole batch and nn.BatchNorm2d.

SyncBatchNorm takes no tensors of the CPU. There the norms of the stem have given statistics, and the tail's
is kept from asking for the device: what is shown is that the operation has the group.

torchrun --nproc-per-node 2 tests/models/sync_tails_worker.py cpu
"""

from __future__ import annotations

import copy
import importlib
import sys

import torch
import torch.distributed as dist
from bottlenecks import MMDET, TORCHVISION, new_net, stand_ins
from process_group import end_process_group
from torch import Tensor, nn

import gc_cuda
from gc_cuda.blocks._tail import NormOptions
from gc_cuda.models import tails

SIZE = 5, 3, 9, 8
PARTS = ((2, 3), (0, 5))


def images() -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def with_group(options: NormOptions, y: Tensor) -> NormOptions:
    return options._replace(group=options.group or dist.group.WORLD) if options.exchanges() else options


def run(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Forward and backward of a sum over the images: out, gradients, and the state after it."""
    net.zero_grad()
    out = net(x)
    out.square().sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in net.named_parameters()}
    return {"out": out.detach(), **gradients, **copy.deepcopy(net.state_dict())}


def converted(net: nn.Module, group: dist.ProcessGroup | None, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net, group)
    for bottleneck in net[1]:
        bottleneck.bn3 = nn.SyncBatchNorm.convert_sync_batchnorm(bottleneck.bn3, group)
    return net


def modes(net: nn.Module, device: torch.device) -> nn.Module:
    """On the CPU only the norms of the tails train."""
    if device.type == "cpu":
        for name, module in net.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(name.endswith("bn3"))
    return net


def compare(
    framework: str, settings: dict, group: dist.ProcessGroup | None, convert_first: bool, device
) -> None:
    plain = modes(new_net(framework, **settings).to(device), device)
    ours = copy.deepcopy(plain)
    ours = converted(ours, group, device) if convert_first else ours
    assert len(gc_cuda.accelerate(ours, tails=True).tails) == 2
    ours = modes(converted(ours, group, device), device)
    x, state = images().to(device), copy.deepcopy(plain.state_dict())
    for parts in PARTS:
        for net in (plain, ours):
            net.load_state_dict(state)
        start = sum(parts[: dist.get_rank()])
        mine = slice(start, start + parts[dist.get_rank()])
        expected, found = run(plain, x), run(ours, x[mine])
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            actual = found[name]
            if name == "out":
                tensor = tensor[mine]
            elif name.startswith("gradient"):
                dist.all_reduce(actual)
            tolerance = 1e-10 * max(1.0, float(tensor.abs().max()) if tensor.numel() else 0.0)
            assert torch.allclose(actual, tensor, rtol=0, atol=tolerance), (framework, parts, name)


def main() -> None:
    kind = sys.argv[1]
    torch.set_num_threads(1)
    sys.modules |= stand_ins()
    several = torch.cuda.device_count() > 1
    dist.init_process_group("nccl" if kind == "cuda" and several else "gloo")
    device = torch.device(kind, dist.get_rank() if several else 0) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        importlib.import_module("gc_cuda._C").choose_paths("tail")
    else:
        NormOptions.now = with_group  # type: ignore[method-assign]
    calls, operation = [], tails.bn_context_add_relu
    tails.bn_context_add_relu = lambda *a, **b: calls.append(a[2].group) or operation(*a, **b)
    named = dist.new_group([0, 1])
    for framework, settings in (
        (TORCHVISION, {}),
        (TORCHVISION, {"pooling_type": "avg", "fusion_types": ("channel_mul",)}),
        (MMDET, {}),
    ):
        for group, convert_first in ((None, True), (None, False), (named, False)):
            compare(framework, settings, group, convert_first, device)
            assert len(calls) == 2 * len(PARTS)
            assert all(one is (group or dist.group.WORLD) for one in calls)
            calls.clear()
    dist.barrier()
    print("compared")
    end_process_group()


if __name__ == "__main__":
    main()
