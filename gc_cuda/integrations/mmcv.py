"""Registers gc_cuda's block as mmcv's ContextBlock, so that mmdetection's configs build it by that name.

    custom_imports = dict(imports=["gc_cuda.integrations.mmcv"])

Importing this module is enough: it replaces the entry "ContextBlock" of mmengine's ``MODELS`` (mmcv 2.x)
or of mmcv's ``PLUGIN_LAYERS`` (1.x). Code that takes the class from ``mmcv.cnn``, like mmsegmentation's
``GCHead``, does not ask the registry: :func:`gc_cuda.accelerate` serves the model that it makes.
"""

from __future__ import annotations

from typing import Any

from gc_cuda import blocks


class ContextBlock(blocks.ContextBlock):
    """:class:`gc_cuda.ContextBlock`; a class of its own, because pickles name it."""


def _registry() -> Any:
    """Where mmcv's build_plugin_layer looks a name up; mmcv has entered its own block there by now."""
    try:
        import mmcv.cnn
    except ImportError as error:
        raise ImportError(
            "gc_cuda.integrations.mmcv needs mmcv: 2.x with mmengine (pip install mmcv-lite mmengine), or 1.x"
        ) from error
    if hasattr(mmcv.cnn, "PLUGIN_LAYERS"):
        return mmcv.cnn.PLUGIN_LAYERS
    from mmengine.registry import MODELS

    return MODELS


_registry().register_module(name="ContextBlock", force=True, module=ContextBlock)
