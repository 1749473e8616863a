"""The page of bench/recognized.py."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from markdown_text import number, table

# What was done with a block
FUSED, AROUND, LEFT, UNSEEN = "one operation", "around its middle", "left alone", "not in the report"
NAMED = "left alone, and no block"  # the report names it all the same
SERVED = (FUSED, AROUND)
LEAST_MILLISECONDS = 2  # a model that takes less is listed and not judged
LIMIT = 1.03

HEAD = """# Blocks in timm's and torchvision's models

By `python bench/recognized.py look`, `compare`, `time` and `page`, with timm {timm}, torchvision
{torchvision} and torch {torch}: every registered architecture, as it is made without further options. A
*block* is the innermost module that takes a map, pools all of its pixels, and multiplies or adds what is the
same for all pixels (bench/attention_blocks.py finds it by the functions that run). *Differs* has the largest
difference of the output, and of all gradients, each relative to its largest value, in float64, of the
smallest such model, with its blocks served on maps of any size. PyTorch differentiates its double hard
sigmoid with one sixth in float32, which is what 1e-8 stands for.
"""


def exponent(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def page(content: dict[str, Any]) -> Iterator[str]:
    yield HEAD.format(**content["versions"])
    models, compared = content["models"], content["compared"]
    rows: dict[tuple[str, str, str], list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for name, found in models.items():
        for blocks in found["blocks"]:
            rows[found["family"], blocks["kind"], blocks["done"]].append((name, blocks))
    lines = []
    for (family, kind, done), found in sorted(
        rows.items(), key=lambda item: (item[0][0].startswith("torchvision "), item[0])
    ):
        said = Counter[str]()
        for _, blocks in found:
            said[blocks["said"]] += blocks["count"]
        words = "; ".join(f"`{text}`" if done in SERVED else text for text, _ in said.most_common(3) if text)
        more = len(said) - 3
        names = {name for name, _ in found}
        of = compared.get(f"{family}/{kind}/{done}")
        lines.append(
            (
                *(family, kind, done, words + (f"; {more} more" if more > 0 else "")),
                *(str(len(names)), str(sum(said.values()))),
                *(_differences(of) if of else ("", "", "")),
            )
        )
    titles = ("family", "class", "what is done", "formula, or why not", "models", "blocks")
    yield from table((*titles, "compared", "differs in evaluation", "in training"), lines, left=4)
    yield ""
    yield _sentence(models)
    failed = defaultdict(list)
    for name, found in models.items():
        if found["error"]:
            failed[found["error"]].append(name)
    if failed:
        yield ""
        yield "Looked at up to where the meta device gives out:"
        yield ""
        yield from (f"- {error}: {', '.join(names)}" for error, names in failed.items())
    if content["times"]:
        yield from page_of_times(content)


def _sentence(models: dict[str, Any]) -> str:
    counts, having, whole = Counter[str](), 0, 0
    for found in models.values():
        real = [blocks for blocks in found["blocks"] if blocks["done"] != NAMED]
        having += bool(real)
        whole += bool(real) and all(blocks["done"] in SERVED for blocks in real)
        for blocks in real:
            counts[blocks["done"]] += blocks["count"]
    told = ", ".join(f"{counts[done]} {done}" for done in (FUSED, AROUND, LEFT, UNSEEN) if counts[done])
    return f"Of {len(models)} architectures {having} have blocks, {whole} have all of them served: {told}."


def _differences(of: dict[str, Any]) -> tuple[str, str, str]:
    if "error" in of:
        return of["model"], f"not compared: {of['error']}", ""
    shown = [f"{exponent(of[mode][0])}, {exponent(of[mode][1])}" for mode in ("evaluation", "training")]
    return f"{of['model']}, {of['pixels']}²", *shown


def page_of_times(content: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield "## Times"
    yield ""
    yield f"{content['versions']['cpu']}, float32: the accelerated model's time over its own, medians of"
    yield f"pairs of calls in turn. The aim is at most {LIMIT}; what takes less than {LEAST_MILLISECONDS} ms"
    yield "is not judged."
    yield ""
    rows = []
    for row in content["times"]:
        low, high = row["quartiles"]
        judged = (
            "not judged" if row["own ms"] < LEAST_MILLISECONDS else "yes" if row["ratio"] <= LIMIT else "no"
        )
        setting = f"{row['batch']} × {row['pixels']}², {row['threads']}"
        shown = number(row["own ms"]), f"{row['ratio']:.3f}", f"{low:.3f} to {high:.3f}", str(row["pairs"])
        rows.append((row["model"], row["direction"], setting, str(row["served"]), *shown, judged))
    titles = (
        "model",
        "direction",
        "images, threads",
        "blocks",
        "own ms",
        "ratio",
        "half of the pairs",
        "pairs",
    )
    yield from table((*titles, "at most"), rows, left=3)
