"""The Markdown page of a result, from the result alone and the names of what else was measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import method
import published
from cases import FORWARD, TRAINING
from formulas import PASSES
from kernels import Row as KernelRow
from markdown_text import NOTHING, number, percent, table, times
from models import BARE, BLOCK, FUSED, ORDER, PLAIN
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
    with_host,
)

Result = dict[str, Any]
PEERS = (OURS, EAGER, COMPILED, LIMIT)


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


def host_titles(peers: Iterable[str]) -> list[str]:
    return [f"{peer}, host µs" for peer in peers]


def host_cells(row: Comparison, peers: Iterable[str]) -> list[str]:
    return [number(row.host_us(peer)) for peer in peers]


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
    hosts = (OURS, EAGER, COMPILED) if with_host(found) else ()
    if hosts:
        lines += ["", method.HOST]
    for direction in (FORWARD, TRAINING):
        of = comparisons(found, direction=direction, cache=cache, launch=STREAM)
        rows = [
            [*cells, *host_cells(row, hosts)] for row, cells in zip(of, summary_rows(found, direction, cache))
        ]
        if rows:
            lines += ["", f"### {direction}", "", *table([*SUMMARY, *host_titles(hosts)], rows, 2)]
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


GRAPH_GAINS = ("graphs: faster than eager", "than torch.compile", "of the limit")


def plain_and_graph(samples: list[Sample]) -> list[tuple[Comparison, Comparison]]:
    """Of each case that was launched in both ways."""
    plain = {(row.any.case, row.any.cache): row for row in comparisons(samples, launch=STREAM)}
    graphs = comparisons(samples, launch=GRAPH)
    return [(plain.get((row.any.case, row.any.cache), Comparison({})), row) for row in graphs]


def graph_rows(samples: list[Sample]) -> list[tuple[Sample, list[str]]]:
    """For each case: milliseconds of plain stream and CUDA graph for all peers, and what the graphs gain."""
    rows = []
    for plain, graph in plain_and_graph(samples):
        cells = [f"{number(plain.ms(p))} → {number(graph.ms(p))}" for p in (OURS, EAGER, COMPILED)]
        gains = [times(graph.faster(EAGER)), times(graph.faster(COMPILED)), percent(graph.share(OURS))]
        rows.append((graph.any, [*cells, *gains]))
    return rows


def graphs(result: Result) -> list[str]:
    """Plain stream and CUDA graph side by side, for all peers."""
    samples = samples_of(result)
    samples = [s for s in samples if s.setting == samples[0].setting]  # the others are among "every case"
    hosts = (OURS, EAGER, COMPILED) if with_host(samples) else ()
    rows = [
        [of.map, of.layout, of.direction, setting_text(of.setting), of.cache, *cells]
        + [f"{number(plain.host_us(p))} → {number(graph.host_us(p))}" for p in hosts]
        for (of, cells), (plain, graph) in zip(graph_rows(samples), plain_and_graph(samples))
    ]
    lines = ["## Plain stream and CUDA graph", ""]
    if not rows:
        return [*lines, "Not measured: this run was on a CPU." if is_cpu(result) else "Not measured."]
    titles = ["map", "layout", "direction", "block", "cache", *(f"{p}, ms" for p in (OURS, EAGER, COMPILED))]
    titles += [*GRAPH_GAINS, *host_titles(hosts)]
    lines += [method.GRAPHS, ""]
    refused = [m for m in result["missing"] if "CUDA graph" in m["reason"]]
    lines += table(titles, rows, 5)
    return [*lines, "", *missing_lines(refused)] if refused else lines


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
        why = remark or ("this run was on a CPU" if is_cpu(result) else "there was no time for it")
        lines += ["", f"Launches were not measured: {why}."]
    return lines + picture(pictures, "passes", "Passes and launches of eager, Inductor and gc_cuda")


def kernel_table(result: Result) -> list[str]:
    lines = ["## Kernel by kernel", ""]
    if not result["kernels"]:
        return [*lines, "Not measured: this run was on a CPU." if is_cpu(result) else "Not measured."]
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
            "this run was on a CPU" if is_cpu(result) else "there was no time for it, or it was not asked for"
        )
        return [*lines, f"Not measured: {result['remarks'].get('traffic', why)}."]
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
        if r["blocks_only"] and r["variant"] == BARE:
            continue  # nothing is nothing
        what = f"{r['model']}{', its blocks alone' * r['blocks_only']}"
        peak = number(r["peak_bytes"] / 2**20, 4) if r["peak_bytes"] is not None else NOTHING
        names = {PLAIN: "eager blocks", BLOCK: "gc_cuda, blocks only", FUSED: "gc_cuda", BARE: "no blocks"}
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
    order = [variant for variant in ORDER if any(variant in variants for variants in found.values())]
    for (model, direction), variants in found.items():
        ms = {variant: row["p50_ms"] for variant, row in variants.items()}
        cells = [number(ms.get(variant)) for variant in order]
        faster = times(ms[PLAIN] / ms[FUSED]) if {PLAIN, FUSED} <= set(ms) else NOTHING
        rows.append([model, str(variants[PLAIN]["blocks"]), direction, *cells, faster])
    if rows:
        first = result["models"][0]
        lines += [
            f"Batch {first['batch']}, {first['size']}×{first['size']}, {first['layout']}, float32. "
            f"{method.MODELS}",
            "",
        ]
        titles = [
            "model",
            "blocks",
            "direction",
            *(f"{variant}, ms" for variant in order),
            "faster",
        ]
        lines += table(titles, rows, 3) + picture(
            pictures, "models", "Whole models before and after accelerate"
        )
    absent = [m for m in result["missing"] if m["peer"] == "whole model"]
    lines += [f"- Left out: {m['case']}: {m['reason']}" for m in absent]
    return lines if rows or absent else [*lines, "Not measured."]


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
        f"- device: {device['name']}, {device['capability']}, last-level cache "
        f"{device['cache_bytes'] / 2**20:.0f} MiB, "
        f"memory {device['memory_bytes'] / 2**30:.0f} GiB",
        f"- clocks at the start: {clocks or 'not readable'}",
        f"- versions: gc_cuda {versions['gc_cuda']} (commit {versions['commit'] or 'unknown'}), {software}, "
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
    hosts = peers if with_host(samples) else []
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
        rows.append(cells + host_cells(row, hosts))
    titles = ["map", "layout", "direction", "block", "cache", "launched by", *(f"{p}, ms" for p in peers)]
    titles += host_titles(hosts)
    lines = [
        "## Every case",
        "",
        "<details><summary>Medians, with the 20th and 80th percentile</summary>",
        "",
    ]
    return [*lines, *table(titles, rows, 6), "", "</details>"]


def page(result: Result, pictures: dict[str, str], measured: Sequence[Result] = ()) -> str:
    """`pictures` are file names; `measured` are results of other devices, for their names alone."""
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
        published.section(result, measured, main_cache(samples_of(result))),
        method.section(result),
        gaps(result),
        everything(result),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"
