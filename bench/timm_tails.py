"""Which of timm's models end residual blocks as gc_cuda.bn_context_add_relu does, and what that keeps.

Every registered model is built on the meta device. Those with a block that accelerate knows compute one image
there, with all functions of PyTorch recorded: a tail is batch norm -> block -> addition -> ReLU. accelerate
then says which of them it serves. For one model of each kind of residual block follows what autograd keeps.

    python bench/timm_tails.py [--only REGNETY*] > bench/results/timm-tails.md
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

import timm
import torch
from architectures import quiet
from kept import kept_by
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import gc_cuda
from gc_cuda.models import kinds

ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")
TAIL = "batch_norm -> block -> addition -> relu"


class Event(NamedTuple):
    name: str  # of a function
    takes: tuple[int, ...]  # tensors, by their ids
    gives: int


class Recorder(TorchFunctionMode):
    """The functions of one forward pass, in order. It keeps every tensor, so that no id comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.tensors: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            takes = tuple(id(one) for one in args if isinstance(one, Tensor))
            self.tensors.append((args, out))
            self.events.append(Event(func.__name__, takes, id(out)))
        return out


class Use(NamedTuple):
    """A call of a block: its tensors, and the events before its end and its beginning."""

    takes: int
    gives: int
    begin: int
    end: int


def uses_of(model: nn.Module, x: Tensor) -> tuple[Recorder, dict[str, Use]]:
    """The calls of the blocks that are known, by their names."""
    recorder, begins, uses = Recorder(), {}, {}

    def before(name: str) -> Callable[..., None]:
        return lambda *_: begins.update({name: len(recorder.events)})

    def after(name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: Any, out: Any) -> None:
            uses[name] = Use(id(inputs[0]), id(out), begins[name], len(recorder.events))

        return note

    for name, module in model.named_modules():
        if kinds.find(module, kinds.OTHERS) is not None:
            module.register_forward_pre_hook(before(name))
            module.register_forward_hook(after(name))
    with torch.no_grad(), recorder:
        model(x)
    return recorder, uses


def pattern(recorder: Recorder, use: Use) -> str:
    """What stands before the block, and the two functions that follow it."""
    last = next((e for e in reversed(recorder.events[: use.begin]) if e.gives == use.takes), None)
    parts = [last.name if last else "input", "block"]
    current, start = use.gives, use.end
    for _ in range(2):
        rest = enumerate(recorder.events[start:], start + 1)
        start, following = next(((i, e) for i, e in rest if current in e.takes), (start, None))
        if following is None:
            break
        parts.append("addition" if following.name in ADDITIONS else following.name.strip("_"))
        current = following.gives
    words = " -> ".join(parts)
    return words if words == TAIL else " -> ".join(parts[: 3 if parts[0] == "batch_norm" else 2])


class Found(NamedTuple):
    patterns: Counter[str]
    served: int
    reasons: Counter[str]


def look_at(name: str) -> Found | None:
    """None for a model without a block that is known."""
    model = timm.create_model(name).eval()
    if not any(kinds.find(module, kinds.OTHERS) is not None for module in model.modules()):
        return None
    report = gc_cuda.accelerate(model)
    gc_cuda.restore(model)
    recorder, uses = uses_of(model, torch.empty(1, *model.default_cfg["input_size"]))
    patterns = Counter(pattern(recorder, use) for use in uses.values())
    return Found(patterns, len(report.tails), Counter(report.tails_left_alone.values()))


def sweep(names: list[str]) -> Iterator[str]:
    """The lines of the result file."""
    families: dict[str, list[Found]] = defaultdict(list)
    without: Counter[str] = Counter()
    unserved: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for name in names:
        family = timm.models._registry._model_to_module[name]
        try:
            with quiet(), torch.device("meta"):
                found = look_at(name)
        except Exception as error:  # whatever a model cannot do without numbers
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        if found is None:
            without[family] += 1
        else:
            families[family].append(found)
            if found.served < found.patterns[TAIL]:
                unserved[name] = found.patterns[TAIL] - found.served
        print(f"{name}: {found}", file=sys.stderr)
    yield "| family | models | blocks | tails | one operation | left alone | around the other blocks |"
    yield "|---|--:|--:|--:|--:|---|---|"
    for family, all_found in sorted(families.items()):
        patterns, reasons = Counter[str](), Counter[str]()
        for found in all_found:
            patterns += found.patterns
            reasons += found.reasons
        row = (
            f"{len(all_found)} of {len(all_found) + without[family]}",
            patterns.total(),
            patterns[TAIL],
            sum(found.served for found in all_found),
            "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common()),
            "; ".join(f"{count}: {words}" for words, count in patterns.most_common() if words != TAIL),
        )
        yield f"| {family} | {' | '.join(map(str, row))} |"
    yield ""
    if unserved:
        yield f"Tails that are not served: {', '.join(f'{n} of {name}' for name, n in unserved.items())}."
        yield ""
    rest = sorted(set(without) - set(families))
    yield f"Without such a block: {sum(without[one] for one in rest)} models of {', '.join(rest)}."
    if failed:
        yield ""
        yield "Not on the meta device:"
        yield ""
        yield from (f"- {name}: {reason}" for name, reason in failed.items())


# A model for each kind of residual block that is served, and whether GCNet's blocks are inserted.
KEPT = {
    "seresnet18": False,
    "seresnet50": False,
    "seresnext50_32x4d": False,
    "seresnet152d": False,
    "resnetrs50": False,
    "senet154": False,
    "legacy_seresnet50": False,
    "legacy_seresnext50_32x4d": False,
    "tresnet_m": False,
    "resnet50": True,
    "resnext50_32x4d": True,
}
IMAGES, MEGABYTE = 32, 10**6


def kept_bytes() -> Iterator[str]:
    """What a forward pass in training keeps: in eager PyTorch, with fused blocks, and with tails."""
    yield "| model | pixels | tails | eager | blocks fused | tails too | of eager |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for name, inserts in KEPT.items():
        with quiet(), torch.device("meta"):
            eager = timm.create_model(name).train()
            size = eager.default_cfg["input_size"]
            x = torch.empty(IMAGES, *size)
        if inserts:
            gc_cuda.insert(eager)
        blocks, tails = copy.deepcopy(eager), copy.deepcopy(eager)
        gc_cuda.accelerate(blocks, tails=False)
        count = len(gc_cuda.accelerate(tails).tails)
        if inserts:  # gc_cuda's blocks are fused by themselves: eager is the definition
            for module in eager.modules():
                if isinstance(module, gc_cuda.ContextBlock):
                    module.forward = functools.partial(gc_cuda.reference.ContextBlock.forward, module)
        of_eager, *rest = (kept_by(model, x) / MEGABYTE for model in (eager, blocks, tails))
        shown = " | ".join(f"{one:.0f}" for one in (of_eager, *rest))
        title = f"{name}, GCNet's blocks inserted" if inserts else name
        yield f"| {title} | {size[1]}×{size[2]} | {count} | {shown} | {rest[-1] / of_eager:.2f} |"


HEAD = """# Tails in timm's models

By `python bench/timm_tails.py`, with timm {timm} and torch {torch}: every registered model, as it is made
without further options. *Blocks* are those that `accelerate` knows; a *tail* is batch norm, block, addition,
ReLU, as the recorded functions say; *one operation* counts the tails that `accelerate` serves as one.
"""
KEPT_HEAD = """
## Kept for the backward pass

MB (10⁶ bytes) that autograd holds on to in training, parameters and buffers not counted: {images} images of
the model's own size, float32, on meta tensors.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="models by a pattern")
    names = [name for name in timm.list_models() if fnmatch(name, parser.parse_args().only)]
    print(HEAD.format(timm=timm.__version__, torch=torch.__version__))
    for line in sweep(names):
        print(line, flush=True)
    print(KEPT_HEAD.format(images=IMAGES))
    for line in kept_bytes():
        print(line, flush=True)


if __name__ == "__main__":
    main()
