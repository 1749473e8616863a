#!/usr/bin/env python
"""Train a small ResNet with global context blocks on the 1,797 images of digits inside scikit-learn.

    torchrun --nproc-per-node 2 examples/train_digits.py          # on CPUs (gloo), or a GPU each (nccl)
    torchrun --nproc-per-node 2 examples/train_digits.py --compare --picture curves.png
    python examples/train_digits.py --checkpoint digits.pt        # run again: goes on where it stopped

Its residual blocks end in one operation: batch norm, global context block, sum with the shortcut, ReLU
(`tail` below; in torchvision's and mmdetection's bottlenecks gc_cuda.accelerate does that by itself).
--compare trains twice from the same weights on the same batches, with the fused operation and with the same
in plain PyTorch, and --picture draws the loss curves. --checkpoint is written after every epoch; a run that
was stopped goes on from it, with the same numbers as one that was not. Needs scikit-learn and tqdm, and
matplotlib for a picture.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import gc_cuda

TEST_IMAGES = 360


class Residual(nn.Module):
    """Two convolutions, a global context block as mmdetection places it, and the sum with the input."""

    def __init__(self, in_channels: int, channels: int, stride: int, block: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.context_block = block(channels, ratio=1 / 4)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x)).relu_()
        out, identity = self.conv2(out), self.shortcut(x)
        if isinstance(self.context_block, gc_cuda.ContextBlock):
            return tail(out, identity, self.norm2, self.context_block)
        out = self.context_block(self.norm2(out))
        out += identity
        return out.relu_()


def tail(y: Tensor, identity: Tensor, norm: nn.BatchNorm2d, block: gc_cuda.ContextBlock) -> Tensor:
    """relu(block(norm(y)) + identity) as one operation, which keeps y and the result and nothing between."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
    batch_norm = gc_cuda.BatchNorm(
        *(norm.weight, norm.bias, norm.running_mean, norm.running_var),
        *(norm.training, norm.momentum, norm.eps),
    )
    first, layer_norm, _relu, last = block.channel_add_conv
    add = gc_cuda.Transform(*(tensor for part in (first, layer_norm, last) for tensor in part.parameters()))
    mask = block.conv_mask
    return gc_cuda.bn_context_add_relu(y, identity, batch_norm, mask.weight, mask.bias, add, eps=block.eps)


class DigitsNet(nn.Module):
    """Three stages, 8x8 to 2x2."""

    def __init__(self, block: type[nn.Module] = gc_cuda.ContextBlock) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.stages = nn.Sequential(
            Residual(32, 32, 1, block), Residual(32, 64, 2, block), Residual(64, 128, 2, block)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x).relu_()).mean((2, 3)))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [N, 1, 8, 8] with mean 0 and deviation 1, and labels: to train with, and to test with."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[TEST_IMAGES:], labels[TEST_IMAGES:], images[:TEST_IMAGES], labels[:TEST_IMAGES]


class World:
    """This process among those of torchrun; one alone without it."""

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> float:
        """Over the processes."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return float(value) / self.size

    def close(self) -> None:
        if self.size > 1:
            # DDP holds itself, and must be gone before the group, or gloo's destructor may wait for ever.
            gc.collect()
            dist.destroy_process_group()


def train(
    name: str, block: type[nn.Module], arguments: argparse.Namespace, world: World, checkpoint: Path | None
) -> tuple[list[float], float]:
    """The loss of every step, and the accuracy on the test images."""
    torch.manual_seed(arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    net = DigitsNet(block).to(world.device, dtype)
    model = nn.parallel.DistributedDataParallel(net) if world.size > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    images, labels, test_images, test_labels = (tensor.to(world.device) for tensor in digits())
    images, test_images = images.to(dtype), test_images.to(dtype)
    per_epoch = len(images) // arguments.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.epochs * per_epoch)
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=world.device, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        losses = state["losses"]

    share = slice(
        world.rank * arguments.batch // world.size, (world.rank + 1) * arguments.batch // world.size
    )
    begun = len(losses) // per_epoch
    last = min(arguments.epochs, begun + (arguments.stop_after or arguments.epochs))
    name = block.__module__.removeprefix("gc_cuda.").partition(".")[0]
    bar = tqdm(
        total=arguments.epochs * per_epoch,
        initial=len(losses),
        disable=not world.first,
        desc=name,
        unit="step",
    )
    for epoch in range(begun, last):
        # The order of an epoch follows from its number alone: a run that goes on sees the same batches.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for batch in order[: per_epoch * arguments.batch].view(per_epoch, -1):
            mine = batch[share].to(world.device)
            loss = functional.cross_entropy(model(images[mine]), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(world.mean(loss))
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if checkpoint is not None and world.first:
            state = {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "losses": losses,
            }
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)  # never half a file, whenever the run is stopped
    bar.close()
    net.eval()
    with torch.no_grad():
        accuracy = float((net(test_images).argmax(1) == test_labels).float().mean())
    return losses, accuracy


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The loss curves on top of each other, and their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1), layout="constrained"
    )
    styles = ({"linewidth": 3, "color": "tab:blue", "alpha": 0.5}, {"linewidth": 1, "color": "black"})
    for (name, losses), style in zip(curves.items(), styles):
        top.semilogy(range(1, len(losses) + 1), losses, label=name, **style)
    top.set_title("A small GC ResNet on scikit-learn's digits")
    top.set_ylabel("training loss")
    top.legend()
    if len(curves) == 2:
        fused, reference = curves.values()
        difference = [abs(one - other) for one, other in zip(fused, reference)]
        shown = [max(value, 1e-17) for value in difference]
        bottom.semilogy(range(1, len(shown) + 1), shown, color="tab:red")
    bottom.set_ylabel("|difference|")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64, help="images of a step, over all processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch, and read at the start")
    parser.add_argument("--stop-after", type=int, metavar="EPOCHS", help="stop early, as if interrupted")
    parser.add_argument("--compare", action="store_true", help="train with the plain PyTorch block too")
    parser.add_argument("--picture", type=Path, help="draw the loss curves")
    arguments = parser.parse_args(argv)

    world = World(arguments.device)
    if arguments.batch % world.size:
        parser.error(f"--batch must be a multiple of the {world.size} processes, got {arguments.batch}")
    blocks: dict[str, type[nn.Module]] = {"fused": gc_cuda.ContextBlock}
    if arguments.compare:
        blocks["plain PyTorch"] = gc_cuda.reference.ContextBlock
    curves = {}
    for name, block in blocks.items():
        checkpoint = arguments.checkpoint
        if checkpoint is not None and name != "fused":
            checkpoint = checkpoint.with_stem(f"{checkpoint.stem}-plain")
        curves[name], accuracy = train(name, block, arguments, world, checkpoint)
        if world.first:
            steps, loss = len(curves[name]), curves[name][-1] if curves[name] else float("nan")
            print(f"{name}: {steps} steps, loss {loss:.6f}, test accuracy {accuracy:.1%}")
    if world.first and arguments.compare:
        difference = max(abs(one - other) for one, other in zip(*curves.values()))
        print(f"largest difference between the losses: {difference:.2g}")
    if world.first and arguments.picture is not None:
        draw(curves, arguments.picture)
        print(f"picture: {arguments.picture}")
    world.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
