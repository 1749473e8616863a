"""The figures in README.md: tables and a picture between two comments, made from a result file alone.

    <!-- figures: bench/results/DEVICE.json -->
    …
    <!-- end figures -->

`python bench/report.py --readme bench/results/DEVICE.json` writes what is between them;
tests/test_readme_figures.py makes it again and compares. A section of "none" is empty and waits for its first
result.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from cases import FORWARD, TRAINING
from markdown_text import table
from page import SUMMARY, main_cache, summary_rows
from samples import headline, samples_of, setting_text

SECTION = re.compile(r"<!-- figures: (?P<path>\S+) -->\n(?P<body>.*?)<!-- end figures -->", re.DOTALL)
NONE = "none"


def figures(result: dict[str, Any], path: str) -> str:
    """What stands between the comments; `path` is that of the result, from the README."""
    device, versions = result["device"], result["versions"]
    found = headline(samples_of(result))
    cache = main_cache(found)
    stem = path.removesuffix(".json")
    lines = [
        "",
        f"One block on {device['name']} ({setting_text(found[0].setting)}; torch {versions['torch']}, "
        f"{result['date'][:10]}, commit {versions['commit'] or 'unknown'}), medians, {cache} cache. The limit is a copy "
        "of as many "
        f"bytes as the block must move, in the same run ([all of it, and how it was measured]({stem}.md)):",
    ]
    for direction in (FORWARD, TRAINING):
        rows = summary_rows(found, direction, cache)
        if rows:
            titles = (f"{direction}: {SUMMARY[0]}", *SUMMARY[1:])
            lines += ["", *table(titles, rows, 2)]
    lines += ["", f"![Time of the block over the size of the feature map]({stem}-times-{cache}.png)", "", ""]
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
