"""The host's time beside the GPU's: how it is measured, and where it is shown."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from evaluate import missing_gpu
from invented_result import LAUNCHES, REPLAY_HOST_US, gpu_result
from paths import BENCH

PEERS = ("gc_cuda", "eager", "torch.compile")
NO_GPU = missing_gpu()


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows_under(text, heading):
    """Titles and rows of the first Markdown table below a heading."""
    lines = [line for line in text.split(f"{heading}\n", 1)[1].split("\n## ")[0].splitlines() if "|" in line]
    titles = cells_of(lines[0])
    rows = [dict(zip(titles, cells_of(line))) for line in lines[2:]]
    return titles, [row for row in rows if len(row) == len(titles)]


# --- the measurement ---


class Machine:
    """A clock that calls and waits move on, and what they have done, in order."""

    def __init__(self, monkeypatch, timing, waits):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.takes("wait", waits))

    def takes(self, what, seconds):
        self.log.append(what)
        self.now += seconds

    def call(self, name, microseconds):
        return lambda: self.takes(name, 1e-6 * microseconds)


@pytest.mark.parametrize("waits", [0.0, 1.0])
def test_a_row_of_calls_is_timed_without_the_wait_for_the_gpu(bench, monkeypatch, waits):
    timing = bench("timing")
    machine = Machine(monkeypatch, timing, waits)
    found = timing.host_us({"a": machine.call("a", 10), "b": machine.call("b", 250)})
    assert found == {"a": pytest.approx(10), "b": pytest.approx(250)}
    rows = "".join(name[0] for name in machine.log).split("w")
    assert rows.pop(0) == "", "the GPU is idle before the first row"
    assert rows.pop() == "", "and nothing is left to run after the last"
    n = 3 if waits else timing.HOST_ROWS  # three rows take longer than there is time
    assert sorted(rows) == ["a" * timing.HOST_CALLS] * n + ["b" * timing.HOST_CALLS] * n
    assert rows[:4] == [name * timing.HOST_CALLS for name in "abba"], "the peers take turns"


def test_an_interruption_is_not_the_time_of_a_call(bench, monkeypatch):
    timing = bench("timing")
    machine = Machine(monkeypatch, timing, 0.0)
    taken = iter([1e6, *[10.0] * 1000])
    found = timing.host_us({"a": lambda: machine.takes("a", 1e-6 * next(taken))})
    # The one second was more than there is time for, and the least of rows follow.
    assert machine.log.count("a") == 3 * timing.HOST_CALLS
    assert found == {"a": pytest.approx(10)}


def test_the_queue_of_launches_does_not_fill(bench):
    """With as many launches as the longest peer was seen to make, and half of the queue to spare."""
    timing, host_times = bench("timing"), bench("host_times")
    seen = [
        entry["launches"]
        for path in (BENCH / "results").glob("*.json")
        for entry in json.loads(path.read_text()).get("launches", [])
    ]
    assert max(seen) > 30
    assert 2 * timing.HOST_CALLS * max(seen) < timing.QUEUE
    assert host_times.CALLS * max(seen) < timing.QUEUE


@pytest.fixture
def invented_gpu(bench, monkeypatch):
    """A GPU that runs on the CPU: calls, replays and what they take the host can be told apart."""
    suite, latency = bench("suite"), bench("latency")

    class Replay:
        def __init__(self, call):
            self.call = call

    def captured(calls):
        refused = {name: "not captured in a CUDA graph: no" for name in calls if name == "refused"}
        return {name: Replay(call) for name, call in calls.items() if name not in refused}, refused

    def host_us(calls):
        replays = {isinstance(call, Replay) for call in calls.values()}
        assert len(replays) == 1, "calls and replays are not mixed"
        return {name: 1000.0 * replays.copy().pop() + 10.0 * i + 1 for i, name in enumerate(calls)}

    for module in (suite, latency):
        right = module.make
        monkeypatch.setattr(module, "make", lambda case, device, right=right: right(case, "cpu"))
        monkeypatch.setattr(module, "measure", lambda calls, *_: {name: [2.0, 3.0, 4.0] for name in calls})
        monkeypatch.setattr(module, "graphs_of", captured)
        monkeypatch.setattr(module, "host_us", host_us)
    monkeypatch.setattr(suite, "flush_of", lambda device: len)
    monkeypatch.setattr(suite, "copy_of", lambda case, device: len)
    return suite


def case_of(bench, batch):
    return bench("cases").Case("forward", "add", 1 / 4, "float32", "c4", (16, 9, 14), batch, "nchw")


def test_every_sample_has_the_host_of_its_peer_and_launch(bench, invented_gpu):
    result = invented_gpu.empty()
    invented_gpu.time_case(case_of(bench, 2), invented_gpu.Settings("cuda", 0.01, 3, compiled=False), result)
    assert not result["wrong"]
    found = {(s["peer"], s["cache"], s["launch"]): s["host_us"] for s in result["samples"]}
    assert found == {
        (peer, cache, launch): 1000.0 * (launch == "graph") + 10 * i + 1
        for i, peer in enumerate(("gc_cuda", "eager", "copy"))
        for cache in ("warm", "cold")
        for launch in ("stream", "graph")
    }


def test_a_large_batch_is_not_replayed(bench, invented_gpu):
    result = invented_gpu.empty()
    invented_gpu.time_case(case_of(bench, 3), invented_gpu.Settings("cuda", 0.01, 3, compiled=False), result)
    assert {(s["launch"], s["host_us"] < 1000) for s in result["samples"]} == {("stream", True)}


def test_on_a_cpu_the_host_is_not_timed(bench, monkeypatch):
    suite = bench("suite")
    monkeypatch.setattr(suite, "host_us", None)
    monkeypatch.setattr(suite, "flush_of", lambda device: list)
    result = suite.empty()
    suite.time_case(case_of(bench, 1), suite.Settings("cpu", 0.001, 3, compiled=False), result)
    assert result["samples"]
    assert not any("host_us" in entry for entry in result["samples"])


# --- bench/latency.py ---


def test_latency_shows_stream_and_graph_of_every_peer(bench, invented_gpu, monkeypatch):
    latency, tables = bench("latency"), bench("tables")
    arguments = latency.parse_arguments(["--no-compile"])
    found = latency.run_case(case_of(bench, 2), "cuda", arguments)
    assert not found.wrong
    # x is copied and cloned beside the peers: they are the third and the fourth.
    assert [(row.peer, row.launch, row.host_us) for row in found.rows] == [
        ("gc_cuda", "stream", 1.0),
        ("eager", "stream", 11.0),
        ("gc_cuda", "graph", 1001.0),
        ("eager", "graph", 1011.0),
    ]
    results = tables.Results({"device": "Invented GPU"}, found.rows, [], [], 1)
    for text in (tables.terminal(results), tables.markdown(results)):
        (line,) = [
            line for line in text.splitlines() if "eager" in line and "graph" in line and "3.000" in line
        ]
        words = line.replace("|", " ").split()
        assert words[words.index("graph") : words.index("graph") + 3] == ["graph", "3.000", "1011.0"]
        assert "host µs" in text
        assert "how long a call keeps the host busy" in " ".join(text.split())


def test_latency_counts_the_launches_of_the_plain_stream_alone(bench, monkeypatch):
    latency = bench("latency")
    empty = latency.tables.Row(*[None] * len(latency.tables.Row._fields))._replace(peer="gc_cuda")
    rows = [empty._replace(launch="stream"), empty._replace(launch="graph")]
    monkeypatch.setattr(latency, "run_case", lambda *_: latency.Found(rows, {}, []))
    monkeypatch.setattr(latency, "launches_of", lambda *_: {"gc_cuda": 3})
    monkeypatch.setattr(latency, "cannot_count_launches", lambda: "")
    found, _, _ = latency.run_all([case_of(bench, 1)], "cuda", latency.parse_arguments([]))
    assert [row.launches for row in next(iter(found.values())).rows] == [3, None]


def test_latency_on_a_cpu_has_no_column_of_the_host(bench, tmp_path, capsys):
    words = ["--quick", "--stages", "16x9x14", "--seconds", "0.001", "--device", "cpu", "--no-compile"]
    assert bench("latency").main([*words, "--layouts", "nchw", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out + next(tmp_path.glob("*.md")).read_text()
    assert "host µs" not in text
    assert "| by |" not in text
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert {(row["launch"], row["host_us"]) for row in rows} == {("stream", None)}


# --- the page ---


@pytest.fixture
def older(result):
    """The same from before the host was timed."""
    for entry in result["samples"]:
        del entry["host_us"]
    return result


def test_the_summary_has_the_host_beside_the_time(bench, result):
    text = bench("page").page(result, {})
    for heading, of_training in (("### forward", False), ("### forward+backward", True)):
        titles, rows = rows_under(text, heading)
        assert [title for title in titles if "host" in title] == [f"{peer}, host µs" for peer in PEERS]
        c3 = next(row for row in rows if row["map"].startswith("c3"))
        for peer in PEERS:
            assert float(c3[f"{peer}, host µs"]) == pytest.approx(7 * LAUNCHES[peer][of_training], rel=0.01)


def test_stream_and_graph_stand_side_by_side(bench, result):
    _, rows = rows_under(bench("page").page(result, {}), "## Plain stream and CUDA graph")
    row = next(row for row in rows if row["direction"] == "forward+backward")
    for peer in PEERS:
        plain, graph = map(float, row[f"{peer}, host µs"].split(" → "))
        assert plain == pytest.approx(7 * LAUNCHES[peer][1], rel=0.01)
        assert graph == pytest.approx(REPLAY_HOST_US[peer])


def test_every_case_has_the_host_of_every_peer(bench, result):
    titles, rows = rows_under(bench("page").page(result, {}), "## Every case")
    assert len(rows) == len(result["samples"]) / 4
    for row in rows:
        counts = {peer: 7 * LAUNCHES[peer]["backward" in row["direction"]] for peer in LAUNCHES}
        expected = counts if row["launched by"] == "stream" else REPLAY_HOST_US
        for peer in LAUNCHES:
            assert float(row[f"{peer}, host µs"]) == pytest.approx(expected[peer], rel=0.01)
    assert titles.index("gc_cuda, host µs") > titles.index("gc_cuda, ms")


def test_the_page_says_how_the_host_was_timed(bench, result):
    text = bench("page").page(result, {})
    assert "how long a call keeps the host busy" in text
    assert "Host µs are those of the clock: 5 calls in a row on an idle GPU" in text


def test_ones_own_case_has_the_host(bench, result):
    report, samples = bench("report"), bench("samples")
    lines = report.own_table(result).splitlines()
    assert lines[0].endswith("gc_cuda, host µs  eager, host µs  torch.compile, host µs")
    first = samples.samples_of(result)[0]
    words = lines[2].split()
    assert words[:4] == [first.direction, first.layout, first.cache, first.launch]
    assert list(map(float, words[-3:])) == [21.0, 84.0, 63.0]


def test_a_peer_without_a_host_time_is_a_gap_and_no_error(bench, result):
    for entry in result["samples"]:
        if entry["peer"] == "torch.compile" and entry["launch"] == "graph":
            del entry["host_us"]
    _, rows = rows_under(bench("page").page(result, {}), "## Plain stream and CUDA graph")
    assert all(row["torch.compile, host µs"].endswith("→ –") for row in rows)
    assert not any(row["eager, host µs"].endswith("–") for row in rows)


def test_an_older_result_is_read_and_has_no_column(bench, older, tmp_path, capsys):
    page, report, samples, readme = (bench(name) for name in ("page", "report", "samples", "readme"))
    text = page.page(older, {}) + report.own_table(older) + readme.figures(older, "a.json")
    assert "host µs" not in text.lower()
    samples.write(tmp_path / "a.json", older)
    assert report.main(["--compare", *[str(tmp_path / "a.json")] * 2]) == 0
    assert "the host of" not in capsys.readouterr().out
    assert [s.host_us for s in samples.samples_of(older)] == [None] * len(older["samples"])


def test_the_committed_page_is_still_what_its_result_gives(bench):
    """Of a GPU, from before the host was timed."""
    path = BENCH / "results" / "nvidia-h100-80gb-hbm3.json"
    assert "host µs" not in bench("page").page(bench("samples").read(path), {}).lower()


def test_the_comparison_says_what_became_of_the_host(bench, older, tmp_path, capsys):
    earlier, later = gpu_result(), gpu_result()
    for entry in later["samples"]:
        entry["host_us"] *= 0.5 if entry["peer"] == "gc_cuda" else 3.0
    paths = {name: tmp_path / f"{name}.json" for name in ("earlier", "later", "older")}
    for path, content in zip(paths.values(), (earlier, later, older)):
        bench("samples").write(path, content)
    assert bench("report").main(["--compare", str(paths["earlier"]), str(paths["later"])]) == 0
    assert "the host of gc_cuda: 0.50 times" in capsys.readouterr().out
    assert bench("report").main(["--compare", str(paths["older"]), str(paths["later"])]) == 0
    assert "the host of" not in capsys.readouterr().out


def test_the_schema_knows_the_host(result):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    validator = jsonschema.Draft202012Validator(json.loads((BENCH / "report_schema.json").read_text()))
    assert validator.is_valid(result)
    for wrong in (0, -1.0, "12", None):
        spoiled = copy.deepcopy(result)
        spoiled["samples"][0]["host_us"] = wrong
        assert not validator.is_valid(spoiled), wrong
    del result["samples"][0]["host_us"]
    assert validator.is_valid(result)


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU != "", reason=NO_GPU)
def test_what_the_gpu_takes_is_not_the_hosts_time(bench):
    """A kernel that only waits, for several milliseconds: launching it is done long before, in both ways."""
    timing = bench("timing")
    calls = {"slow": lambda: torch.cuda._sleep(20_000_000)}  # cycles
    replays, refused = timing.graphs_of(calls)
    assert not refused
    for launched in (calls, replays):
        us = timing.host_us(launched)["slow"]
        device_us = 1e3 * timing.Timer("cuda")(launched["slow"])
        assert device_us > 4000
        assert 0 < us < device_us / 4


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU != "", reason=NO_GPU)
def test_a_case_on_a_gpu_has_the_host(bench):
    suite = bench("suite")
    result, settings = suite.empty(), suite.Settings("cuda", 0.01, 3, compiled=False)
    for direction in bench("cases").DIRECTIONS:
        suite.time_case(case_of(bench, 2)._replace(direction=direction), settings, result)
    assert not result["wrong"]
    assert not [m for m in result["missing"] if "CUDA graph" in m["reason"]]
    found = {(s["direction"], s["peer"], s["launch"]): s["host_us"] for s in result["samples"]}
    assert len(found) == 2 * 3 * 2
    assert all(0.5 < us < 1e5 for us in found.values())
    for direction in bench("cases").DIRECTIONS:  # a dozen launches, and three dozen, against one replay
        assert found[direction, "eager", "graph"] < found[direction, "eager", "stream"]
        assert found[direction, "copy", "stream"] < found[direction, "eager", "stream"]


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU != "", reason=NO_GPU)
def test_latency_on_a_gpu_has_the_host(bench, tmp_path, capsys):
    words = ["--quick", "--stages", "16x9x14", "--seconds", "0.01", "--device", "cuda", "--no-compile"]
    assert bench("latency").main([*words, "--layouts", "nchw", "--output", str(tmp_path)]) == 0
    assert "host µs" in capsys.readouterr().out
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    found = {(row["direction"], row["peer"], row["launch"]): row for row in rows}
    assert len(found) == len(rows) == 2 * 2 * 2
    assert all(0.5 < row["host_us"] < 1e5 for row in rows)
    assert {row["launches"] is None for row in rows if row["launch"] == "graph"} == {True}
