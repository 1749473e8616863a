"""What whole models cost in processor time with the C library's own way with memory: eager and accelerated.

By default glibc gives large blocks back to the system when a tensor dies, and the next tensor's pages have
to be found and cleared again: system time, which a benchmark of one block on memory that stays does not
see. Here the plain and the accelerated model run in processes of their own, in turn; each reports user and
system time of its calls, and of the blocks in each stage (forward pass only). The models are a backbone of
mmdetection, one image of 800x1344, forward; and timm's seresnet50, a training step, 224x224, batch 8. One
thread.

    python bench/pages.py --output FOLDER                  15 pairs of mmdetection's backbone
    python bench/pages.py --output FOLDER --model seresnet50
    python bench/pages.py --output FOLDER --keep           the same after gc_cuda.keep_pages()

Writes DEVICE-pages-MODEL.json (DEVICE-pages-MODEL-kept.json with --keep) and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import commit, slug
from tables import cpu_name

import gc_cuda

PLAIN, FUSED = "eager", "accelerated"
BLOCKS = ("ContextBlock", "SEModule")


def backbone() -> tuple[torch.nn.Module, Callable[[torch.nn.Module], None]]:
    """A ResNet-50 with a block in every bottleneck of c3 to c5, from mmdetection's own config."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "integrations"))
    import openmmlab_worker

    sys.meta_path.insert(0, openmmlab_worker.OperatorsFinder())  # stands in for the full mmcv's operators
    import mmdet.models.backbones  # noqa: F401  registers them
    from mmdet.registry import MODELS

    configs = openmmlab_worker.published_backbones()
    name = min(name for name in configs if "r50" in name and "r16" in name)
    model = openmmlab_worker.randomised(MODELS.build(configs[name]))
    model.train(False)
    x = torch.randn(1, 3, 800, 1344)

    def forward(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model(x)

    return model, forward


def seresnet50() -> tuple[torch.nn.Module, Callable[[torch.nn.Module], None]]:
    import timm

    x = torch.randn(8, 3, 224, 224)

    def training_step(model: torch.nn.Module) -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return timm.create_model("seresnet50").train(), training_step


MODELS = {"backbone": backbone, "seresnet50": seresnet50}


def record_blocks(model: torch.nn.Module) -> dict[str, list[float]]:
    """Fills in, from now on, the milliseconds of processor time of every block, by stage."""
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if not type(module).__name__.endswith(BLOCKS):
            continue
        times = found.setdefault(name.split(".")[0], [])
        # One block runs at a time: what it starts with is negative until it ends.
        module.register_forward_pre_hook(lambda *_, t=times: t.append(-1e3 * time.process_time()))
        module.register_forward_hook(lambda *_, t=times: t.append(t.pop() + 1e3 * time.process_time()))
    return found


def work(model_name: str, variant: str, calls: int, keep: bool) -> dict[str, Any]:
    """What one process measures."""
    torch.set_num_threads(1)
    if keep and not gc_cuda.keep_pages():
        sys.exit("pages cannot be kept here")
    torch.manual_seed(0)
    model, call = MODELS[model_name]()
    if variant == FUSED:
        report = gc_cuda.accelerate(model)
        assert len(report.accelerated) >= 10, report
    blocks = record_blocks(model)
    call(model)
    for times in blocks.values():
        times.clear()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(calls):
        call(model)
    after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return {
        "cpu_ms": 1e3 * (user + system) / calls,
        "system_ms": 1e3 * system / calls,
        "faults": (after.ru_minflt - before.ru_minflt) / calls,
        "blocks_ms": blocks,
    }


def pairs(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Both variants in turn, the first of a pair alternating."""
    results: dict[str, list[dict[str, Any]]] = {PLAIN: [], FUSED: []}
    for number in range(options.pairs):
        for variant in (PLAIN, FUSED)[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, __file__, "--model", options.model, "--calls", str(options.calls)]
            command += ["--worker", variant, *(["--keep"] if options.keep else [])]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[variant].append(json.loads(done.stdout.splitlines()[-1]))
        if sys.stderr.isatty():
            print(f"pair {number + 1} of {options.pairs}", file=sys.stderr)
    return results


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the processes; of the blocks, over all their calls."""
    plain, fused = results[PLAIN], results[FUSED]
    ratios = sorted(ours["cpu_ms"] / theirs["cpu_ms"] for ours, theirs in zip(fused, plain))
    lines = ["| a call, in milliseconds | eager | accelerated |", "|---|---|---|"]
    for key, name in (
        ("cpu_ms", "user and system time"),
        ("system_ms", "of it system time"),
        ("faults", "number of page faults"),
    ):
        medians = [statistics.median(run[key] for run in results[variant]) for variant in (PLAIN, FUSED)]
        lines.append(f"| {name} | {medians[0]:,.0f} | {medians[1]:,.0f} |")
    for stage in plain[0]["blocks_ms"]:
        cells = []
        for variant in (PLAIN, FUSED):
            times = sorted(ms for run in results[variant] for ms in run["blocks_ms"][stage])
            high = times[int(0.9 * len(times))]
            cells.append(
                f"{statistics.median(times):.1f} (mean {statistics.mean(times):.1f}, "
                f"9 of 10 below {high:.1f}, largest {times[-1]:.1f})"
            )
        lines.append(f"| a block in {stage}, forward | {cells[0]} | {cells[1]} |")
    lines.append("")
    lines.append(
        f"User and system time, accelerated / eager, {len(ratios)} pairs: "
        f"median {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for the result file")
    parser.add_argument("--model", choices=MODELS, default="backbone")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--calls", type=int, default=2, help="timed calls of a process, after one more")
    parser.add_argument("--keep", action="store_true", help="after gc_cuda.keep_pages()")
    parser.add_argument("--worker", choices=(PLAIN, FUSED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.model, options.worker, options.calls, options.keep)))
        return
    results = pairs(options)
    print(table(results))
    if options.output:
        device = cpu_name()
        name = f"{slug(device)}-pages-{options.model}{'-kept' if options.keep else ''}.json"
        about = {
            "device": device,
            "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
            "torch": torch.__version__,
            "gc_cuda": gc_cuda.__version__,
            "commit": commit(),
            "calls": options.calls,
        }
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / name).write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
