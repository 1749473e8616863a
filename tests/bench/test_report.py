"""bench/report.py: what it writes follows its schema; page, pictures and comparison come from that alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from paths import BENCH

TINY = {"c4": (16, 9, 14), "c5": (24, 5, 7)}


@pytest.fixture
def validate():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((BENCH / "report_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).validate


@pytest.fixture
def tiny(bench, monkeypatch):
    """report.py with small maps, one model's memory and no model."""
    report, suite, cases = bench("report"), bench("suite"), bench("cases")
    small = cases.grid(TINY, [1], ["nchw"], ["float32"], [1 / 4], ["add"], list(cases.DIRECTIONS))
    monkeypatch.setattr(suite, "cases_of", lambda device, quick: (small, []))
    monkeypatch.setattr(suite.models, "MODELS", {"none there": _no_framework})
    monkeypatch.setattr(suite.memory, "INPUTS", {"64×64": (1, 3, 64, 64)})
    monkeypatch.setattr(suite.kernels, "FLUSHES", 1)
    monkeypatch.setitem(report.EFFORT, ("cpu", True), (0.001, 3))
    return report


def _no_framework():
    raise ModuleNotFoundError("No module named 'framework'")


# --- a run ---


def test_a_run_from_beginning_to_end(tiny, validate, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert tiny.main(["--quick", "--no-compile", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    validate(content)
    assert content["length"] == "quick"
    assert not content["left_out"]
    timed = {(s["stage"], s["direction"], s["peer"], s["cache"]) for s in content["samples"]}
    assert len(timed) == len(content["samples"]) == 2 * 2 * 4 * 2
    for sample in content["samples"]:
        assert sample["p20_ms"] <= sample["p50_ms"] <= sample["p80_ms"]
        n, c, h, w = sample["shape"]
        assert (
            sample["bytes"] == {"forward": 3, "forward+backward": 7}[sample["direction"]] * n * c * h * w * 4
        )
    pictures = {file.name.removeprefix(path.stem) for file in tmp_path.glob("*.png")}
    assert pictures == {
        f"-{name}.png"
        for name in ("times-cold", "times-warm", "share-cold", "share-warm", "passes", "memory")
    }
    text = path.with_suffix(".md").read_text()
    assert "| GC R50 backbone, norm_eval, frozen_stages=1 | 2 × 800×1333 | gc_cuda, blocks only |" in text
    for picture in pictures:
        assert f"({path.stem}{picture})" in text
    assert "Left out: none there: No module named 'framework'" in text
    assert "Launches were not measured: this run was on a CPU." in text
    assert f"wrote {path}" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_named(tiny, tmp_path):
    assert tiny.main(["--quick", "--limit", "0.001", "--device", "cpu", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    text = path.with_suffix(".md").read_text()
    memory = "memory of resnet50, 64×64; memory of GC R50 backbone, norm_eval, frozen_stages=1"
    assert f"No time for 7 steps: {memory}; c4 1x16x9x14 nchw, forward," in text
    assert "Nothing was timed." in text


def test_an_error_fails_the_run_but_not_the_other_steps(tiny, bench, tmp_path, monkeypatch):
    def failing(case, settings, result):
        raise RuntimeError("out of order")

    monkeypatch.setattr(bench("suite"), "time_case", failing)
    assert tiny.main(["--quick", "--device", "cpu", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert len(content["wrong"]) == 4
    assert content["memory"]
    assert "FAILED: c4 1x16x9x14 nchw, forward, float32, ratio 1/4, add: RuntimeError: out of order" in (
        path.with_suffix(".md").read_text()
    )


def test_a_wrong_peer_is_not_timed_and_fails_the_run(tiny, bench, tmp_path, monkeypatch):
    right = bench("cases").gc_cuda.ContextBlock.forward
    monkeypatch.setattr(
        bench("cases").gc_cuda.ContextBlock, "forward", lambda block, x: right(block, x) + 1e-3
    )
    assert tiny.main(["--quick", "--no-compile", "--device", "cpu", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert "the output of gc_cuda is off by" in content["wrong"][0]
    assert "gc_cuda" not in {sample["peer"] for sample in content["samples"]}


def test_ones_own_case_is_a_table_and_no_page(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--shape",
        "2,16,5,7",
        "--dtype",
        "bfloat16",
        "--layout",
        "nchw",
        "--ratio",
        "1/4",
        "--fusion",
        "both",
    ]
    assert tiny.main([*arguments, "--quick", "--no-compile", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["direction", "layout", "cache", "launched"]
    assert [line.split()[:4] for line in lines[2:6]] == [
        [direction, "nchw", cache, "stream"]
        for direction in ("forward", "forward+backward")
        for cache in ("warm", "cold")
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "0,1,1,1", "1,2,3,4,5"])
def test_a_bad_shape_is_refused(bench, text):
    with pytest.raises(SystemExit):
        bench("report").parse_arguments(["--shape", text])


def test_shape(bench):
    assert (
        bench("report").shape_of("2,512,100,168")
        == bench("report").shape_of("2x512x100x168")
        == (2, 512, 100, 168)
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plans_have_what_was_published(bench, device):
    """Both ratios, batch 2 in training and 1 in inference, c3 to c5; what counts most comes first."""
    suite = bench("suite")
    headline, more = suite.cases_of(device, quick=False)
    assert len({*headline, *more}) == len(headline) + len(more)
    for ratio in (1 / 16, 1 / 4):
        for direction, batch in (("forward+backward", 2), ("forward", 1)):
            found = {
                case.size
                for case in headline + more
                if (case.ratio, case.direction, case.batch, case.dtype)
                == (ratio, direction, batch, "float32")
            }
            assert {(512, 100, 168), (1024, 50, 84), (2048, 25, 42)} <= found
    sections = [step.section for step in suite.plan(suite.Settings(device, 0.1, 3), quick=False)]
    assert (
        list(dict.fromkeys(sections))
        == {
            "cpu": ["memory", "times", "models", "more times"],
            "cuda": ["times", "memory", "models", "more times", "launches", "kernels", "traffic"],
        }[device]
    )
    assert ("launches" in sections) == (device == "cuda")


# --- the page ---


def test_an_invented_result_follows_the_schema(validate, result):
    validate(result)


def test_committed_results_follow_the_schema(validate):
    """Those of this schema; older ones have none."""
    for path in (BENCH / "results").glob("*.json"):
        content = json.loads(path.read_text())
        if "schema" in content:
            validate(content)
            assert path.stem.startswith(content["device"]["slug"])


def test_the_schema_is_strict(validate, result):
    import jsonschema

    for spoil in (
        lambda r: r.pop("device"),
        lambda r: r.update(schema=2),
        lambda r: r["samples"][0].update(p50_ms=0),
        lambda r: r["samples"][0].update(extra=1),
        lambda r: r["device"].update(slug="Not A Slug"),
    ):
        spoiled = copy.deepcopy(result)
        spoil(spoiled)
        with pytest.raises(jsonschema.ValidationError):
            validate(spoiled)


def test_a_file_is_what_was_written(bench, result, tmp_path):
    samples = bench("samples")
    samples.write(tmp_path / "a.json", result)
    found = samples.read(tmp_path / "a.json")
    assert found["device"] == result["device"]
    assert found["samples"][5]["p50_ms"] == pytest.approx(result["samples"][5]["p50_ms"], rel=1e-5)
    samples.write(tmp_path / "b.json", found)
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    assert not list(tmp_path.glob("*.part"))


def test_another_file_is_refused(bench, tmp_path, capsys):
    (tmp_path / "old.json").write_text('{"header": {}}')
    assert bench("report").main(["--render", str(tmp_path / "old.json")]) == 2
    assert "has schema None; bench/report.py reads 1" in capsys.readouterr().err


def test_the_page_of_a_full_result(bench, result):
    text = bench("page").page(result, {"times-cold": "a-times-cold.png"})
    # 4 passes of eager's against ours: (4 · bytes + 12 launches) / (1.25 · bytes + 3 launches)
    moved_ms = 3 * 2 * 512 * 100 * 168 * 4 / 3e9 * 1.2
    ours, eager = 1.25 * moved_ms + 0.018, 4 * moved_ms + 0.072
    row = next(line for line in text.splitlines() if line.startswith("| c3 2×512×100×168 | nchw |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:4] == [f"{ours:.3f}", f"{eager:.3f}"]
    assert cells[6] == f"{eager / ours:.1f}×"
    assert cells[8] == f"{100 * (moved_ms + 0.006) / ours:.0f} %"
    assert "![Time of the block over the size of x](a-times-cold.png)" in text
    assert "| forward | nchw | 4 | 6 | 3 | 12 | 9 | 3 |" in text
    assert "| c4 2×1024×50×84 | nchw | pool_forward (mask) | 15.0 | 17.0 | 2237 | 1974 |" in text
    assert "| c4 2×1024×50×84 | nchw | some_new_kernel | 1.00 | 1.50 | - | - |" in text
    assert "torch.compile: not captured in a CUDA graph: no: c5" in text
    assert "| resnet50 | 2 × 800×1333, padded to 800×1344 | eager blocks | 4096 | 4710 |" in text
    assert "| timm gcresnet50t | 13 | forward | 20.0 | 15.0 | 12.0 | 1.3× |" in text
    assert "| 192 | 128 | 64.0 | 1.0× |" in text
    assert "No time for 1 steps: c3 8x512" in text


def test_the_page_beside_what_was_published(bench, result):
    """Sums of 4, 6 and 3 blocks; what a run lacks is no number."""
    text = bench("page").page(result, {})
    training = sum(
        count * (1.25 * 7 * 2 * c * h * w * 4 / 3e9 * 1.2 + 0.036)
        for count, (c, h, w) in ((4, (512, 100, 168)), (6, (1024, 50, 84)), (3, (2048, 25, 42)))
    )
    row = next(line for line in text.splitlines() if line.startswith("| R50, fixed BN, r16 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["0.453 → 0.533", "+80", "10.6 → 10.1", "+4.7", "3.9 → 4.5"]
    assert cells[8] == f"{training:.2f}"
    row = next(line for line in text.splitlines() if line.startswith("| R50, fixed BN, r4 |"))
    assert row.endswith("| – | – | – |"), "ratio 1/4 was not measured at batch 1"


def test_which_gpus_have_been_measured(bench, result):
    published = bench("published")
    cpu = copy.deepcopy(result)
    cpu["device"] |= {"kind": "cpu", "name": "Some CPU"}
    assert "No GPU has been measured" in published.gpus_sentence([cpu])
    assert "no V100 has been measured" in published.gpus_sentence([cpu, result])
    assert "Invented GPU 80GB (2026-01-02, commit 0123456789ab)" in published.gpus_sentence([cpu, result])
    v100 = copy.deepcopy(result)
    v100["device"]["name"] = "Tesla V100-SXM2-16GB"
    assert "a V100 is among them" in published.gpus_sentence([v100, result])


def test_a_page_is_made_again_from_its_data(bench, result, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib import image

    report = bench("report")
    path = tmp_path / "invented-gpu-80gb.json"
    bench("samples").write(path, result)
    assert report.main(["--render", str(path)]) == 0
    first = path.with_suffix(".md").read_text()
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 7
    for picture in pictures:
        height, width = image.imread(picture).shape[:2]
        assert width > 500
        assert height > 300
    assert report.main(["--render", str(path)]) == 0
    assert path.with_suffix(".md").read_text() == first


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.5, "0.500"),
        (0.01234, "0.0123"),
        (1.5, "1.50"),
        (96.44, "96.4"),
        (1363.2, "1363"),
    ],
)
def test_number(bench, value, text):
    assert bench("markdown_text").number(value) == text


def test_quantiles(bench):
    quantiles = bench("samples").quantiles
    assert quantiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {"p20_ms": 2.0, "p50_ms": 3.5, "p80_ms": 5.0}
    assert quantiles([1.0]) == {"p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0}


# --- the comparison ---


@pytest.mark.parametrize(
    ("factor", "peer", "status", "mark"),
    [
        (1.5, "gc_cuda", 1, "REGRESSION"),
        (1.08, "gc_cuda", 0, "slower"),  # below the threshold
        (1.02, "gc_cuda", 0, ""),  # within the spread
        (1.5, "eager", 0, "slower"),  # not ours
        (0.5, "gc_cuda", 0, ""),
    ],
)
def test_compare(bench, result, tmp_path, capsys, factor, peer, status, mark):
    later = copy.deepcopy(result)
    changed = next(s for s in later["samples"] if s["peer"] == peer and s["launch"] == "stream")
    for name in ("p20_ms", "p50_ms", "p80_ms"):
        changed[name] *= factor
    later["samples"].pop()  # what only one of them has
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (result, later)):
        bench("samples").write(path, content)
    assert bench("report").main(["--compare", *map(str, paths)]) == status
    lines = capsys.readouterr().out.splitlines()
    line = lines[0] if factor > 1 else next(line for line in lines if line.startswith("  0.50"))
    assert float(line.split()[0]) == pytest.approx(factor, abs=0.01)
    words = line.split(" ms ")[1].split()
    assert words[0] == (mark or peer)
    assert f"{len(result['samples']) - 1} cases in both; {status} regressions" in lines[-1]


def test_compare_threshold_and_devices(bench, result, tmp_path, capsys):
    later = copy.deepcopy(result)
    later["device"]["name"] = "another"
    for sample in later["samples"]:
        sample.update({name: 1.5 * sample[name] for name in ("p20_ms", "p50_ms", "p80_ms")})
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (result, later)):
        bench("samples").write(path, content)
    assert bench("report").main(["--compare", *map(str, paths), "--threshold", "60"]) == 0
    printed = capsys.readouterr().out
    assert "NOT THE SAME DEVICE: Invented GPU 80GB and another" in printed
    assert "the copy: 1.50 times the time before" in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_quick_run_on_a_gpu(bench, validate, tmp_path, monkeypatch):
    suite = bench("suite")
    monkeypatch.setattr(
        suite.models, "MODELS", {"none there": _no_framework, "b": _no_framework, "c": _no_framework}
    )
    assert bench("report").main(["--quick", "--no-compile", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    validate(content)
    assert {sample["launch"] for sample in content["samples"]} == {"stream", "graph"}
    assert content["kernels"]
