"""What is known without measuring: the passes over x."""

from __future__ import annotations

from cases import FORWARD, TRAINING
from peers import COMPILED, EAGER, OURS

# Reads and writes of a tensor of x's size, with channel_add, by direction and layout. Eager: the mask
# convolution, the weighted sum, the broadcast's read and write; backward the sums of the gradient, the
# gradients of the weighted sum and of the convolution for x and their weights, and the additions of three
# gradients of x. Inductor fuses the pointwise part, and has to make x contiguous for the product where it is
# NCHW.
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
