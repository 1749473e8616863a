"""What can be said of an installed CUDA build on a machine without a GPU; ./compile.sh cuda runs it.

A program and not a pytest module, since it must see the installed package and not the one beside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gc_cuda
from gc_cuda import _extension, _toolkit, reference

OPERATORS = (
    "softmax_pool",
    "softmax_pool_backward",
    "attention_pool",
    "attention_pool_backward",
    "pixel_sum",
    "broadcast",
    "broadcast_mul_backward",
    "broadcast_sums",
    "global_context",
    "global_context_backward",
)


def check(condition: bool, what: str) -> None:
    if not condition:
        sys.exit(f"FAILED: {what}")
    print(f"ok: {what}")


def check_installation() -> None:
    source = Path(__file__).resolve().parents[2] / "gc_cuda"
    package = Path(gc_cuda.__file__).resolve().parent
    check(package != source, f"the installed package is looked at: {package}")
    check(not torch.cuda.is_available(), "no GPU is visible")


def check_configuration() -> None:
    _extension.require()
    _extension.require_cuda()
    config = gc_cuda._extension.build_config()
    assert config is not None and torch.version.cuda is not None
    print("   ", config)
    check(config["version"] == gc_cuda.__version__, "the version is that of the package")
    check(config["torch"] == torch.__version__, f"built for the torch that is here, {torch.__version__}")
    check(config["cuda"].split(".")[0] == torch.version.cuda.split(".")[0], "CUDA is that of torch")
    expected = os.environ.get("TORCH_CUDA_ARCH_LIST") or _toolkit.default_arch_list(
        config["cuda"], torch.version.cuda
    )
    check(config["arch_list"] == expected, f"architectures: {expected}")


def check_registration() -> None:
    for name in OPERATORS:
        for key in ("CPU", "CUDA", "Meta"):
            has = torch._C._dispatch_has_kernel_for_dispatch_key(f"gc_cuda::{name}", key)
            check(has, f"gc_cuda::{name} has a kernel for {key}")


def outputs_and_gradients(operation: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = operation(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad(out, leaves, weights)]


def check_cpu_tensors() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 37, 9, 13, dtype=torch.float64)
    per_image, logits, weight = torch.randn(2, 37), torch.randn(2, 9 * 13), torch.randn(37)
    companions: dict[str, list[Tensor]] = {
        "softmax_pool": [logits],
        "attention_pool": [weight],
        "average_pool": [],
        "broadcast_add": [per_image],
        "broadcast_mul": [per_image],
        "broadcast_mul_add": [per_image, per_image.flip(0)],
    }
    for name, others in companions.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            inputs = [x.contiguous(memory_format=layout), *(other.double() for other in others)]
            ours = outputs_and_gradients(getattr(gc_cuda, name), inputs)
            expected = outputs_and_gradients(getattr(reference, name), inputs)
            for a, b in zip(ours, expected):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            check(True, f"{name} and its gradients on the CPU equal the reference, {layout}")

    six = [torch.randn(*shape).double() for shape in [(8, 37), (8,), (8,), (8,), (37, 8), (37,)]]
    inputs = [x, weight.double(), *six]
    ours, expected = (
        outputs_and_gradients(
            lambda x, weight, *six, library=library: library.global_context(
                x, weight, add=gc_cuda.Transform(*six)
            ),
            inputs,
        )
        for library in (gc_cuda, reference)
    )
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    check(True, "global_context and its gradients on the CPU equal the reference")


def check_request_without_device() -> None:
    """Asking for a GPU where there is none must be an error that says so, and leave the process usable."""
    block = gc_cuda.ContextBlock(16, 1 / 4)
    try:
        block.to("cuda")(torch.zeros(1, 16, 4, 4, device="cuda"))
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        check(any(word in message for word in ("NVIDIA", "GPU", "CUDA")), f"a CUDA request says: {message}")
    else:
        check(False, "a CUDA request without a device is an error")
    block = gc_cuda.ContextBlock(16, 1 / 4)
    x = torch.randn(1, 16, 4, 4)
    check(torch.equal(block(x), x), "the CPU still works after it, and a new block is the identity")


if __name__ == "__main__":
    check_installation()
    check_configuration()
    check_registration()
    check_cpu_tensors()
    check_request_without_device()
