"""What tests share: devices, layouts, dtypes, a grid of shapes with a reason for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from evaluate import LAYOUTS, missing_gpu
from torch import Tensor


class Shape(NamedTuple):
    """A feature map of the grid, and why it is there."""

    n: int
    c: int
    h: int
    w: int
    reason: str

    @property
    def size(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    def __str__(self) -> str:
        return "x".join(map(str, self.size))


SHAPES = (
    Shape(2, 1, 5, 7, "C = 1: the mask convolution is one product, NCHW and channels_last coincide"),
    Shape(3, 16, 1, 1, "S = 1: the softmax is 1 and the pooling is the identity"),
    Shape(1, 1, 1, 1, "one element: every tail at once"),
    Shape(2, 64, 7, 7, "7x7, the last map of a 224-pixel image: S = 49 is odd, C fills any vector"),
    Shape(1, 24, 199, 3, "long and thin: rows shorter than any vector, S = 597"),
    Shape(2, 2048, 7, 7, "C of c5 in a ResNet-50: many channels over few pixels"),
    Shape(1, 67, 13, 11, "odd primes: no vector width divides C, H or W"),
    Shape(3, 33, 31, 37, "odd everywhere, and S = 1147 is more than a tile"),
    Shape(9, 8, 4, 4, "many small images: more images than threads, less work than one tile in each"),
    Shape(2, 4, 8, 1, "W = 1: strides of the two layouts agree in one dimension more"),
    Shape(1, 3, 3, 5, "smaller than one vector in every dtype"),
    Shape(1, 12, 100, 168, "the pixels of c3 at 800x1333: an image is cut into splits that are merged"),
    Shape(1, 260, 25, 42, "the pixels of c5, and C = 4 modulo 256: vectors fit, tiles do not"),
    Shape(0, 8, 4, 4, "an empty batch is no error"),
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


_NO_GPU = missing_gpu()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(_NO_GPU != "", reason=_NO_GPU)]),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device in turn."""
    return torch.device(request.param)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    """Every shape of the grid in turn."""
    return request.param.size


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> torch.memory_format:
    """Both memory formats in turn."""
    return LAYOUTS[request.param]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype in turn."""
    return request.param


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """PyTorch's own error, which bounds ours, is that of float32 and not of TF32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@pytest.fixture
def random() -> Callable[..., Tensor]:
    """Standard normal tensors from a fixed seed, drawn on the CPU: every device sees the same numbers."""
    generator = torch.Generator().manual_seed(20190425)

    def draw(
        *size: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        layout: torch.memory_format = torch.contiguous_format,
        grad: bool = False,
    ) -> Tensor:
        tensor = torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)
        if len(size) == 4:
            tensor = tensor.contiguous(memory_format=layout)
        return tensor.requires_grad_(grad)

    return draw


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of CPU threads; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
