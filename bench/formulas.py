"""What is known without measuring: passes over x by the formula, and what was published about the block."""

from __future__ import annotations

from typing import NamedTuple

from cases import FORWARD, TRAINING
from peers import COMPILED, EAGER, OURS

# Reads and writes of a tensor of x's size, with channel_add, by direction and layout. Eager: the mask convolution, the
# weighted sum, the broadcast's read and write; backward the sums of the gradient, the gradients of the weighted sum
# and of the convolution for x and their weights, and the additions of three gradients of x. Inductor fuses the
# pointwise part, and has to make x contiguous for the product where it is NCHW.
FORWARD_PASSES = {EAGER: (4, 4), COMPILED: (6, 4), OURS: (3, 3)}  # nchw, channels_last
BACKWARD_PASSES = {EAGER: (11, 11), COMPILED: (7, 7), OURS: (4, 4)}
LAYOUTS = ("nchw", "channels_last")
PASSES = {
    peer: {
        **{(FORWARD, layout): forward for layout, forward in zip(LAYOUTS, FORWARD_PASSES[peer])},
        **{
            (TRAINING, layout): forward + backward
            for layout, forward, backward in zip(LAYOUTS, FORWARD_PASSES[peer], BACKWARD_PASSES[peer])
        },
    }
    for peer in FORWARD_PASSES
}

# Blocks in c3, c4 and c5: one in every bottleneck
BLOCKS = {"R50": {"c3": 4, "c4": 6, "c5": 3}, "R101": {"c3": 4, "c4": 23, "c5": 3}}
BLOCKS["X101"] = BLOCKS["R101"]


class Published(NamedTuple):
    """Mask R-CNN with FPN at 800×1333 on V100s, as published; without and with the blocks."""

    backbone: str
    norm: str
    ratio: float
    seconds: tuple[float, float]  # of a training iteration
    fps: tuple[float, float]  # of inference
    gigabytes: tuple[float, float]  # of training memory

    @property
    def training_ms(self) -> float:
        """What the blocks add to an iteration."""
        return 1e3 * (self.seconds[1] - self.seconds[0])

    @property
    def inference_ms(self) -> float:
        """What they add to an image."""
        return 1e3 / self.fps[1] - 1e3 / self.fps[0]


PUBLISHED = (
    Published("R50", "fixed BN", 1 / 16, (0.453, 0.533), (10.6, 10.1), (3.9, 4.5)),
    Published("R50", "fixed BN", 1 / 4, (0.453, 0.533), (10.6, 9.9), (3.9, 4.6)),
    Published("R101", "fixed BN", 1 / 16, (0.571, 0.731), (9.5, 8.6), (5.8, 7.0)),
    Published("R101", "fixed BN", 1 / 4, (0.571, 0.747), (9.5, 8.6), (5.8, 7.1)),
    Published("X101", "SyncBN", 1 / 16, (0.912, 1.055), (8.5, 7.7), (7.1, 8.2)),
    Published("X101", "SyncBN", 1 / 4, (0.912, 1.037), (8.5, 7.6), (7.1, 8.3)),
)
SOURCES = (
    "Cao, Xu, Lin, Wei, Hu: GCNet ([arXiv:1904.11492](https://arxiv.org/abs/1904.11492)), and the table "
    '"Main Results" of its model zoo ([github.com/xvjiarui/GCNet](https://github.com/xvjiarui/GCNet)): '
    "8 NVIDIA Tesla V100, PyTorch 1.1.0, CUDA 9.0, cuDNN 7.0"
)
