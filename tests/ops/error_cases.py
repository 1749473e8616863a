"""What test_errors.py and test_errors_of_the_block.py share: arguments that fit, and x that does not."""

from __future__ import annotations

import warnings

import torch

from gc_cuda import Transform

X = torch.arange(2 * 4 * 3 * 5, dtype=torch.float32).view(2, 4, 3, 5)
LOGITS, WEIGHT, BIAS, PER_CHANNEL = torch.zeros(2, 15), torch.zeros(4), torch.zeros(1), torch.zeros(2, 4)
# C = 4 channels and P = 3 hidden units
TRANSFORM = Transform(
    torch.zeros(3, 4, 1, 1),
    torch.zeros(3),
    torch.zeros(3, 1, 1),
    torch.zeros(3, 1, 1),
    torch.zeros(4, 3, 1, 1),
    torch.zeros(4),
)

DENSE = "must be a dense (torch.strided) tensor, got"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a prototype, says PyTorch
    NESTED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(2)])
    NESTED_X = torch.nested.nested_tensor([X[0], X[1]])

DTYPES = "x must be torch.float32, float16, bfloat16 or float64, got"
EMPTY = "x must have at least one channel and one pixel, got shape"
# What x is, the error
BAD_X = {
    "no tensor": ([[1.0]], TypeError, "x must be a torch.Tensor, got list"),
    "an array": (X.numpy(), TypeError, "x must be a torch.Tensor, got ndarray"),
    "none": (None, TypeError, "x must be a torch.Tensor, got NoneType"),
    "rank 3": (X[0], ValueError, "x must have shape [N, C, H, W], got [4, 3, 5]"),
    "rank 5": (X[None], ValueError, "x must have shape [N, C, H, W], got [1, 2, 4, 3, 5]"),
    "integers": (X.long(), TypeError, f"{DTYPES} torch.int64"),
    "booleans": (X > 0, TypeError, f"{DTYPES} torch.bool"),
    "complex": (X + 0j, TypeError, f"{DTYPES} torch.complex64"),
    "sparse": (X.to_sparse(), TypeError, f"x {DENSE} torch.sparse_coo"),
    "no rows": (X[:, :, :0], ValueError, f"{EMPTY} [2, 4, 0, 5]"),
    "no columns": (X[..., :0], ValueError, f"{EMPTY} [2, 4, 3, 0]"),
    "no channels": (X[:, :0], ValueError, f"{EMPTY} [2, 0, 3, 5]"),
}
