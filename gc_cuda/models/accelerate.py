"""One line for an existing model: its blocks run fused, and the ends of the bottlenecks that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from gc_cuda import _extension, _values
from gc_cuda.blocks._fused import Read, recipe_of, run
from gc_cuda.blocks._parts import Unserved, left_to_the_compiler
from gc_cuda.models import kinds, middles, swap
from gc_cuda.models import tails as tail_kinds

PREFIX = "Accelerated"  # of the names of the classes that are made

ACCELERATED = "accelerated"
ALREADY = "accelerated before"
LEFT_ALONE = "left alone"

OWN_FORWARD = "its own forward"  # under torch.compile

BLOCK, TAIL, MIDDLE = "block", "tail", "middle"
_DONE = {BLOCK: "run fused", TAIL: "run fused", MIDDLE: "are computed again"}


class Entry(NamedTuple):
    """A block of the model; a tail: the end of a bottleneck; or a middle of a residual block."""

    name: str  # its path in the model; of a tail, that of the bottleneck; of a middle, of the residual block
    kind: str  # the class, by its full name
    action: str  # ACCELERATED, ALREADY or LEFT_ALONE
    reason: str  # why it was left alone
    part: str = BLOCK  # or TAIL, or MIDDLE
    compiled: str = ""  # what runs under torch.compile, if something else


class Report(NamedTuple):
    """What :func:`accelerate` found and did; it prints as a table."""

    entries: tuple[Entry, ...]

    @property
    def accelerated(self) -> list[str]:
        """The names of the blocks that run fused now."""
        return [entry.name for entry in self._all(BLOCK) if entry.action != LEFT_ALONE]

    @property
    def left_alone(self) -> dict[str, str]:
        """The names of the others, and why."""
        return {entry.name: entry.reason for entry in self._all(BLOCK) if entry.action == LEFT_ALONE}

    @property
    def tails(self) -> list[str]:
        """The names of the bottlenecks whose tail is one operation now."""
        return [entry.name for entry in self._all(TAIL) if entry.action != LEFT_ALONE]

    @property
    def tails_left_alone(self) -> dict[str, str]:
        """The names of the other bottlenecks with a block in their tail, and why."""
        return {entry.name: entry.reason for entry in self._all(TAIL) if entry.action == LEFT_ALONE}

    @property
    def middles(self) -> list[str]:
        """The names of the residual blocks whose middle is computed again in the backward pass."""
        return [entry.name for entry in self._all(MIDDLE) if entry.action != LEFT_ALONE]

    @property
    def middles_left_alone(self) -> dict[str, str]:
        """The names of the other residual blocks with a block in their middle, and why."""
        return {entry.name: entry.reason for entry in self._all(MIDDLE) if entry.action == LEFT_ALONE}

    @property
    def left_to_the_compiler(self) -> list[str]:
        """The names of the accelerated blocks that run their own forward under torch.compile."""
        return [entry.name for entry in self.entries if entry.compiled]

    def _all(self, part: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.part == part]

    def __str__(self) -> str:
        if not self.entries:
            return "gc_cuda: no global context or squeeze-and-excitation block that it knows"
        rows = [("name", "class", "what was done", "reason", "under torch.compile"), *map(_row, self.entries)]
        if not self.left_to_the_compiler:
            rows = [row[:-1] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        totals = [
            f"{len(served)} of {len(self._all(part))} {part}s {_DONE[part]}"
            for part, served in ((BLOCK, self.accelerated), (TAIL, self.tails), (MIDDLE, self.middles))
            if self._all(part)
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:], *totals])


def _row(entry: Entry) -> tuple[str, ...]:
    kind = entry.kind if entry.part == BLOCK else f"{entry.part} of {entry.kind}"
    return entry.name, kind, entry.action, entry.reason, entry.compiled


def accelerate(model: nn.Module, *, tails: bool | None = None, recompute: bool = False) -> Report:
    """Let the model's blocks run through the fused operation, in place, and the tails that they stand in.

    Served are GCNet's and mmcv's ``ContextBlock``, timm's ``GlobalContext``, ``SEModule`` and
    ``SqueezeExcite``, torchvision's ``SqueezeExcitation`` and mmdetection's ``SELayer``, with ReLU, SiLU or
    Hardswish inside and sigmoid or hard sigmoid as the gate. A block with another option, with a hook on one
    of its parts, or of a subclass with a forward of its own is left alone, and the report says why.

    A tail is the end of a bottleneck: batch norm, block, addition of the shortcut, ReLU. It is one operation
    (:func:`gc_cuda.bn_context_add_relu`), which keeps what a bottleneck without a block keeps for the
    backward pass. Served are torchvision's ``Bottleneck`` after :func:`insert`, mmdetection's, and timm's
    ``Bottleneck`` and ``BasicBlock``, after :func:`insert`, too, with those of its legacy SE-ResNets and of
    TResNet, each with one block that is served or gc_cuda's own. A tail with a norm that is not exactly
    ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm`` (or mmengine's, or timm's with an identity as activation) with
    running statistics and a momentum, with another activation, or with a hook on one of its modules is left
    alone. Running statistics, ``num_batches_tracked``, mmdetection's ``with_cp`` and what timm's ``DropPath``
    draws are as they were. A ``SyncBatchNorm`` exchanges with the processes that it
    exchanges with in eager PyTorch, and refuses CPU tensors as there; models may be converted to it before or
    after.

    A middle is a batch norm, an activation and a block between two convolutions, as in MobileNetV3,
    EfficientNet, RegNet and timm's gcresnets. With ``recompute`` its training keeps nothing but the first
    convolution's output: what follows is computed again in the backward pass. That is one map less with ReLU
    and two with SiLU or Hardswish: 6 to 21 % of what models keep, for steps that take 1 to 8 % longer than
    without it, and less than eager (docs/middles.md).
    Served are blocks of timm's and torchvision's models with ``nn.BatchNorm2d`` or timm's ``BatchNormAct2d``,
    in float32 and float64 on the CPU; elsewhere, and under autocast, their own forwards run.

    The modules stay the same objects with the same parameters, ``state_dict``, hooks, device, dtype and
    training mode; only their class becomes a subclass of what it was. Copies and pickles stay accelerated
    (loading one needs gc_cuda); accelerating twice is the same as once; :func:`restore` undoes it.

    A block, and a tail, is looked at anew in every call: if it, or a part of it, is changed later into
    something that is not served (by a hook, pruning, an adapter, another activation …), its own forward runs,
    which calls its parts. That also runs while a graph is traced, under the transforms of ``torch.func`` and
    forward-mode AD, for subclasses of Tensor such as DTensor, and for inputs that the operators do not take,
    as on other devices.

    Under ``torch.compile`` a block that pools by the mean and scales (squeeze-and-excitation) runs its own
    forward, too, unless it is part of a tail: the compiler would have to keep the operator's input. So does
    one that pools by the mean and adds, on the CPU, where the operator is slower. The report names them;
    docs/torch-compile.md has the numbers. Blocks with attention, and tails, stay operators.

    So a model traced by ``torch.jit.trace`` holds PyTorch's own operators and is not accelerated. In a graph
    of ``torch.fx`` (``symbolic_trace``, torchvision's ``create_feature_extractor``, timm's
    ``FeatureGraphNet``) of an accelerated model a block is one node, which calls it: it runs fused, and
    :func:`restore` of the model or of the graph restores both, as they share it. A block with a forward hook,
    or one that is traced by itself, is traced inside, as is all that is around the blocks, so that the nodes
    of a bottleneck keep their names. Restore the model first for nodes inside of a block, for a graph that
    runs where gc_cuda is not, and for ``torch.jit.script``. A graph of a model that was not accelerated, as
    timm's ``feature_cls="fx"`` makes it at once, has no blocks any more. Tails and middles stay in a graph
    where their classes are leaves: ``create_feature_extractor(model, nodes, tracer_kwargs={"leaf_modules":
    [type(model.get_submodule(name)) for name in report.tails]})``.

    Args:
        model: a block, or a module that has blocks anywhere inside.
        tails: None: a tail is one operation for tensors on the CPU, while for those on CUDA the bottleneck's
            own forward runs, with its block fused. True: on CUDA, too, where the kernels for it are switched
            on (``GC_CUDA_PATHS=tail``; they have not run on a GPU yet), also in a model that was accelerated
            before. False leaves the bottlenecks as they are; the blocks inside of them run fused by
            themselves.
        recompute: True lets training keep less of the middles, for more time.

    Returns:
        The blocks and tails by name, what was done with each, and why nothing was; print it.

    Raises:
        TypeError: for what is not a module, or tails that are not True, False or None.
        ImportError: where the extension is missing, or lacks CUDA and the blocks are on a GPU; nothing was
            changed then, and it says what to run.
    """
    _values.module(model, "model")
    if tails is not None and not isinstance(tails, bool):
        raise TypeError(f"tails must be True, False or None, got {type(tails).__name__}")
    _extension.require()
    found = list(_found(model, tails is not False, recompute))
    if any(p.is_cuda for one in found if one.part == BLOCK for p in one.module.parameters()):
        _extension.require_cuda()
    entries = []
    for name, module, kind, part in found:
        if part == TAIL:
            action, reason = _accelerate_tail(module, kind, on_cuda=tails is True)
        else:
            action, reason = _ACCELERATE[part](module, kind)
        own_name = kinds.full_name(swap.innermost(type(module)))
        by_compiler = part == BLOCK and action != LEFT_ALONE and _compiler_takes(module, kind)
        entries.append(Entry(name, own_name, action, reason, part, OWN_FORWARD if by_compiler else ""))
    return Report(tuple(entries))


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every block and every bottleneck is of its own class again.

    Raises:
        TypeError: for what is not a module.
    """
    _values.module(model, "model")
    for module in model.modules():
        if _is_accelerated(module):
            module.__class__ = swap.original(type(module))


def fused_forward(read: Read) -> swap.Forward:
    """The forward of an accelerated block, which pickles name."""

    def forward(block: Any, own_forward: Callable[..., Any], x: Any) -> Any:
        return run(block, read, own_forward, x)

    return forward


def tail_forward(kind: str, on_cuda: bool = False) -> swap.Forward:
    """The forward of an accelerated bottleneck of that class, which pickles name."""
    return tail_kinds.forward_of(tail_kinds.TAILS[kind], on_cuda)


def middle_forward(kind: str) -> swap.Forward:
    """The forward of a residual block whose middle is computed again, which pickles name."""
    return middles.forward_of(middles.MIDDLES[kind])


class _Part(NamedTuple):
    """A block, a bottleneck or a residual block of a class that is served or derives from one."""

    name: str
    module: nn.Module
    found: kinds.Found
    part: str


def _found(model: nn.Module, tails: bool, recompute: bool) -> Iterator[_Part]:
    for name, module in model.named_modules():
        block = kinds.find(module, kinds.OTHERS)
        if block is not None:
            yield _Part(name, module, block, BLOCK)
        bottleneck = tail_kinds.find(module) if tails else None
        if bottleneck is not None:
            yield _Part(name, module, bottleneck, TAIL)
        residual = middles.find(module) if recompute else None
        if residual is not None:
            yield _Part(name, module, residual, MIDDLE)


def _accelerate(block: nn.Module, found: kinds.Found) -> tuple[str, str]:
    """What was done, and why not."""
    if _is_accelerated(block):
        return ALREADY, ""
    kind = kinds.OTHERS[found.name]
    for method in kind.methods:
        if method in block.__dict__:
            return LEFT_ALONE, f"the instance has a {method} of its own"
    try:
        kinds.demand_own_methods(type(block), found.base, kind.methods)
        recipe_of(block, kind.read)
    except Unserved as unserved:
        return LEFT_ALONE, str(unserved)
    except AttributeError as error:  # another version of the framework
        return LEFT_ALONE, f"it is built differently: {error}"
    block.__class__ = swap.derive(swap.Derivation(type(block), PREFIX, fused_forward, (kind.read,)))
    return ACCELERATED, ""


def _compiler_takes(block: nn.Module, found: kinds.Found) -> bool:
    try:
        recipe = recipe_of(block, kinds.OTHERS[found.name].read)
    except (Unserved, AttributeError):  # changed since it was accelerated
        return False
    return left_to_the_compiler(
        attends=recipe.mask is not None,
        scales=recipe.mul is not None,
        on_cuda=any(parameter.is_cuda for parameter in block.parameters()),
    )


def _accelerate_tail(bottleneck: nn.Module, found: kinds.Found, *, on_cuda: bool) -> tuple[str, str]:
    arguments = (found.name, True) if on_cuda else (found.name,)
    own_class, action = type(bottleneck), ACCELERATED
    if _is_accelerated(bottleneck):
        own_class, action = swap.original(type(bottleneck)), ALREADY
        if not on_cuda:
            return action, ""
    elif reason := tail_kinds.why_not(bottleneck, found, on_cuda):
        return LEFT_ALONE, reason
    bottleneck.__class__ = swap.derive(swap.Derivation(own_class, PREFIX, tail_forward, arguments))
    return action, ""


def _accelerate_middle(residual: nn.Module, found: kinds.Found) -> tuple[str, str]:
    if _is_accelerated(residual):
        return ALREADY, ""
    reason = middles.why_not(residual, found)
    if reason:
        return LEFT_ALONE, reason
    residual.__class__ = swap.derive(swap.Derivation(type(residual), PREFIX, middle_forward, (found.name,)))
    return ACCELERATED, ""


_ACCELERATE = {BLOCK: _accelerate, MIDDLE: _accelerate_middle}


def _is_accelerated(module: nn.Module) -> bool:
    # By the prefix, not by fused_forward: gc_cuda may have been imported anew after it accelerated the
    # module.
    derivation = swap.derivation_of(type(module))
    return derivation is not None and derivation.prefix == PREFIX
