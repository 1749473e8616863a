"""A process of test_distributed.py: trains the small net for some steps on its half of each batch, by DDP or
FSDP2 over gloo (nccl on GPUs), and rank 0 saves what came out. Nothing is saved where torch's FSDP2 is wrong.

torchrun --nproc-per-node 2 tests/models/distributed_worker.py ddp|fsdp FOLDER cpu|cuda
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from process_group import end_process_group
from small_net import Net, new_net
from torch import Tensor, nn

STEPS, BATCH = 3, 4


def images(step: int) -> Tensor:
    """The joined batch of a step."""
    return torch.randn(BATCH, 3, 10, 13, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, share: slice, device: torch.device) -> list[dict[str, Tensor]]:
    """The gradients of each step, of the mean over this share of the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    gradients = []
    for step in range(STEPS):
        optimizer.zero_grad()
        model(images(step)[share].to(device)).square().mean().backward()
        gradients.append({name: whole(p.grad) for name, p in model.named_parameters()})
        optimizer.step()
    return gradients


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU of a plain or sharded tensor."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu().clone()


def fsdp_averages(device: torch.device) -> bool:
    """Whether a plain layer's gradients are those of the mean; in torch 2.8 over gloo, they are the sum's."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    layer = fully_shard(nn.Linear(2, 2).to(device), mesh=mesh)
    layer(torch.ones(1, 2, device=device)).sum().backward()
    return torch.equal(whole(layer.bias.grad), torch.ones(2))


def compute(kind: str, folder: str, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    net: Net = new_net().to(device)
    model: nn.Module
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.fsdp import fully_shard

        if not fsdp_averages(device):
            return
        mesh = dist.init_device_mesh(device.type, (world,))
        for block in (net.first, net.second):
            fully_shard(block, mesh=mesh)
        model = fully_shard(net, mesh=mesh)
    per_rank = BATCH // world
    gradients = train(model, slice(rank * per_rank, (rank + 1) * per_rank), device)
    parameters = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if rank == 0:
        strip = "module." if kind == "ddp" else ""
        torch.save(
            [{name.removeprefix(strip): t for name, t in one.items()} for one in (*gradients, parameters)],
            os.path.join(folder, f"{kind}.pt"),
        )


def main(kind: str, folder: str, device_type: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device(device_type, int(os.environ["RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    compute(kind, folder, device)
    end_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
