"""What the benchmark runs: the grid of cases, the tensors of one, and the bytes that it has to move."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import gc_cuda

FORWARD, TRAINING = "forward", "forward+backward"
DIRECTIONS = (FORWARD, TRAINING)

# C, H, W: a ResNet-50 at stride 8, 16 and 32, for an image padded to 800x1344 and for one of 224x224
DETECTION = {"c3": (512, 100, 168), "c4": (1024, 50, 84), "c5": (2048, 25, 42)}
IMAGENET = {"28x28": (512, 28, 28), "14x14": (1024, 14, 14), "7x7": (2048, 7, 7)}
STAGES = {**DETECTION, **IMAGENET}
IMAGENET_BATCH = 32

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
FUSIONS = {"add": ("channel_add",), "mul": ("channel_mul",), "both": ("channel_add", "channel_mul")}


class Case(NamedTuple):
    """One block on one feature map, in one direction."""

    direction: str
    fusion: str
    ratio: float
    dtype: str
    stage: str
    size: tuple[int, int, int]  # C, H, W
    batch: int
    layout: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H, W."""
        return self.batch, *self.size

    @property
    def group(self) -> str:
        """What a section of the table has in common."""
        return f"{self.direction}, {self.dtype}, ratio {ratio_text(self.ratio)}, {self.fusion}"

    @property
    def map(self) -> str:
        return f"{self.stage} {'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        return f"{self.map} {self.layout}, {self.group}"

    @property
    def passes(self) -> int:
        """How often x, or a tensor of its size, has to be read or written at least.

        Forward: the pooling reads x, the broadcast reads it and writes the output. Backward: the sums over
        the pixels read the gradient (and x, for the gradient of the scale); then x and the gradient are read
        and that of x is written.
        """
        if self.direction == FORWARD:
            return 3
        return 3 + (4 if self.fusion == "add" else 5)

    @property
    def bytes_moved(self) -> int:
        """In those passes; parameters and vectors are left out."""
        return self.passes * torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


def ratio_text(ratio: float) -> str:
    """0.0625 -> 1/16."""
    inverse = 1 / ratio
    return f"1/{inverse:.0f}" if inverse > 1 and inverse == round(inverse) else f"{ratio:g}"


def grid(
    stages: dict[str, tuple[int, int, int]],
    batches: Sequence[int],
    layouts: Sequence[str],
    dtypes: Sequence[str],
    ratios: Sequence[float],
    fusions: Sequence[str],
    directions: Sequence[str],
) -> list[Case]:
    """Every combination, section by section; the ImageNet maps come once, at IMAGENET_BATCH."""
    return [
        Case(direction, fusion, ratio, dtype, stage, size, batch, layout)
        for fusion, ratio, dtype, direction in itertools.product(fusions, ratios, dtypes, directions)
        for stage, size in stages.items()
        for batch in ([IMAGENET_BATCH] if stage in IMAGENET else batches)
        for layout in layouts
    ]


class Problem(NamedTuple):
    """The tensors of a case, and a block with the same parameters in both implementations."""

    case: Case
    x: Tensor  # requires a gradient where the case has a backward pass
    grad: Tensor  # of the output: dense, random, in the layout of x
    ours: nn.Module
    reference: nn.Module

    @property
    def training(self) -> bool:
        return self.case.direction == TRAINING


def make(case: Case, device: str) -> Problem:
    """The same numbers for the same case, every time."""
    torch.manual_seed(0)
    arguments = case.size[0], case.ratio, "att", FUSIONS[case.fusion]
    ours, reference = gc_cuda.ContextBlock(*arguments), gc_cuda.reference.ContextBlock(*arguments)
    _train(ours)
    reference.load_state_dict(ours.state_dict())
    dtype, layout = DTYPES[case.dtype], LAYOUTS[case.layout]
    x, grad = (
        torch.randn(case.shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(2)
    )
    x.requires_grad_(case.direction == TRAINING)
    return Problem(case, x, grad, ours.to(device, dtype), reference.to(device, dtype))


def _train(block: nn.Module) -> None:
    """Parameters as if trained: a new block is the identity, which proves nothing.

    The biases of the layer norms outweigh what they are added to, so that no hidden unit is near the kink of
    its ReLU: there, a rounding would decide whether a gradient passes, and no result could be checked.
    """
    for name, parameter in block.named_parameters():
        if parameter.dim() == 4:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter.dim() == 3 and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.05, 0.15)
        elif parameter.dim() == 3:
            parameter.data.normal_().sign_()
        else:
            nn.init.normal_(parameter, std=0.5)
