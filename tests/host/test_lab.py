"""The laboratory of bench/lab without a GPU.

nvcc compiles it for every architecture of CUDA 13, NVRTC 12.6 its kernels for sm_70, and the machine code
of sm_90 is searched for the instructions that are to be measured. The kernels that need nothing but cells,
counters, barriers and copies run on the CPU; cells lean on 64-bit words that are written whole, which the
race checker does not know, so it sees the others. Bulk copies, clusters, hints, programmatic launches and
timers have no counterpart in the harness: these are only compiled, and each checks its results on the GPU
before it is timed. What judges and reports is plain C++ and runs here, with invented rows and with workers
that fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cudatools
import hostbuild
import pytest
from hostbuild import CACHE, JOBS, ROOT, Driver

Drivers = Callable[[str, str], Driver]

LAB = ROOT / "bench" / "lab"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
COMPILE_TIMEOUT_S = 600

# --- the kernels on the CPU ---

TWO_SCHEDULES = ("--schedule", "ascending:0", "--schedule", "random:3")
WITHOUT_CELLS = (
    *(
        "copy",
        "sum",
        "write",
        "fill_16_rows",
        "fill_8_rows",
        "fill_4_flat",
        "fill_loads_rows",
        "fill_loads_flat",
    ),
    *("stream_sum", "stream_write", "phases_read_write", "phases_write"),
    *(
        f"{way}_{shape}"
        for way in ("counter", "release_acquire", "flags")
        for shape in ("pairs", "fewer_values_than_blocks", "many_values")
    ),
)
# Barriers and fences by their number in LabSite, with what is reported when they are dropped.
READY, WRITTEN, MET, READ, BEFORE, AFTER = range(6)
LOST_ORDER = r"data race on words|uninitialised: .* words"
DROPS = [
    *(
        (f"{way}_many_values", READY, r"uninitialised|data race on shared array 0")
        for way in ("counter", "flags")
    ),
    *(
        (f"{way}_many_values", READ, r"uninitialised|data race on shared array 0")
        for way in ("counter", "flags")
    ),
    *(
        (f"{way}_many_values", site, LOST_ORDER)
        for way in ("counter", "release_acquire", "flags")
        for site in (WRITTEN, MET, BEFORE, AFTER)
    ),
    ("fill_16_rows", READY, r"data race on shared array 0"),
    ("fill_16_rows", WRITTEN, r"data race on shared array 0"),
]


@pytest.mark.parametrize(
    "build", [pytest.param(build, marks=pytest.mark.needs_driver("lab", build)) for build in ("fast", "asan")]
)
def test_kernels_are_right_on_the_cpu(driver: Drivers, build: str) -> None:
    code, output = driver("lab", build)(*(() if build == "fast" else TWO_SCHEDULES))
    assert code == 0, output
    assert re.search(r"\b(?!0 )\d+ runs, 0 failures", output), output


@pytest.mark.needs_driver("lab", "race")
def test_kernels_without_cells_are_free_of_races(driver: Drivers) -> None:
    code, output = driver("lab", "race")(*(word for case in WITHOUT_CELLS for word in ("--case", case)))
    assert code == 0, output
    assert f"{6 * len(WITHOUT_CELLS)} runs, 0 failures" in output


@pytest.mark.needs_driver("lab", "race")
@pytest.mark.parametrize(("case", "dropped", "report"), DROPS)
def test_missing_barrier_or_fence_is_found(driver: Drivers, case: str, dropped: int, report: str) -> None:
    code, output = driver("lab", "race")(
        "--case", case, "--schedule", "random:2", "--drop-site", str(dropped)
    )
    assert code == 1, output
    assert re.search(report, output), output


@pytest.mark.needs_driver("lab", "fast")
@pytest.mark.parametrize(("case", "dropped"), [("cells_many_values", READY), ("cells_many_values", READ)])
def test_missing_barrier_spoils_the_values_of_cells(driver: Drivers, case: str, dropped: int) -> None:
    """The expected values notice what the race checker is not asked."""
    code, output = driver("lab", "fast")("--case", case, "--drop-site", str(dropped))
    assert code == 1, output
    assert re.search("values after the last round|deadlock", output), output


# --- compiled ---


def _digest(*more: str) -> str:
    sources = [
        ROOT / "bench" / "lab.cu",
        *sorted(LAB.glob("*.h")),
        ROOT / "csrc" / "cuda" / "kernels" / "port.h",
    ]
    return hostbuild.digest(*(path.read_bytes() for path in sources), *more)


def _compile(architecture: int) -> Path:
    """A folder with the cubin and ptxas's log; kept while the sources are the same."""
    compiler = hostbuild.nvcc()
    assert compiler is not None
    version = subprocess.run([str(compiler), "--version"], capture_output=True, text=True, check=True).stdout
    folder = CACHE / "lab" / f"sm_{architecture}-{_digest(version)}"
    if (folder / "log").exists():
        return folder
    for old in folder.parent.glob(f"sm_{architecture}-*"):
        shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(compiler), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Werror", "all-warnings"]
    command += ["-Xptxas", "-v", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'bench'}", "--cubin"]
    command += [str(ROOT / "bench" / "lab.cu"), "-o", str(folder / "cubin")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    assert said.returncode == 0, f"{' '.join(command)}\n{said.stdout}{said.stderr}"
    (folder / "log").write_text(said.stdout + said.stderr)
    return folder


@pytest.fixture(scope="module")
def compiled() -> dict[int, Path]:
    """The folders of _compile() by architecture."""
    if hostbuild.nvcc() is None:
        pytest.skip("no nvcc")
    with ThreadPoolExecutor(JOBS) as pool:
        return dict(zip(ARCHITECTURES, pool.map(_compile, ARCHITECTURES)))


def test_nvcc_compiles_the_laboratory_for_every_architecture(compiled: dict[int, Path]) -> None:
    kernels = {}
    for architecture, folder in compiled.items():
        found = cudatools.resources((folder / "log").read_text())
        assert not [one for one in found if one.spilled_bytes], "\n" + cudatools.table(found)
        kernels[architecture] = {one.kernel for one in found}
    assert len(kernels[90]) >= 30
    assert all(names == kernels[90] for names in kernels.values())


# What a kernel measures, as it must be in the machine code of sm_90, and what must not be there.
INSTRUCTIONS = [
    ("exchange<(gc::lab::Meet)0>", r"STG\.E\.64\.STRONG\.GPU", None),
    ("exchange<(gc::lab::Meet)0>", r"LDG\.E\.64\.STRONG\.GPU", r"MEMBAR|CCTL\.IVALL"),
    ("exchange<(gc::lab::Meet)1>", r"MEMBAR\.SC\.GPU", None),
    ("exchange<(gc::lab::Meet)2>", r"RED\w*\.E\.ADD\.STRONG\.GPU", r"MEMBAR\.SC"),
    ("exchange<(gc::lab::Meet)3>", r"MEMBAR\.SC\.GPU", r"ATOM|RED[GX]"),
    ("scatter_cells", r"LDG\.E\.64\.STRONG\.GPU", r"MEMBAR|CCTL\.IVALL"),
    ("exchange_in_cluster<true>", r"STAS", None),
    ("exchange_in_cluster<false>", r"UCGABAR_ARV", r"STAS"),
    ("fill_shared<(gc::lab::Fill)0>", r"LDGSTS\.E\.BYPASS\.128", r"LDG\.E\.128|UBLKCP"),
    ("fill_shared<(gc::lab::Fill)1>", r"LDGSTS\.E\.64", r"LDG\.E\.128|UBLKCP"),
    ("fill_shared<(gc::lab::Fill)2>", r"LDGSTS\.E\b(?!\.64|\.BYPASS)", r"LDG\.E\.128|UBLKCP"),
    ("fill_shared<(gc::lab::Fill)3>", r"LDG\.E\.128", r"LDGSTS|UBLKCP"),
    ("fill_shared<(gc::lab::Fill)4>", r"UBLKCP\.S\.G", r"LDGSTS"),
    ("stream_tiles<true, (gc::lab::Sink)1>", r"UBLKCP\.S\.G", r"LDGSTS"),
    ("stream_tiles<false, (gc::lab::Sink)1>", r"LDGSTS\.E\.BYPASS\.128", r"UBLKCP"),
    ("phases_in_turn", r"UBLKCP\.G\.S", None),
    ("read_after_prefetch<(gc::lab::Prefetch)0>", r"LDG\.E\.128", r"UBLKPF|CCTL\.E\.PF2"),
    ("read_after_prefetch<(gc::lab::Prefetch)1>", r"CCTL\.E\.PF2", r"UBLKPF"),
    ("read_after_prefetch<(gc::lab::Prefetch)2>", r"UBLKPF", r"CCTL\.E\.PF2"),
    ("small_step<true>", r"ACQBULK", None),
    ("small_step<true>", r"PREEXIT", None),
    ("small_step<false>", r"LDG\.E", r"ACQBULK|PREEXIT"),
    ("copy_vectors", r"LDG\.E\.128", None),
    ("copy_vectors", r"STG\.E\.EF\.128", None),
]


def test_the_machine_code_has_what_is_measured(compiled: dict[int, Path]) -> None:
    try:
        code = cudatools.disassemble(compiled[90] / "cubin")
    except cudatools.Unavailable as error:
        pytest.skip(str(error))
    wrong = []
    for kernel, wanted, unwanted in INSTRUCTIONS:
        text = code[f"gc::lab::{kernel}"]
        if not re.search(wanted, text):
            wrong.append(f"{kernel} has no {wanted}")
        if unwanted is not None and re.search(unwanted, text):
            wrong.append(f"{kernel} has {unwanted}")
    assert not wrong, "\n".join(wrong)


def test_volta(compiled: dict[int, Path]) -> None:
    """NVRTC 12.6 compiles every kernel for sm_70: the headers with kernels are free of the runtime API."""
    try:
        nvrtc = cudatools.Nvrtc()
    except cudatools.Unavailable as error:
        pytest.skip(f"NVRTC 12.6: {error}")
    kernels = sorted(one.kernel for one in cudatools.resources((compiled[75] / "log").read_text()))
    source = "".join(f'#include "lab/{path.name}"\n' for path in sorted(LAB.glob("*_kernels.h")))
    options = ["--gpu-architecture=compute_70", "--std=c++17"]
    ptx = nvrtc.ptx(source, kernels, [ROOT / "csrc", ROOT / "bench"], options)
    assert sorted(cudatools.ptx_entries(ptx)) == kernels
    folder = CACHE / "lab" / "volta"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ptx").write_text(ptx)
    ptxas = cudatools.nvrtc_root() / "cuda_nvcc" / "bin" / "ptxas"
    ptxas.chmod(0o755)
    command = [str(ptxas), "-arch=sm_70", "-v", str(folder / "ptx"), "-o", str(folder / "cubin")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    assert said.returncode == 0, said.stdout + said.stderr
    found = cudatools.resources(said.stdout + said.stderr)
    assert sorted(one.kernel for one in found) == kernels
    assert not [one for one in found if one.spilled_bytes], "\n" + cudatools.table(found)


def test_the_build_script_takes_the_toolkit_of_the_package(tmp_path: Path) -> None:
    """bench/lab.sh finds the compiler as setup.py does, and needs no torch for that."""
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0" || echo "$0" "$@"\n')
    nvcc.chmod(0o755)
    script = ROOT / "bench" / "lab.sh"
    environment = {
        "PATH": os.environ["PATH"],
        "CUDA_HOME": str(tmp_path / "toolkit"),
        "PYTHON": sys.executable,
    }
    output = tmp_path / "new" / "lab"
    command = [str(script), str(output), "sm_100"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(str(nvcc))
    assert "-arch=sm_100" in said.stdout and f"-I{ROOT / 'csrc'}" in said.stdout
    assert said.stdout.endswith(f"lab.cu -o {output}\n")
    assert output.parent.is_dir()
    wrong = {**environment, "CUDA_HOME": str(tmp_path / "nothing")}
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, env=wrong)
    assert said.returncode != 0 and "has no bin/nvcc" in said.stderr
    assert subprocess.run([str(script)], capture_output=True, timeout=60).returncode == 2


# --- what judges and reports ---


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of tests/host/lab/report.cpp."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = tmp_path_factory.mktemp("lab") / "report"
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'bench'}"]
    command += [str(Path(__file__).parent / "lab" / "report.cpp"), "-o", str(program)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    assert said.returncode == 0, said.stderr
    return program


def _row(key: str, median: float, size: float = 0, **more: str) -> str:
    """A line as a worker gives it, with three samples around this median."""
    topic, name = key.split("/", 1)
    samples = ",".join(str(median + delta) for delta in (0.25, -0.125, 0))
    unit, status, note = more.get("unit", "us"), more.get("status", "ok"), more.get("note", "")
    return "\t".join((topic, name, unit, "cold", status, note, str(size), samples if status == "ok" else ""))


def _json(program: Path, rows: list[str]) -> dict[str, Any]:
    said = subprocess.run(
        [program, "json"], input="\n".join(rows) + "\n", capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 0
    result: dict[str, Any] = json.loads(said.stdout)
    return result


def _verdicts(program: Path, rows: list[str]) -> dict[str, str]:
    return {f"{row['topic']}/{row['name']}": row["verdict"] for row in _json(program, rows)["rows"]}


def test_rows_come_through(report: Path) -> None:
    rows = [_row("meet/cells all", 0.75, note='it "said" \\ this'), _row("copy/span 4 MB", 4, 4e6)]
    found = _json(report, rows)
    assert found["facts"]["GPU"] == 'a "quoted" \\ name'
    first, second = found["rows"]
    assert (first["median"], first["min"], first["max"]) == (0.75, 0.625, 1.0)
    assert first["samples"] == [1.0, 0.625, 0.75]
    assert first["note"] == 'it "said" \\ this'
    assert (second["bytes"], second["cache"], second["unit"]) == (4e6, "cold", "us")
    said = subprocess.run([report, "table"], input=rows[1] + "\n", capture_output=True, text=True, timeout=60)
    assert "| span 4 MB | cold | 4.000 | 3.875 | 4.250 | us | 1000 | ok |" in said.stdout
    assert subprocess.run([report, "json"], input="a\tb\n", text=True, timeout=60).returncode == 2


def test_fit_of_the_copy(report: Path) -> None:
    """Each series has a line of its own; "graph" does not take in what else begins so."""
    rows = []
    for size in (4e6, 34e6, 140e6):
        name = f"{size / 1e6:.0f} MB"
        for series, constant in (("span", 2.5), ("graph queued", 4.0), ("graph", 10.0), ("graph chain", 1.5)):
            rows.append(_row(f"copy/{series} {name}", constant + size / 3e6, size))
    found = _json(report, rows)
    verdicts = {row["name"]: row["verdict"] for row in found["rows"]}
    assert verdicts["span 34 MB"].startswith("2.5 us + bytes / 3.00 TB/s")
    assert verdicts["graph 4 MB"].startswith("10.0 us + bytes / 3.00 TB/s")
    findings = "\n".join(found["findings"])
    assert "1.5 us of a replay are launch and events, and 6.0 the host's" in findings
    assert "a further node of a graph costs 1.5 us + bytes / 3.00 TB/s" in findings


def test_exchanges_of_the_chain(report: Path) -> None:
    rows = [
        _row("meet/cells scattered 2048", 1.5),
        _row("meet/cells 2048", 1.25),
        _row("meet/cells all", 0.75),
    ]
    assert "its four exchanges alone take 4.8 us" in _json(report, rows)["findings"][0]
    assert _json(report, rows[1:])["findings"] == []


COPY = _row("fill/copy", 10, 30e6)
JUDGED = [
    # rows, the row that is judged, what its verdict ends with
    ([_row("meet/cells all", 1.19)], ": no clusters"),
    ([_row("meet/cells all", 1.21)], ": clusters"),
    ([_row("meet/cells all", 0.8), _row("meet/cells 2048", 1.4)], "+0.50 us"),
    ([_row("meet/cells 16", 0.8), _row("meet/counter 16", 0.99)], ": tiled"),
    ([_row("meet/cells 16", 0.8), _row("meet/counter 16", 1.01)], ": cells"),
    ([_row("meet/cells 16", 0.8), _row("meet/counter all", 0.9)], "no cells to compare with"),
    ([_row("meet/cells all", 1.0), _row("meet/cluster of 8 st.async 8", 0.69)], ": pays"),
    ([_row("meet/cells all", 1.0), _row("meet/cluster of 8 st.async 8", 0.71)], ": does not pay"),
    ([_row("meet/cells 2048", 2.0), _row("meet/cluster of 8 barrier 2048", 1.0)], ": pays"),
    ([COPY, _row("fill/fill bulk, flat, 512 threads", 10.5, 30e6)], "95 %: good"),
    ([COPY, _row("fill/fill bulk, flat, 512 threads", 10.6, 30e6)], "94 %: below"),
    ([_row("phases/copy", 20, 60e6), _row("phases/write, large grid", 10.6, 30e6)], "94 %: below"),
    ([COPY, _row("phases/write, large grid", 10.6, 30e6)], "no copy to compare with"),
    *(
        (
            [
                _row("cache/15 MB after no prefetch, pause 0 us", 2),
                _row("cache/15 MB after no prefetch, pause 5 us", 6),
                _row("cache/15 MB after prefetch.global.L2, pause 5 us", time),
            ],
            verdict,
        )
        for time, verdict in ((4.1, ": in"), (4.3, ": out"))
    ),
    *(
        (
            [
                _row("cache/6 MB again, read last, no hints", 1.0),
                _row("cache/6 MB again, read first, no hints", 4.0),
                _row("cache/6 MB again, read first, evict_last, others evict_first", time),
            ],
            verdict,
        )
        for time, verdict in ((3.4, ": in"), (3.6, ": out"))
    ),
    (
        [_row("launch/three small kernels, graph", 6), _row("launch/three small kernels, graph, PDL", 5)],
        ": in",
    ),
    (
        [_row("launch/three small kernels, graph", 6), _row("launch/three small kernels, graph, PDL", 5.2)],
        ": out",
    ),
    *(
        (
            [
                _row("launch/ordinary launch and one exchange, idle GPU", 8),
                _row("launch/cooperative launch and one exchange, idle GPU", time),
            ],
            verdict,
        )
        for time, verdict in ((6.9, ": cooperative"), (7.1, ": ordinary"))
    ),
    ([_row("launch/host: <<<>>>", 2), _row("launch/host: cudaFuncSetAttribute and <<<>>>", 2.4)], ": goes"),
    ([_row("launch/host: <<<>>>", 2), _row("launch/host: cudaFuncSetAttribute and <<<>>>", 2.2)], ": stays"),
    ([_row("meet/counter 16", 1, status="FAILED", note="values differ")], "FAILED: values differ"),
]


@pytest.mark.parametrize(("rows", "verdict"), JUDGED)
def test_verdict(report: Path, rows: list[str], verdict: str) -> None:
    last = list(_verdicts(report, rows).values())[-1]
    assert last.endswith(verdict), last


def test_smallest_rows_that_keep_the_rate(report: Path) -> None:
    rows = [COPY]
    for size, time in (("rows of 64", 14), ("rows of 128", 10.4), ("rows of 256", 10.1)):
        rows.append(_row(f"fill/fill cp.async 16, {size}, 512 threads", time, 30e6))
    assert _json(report, rows)["findings"] == [
        "fill by cp.async 16: >= 95 % of the copy's rate from rows of 128 on"
    ]


WORKERS = {
    "fine": (["ok", "ok", "ok"], ""),
    "fault": (["ok", "FAILED", "ok"], "ended by signal 6"),
    "stuck": (["ok", "FAILED", "ok"], "no word for 1 s"),
    "lost context": (["ok", "FAILED", "ok"], "cudaErrorIllegalAddress"),
    "half a line": (["ok", "FAILED", "ok"], "ended with status 0"),
    "dies between": (["ok", "ok", "FAILED", "ok"], "no memory"),
    "dead on arrival": (["FAILED"], "ended by signal 6"),
}


@pytest.mark.parametrize("topic", WORKERS)
def test_a_variant_that_fails_leaves_the_others_alone(report: Path, topic: str) -> None:
    said = subprocess.run(
        [report, "workers", topic],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert said.returncode == 0, said.stderr
    rows = json.loads(said.stdout)["rows"]
    statuses, note = WORKERS[topic]
    assert [row["status"] for row in rows] == statuses
    assert [row["note"] for row in rows if row["status"] == "FAILED" and note not in row["note"]] == []
    assert rows[-1]["name"] == "three" or statuses[-1] == "FAILED"
