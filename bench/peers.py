"""Who is timed, what each of them computes, and whether that is right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from cases import FUSIONS, Problem
from torch import Tensor, nn

import gc_cuda

OURS, EAGER, COMPILED = "gc_cuda", "eager", "torch.compile"

Call = Callable[[], tuple[Tensor, ...]]

# Roundings to the dtype between x and out: context, product, norm, product, sigmoid, scaling, sum, and one to
# spare; and as many again on the way back to a gradient. Gradients are sums over pixels and images, too, of
# terms that may cancel: so many more roundings, to the dtype in which sums are kept.
ROUNDINGS = 8
GRADIENT_ROUNDINGS = 16
SUM_ROUNDINGS = 128
TF32_EPS = 2.0**-10


class Error(NamedTuple):
    """The quantity that is worst off, its largest error, and what is allowed."""

    quantity: str
    error: float
    allowed: float

    @property
    def is_right(self) -> bool:
        """False for NaN, too."""
        return self.error <= self.allowed


def step(block: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor, grad: Tensor) -> Call:
    """The call that gives the output and, where x requires a gradient, those of x and of all parameters.

    autograd.grad leaves .grad alone: it is None in every call, and no time goes into adding to it.
    """

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (block(x),)

    def training() -> tuple[Tensor, ...]:
        out = block(x)
        return (out, *torch.autograd.grad(out, inputs, grad))

    inputs = [x, *parameters]
    return training if x.requires_grad else forward


def quantities(problem: Problem) -> list[str]:
    """The names of what `step` gives."""
    names = [name for name, _ in problem.reference.named_parameters()] if problem.training else []
    return ["output", *(f"gradient of {name}" for name in ["x"] * problem.training + names)]


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def peers(problem: Problem, compiled: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """What is timed, by name, and why something is not. All of them have been called once."""
    parameters = list(problem.reference.parameters())
    calls = {OURS: step(problem.ours, list(problem.ours.parameters()), problem.x, problem.grad)}
    calls[OURS]()  # ours may not fail; the others may
    missing = {}
    others = {EAGER: lambda: problem.reference}
    if compiled:
        torch.compiler.reset()
        others[COMPILED] = lambda: torch.compile(problem.reference, dynamic=False)
    else:
        missing[COMPILED] = "switched off by --no-compile"
    for name, make in others.items():
        try:
            call = step(make(), parameters, problem.x, problem.grad)
            call()
        except Exception as error:  # no compiler, no memory, an unsupported dtype: the rest goes on
            missing[name] = f"does not run here: {first_line(error)}"
        else:
            calls[name] = call
    return calls, missing


def truth(problem: Problem) -> list[Tensor]:
    """The results of the reference in float64, from the same input values."""
    double = gc_cuda.reference.ContextBlock(
        problem.case.size[0], problem.case.ratio, "att", FUSIONS[problem.case.fusion]
    ).to(problem.x.device, torch.float64)
    double.load_state_dict(problem.reference.state_dict())
    x = problem.x.detach().double().requires_grad_(problem.training)
    return [result.detach() for result in step(double, list(double.parameters()), x, problem.grad.double())()]


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def uses_tf32(x: Tensor) -> bool:
    """Whether PyTorch may round what it multiplies to TF32."""
    allowed = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    return x.is_cuda and x.dtype == torch.float32 and allowed


def rounding(quantity: str, eps: float, accumulation_eps: float) -> float:
    """What a result may lose to its roundings, relative to its largest value."""
    if quantity == "output":
        return ROUNDINGS * eps / 2
    return (GRADIENT_ROUNDINGS * eps + SUM_ROUNDINGS * accumulation_eps) / 2


def errors(problem: Problem, calls: dict[str, Call]) -> dict[str, Error]:
    """Each peer's worst error against the reference in float64, of the output and of every gradient.

    Allowed are twice eager's own error without TF32 plus a number of roundings; eager itself gets eight times
    those, and where PyTorch may use TF32, eager and torch.compile may round to that.
    """
    exact = truth(problem)
    names = quantities(problem)
    sizes = [float(tensor.abs().max()) for tensor in exact]
    if "gradient of conv_mask.bias" in names:
        # It is exactly 0: a sum of terms that cancel, as large as those of the weight's gradient.
        at = names.index("gradient of conv_mask.bias")
        exact[at].zero_()
        sizes[at] = sizes[names.index("gradient of conv_mask.weight")]

    def largest(call: Call) -> list[float]:
        results = call()
        return [float((result.detach().double() - t).abs().max()) for result, t in zip(results, exact)]

    own = [0.0] * len(names)
    if EAGER in calls:
        with full_precision():
            own = largest(calls[EAGER])

    dtype = problem.x.dtype
    accumulation_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    worst = {}
    for name, call in calls.items():
        eps = TF32_EPS if name != OURS and uses_tf32(problem.x) else torch.finfo(dtype).eps
        found = []
        for quantity, size, error, of_eager in zip(names, sizes, largest(call), own):
            slack = rounding(quantity, eps, accumulation_eps) * size
            found.append(Error(quantity, error, 8 * slack if name == EAGER else 2 * of_eager + slack))
        worst[name] = max(found, key=_badness)
    return worst


def _badness(error: Error) -> float:
    """Error over allowance; a NaN is worst of all."""
    ratio = error.error / error.allowed if error.allowed else float(error.error > 0)
    return ratio if ratio == ratio else float("inf")
