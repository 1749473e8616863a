"""The figures in README.md: tables and a picture between two comments, made from a result file alone.

    <!-- figures: bench/results/DEVICE.json -->
    …
    <!-- end figures -->

`python bench/report.py --readme bench/results/DEVICE.json` writes what is between them;
tests/bench/test_readme_figures.py makes it again and compares. A section of "none" is empty and waits for its
first result.
"""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path
from typing import Any

from cases import DIRECTIONS, IMAGENET
from markdown_text import table
from page import GRAPH_GAINS, SUMMARY, graph_rows, main_cache, summary_rows
from peers import COMPILED, EAGER, OURS
from samples import headline, samples_of, setting_text

SECTION = re.compile(r"<!-- figures: (?P<path>\S+) -->\n(?P<body>.*?)<!-- end figures -->", re.DOTALL)
NONE = "none"
WIDTH = 120


def figures(result: dict[str, Any], path: str) -> str:
    """What stands between the comments; `path` is that of the result, from the README."""
    device, versions = result["device"], result["versions"]
    samples = headline(samples_of(result))
    cache = main_cache(samples)
    of_detectors = [s for s in samples if s.stage not in IMAGENET]  # the first screen is short
    shown = of_detectors or samples
    on_graphs = graph_rows([s for s in shown if s.cache == cache])
    if on_graphs:
        titles = ["direction", "map", "layout", *(f"{p}, ms" for p in (OURS, EAGER, COMPILED)), *GRAPH_GAINS]
        rows = [[of.direction, of.map, of.layout, *cells] for of, cells in on_graphs]
        launched = (
            " Milliseconds of calls on the plain stream → replayed as a CUDA graph: the difference is what "
            "Python and launching cost on this host."
        )
    else:
        titles, launched = ["direction", *SUMMARY], ""
        rows = [[d, *row] for d in DIRECTIONS for row in summary_rows(shown, d, cache)]
    stem = path.removesuffix(".json")
    memory = "" if device["kind"] == "cuda" else f", {result['allocator']}"
    setting = f"{setting_text(samples[0].setting)}; torch {versions['torch']}"
    said = (
        f"One block on {device['name']} ({setting}, {result['date'][:10]}, commit "
        f"{versions['commit'] or 'unknown'}), medians, {cache} cache{memory}. The limit is a copy of as many "
        f"bytes as the block must move, in the same run.{launched} [All of it, and how it was measured]"
        f"({stem}.md):"
    )
    lines = [
        "",
        textwrap.fill(said, WIDTH, break_long_words=False, break_on_hyphens=False),
        "",
        *table(titles, rows, 3),
        "",
        f"![Time of the block over the size of the feature map]({stem}-times-{cache}.png)",
        "",
        "",
    ]
    return "\n".join(lines)


def section(result: dict[str, Any], path: str) -> str:
    """With its comments."""
    return f"<!-- figures: {path} -->\n{figures(result, path)}<!-- end figures -->"


def replaced(text: str, result: dict[str, Any], path: str) -> str:
    """The README with the section of this result renewed; else the first that waits, else the only one.

    Raises:
        ValueError: where it is not clear which section is meant.
    """
    sections = list(SECTION.finditer(text))
    chosen = [s for s in sections if s["path"] == path] or [s for s in sections if s["path"] == NONE][:1]
    chosen = chosen or (sections if len(sections) == 1 else [])
    if len(chosen) != 1:
        raise ValueError(f"the README has no section for {path}, none that waits, and {len(sections)} others")
    return text[: chosen[0].start()] + section(result, path) + text[chosen[0].end() :]


def update(readme: Path, result: dict[str, Any], source: Path) -> None:
    path = Path(os.path.relpath(source.resolve(), readme.resolve().parent)).as_posix()
    readme.write_text(replaced(readme.read_text(), result, path))
