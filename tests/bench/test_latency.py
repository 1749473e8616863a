"""bench/latency.py checks before it times: a right run returns 0 and leaves its files, a wrong one 1."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import gc_cuda

ARGUMENTS = ["--quick", "--stages", "16x9x14", "--seconds", "0.01", "--device", "cpu", "--ratio", "1/4"]
WITHOUT_COMPILER = [*ARGUMENTS, "--no-compile"]
X = 16 * 9 * 14 * 4  # bytes of one float32 image


@pytest.fixture
def latency(bench):
    """The benchmark as a module."""
    return bench("latency")


def content_of(folder):
    """What the one JSON file says."""
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_a_run_leaves_a_table_and_files(latency, tmp_path, capsys):
    assert latency.main([*WITHOUT_COMPILER, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "n/a: torch.compile: switched off by --no-compile: every case" in printed
    assert max(map(len, printed.splitlines()[:-3])) <= 110, "all but the paths fits a terminal"
    titles = "map layout peer ms p50 speed-up GB/s / copy_ / clone launches"
    assert sum(" ".join(line.split()) == titles for line in printed.splitlines()) == 2

    content = content_of(tmp_path)
    assert [(row["direction"], row["layout"], row["peer"]) for row in content["rows"]] == list(
        itertools.product(("forward", "forward+backward"), ("nchw", "channels_last"), ("gc_cuda", "eager"))
    )
    for row in content["rows"]:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        moved = {"forward": 3, "forward+backward": 7}[row["direction"]] * X
        assert row["gigabytes_per_second"] == pytest.approx(moved / (row["p50_ms"] * 1e-3) / 1e9)
        assert row["error"] <= row["allowed_error"]
        assert row["launches"] is None, "there are none to count on the CPU"
        assert f"{row['p50_ms']:.3f}" in printed
    (path,) = tmp_path.glob("*.md")
    text = path.read_text()
    assert "| 16x9x14 1x16x9x14 | nchw | gc_cuda |" in text
    assert "## forward+backward, float32, ratio 1/4, add (7 passes over x)" in text


@pytest.mark.parametrize(
    ("direction", "fusion", "passes"),
    [
        ("forward", "add", 3),  # read, read, write
        ("forward", "mul", 3),
        ("forward", "both", 3),
        ("forward+backward", "add", 3 + 4),
        ("forward+backward", "mul", 3 + 5),  # the gradient of the scale reads x once more
        ("forward+backward", "both", 3 + 5),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bytes(bench, direction, fusion, passes, dtype):
    case = bench("cases").Case(direction, fusion, 1 / 4, dtype, "s", (16, 9, 14), 3, "nchw")
    assert case.passes == passes
    assert case.bytes_moved == passes * 3 * X // (2 if dtype == "float16" else 1)


def test_every_option_takes_several_values(latency, tmp_path):
    choice = ["--dtype", "float32", "bfloat16", "--fusion", "add", "mul", "both", "--batch", "1", "3"]
    choice += ["--ratio", "1/4", "0.5", "--layouts", "channels_last", "--passes", "forward+backward"]
    assert latency.main([*WITHOUT_COMPILER, *choice, "--output", str(tmp_path)]) == 0
    content = content_of(tmp_path)
    keys = ("fusion", "ratio", "dtype")
    assert [
        (*(row[key] for key in keys), row["shape"][0]) for row in content["rows"] if row["peer"] == "gc_cuda"
    ] == list(itertools.product(("add", "mul", "both"), (0.25, 0.5), ("float32", "bfloat16"), (1, 3)))
    assert {row["passes"] for row in content["rows"]} == {7, 8}


def test_the_full_grid(bench):
    arguments = bench("latency").parse_arguments(["--full"])
    names = ("stages", "batch", "layouts", "dtype", "ratio", "fusion", "directions")
    cases = bench("cases").grid(*(getattr(arguments, name) for name in names))
    maps = 3 * 3 + 3  # c3 to c5 at three batch sizes, the ImageNet maps at one
    assert len(cases) == len(set(cases)) == 3 * 2 * 3 * 2 * maps * 2
    assert {case.batch for case in cases if case.stage == "14x14"} == {32}
    assert {case.batch for case in cases if case.stage == "c4"} == {1, 2, 8}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_a_wrong_output_fails_the_run_and_is_not_timed(latency, tmp_path, capsys, monkeypatch, direction):
    right = gc_cuda.ContextBlock.forward
    monkeypatch.setattr(gc_cuda.ContextBlock, "forward", lambda block, x: right(block, x) + 1e-4)
    assert latency.main([*WITHOUT_COMPILER, "--passes", direction, "--output", str(tmp_path)]) == 1
    message = (
        f"WRONG 16x9x14 1x16x9x14 nchw, {direction}, float32, ratio 1/4, add: the output of gc_cuda is off by"
    )
    assert message in capsys.readouterr().err
    assert {row["peer"] for row in content_of(tmp_path)["rows"]} == {"eager"}


class _Skewed(torch.autograd.Function):
    """The identity, with a gradient that is a little too large."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-4)


@pytest.mark.parametrize(
    "name",
    [name for name, _ in gc_cuda.ContextBlock(4, 0.5).named_parameters() if name != "conv_mask.bias"] + ["x"],
)
def test_a_wrong_gradient_fails_the_run(latency, tmp_path, capsys, monkeypatch, name):
    right = gc_cuda.ContextBlock.forward

    def skewed(block, x):
        if name == "x":
            return right(block, _Skewed.apply(x))
        wrong = {name: _Skewed.apply(block.get_parameter(name))}
        with monkeypatch.context() as patch:
            patch.setattr(gc_cuda.ContextBlock, "forward", right)
            return torch.func.functional_call(block, wrong, (x,))

    monkeypatch.setattr(gc_cuda.ContextBlock, "forward", skewed)
    assert latency.main([*WITHOUT_COMPILER, "--layouts", "nchw", "--output", str(tmp_path)]) == 1
    assert f"the gradient of {name} of gc_cuda is off by" in capsys.readouterr().err
    rows = content_of(tmp_path)["rows"]
    assert {row["direction"] for row in rows if row["peer"] == "gc_cuda"} == {"forward"}


def test_the_gradient_of_the_mask_bias_is_checked(bench):
    cases, peers = bench("cases"), bench("peers")
    problem = cases.make(
        cases.Case("forward+backward", "both", 1 / 4, "float32", "s", (16, 9, 14), 2, "nchw"), "cpu"
    )
    calls, _ = peers.peers(problem, compiled=False)
    at = peers.quantities(problem).index("gradient of conv_mask.bias")
    right = calls["gc_cuda"]

    def skewed():
        results = list(right())
        results[at] = results[at] + 1e-2
        return tuple(results)

    assert peers.errors(problem, calls)["gc_cuda"].is_right
    worst = peers.errors(problem, {**calls, "gc_cuda": skewed})["gc_cuda"]
    assert worst.quantity == "gradient of conv_mask.bias"
    assert not worst.is_right


def test_a_nan_is_wrong(bench):
    peers = bench("peers")
    nan = peers.Error("output", float("nan"), 1.0)
    assert not nan.is_right
    assert max([peers.Error("a", 2.0, 1.0), nan, peers.Error("b", 3.0, 1.0)], key=peers._badness) is nan


def test_a_peer_that_fails_is_missing_and_the_rest_is_timed(latency, tmp_path, capsys, monkeypatch):
    def unavailable(*arguments, **options):
        raise RuntimeError("no C++ compiler found\nand a long story")

    monkeypatch.setattr("torch.compile", unavailable)
    monkeypatch.setattr(gc_cuda.reference.ContextBlock, "spatial_pool", unavailable)
    monkeypatch.setattr(
        "peers.truth", lambda problem: [r.detach() for r in latency.peers(problem, False)[0]["gc_cuda"]()]
    )
    assert latency.main([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for peer in ("torch.compile", "eager"):
        assert f"n/a: {peer}: does not run here: no C++ compiler found: every case" in printed
    content = content_of(tmp_path)
    assert [row["peer"] for row in content["rows"]] == ["gc_cuda"] * 4
    assert {row["of_eager"] for row in content["rows"]} == {None}
    assert len(content["missing"]) == 8


def test_an_error_of_ours_fails_the_run_but_not_the_other_cases(latency, tmp_path, capsys, monkeypatch):
    right = gc_cuda.ContextBlock.forward

    def failing(block, x):
        if x.is_contiguous():
            raise RuntimeError("out of order")
        return right(block, x)

    monkeypatch.setattr(gc_cuda.ContextBlock, "forward", failing)
    assert latency.main([*WITHOUT_COMPILER, "--output", str(tmp_path)]) == 1
    assert "nchw, forward, float32, ratio 1/4, add: RuntimeError: out of order" in capsys.readouterr().err
    assert {row["layout"] for row in content_of(tmp_path)["rows"]} == {"channels_last"}


def test_what_does_not_fit_the_limit_is_left_out_and_named(latency, tmp_path, capsys, monkeypatch):
    near = iter([False, True])
    monkeypatch.setattr(latency.Deadline, "is_near", lambda deadline: next(near))
    assert latency.main([*WITHOUT_COMPILER, "--limit", "60", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "LEFT OUT, no time: 3 of 4 cases:" in printed.out
    assert "\nforward, float32, ratio 1/4, add: 16x9x14 1x16x9x14 channels_last\n" in printed.out
    assert "\nforward+backward, float32, ratio 1/4, add: every map\n" in printed.out
    content = content_of(tmp_path)
    assert len(content["rows"]) == 2
    assert len(content["left_out"]) == 3


def test_deadline(latency, monkeypatch):
    now = iter([0.0, 0.0, 4.0, 9.0])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(now))
    deadline = latency.Deadline(10.0)
    assert [deadline.is_near() for _ in range(3)] == [False, False, True]


def test_launches_are_counted_by_kind(bench):
    categories = [
        "kernel",
        "kernel",
        "gpu_memset",
        "gpu_memcpy",
        "cuda_runtime",
        "gpu_user_annotation",
        "cpu_op",
        None,
    ]
    trace = {"traceEvents": [{"cat": category} if category else {"ph": "M"} for category in categories]}
    assert bench("timing").launches_in(trace) == 4


@pytest.mark.parametrize(("reason", "expected"), [("", 3), ("no profiler", None)])
def test_launches_are_counted_after_the_timing(latency, monkeypatch, reason, expected):
    log = []
    case = latency.Case("forward", "add", 1 / 4, "float32", "s", (16, 9, 14), 1, "nchw")
    cases = [case, case._replace(layout="channels_last")]
    row = latency.tables.Row(*["gc_cuda" if name == "peer" else None for name in latency.tables.Row._fields])
    monkeypatch.setattr(latency, "run_case", lambda *_: log.append("time") or latency.Found([row], {}, []))
    monkeypatch.setattr(latency, "launches_of", lambda *_: log.append("count") or {"gc_cuda": 3})
    monkeypatch.setattr(latency, "cannot_count_launches", lambda: reason)
    found, left_out, remark = latency.run_all(cases, "cuda", latency.parse_arguments([]))
    assert log == ["time"] * 2 + ["count"] * 2 * (not reason)
    assert [one.rows[0].launches for one in found.values()] == [expected] * 2
    assert not left_out
    assert remark == ("not counted: no profiler" if reason else "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_profiler_counts_launches(bench):
    timing = bench("timing")
    assert timing.cannot_count_launches() == ""
    x, y = (torch.zeros(64, device="cuda") for _ in range(2))
    assert timing.count_launches(lambda: (x.add_(1), y.copy_(x), x.cpu())) == 3


def test_picture(latency, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert latency.main([*WITHOUT_COMPILER, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.png")
    from matplotlib import image

    pixels = image.imread(path)
    height, width = pixels.shape[:2]
    assert width > 600
    assert height > 400
    assert len({tuple(pixel) for pixel in pixels[:: height // 200, :: width // 200].reshape(-1, 4)}) > 3
