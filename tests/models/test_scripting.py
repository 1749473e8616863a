"""torch.jit.script cannot compile what is ours, and says what to do; tracing and restoring work."""

import re

import pytest
import torch
from small_net import Net
from torch import Tensor, nn

import gc_cuda
from gc_cuda import blocks
from gc_cuda.models import swap

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

INSTEAD = "use torch.jit.trace, which records PyTorch's own operators, or torch.export"
X, PER_CHANNEL = torch.randn(2, 8, 5, 3), torch.randn(2, 8)


def refusal(model: object) -> str:
    with pytest.raises(RuntimeError, match=re.escape("gc_cuda: torch.jit.script cannot compile")) as raised:
        torch.jit.script(model)
    return str(raised.value)


OWN = {
    "ContextBlock": lambda: gc_cuda.ContextBlock(8, 1 / 2),
    "reference.ContextBlock": lambda: gc_cuda.reference.ContextBlock(8, 1 / 2),
    "SEBlock": lambda: blocks.SEBlock(8),
    "SimplifiedNonLocalBlock": lambda: blocks.SimplifiedNonLocalBlock(8),
    "NonLocalBlock": lambda: blocks.NonLocalBlock(8),
}


@pytest.mark.parametrize("name", OWN)
def test_a_block_of_ours_alone_and_in_a_model(name):
    block = OWN[name]()
    kind = name.rpartition(".")[2]
    for model in (block, nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(block))):
        assert refusal(model) == f"gc_cuda: torch.jit.script cannot compile {kind}: {INSTEAD}"
    traced = torch.jit.trace(block, X)
    torch.testing.assert_close(traced(X), block(X))


def test_a_refusal_changes_nothing():
    net = Net()
    children, before = dict(net.named_modules()), dict(vars(net))
    refusal(net)
    assert dict(net.named_modules()) == children
    assert vars(net) == before


class UsesAFunction(nn.Module):
    def forward(self, x: Tensor, term: Tensor) -> Tensor:
        return gc_cuda.broadcast_add(x, term)


def test_a_function_alone_and_where_it_is_called():
    for name in (
        "attention_pool",
        "average_pool",
        "broadcast_add",
        "broadcast_mul",
        "broadcast_mul_add",
        "global_context",
        "softmax_pool",
    ):
        assert f"cannot compile {name}: {INSTEAD}" in refusal(getattr(gc_cuda, name))
    model = UsesAFunction()
    assert f"cannot compile broadcast_add: {INSTEAD}" in refusal(model)
    traced = torch.jit.trace(model, (X, PER_CHANNEL))
    assert torch.equal(traced(X, PER_CHANNEL), model(X, PER_CHANNEL))


def test_a_user_may_still_ignore_what_is_ours():
    """As TorchScript allows it for any Python: the call stays Python's."""

    @torch.jit.ignore
    def add(x: Tensor, term: Tensor) -> Tensor:
        return gc_cuda.broadcast_add(x, term)

    class Ignores(nn.Module):
        def forward(self, x: Tensor, term: Tensor) -> Tensor:
            return add(x, term)

    assert torch.equal(torch.jit.script(Ignores())(X, PER_CHANNEL), gc_cuda.broadcast_add(X, PER_CHANNEL))


class SqueezeExcitation(nn.Module):
    """A double of torchvision's, which can be scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Sigmoid()

    def _scale(self, x: Tensor) -> Tensor:
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self._scale(x) * x


SqueezeExcitation.__module__ = "torchvision.ops.misc"


def test_an_accelerated_model_is_to_be_restored_first():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), SqueezeExcitation()).eval()
    expected = model(X)
    assert gc_cuda.accelerate(model).accelerated == ["1"]
    words = f"an accelerated SqueezeExcitation: restore the model first: gc_cuda.restore(model); or {INSTEAD}"
    for accelerated in (model, model[1]):
        assert refusal(accelerated) == f"gc_cuda: torch.jit.script cannot compile {words}"
    gc_cuda.restore(model)
    torch.testing.assert_close(torch.jit.script(model)(X), expected)
    gc_cuda.accelerate(model)
    torch.testing.assert_close(model(X), expected)


def test_an_accelerated_block_of_mmcv():
    cnn = pytest.importorskip("mmcv.cnn", reason="mmcv is not installed")
    model = nn.Sequential(cnn.ContextBlock(8, 1 / 2))
    gc_cuda.accelerate(model)
    assert "an accelerated ContextBlock: restore the model first: gc_cuda.restore(model)" in refusal(model)


def test_a_bottleneck_with_an_inserted_block():
    class Bottleneck(nn.Sequential):
        pass

    bottleneck = Bottleneck(gc_cuda.ContextBlock(8, 1 / 2))
    bottleneck.__class__ = swap.derive(
        swap.Derivation(Bottleneck, "GC", lambda: lambda self, own, x: own(self, x))
    )
    assert f"a {Bottleneck.__qualname__} with a block from gc_cuda.insert: {INSTEAD}" in refusal(bottleneck)
