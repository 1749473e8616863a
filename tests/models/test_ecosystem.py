"""What PyTorch users do to a model: loss scaling, checkpointing, copying, saving, torch.func, deterministic
algorithms, an optimizer's life.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from block_cases import CONFIGURATIONS, FUNCTIONS, Spy, draw_inputs, function_of
from paths import ROOT, TESTS
from small_net import BOTH, Net, new_net
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gc_cuda

SIZE = (2, 3, 10, 13)


def gradients(net, out):
    net.zero_grad()
    out.square().mean().backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


# Loss scaling


def test_grad_scaler(random, device):
    """Scaled by a power of two, unscaled, stepped: bit for bit the step without; an overflow skips it."""
    x = random(*SIZE, dtype=torch.float32, device=device)
    nets = [new_net().to(device) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in nets]
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    scaler.scale(nets[0](x).square().mean()).backward()
    scaler.step(optimizers[0])
    scaler.update()
    nets[1](x).square().mean().backward()
    optimizers[1].step()
    for one, other in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    before = copy.deepcopy(nets[0].state_dict())
    optimizers[0].zero_grad()
    scaler.scale(nets[0](x).mean() * float("inf")).backward()
    scaler.step(optimizers[0])
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(tensor, before[name]) for name, tensor in nets[0].state_dict().items())


# Recomputation and determinism


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(random, use_reentrant, device):
    """Recomputed in the backward pass: the bits are those of the kept ones."""
    net = new_net().to(device)
    x = random(*SIZE, dtype=torch.float32, device=device, grad=True)
    expected = gradients(net, net(x))
    first, x.grad = x.grad, None
    with Spy() as spy:
        out = checkpoint(net, x, use_reentrant=use_reentrant)
    operator = "gc_cuda::global_context" if use_reentrant else "gc_cuda::global_context_kept"
    assert spy.names().count(operator) == 2
    for actual, one in zip([*gradients(net, out), x.grad], [*expected, first]):
        assert torch.equal(actual, one)


def test_checkpoint_sequential_and_selective(random):
    """Several segments; and the block's output kept while everything else is computed again."""
    blocks = nn.Sequential(*(new_net(seed).first for seed in range(4)))
    x = random(2, 16, 5, 7, dtype=torch.float32, grad=True)
    expected = gradients(blocks, blocks(x))
    for actual, one in zip(
        gradients(blocks, checkpoint_sequential(blocks, 2, x, use_reentrant=False)), expected
    ):
        assert torch.equal(actual, one)

    selective = pytest.importorskip("torch.utils.checkpoint")
    if not hasattr(selective, "create_selective_checkpoint_contexts"):
        pytest.skip("this torch has no selective checkpointing")
    policy = selective.CheckpointPolicy

    def keep(context, operator, *args, **kwargs):
        ours = operator is torch.ops.gc_cuda.global_context_kept.default
        return policy.MUST_SAVE if ours else policy.PREFER_RECOMPUTE

    net = new_net()
    image = random(*SIZE, dtype=torch.float32)
    expected = gradients(net, net(image))
    out = checkpoint(
        net,
        image,
        use_reentrant=False,
        context_fn=lambda: selective.create_selective_checkpoint_contexts(keep),
    )
    net.zero_grad()
    with Spy() as spy:
        out.square().mean().backward()
    assert "gc_cuda::global_context_kept" not in spy.names(), "kept, not computed again"
    for parameter, one in zip(net.parameters(), expected):
        assert torch.equal(parameter.grad, one)


def test_deterministic_algorithms(random, device):
    """Nothing here is refused, and nothing changes: there is no other algorithm."""
    net = new_net().first.to(device)
    x = random(2, 16, 9, 14, dtype=torch.float32, device=device, grad=True)
    expected = [net(x).detach(), *gradients(net, net(x))]
    torch.use_deterministic_algorithms(True)
    try:
        actual = [net(x).detach(), *gradients(net, net(x))]
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(actual, expected):
        assert torch.equal(one, other)


# Copies and files


def round_trip_torch_save(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda net: pickle.loads(pickle.dumps(net)),
        round_trip_torch_save,
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_copies(random, copied, used):
    """Also of a model that has run, with its gradients."""
    net = new_net()
    x = random(*SIZE, dtype=torch.float32)
    if used:
        gradients(net, net(x))
    twin = copied(net)
    assert isinstance(twin.first, gc_cuda.ContextBlock) and str(twin) == str(net)
    assert torch.equal(twin(x), net(x))
    for actual, one in zip(gradients(twin, twin(x)), gradients(net, net(x))):
        assert torch.equal(actual, one)


def test_a_saved_model_is_read_by_a_new_process(random, tmp_path):
    net = new_net()
    x = random(*SIZE, dtype=torch.float32)
    torch.save(net, tmp_path / "net.pt")
    torch.save((x, net(x).detach()), tmp_path / "expected.pt")
    program = f"""
import sys
sys.path[:0] = {[str(TESTS), str(ROOT)]!r}
import torch
net = torch.load({str(tmp_path / "net.pt")!r}, weights_only=False)
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(net(x), expected)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_state_dict_is_read_as_weights_only(random, tmp_path):
    net = new_net()
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    twin = Net()
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    x = random(*SIZE, dtype=torch.float32)
    assert torch.equal(twin(x), net(x))


def test_meta_device_then_materialized(random):
    """As large models are made: no memory until the weights are there."""
    with torch.device("meta"):
        net = Net()
    assert all(parameter.is_meta for parameter in net.parameters())
    assert net(torch.empty(*SIZE, device="meta")).shape == (2, 5)
    net = net.to_empty(device="cpu")
    weights = new_net().state_dict()
    net.load_state_dict(weights)
    x = random(*SIZE, dtype=torch.float32)
    assert torch.equal(net(x), new_net()(x))
    twin = Net()
    twin.load_state_dict(weights, assign=True)
    assert torch.equal(twin(x), net(x))


def test_hooks_are_called(random):
    net, seen = new_net(), []
    net.first.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    net.first.register_forward_hook(lambda module, inputs, out: seen.append("after"))
    net.first.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    net.second.conv_mask.weight.register_hook(lambda grad: seen.append("weight") or 2 * grad)
    x = random(*SIZE, dtype=torch.float32)
    doubled = gradients(net, net(x))
    assert seen == ["before", "after", "weight", "backward"]
    twin = new_net()
    plain = gradients(twin, twin(x))
    for (name, _), actual, one in zip(net.named_parameters(), doubled, plain):
        assert torch.equal(actual, 2 * one if name == "second.conv_mask.weight" else one)


# torch.func


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_functional_gradients(random, configuration):
    """grad, and jvp against it: the reference's graph, where autograd's is the operators'."""
    inputs = draw_inputs(random, configuration, (2, 6, 4, 5))
    function = function_of(gc_cuda, configuration, inputs)
    values = [tensor.requires_grad_() for tensor in inputs.values()]
    everything = tuple(range(len(values)))

    def loss(*tensors):
        return function(*tensors).square().sum()

    expected = torch.autograd.grad(loss(*values), values)
    actual = torch.func.grad(loss, argnums=everything)(*values)
    for name, one, other in zip(inputs, actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    tangents = [torch.randn_like(value) for value in values]
    _, slope = torch.func.jvp(loss, tuple(values), tuple(tangents))
    wanted = sum((one * tangent).sum() for one, tangent in zip(expected, tangents))
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_vmap(random, configuration):
    """Over images and over parameters, as in an ensemble; per-sample gradients too."""
    inputs = draw_inputs(random, configuration, (2, 6, 4, 5))
    function = function_of(gc_cuda, configuration, inputs)
    several = [torch.stack([tensor, 2 * tensor, tensor + 1]) for tensor in inputs.values()]
    expected = torch.stack([function(*(tensor[i] for tensor in several)) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(function)(*several), expected)
    x, *parameters = inputs.values()
    mapped = torch.func.vmap(function, in_dims=(0, *[None] * len(parameters)))(several[0], *parameters)
    torch.testing.assert_close(mapped, torch.stack([function(one, *parameters) for one in several[0]]))

    def loss(weight, image):
        return function(image[None], *parameters[:-1], weight).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters[-1], x)
    for image, actual in zip(x, per_sample):
        weight = parameters[-1].clone().requires_grad_()
        torch.testing.assert_close(actual, torch.autograd.grad(loss(weight, image), weight)[0])


def test_functional_call_with_an_ensemble_of_blocks(random):
    """torch.func.stack_module_state, the documented way to run several models at once."""
    blocks = [new_net(seed).first for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(blocks)
    x = random(2, 16, 5, 7, dtype=torch.float32)

    def call(parameters, buffers, x):
        return torch.func.functional_call(blocks[0], (parameters, buffers), (x,))

    out = torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    for actual, block in zip(out, blocks):
        torch.testing.assert_close(actual, block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
def test_transforms_of_the_parts(random, call):
    x = random(3, 2, 4, 5, 6)
    torch.testing.assert_close(torch.func.vmap(call)(x), torch.stack([call(one) for one in x]))
    leaf = x[0].clone().requires_grad_()
    expected = torch.autograd.grad(call(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: call(x).square().sum())(x[0]), expected)


# Training


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"capturable": False}], ids=["fused", "foreach", "plain"]
)
def test_optimizers(random, options):
    """A loss that falls, with weights averaged on the way."""
    net = new_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, **options)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    x = random(*SIZE, dtype=torch.float32)
    losses = []
    for _ in range(5):
        optimizer.zero_grad(set_to_none=True)
        loss = (net(x) - 1).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(net)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert averaged(x).isfinite().all()


def test_inference_mode(random):
    net = new_net()
    x = random(*SIZE, dtype=torch.float32)
    with torch.inference_mode():
        out = net(x)
    assert out.is_inference() and torch.equal(out, net(x))


def test_anomaly_detection_names_the_function(random):
    """The traceback of a NaN points at the call."""
    block = gc_cuda.ContextBlock(4, 1 / 2, "att", BOTH)
    x = random(1, 4, 3, 3, dtype=torch.float32, grad=True)
    with (
        pytest.raises(RuntimeError, match="'_WholeBlockBackward' returned nan"),
        pytest.warns(UserWarning),
        torch.autograd.set_detect_anomaly(True),
    ):
        block(x * float("inf")).sum().backward()
