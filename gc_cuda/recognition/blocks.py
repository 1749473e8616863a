"""Modules are judged: for those that are a pooling, something small and a broadcast, there is a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gc_cuda.blocks import _fused
from gc_cuda.blocks._parts import Look, Unserved
from gc_cuda.models import kinds, swap
from gc_cuda.ops.contexts import is_foreign, plain_pytorch_wanted
from gc_cuda.recognition import proof, sight, source, structure, tracing
from gc_cuda.recognition.candidates import channels_of, is_candidate, may_average
from gc_cuda.recognition.example import channels_given
from gc_cuda.recognition.formula import formula_of
from gc_cuda.recognition.plan import Around, AroundRecipe, FusedPlan, FusedRecipe, plan_of

# The first torch with which this was run; with an older one only classes known by name are served.
OLDEST_TORCH = (2, 13)

# Channels of a map for blocks that take any number.
_SOME_CHANNELS = 12


class Verdict(NamedTuple):
    """What is known of the modules of a structure."""

    plan: FusedPlan | Around | None
    reason: str = ""  # why there is no plan
    attends: bool = False  # whether it is an attention block, served or not


_verdicts: dict[Any, Verdict] = {}  # by the signature of a structure
_attends: dict[Any, bool] = {}  # by the outline: whether modules of other sizes were attention blocks
_left: dict[Any, list[Verdict]] = {}  # by the outline: of those whose graph was no formula
_ENOUGH = 2  # of these, after which others of the outline are left alone untraced
_judged: set[type] = set()  # classes that were looked at in this process


def available() -> bool:
    """Whether this torch can trace as it is needed here."""
    version = torch.__version__.split("+")[0].split(".")
    return (int(version[0]), int(version[1])) >= OLDEST_TORCH


def judge(block: nn.Module, channels: int | None = None) -> Verdict:
    """What the block computes: at most one trace for each structure and mode.

    channels: those of its input, where its weights do not tell.
    """
    if torch._C._len_torch_dispatch_stack() > 0:  # it would see the trace, and perhaps make no numbers
        return Verdict(None, "within a TorchDispatchMode nothing is traced")
    _judged.add(swap.innermost(type(block)))
    outline = tuple(_outline(block))
    if not _attends.get(outline, True):
        return Verdict(None)
    with tracing.undisturbed():
        verdict = _judge(block, channels, outline)
    if verdict.plan is None:
        _attends[outline] = verdict.attends
    return verdict


def in_model(model: nn.Module, example: Any) -> dict[str, Verdict]:
    """The verdicts of the attention blocks in the model that are of no class known by name.

    Of blocks within blocks it has the outermost that can be served, else the innermost.
    """
    candidates = {name: module for name, module in model.named_modules() if _is_unknown(module)}
    given = {} if example is None else channels_given(model, example, candidates.values())
    found: dict[str, Verdict] = {}
    for name, module in candidates.items():
        if any(_is_within(name, outer) and verdict.plan is not None for outer, verdict in found.items()):
            continue
        verdict = judge(module, given.get(module))
        if verdict.attends:
            found[name] = verdict
    return {
        name: verdict
        for name, verdict in found.items()
        if verdict.plan is not None or not any(_is_within(inner, name) for inner in found)
    }


def _is_unknown(module: nn.Module) -> bool:
    """Whether it may be a block, and neither is nor has one that is known by name."""
    if kinds.full_name(swap.innermost(type(module))).startswith("gc_cuda.") or not is_candidate(module):
        return False
    return all(kinds.find(part, kinds.BLOCKS) is None for part in module.modules())


def _is_within(name: str, outer: str) -> bool:
    return name != outer and (outer == "" or name.startswith(f"{outer}."))


def run(block: Any, own_forward: Any, x: Any) -> Any:
    """The forward of an accelerated block that was recognized."""
    if torch.compiler.is_compiling() or plain_pytorch_wanted() or is_foreign(x):
        return own_forward(block, x)
    if isinstance(x, Tensor):
        plan = _fused.policy_known_of(block)
        if isinstance(plan, Around) and not plan.gains(x):  # the own forward is right in any case
            return own_forward(block, x)
    return _fused.run(block, read, own_forward, x)


def read(look: Look, block: Any) -> FusedRecipe | AroundRecipe:
    """The reader of such a block; raises Unserved where it is not, or no longer, what was recognized."""
    signature = structure.read(look, block)
    verdict = _verdicts.get(signature)
    if verdict is None and swap.innermost(type(block)) not in _judged:  # it comes from a pickle
        judge(block)
        verdict = _verdicts.get(signature)
    if verdict is None or verdict.plan is None:
        raise Unserved("it has changed since it was recognized" if verdict is None else verdict.reason)
    return verdict.plan.recipe(block)


def _judge(block: nn.Module, channels: int | None, outline: Any) -> Verdict:
    signatures: dict[bool, Any] = {}
    unsound = ""
    try:
        signatures = {mode: structure.read(Look(), block, mode) for mode in (True, False)}
    except source.Unsafe as unsafe:
        return Verdict(None, str(unsafe), True)
    except Unserved as unserved:
        unsound = str(unserved)
    known = [_verdicts[one] for one in signatures.values() if one in _verdicts]
    if len(known) == 2:
        return next((one for one in known if one.plan is None), known[0])
    if unsound and outline in _attends:
        return Verdict(None, unsound, True)
    if channels is None and len(_left.get(outline, ())) == _ENOUGH:
        return _left[outline][-1]
    by_weights = channels_of(block)
    guesses = [channels] if channels else by_weights or [_SOME_CHANNELS]
    guesses = tracing.may_give_maps(block, guesses)
    width, twin = None, block
    if guesses:
        try:
            twin = tracing.copy_of(block).eval()
        except Unserved as unserved:
            return Verdict(None, str(unserved))
        width = next((c for c in guesses if tracing.shape_of(twin, c) == torch.Size(tracing.sizes(c))), None)
    if width is None:
        if channels is None and not by_weights and may_average(block):
            return Verdict(
                None, "its weights do not tell its channels: pass accelerate(model, example=…)", True
            )
        return Verdict(None)
    is_any = channels is None and not by_weights
    verdicts: list[Verdict] = []
    for mode in (True, False):
        verdicts.append(_of_mode(twin.train(mode), width, is_any, unsound))
        if verdicts[-1].plan is None:  # what is not served in one mode is served in none
            verdicts = [verdicts[-1]] * 2
            break
    _verdicts.update(zip(signatures.values(), verdicts))
    if verdicts[0].plan is None and not unsound:
        _left.setdefault(outline, []).append(verdicts[0])
    return verdicts[0]


def _of_mode(twin: Any, channels: int, is_any: bool, unsound: str) -> Verdict:
    """The verdict on a copy in the mode in which it is; is_any: perhaps it takes any number of channels."""
    attends = True  # as far as is known: it may pool, and gives a map like its input
    try:
        traced = tracing.trace(twin, channels, of_any_channels=is_any)
        attends = sight.is_attention(traced.graph)
        formula = formula_of(traced)
        if traced.complaint:
            raise Unserved(traced.complaint)
        plan = plan_of(traced, formula, twin)
        if not unsound:
            proof.demand(plan, twin, channels)
            return Verdict(plan, "", True)
    except Unserved as unserved:
        return Verdict(None, unsound or str(unserved), attends)
    return Verdict(None, unsound, attends)


def _outline(block: nn.Module) -> Iterator[Any]:
    """What a module has in common with those of other sizes."""
    for path, part in block.named_modules():
        yield path, swap.innermost(type(part)), part.training
        for name, tensor in part._parameters.items():
            yield name, None if tensor is None else tensor.dim()
        for name, value in vars(part).items():
            if name[0] != "_" and isinstance(value, (str, bool, type(None))):
                yield name, value
