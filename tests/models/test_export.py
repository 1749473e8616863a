"""A model that leaves Python takes no operator of gc_cuda along: torch.export, AOTInductor, ONNX and
torch.jit.trace get the block in PyTorch's own operators, for images of any size.
"""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import warnings

import pytest
import torch
from block_cases import WHOLE, Spy, draw_inputs, function_of
from small_net import Net, new_net

import gc_cuda
from gc_cuda import reference

EXAMPLE = (2, 3, 10, 12)
OTHERS = [(1, 3, 9, 7), (5, 3, 16, 16), (3, 3, 4, 33), (2, 3, 40, 41)]

# An older torch does not tell the strict export, which goes through torch.compile's tracer, from compiling.
says_whether_it_exports = hasattr(torch.compiler, "is_exporting")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime is not installed",
)


@pytest.fixture(params=["att", "avg"])
def net(request):
    return new_net(pooling_type=request.param).eval()


def export(net, random, **options):
    # The model halves its maps, and torch.export takes a map of one row or column for another case.
    n, h, w = (torch.export.Dim(name, min=least, max=4096) for name, least in (("n", 1), ("h", 3), ("w", 3)))
    x = random(*EXAMPLE, dtype=torch.float32)
    sizes = {0: n, 2: h, 3: w}
    try:
        return plain_export(net, (x,), dynamic_shapes={"x": sizes}, **options)
    except torch._dynamo.exc.UserError as error:
        convolutions = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.nn.Conv2d(4, 1, 1)
        )
        try:
            plain_export(convolutions, (x,), dynamic_shapes=(sizes,))
        except torch._dynamo.exc.UserError:
            # torch 2.8 does not see that (w - 1) // 2 + 1 is at least 1.
            pytest.skip("this torch exports no strided convolution before another one for any size")
        raise error


def plain_export(net, inputs, *, strict=False, **options):
    """Not strict, as is the default of newer releases."""
    return torch.export.export(net, inputs, strict=strict, **options)


def operators(program):
    """The names of the operators of an exported program, those of its subgraphs too."""
    return {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    }


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "strict",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not says_whether_it_exports, reason="this torch has no torch.compiler.is_exporting"
            ),
        ),
    ],
    ids=["not strict", "strict"],
)
def test_exported_program(net, random, strict):
    program = export(net, random, strict=strict)
    assert not any("gc_cuda" in name for name in operators(program))
    core = program.run_decompositions()
    assert all(name.startswith(("aten.", "<built-in function ")) for name in operators(core))
    for size in [EXAMPLE, *OTHERS]:
        x = random(*size, dtype=torch.float32)
        close(program.module()(x), net(x))


def test_exported_program_is_read_where_gc_cuda_is_not(net, random, tmp_path):
    x = random(*OTHERS[0], dtype=torch.float32)
    torch.export.save(export(net, random), tmp_path / "net.pt2")
    torch.save((x, net(x)), tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["gc_cuda"] = None  # an import of it fails
import torch
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
out = torch.export.load({str(tmp_path / "net.pt2")!r}).module()(x)
torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_training_continues_in_an_exported_program(random):
    """Its gradients are those of the model."""
    net = new_net()
    module = export(net, random).module()
    x = random(*OTHERS[1], dtype=torch.float32)
    module(x).square().mean().backward()
    net(x).square().mean().backward()
    for name, parameter in module.named_parameters():
        close(parameter.grad, net.get_parameter(name).grad)


def test_exporting_leaves_the_block_fused(net, random):
    export(net, random)
    with torch.no_grad(), Spy() as spy:
        net(random(*EXAMPLE, dtype=torch.float32))
    assert spy.names().count("gc_cuda::global_context") == 2


@pytest.mark.skipif(
    not hasattr(torch._inductor, "aoti_load_package"), reason="this torch has no AOTI packages"
)
def test_aot_inductor_package(random, tmp_path):
    """Compiled ahead of time, packed, loaded, run on several sizes."""
    net = new_net().eval()
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            export(net, random), package_path=str(tmp_path / "net.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        for size in [EXAMPLE, *OTHERS]:
            x = random(*size, dtype=torch.float32)
            close(run(x), net(x))


@needs_onnx
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.filterwarnings("ignore")  # of the exporters, about themselves
def test_onnx(net, random, dynamo, tmp_path):
    """Every node is of ONNX's own domain, and onnxruntime computes what PyTorch does."""
    import onnx
    import onnxruntime

    path, x = str(tmp_path / "net.onnx"), random(*EXAMPLE, dtype=torch.float32)
    if dynamo:
        dimensions = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
        sizes = {"dynamic_shapes": {"x": dimensions}, "verbose": False}
    else:
        sizes = {"dynamic_axes": {"x": {0: "n", 2: "h", 3: "w"}}}
    torch.onnx.export(net, (x,), path, dynamo=dynamo, input_names=["x"], output_names=["out"], **sizes)

    model = onnx.load(path)
    onnx.checker.check_model(model)
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in [EXAMPLE, *OTHERS]:
        x = random(*size, dtype=torch.float32)
        (out,) = session.run(None, {"x": x.numpy()})
        close(torch.from_numpy(out), net(x).detach())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_jit_trace(net, random):
    """A trace takes other sizes, is saved and read back, and records nothing as a constant with a warning."""
    x = random(*EXAMPLE, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, (x,))
    assert "gc_cuda::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in [EXAMPLE, *OTHERS]:
        x = random(*size, dtype=torch.float32)
        close(traced(x), net(x))
        close(loaded(x), net(x))


def test_functions_under_export(random):
    """The functions themselves, outside of a block."""
    inputs = draw_inputs(random, WHOLE, (2, 16, 5, 6), dtype=torch.float32)

    class Calls(torch.nn.Module):
        def forward(self, *tensors):
            x = function_of(gc_cuda, WHOLE, inputs)(*tensors)
            context = gc_cuda.attention_pool(x, tensors[1], tensors[2]) + gc_cuda.average_pool(x)
            context = context + gc_cuda.softmax_pool(x, x.mean(1, keepdim=True))
            x = gc_cuda.broadcast_mul(gc_cuda.broadcast_add(x, context), context)
            return gc_cuda.broadcast_mul_add(x, context, context)

    tensors = tuple(inputs.values())
    program = plain_export(Calls(), tensors)
    assert not any("gc_cuda" in name for name in operators(program))
    close(program.module()(*tensors), Calls()(*tensors))


class Autocast(torch.nn.Module):
    def __init__(self, inner: Net) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


def assert_exports_with_its_dtype(model, x):
    out, expected = plain_export(model, (x,)).module()(x), model(x)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)


def test_half_precision_under_export(random):
    """The dtypes are those of eager."""
    assert_exports_with_its_dtype(new_net().eval().bfloat16(), random(*EXAMPLE, dtype=torch.bfloat16))


def test_autocast_under_export(random):
    x = random(*EXAMPLE, dtype=torch.float32)
    try:
        assert_exports_with_its_dtype(Autocast(new_net(block=reference.ContextBlock).eval()), x)
    except RuntimeError as error:
        pytest.skip(f"this torch exports no region of autocast: {error}")
    assert_exports_with_its_dtype(Autocast(new_net().eval()), x)


def test_the_exported_block_is_the_reference(random):
    """Bit for bit, so whoever compares an exported model with another's sees PyTorch's own numbers."""
    net = new_net(block=gc_cuda.ContextBlock).eval()
    plain = new_net(block=reference.ContextBlock).eval()
    x = random(*EXAMPLE, dtype=torch.float64)
    actual, expected = export_double(net, x), export_double(plain, x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def export_double(net, x):
    return plain_export(net.double(), (x,)).module()(x)
