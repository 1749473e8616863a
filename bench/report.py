"""The evidence about the block on the device at hand: one command, a result file, a page with pictures.

    python bench/report.py [--quick]     measures; DEVICE.json, DEVICE.md and DEVICE-*.png go to --output
    python bench/report.py --shape 2,512,100,168 --dtype float16     one case of your own: the table alone
    python bench/report.py --compare a.json b.json                   what became slower; 1 if ours did
    python bench/report.py --render a.json                           page and pictures again from their data
    python bench/report.py --readme a.json                           README.md's figures from that result

How it measures is said on the page (bench/method.py); what it measures, in bench/suite.py.
"""

from __future__ import annotations

import argparse
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import charts
import compare
import environment
import markdown_text
import page
import readme
import samples
import suite
import torch
from cases import DIRECTIONS, DTYPES, FUSIONS, LAYOUTS, grid
from latency import reuse_pages
from peers import COMPILED, EAGER, OURS

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
QUICK_LIMIT, FULL_LIMIT = 105.0, {"cuda": 480.0, "cpu": 1200.0}  # seconds
# Of timing for each series: seconds, rounds
EFFORT = {
    ("cpu", True): (0.3, 5),
    ("cuda", True): (0.1, 15),
    ("cpu", False): (1.0, 15),
    ("cuda", False): (0.2, 20),
}


def shape_of(text: str) -> tuple[int, ...]:
    """N,C,H,W (or with x between them)."""
    sizes = tuple(int(part) for part in text.replace("x", ",").split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(text)
    return sizes


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under two minutes: c3, c4 and c5, one model")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="(bench/results)")
    parser.add_argument(
        "--limit",
        type=float,
        help="seconds for the whole run; what does not fit is named on the page "
        f"({QUICK_LIMIT:.0f} with --quick, else {FULL_LIMIT['cuda']:.0f} on a GPU and "
        f"{FULL_LIMIT['cpu']:.0f} on a CPU)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--reuse-pages", action="store_true", help="CPU: outputs get used pages, not fresh ones"
    )
    parser.add_argument("--commit", help="of this source, where git cannot say it or says another")
    own = parser.add_argument_group("one case of your own: a table, no page")
    own.add_argument("--shape", type=shape_of, metavar="N,C,H,W")
    own.add_argument("--dtype", choices=DTYPES, default="float32")
    own.add_argument("--layout", choices=LAYOUTS, help="(both)")
    own.add_argument("--ratio", type=lambda text: float(Fraction(text)), default=1 / 16, help="(1/16)")
    own.add_argument("--fusion", choices=FUSIONS, default="add")
    made = parser.add_argument_group("with what has been measured").add_mutually_exclusive_group()
    made.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    made.add_argument("--render", type=Path, metavar="RESULT")
    made.add_argument("--readme", type=Path, metavar="RESULT")
    parser.add_argument(
        "--threshold",
        type=float,
        default=100 * compare.THRESHOLD,
        help="per cent slower that is a regression (10)",
    )
    return parser.parse_args(argv)


def results_in(*folders: Path) -> list[dict[str, Any]]:
    """Those of this schema, each device once, the newest."""
    paths = [path for folder in folders for path in sorted(folder.glob("*.json")) if samples.is_result(path)]
    newest: dict[str, dict[str, Any]] = {}
    for result in sorted(
        map(samples.read, dict.fromkeys(path.resolve() for path in paths)), key=lambda r: r["date"]
    ):
        newest[result["device"]["slug"]] = result
    return list(newest.values())


def render(path: Path) -> list[Path]:
    """The page and the pictures of a result, beside it."""
    result = samples.read(path)
    drawn = charts.draw(result, path.parent, path.stem)
    others = [r for r in results_in(RESULTS, path.parent) if r["device"]["slug"] != result["device"]["slug"]]
    markdown = path.with_suffix(".md")
    markdown.write_text(page.page(result, {name: file.name for name, file in drawn.items()}, others))
    return [markdown, *drawn.values()]


def settings_of(options: argparse.Namespace) -> suite.Settings:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    seconds, rounds = EFFORT[device, options.quick]
    return suite.Settings(device, seconds, rounds, not options.no_compile)


def measure(options: argparse.Namespace) -> int:
    """The suite; 1 if anything was wrong."""
    settings = settings_of(options)
    limit = options.limit or (QUICK_LIMIT if options.quick else FULL_LIMIT[settings.device])
    result = {
        "schema": samples.SCHEMA,
        "length": "quick" if options.quick else "full",
        **environment.describe(settings.device, options.reuse_pages, options.commit),
        "settings": {"seconds": settings.seconds, "rounds": settings.rounds, "limit": limit},
        **suite.empty(),
    }
    stem = result["device"]["slug"] + "-reused-pages" * options.reuse_pages
    path = options.output / f"{stem}.json"
    suite.run(suite.plan(settings, options.quick), result, limit, lambda found: samples.write(path, found))
    samples.write(path, result)
    for file in [path, *render(path)]:
        print(f"wrote {file}")
    print("\n".join(page.gaps(result)[2:]))
    return 1 if result["wrong"] else 0


def own_case(options: argparse.Namespace) -> int:
    """A table on the terminal."""
    n, *size = options.shape
    settings = settings_of(options)
    layouts = [options.layout] if options.layout else list(LAYOUTS)
    cases = grid(
        {"own": tuple(size)},
        [n],
        layouts,
        [options.dtype],
        [options.ratio],
        [options.fusion],
        list(DIRECTIONS),
    )
    result = suite.empty()
    steps = [
        suite.Step("times", case.name, lambda found, case=case: suite.time_case(case, settings, found))
        for case in cases
    ]
    suite.run(steps, result, float("inf"), lambda found: None)
    print(own_table(result))
    return 1 if result["wrong"] else 0


def own_table(result: dict[str, Any]) -> str:
    """Every cache state and way of launching; the limit is a copy of as many bytes."""
    rows = []
    found = samples.samples_of(result)
    hosts = (OURS, EAGER, COMPILED) if samples.with_host(found) else ()
    for row in samples.comparisons(found):
        first = row.any
        ms = [markdown_text.number(row.ms(peer)) for peer in (OURS, EAGER, COMPILED, samples.LIMIT)]
        faster = [markdown_text.times(row.faster(than)) for than in (EAGER, COMPILED)]
        rows.append(
            [
                first.direction,
                first.layout,
                first.cache,
                first.launch,
                *ms,
                *faster,
                markdown_text.percent(row.share(OURS)),
                *page.host_cells(row, hosts),
            ]
        )
    titles = ["direction", "layout", "cache", "launched by", *page.SUMMARY[2:], *page.host_titles(hosts)]
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in [titles, *rows]
    ]
    gaps = [*(f"WRONG {text}" for text in result["wrong"]), *page.missing_lines(result["missing"])]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *gaps])


def compared(before: Path, after: Path, threshold: float) -> int:
    """1 if ours became slower."""
    results = samples.read(before), samples.read(after)
    found = compare.changes(*results)
    print(compare.table(found, threshold))
    print("\n".join(compare.summary(*results, found, threshold)))
    return 1 if any(change.is_regression(threshold) for change in found) else 0


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        if options.compare:
            return compared(*options.compare, options.threshold / 100)
        if options.render:
            print("\n".join(f"wrote {path}" for path in render(options.render)))
            return 0
        if options.readme:
            readme.update(README, samples.read(options.readme), options.readme)
            return 0
    except (OSError, ValueError) as error:
        print(f"bench/report.py: {error}", file=sys.stderr)
        return 2
    if options.reuse_pages:
        reuse_pages()
    return own_case(options) if options.shape else measure(options)


if __name__ == "__main__":
    sys.exit(main())
