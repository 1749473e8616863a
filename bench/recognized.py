"""Channel attention in timm's and torchvision's models: what accelerate does with it, and if that is right.

    python bench/recognized.py look [--only 'regnety*']   every architecture, on the meta device
    python bench/recognized.py compare                    a model of each family and kind of block, in float64
    python bench/recognized.py time                       those of SAMPLE: the accelerated one's over its own
    python bench/recognized.py page > bench/results/timm-recognized.md

The first three write what they found into bench/results/timm-recognized.json; `look` and `compare` go on
where they were stopped, unless they are given --anew. Blocks are found by bench/attention_blocks.py, which
does not ask gc_cuda.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from architectures import build, family_of, names, on_meta, quiet, size_of
from attention_blocks import Finder
from recognized_page import AROUND, FUSED, LEFT, NAMED, SERVED, UNSEEN, page
from tables import cpu_name
from torch import Tensor, nn

import gc_cuda
from gc_cuda.recognition import plan

FILE = Path(__file__).parent / "results" / "timm-recognized.json"


class Blocks(NamedTuple):
    """So many blocks of a model to which the same was done."""

    kind: str  # the class
    done: str
    said: str  # the formula, or why not
    count: int


# What is done with their blocks


def done_with(report: gc_cuda.Report) -> dict[str, tuple[str, str]]:
    """What was done with each block of the report, by its name, and the formula, or why nothing was."""
    found = {}
    for entry in report.entries:
        if entry.part == "block":
            if entry.action == "left alone":
                found[entry.name] = LEFT, entry.reason
            else:
                formula = getattr(entry, "formula", "")
                found[entry.name] = AROUND if "its own" in formula else FUSED, formula
    return found


def look_at(name: str, finder: Finder) -> dict[str, Any]:
    with quiet(), on_meta():
        model = build(name)
        kinds, error = {}, ""
        try:
            kinds = finder.blocks_of(model, size_of(name, model))
        except Exception as failure:  # what a model cannot do without numbers
            error = f"{type(failure).__name__}: {str(failure).splitlines()[0][:80]}"
            kinds = finder.known_blocks_of(model)
        kinds = {path: type(block).__name__ for path, block in kinds.items()}
        done = done_with(gc_cuda.accelerate(model))
        gc_cuda.restore(model)
    for path in done.keys() - kinds.keys():
        kinds[path] = type(model.get_submodule(path)).__name__
        done[path] = NAMED if done[path][0] == LEFT else done[path][0], done[path][1]
    counts = Counter((kind, *done.get(path, (UNSEEN, ""))) for path, kind in kinds.items())
    return {
        "family": family_of(name),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "blocks": [Blocks(*key, count)._asdict() for key, count in counts.items()],
        "error": error,
    }


# Numbers


def wake(model: nn.Module) -> nn.Module:
    """No branch begins at zero."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        else:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and all gradients, from equal random numbers every time."""
    torch.manual_seed(11)
    x = x.detach().requires_grad_()
    model.zero_grad()
    out = model(x)
    out = out if isinstance(out, Tensor) else next(iter(out.values()))
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "gradient of x": x.grad, **gradients}


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """The largest of the output and of the gradients, relative to the largest value of each.

    A gradient that is zero but for roundings is measured by the largest of all.
    """
    assert list(actual) == list(expected)
    largest = {key: float(tensor.abs().max()) for key, tensor in expected.items()}
    least = 1e-3 * max(value for key, value in largest.items() if key != "output")
    errors = {key: float((actual[key] - tensor).abs().max()) for key, tensor in expected.items()}
    assert math.isfinite(sum(largest.values())), "the model's own numbers are not finite"
    of_output = errors.pop("output") / largest["output"]
    return of_output, max(error / max(largest[key], least) for key, error in errors.items())


def compare(name: str) -> dict[str, Any]:
    """The model as it is and accelerated, in float64, in evaluation and training.

    Raises:
        ValueError: if a size that it takes is not found.
    """
    found: dict[str, Any] = {"model": name}
    plan.LEAST_NCHW_BYTES = plan.LEAST_CHANNELS_LAST_BYTES = 0  # these maps are small
    with quiet():
        model = wake(build(name)).double()
        x, _ = next(taken(name, model))
        ours = build(name).double()  # not every model can be copied
        ours.load_state_dict(model.state_dict())
        found |= {"served": len(gc_cuda.accelerate(ours).accelerated), "pixels": x.shape[-1]}
        for mode, training in (("evaluation", False), ("training", True)):
            expected = step(model.train(training), x)
            found[mode] = differences(step(ours.train(training), x), expected)
        gc_cuda.restore(ours)
        ours.load_state_dict(model.state_dict())
        restored, expected = step(ours.eval(), x), step(model.eval(), x)
    found["restored"] = all(torch.equal(restored[key], one) for key, one in expected.items())
    return found


def taken(name: str, model: nn.Module) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Inputs that the model takes, small ones first, and what a step gives."""
    for size in smaller_sizes(name, model):
        x = torch.randn(2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        try:
            yield x, step(model, x)
        except (RuntimeError, AssertionError, ValueError):  # it takes other sizes
            continue
    raise ValueError("it takes no batch of images of one of the sizes")


def smaller_sizes(name: str, model: nn.Module) -> Iterator[tuple[int, ...]]:
    own = size_of(name, model)
    for pixels in (128, 192):
        if pixels < own[-1]:
            yield (*own[:-2], pixels, pixels)
    yield own


def representatives(models: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The smallest model for each family and kind of block that is served; one may stand for several."""
    smallest: dict[tuple[str, str, str], tuple[int, str]] = {}
    for name, found in models.items():
        for blocks in found["blocks"]:
            if blocks["done"] in SERVED:
                key = found["family"], blocks["kind"], blocks["done"]
                smallest[key] = min(
                    smallest.get(key, (found["parameters"], name)), (found["parameters"], name)
                )
    chosen = defaultdict(list)
    for (_, kind, done), (_, name) in sorted(smallest.items()):
        chosen[name].append((kind, done))
    return chosen


# Times

# A model of each family that has blocks which are not known by name, and some that are
SAMPLE = (
    *("rexnet_100", "ese_vovnet19b_dw", "hgnet_tiny", "rdnet_tiny", "ecaresnet26t", "gcvit_xxtiny"),
    *("cs3sedarknet_l", "seresnet18", "mobilenetv3_small_100"),
)


def paired(
    calls: tuple[Callable[[], object], Callable[[], object]], pairs: int, seconds: float
) -> dict[str, Any]:
    """Both in turn, each first every other time: the median of the ratios of neighbours."""
    times: list[list[float]] = []
    for call in calls:
        call()
        call()
    end = time.perf_counter() + seconds
    while len(times) < pairs or time.perf_counter() < end:
        pair = [0.0, 0.0]
        for which in (0, 1) if len(times) % 2 else (1, 0):
            start = time.perf_counter()
            calls[which]()
            pair[which] = 1e3 * (time.perf_counter() - start)
        times.append(pair)
    ratios = [ours / own for own, ours in times]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "own ms": statistics.median(own for own, _ in times),
        "ratio": statistics.median(ratios),
        "quartiles": [quarters[0], quarters[2]],
        "pairs": len(times),
    }


def time_of(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    with quiet():
        model = build(name)
        pixels = options.pixels or next(x.shape[-1] for x, _ in taken(name, build(name).double()))
        ours = copy.deepcopy(model)
        served = len(gc_cuda.accelerate(ours).accelerated)
    x = torch.randn(options.batch, 3, pixels, pixels)

    def inference(one: nn.Module) -> Callable[[], object]:
        return torch.no_grad()(lambda: one(x))

    def training(one: nn.Module) -> Callable[[], object]:
        def run() -> None:
            one.zero_grad()
            out = one(x)
            out = out["out"] if isinstance(out, dict) else out  # of a segmentor
            out.square().mean().backward()

        return run

    rows = []
    for direction, make in (("inference", inference), ("training step", training)):
        for one in (model, ours):
            one.train(make is training)
        row = paired((make(model), make(ours)), options.pairs, options.seconds)
        setting = {"pixels": pixels, "batch": options.batch, "threads": torch.get_num_threads()}
        rows.append({"model": name, "direction": direction, "served": served, **setting, **row})
    return rows


# The commands


def look(options: argparse.Namespace, content: dict[str, Any]) -> Iterator[str]:
    finder = Finder()
    for name in names():
        if fnmatch(name, options.only) and (options.anew or name not in content["models"]):
            content["models"][name] = look_at(name, finder)
            yield f"{name}: {content['models'][name]}"


def compare_all(options: argparse.Namespace, content: dict[str, Any]) -> Iterator[str]:
    for name, stands_for in representatives(content["models"]).items():
        keys = [f"{family_of(name)}/{kind}/{done}" for kind, done in stands_for]
        if not fnmatch(name, options.only) or (
            not options.anew and all(key in content["compared"] for key in keys)
        ):
            continue
        try:
            found = compare(name)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            found = {"model": name, "error": str(error).splitlines()[0][:80]}
        content["compared"] |= dict.fromkeys(keys, found)
        yield f"{name}: {found}"


def time_all(options: argparse.Namespace, content: dict[str, Any]) -> Iterator[str]:
    of_each_family = sorted(
        {found["model"] for found in content["compared"].values() if "error" not in found}
    )
    for name in dict.fromkeys((*SAMPLE, *of_each_family)):
        if fnmatch(name, options.only):
            rows = time_of(name, options)
            setting = {key: rows[0][key] for key in ("model", "pixels", "batch", "threads")}
            kept = [row for row in content["times"] if not setting.items() <= row.items()]
            content["times"] = kept + rows
            yield from map(str, rows)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {"look": look, "compare": compare_all, "time": time_all}
    parser.add_argument("command", choices=[*commands, "page"])
    parser.add_argument("--only", default="*", help="models by a pattern")
    parser.add_argument("--anew", action="store_true", help="look and compare: what was found before, too")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument(
        "--pixels", type=int, help="time: of the images; default: the fewest that the model takes"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15, help="at least")
    parser.add_argument("--seconds", type=float, default=3, help="for each model and direction, at least")
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    content = {"versions": {}, "models": {}, "compared": {}, "times": []}
    if options.file.exists():
        content = json.loads(options.file.read_text())
    if options.command == "page":
        print("\n".join(page(content)))
        return 0
    if options.command == "time":
        torch.set_num_threads(options.threads)
        content["versions"]["cpu"] = cpu_name()
    content["versions"] |= {one.__name__: one.__version__ for one in (timm, torchvision, torch)}
    for line in commands[options.command](options, content):
        print(line, file=sys.stderr, flush=True)
        options.file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
