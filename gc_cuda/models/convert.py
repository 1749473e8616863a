"""Checkpoints from one framework's names to another's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from gc_cuda import _values

FRAMEWORKS = ("gc_cuda", "mmcv", "gcnet", "timm")

# GCNet, mmcv and gc_cuda agree. The part of a block, there and in timm's GlobalContext.
_PARTS = {
    "conv_mask": "conv_attn",
    **{
        f"{branch}.{number}": f"{mlp}.{layer}"
        for branch, mlp in (("channel_add_conv", "mlp_add"), ("channel_mul_conv", "mlp_scale"))
        for number, layer in (("0", "fc1"), ("1", "norm"), ("3", "fc2"))
    },
}
_NORMS = ("channel_add_conv.1", "channel_mul_conv.1", "mlp_add.norm", "mlp_scale.norm")


def convert_state_dict(
    state_dict: Mapping[str, Tensor], source: str, target: str = "gc_cuda"
) -> dict[str, Tensor]:
    """The state dict with the parameters of its global context blocks named and shaped for another framework.

    It may be that of a block or of a whole model: whatever is not a parameter of a block keeps its name,
    and what comes before one in a name does, too. The tensors are the same or views of the same. A layer norm
    is [P, 1, 1] in mmcv and [P] in timm. A checkpoint does not have its eps: 1e-5 in mmcv and GCNet, 1e-6 in
    timm, so that a ``gc_cuda.ContextBlock`` for timm's parameters wants ``eps=1e-6``.

    Args:
        state_dict: parameters by name.
        source: whose names they are: "timm", "mmcv", "gcnet" or "gc_cuda"; the last three agree.
        target: whose names are wanted.

    Returns:
        A new dict in the same order.

    Raises:
        ValueError: for an unknown framework, or where no parameter of a block is found.
        TypeError: for what is not a mapping of names, or a parameter of a block that is not a tensor.
    """
    _values.one_of(source, "source", FRAMEWORKS)
    _values.one_of(target, "target", FRAMEWORKS)
    if not isinstance(state_dict, Mapping):
        hint = "; pass its state_dict()" if isinstance(state_dict, nn.Module) else ""
        raise TypeError(f"state_dict must map names to tensors, got {type(state_dict).__name__}{hint}")
    from_timm, to_timm = source == "timm", target == "timm"
    parts = {timm if from_timm else ours: timm if to_timm else ours for ours, timm in _PARTS.items()}
    of_a_block = re.compile(
        r"((?:.*\.)?)(" + "|".join(map(re.escape, parts)) + r")\.(weight|bias)", re.DOTALL
    )
    converted, found = {}, False
    for key, tensor in state_dict.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict must have names for keys, got {type(key).__name__} {key!r}")
        match = of_a_block.fullmatch(key)
        if match is None:
            converted[key] = tensor
            continue
        found = True
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict[{key!r}] must be a torch.Tensor, got {type(tensor).__name__}")
        prefix, part, kind = match.groups()
        if part in _NORMS:
            tensor = tensor.reshape(-1) if to_timm else tensor.reshape(-1, 1, 1)
        converted[f"{prefix}{parts[part]}.{kind}"] = tensor
    if not found:
        within = [key for key, value in state_dict.items() if isinstance(value, Mapping)]
        hint = f"; are they in state_dict[{within[0]!r}]?" if within else ""
        raise ValueError(
            f"state_dict has no parameter of a global context block by the names of {source}, such as "
            f"{next(iter(parts))}.weight; got {len(state_dict)} others{hint}"
        )
    return converted
