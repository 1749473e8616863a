"""How close is close enough: one rule for every comparison with the reference.

The truth is the reference in float64 on the very same input values. In float64 a result must agree with it to
1e-12 of its largest value. In a lower precision it may be as far from the truth as PyTorch itself (the
reference computed in that dtype) plus one rounding to the dtype, in the largest deviation and in the root
mean square alike: u = eps / 2 of that dtype, relative. PyTorch rounds too, but may be lucky: its error is 0
where the result happens to be a number of few bits. A chain of operations with several such roundings names
their number (``roundings``).

In either case there is a slack for sums, which are kept in the accumulation type and in another order than
PyTorch's. A sum of n terms in the order of a machine with vectors meets about log2(n) + n / (lanes *
accumulators) roundings on the way of each term, which cancel like a random walk: SUM_ROUNDINGS of them are
allowed, each of u = eps / 2 of the accumulation type, relative to the sum of the terms' absolute values
(``magnitude``), because that is what a rounding in a sum is relative to.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT64_RELATIVE = 1e-12
SUM_ROUNDINGS = 32


def assert_close_to_truth(
    name: str,
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    magnitude: Tensor | None = None,
    *,
    roundings: int = 1,
    rounded_to: torch.dtype | None = None,
) -> None:
    """Compare a result with the truth and with PyTorch's own result.

    Args:
        name: of the quantity, for the message.
        actual: the result under test.
        eager: PyTorch's result from the same inputs, of the same shape and dtype.
        truth: the float64 result from the same inputs, of the same shape.
        magnitude: the sum of the absolute values of the terms that ``truth`` sums; ``truth`` where it sums
        nothing.
        roundings: to the dtype on the way from the inputs.
        rounded_to: the dtype of those roundings where it is not that of the result.

    Raises:
        AssertionError: if the shape or dtype differs, a NaN or infinity is elsewhere, or the error is too
        large.
    """
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    ours, theirs, exact = (t.detach().double().cpu() for t in (actual, eager, truth))
    assert torch.equal(ours.isnan(), exact.isnan()), (
        f"{name}: {int(ours.isnan().sum())} NaN, expected {int(exact.isnan().sum())}, or elsewhere"
    )
    assert torch.equal(ours[exact.isinf()], exact[exact.isinf()]), f"{name}: the infinities differ"
    finite = exact.isfinite()
    if not finite.any():
        return
    terms = exact if magnitude is None else magnitude.detach().double().cpu().expand_as(exact)
    theirs = torch.where(theirs.isfinite(), theirs, exact)  # PyTorch's overflow is no licence for ours
    ours, theirs, exact, terms = (t[finite] for t in (ours, theirs, exact, terms))

    summing = SUM_ROUNDINGS * torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps / 2
    if actual.dtype == torch.float64:
        got = _largest(ours - exact)
        allowed = FLOAT64_RELATIVE * _largest(exact) + summing * _largest(terms)
        assert got <= allowed, f"{name}: largest error {got:.3g}, allowed {allowed:.3g}"
        return
    rounding = roundings * torch.finfo(rounded_to or actual.dtype).eps / 2
    for measure in (_largest, _root_mean_square):
        own = measure(theirs - exact)
        got, allowed = measure(ours - exact), own + rounding * measure(exact) + summing * measure(terms)
        assert got <= allowed, (
            f"{name}: {measure.__name__[1:]} error {got:.3g}, allowed {allowed:.3g}; PyTorch's own: {own:.3g}"
        )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())
