"""One line for an existing model: its blocks run fused, and the ends of the bottlenecks that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import fx, nn

from gc_cuda import _extension, _values
from gc_cuda.blocks._fused import Read, recipe_of, run
from gc_cuda.blocks._parts import Unserved, left_to_the_compiler
from gc_cuda.models import kinds, middles, report, swap
from gc_cuda.models import tails as tail_kinds
from gc_cuda.models.report import ACCELERATED, ALREADY, BLOCK, LEFT_ALONE, MIDDLE, TAIL, Entry
from gc_cuda.models.report import Report as Report
from gc_cuda.recognition import blocks as recognition

Entry.__module__ = Report.__module__ = __name__  # public here, in a file of their own

PREFIX = "Accelerated"  # of the names of the classes that are made


def accelerate(
    model: nn.Module, *, tails: bool | None = None, recompute: bool = False, example: Any = None
) -> Report:
    """Let the model's blocks run through the fused operation, in place, and the tails that they stand in.

    Served is what computes out = x * scale + term, where scale and term are made of the pooled x, the mean of
    the pixels or a softmax-weighted one, by something small. GCNet's and mmcv's ``ContextBlock``, timm's
    ``GlobalContext``, ``SEModule`` and ``SqueezeExcite``, torchvision's ``SqueezeExcitation`` and
    mmdetection's ``SELayer`` are known by name; any other module is recognized by its traced graph, whatever
    its class and its attributes are called. Two linear layers or 1x1 convolutions, with or without biases and
    layer norm, with ReLU, SiLU or Hardswish between and sigmoid or hard sigmoid as the gate, are one
    operation. With anything else between (batch norm, one layer, a convolution over channels, other
    activations and gates) the pooling and the broadcast run fused around the block's own operations, in
    training on maps large enough to gain, and with attention always; on CUDA that waits for a GPU
    (``GC_CUDA_PATHS=around``). docs/recognition.md says what is demanded of such a module. The report names
    the formula that was found, and of every attention block that it sees and does not serve the reason.

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
        example: an input of the model, or a tuple of them: it runs once, in evaluation mode, to tell the
            channels of blocks whose weights do not tell them. Few need it, and their reason asks for it.

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
    found = list(_recognized(model, found, example))
    if any(p.is_cuda for one in found if one.part == BLOCK for p in one.module.parameters()):
        _extension.require_cuda()
    entries = []
    for one in found:
        name, module, kind, part = one[:4]
        compiled = formula = ""
        if one.verdict is not None:
            action, reason = _accelerate_recognized(module, one.verdict)
        elif part == TAIL:
            action, reason = _accelerate_tail(module, kind, on_cuda=tails is True)
        else:
            action, reason = _ACCELERATE[part](module, kind)
        if part == BLOCK and action != LEFT_ALONE:
            formula, compiled = _told(module)
        own_name = kinds.full_name(swap.innermost(type(module)))
        entries.append(Entry(name, own_name, action, reason, part, compiled, formula))
    return Report(tuple(entries), _remark(model, found))


def _remark(model: nn.Module, found: list[_Part]) -> str:
    if not found and any(isinstance(module, fx.GraphModule) for module in model.modules()):
        return _TRACED
    return "" if recognition.available() else _BY_NAME_ALONE


_TRACED = (
    "it is a graph of torch.fx, in which blocks are single operations: accelerate the model before it is "
    "traced, and its blocks are nodes of the graph that run fused"
)
_BY_NAME_ALONE = (
    "only blocks of classes that gc_cuda knows by name were looked for: to recognize others by what they "
    f"compute wants torch {'.'.join(map(str, recognition.OLDEST_TORCH))} or newer"
)


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


def recognized_forward() -> swap.Forward:
    """The forward of an accelerated block of a class that is not known by name, which pickles name."""

    def forward(block: Any, own_forward: Callable[..., Any], x: Any) -> Any:
        return recognition.run(block, own_forward, x)

    return forward


class _Part(NamedTuple):
    """A block, a bottleneck or a residual block of a class that is served or derives from one."""

    name: str
    module: nn.Module
    found: Any  # kinds.Found; None: of no such class
    part: str
    verdict: recognition.Verdict | None = None  # of a block that was judged by what it computes


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


def _recognized(model: nn.Module, known: list[_Part], example: Any) -> Iterator[_Part]:
    """The known ones and the blocks among the other modules, in the model's order, the outermost of each."""
    by_name: dict[str, list[_Part]] = {}
    for one in known:
        by_name.setdefault(one.name, []).append(one)
    judged = {} if not recognition.available() else recognition.in_model(model, example)
    for name, module in model.named_modules():
        own = by_name.get(name, [])
        if name in judged and not any(one.part == BLOCK for one in own):
            yield _Part(name, module, None, BLOCK, judged[name])
        yield from own


def _accelerate_recognized(block: nn.Module, verdict: recognition.Verdict) -> tuple[str, str]:
    if _is_accelerated(block):
        return ALREADY, ""
    if verdict.plan is None:
        return LEFT_ALONE, verdict.reason
    block.__class__ = swap.derive(swap.Derivation(type(block), PREFIX, recognized_forward))
    return ACCELERATED, ""


def _accelerate(block: nn.Module, found: kinds.Found) -> tuple[str, str]:
    """What was done, and why not: by the reader of its class, else by what it computes."""
    if _is_accelerated(block):
        return ALREADY, ""
    action, reason = _accelerate_by_name(block, found)
    if action == LEFT_ALONE and recognition.available() and "forward" not in block.__dict__:
        verdict = recognition.judge(block)
        if verdict.plan is not None:
            return _accelerate_recognized(block, verdict)
    return action, reason


def _accelerate_by_name(block: nn.Module, found: kinds.Found) -> tuple[str, str]:
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


def _told(block: nn.Module) -> tuple[str, str]:
    """What an accelerated block computes, and what runs under torch.compile if something else."""
    derivation = swap.derivation_of(type(block))
    assert derivation is not None
    is_recognized = not derivation.arguments
    try:
        recipe = recipe_of(block, recognition.read if is_recognized else derivation.arguments[0])
    except (Unserved, AttributeError):  # changed since it was accelerated
        return "", ""
    plan = getattr(recipe, "plan", None)
    formula = report.formula_of(recipe) if plan is None else plan.text
    by_compiler = is_recognized or left_to_the_compiler(
        attends=bool(recipe.mask),
        scales=bool(recipe.mul),
        on_cuda=any(parameter.is_cuda for parameter in block.parameters()),
    )
    return formula, report.OWN_FORWARD if by_compiler else ""


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
