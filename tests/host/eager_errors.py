"""What eager float32 leaves on the numbers of the accuracy cases of tests/host/drivers, in units of 2^-24.

The largest error against float64 over the largest value. What this prints is written beside each case; the
kernels are held to twice that and four.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv1d, layer_norm, linear, silu

MASK = 0xFFFFFFFF


def pattern(seed: int, bits: int, *shape: int) -> Tensor:
    """The class Pattern of drivers/accuracy.h."""
    count = 1
    for extent in shape:
        count *= extent
    h = (torch.arange(count) * 0x9E3779B9 + seed) & MASK
    h = ((h ^ h >> 16) * 0x85EBCA6B) & MASK
    h = ((h ^ h >> 13) * 0xC2B2AE35) & MASK
    h = h ^ h >> 16
    return ((h >> (32 - bits)).double() * 2.0 ** (1 - bits) - 1).view(shape)


def errors(loss: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[int]) -> list[float]:
    """Of the gradients of these inputs, eager against float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [one.to(dtype).requires_grad_() for one in inputs]
        grads = torch.autograd.grad(loss(*leaves), [leaves[i] for i in wanted])
        found.append([grad.double() for grad in grads])
    return [float((a - b).abs().max() / b.abs().max() * 2**24) for a, b in zip(*found)]


def attention(x: Tensor, logits: Tensor) -> Tensor:
    return torch.matmul(x, logits.softmax(dim=1).unsqueeze(2)).squeeze(2)


def pool_backward(
    name: str, shape: tuple[int, int, int], mean: float, weights: float, alike: bool = False
) -> None:
    n, c, s = shape
    distinct = 1 if alike else n
    x = (4 * pattern(1, 10, distinct, c, s) + mean).expand(shape)
    w = weights * pattern(2, 6, c)
    grad_context, grad = pattern(3, 20, distinct, c).expand(n, c), pattern(4, 20, *shape)

    def of_mask(x: Tensor, w: Tensor) -> Tensor:
        logits = conv1d(x, w.view(1, c, 1)).squeeze(1)
        return (attention(x, logits) * grad_context.to(x)).sum()

    def of_logits(x: Tensor, logits: Tensor) -> Tensor:
        return (attention(x, logits) * grad_context.to(x)).sum()

    def of_block(x: Tensor, w: Tensor) -> Tensor:
        return of_mask(x, w) + (x * grad.to(x)).sum()

    logits = torch.einsum("ncs,c->ns", x, w)
    assert torch.equal(logits, logits.float().double()), "the logits are exact"
    mask, block = errors(of_mask, [x, w], [0, 1]), errors(of_block, [x, w], [0, 1])
    given = errors(of_logits, [x, logits], [0, 1])
    print(
        f"{name}: logits {given[1]:.1f}, x {mask[0]:.1f} {given[0]:.1f} {block[0]:.1f}, weight {mask[1]:.1f}"
    )


def transform_backward(name: str, n: int, c: int, p: int, one_sign: bool) -> None:
    context = pattern(1, 20, n, c)
    w1, w2 = pattern(2, 20, p, c) / 4, pattern(6, 20, c, p)
    norm_weight, norm_bias = 1 + pattern(4, 20, p) / 2, pattern(5, 20, p)
    b1, b2 = 2 + pattern(3, 20, p), torch.zeros(c)
    grad = pattern(7, 20, n, c)
    grad = (grad + 1) / 2 if one_sign else grad

    def loss(w1: Tensor, b1: Tensor, weight: Tensor, bias: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        hidden = layer_norm(linear(context.to(w1), w1, b1), weight.shape, weight, bias)
        return (linear(silu(hidden), w2, b2) * grad.to(w1)).sum()

    found = errors(loss, [w1, b1, norm_weight, norm_bias, w2, b2], range(6))
    names = ("w1", "b1", "norm_weight", "norm_bias", "w2", "b2")
    print(f"{name}: " + ", ".join(f"{one} {found[names.index(one)]:.1f}" for one in ("w2", "b2", *names[:4])))


def statistics(name: str, shape: tuple[int, int, int], mean: float) -> None:
    y = 4 * pattern(1, 10, *shape) + mean
    assert torch.equal(y, y.float().double()), "y is exact"
    found = [batch_norm(y.to(dtype), None, None, training=True) for dtype in (torch.float32, torch.float64)]
    error = (found[0].double() - found[1]).abs().max() / found[1].abs().max() * 2**24
    print(f"{name}: {float(error):.1f}")


def main() -> None:
    torch.set_num_threads(1)
    pool_backward("peaked", (2, 64, 400), 10, 16)
    pool_backward("peaked_chunks", (2, 8200, 16), 10, 1)
    pool_backward("spread", (2, 64, 400), 10, 0.5)
    pool_backward("far_from_zero", (1, 32, 2100), 100, 0.125)
    pool_backward("spread_chunks", (1, 8200, 16), 8, 0.03125)
    pool_backward("alike", (4096, 16, 4), 10, 0.5, alike=True)
    transform_backward("many_images", 8192, 64, 64, one_sign=False)
    transform_backward("very_many_images", 65536, 32, 32, one_sign=False)
    transform_backward("very_many_images_one_sign", 65536, 32, 32, one_sign=True)
    statistics("statistics", (2, 16, 3000), 0)
    statistics("statistics_far_from_zero", (2, 16, 3000), 100)
    statistics("statistics_farther", (2, 16, 3000), 4096)
    statistics("statistics_many_images", (300, 8, 49), 100)


if __name__ == "__main__":
    main()
