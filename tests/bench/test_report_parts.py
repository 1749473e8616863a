"""What bench/report.py is made of: names, clocks, kernels, DRAM bytes, memory accounting, timing."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch
from paths import BENCH


def test_slug(bench):
    slug = bench("environment").slug
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("AMD EPYC") == "amd-epyc"
    assert slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-r-xeon-r-cpu-2-20ghz"


def test_what_nvidia_smi_says(bench, monkeypatch):
    environment = bench("environment")
    assert environment.parse_numbers("1980, 2619, 1980, 2619, [N/A], 31") == [
        1980,
        2619,
        1980,
        2619,
        None,
        31,
    ]
    monkeypatch.setattr(environment, "output_of", lambda *_, **__: "1980, 2619, 1980, 2619, 700.00, 31")
    assert environment.gpu_clocks()["power_limit_w"] == 700
    monkeypatch.setattr(environment, "output_of", lambda *_, **__: None)
    assert environment.gpu_clocks() == {}


def test_kernels_are_named_by_their_use(bench):
    name_of = bench("kernels").name_of
    pool = "void gc::pool_forward<float, (gc::Layout)0, 16, 4, (gc::Weighting){}>(gc::PoolForwardArgs)"
    assert name_of(pool.format(0)) == "pool_forward (mask)"
    assert name_of(pool.format(2)) == "pool_forward (uniform)"
    assert name_of("void gc::broadcast<c10::Half, (gc::Layout)1>(gc::BroadcastArgs)") == "broadcast"
    assert name_of("Memcpy DtoD (Device -> Device)") == "copy of x"
    assert name_of("Memset (Device)") is None


def test_bytes_of_kernels(bench):
    kernels, cases = bench("kernels"), bench("cases")
    case = cases.Case("forward+backward", "mul", 1 / 4, "float16", "s", (16, 9, 14), 3, "nchw")
    x = 3 * 16 * 9 * 14 * 2
    assert kernels.bytes_of("pool_forward (uniform)", case) == x
    assert kernels.bytes_of("broadcast_mul_backward", case) == 2 * x
    assert kernels.bytes_of("transform_backward", case) == 2 * 2 * 16 * 4 * 2
    assert kernels.bytes_of("residual_sums", case) == 4 * x
    assert kernels.bytes_of("norm_gradients", case) == (5 * 3 + 10) * 16 * 4
    assert kernels.bytes_of("something new", case) is None


def test_every_kernel_of_the_source_has_a_formula(bench):
    """Of csrc/cuda/kernels: a kernel that is added there is to be added to bench/kernels.py."""
    kernels, cases = bench("kernels"), bench("cases")
    case = cases.Case("forward+backward", "mul", 1 / 4, "float16", "s", (16, 9, 14), 3, "nchw")
    folder = BENCH.parent / "csrc" / "cuda" / "kernels"
    names = {
        name
        for path in folder.glob("*.h")
        for name in re.findall(r"^GC_KERNEL\(.*\)\n(\w+)\(", path.read_text(), re.MULTILINE)
    }
    assert {"pool_forward", "transform_backward", "broadcast_flat"} <= names
    for name in names:
        pools = kernels.POOLINGS.values() if name == "pool_forward" else [name]
        assert all(kernels.bytes_of(pool, case) for pool in pools), name


def test_the_rows_of_a_case(bench, monkeypatch):
    """A kernel that a call launches twice takes both times; the sum leaves the copy out."""
    kernels, cases = bench("kernels"), bench("cases")
    times = {"copy of x": [3.0, 3.0], "pool_forward (mask)": [1.0, 7.0, 1.0, 7.0], "broadcast": [2.0, 2.2]}
    monkeypatch.setattr(kernels, "profile", lambda calls, repeats, flush: times)
    case = cases.Case("forward+backward", "add", 1 / 4, "float32", "s", (16, 9, 14), 3, "nchw")
    rows = kernels.rows(case, cases.make(case, "cpu"), 2, torch.empty(1))
    assert [(row.kernel, row.warm_us) for row in rows] == [
        ("copy of x", 3.0),
        ("pool_forward (mask)", 8.0),
        ("broadcast", pytest.approx(2.1)),
        ("sum", pytest.approx(10.1)),
    ]
    assert rows[0].rates() == [f"{2 * 3 * 16 * 9 * 14 * 4 / 3e3:.0f}"] * 2


@pytest.mark.parametrize("reason", ["", "torch.profiler saw 0 launches in a call that makes one"])
def test_launches_of_every_peer(bench, result, monkeypatch, reason):
    suite, cases = bench("suite"), bench("cases")
    monkeypatch.setattr(suite, "cannot_count_launches", lambda: reason)
    monkeypatch.setattr(suite, "count_launches", lambda call: 5)
    case = cases.Case("forward", "add", 1 / 4, "float32", "c4", (16, 9, 14), 2, "nchw")
    result["launches"], result["remarks"] = [], {}
    for _ in range(2):
        suite.count_case(case, suite.Settings("cpu", 0.1, 3, compiled=False), result)
    assert [row["peer"] for row in result["launches"]] == ([] if reason else ["gc_cuda", "eager"] * 2)
    text = bench("page").page(result, {})
    assert (f"Launches were not measured: {reason}." in text) == bool(reason)


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","void gc::pool_forward<float>(A, B)","dram__bytes_read.sum","byte","1,000"
"0","1","void gc::pool_forward<float>(A, B)","dram__bytes_write.sum","byte","10"
"1","1","broadcast","dram__bytes_read.sum","byte","2000"
"1","1","broadcast","dram__bytes_write.sum","byte","3000"
"""


def test_what_ncu_says(bench):
    traffic = bench("traffic")
    assert traffic.parse(NCU) == {"read_bytes": 3000, "written_bytes": 3010, "kernels": 2}
    assert traffic.parse("==ERROR== no\n") == {}
    said = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n"
    assert traffic.reason_in(said) == "ERR_NVGPUCTRPERM - The user does not have permission"


@pytest.mark.parametrize("failing", ["missing", "hanging", "forbidden"])
def test_without_a_working_ncu_the_page_says_why(bench, result, monkeypatch, failing):
    suite, traffic = bench("suite"), bench("traffic")

    def run(command, **_):
        if failing == "hanging":
            raise subprocess.TimeoutExpired(command, 60)
        return subprocess.CompletedProcess(command, 1, "==ERROR== ERR_NVGPUCTRPERM\n", "")

    monkeypatch.setattr(traffic.shutil, "which", lambda name: None if failing == "missing" else "/ncu")
    monkeypatch.setattr(traffic.subprocess, "run", run)
    case = bench("cases").Case("forward", "add", 1 / 16, "float32", "c3", (512, 100, 168), 2, "nchw")
    result["traffic"] = []
    suite.count_bytes(case, "gc_cuda", result)
    assert not result["traffic"]
    reason = {"missing": "there is no ncu on the PATH", "hanging": "ncu did not finish: TimeoutExpired"}
    expected = reason.get(failing, "ncu counted nothing: ERR_NVGPUCTRPERM")
    assert f"Not measured: {expected}." in bench("page").page(result, {})


def test_ncu_is_told_the_case(bench):
    traffic, cases = bench("traffic"), bench("cases")
    case = cases.Case("forward", "add", 1 / 16, "float32", "c3", (512, 100, 168), 2, "nchw")
    assert traffic.case_of(json.loads(json.dumps(case))) == case


def test_accounting(bench):
    """What a linear layer and a ReLU keep: their input, and the output that both sides share, once."""
    memory = bench("memory")
    linear = torch.nn.Linear(8, 4)
    assert memory.kept_bytes(linear, (2, 3, 5, 8)) == 2 * 3 * 5 * 8 * 4
    model = torch.nn.Sequential(linear, torch.nn.ReLU(), torch.nn.Linear(4, 4))
    assert memory.kept_bytes(model, (2, 3, 5, 8)) == 2 * 3 * 5 * (8 + 4) * 4
    assert not linear.weight.grad


@pytest.mark.parametrize("fusion", ["channel_add", "channel_mul"])
def test_accounting_of_blocks_is_that_of_real_tensors(bench, fusion):
    """Without running it, the same bytes as with bench/blocks.py, which runs it."""
    memory, blocks = bench("memory"), bench("blocks")
    block = blocks.gc_cuda.ContextBlock(64, 1 / 4, fusion_types=(fusion,))
    shape = (2, 64, 10, 12)
    assert memory.kept_bytes(block, shape) == blocks.kept_bytes(block, torch.randn(shape).requires_grad_())


def test_the_blocks_of_the_published_models_keep_what_was_published(bench):
    """+0.6 GB in R50 and +1.2 GB in R101 at two images of 800×1333, as tables give it."""
    memory = bench("memory")
    for name, gigabytes in (("resnet50", 0.6), ("resnet101", 1.2)):
        rows = {row.variant: row for row in memory.rows_of_blocks(name, "", (2, 3, 800, 1344))}
        for variant in ("as it is", "block only"):
            assert rows[variant].kept_bytes / 1e9 == pytest.approx(gigabytes, abs=0.1)


def test_memory_of_whole_models(bench):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    memory = bench("memory")
    shape = (2, 3, 64, 96)
    whole = {row.variant: row.kept_bytes for row in memory.rows("resnet50", "", shape, "cpu")}
    alone = {row.variant: row.kept_bytes for row in memory.rows_of_blocks("resnet50", "", shape)}
    for variant in ("as it is", "block only"):
        added = whole[variant] - whole["without blocks"]
        assert added == pytest.approx(alone[variant], rel=0.02)
    assert whole["accelerated"] - whole["without blocks"] < 0.02 * added + 2**20  # tails: no x, small vectors


def test_the_cache_is_emptied_before_each_call(bench):
    log = []
    bench("timing").measure({"a": lambda: log.append("a")}, "cpu", 0.0, 1, before=lambda: log.append("flush"))
    assert log == ["a"] + ["flush", "a"] * 3


def test_the_copy_moves_the_bytes_of_the_formula(bench):
    suite, cases = bench("suite"), bench("cases")
    case = cases.Case("forward+backward", "add", 1 / 4, "float16", "s", (16, 9, 14), 3, "nchw")
    assert 2 * suite.copy_of(case, "cpu")().nbytes == case.bytes_moved


def test_a_peer_that_cannot_be_captured_is_named(bench, result, monkeypatch):
    suite, cases, timing = bench("suite"), bench("cases"), bench("timing")

    def captured(call):
        if call is None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return call

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = cases.Case("forward", "add", 1 / 16, "float32", "c3", (512, 100, 168), 2, "nchw")
    assert suite.replays({"gc_cuda": len, "eager": None}, case, result) == {"gc_cuda": len}
    assert result["missing"][-1] == {
        "case": case.name,
        "peer": "eager",
        "reason": "not captured in a CUDA graph: operation not permitted when stream is capturing",
    }


def test_a_section_whose_time_is_over_stays_so(bench, monkeypatch):
    """However short the steps that are skipped; the profilers have a share of the time to themselves."""
    suite = bench("suite")
    done = []
    steps = [
        suite.Step(section, f"{section} {i}", lambda result, i=i: done.append(i))
        for section in ("times", "launches")
        for i in range(20)
    ]
    monkeypatch.setitem(suite.GUESSES, "times", 9.0)
    monkeypatch.setitem(suite.GUESSES, "launches", 0.0)
    result = suite.empty()
    suite.run(steps, result, 10.0, lambda found: None)
    assert result["left_out"] == [f"times {i}" for i in range(20)]
    assert done == list(range(20))


def test_the_commit_is_what_was_stated_or_gits(bench, monkeypatch):
    environment = bench("environment")
    monkeypatch.setattr(environment, "output_of", lambda *command, **_: None)
    assert environment.versions("cpu", "0123abc")["commit"] == "0123abc"
    said = {"describe": "fedcba", "status": " M bench/suite.py"}
    monkeypatch.setattr(environment, "output_of", lambda *command, **_: said.get(command[1]))
    assert environment.versions("cpu", "0123abc")["commit"] == "0123abc"
    assert environment.versions("cpu", None)["commit"] == "fedcba-dirty"
