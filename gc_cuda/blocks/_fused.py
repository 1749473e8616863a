"""The forward of a block: fused while :mod:`gc_cuda.blocks._parts` allows it, else what it is without us."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from gc_cuda import _extension
from gc_cuda.blocks import _graphs, _parts  # whose classes are looked up in it: a reload makes new ones
from gc_cuda.blocks._parts import Look, Recipe
from gc_cuda.ops import checks
from gc_cuda.ops.contexts import is_foreign, plain_pytorch_wanted
from gc_cuda.ops.operands import ACCUMULATION, filled
from gc_cuda.ops.whole_block import PolicyWithoutBias, policy_of, whole_block

Read = Callable[[Look, Any], Any]  # a Recipe, or Weights
Groups = Sequence[Sequence[Any]]  # the parameters of the mask, of add and of mul


class _Known(NamedTuple):
    """What is known of a block after its reader has seen it."""

    notes: Any  # a gc_cuda._C.Reading
    policy: Any  # a Policy; None of Weights; or what has a run of its own (gc_cuda.recognition.plan.Around)


_known: MutableMapping[nn.Module, _Known] = WeakKeyDictionary()


def run(block: Any, read: Read, own_forward: Callable[..., Any], x: Any, *, strict: bool = False) -> Any:
    """The output of ``block``, whose forward without us is ``own_forward(block, x)``.

    strict: an x that does not fit the parameters is an error in our words, and not left to ``own_forward``.
    Under torch.compile some kinds of blocks run ``own_forward`` after the checks. While torch.fx traces, the
    output is a node that calls the block, where the graph can have one.
    """
    if plain_pytorch_wanted() or is_foreign(x):
        return own_forward(block, x)
    if not isinstance(x, Tensor):
        if isinstance(x, Proxy):
            node = _graphs.node_of(block, x)
            return own_forward(block, x) if node is None else node
        if strict:
            checks.feature_map(x)
        return own_forward(block, x)
    given = x
    if torch._C._is_any_autocast_enabled():
        x = _as_autocast_promotes(x)
    compiled = torch.compiler.is_compiling()
    seen = (_see_compiled if compiled else _see)(block, read, x)
    if seen is None:
        return own_forward(block, given)
    fits, groups, policy = seen
    if policy.runs_itself:
        return policy.run(block, own_forward, given, groups[0])
    if not fits:
        fitting = fitted(x, groups, strict=strict)
        if fitting is None:
            return own_forward(block, given)
        groups = fitting
    mask, add, mul = groups
    weight, bias = mask or (None, None)
    if policy.lacks_bias:
        add, mul = filled(add), filled(mul)
    if compiled:  # a check costs no run time then
        checks.operands(x, weight, bias, add, mul, policy.eps)
        if _parts.left_to_the_compiler(attends=bool(mask), scales=bool(mul), on_cuda=x.is_cuda):
            return own_forward(block, given)
        return whole_block(x, weight, bias, add, mul, policy)
    try:
        # What fits is a plain tensor; what was made to fit may be a wrapper.
        return whole_block(x, weight, bias, add, mul, policy, unwrapped=fits)
    except Exception:
        try:
            checks.operands(x, weight, bias, add, mul, policy.eps)
        except (ValueError, TypeError, ImportError) as explanation:
            if strict or isinstance(explanation, ImportError):
                raise explanation from None
        else:
            raise
    return own_forward(block, given)  # which computes it, or says in its own words what is wrong


def parameters(block: Any, read: Read, x: Any) -> list[Any] | None:
    """The parameters of a block that is several operations; None where its eager form has to run."""
    if plain_pytorch_wanted() or is_foreign(x):
        return None
    seen = (_see_compiled if torch.compiler.is_compiling() else _see)(block, read, x)
    if seen is None:
        return None
    _, groups, _ = seen
    flat = [tensor for group in groups for tensor in group]
    return None if any(map(is_foreign, flat)) else flat


def policy_known_of(block: Any) -> Any:
    """What the block's policy was when it was looked at last; None before."""
    known = _known.get(block)
    return None if known is None else known.policy


def recipe_of(block: Any, read: Read) -> Recipe:
    """What the block computes; raises Unserved if its parts compute something else."""
    return read(_parts.Look(), block)


def _see(block: Any, read: Read, x: Any) -> tuple[bool, Groups, Any] | None:
    """Whether x and the parameters fit, the parameters as they are now, and the policy.

    None where the block is not served.
    """
    known = _known.get(block)
    current = None if known is None else known.notes.current(x)
    if current is None:
        _known.pop(block, None)
        try:
            known = _look(block, read)
        except (_parts.Unserved, AttributeError):  # the latter if a part lacks what such a part has
            return None
        current = known.notes.current(x)
        if current is None:  # Python gives the class no version: its blocks are read anew in every call
            places = recipe_of(block, read).parameters()
            current = False, *([getattr(part, name) for part, name in group] for group in places)
        _known[block] = known
    assert known is not None
    fits, *groups = current
    return fits, groups, known.policy


def _look(block: Any, read: Read) -> _Known:
    """Read the block and keep the notes."""
    _extension.require()
    from gc_cuda._C import Reading

    notes = Reading()
    look = _parts.Look(notes)
    look.nothing_on_all_modules()
    recipe = read(look, block)
    for group, names in enumerate(recipe.parameters()):
        for part, name in names:
            notes.parameter(part, name, group)
    policy = _policy(recipe)
    if policy is not None and not policy.runs_itself and _lacks_a_bias(recipe):
        policy = PolicyWithoutBias(*policy)
    return _Known(notes, policy)


def _lacks_a_bias(recipe: Recipe) -> bool:
    """Whether a bias of add or mul is absent now; if one goes later, an error lets the own forward run."""
    _, *branches = recipe.parameters()
    return any(part._parameters.get(name, part) is None for names in branches for part, name in names)


def _see_compiled(block: Any, read: Read, x: Any) -> tuple[bool, Groups, Any] | None:
    """The same while torch.compile traces, which guards what the reader looks at."""
    look = _parts.Look()
    try:
        look.nothing_on_all_modules()
        recipe = read(look, block)
    except (_parts.Unserved, AttributeError):
        return None
    groups = [[getattr(part, name) for part, name in names] for names in recipe.parameters()]
    policy = _policy(recipe)
    return False, groups, None if policy is None else PolicyWithoutBias(*policy)


def _policy(recipe: Any) -> Any:
    if isinstance(recipe, _parts.Weights):
        return None
    plan = getattr(recipe, "plan", None)
    if plan is not None:
        return plan
    return policy_of(recipe.activation, recipe.gate, recipe.eps)


def _as_autocast_promotes(x: Tensor) -> Tensor:
    """x in the dtype of the eager block's output: x plus what a convolution gives under autocast.

    It changes only a half x under autocast to the other half type, which eager widens to float32.
    """
    kind = "cuda" if x.is_cuda else "cpu"
    if not torch.is_autocast_enabled(kind) or x.is_meta or x.dtype not in ACCUMULATION:
        return x
    dtype = torch.get_autocast_dtype(kind)
    return x if x.dtype == dtype else x.to(torch.promote_types(x.dtype, dtype))


def fitted(x: Tensor, groups: Groups, *, strict: bool = False) -> Groups | None:
    """The parameters in dtypes that may travel with x; None if x and they are not served together."""
    parameters = [tensor for group in groups for tensor in group if tensor is not None]
    if any(map(is_foreign, parameters)):
        return None
    if x.dim() != 4 or not (x.is_cpu or x.is_cuda or x.is_meta) or x.dtype not in ACCUMULATION:
        if strict:
            checks.feature_map(x)
        return None
    odd = [tensor for tensor in parameters if not checks.fits(tensor, x)]
    if not odd:
        return groups
    if torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu") and all(
        tensor.dtype != torch.float64 for tensor in (x, *odd)
    ):
        # Eager would cast both to the dtype of autocast.
        return [[t if t is None or checks.fits(t, x) else t.to(x.dtype) for t in group] for group in groups]
    if strict:
        raise TypeError(f"x must be {odd[0].dtype} like the block's parameters, got {x.dtype}")
    return None
