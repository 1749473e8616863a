"""Some steps of training, and a comparison of all that they left."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEPS = 3


def steps(net: nn.Module, x: Tensor, count: int = STEPS) -> list[dict[str, Tensor]]:
    """Of each step the output, the gradients, and the parameters and buffers that it left."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.001, momentum=0.9)
    found = []
    for step in range(count):
        given = (x * (1 + step / 4)).detach().requires_grad_()
        optimizer.zero_grad()
        out = net(given)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
        gradients = {
            f"gradient of {name}": parameter.grad.clone()
            for name, parameter in net.named_parameters()
            if parameter.grad is not None
        }
        assert given.grad is not None
        optimizer.step()
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        found.append({"output": out.detach(), "gradient of x": given.grad, **gradients, **state})
    return found


def assert_same_steps(
    actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], relative: float = 1e-9
) -> None:
    """Relative to the largest value of a tensor; whole numbers are equal.

    A gradient that is zero but for roundings, as of a bias before a batch norm, is measured by the others.
    """
    for step, (one, other) in enumerate(zip(actual, expected)):
        assert list(one) == list(other)
        of_gradients = max(float(t.abs().max()) for name, t in other.items() if name.startswith("gradient"))
        for name, truth in other.items():
            assert one[name].dtype == truth.dtype, name
            assert one[name].stride() == truth.stride(), name
            if not truth.is_floating_point():
                assert torch.equal(one[name], truth), f"{name} in step {step}"
                continue
            largest = float(truth.abs().max())
            if name.startswith("gradient"):
                largest = max(largest, 1e-3 * of_gradients)
            error = (one[name] - truth).abs().max()
            assert error <= relative * largest, f"{name} in step {step}: {error:.3g} of {largest:.3g}"
    assert len(actual) == len(expected)
