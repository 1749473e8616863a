"""The Markdown page of a result: everything in it comes from the result, and from the names of what else was measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import method
from cases import FORWARD, TRAINING
from formulas import BLOCKS, PASSES, PUBLISHED, SOURCES
from kernels import Row as KernelRow
from models import BARE, FUSED, PLAIN
from peers import COMPILED, EAGER, OURS
from samples import (
    COLD,
    GRAPH,
    LIMIT,
    STREAM,
    Comparison,
    Sample,
    comparisons,
    headline,
    samples_of,
    setting_text,
)

Result = dict[str, Any]
PEERS = (OURS, EAGER, COMPILED, LIMIT)
NOTHING = "–"


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """To so many significant digits; no exponent."""
    if value is None:
        return NOTHING
    if value == 0:
        return f"0{unit}"
    text = f"{float(f'{value:.{digits}g}'):.10f}"
    whole, _, fraction = text.partition(".")
    kept = max(0, digits - len(whole.lstrip("-0"))) if whole.lstrip("-0") else None
    fraction = fraction[:kept] if kept is not None else fraction.rstrip("0")
    return (f"{whole}.{fraction}" if fraction else whole) + unit


def times(value: float | None) -> str:
    """A ratio."""
    return NOTHING if value is None else f"{number(value, 2)}×"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Markdown; the first columns are aligned to the left."""
    marks = ["---" if i < left else "--:" for i in range(len(titles))]
    lines = [titles, marks, *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def picture(pictures: dict[str, str], name: str, what: str) -> list[str]:
    return ["", f"![{what}]({pictures[name]})"] if name in pictures else []


# --- the block ---


def summary_rows(found: list[Sample], direction: str, cache: str) -> list[list[str]]:
    """A line for each map and layout."""
    rows = []
    for row in comparisons(found, direction=direction, cache=cache, launch=STREAM):
        ms = [number(row.ms(peer)) for peer in (OURS, EAGER, COMPILED, LIMIT)]
        faster = [times(row.faster(than)) for than in (EAGER, COMPILED)]
        rows.append([row.any.map, row.any.layout, *ms, *faster, percent(row.share(OURS))])
    return rows


SUMMARY = (
    "map",
    "layout",
    "gc_cuda, ms",
    "eager, ms",
    "torch.compile, ms",
    "limit, ms",
    "faster than eager",
    "than torch.compile",
    "of the limit",
)


def main_cache(samples: list[Sample]) -> str:
    """The one that the summary is about: cold, where it was measured."""
    caches = {s.cache for s in samples}
    return COLD if COLD in caches or not caches else min(caches)


def summary(result: Result, pictures: dict[str, str]) -> list[str]:
    found = headline(samples_of(result))
    if not found:
        return ["## The block", "", "Nothing was timed."]
    cache = main_cache(found)
    lines = ["## The block", ""]
    lines += [f"{setting_text(found[0].setting)}; medians of calls on the plain stream, {cache} cache."]
    for direction in (FORWARD, TRAINING):
        rows = summary_rows(found, direction, cache)
        if rows:
            lines += ["", f"### {direction}", "", *table(SUMMARY, rows, 2)]
    return [*lines, *picture(pictures, f"times-{cache}", "Time of the block over the size of x")]


def others(pictures: dict[str, str]) -> list[str]:
    """The rest of the pictures of the block."""
    lines = ["## How far from the limit", "", method.LIMIT]
    for name in ("share-cold", "share-warm"):
        lines += picture(pictures, name, "Share of the limit, by map")
    if {"times-cold", "times-warm"} <= set(pictures):
        lines += ["", "The times once more, with a warm cache:"]
        lines += picture(pictures, "times-warm", "Time of the block over the size of x, warm cache")
    return lines


def graphs(result: Result) -> list[str]:
    """Plain stream and CUDA graph side by side, for all peers."""
    samples = samples_of(result)
    rows = []
    for graph in comparisons(samples, launch=GRAPH):
        stream = {
            s.peer: s
            for s in samples
            if (s.case, s.cache, s.launch) == (graph.any.case, graph.any.cache, STREAM)
        }
        plain = Comparison(stream)
        cells = [f"{number(plain.ms(p))} → {number(graph.ms(p))}" for p in (OURS, EAGER, COMPILED)]
        first = graph.any
        rows.append(
            [first.map, first.layout, first.direction, setting_text(first.setting), first.cache, *cells]
            + [times(graph.faster(EAGER)), times(graph.faster(COMPILED)), percent(graph.share(OURS))]
        )
    lines = ["## Plain stream and CUDA graph", ""]
    if not rows:
        return [*lines, "Not measured: there is no GPU here." if is_cpu(result) else "Not measured."]
    titles = ["map", "layout", "direction", "block", "cache", *(f"{p}, ms" for p in (OURS, EAGER, COMPILED))]
    titles += ["graphs: faster than eager", "than torch.compile", "of the limit"]
    lines += [
        "Milliseconds, plain stream → replay of a CUDA graph, of every peer. A replay costs no launches by Python.",
        "",
    ]
    refused = [m for m in result["missing"] if "CUDA graph" in m["reason"]]
    lines += table(titles, rows, 5)
    return lines + ([""] + missing_lines(refused) if refused else [])


def launches(result: Result, pictures: dict[str, str]) -> list[str]:
    counted: dict[tuple[str, str, str], str] = {}
    for row in result["launches"]:
        counted[row["peer"], row["direction"], row["layout"]] = str(row["launches"])
    rows = [
        [direction, layout, *(str(PASSES[peer][direction, layout]) for peer in (EAGER, COMPILED, OURS))]
        + [counted.get((peer, direction, layout), "not measured") for peer in (EAGER, COMPILED, OURS)]
        for direction, layout in itertools.product((FORWARD, TRAINING), ("nchw", "channels_last"))
    ]
    titles = ["direction", "layout", *(f"passes, {p}" for p in ("eager", "Inductor", "gc_cuda"))]
    titles += [f"launches, {p}" for p in ("eager", "Inductor", "gc_cuda")]
    lines = ["## Passes and launches", "", method.PASSES, "", *table(titles, rows, 2)]
    remark = result["remarks"].get("launches")
    if not counted:
        why = remark or ("not measured: there is no GPU here" if is_cpu(result) else "not measured")
        lines += ["", f"Launches: {why}."]
    return lines + picture(pictures, "passes", "Passes and launches of eager, Inductor and gc_cuda")


def kernel_table(result: Result) -> list[str]:
    lines = ["## Kernel by kernel", ""]
    if not result["kernels"]:
        return [*lines, "Not measured: there is no GPU here." if is_cpu(result) else "Not measured."]
    rows = []
    for entry in result["kernels"]:
        row = KernelRow(**entry)
        us = [number(row.warm_us), number(row.cold_us)]
        rows.append([row.map, row.layout, row.kernel, *us, *row.rates()])
    titles = ["map", "layout", "kernel", "warm, µs", "cold, µs", "warm, GB/s", "cold, GB/s"]
    return [*lines, method.KERNELS, "", *table(titles, rows, 3)]


def traffic(result: Result) -> list[str]:
    lines = ["## Bytes of the formula and bytes of DRAM", ""]
    if not result["traffic"]:
        why = (
            "there is no GPU here" if is_cpu(result) else "there was no time for it, or it was not asked for"
        )
        return [*lines, f"{result['remarks'].get('traffic', f'not measured: {why}').capitalize()}."]
    rows = []
    for r in result["traffic"]:
        moved = r.get("read_bytes", 0) + r.get("written_bytes", 0)
        mib = [number(r.get(name, 0) / 2**20) for name in ("formula_bytes", "read_bytes", "written_bytes")]
        rows.append(
            [r["map"], r["layout"], r["direction"], r["peer"], *mib, times(moved / r["formula_bytes"])]
        )
    titles = [
        "map",
        "layout",
        "direction",
        "peer",
        "formula, MiB",
        "read, MiB",
        "written, MiB",
        "moved / formula",
    ]
    return [*lines, method.TRAFFIC, "", *table(titles, rows, 4)]


# --- models ---


def memory(result: Result, pictures: dict[str, str]) -> list[str]:
    lines = ["## Training memory", ""]
    if not result["memory"]:
        return [*lines, "Not measured."]
    rows = []
    for r in result["memory"]:
        what = f"{r['model']}{', its blocks alone' * r['blocks_only']}"
        peak = number(r["peak_bytes"] / 2**20, 4) if r["peak_bytes"] is not None else NOTHING
        names = {PLAIN: "eager blocks", FUSED: "gc_cuda", BARE: "no GC blocks"}
        rows.append(
            [
                what,
                f"{r['shape'][0]} × {r['input']}",
                names[r["variant"]],
                number(r["kept_bytes"] / 2**20, 4),
                peak,
            ]
        )
    titles = ["model", "input", "blocks", "kept for backward, MiB", "peak of a step, MiB"]
    return [
        *lines,
        method.MEMORY,
        "",
        *table(titles, rows, 3),
        *picture(pictures, "memory", "Training memory"),
    ]


def whole_models(result: Result, pictures: dict[str, str]) -> list[str]:
    lines = ["## Whole models, before and after `accelerate`", ""]
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in result["models"]:
        found.setdefault((row["model"], row["direction"]), {})[row["variant"]] = row
    rows = []
    for (model, direction), variants in found.items():
        ms = {variant: row["p50_ms"] for variant, row in variants.items()}
        cells = [number(ms.get(variant)) for variant in (PLAIN, FUSED, BARE)]
        faster = times(ms[PLAIN] / ms[FUSED]) if {PLAIN, FUSED} <= set(ms) else NOTHING
        rows.append([model, str(variants[PLAIN]["blocks"]), direction, *cells, faster])
    if rows:
        first = result["models"][0]
        lines += [
            f"Batch {first['batch']}, {first['size']}×{first['size']}, {first['layout']}, float32. {method.MODELS}",
            "",
        ]
        titles = [
            "model",
            "blocks",
            "direction",
            "as it is, ms",
            "accelerated, ms",
            "without blocks, ms",
            "faster",
        ]
        lines += table(titles, rows, 3) + picture(
            pictures, "models", "Whole models before and after accelerate"
        )
    absent = [m for m in result["missing"] if m["peer"] == "whole model"]
    lines += [f"- Left out: {m['case']}: {m['reason']}" for m in absent]
    return lines if rows or absent else [*lines, "Not measured."]


# --- what was published ---


def of_backbone(
    samples: list[Sample], backbone: str, ratio: float, direction: str, batch: int, cache: str
) -> Comparison | None:
    """The blocks of a backbone summed; None where not all maps were measured. NCHW, as those models have it."""
    total: dict[str, float] = {}
    peers: dict[str, Sample] = {}
    wanted = {"direction": direction, "ratio": ratio, "dtype": "float32", "fusion": "add", "layout": "nchw"}
    rows = comparisons([s for s in samples if s.batch == batch], cache=cache, launch=STREAM, **wanted)
    stages = {row.any.stage: row for row in rows}
    if not set(BLOCKS[backbone]) <= set(stages):
        return None
    for stage, count in BLOCKS[backbone].items():
        for peer, one in stages[stage].peers.items():
            total[peer] = total.get(peer, 0.0) + count * one.p50_ms
            peers[peer] = one
    return Comparison({peer: peers[peer]._replace(p50_ms=ms) for peer, ms in total.items()})


def published(result: Result, measured: Sequence[Result]) -> list[str]:
    samples = samples_of(result)
    cache = main_cache(samples)
    rows = []
    for p in PUBLISHED:
        cells = [f"{p.backbone}, {p.norm}, r{1 / p.ratio:.0f}"]
        cells += [f"{p.seconds[0]:.3f} → {p.seconds[1]:.3f}", f"+{p.training_ms:.0f}"]
        cells += [
            f"{p.fps[0]} → {p.fps[1]}",
            f"+{p.inference_ms:.1f}",
            f"{p.gigabytes[0]} → {p.gigabytes[1]}",
        ]
        for direction, batch in ((TRAINING, 2), (FORWARD, 1)):
            here = of_backbone(samples, p.backbone, p.ratio, direction, batch, cache)
            cells += [number(here.ms(peer)) if here else NOTHING for peer in (EAGER, COMPILED, OURS)]
        rows.append(cells)
    titles = ["backbone", "V100: s per iteration", "ms of that", "V100: images/s", "ms of that", "V100: GB"]
    titles += [f"here, training, {p}: ms" for p in ("eager", "torch.compile", "gc_cuda")]
    titles += [f"here, inference, {p}: ms" for p in ("eager", "torch.compile", "gc_cuda")]
    lines = [
        "## Beside what was published for V100s",
        "",
        f"{method.PUBLISHED} The cache is {cache}. Source: {SOURCES}.",
    ]
    return [*lines, "", *table(titles, rows), "", gpus_sentence([*measured, result])]


def gpus_sentence(results: Sequence[Result]) -> str:
    """Which GPUs there are results of, and whether a V100 is among them."""
    found = {r["device"]["name"]: r for r in results if r["device"]["kind"] == "cuda"}
    v100 = any("V100" in name for name in found)
    if not found:
        return "**No GPU has been measured: neither a V100 nor any other.**"
    names = ", ".join(
        f"{name} ({r['date'][:10]}, commit {r['versions']['commit']})" for name, r in sorted(found.items())
    )
    rest = "and a V100 is among them" if v100 else "and no other; **no V100 has been measured**"
    return f"GPUs that have been measured: {names}; {rest}."


# --- the whole ---


def is_cpu(result: Result) -> bool:
    return result["device"]["kind"] == "cpu"


def head(result: Result) -> list[str]:
    device, versions = result["device"], result["versions"]
    clocks = ", ".join(
        f"{name.replace('_', ' ')} {number(v, 4)}" for name, v in device["clocks"].items() if v is not None
    )
    software = (
        f"torch {versions['torch']}, CUDA {versions['cuda'] or 'none'}, driver {versions['driver'] or 'none'}"
    )
    tf32 = ", ".join(f"{name} {'on' if on else 'off'}" for name, on in result["tf32"].items())
    lines = [
        f"- device: {device['name']}, {device['capability']}, last-level cache {device['cache_bytes'] / 2**20:.0f} MiB, "
        f"memory {device['memory_bytes'] / 2**30:.0f} GiB",
        f"- clocks at the start: {clocks or 'not readable'}",
        f"- versions: gc_cuda {versions['gc_cuda']} (commit {versions['commit']}), {software}, "
        f"Python {versions['python']}; {versions['system']}",
        f"- run: {result['date']}, {result['length']}, {result['threads']} threads, load average "
        f"{result['load_average']} before it; allocator: {result['allocator']}",
    ]
    if not is_cpu(result):
        lines.append(f"- TF32 in eager and torch.compile, float32: {tf32}")
    return lines


def missing_lines(missing: Iterable[dict[str, str]]) -> list[str]:
    """One line for each peer and reason."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for m in missing:
        by_reason.setdefault((m["peer"], m["reason"]), []).append(m["case"])
    return [f"- {peer}: {reason}: {'; '.join(cases)}" for (peer, reason), cases in by_reason.items()]


def gaps(result: Result) -> list[str]:
    """What failed, what is missing, what there was no time for."""
    lines = [f"- FAILED: {text}" for text in result["wrong"]]
    lines += missing_lines(m for m in result["missing"] if m["peer"] != "whole model")
    if result["left_out"]:
        lines.append(f"- No time for {len(result['left_out'])} steps: " + "; ".join(result["left_out"]))
    return ["## What is missing", "", *(lines or ["Nothing: every step of this run was done."])]


def everything(result: Result) -> list[str]:
    """All medians, with the 20th and 80th percentile."""
    samples = samples_of(result)
    peers = list(dict.fromkeys(s.peer for s in samples))
    rows = []
    for row in comparisons(samples):
        first = row.any
        cells = [
            first.map,
            first.layout,
            first.direction,
            setting_text(first.setting),
            first.cache,
            first.launch,
        ]
        for peer in peers:
            one = row.peers.get(peer)
            cells.append(
                f"{number(one.p50_ms)} ({number(one.p20_ms)}–{number(one.p80_ms)})" if one else NOTHING
            )
        rows.append(cells)
    titles = ["map", "layout", "direction", "block", "cache", "launched by", *(f"{p}, ms" for p in peers)]
    lines = [
        "## Every case",
        "",
        "<details><summary>Medians, with the 20th and 80th percentile</summary>",
        "",
    ]
    return [*lines, *table(titles, rows, 6), "", "</details>"]


def page(result: Result, pictures: dict[str, str], measured: Sequence[Result] = ()) -> str:
    """From the result alone; `pictures` are file names, `measured` the results of other devices, for their names."""
    sections = [
        [f"# gc_cuda on {result['device']['name']}", "", *head(result)],
        summary(result, pictures),
        others(pictures),
        launches(result, pictures),
        graphs(result),
        kernel_table(result),
        traffic(result),
        memory(result, pictures),
        whole_models(result, pictures),
        published(result, measured),
        method.section(result),
        gaps(result),
        everything(result),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"
